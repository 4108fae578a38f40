"""Cameras of the embedded simulator: mjlab's camera sensor at the poses of `cameras`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mujoco
import torch
from mjlab.sensor import CameraSensor, CameraSensorCfg
from torch import Tensor

from dreamer_isaac.cameras import POSES, poses
from dreamer_isaac.config import ConfigError, EnvConfig

FINER = 2
"""Pictures are rendered so many times finer, each way, and averaged: one ray a pixel makes thin
things come and go."""


def averaged(rendered: Tensor) -> Tensor:
    """[N, FINER * H, FINER * W, 3] -> [N, H, W, 3], uint8 both."""
    blocks = rendered.unflatten(2, (-1, FINER)).unflatten(1, (-1, FINER))
    return blocks.float().mean((2, 4)).round_().to(torch.uint8)


@dataclass
class FollowingCameraCfg(CameraSensorCfg):
    """A camera that keeps its distance to an entity's root and does not turn with it."""

    entity: str = "robot"

    def build(self) -> FollowingCamera:
        return FollowingCamera(self)


class FollowingCamera(CameraSensor):
    """See `FollowingCameraCfg`."""

    cfg: FollowingCameraCfg

    def edit_spec(self, scene_spec: Any, entities: dict[str, Any]) -> None:
        prefix = f"{self.cfg.entity}/"
        root = next(b for b in scene_spec.bodies if b.name.startswith(prefix))
        root.add_camera(
            name=self.cfg.name, pos=self.cfg.pos, quat=self.cfg.quat, fovy=self.cfg.fovy,
            resolution=[self.cfg.width, self.cfg.height],
            mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACK,  # pyright: ignore[reportAttributeAccessIssue]
        )  # fmt: skip


def _named(task: Any) -> set[str]:
    """Every name that a term of a task's configuration takes as a parameter."""
    out: set[str] = set()
    groups = [g.terms for g in task.observations.values()]
    for terms in (*groups, task.rewards, task.terminations, task.events):
        for term in terms.values():
            for value in getattr(term, "params", {}).values():
                name = value if isinstance(value, str) else getattr(value, "name", None)
                out |= {name} if isinstance(name, str) else set()
    return out


def add_cameras(task: Any, env: EnvConfig) -> list[str]:
    """Put the cameras that `env` asks for into the configuration of an mjlab task; of the task's
    own cameras only the size is changed. Returns the names of those to be observed.

    Raises:
        ConfigError: for a scene without an entity to look at.
    """
    if env.from_pixels == "false":
        return []
    size = FINER * env.image_size
    cameras = [s for s in task.scene.sensors if isinstance(s, CameraSensorCfg)]
    own = [s for s in cameras if "rgb" in s.data_types]
    wanted = poses(env.cameras)
    if not wanted and own:
        mine = {s.name: replace(s, width=size, height=size) for s in own}
        task.scene.sensors = tuple(mine.get(s.name, s) for s in task.scene.sensors)
        return list(mine)
    if not wanted and env.from_pixels == "auto":
        return []
    wanted = wanted or {"side": POSES["side"]}
    entities = list(task.scene.entities)
    if not entities:
        raise ConfigError(["env.from_pixels: this task's scene has no entity to look at."])
    entity = "robot" if "robot" in entities else entities[0]
    # A picture that nobody looks at costs; one that a term of the task names must stay. All cameras
    # of a scene share these settings.
    others = [s for s in task.scene.sensors if s not in cameras or s.name in _named(task)]
    shared = {} if not cameras else {
        k: getattr(cameras[0], k) for k in ("use_textures", "use_shadows", "enabled_geom_groups")
    }  # fmt: skip
    task.scene.sensors = (*others, *(
        FollowingCameraCfg(name=name, entity=entity, pos=pose.position, quat=pose.quaternion(),
                           fovy=pose.fov, width=size, height=size, **shared)
        for name, pose in wanted.items()
    ))  # fmt: skip
    return list(wanted)
