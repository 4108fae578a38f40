"""Which simulator runs, and the process environment it needs. Imports no torch."""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreamer_isaac.assets.mirror import Mirror, parse
from dreamer_isaac.assets.resolver import Resolver, install
from dreamer_isaac.assets.tasks import assets_of, with_run_time
from dreamer_isaac.cameras import has_its_own
from dreamer_isaac.config import (
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
    if asked == "isaaclab" and not isaaclab_available():
        raise ConfigError([
            "env.backend=isaaclab, but Isaac Lab cannot be imported here (no isaaclab with "
            "isaacsim or newton). Remedy: env.backend=mjlab, or run in Isaac Lab's Python."
        ])  # fmt: skip
    if asked == "isaaclab":
        return "isaaclab", "asked for"
    if asked == "auto" and isaaclab_available() and not _mjlab_id(cfg):
        return "isaaclab", "Isaac Lab is installed"
    if not module_exists("mjlab"):
        raise ConfigError([
            f"env.backend={asked} needs mjlab, which is not installed here. Remedy: "
            "bash setup-and-run.sh --build-only, then .venv/bin/python dreamer_isaac.py ..."
        ])  # fmt: skip
    if asked == "mjlab":
        return "mjlab", "asked for"
    if isaaclab_available():
        return "mjlab", "a task of mjlab's, or of env.import without env.backend=isaaclab"
    return "mjlab", "Isaac Lab is not installed"


def _mjlab_id(cfg: Config) -> bool:
    return cfg.env.name.startswith(MJLAB_PREFIX) or bool(cfg.env.import_)


def wants_cameras(cfg: Config) -> bool:
    """Whether rendering has to be enabled before the task is known: where cameras are asked for, or
    the task's name says that it has some, whether they are observed or not."""
    asked = cfg.env.from_pixels == "true" or bool(cfg.env.cameras)
    return asked or has_its_own(cfg.env.name)


prepared: Any = None
"""The configuration of the Isaac Lab task that `simulator` has launched."""


def isaaclab_is_3() -> bool:
    """Whether the Isaac Lab that is installed is 3.x: by its files, nothing is imported."""
    spec = importlib.util.find_spec("isaaclab_tasks")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any((Path(f) / "utils" / "sim_launcher.py").is_file() for f in folders)


@contextmanager
def simulator(cfg: Config) -> Iterator[None]:
    """Prepare the process for the simulator; must be entered before torch is imported.

    The embedded simulator needs only environment variables. Isaac Lab 3.x says by the task's
    configuration what it needs; 2.3 needs Isaac Sim, which must be started before torch.
    """
    os.environ.setdefault("TD_GET_DEFAULTS_TO_NONE", "1")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("MPLBACKEND", "agg")
    if choose_backend(cfg)[0] != "isaaclab":
        yield
        return
    with _assets(cfg) as resolver, (_isaaclab_3 if isaaclab_is_3() else _isaac_sim)(cfg, resolver):
        yield


@contextmanager
def _assets(cfg: Config) -> Iterator[Resolver | None]:
    """The mirror, in place before anything of Isaac Lab is imported."""
    if not cfg.assets.offline:
        yield None
        return
    resolver = Resolver(Mirror(Path(cfg.assets.root)), cfg.assets.strict, say=print)
    install(resolver)
    try:
        yield resolver
    finally:
        print(resolver.report())


def _preflight(cfg: Config, resolver: Resolver | None, task: Any) -> None:
    """Say what of the task's assets is missing, before the simulator starts.

    Raises:
        ConfigError: in a strict run something is.
    """
    if resolver is None:
        return
    from isaaclab.utils import assets as isaaclab_assets

    from dreamer_isaac.envs.isaaclab import entry_point

    own = parse(f"{isaaclab_assets.NUCLEUS_ASSET_ROOT_DIR}/Isaac")
    named = assets_of(task)
    if own:
        named = with_run_time(named, own.release, entry_point(cfg))
    result = resolver.preflight(named)
    text = result.describe(resolver.mirror.root)
    if result.missing and cfg.assets.strict:
        raise ConfigError([text])
    print(text)
    if result.below:
        resolver.fetch(result.below)


@contextmanager
def _isaaclab_3(cfg: Config, resolver: Resolver | None) -> Iterator[None]:
    global prepared
    from isaaclab_tasks.utils import launch_simulation

    from dreamer_isaac.envs.isaaclab import task_config

    device = cfg.env.device
    if device == "auto":
        import torch

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    prepared = task_config(cfg, device)
    _preflight(cfg, resolver, prepared)
    options = {"headless": True, "device": device, "enable_cameras": wants_cameras(cfg)}
    try:
        with launch_simulation(prepared, options):
            yield
    finally:
        prepared = None


@contextmanager
def _isaac_sim(cfg: Config, resolver: Resolver | None) -> Iterator[None]:
    global _leave, prepared
    from isaaclab.app import AppLauncher

    options: dict[str, Any] = {"headless": True, "enable_cameras": wants_cameras(cfg)}
    if cfg.env.device != "auto":
        options["device"] = cfg.env.device
    arguments, sys.argv = sys.argv, sys.argv[:1]  # it would read and change ours
    try:
        AppLauncher(options)
    finally:
        sys.argv = arguments
    _leave = os._exit  # instead of closing Kit
    from dreamer_isaac.envs.isaaclab import task_config

    prepared = task_config(cfg, options.get("device", "cuda:0"))
    _preflight(cfg, resolver, prepared)
    yield


_leave: Callable[[int], None] | None = None


def leave(code: int) -> int:
    """Call last, with the exit code. Kit ends the process itself when it is closed, with status 0
    whatever has happened; so where it runs, the process ends here, with ours."""
    if _leave is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        _leave(code)
    return code
