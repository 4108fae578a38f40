"""The embedded simulator: mjlab (MuJoCo-Warp) through TorchRL's `MJLabEnv`, on CPU and GPU."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import os
import random
from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamer_isaac.config import Config, ConfigError
from dreamer_isaac.envs.contract import EnvInfo, Observation, SimEnv, check_specs
from dreamer_isaac.envs.paths import import_tasks, set_paths

OBSERVATION_GROUPS = ("policy", "actor")
"""Names of the policy's observations: ours and Isaac Lab's, and mjlab's own."""


def load_tasks(module: str = "") -> list[str]:
    """Import the ported, mjlab's and the user's tasks; returns every id.

    Raises:
        ConfigError: when `module` cannot be imported.
    """
    import mjlab.tasks  # noqa: F401  (registers mjlab's own)
    from mjlab.tasks.registry import list_tasks

    from dreamer_isaac.envs import tasks

    tasks.register()
    import_tasks(module)
    return list_tasks()


def make_mjlab(cfg: Config, device: torch.device, render: bool) -> SimEnv:
    """Build a registered task.

    Raises:
        ConfigError: unknown task, or unknown field in `env.cfg`.
    """
    import warp as wp

    verbose = bool(os.environ.get("MJLAB_VERBOSE"))
    if not verbose:  # else a line for every kernel that is loaded, and on a CPU a missing driver
        wp.config.log_level = wp.LOG_WARNING if device.type == "cuda" else wp.LOG_ERROR

    from mjlab.tasks.registry import load_env_cfg
    from torchrl.envs import MJLabEnv

    from dreamer_isaac.envs.sensors import add_cameras

    known = load_tasks(cfg.env.import_)
    name = cfg.env.name
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ConfigError([f"env.name={name!r} is no task of mjlab. Known: {', '.join(near)}."])
    task = load_env_cfg(name)
    set_paths(task, cfg.env.cfg)
    task.seed = cfg.env.seed
    cameras = add_cameras(task, cfg.env)
    group = next((g for g in OBSERVATION_GROUPS if g in task.observations), None)
    if group is None:
        raise ConfigError(
            [
                f"env.name={name!r} has the observation groups "
                f"{', '.join(task.observations)}; one of {OBSERVATION_GROUPS} is needed."
            ]
        )
    # mjlab prints a table for every manager; a user who wants them sets MJLAB_VERBOSE.
    quiet = contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO())
    with quiet:
        env = MJLabEnv(
            name, cfg=task, num_envs=cfg.env.num_envs, device=device, native_autoreset=True
        )
    return MjlabEnv(env, name, group, cfg.env.action_bound, render, cameras, cfg.env.pixels_only)


class MjlabEnv(SimEnv):
    """An mjlab task under the contract. mjlab resets finished envs inside `step`."""

    def __init__(
        self, env: Any, name: str, group: str, bound: float, render: bool,
        cameras: Sequence[str] = (), pixels_only: bool = True,
    ):  # fmt: skip
        self.sim = env._env
        """mjlab's own ManagerBasedRlEnv."""
        self.cameras = tuple(cameras)
        """Names of the sensors whose pictures are observed."""
        self.renderer: Any = None
        self.render_enabled = render
        check_specs(name, env, "" if cameras and pixels_only else group)
        names = [] if cameras and pixels_only else observation_names(self.sim, group)
        info = EnvInfo(
            task=name,
            backend="mjlab",
            num_envs=self.sim.num_envs,
            observation=len(names),
            action=sum(self.sim.action_manager.action_term_dim),
            step_dt=float(self.sim.step_dt),
            max_episode_length=int(self.sim.max_episode_length),
            observation_names=names,
            action_names=action_names(self.sim),
            rewards_times_dt=bool(self.sim.reward_manager._scale_by_dt),
        )
        if cameras:
            pixels = self.pixels()
            assert pixels is not None
            info.pixels = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        super().__init__(env, info, group, bound)

    def reward_terms(self) -> tuple[list[str], Tensor]:
        manager = self.sim.reward_manager  # it keeps rates: value * weight, before the step's time
        scale = self.sim.step_dt if manager._scale_by_dt else 1.0
        return list(manager.active_terms), manager._step_reward * scale

    def pixels(self) -> Tensor | None:
        from dreamer_isaac.envs.sensors import averaged

        # `step` renders after its resets, and writes to the same buffer again in the next one.
        pictures = [averaged(self.sim.scene[name].data.rgb) for name in self.cameras]
        return torch.cat(pictures, -1) if pictures else None

    def render(self, envs: int = 1) -> list[np.ndarray] | None:
        if not self.render_enabled:
            return None
        if self.renderer is None:  # built when first needed: it costs seconds
            from dreamer_isaac.envs.render import Renderer

            columns = math.ceil(math.sqrt(envs))  # rays cost time: many envs, small pictures
            self.renderer = Renderer(self.sim, 1 / columns)
        return [self.renderer.frame(i) for i in range(envs)]

    def state_dict(self) -> dict[str, Any]:
        """Warp data, the managers' tensors and counters, and the global generators, which
        mjlab's resets draw from."""
        return {
            "tensors": {path: t.clone() for path, t in _tensors(self.sim)},
            "counters": dict(_counters(self.sim)),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Observation:
        self.reset()
        # mjlab makes some buffers anew in its first step; after one, the set is as it was saved.
        _, _, first = self.step(
            torch.zeros(self.info.num_envs, self.info.action, device=self.device)
        )
        mine = dict(_tensors(self.sim))
        if mine.keys() != state["tensors"].keys():
            odd = sorted(mine.keys() ^ state["tensors"].keys())
            raise ValueError(f"the saved simulation has other tensors than this one: {odd[:5]}")
        for path, saved in state["tensors"].items():
            if mine[path].shape != saved.shape:
                raise ValueError(f"the saved simulation's {path} has another shape")
            mine[path].copy_(saved)
        _set_counters(self.sim, state["counters"])
        if self.sim.scene.sensor_context is not None:
            self.sim.sim.sense()
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])
        assert self._td is not None
        obs = self.sim.obs_buf[self.key]
        self._td.set(self.key, obs.clone())
        return Observation(self._clone_obs(self._td), first.is_first, self.pixels())


def observation_names(sim: Any, group: str) -> list[str]:
    """A name for every component of an observation group, joints by name where they are known."""
    manager = sim.observation_manager
    names: list[str] = []
    terms = zip(manager.active_terms[group], manager.group_obs_term_dim[group],
                manager._group_obs_term_cfgs[group], strict=True)  # fmt: skip
    for term, shape, cfg in terms:
        width = int(np.prod(shape))
        entity = cfg.params.get("asset_cfg")
        labels = list(getattr(entity, "joint_names", None) or []) if entity else []
        if len(labels) != width or any(set(label) & set(".*+[]()|") for label in labels):
            labels = _action_labels(sim, width) if "action" in term else []
        if len(labels) != width:
            labels = [str(i) for i in range(width)]
        names += [term] if width == 1 and labels == ["0"] else [f"{term}[{x}]" for x in labels]
    return names


def action_names(sim: Any) -> list[str]:
    """The joint (or whatever the task calls it) behind every action component."""
    return _action_labels(sim, sum(sim.action_manager.action_term_dim))


def _action_labels(sim: Any, width: int) -> list[str]:
    manager = sim.action_manager
    labels: list[str] = []
    for name in manager.active_terms:
        term = manager.get_term(name)
        targets = list(getattr(term, "target_names", None) or [])
        labels += targets if len(targets) == term.action_dim else [
            f"{name}[{i}]" for i in range(term.action_dim)
        ]  # fmt: skip
    return labels if len(labels) == width else []


# -- the state of a simulation, found by walking its objects -----------------------------------

_SKIP = ("cfg", "_cfg", "metadata", "model", "mj_model", "mj_data", "single_action_space",
         "single_observation_space", "action_space", "observation_space", "viewer",
         "_offline_renderer", "renderer", "spec", "nan_guard", "_env", "env", "extras",
         "_sensor_context", "_ctx")  # fmt: skip


def _objects(root: Any) -> Iterator[tuple[str, Any]]:
    """Every object of mjlab, MuJoCo-Warp or a task that hangs below `root`, with its path.

    Configurations, the compiled model and back references are left out: they do not change; and
    what renders, which follows from the rest.
    """
    stack, seen = [("", root)], set()
    while stack:
        path, node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        if isinstance(node, dict):
            items = [(str(k), v) for k, v in node.items()]
        elif isinstance(node, list | tuple):
            items = [(str(i), v) for i, v in enumerate(node)]
        elif hasattr(node, "__dict__"):
            items = [(k, v) for k, v in vars(node).items() if k not in _SKIP]
        else:
            continue
        for name, value in reversed(items):
            if isinstance(value, Tensor | dict | list | tuple) or _is_ours(value):
                stack.append((f"{path}.{name}", value))


def _is_ours(value: Any) -> bool:
    if isinstance(value, type) or (callable(value) and not hasattr(value, "__dict__")):
        return False
    module = type(value).__module__
    # A term of the user's own is a callable object of their module.
    return module.split(".")[0] in ("mjlab", "mujoco_warp", "warp", "dreamer_isaac") or (
        callable(value) and not isinstance(value, FunctionType | MethodType)
    )


def _tensors(sim: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor and Warp array below `sim`, once each, as torch tensors on the same memory."""
    import warp as wp

    seen: set[tuple[int, tuple[int, ...]]] = set()
    for path, node in _objects(sim):
        if isinstance(node, Tensor):
            found = node
        elif isinstance(node, wp.array):
            if node.ptr is None or node.size == 0:
                continue
            found = wp.to_torch(node)
        else:
            continue
        for dim, stride in enumerate(found.stride()):
            if stride == 0:  # one value shared by all envs, shown to each
                found = found.narrow(dim, 0, 1)
        place = (found.data_ptr(), tuple(found.shape))
        if found.numel() and place not in seen:
            seen.add(place)
            yield path, found


def _counters(sim: Any) -> Iterator[tuple[str, int | float | bool]]:
    """Every plain number that an object below `sim` keeps."""
    import warp as wp

    for path, node in _objects(sim):
        if isinstance(node, dict | list | tuple | Tensor | wp.array) or not hasattr(
            node, "__dict__"
        ):
            continue
        if type(node).__module__.startswith("warp"):  # of the device, not of the simulation
            continue
        for name, value in vars(node).items():
            if isinstance(value, bool | int | float) and name not in _SKIP:
                yield f"{path}.{name}", value


def _set_counters(sim: Any, saved: dict[str, Any]) -> None:
    nodes = dict(_objects(sim))
    for path, value in saved.items():
        parent, _, name = path.rpartition(".")
        node = nodes.get(parent)
        if node is not None and vars(node).get(name) != value:
            try:
                setattr(node, name, value)
            except AttributeError:
                continue  # a frozen dataclass: configuration, which does not change
