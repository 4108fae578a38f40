"""Which simulator runs, and the process environment it needs. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from dreamer_isaac.config import (
    EMBEDDED_TASKS,
    MJLAB_PREFIX,
    Config,
    ConfigError,
    isaaclab_available,
    module_exists,
)


def choose_backend(cfg: Config) -> tuple[str, str]:
    """The backend to use and the reason in words.

    Raises:
        ConfigError: when the backend that was asked for is not installed or not built yet.
    """
    asked = cfg.env.backend
    if asked == "toy":
        return "toy", "asked for"
    if asked == "isaaclab" or (asked == "auto" and isaaclab_available()):
        if asked == "isaaclab" and not isaaclab_available():
            raise ConfigError([
                "env.backend=isaaclab, but Isaac Lab cannot be imported here (no isaaclab with "
                "isaacsim or newton). Remedy: env.backend=mjlab, or run in Isaac Lab's Python."
            ])  # fmt: skip
        if asked == "auto" and (cfg.env.name in EMBEDDED_TASKS or _mjlab_id(cfg)) \
                and module_exists("mjlab"):  # fmt: skip
            return "mjlab", "Isaac Lab is installed, but its backend is not built yet"
        raise ConfigError(["the isaaclab backend is not built yet. Remedy: env.backend=mjlab."])
    if not module_exists("mjlab"):
        raise ConfigError([
            f"env.backend={asked} needs mjlab, which is not installed here. Remedy: "
            "bash setup-and-run.sh --build-only, then .venv/bin/python dreamer_isaac.py ..."
        ])  # fmt: skip
    return "mjlab", "asked for" if asked == "mjlab" else "Isaac Lab is not installed"


def _mjlab_id(cfg: Config) -> bool:
    return cfg.env.name.startswith(MJLAB_PREFIX) or bool(cfg.env.import_)


@contextmanager
def simulator(cfg: Config) -> Iterator[None]:
    """Prepare the process for the simulator; must be entered before torch is imported.

    The embedded simulator needs only environment variables.
    """
    os.environ.setdefault("TD_GET_DEFAULTS_TO_NONE", "1")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("MPLBACKEND", "agg")
    yield
