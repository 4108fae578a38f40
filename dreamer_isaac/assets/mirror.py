"""Where an asset lies on disk.

The truth is the server's exact tree, one per release, because USD files refer to each other across
categories by relative paths::

    <root>/Assets/Isaac/5.1/Isaac/IsaacLab/Robots/Unitree/Go2/go2.usd

The flat layout that people know, `<root>/Robots/Unitree/Go2/go2.usd`, is a view of it made of
links; files dropped there by hand are found too. Only the standard library is needed here.
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SERVER = "https://omniverse-content-production.s3-us-west-2.amazonaws.com"
"""The asset server of Isaac Sim; `Assets/Isaac/<release>/...` below it."""

CATEGORIES = (
    "Robots", "Controllers", "Environments", "Materials", "Props", "ActuatorNets", "Policies",
    "Mimic",
)  # fmt: skip
"""Top folders of the flat layout."""

_TREE = re.compile(r"(?:^|/)Assets/Isaac/(?P<release>\d+(?:\.\d+)*)/(?P<path>.+)$")


class UnsafePath(ValueError):
    """A name that would leave the mirror, or is no name of a file."""


@dataclass(frozen=True, order=True)
class Asset:
    """One file of one release."""

    release: str
    path: str
    """Below `Assets/Isaac/<release>/`, with forward slashes, e.g. `Isaac/Robots/Ant/ant.usd`."""

    @property
    def key(self) -> str:
        """The path on the server."""
        return f"Assets/Isaac/{self.release}/{self.path}"

    def url(self, server: str = SERVER) -> str:
        return f"{server.rstrip('/')}/{quote(self.key)}"


def clean(path: str) -> str:
    """A relative path in normal form.

    Raises:
        UnsafePath: for an absolute path, one that climbs above its start, a drive, a backslash, a
            control character, or nothing at all.
    """
    if not path or any(ord(c) < 32 or c in "\\:" for c in path):
        raise UnsafePath(f"{path!r} is no path of an asset")
    normal = posixpath.normpath(path)
    if path.startswith("/") or normal == "." or normal.split("/")[0] == "..":
        raise UnsafePath(f"{path!r} leaves the mirror")
    return normal


def parse(reference: str) -> Asset | None:
    """The asset that a URL, or a path with the server's tree in it, means; None for anything else.

    Raises:
        UnsafePath
    """
    parts = urlsplit(reference)
    text = unquote(parts.path) if parts.scheme else reference
    found = _TREE.search(text)
    return Asset(found["release"], clean(found["path"])) if found else None


def relative(asset: Asset, reference: str) -> Asset | None:
    """What a reference inside `asset` means: relative to its folder, or by URL. None for anything
    that is not in the release's tree.

    Raises:
        UnsafePath: when it climbs out of the tree.
    """
    if urlsplit(reference).scheme in ("http", "https", "omniverse"):
        return parse(reference)
    if urlsplit(reference).scheme or reference.startswith("/"):
        return None
    return Asset(asset.release, clean(posixpath.join(posixpath.dirname(asset.path), reference)))


def category_prefixes(category: str, subset: str = "") -> list[str]:
    """Where a category of the flat layout lies in a release's tree, e.g. `Robots`, `Unitree`."""
    below = f"{category}/{subset}/" if subset else f"{category}/"
    return [f"Isaac/IsaacLab/{below}", f"Isaac/{below}"]


def flat(path: str) -> str | None:
    """The place of a release's file in the flat layout, or None where it has none."""
    for prefix in ("Isaac/IsaacLab/", "Isaac/"):
        rest = path.removeprefix(prefix)
        if rest != path and rest.split("/")[0] in CATEGORIES:
            return rest
    return None


class Mirror:
    """A folder with assets.

    Args:
        root: need not exist yet.
    """

    def __init__(self, root: Path):
        self.root = Path(os.path.abspath(root))

    def place(self, asset: Asset) -> Path:
        """Where the asset belongs, there or not."""
        return self.root / "Assets" / "Isaac" / asset.release / clean(asset.path)

    def locate(self, asset: Asset) -> Path | None:
        """The local file: in the release's tree, or dropped into the flat layout by hand."""
        own = self.place(asset)
        if own.exists():
            return own
        short = flat(asset.path)
        if short is not None:
            other = self.root / short
            if other.exists() and not self._is_view_of_another(other, own):
                return other
        return None

    def _is_view_of_another(self, path: Path, own: Path) -> bool:
        """Whether it is a link that we made, to a file that is not this asset: another release's,
        or one of the two that share a place in the flat layout."""
        real = path.resolve()
        return real.is_relative_to(self.root.resolve() / "Assets" / "Isaac") and real != own

    def writable(self, asset: Asset) -> Path:
        """`place`, with its folders made, when nothing on the way leads out of the mirror.

        Raises:
            UnsafePath: a folder on the way, or the file, is a link that leads elsewhere.
        """
        path = self.place(asset)
        self.root.mkdir(parents=True, exist_ok=True)
        real_root = self.root.resolve()
        at = self.root
        for part in path.relative_to(self.root).parts[:-1]:
            at = at / part
            at.mkdir(exist_ok=True)
            if not at.resolve().is_relative_to(real_root):
                raise UnsafePath(f"{at} is a link that leads out of the mirror")
        if path.is_symlink():
            raise UnsafePath(f"{path} is a link; the mirror holds files")
        return path

    def show(self, asset: Asset) -> None:
        """Link the asset into the flat layout, unless something is there already."""
        short = flat(asset.path)
        if short is None:
            return
        link = self.root / short
        if link.is_symlink() and not link.exists():
            link.unlink()  # what it pointed to is gone
        if os.path.lexists(link):
            return
        above = link.parent
        while not os.path.lexists(above):
            above = above.parent
        if not above.resolve().is_relative_to(self.root.resolve()):
            return
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(self.place(asset), link.parent))
        except OSError:  # a file system without links, a file in the way: the tree is enough
            return

    def releases(self) -> list[str]:
        folder = self.root / "Assets" / "Isaac"
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
