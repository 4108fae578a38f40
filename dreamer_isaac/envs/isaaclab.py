"""NVIDIA Isaac Lab through TorchRL's `IsaacLabWrapper`: 3.x on Newton or PhysX, 2.3 on Isaac Sim.

`launch.simulator` has started what the version needs before this module is imported (2.3: Isaac
Sim, which must come before torch; 3.x: nothing, or Kit where the task's physics asks for it).
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import difflib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamer_isaac.config import Config, ConfigError
from dreamer_isaac.envs.contract import EnvInfo, SimEnv, check_specs
from dreamer_isaac.envs.isaaclab_cameras import Cameras, add_cameras
from dreamer_isaac.envs.paths import import_tasks, set_paths

ENTRY = "env_cfg_entry_point"
"""Where Isaac Lab's registry keeps a task's configuration."""

_running: list[str] = []
"""The task of this process: there can be one."""


def load_tasks(module: str = "") -> list[str]:
    """Import Isaac Lab's and the user's tasks; returns every id that has a configuration.

    Raises:
        ConfigError: when `module` cannot be imported.
    """
    import gymnasium
    import isaaclab_tasks  # noqa: F401  (registers Isaac Lab's own)

    import_tasks(module)
    return sorted(k for k, spec in gymnasium.registry.items() if ENTRY in (spec.kwargs or {}))


def task_id(name: str, known: list[str]) -> str:
    """The registered id for `name`, with or without its version: Isaac Lab dropped the `-v0` of its
    ids in 2026.

    Raises:
        ConfigError: with the nearest ids.
    """
    short = name.removesuffix("-v0")
    for candidate in (name, short, f"{short}-v0"):
        if candidate in known:
            return candidate
    near = difflib.get_close_matches(name, known, n=3) or known[:5]
    raise ConfigError([f"env.name={name!r} is no task of Isaac Lab. Known: {', '.join(near)}."])


def entry_point(cfg: Config) -> Any:
    """What the registry makes the task's environment from."""
    import gymnasium

    return gymnasium.spec(task_id(cfg.env.name, load_tasks(cfg.env.import_))).entry_point


def task_config(cfg: Config, device: str) -> Any:
    """The task's own configuration with `env.num_envs`, `env.seed`, the device, the physics engine
    and `env.cfg` applied.

    Raises:
        ConfigError: unknown task, physics engine or field.
    """
    from isaaclab_tasks.utils import parse_cfg

    name = task_id(cfg.env.name, load_tasks(cfg.env.import_))
    task: Any = parse_cfg.load_cfg_from_registry(name, ENTRY)
    resolve: Callable[..., Any] | None = getattr(parse_cfg, "resolve_presets", None)
    physics = cfg.env.physics
    if resolve is not None:  # 3.x keeps alternatives side by side until one is chosen
        if physics == "auto":
            from dreamer_isaac.config import module_exists

            physics = "" if module_exists("isaacsim") else "newton_mjwarp"
        before = task.sim.physics if hasattr(task.sim, "physics") else None
        offered = [k for k in vars(before) if not k.startswith("_")] if before else []
        if physics and before is not None and _is_preset(before) and physics not in offered:
            raise ConfigError([f"env.physics={physics}: {name} has {', '.join(offered)}."])
        task = resolve(task, {physics} if physics else set())
    elif physics != "auto":
        raise ConfigError([f"env.physics={physics}: this version of Isaac Lab has one engine. "
                           "Remedy: env.physics=auto."])  # fmt: skip
    task.scene.num_envs, task.seed, task.sim.device = cfg.env.num_envs, cfg.env.seed, device
    task.dreamer_isaac_cameras = add_cameras(task, cfg.env)
    set_paths(task, cfg.env.cfg)
    return task


def _is_preset(node: Any) -> bool:
    return any(k.__name__ == "PresetCfg" for k in type(node).__mro__)


def make_isaaclab(cfg: Config, device: torch.device, task: Any) -> SimEnv:
    """Build the task; `task` is its configuration, from `task_config`.

    Raises:
        ConfigError: when this process has a simulation already.
    """
    import gymnasium
    from torchrl.envs import IsaacLabWrapper

    if _running:
        raise ConfigError([f"this process simulates {_running[0]} already, and Isaac Lab has one "
                           "simulation a process. Remedy: another process."])  # fmt: skip
    name = task_id(cfg.env.name, load_tasks(cfg.env.import_))
    _running.append(name)
    cameras = task.__dict__.pop("dreamer_isaac_cameras", {})
    with _quiet():
        gym_env = gymnasium.make(name, cfg=task)
    env = IsaacLabWrapper(gym_env, device=device, native_autoreset=True)
    reader = Cameras(gym_env.unwrapped, cameras) if cameras else None
    return IsaacLabEnv(
        env, gym_env.unwrapped, name, cfg.env.action_bound, reader, cfg.env.pixels_only
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Isaac Lab prints a table for every manager: shown when something goes wrong, or to a user who
    sets ISAACLAB_VERBOSE."""
    if os.environ.get("ISAACLAB_VERBOSE"):
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        print(said.getvalue())
        raise


class IsaacLabEnv(SimEnv):
    """An Isaac Lab task under the contract. Isaac Lab resets finished envs inside `step`."""

    def __init__(
        self, env: Any, sim: Any, name: str, bound: float, cameras: Cameras | None = None,
        pixels_only: bool = True,
    ):  # fmt: skip
        self.sim = sim
        """Isaac Lab's own ManagerBasedRLEnv or DirectRLEnv."""
        self.cameras = cameras
        keys = set(env.observation_spec.keys())
        key = "policy" if "policy" in keys else "observation"
        shape: Any = getattr(env.observation_spec.get(key, None), "shape", ())
        unseen = cameras and (pixels_only or len(shape) > 2)
        check_specs(name, env, "" if unseen else key)
        width = 0 if unseen else int(shape[-1])
        action = env.action_spec.shape[-1]
        info = EnvInfo(
            task=name, backend="isaaclab", num_envs=int(sim.num_envs), observation=width,
            action=action, step_dt=float(sim.step_dt),
            max_episode_length=int(sim.max_episode_length),
            observation_names=observation_names(sim, key, width) if width else [],
            action_names=action_names(sim, action),
            rewards_times_dt=getattr(sim, "reward_manager", None) is not None,
        )  # fmt: skip
        super().__init__(env, info, key, bound)
        if cameras:
            sim.reset()  # a camera has pictures after that
            height, wide, channels = cameras.read().shape[1:]
            info.pixels = (height, wide, channels)

    def pixels(self) -> Tensor | None:
        return self.cameras.read() if self.cameras else None

    def reward_terms(self) -> tuple[list[str], Tensor]:
        manager = getattr(self.sim, "reward_manager", None)
        if manager is None:  # Direct tasks compute their reward in one function
            return super().reward_terms()
        # The manager keeps rates: value * weight, before the step's time.
        return list(manager.active_terms), manager._step_reward * self.info.step_dt

    def close(self) -> None:
        super().close()
        _running.clear()


def observation_names(sim: Any, group: str, width: int) -> list[str]:
    """A name for every component, joints by name where a term covers all of them."""
    manager = getattr(sim, "observation_manager", None)
    if manager is None or group not in manager.active_terms:
        return [f"{group}[{i}]" for i in range(width)]
    names: list[str] = []
    for term, shape in zip(
        manager.active_terms[group], manager.group_obs_term_dim[group], strict=True
    ):
        size = int(np.prod(shape))
        labels = _joints(sim, term, size) or [str(i) for i in range(size)]
        names += [term] if size == 1 else [f"{term}[{x}]" for x in labels]
    return names


def action_names(sim: Any, width: int) -> list[str]:
    """The joint behind every action component, where the task tells."""
    manager = getattr(sim, "action_manager", None)
    labels: list[str] = []
    for name in getattr(manager, "active_terms", []):
        labels += list(getattr(manager.get_term(name), "_joint_names", None) or [])  # type: ignore[union-attr]
    return labels if len(labels) == width else [f"action[{i}]" for i in range(width)]


def _joints(sim: Any, term: str, size: int) -> list[str] | None:
    robot = getattr(sim.scene, "articulations", {}).get("robot")
    names = list(getattr(robot, "joint_names", None) or [])
    return names if ("joint" in term or "action" in term) and len(names) == size else None
