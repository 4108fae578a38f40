"""What a user says of a task: any field of its configuration by path, and modules of their own."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from dreamer_isaac.config import ConfigError, leaves


def import_tasks(module: str) -> None:
    """Import the user's module that registers tasks; nothing where `module` is empty.

    Raises:
        ConfigError: when it cannot be imported.
    """
    if not module:
        return
    try:
        importlib.import_module(module)
    except ImportError as e:
        raise ConfigError([f"env.import={module}: {e}. It must be importable from here, e.g. "
                           "with PYTHONPATH=<the folder of the package>."]) from e  # fmt: skip


def children(node: Any) -> dict[str, Any]:
    """What can be set below a node of a configuration."""
    if isinstance(node, Mapping):
        return {str(k): v for k, v in node.items()}
    if dataclasses.is_dataclass(node):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    if isinstance(node, list | tuple):
        return {str(i): v for i, v in enumerate(node)}
    return {}


def set_paths(cfg: Any, tree: Mapping[str, Any]) -> None:
    """Set every path of `tree` in `cfg`, in place.

    Raises:
        ConfigError: with a line for every path that is not there (and what is there), and for
            every value of the wrong type.
    """
    problems = []
    for path, value in leaves(tree).items():
        try:
            _set(cfg, path.split("."), value)
        except ValueError as e:
            problems.append(f"env.cfg.{path}={value!r}: {e}")
    if problems:
        raise ConfigError(problems)


def _set(cfg: Any, names: list[str], value: Any) -> None:
    node = cfg
    for i, name in enumerate(names[:-1]):
        below = children(node)
        if name not in below:
            here = ".".join(names[:i]) or "the task"
            raise ValueError(f"{here} has no '{name}'. There: {', '.join(below) or 'nothing'}.")
        node = below[name]
    name, below = names[-1], children(node)
    if name not in below:
        here = ".".join(names[:-1]) or "the task"
        raise ValueError(f"{here} has no '{name}'. There: {', '.join(below) or 'nothing'}.")
    new = _like(below[name], value)
    if isinstance(node, dict):
        node[name] = new
    elif isinstance(node, list):
        node[int(name)] = new
    elif isinstance(node, tuple):
        raise ValueError("one entry of a tuple cannot be set; set the whole tuple.")
    else:
        setattr(node, name, new)


def _like(old: Any, value: Any) -> Any:
    """`value` in the type of the value that it replaces."""
    if isinstance(value, dict) or (children(old) and not isinstance(old, list | tuple)):
        raise ValueError(f"is a section with {', '.join(children(old)) or 'no keys'}.")
    if old is None or value is None or callable(old):
        if callable(old):
            raise ValueError("is a function and cannot be set from here.")
        return value
    if isinstance(old, bool) or isinstance(value, bool):
        if isinstance(old, bool) and isinstance(value, bool):
            return value
        raise ValueError(f"must be a {type(old).__name__}, as {old!r} was.")
    if isinstance(old, float) and isinstance(value, int | float):
        return float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(value, type(old)):
        return value
    raise ValueError(f"must be a {type(old).__name__}, as {old!r} was.")
