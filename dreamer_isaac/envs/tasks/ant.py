"""Isaac-Ant-v0: a four-legged ant runs towards +x (observation 60, action 8).

Ported from Isaac Lab's manager-based `ant_env_cfg.py` and `robots/ant.py`. Terms, weights, resets
and times are the same in 2.3 and 3.x; actuators are those of 3.x. Differences from Isaac Lab:

- The feet's joint wrench: see `mdp.body_incoming_wrench`.
- Effort limit: see `mdp.OrderedJointEffortAction`. Mass, armature, damping: see `ant.xml`.
- Contacts are MuJoCo's soft ones with a pyramidal friction cone; PhysX's are hard, with a limit of
  10 m/s on leaving a penetration, and PhysX damps every rigid body's rotation a little (0.05 1/s).
"""

from __future__ import annotations

from pathlib import Path

from mjlab.actuator import BuiltinMotorActuatorCfg
from mjlab.entity import EntityArticulationInfoCfg, EntityCfg
from mjlab.envs import ManagerBasedRlEnvCfg
from mjlab.envs.mdp import (
    is_alive,
    last_action,
    reset_joints_by_offset,
    reset_root_state_uniform,
    time_out,
)
from mjlab.managers.event_manager import EventTermCfg
from mjlab.managers.observation_manager import ObservationGroupCfg, ObservationTermCfg
from mjlab.managers.reward_manager import RewardTermCfg
from mjlab.managers.termination_manager import TerminationTermCfg
from mjlab.scene import SceneCfg
from mjlab.sim import MujocoCfg, SimulationCfg
from mjlab.terrains import TerrainEntityCfg
from mjlab.viewer import ViewerConfig
from mujoco import MjSpec  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs

from . import mdp

JOINT_NAMES = (
    "front_left_leg",
    "front_right_leg",
    "left_back_leg",
    "right_back_leg",
    "front_left_foot",
    "front_right_foot",
    "left_back_foot",
    "right_back_foot",
)
"""Order of the joints in PhysX, hence of the actions and of the joint observations."""

WRENCH_BODIES = ("front_left_foot", "front_right_foot", "left_back_foot", "right_back_foot")
"""Order of the feet's wrenches."""

EFFORT_SCALE = 7.5
"""N m per unit of action."""

TARGET_POS = (1000.0, 0.0, 0.0)


def _spec() -> MjSpec:
    return MjSpec.from_file(str(Path(__file__).with_name("ant.xml")))


def env_cfg(play: bool = False) -> ManagerBasedRlEnvCfg:
    """Build the task's configuration; `play` only asks for fewer environments."""
    robot = EntityCfg(
        spec_fn=_spec,
        init_state=EntityCfg.InitialStateCfg(
            pos=(0.0, 0.0, 0.5),
            joint_pos={
                ".*_leg": 0.0,
                "front_left_foot": 0.785398,
                "front_right_foot": -0.785398,
                "left_back_foot": -0.785398,
                "right_back_foot": 0.785398,
            },
        ),
        articulation=EntityArticulationInfoCfg(
            actuators=(BuiltinMotorActuatorCfg(target_names_expr=JOINT_NAMES, effort_limit=15.0),)
        ),
    )
    target = {"target_pos": TARGET_POS}
    policy = {
        "base_height": ObservationTermCfg(func=mdp.base_height),
        "base_lin_vel": ObservationTermCfg(func=mdp.base_lin_vel),
        "base_ang_vel": ObservationTermCfg(func=mdp.base_ang_vel),
        "base_yaw_roll": ObservationTermCfg(func=mdp.base_yaw_roll),
        "base_angle_to_target": ObservationTermCfg(
            func=mdp.base_angle_to_target, params=dict(target)
        ),
        "base_up_proj": ObservationTermCfg(func=mdp.base_up_proj),
        "base_heading_proj": ObservationTermCfg(func=mdp.base_heading_proj, params=dict(target)),
        "joint_pos_norm": ObservationTermCfg(
            func=mdp.JointPosLimitNormalized, params={"asset_cfg": mdp.joints(JOINT_NAMES)}
        ),
        "joint_vel_rel": ObservationTermCfg(
            func=mdp.JointVelRel, scale=0.2, params={"asset_cfg": mdp.joints(JOINT_NAMES)}
        ),
        "feet_body_forces": ObservationTermCfg(
            func=mdp.body_incoming_wrench, scale=0.1, params={"body_names": WRENCH_BODIES}
        ),
        "actions": ObservationTermCfg(func=last_action),
    }
    gear = {".*": 15.0}
    return ManagerBasedRlEnvCfg(
        scene=SceneCfg(
            num_envs=16 if play else 4096,
            env_spacing=5.0,
            terrain=TerrainEntityCfg(terrain_type="plane"),
            entities={"robot": robot},
        ),
        observations={"policy": ObservationGroupCfg(terms=policy)},
        actions={
            "joint_effort": mdp.OrderedJointEffortActionCfg(
                entity_name="robot", actuator_names=JOINT_NAMES, scale=EFFORT_SCALE
            )
        },
        events={
            "reset_base": EventTermCfg(
                func=reset_root_state_uniform,
                mode="reset",
                params={"pose_range": {}, "velocity_range": {}},
            ),
            "reset_robot_joints": EventTermCfg(
                func=reset_joints_by_offset,
                mode="reset",
                params={
                    "asset_cfg": mdp.joints(JOINT_NAMES),
                    "position_range": (-0.2, 0.2),
                    "velocity_range": (-0.1, 0.1),
                },
            ),
        },
        rewards={
            "progress": RewardTermCfg(func=mdp.ProgressReward, weight=1.0, params=dict(target)),
            "alive": RewardTermCfg(func=is_alive, weight=0.5),
            "upright": RewardTermCfg(
                func=mdp.upright_posture_bonus, weight=0.1, params={"threshold": 0.93}
            ),
            "move_to_target": RewardTermCfg(
                func=mdp.move_to_target_bonus, weight=0.5, params={"threshold": 0.8, **target}
            ),
            "action_l2": RewardTermCfg(func=mdp.action_l2, weight=-0.005),
            "energy": RewardTermCfg(
                func=mdp.PowerConsumption,
                weight=-0.05,
                params={"gear_ratio": dict(gear), "asset_cfg": mdp.joints(JOINT_NAMES)},
            ),
            "joint_pos_limits": RewardTermCfg(
                func=mdp.JointPosLimitsPenaltyRatio,
                weight=-0.1,
                params={
                    "threshold": 0.99,
                    "gear_ratio": dict(gear),
                    "asset_cfg": mdp.joints(JOINT_NAMES),
                },
            ),
        },
        terminations={
            "time_out": TerminationTermCfg(func=time_out, time_out=True),
            "torso_height": TerminationTermCfg(
                func=mdp.root_height_below_minimum, params={"minimum_height": 0.31}
            ),
        },
        # 12 capsules and a sphere against a plane make at most 25 contacts of 4 rows, and 8 joints
        # reach a limit: 108 rows. Nothing can overflow.
        sim=SimulationCfg(
            nconmax=25,
            njmax=108,
            mujoco=MujocoCfg(
                timestep=1 / 120, integrator="implicitfast", iterations=10, ls_iterations=20
            ),
        ),
        viewer=ViewerConfig(
            origin_type=ViewerConfig.OriginType.ASSET_BODY,
            entity_name="robot",
            body_name="torso",
            width=480,
            height=360,
            distance=4.0,
            elevation=-20.0,
            azimuth=120.0,
            max_extra_envs=0,
        ),
        decimation=2,
        episode_length_s=16.0,
    )
