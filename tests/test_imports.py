"""Imports point down only (CONTRIBUTING, "The house")."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "dreamer_isaac"
LAYERS = [
    {"config", "cameras", "helpers"},
    {"assets", "jobs", "compiling", "profiling", "envs", "models", "replay", "checkpoint", "logger"}
    | {"optim", "launch"},
    {"learner", "learner_v1", "collect", "evaluate", "export", "report", "precompile"},
    {"main", "train", "cli"},
]
# cli composes the configuration (bottom) and starts main (top), which dumps the configuration.


def imports() -> dict[str, set[str]]:
    """module -> modules of this package that it imports, by first name."""
    out: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        found = out.setdefault(module, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dreamer_isaac"):
                parts = (node.module or "").split(".")
                found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
            elif isinstance(node, ast.Import):
                names = [a.name.split(".") for a in node.names]
                found |= {n[1] for n in names if n[0] == "dreamer_isaac" and len(n) > 1}
    return out


def test_every_module_has_a_layer() -> None:
    assert set(imports()) == set().union(*LAYERS)


def test_no_import_points_up() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    upward = [
        f"{module} -> {other}" for module, others in imports().items() for other in others
        if other in level and level[other] > level[module]
    ]  # fmt: skip
    assert upward == []


def test_envs_and_models_do_not_know_each_other() -> None:
    graph = imports()
    assert "models" not in graph["envs"] and "envs" not in graph["models"]
    assert not graph["learner"] & {"envs", "replay", "collect", "checkpoint", "logger"}
