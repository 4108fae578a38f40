"""Which assets a task needs: those that its configuration names, and those that its code loads."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamer_isaac.assets.mirror import Asset, UnsafePath, parse

RUN_TIME = ("Isaac/Environments/Grid/default_environment.usd",)
"""Loaded by Isaac Lab's own code and not through any configuration: the default ground plane."""

ROOTS = {
    "NUCLEUS_ASSET_ROOT_DIR": "",
    "NVIDIA_NUCLEUS_DIR": "NVIDIA",
    "ISAAC_NUCLEUS_DIR": "Isaac",
    "ISAACLAB_NUCLEUS_DIR": "Isaac/IsaacLab",
}
"""Isaac Lab's names for folders of a release."""


def assets_of(config: Any) -> dict[Asset, str]:
    """Every asset that is named anywhere in a configuration, and the path of its field."""
    found: dict[Asset, str] = {}
    seen: set[int] = set()

    def visit(node: Any, path: str) -> None:
        if isinstance(node, str):
            try:
                asset = parse(node)
            except UnsafePath:
                asset = None
            if asset is not None:
                found.setdefault(asset, path)
            return
        if node is None or isinstance(node, int | float | bytes) or id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, dict):
            for key, value in node.items():
                visit(value, f"{path}[{key!r}]")
        elif isinstance(node, list | tuple | set):
            for i, value in enumerate(node):
                visit(value, f"{path}[{i}]")
        elif hasattr(node, "__dict__") and not isinstance(node, type) and not callable(node):
            for key, value in vars(node).items():
                visit(value, f"{path}.{key}")

    visit(config, "cfg")
    return found


def with_run_time(
    assets: dict[Asset, str], release: str, entry_point: Any = None
) -> dict[Asset, str]:
    """The same with what is loaded by code: Isaac Lab's own, and that of the task's environment.

    Args:
        entry_point: of the task in the registry, e.g. `package.module:FactoryEnv`.
    """
    more = {Asset(release, path): "loaded by Isaac Lab's code" for path in RUN_TIME}
    if isinstance(entry_point, str) and ":" in entry_point:
        module = entry_point.split(":")[0]
        more |= {Asset(release, path): f"loaded by {by}" for path, by in _in_code(module).items()}
    return {**more, **assets}


def _in_code(module: str) -> dict[str, str]:
    """Paths below a release that a module's source spells out, as `f"{ISAAC_NUCLEUS_DIR}/x.usd"`,
    or an environment that it is built on; with the module that does it. Isaac Lab's own package is
    left out: it holds a hundred examples that no task loads."""
    out: dict[str, str] = {}
    queue, seen = [module], {module}
    while queue:
        name = queue.pop()
        if name.split(".")[0] == "isaaclab":
            continue
        try:
            spec = importlib.util.find_spec(name)
            text = Path(spec.origin).read_text() if spec and spec.origin else ""
            tree = ast.parse(text)
        except (ImportError, OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                for path in _spelled(node):
                    out.setdefault(path, name)
            elif isinstance(node, ast.ImportFrom):
                other = _absolute(node, name, bool(spec and spec.submodule_search_locations))
                # An environment is built on others of its package, not on other tasks.
                if other.rpartition(".")[2].endswith("_env") and other not in seen:
                    seen.add(other)
                    queue.append(other)
    return out


def _spelled(node: ast.JoinedStr) -> Iterator[str]:
    if len(node.values) != 2:
        return
    start, rest = node.values
    if (
        isinstance(start, ast.FormattedValue) and isinstance(start.value, ast.Name)
        and start.value.id in ROOTS and isinstance(rest, ast.Constant)
    ):  # fmt: skip
        path = f"{ROOTS[start.value.id]}{rest.value}".lstrip("/")
        if Path(path).suffix:
            yield path


def _absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package] if node.level else []
    return ".".join([*parts, *([node.module] if node.module else [])])
