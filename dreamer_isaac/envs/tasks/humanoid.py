"""Isaac-Humanoid-v0: a humanoid with 21 joints runs towards +x (observation 87, action 21).

Ported from Isaac Lab's manager-based `humanoid_env_cfg.py` and `robots/humanoid.py`. Terms,
weights, resets and times are the same in 2.3 and 3.x; actuators are those of 3.x. Differences from
Isaac Lab:

- The feet's joint wrench: see `mdp.body_incoming_wrench`.
- Effort limit: see `mdp.OrderedJointEffortAction`. Springs, dampers, multi-axis joints and the
  choice of self-collisions: see `humanoid.xml`.
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
    "lower_waist:0",
    "lower_waist:1",
    "right_upper_arm:0",
    "right_upper_arm:2",
    "left_upper_arm:0",
    "left_upper_arm:2",
    "pelvis",
    "right_lower_arm",
    "left_lower_arm",
    "right_thigh:0",
    "right_thigh:1",
    "right_thigh:2",
    "left_thigh:0",
    "left_thigh:1",
    "left_thigh:2",
    "right_shin",
    "left_shin",
    "right_foot:0",
    "right_foot:1",
    "left_foot:0",
    "left_foot:1",
)
"""Order of the joints in PhysX, hence of the actions and of the joint observations."""

WRENCH_BODIES = ("right_foot", "left_foot")
"""Order of the feet's wrenches. Isaac Lab's configuration names the left foot first, but without
`preserve_order`: the columns come in the order of the bodies in PhysX, right before left."""

TORQUES = {
    ".*_waist.*": 67.5,
    ".*_upper_arm.*": 67.5,
    "pelvis": 67.5,
    ".*_lower_arm": 45.0,
    ".*_thigh:0": 45.0,
    ".*_thigh:1": 135.0,
    ".*_thigh:2": 45.0,
    ".*_shin": 90.0,
    ".*_foot.*": 22.5,
}
"""N m per unit of action, and the gear ratios of the reward terms."""

TARGET_POS = (1000.0, 0.0, 0.0)


def _spec() -> MjSpec:
    return MjSpec.from_file(str(Path(__file__).with_name("humanoid.xml")))


def env_cfg(play: bool = False) -> ManagerBasedRlEnvCfg:
    """Build the task's configuration; `play` only asks for fewer environments."""
    robot = EntityCfg(
        spec_fn=_spec,
        init_state=EntityCfg.InitialStateCfg(pos=(0.0, 0.0, 1.34), joint_pos={".*": 0.0}),
        articulation=EntityArticulationInfoCfg(
            actuators=(BuiltinMotorActuatorCfg(target_names_expr=JOINT_NAMES, effort_limit=150.0),)
        ),
    )
    target = {"target_pos": TARGET_POS}
    policy = {
        "base_height": ObservationTermCfg(func=mdp.base_height),
        "base_lin_vel": ObservationTermCfg(func=mdp.base_lin_vel),
        "base_ang_vel": ObservationTermCfg(func=mdp.base_ang_vel, scale=0.25),
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
            func=mdp.JointVelRel, scale=0.1, params={"asset_cfg": mdp.joints(JOINT_NAMES)}
        ),
        "feet_body_forces": ObservationTermCfg(
            func=mdp.body_incoming_wrench, scale=0.01, params={"body_names": WRENCH_BODIES}
        ),
        "actions": ObservationTermCfg(func=last_action),
    }
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
                entity_name="robot", actuator_names=JOINT_NAMES, scale=dict(TORQUES)
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
            "alive": RewardTermCfg(func=is_alive, weight=2.0),
            "upright": RewardTermCfg(
                func=mdp.upright_posture_bonus, weight=0.1, params={"threshold": 0.93}
            ),
            "move_to_target": RewardTermCfg(
                func=mdp.move_to_target_bonus, weight=0.5, params={"threshold": 0.8, **target}
            ),
            "action_l2": RewardTermCfg(func=mdp.action_l2, weight=-0.01),
            "energy": RewardTermCfg(
                func=mdp.PowerConsumption,
                weight=-0.005,
                params={"gear_ratio": dict(TORQUES), "asset_cfg": mdp.joints(JOINT_NAMES)},
            ),
            "joint_pos_limits": RewardTermCfg(
                func=mdp.JointPosLimitsPenaltyRatio,
                weight=-0.25,
                params={
                    "threshold": 0.98,
                    "gear_ratio": dict(TORQUES),
                    "asset_cfg": mdp.joints(JOINT_NAMES),
                },
            ),
        },
        terminations={
            "time_out": TerminationTermCfg(func=time_out, time_out=True),
            "torso_height": TerminationTermCfg(
                func=mdp.root_height_below_minimum, params={"minimum_height": 0.8}
            ),
        },
        # Lying flat would be 19 geoms with up to 2 ground contacts each, but an episode ends at 0.8
        # m: 48 contacts of 4 rows and 21 joint limits are beyond what a body in that state can
        # touch.
        sim=SimulationCfg(
            nconmax=48,
            njmax=216,
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
            distance=4.5,
            elevation=-12.0,
            azimuth=120.0,
            max_extra_envs=0,
        ),
        decimation=2,
        episode_length_s=16.0,
    )
