"""Isaac-Cartpole-v0: balance a pole on a cart by pushing the cart (observation 4, action 1).

Ported from Isaac Lab's manager-based `cartpole_env_cfg.py` and `robots/cartpole.py` (2.3 and 3.x
agree, but for the success rate, which is logged in 3.x only). Differences from Isaac Lab:

- Masses are assumptions, see `cartpole.xml`.
- PhysX damps every rigid body's rotation a little (0.05 1/s by default); MuJoCo does not.
- `reset_base` is no event of Isaac Lab, which places its clones itself; it draws nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

from mjlab.actuator import BuiltinMotorActuatorCfg
from mjlab.entity import EntityArticulationInfoCfg, EntityCfg
from mjlab.envs import ManagerBasedRlEnvCfg
from mjlab.envs.mdp import (
    is_alive,
    is_terminated,
    reset_joints_by_offset,
    reset_root_state_uniform,
    time_out,
)
from mjlab.managers.event_manager import EventTermCfg
from mjlab.managers.observation_manager import ObservationGroupCfg, ObservationTermCfg
from mjlab.managers.reward_manager import RewardTermCfg
from mjlab.managers.termination_manager import TerminationTermCfg
from mjlab.scene import SceneCfg
from mjlab.sensor import CameraSensorCfg
from mjlab.sim import MujocoCfg, SimulationCfg
from mjlab.terrains import TerrainEntityCfg
from mjlab.viewer import ViewerConfig
from mujoco import MjSpec  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs

from dreamer_isaac.cameras import Pose

from . import mdp

CAMERA = CameraSensorCfg(
    name="tiled_camera",
    pos=(-7.0, 0.0, 3.0),
    quat=Pose((0.0, 0.0, 0.0), (math.cos(0.2094), 0.0, -math.sin(0.2094))).quaternion(),
    fovy=2 * math.degrees(math.atan(20.955 / 2 / 24.0)),
    width=64,
    height=64,
)
"""Isaac Lab's, from the scene's origin: pitched down by 2 asin(0.1045) = 12 degrees; aperture
20.955 mm, focal length 24 mm."""

JOINT_NAMES = ("slider_to_cart", "cart_to_pole")
"""Order of the joint observations."""

ACTION_JOINT_NAMES = ("slider_to_cart",)
"""Order of the actions."""

EFFORT_SCALE = 100.0
"""Newton per unit of action."""


def _spec() -> MjSpec:
    return MjSpec.from_file(str(Path(__file__).with_name("cartpole.xml")))


def rgb_env_cfg(play: bool = False) -> ManagerBasedRlEnvCfg:
    """`Isaac-Cartpole-RGB-v0`: the same task, seen by a camera. Differences from Isaac Lab:
    pictures are 64 x 64 (`env.image_size`) instead of 100 x 100, and are observed as they are
    instead of minus their mean; worlds do not see each other, so they need no distance."""
    cfg = env_cfg(play)
    cfg.scene.sensors = (CAMERA,)
    cfg.scene.env_spacing = 0.0  # the camera stands in the world, not on the cart
    return cfg


def env_cfg(play: bool = False) -> ManagerBasedRlEnvCfg:
    """Build the task's configuration; `play` only asks for fewer environments."""
    cart, pole = "slider_to_cart", "cart_to_pole"
    robot = EntityCfg(
        spec_fn=_spec,
        init_state=EntityCfg.InitialStateCfg(pos=(0.0, 0.0, 2.0), joint_pos={cart: 0.0, pole: 0.0}),
        articulation=EntityArticulationInfoCfg(
            # The pole's actuator in Isaac Lab has neither stiffness nor damping nor an action: none
            # here.
            actuators=(BuiltinMotorActuatorCfg(target_names_expr=(cart,), effort_limit=400.0),)
        ),
    )
    policy = {
        "joint_pos_rel": ObservationTermCfg(
            func=mdp.JointPosRel, params={"asset_cfg": mdp.joints(JOINT_NAMES)}
        ),
        "joint_vel_rel": ObservationTermCfg(
            func=mdp.JointVelRel, params={"asset_cfg": mdp.joints(JOINT_NAMES)}
        ),
    }
    return ManagerBasedRlEnvCfg(
        scene=SceneCfg(
            num_envs=16 if play else 4096,
            env_spacing=4.0,
            terrain=TerrainEntityCfg(terrain_type="plane"),
            entities={"robot": robot},
        ),
        observations={"policy": ObservationGroupCfg(terms=policy)},
        actions={
            "joint_effort": mdp.OrderedJointEffortActionCfg(
                entity_name="robot", actuator_names=ACTION_JOINT_NAMES, scale=EFFORT_SCALE
            )
        },
        events={
            "reset_base": EventTermCfg(
                func=reset_root_state_uniform, mode="reset", params={"pose_range": {}}
            ),
            "reset_cart_position": EventTermCfg(
                func=reset_joints_by_offset,
                mode="reset",
                params={
                    "asset_cfg": mdp.joints((cart,)),
                    "position_range": (-1.0, 1.0),
                    "velocity_range": (-0.5, 0.5),
                },
            ),
            "reset_pole_position": EventTermCfg(
                func=reset_joints_by_offset,
                mode="reset",
                params={
                    "asset_cfg": mdp.joints((pole,)),
                    "position_range": (-0.25 * math.pi, 0.25 * math.pi),
                    "velocity_range": (-0.25 * math.pi, 0.25 * math.pi),
                },
            ),
        },
        rewards={
            "alive": RewardTermCfg(func=is_alive, weight=1.0),
            "terminating": RewardTermCfg(func=is_terminated, weight=-2.0),
            "pole_pos": RewardTermCfg(
                func=mdp.joint_pos_target_l2,
                weight=-1.0,
                params={"asset_cfg": mdp.joints((pole,)), "target": 0.0},
            ),
            "cart_vel": RewardTermCfg(
                func=mdp.joint_vel_l1, weight=-0.01, params={"asset_cfg": mdp.joints((cart,))}
            ),
            "pole_vel": RewardTermCfg(
                func=mdp.joint_vel_l1, weight=-0.005, params={"asset_cfg": mdp.joints((pole,))}
            ),
            "success_rate": RewardTermCfg(func=mdp.SurvivalSuccessRate, weight=0.0),
        },
        terminations={
            "time_out": TerminationTermCfg(func=time_out, time_out=True),
            "cart_out_of_bounds": TerminationTermCfg(
                func=mdp.joint_pos_out_of_manual_limit,
                params={"asset_cfg": mdp.joints((cart,)), "bounds": (-3.0, 3.0)},
            ),
        },
        # Nothing can touch anything, see cartpole.xml; the one constraint is the cart's end stop.
        sim=SimulationCfg(
            nconmax=1,
            njmax=4,
            mujoco=MujocoCfg(
                timestep=1 / 120, integrator="implicitfast", disableflags=("contact",)
            ),
        ),
        viewer=ViewerConfig(
            origin_type=ViewerConfig.OriginType.ASSET_BODY,
            entity_name="robot",
            body_name="rail",
            width=480,
            height=360,
            distance=6.0,
            elevation=-10.0,
            azimuth=180.0,
            max_extra_envs=0,
        ),
        decimation=2,
        episode_length_s=5.0,
    )
