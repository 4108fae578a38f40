"""Off-screen pictures of one env without OpenGL, a display or a GPU.

MuJoCo's own renderer needs a working EGL or OSMesa, which a fresh machine or container often does
not have. MuJoCo-Warp casts rays on whatever device it runs on, so the picture is the same
everywhere. A model of one world is built beside the simulation; a picture copies the env's joint
positions into it and looks at the tracked body from the direction that the task's ViewerConfig
names.
"""

from __future__ import annotations

import math
from typing import Any

import mujoco_warp as mjwarp
import numpy as np
import warp as wp
from mujoco import MjModel  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs

CAMERA = "dreamer_isaac_video"


class Renderer:
    """Renders single envs of an mjlab simulation.

    Args:
        sim: mjlab's ManagerBasedRlEnv. scale: of width and height that its viewer asks for.
    """

    def __init__(self, sim: Any, scale: float = 1.0):
        self.sim = sim
        viewer = sim.cfg.viewer
        self.width, self.height = (
            max(2, round(scale * n / 2) * 2) for n in (viewer.width, viewer.height)
        )
        spec = sim.scene.spec.copy()
        spec.worldbody.add_camera(name=CAMERA, fovy=viewer.fovy or 45.0)
        model = spec.compile()
        self.device = wp.get_device(str(sim.device))
        camera = model.camera(CAMERA).id
        active = [i == camera for i in range(model.ncam)]
        with wp.ScopedDevice(self.device):
            self.model = mjwarp.put_model(model)
            self.data = mjwarp.make_data(model)
            self.context = mjwarp.create_render_context(
                model, nworld=1, cam_res=[(self.width, self.height)], render_rgb=[True],
                render_depth=[False], use_shadows=True, cam_active=active,
                background_color=(0.55, 0.68, 0.82, 1.0),
            )  # fmt: skip
        self.camera = camera
        self.body = self._tracked(model, viewer)
        azimuth, elevation = math.radians(viewer.azimuth), math.radians(viewer.elevation)
        forward = np.array([
            math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth),
            math.sin(elevation),
        ])  # fmt: skip
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        # A MuJoCo camera looks along its own -z with y up.
        self.rotation = np.stack([right, np.cross(right, forward), -forward], -1)
        self.offset = -viewer.distance * forward
        self.lookat = np.array(viewer.lookat)

    @staticmethod
    def _tracked(model: MjModel, viewer: Any) -> int:
        """The body that the camera follows; the first movable one by default, 0 for none."""
        names = [model.body(i).name for i in range(model.nbody)]
        for name in (f"{viewer.entity_name}/{viewer.body_name}", viewer.body_name):
            if name in names:
                return names.index(name)
        return 1 if model.nbody > 1 else 0

    def frame(self, env: int = 0) -> np.ndarray:
        """[height, width, 3] uint8."""
        with wp.ScopedDevice(self.device):
            for name in ("qpos", "mocap_pos", "mocap_quat"):
                mine, theirs = getattr(self.data, name), getattr(self.sim.sim.wp_data, name)
                if mine.size:
                    row = mine.shape[1]
                    wp.copy(mine, theirs, src_offset=env * row, count=row)
            mjwarp.kinematics(self.model, self.data)
            mjwarp.com_pos(self.model, self.data)
            mjwarp.camlight(self.model, self.data)
            target = self.data.xpos.numpy()[0, self.body] if self.body else self.lookat
            position = self.data.cam_xpos.numpy()
            rotation = self.data.cam_xmat.numpy()
            position[0, self.camera] = target + self.offset
            rotation[0, self.camera] = self.rotation
            self.data.cam_xpos.assign(position)
            self.data.cam_xmat.assign(rotation)
            mjwarp.refit_bvh(self.model, self.data, self.context)
            mjwarp.render(self.model, self.data, self.context)
            packed = self.context.rgb_data.numpy().reshape(self.height, self.width)
        channels = [(packed >> shift) & 255 for shift in (16, 8, 0)]
        return np.stack(channels, -1).astype(np.uint8)
