"""Simulators under one contract: `make_env(cfg, backend, device)`."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from dreamer_isaac.config import Config
from dreamer_isaac.envs.contract import EnvInfo, Observation, Outcome, SimEnv

__all__ = ["EnvInfo", "Observation", "Outcome", "SimEnv", "make_env"]


def _without_egl() -> None:
    """Let MuJoCo be imported on a machine without EGL, as a bare server or container is.

    mjlab asks it for EGL if nobody else asks for anything, and MuJoCo, if it is not imported yet
    (TorchRL does that), then fails with an AttributeError of PyOpenGL's. Nothing here draws with
    it (render.py).
    """
    if not sys.platform.startswith("linux") or "MUJOCO_GL" in os.environ:
        return
    for name in ("libEGL.so.1", "libEGL.so"):
        try:
            ctypes.CDLL(name)
            return
        except OSError:
            pass
    os.environ["MUJOCO_GL"] = "disable"


_without_egl()  # before anything imports MuJoCo: it reads the variable once


def make_env(cfg: Config, backend: str, device: torch.device, render: bool = False) -> SimEnv:
    """The environment that `cfg.env` names.

    Args:
        backend: as `launch.choose_backend` decided. device: of the simulation.
        render: prepare an off-screen camera for `SimEnv.render`.

    Raises:
        ConfigError: for an unknown task, or a field of the task's configuration that is not there.
    """
    if backend == "toy":
        from dreamer_isaac.envs.toy import ToyEnv

        image = cfg.env.image_size if cfg.env.from_pixels == "true" else 0
        return ToyEnv(
            cfg.env.num_envs, cfg.env.seed, device, cfg.env.action_bound, image, cfg.env.pixels_only
        )
    if backend == "mjlab":
        from dreamer_isaac.envs.mjlab import make_mjlab

        return make_mjlab(cfg, device, render)
    if backend == "isaaclab":
        from dreamer_isaac import launch
        from dreamer_isaac.envs.isaaclab import make_isaaclab

        launch.prepared.sim.device = str(device)
        return make_isaaclab(cfg, device, launch.prepared)
    raise ValueError(f"no backend {backend!r}")
