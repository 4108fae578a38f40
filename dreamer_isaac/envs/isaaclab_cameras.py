"""Cameras of Isaac Lab: added to a task's scene configuration, and read after every step.

2.3 has `TiledCameraCfg` and Isaac Sim's renderer; 3.x has `CameraCfg(renderer_cfg=...)`, with
Newton's Warp renderer where there is no Isaac Sim. Quaternions are (w, x, y, z) in 2.x and
(x, y, z, w) in 3.x; poses are given without any (cameras.py).
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dreamer_isaac.cameras import POSES, Pose, poses
from dreamer_isaac.config import ConfigError, EnvConfig, module_exists
from dreamer_isaac.launch import isaaclab_is_3

SPACING = 40.0
"""Metres between neighbours, at least, so that they stay out of the picture."""

FOCAL = 24.0
"""mm; with the aperture it only decides the field of view."""


def is_camera(cfg: Any) -> bool:
    """Whether a part of a scene's configuration is a camera with colour pictures."""
    mine = any("CameraCfg" in kind.__name__ for kind in type(cfg).__mro__)
    return mine and "rgb" in getattr(cfg, "data_types", [])


def add_cameras(task: Any, env: EnvConfig) -> dict[str, Pose | None]:
    """Put the cameras that `env` asks for into the configuration of an Isaac Lab task; of the
    task's own cameras only the size is changed. Returns those to be observed: name -> pose, None
    for the task's own, which stay as they are.

    Raises:
        ConfigError: for a scene without a robot to look at.
    """
    scene = task.scene
    if hasattr(task, "num_rerenders_on_reset"):  # or an episode's first picture is of the last one
        task.num_rerenders_on_reset = max(1, task.num_rerenders_on_reset)
    own = {k: v for k, v in vars(scene).items() if is_camera(v)}
    wanted = poses(env.cameras)
    if env.from_pixels == "false" or (env.from_pixels == "auto" and not (own or wanted)):
        return {}
    if own and not wanted:
        for camera in own.values():
            camera.width = camera.height = env.image_size
            for key, value in renderer().items():
                setattr(camera, key, value)
        return dict.fromkeys(own)
    robot = robot_of(task)
    if robot is None:
        raise ConfigError(["env.from_pixels: this task's scene has no robot to look at."])
    wanted = wanted or {"side": POSES["side"]}
    root = robot.init_state.pos
    for name, pose in wanted.items():
        setattr(scene, f"camera_{name}", camera_cfg(name, pose, root, env.image_size))
    scene.env_spacing = max(scene.env_spacing, SPACING)
    return {f"camera_{name}": pose for name, pose in wanted.items()}


def robot_of(task: Any) -> Any:
    """The configuration of what a task moves: in its scene, or, in Direct tasks, beside it. The one
    that is called robot, or the first."""
    parts = {**vars(task), **vars(task.scene)}
    robots = {k: v for k, v in parts.items()
              if any(c.__name__ == "ArticulationCfg" for c in type(v).__mro__)}  # fmt: skip
    names = [k for k in ("robot", "robot_cfg") if k in robots] or list(robots)
    return robots[names[0]] if names else None


def camera_cfg(name: str, pose: Pose, root: tuple[float, float, float], size: int) -> Any:
    """A camera `pose` away from where the robot's root is at first."""
    import isaaclab.sensors as sensors
    import isaaclab.sim as sim

    w, x, y, z = pose.quaternion()
    three = isaaclab_is_3()
    kind = sensors.CameraCfg if three else sensors.TiledCameraCfg
    return kind(
        prim_path="{ENV_REGEX_NS}/dreamer_isaac_" + name,
        offset=kind.OffsetCfg(
            pos=tuple(a + b for a, b in zip(root, pose.position, strict=True)),
            rot=(x, y, z, w) if three else (w, x, y, z),
            convention="opengl",
        ),
        spawn=sim.PinholeCameraCfg(
            focal_length=FOCAL, clipping_range=(0.05, 100.0),
            horizontal_aperture=2 * FOCAL * math.tan(math.radians(pose.fov) / 2),
        ),
        data_types=["rgb"], width=size, height=size, update_latest_camera_pose=True, **renderer(),
    )  # fmt: skip


def renderer() -> dict[str, Any]:
    """A camera's option for Newton's renderer, where there is no Isaac Sim."""
    if not isaaclab_is_3() or module_exists("isaacsim"):
        return {}
    from isaaclab_newton.renderers import NewtonWarpRendererCfg

    return {"renderer_cfg": NewtonWarpRendererCfg()}


class Cameras:
    """The pictures of a running simulation.

    Args:
        sim: Isaac Lab's environment. cameras: as `add_cameras` returned them.
    """

    def __init__(self, sim: Any, cameras: dict[str, Pose | None]):
        self.sim, self.cameras = sim, cameras
        robot = sim.scene.articulations.get("robot")
        self.moving: Any = robot if robot is not None and not robot.is_fixed_base else None
        self.kit = module_exists("isaacsim")

    def read(self) -> Tensor:
        """[N, H, W, 3 * cameras] uint8 of the state that the simulation is in, a copy. A robot
        that moves is followed first: pictures are rendered once more for it."""
        follow = {k: p for k, p in self.cameras.items() if p is not None} if self.moving else {}
        if follow:
            root = as_tensor(self.moving.data.root_pos_w)
            for name, pose in follow.items():
                w, x, y, z = pose.quaternion()
                turned = root.new_tensor((x, y, z, w) if isaaclab_is_3() else (w, x, y, z))
                self.sim.scene.sensors[name].set_world_poses(
                    root + root.new_tensor(pose.position), turned.expand(len(root), 4),
                    convention="opengl",
                )  # fmt: skip
            if self.kit:
                self.sim.sim.render()
        pictures = []
        for name in self.cameras:
            camera = self.sim.scene.sensors[name]
            if name in follow:
                camera.update(0.0, force_recompute=True)
            pictures.append(as_tensor(camera.data.output["rgb"])[..., :3].to(torch.uint8))
        return torch.cat(pictures, -1).clone()


def as_tensor(data: Any) -> Tensor:
    """Isaac Lab's 2.x tensors, and 3.x's ProxyArray."""
    return data if isinstance(data, Tensor) else data.torch
