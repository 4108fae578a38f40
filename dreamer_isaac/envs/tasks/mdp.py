"""Action, observation, reward and termination terms of Isaac Lab that mjlab does not have.

Shapes: `N` environments, `J` joints in the order of the task's `JOINT_NAMES`.

Two rules run through the module:

- Order. Isaac Lab lays joints out as PhysX does, breadth-first; MuJoCo is depth-first. So a term
  never takes "all joints": it is given names and looks them up, and the order of the names is the
  order of the columns.
- Freshness. mjlab computes rewards and terminations before it refreshes body poses, so `xpos` is
  one physics substep old there, and older still inside a reset. Isaac Lab's terms see the current
  state. The root is a free joint, so its pose is part of `qpos`, which is always current: terms
  read it there, and what an Isaac Lab term sees is what these see. Joint positions and velocities
  are current anyway.

A NaN in the state stays a NaN in the observation (no term cleans anything, the observation groups
keep mjlab's `nan_policy="disabled"`). mjlab's reward manager, though, turns a NaN reward into 0,
and a NaN height is not below a minimum: look for NaN in the observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from mjlab.entity import Entity
from mjlab.envs.mdp.actions import JointEffortAction, JointEffortActionCfg
from mjlab.managers.manager_base import ManagerTermBase, ManagerTermBaseCfg
from mjlab.managers.scene_entity_config import SceneEntityCfg
from mjlab.utils.lab_api.math import (
    euler_xyz_from_quat,
    quat_apply,
    quat_apply_inverse,
    scale_transform,
    wrap_to_pi,
)
from mjlab.utils.lab_api.string import resolve_matching_names_values

if TYPE_CHECKING:
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.sensor import BuiltinSensor

Target = tuple[float, float, float]


def joints(names: Sequence[str]) -> SceneEntityCfg:
    """Select joints of the robot by name, in this order."""
    return SceneEntityCfg("robot", joint_names=tuple(names), preserve_order=True)


def _robot(env: ManagerBasedRlEnv) -> Entity:
    return cast("Entity", env.scene["robot"])


def root_pose(env: ManagerBasedRlEnv) -> tuple[torch.Tensor, torch.Tensor]:
    """World position `[N, 3]` in m and quaternion (w, x, y, z) `[N, 4]` of the root link."""
    data = _robot(env).data
    pose = data.data.qpos[:, data.indexing.free_joint_q_adr]
    return pose[:, :3], pose[:, 3:7]


# Action.


class OrderedJointEffortAction(JointEffortAction):
    """Joint efforts (N m or N) in the order of the configured names.

    mjlab sorts the names of a joint action into the model's order whatever `preserve_order` says,
    so the look-up is replaced. Differences from Isaac Lab: the effort limit clips the action's
    effort here; with Isaac's implicit actuators PhysX applies it to the drive only. Actions within
    one never reach it.
    """

    def _find_targets(self, cfg: JointEffortActionCfg) -> tuple[list[int], list[str]]:
        ids, names = self._entity.find_joints(list(cfg.actuator_names), preserve_order=True)
        driven = {name for actuator in self._entity.actuators for name in actuator.target_names}
        if missing := [name for name in names if name not in driven]:
            raise ValueError(f"no actuator drives {missing}; driven are {sorted(driven)}")
        return ids, names


@dataclass(kw_only=True)
class OrderedJointEffortActionCfg(JointEffortActionCfg):
    """Configuration of `OrderedJointEffortAction`; `actuator_names` are joints in action order."""

    def build(self, env: ManagerBasedRlEnv) -> OrderedJointEffortAction:
        return OrderedJointEffortAction(self, env)


# Observations.


def base_height(env: ManagerBasedRlEnv) -> torch.Tensor:
    """World height of the root link in m, `[N, 1]`."""
    return root_pose(env)[0][:, 2:3]


def base_lin_vel(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Velocity of the root's centre of mass in the root link's frame in m/s, `[N, 3]`.

    Isaac Lab's `root_lin_vel_b` is the centre of mass's, not the link origin's (mjlab's
    `base_lin_vel`). Velocities of bodies are not in `qpos`; observations are computed after mjlab's
    refresh, so this one is current too.
    """
    data = _robot(env).data
    return quat_apply_inverse(root_pose(env)[1], data.root_com_lin_vel_w)


def base_ang_vel(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Angular velocity of the root in its own frame in rad/s, `[N, 3]`."""
    return quat_apply_inverse(root_pose(env)[1], _robot(env).data.root_com_ang_vel_w)


def base_yaw_roll(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Yaw, then roll of the root in rad, each within pi, `[N, 2]`."""
    roll, _, yaw = euler_xyz_from_quat(root_pose(env)[1])
    return torch.stack((yaw, roll), dim=-1)


def base_angle_to_target(env: ManagerBasedRlEnv, target_pos: Target) -> torch.Tensor:
    """Angle from the root's yaw to the target's direction in rad, within pi, `[N, 1]`."""
    pos, quat = root_pose(env)
    _, _, yaw = euler_xyz_from_quat(quat)
    angle = torch.atan2(target_pos[1] - pos[:, 1], target_pos[0] - pos[:, 0]) - yaw
    return torch.atan2(torch.sin(angle), torch.cos(angle)).unsqueeze(-1)


def base_up_proj(env: ManagerBasedRlEnv) -> torch.Tensor:
    """World z component of the root's z axis, 1 when upright, `[N, 1]`."""
    # Minus the z component of gravity's direction in the root frame, which is Isaac Lab's formula.
    quat = root_pose(env)[1]
    return -quat_apply_inverse(quat, _robot(env).data.gravity_vec_w)[:, 2:3]


def base_heading_proj(env: ManagerBasedRlEnv, target_pos: Target) -> torch.Tensor:
    """Projection of the root's x axis on the horizontal direction to the target, `[N, 1]`."""
    pos, quat = root_pose(env)
    forward = quat_apply(quat, _robot(env).data.forward_vec_b)
    to_x, to_y = target_pos[0] - pos[:, 0], target_pos[1] - pos[:, 1]
    distance = torch.sqrt(to_x.square() + to_y.square()).clamp(min=1e-9)
    return ((forward[:, 0] * to_x + forward[:, 1] * to_y) / distance).unsqueeze(-1)


class _JointTerm(ManagerTermBase):
    """Keeps the ids of its joints as a tensor: indexing with a list copies it to the device."""

    def __init__(self, cfg: ManagerTermBaseCfg, env: ManagerBasedRlEnv):
        super().__init__(env)
        selection: SceneEntityCfg = cfg.params["asset_cfg"]
        ids, self.joint_names = _robot(env).find_joints(
            list(selection.joint_names or ()), preserve_order=True
        )
        self.joint_ids = torch.tensor(ids, device=env.device)

    def _normalized_pos(self) -> torch.Tensor:
        """Joint positions, -1 at the lower and 1 at the upper soft limit, `[N, J]`."""
        data = _robot(self._env).data
        limits = data.soft_joint_pos_limits[:, self.joint_ids]
        return scale_transform(data.joint_pos[:, self.joint_ids], limits[..., 0], limits[..., 1])

    def _gear(self, gear_ratio: dict[str, float]) -> torch.Tensor:
        """Gear ratios by name over the largest of them, in the order of the joints, `[J]`."""
        index, _, values = resolve_matching_names_values(gear_ratio, self.joint_names)
        gear = torch.ones(len(self.joint_names), device=self.device)
        gear[index] = torch.tensor(values, device=self.device)
        return gear / gear.max()


class JointPosRel(_JointTerm):
    """Joint positions minus their defaults in rad or m, `[N, J]`."""

    def __call__(self, env: ManagerBasedRlEnv, asset_cfg: SceneEntityCfg) -> torch.Tensor:
        data = _robot(env).data
        return (data.joint_pos - data.default_joint_pos)[:, self.joint_ids]


class JointVelRel(_JointTerm):
    """Joint velocities minus their defaults in rad/s or m/s, `[N, J]`."""

    def __call__(self, env: ManagerBasedRlEnv, asset_cfg: SceneEntityCfg) -> torch.Tensor:
        data = _robot(env).data
        return (data.joint_vel - data.default_joint_vel)[:, self.joint_ids]


class JointPosLimitNormalized(_JointTerm):
    """Joint positions between -1 (lower limit) and 1 (upper limit), `[N, J]`."""

    def __call__(self, env: ManagerBasedRlEnv, asset_cfg: SceneEntityCfg) -> torch.Tensor:
        return self._normalized_pos()


def body_incoming_wrench(env: ManagerBasedRlEnv, body_names: tuple[str, ...]) -> torch.Tensor:
    """Force (N), then torque (N m) that each body's joint puts on the body, `[N, 6 * bodies]`.

    Reads MuJoCo's force and torque sensors `<body>_force` and `<body>_torque` at a site in the
    joint's anchor with the axes of the USD's child-side joint frame: the frame, reference point and
    sign of Isaac Lab 3.x's joint wrench sensor, including its zeros until the first step after a
    reset. Differences:

    - Isaac Lab 2.3 reports in the body's own frame at its origin, and after a reset what the
      previous episode left.
    - PhysX reports what its solver applied during the last substep; mjlab evaluates the joint force
      once more at the state after it (with the same action), and through MuJoCo's soft contacts.
    """
    parts = []
    for body in body_names:
        for quantity in ("force", "torque"):
            sensor = cast("BuiltinSensor", env.scene[f"robot/{body}_{quantity}"])
            parts.append(sensor.data)
    stepped = (env.episode_length_buf > 0).unsqueeze(-1)
    # `where`, not a product: a NaN times zero would stay, and after a reset the zero is the value.
    wrench = torch.cat(parts, dim=-1)
    return torch.where(stepped, wrench, torch.zeros_like(wrench))


# Rewards. The manager multiplies by weight and by the environment's time step, as Isaac Lab's does.


def joint_pos_target_l2(
    env: ManagerBasedRlEnv, target: float, asset_cfg: SceneEntityCfg
) -> torch.Tensor:
    """Squared distance of the joints' angles (wrapped to within pi) from `target`, `[N]`."""
    angle = wrap_to_pi(_robot(env).data.joint_pos[:, asset_cfg.joint_ids])
    return (angle - target).square().sum(dim=1)


def joint_vel_l1(env: ManagerBasedRlEnv, asset_cfg: SceneEntityCfg) -> torch.Tensor:
    """Sum of the joints' speeds, `[N]`."""
    return _robot(env).data.joint_vel[:, asset_cfg.joint_ids].abs().sum(dim=1)


def action_l2(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Sum of the squared actions, before scaling, `[N]`."""
    return env.action_manager.action.square().sum(dim=1)


def upright_posture_bonus(env: ManagerBasedRlEnv, threshold: float) -> torch.Tensor:
    """1 while `base_up_proj` is above the threshold, `[N]`."""
    return (base_up_proj(env).squeeze(-1) > threshold).float()


def move_to_target_bonus(
    env: ManagerBasedRlEnv, threshold: float, target_pos: Target
) -> torch.Tensor:
    """1 while `base_heading_proj` is above the threshold, in proportion below it, `[N]`."""
    heading = base_heading_proj(env, target_pos).squeeze(-1)
    return torch.where(heading > threshold, torch.ones_like(heading), heading / threshold)


def _log_success(env: ManagerBasedRlEnv, env_ids: torch.Tensor | slice | None) -> None:
    """Log the share of the ended episodes that ran to their time limit, as Isaac Lab 3.x does."""
    ids = slice(None) if env_ids is None else env_ids
    # A tensor, where Isaac Lab stores a float: reading one here would wait for the device at each
    # reset.
    survived = env.termination_manager.time_outs[ids].float().mean()
    env.extras.setdefault("log", {})["Metrics/success_rate"] = survived


class SurvivalSuccessRate(ManagerTermBase):
    """No reward; logs the share of episodes that timed out. Isaac Lab 3.x has it, 2.3 not."""

    def __init__(self, cfg: ManagerTermBaseCfg, env: ManagerBasedRlEnv):
        super().__init__(env)

    def reset(self, env_ids: torch.Tensor | slice | None = None) -> None:
        _log_success(self._env, env_ids)

    def __call__(self, env: ManagerBasedRlEnv) -> torch.Tensor:
        return torch.zeros(env.num_envs, device=env.device)


class ProgressReward(ManagerTermBase):
    """Approach to the target in m/s: the change of the potential -distance / time step, `[N]`.

    As in Isaac Lab, a reset measures the distance in space and a step only over ground, so the
    first step of an episode gains height^2 / (2 * distance * time step), a hundredth. Around 60,000
    float32 resolves the potential to 1/256, on both simulators.

    Attributes:
        potentials: negative distance over time step after the last step, m/s, `[N]`.
        prev_potentials: the same one step earlier, `[N]`.
    """

    def __init__(self, cfg: ManagerTermBaseCfg, env: ManagerBasedRlEnv):
        super().__init__(env)
        self.target_pos: Target = cfg.params["target_pos"]
        self.potentials = torch.zeros(env.num_envs, device=env.device)
        self.prev_potentials = torch.zeros_like(self.potentials)

    def reset(self, env_ids: torch.Tensor | slice | None = None) -> None:
        ids = slice(None) if env_ids is None else env_ids
        pos = root_pose(self._env)[0][ids]
        squares = [(self.target_pos[axis] - pos[:, axis]).square() for axis in range(3)]
        self.potentials[ids] = -torch.sqrt(sum(squares[1:], squares[0])) / self._env.step_dt
        self.prev_potentials[ids] = self.potentials[ids]
        _log_success(self._env, env_ids)

    def __call__(self, env: ManagerBasedRlEnv, target_pos: Target) -> torch.Tensor:
        pos = root_pose(env)[0]
        over_ground = (target_pos[0] - pos[:, 0]).square() + (target_pos[1] - pos[:, 1]).square()
        self.prev_potentials[:] = self.potentials
        self.potentials[:] = -torch.sqrt(over_ground) / env.step_dt
        return self.potentials - self.prev_potentials


class JointPosLimitsPenaltyRatio(_JointTerm):
    """How far joints are past `threshold` of their range, 1 at the limit, by gear ratio, `[N]`."""

    def __init__(self, cfg: ManagerTermBaseCfg, env: ManagerBasedRlEnv):
        super().__init__(cfg, env)
        self.gear_ratio_scaled = self._gear(cfg.params["gear_ratio"])

    def __call__(
        self,
        env: ManagerBasedRlEnv,
        threshold: float,
        gear_ratio: dict[str, float],
        asset_cfg: SceneEntityCfg,
    ) -> torch.Tensor:
        share = self._normalized_pos().abs()
        violation = (share - threshold) / (1 - threshold) * self.gear_ratio_scaled
        return ((share > threshold) * violation).sum(dim=-1)


class PowerConsumption(_JointTerm):
    """Sum of |action * joint velocity|, weighted by gear ratio, `[N]`."""

    def __init__(self, cfg: ManagerTermBaseCfg, env: ManagerBasedRlEnv):
        super().__init__(cfg, env)
        self.gear_ratio_scaled = self._gear(cfg.params["gear_ratio"])

    def __call__(
        self, env: ManagerBasedRlEnv, gear_ratio: dict[str, float], asset_cfg: SceneEntityCfg
    ) -> torch.Tensor:
        # Action and velocity are multiplied column by column: both are in the order of `asset_cfg`.
        velocity = _robot(env).data.joint_vel[:, self.joint_ids]
        return (env.action_manager.action * velocity * self.gear_ratio_scaled).abs().sum(dim=-1)


# Terminations.


def root_height_below_minimum(env: ManagerBasedRlEnv, minimum_height: float) -> torch.Tensor:
    """Whether the root link is lower than `minimum_height` (m, world), `[N]`."""
    return root_pose(env)[0][:, 2] < minimum_height


def joint_pos_out_of_manual_limit(
    env: ManagerBasedRlEnv, bounds: tuple[float, float], asset_cfg: SceneEntityCfg
) -> torch.Tensor:
    """Whether any of the joints is outside `bounds`, `[N]`."""
    pos = _robot(env).data.joint_pos[:, asset_cfg.joint_ids]
    return ((pos < bounds[0]) | (pos > bounds[1])).any(dim=1)
