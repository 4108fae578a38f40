"""What an asset refers to: USD layers by `pxr`, MDL materials by their text."""

# pxr has no type information.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import re
from pathlib import Path

USD = {".usd", ".usda", ".usdc"}

RENDERERS_OWN = {
    "OmniPBR.mdl", "OmniPBR_Opacity.mdl", "OmniPBR_ClearCoat.mdl", "OmniGlass.mdl",
    "OmniGlass_Opacity.mdl", "OmniSurface.mdl", "OmniSurfaceLite.mdl", "OmniSurfacePresets.mdl",
    "OmniHair.mdl", "OmniVolumeDensity.mdl", "gltf/pbr.mdl", "UsdPreviewSurface.mdl",
    "nvidia/core_definitions.mdl",
}  # fmt: skip
"""Materials that come with the renderer: USD files name them, but they do not lie beside them."""

_QUOTED = re.compile(r'"([^"\\\n]*)"')
_TEXTURE = re.compile(r"\.(?:bmp|dds|exr|hdr|ies|jpe?g|ktx2?|png|tga|tiff?|tx)$", re.IGNORECASE)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_IMPORT = re.compile(r"\b(?:import\s+([^;]+?)|using\s+(\S+)\s+import\s+[^;]+?)\s*;")


def comes_with_the_renderer(path: str) -> bool:
    """Whether a file that is nowhere beside its user need not be there."""
    return any(path.endswith("/" + name) for name in RENDERERS_OWN)


class NeedsUsd(RuntimeError):
    """USD files cannot be read here."""


def references(path: Path) -> list[str]:
    """Every file that `path` needs, as it is written there: sublayers, references, payloads,
    textures and other asset-valued attributes of a USD layer (in every variant); textures and
    relative imports of an MDL material. Nothing for other files.

    Raises:
        NeedsUsd: when `pxr` is not installed.
        ValueError: the USD file cannot be opened.
    """
    if path.suffix.lower() in USD:
        return _usd(path)
    if path.suffix.lower() == ".mdl":
        return _mdl(path.read_text(errors="replace"))
    return []


def _usd(path: Path) -> list[str]:
    try:
        from pxr import Sdf, Tf, UsdUtils
    except ImportError:
        raise NeedsUsd(
            "following references of USD files needs pxr. Remedy: pip install usd-core"
        ) from None
    try:
        layer = Sdf.Layer.OpenAsAnonymous(str(path))
    except Tf.ErrorException as e:
        raise ValueError(f"{path} cannot be opened as USD: {' '.join(str(e).split())}") from None
    if layer is None:
        raise ValueError(f"{path} cannot be opened as USD")
    found: dict[str, None] = {}

    def note(asset: str) -> str:
        if asset:
            found.setdefault(asset)
        return asset

    # It visits every asset path of the layer, whatever it belongs to; what is returned would be
    # written back to the anonymous copy, which is thrown away.
    UsdUtils.ModifyAssetPaths(layer, note)
    return list(found)


def _mdl(text: str) -> list[str]:
    text = _COMMENT.sub(" ", text)
    found: dict[str, None] = {}
    for name in _QUOTED.findall(text):
        if _TEXTURE.search(name):
            found.setdefault(name)
    for first, second in _IMPORT.findall(text):
        module = (first or second).strip()
        if not module.startswith("."):  # `::nvidia::...`: a library that the renderer brings
            continue
        parts = module.split("::")
        if first:  # `import .::OmniPBR::OmniPBR`: the last name is a material, or `*`
            parts = parts[:-1]
        names = [p for p in parts if p not in ("", ".")]
        if names and names != [".."]:
            found.setdefault("/".join(names) + ".mdl")
    return list(found)
