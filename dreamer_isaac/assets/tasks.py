"""Which assets a task's configuration names."""

from __future__ import annotations

from typing import Any

from dreamer_isaac.assets.mirror import Asset, UnsafePath, parse

RUN_TIME = ("Isaac/Environments/Grid/default_environment.usd",)
"""Loaded by Isaac Lab's code and not through any configuration: the default ground plane."""


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


def with_run_time(assets: dict[Asset, str], release: str) -> dict[Asset, str]:
    """The same with what Isaac Lab's code loads by itself."""
    more = {Asset(release, path): "loaded by Isaac Lab's code" for path in RUN_TIME}
    return {**more, **assets}
