"""Isaac Lab's Direct tasks: Isaac-Cartpole-Direct-v0 (observation 4, action 1), Isaac-Ant-Direct-v0
(36, 8) and Isaac-Humanoid-Direct-v0 (75, 21).

Ported from `direct/cartpole/cartpole_env.py` and `direct/locomotion/locomotion_env.py` with
`direct/{ant,humanoid}` (2.3 and 3.x agree). The bodies and joints are those of the manager-based
tasks, what is said of them in `cartpole`, `ant` and `humanoid` holds here too. Different from those
tasks are, as in Isaac Lab:

- Rewards are summed as they are, not multiplied by the step's duration, and a fall replaces the
  whole reward of its step (`death`).
- Progress is measured per physics step, so it counts twice (decimation 2).
- Episodes are one step shorter than their time: a step is counted before the time is looked at.
- Nothing is random at the start but the pole's angle. The target lies 1000 m from the env's own
  place.

Difference from Isaac Lab 2.3: its angle to the target comes from a function of Isaac Sim, which is
not at hand; 3.x computes it over ground, and so does this.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from mjlab.envs import ManagerBasedRlEnvCfg
from mjlab.envs.mdp import last_action, reset_joints_by_offset, reset_root_state_uniform
from mjlab.managers.event_manager import EventTermCfg
from mjlab.managers.manager_base import ManagerTermBase, ManagerTermBaseCfg
from mjlab.managers.observation_manager import ObservationGroupCfg, ObservationTermCfg
from mjlab.managers.reward_manager import RewardTermCfg
from mjlab.managers.scene_entity_config import SceneEntityCfg
from mjlab.managers.termination_manager import TerminationTermCfg

from . import ant, cartpole, humanoid, mdp

if TYPE_CHECKING:
    from mjlab.envs import ManagerBasedRlEnv

DISTANCE = 1000.0
"""Metres from an env's place to its target, along x."""


def _alive(env: ManagerBasedRlEnv) -> torch.Tensor:
    """1 where the step did not end in a fall, `[N]`."""
    return env.termination_manager.terminated.logical_not().float()


def _place(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Vector over ground from the root to the target in m, `[N, 2]`."""
    target = env.scene.env_origins[:, :2].clone()
    target[:, 0] += DISTANCE
    return target - mdp.root_pose(env)[0][:, :2]


# Observations.


def angle_to_target(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Angle from the root's yaw to the target's direction in rad, within pi, `[N, 1]`."""
    away = _place(env)
    yaw = mdp.base_yaw_roll(env)[:, 0]
    angle = torch.atan2(away[:, 1], away[:, 0]) - yaw
    return torch.atan2(torch.sin(angle), torch.cos(angle)).unsqueeze(-1)


def heading_proj(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Projection of the root's x axis on the direction to the target, `[N, 1]`."""
    away = torch.nn.functional.normalize(_place(env), dim=-1)
    w, x, y, z = mdp.root_pose(env)[1].unbind(-1)
    forward = torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z)], -1)
    return (forward * away).sum(-1, keepdim=True)


# Rewards and terminations.


class Alive(ManagerTermBase):
    """1 a step, 0 for the one that ends in a fall, `[N]`."""

    def __init__(self, cfg: ManagerTermBaseCfg, env: ManagerBasedRlEnv):
        super().__init__(env)

    def __call__(self, env: ManagerBasedRlEnv) -> torch.Tensor:
        return _alive(env)


def death(env: ManagerBasedRlEnv) -> torch.Tensor:
    """1 for the step that ends in a fall, `[N]`."""
    return 1 - _alive(env)


class Progress(ManagerTermBase):
    """Approach to the target in m per physics step of 1/120 s, times 120, `[N]`."""

    def __init__(self, cfg: ManagerTermBaseCfg, env: ManagerBasedRlEnv):
        super().__init__(env)
        self.potentials = torch.zeros(env.num_envs, device=env.device)

    def reset(self, env_ids: torch.Tensor | slice | None = None) -> None:
        ids = slice(None) if env_ids is None else env_ids
        self.potentials[ids] = self._potential()[ids]

    def _potential(self) -> torch.Tensor:
        return -_place(self._env).norm(dim=-1) / self._env.physics_dt

    def __call__(self, env: ManagerBasedRlEnv) -> torch.Tensor:
        before = self.potentials.clone()
        self.potentials[:] = self._potential()
        return (self.potentials - before) * _alive(env)


def upright(env: ManagerBasedRlEnv) -> torch.Tensor:
    """1 while the root's z axis is within 21 degrees of the world's, `[N]`."""
    return mdp.upright_posture_bonus(env, 0.93) * _alive(env)


def heading(env: ManagerBasedRlEnv) -> torch.Tensor:
    """1 while the root's x axis points to the target (0.8), in proportion below, `[N]`."""
    value = heading_proj(env).squeeze(-1)
    return torch.where(value > 0.8, torch.ones_like(value), value / 0.8) * _alive(env)


def action_l2(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Sum of the squared actions, `[N]`."""
    return mdp.action_l2(env) * _alive(env)


class Electricity(mdp._JointTerm):
    """Sum of |action * joint velocity| times the velocities' scale, `[N]`."""

    def __call__(
        self, env: ManagerBasedRlEnv, scale: float, asset_cfg: SceneEntityCfg
    ) -> torch.Tensor:
        velocity = mdp._robot(env).data.joint_vel[:, self.joint_ids]
        return (env.action_manager.action * velocity * scale).abs().sum(-1) * _alive(env)


class JointsAtLimit(mdp._JointTerm):
    """How many joints are above 0.98 of their range (not below -0.98, as in Isaac Lab), `[N]`."""

    def __call__(self, env: ManagerBasedRlEnv, asset_cfg: SceneEntityCfg) -> torch.Tensor:
        return (self._normalized_pos() > 0.98).sum(-1) * _alive(env)


def time_out(env: ManagerBasedRlEnv) -> torch.Tensor:
    """Whether the episode's last step but one is over, `[N]`."""
    return env.episode_length_buf >= env.max_episode_length - 1


def _direct(cfg: ManagerBasedRlEnvCfg, fell: TerminationTermCfg) -> ManagerBasedRlEnvCfg:
    cfg.scale_rewards_by_dt = False
    cfg.scene.env_spacing = 4.0
    cfg.terminations = {
        "time_out": TerminationTermCfg(func=time_out, time_out=True), "fell": fell,
    }  # fmt: skip
    return cfg


def cartpole_cfg(play: bool = False) -> ManagerBasedRlEnvCfg:
    """Isaac-Cartpole-Direct-v0."""
    cart, pole = cartpole.JOINT_NAMES
    cfg = _direct(
        cartpole.env_cfg(play),
        TerminationTermCfg(func=out_of_bounds, params={"cart": 3.0, "pole": math.pi / 2,
                                                      "asset_cfg": mdp.joints((cart, pole))}),
    )  # fmt: skip

    def of(joint: str) -> dict[str, Any]:
        return {"asset_cfg": mdp.joints((joint,))}

    cfg.observations = {"policy": ObservationGroupCfg(terms={
        "pole_pos": ObservationTermCfg(func=mdp.JointPosRel, params=of(pole)),
        "pole_vel": ObservationTermCfg(func=mdp.JointVelRel, params=of(pole)),
        "cart_pos": ObservationTermCfg(func=mdp.JointPosRel, params=of(cart)),
        "cart_vel": ObservationTermCfg(func=mdp.JointVelRel, params=of(cart)),
    })}  # fmt: skip
    cfg.events = {
        "reset_base": cfg.events["reset_base"],
        "reset_pole": EventTermCfg(func=reset_joints_by_offset, mode="reset", params={
            **of(pole), "position_range": (-0.25 * math.pi, 0.25 * math.pi),
            "velocity_range": (0.0, 0.0)}),
        "reset_cart": EventTermCfg(func=reset_joints_by_offset, mode="reset", params={
            **of(cart), "position_range": (0.0, 0.0), "velocity_range": (0.0, 0.0)}),
    }  # fmt: skip
    cfg.rewards = {
        "alive": RewardTermCfg(func=Alive, weight=1.0),
        "terminated": RewardTermCfg(func=death, weight=-2.0),
        "pole_pos": RewardTermCfg(func=joint_pos_l2, weight=-1.0, params=of(pole)),
        "cart_vel": RewardTermCfg(func=mdp.joint_vel_l1, weight=-0.01, params=of(cart)),
        "pole_vel": RewardTermCfg(func=mdp.joint_vel_l1, weight=-0.005, params=of(pole)),
    }
    return cfg


def joint_pos_l2(env: ManagerBasedRlEnv, asset_cfg: SceneEntityCfg) -> torch.Tensor:
    """Sum of the squared joint positions, not wrapped, `[N]`."""
    return mdp._robot(env).data.joint_pos[:, asset_cfg.joint_ids].square().sum(-1)


def out_of_bounds(
    env: ManagerBasedRlEnv, cart: float, pole: float, asset_cfg: SceneEntityCfg
) -> torch.Tensor:
    """Whether the cart is further than `cart` (m) or the pole than `pole` (rad) from 0, `[N]`."""
    pos = mdp._robot(env).data.joint_pos[:, asset_cfg.joint_ids].abs()
    return (pos[:, 0] > cart) | (pos[:, 1] > pole)


def _locomotion(
    cfg: ManagerBasedRlEnvCfg, joints: tuple[str, ...], *, spin: float, speed: float,
    action: float, alive: float, death_cost: float, height: float,
) -> ManagerBasedRlEnvCfg:  # fmt: skip
    """The common part of ant and humanoid.

    Args:
        spin, speed: scales of the root's and the joints' angular velocity in the observation.
        action: cost of squared actions. alive: reward a step. death_cost: reward of a fall.
        height: metres below which the torso counts as fallen.
    """
    cfg = _direct(cfg, TerminationTermCfg(
        func=mdp.root_height_below_minimum, params={"minimum_height": height}))  # fmt: skip
    cfg.episode_length_s = 15.0
    limbs = {"asset_cfg": mdp.joints(joints)}
    cfg.observations = {"policy": ObservationGroupCfg(terms={
        "base_height": ObservationTermCfg(func=mdp.base_height),
        "base_lin_vel": ObservationTermCfg(func=mdp.base_lin_vel),
        "base_ang_vel": ObservationTermCfg(func=mdp.base_ang_vel, scale=spin),
        "base_yaw_roll": ObservationTermCfg(func=mdp.base_yaw_roll),
        "angle_to_target": ObservationTermCfg(func=angle_to_target),
        "base_up_proj": ObservationTermCfg(func=mdp.base_up_proj),
        "heading_proj": ObservationTermCfg(func=heading_proj),
        "joint_pos": ObservationTermCfg(func=mdp.JointPosLimitNormalized, params=dict(limbs)),
        "joint_vel": ObservationTermCfg(func=mdp.JointVelRel, scale=speed, params=dict(limbs)),
        "actions": ObservationTermCfg(func=last_action),
    })}  # fmt: skip
    cfg.events = {
        "reset_base": EventTermCfg(
            func=reset_root_state_uniform, mode="reset",
            params={"pose_range": {}, "velocity_range": {}},
        ),
        "reset_robot_joints": EventTermCfg(
            func=reset_joints_by_offset, mode="reset",
            params={**limbs, "position_range": (0.0, 0.0), "velocity_range": (0.0, 0.0)},
        ),
    }  # fmt: skip
    cfg.rewards = {
        "progress": RewardTermCfg(func=Progress, weight=1.0),
        "alive": RewardTermCfg(func=Alive, weight=alive),
        "upright": RewardTermCfg(func=upright, weight=0.1),
        "heading": RewardTermCfg(func=heading, weight=0.5),
        "actions": RewardTermCfg(func=action_l2, weight=-action),
        "electricity": RewardTermCfg(
            func=Electricity, weight=-0.05, params={"scale": speed, **limbs}
        ),
        "joints_at_limit": RewardTermCfg(func=JointsAtLimit, weight=-1.0, params=dict(limbs)),
        "death": RewardTermCfg(func=death, weight=death_cost),
    }
    return cfg


def ant_cfg(play: bool = False) -> ManagerBasedRlEnvCfg:
    """Isaac-Ant-Direct-v0."""
    return _locomotion(
        ant.env_cfg(play), ant.JOINT_NAMES, spin=1.0, speed=0.2, action=0.005, alive=0.5,
        death_cost=-2.0, height=0.31,
    )  # fmt: skip


def humanoid_cfg(play: bool = False) -> ManagerBasedRlEnvCfg:
    """Isaac-Humanoid-Direct-v0."""
    return _locomotion(
        humanoid.env_cfg(play), humanoid.JOINT_NAMES, spin=0.25, speed=0.1, action=0.01, alive=2.0,
        death_cost=-1.0, height=0.8,
    )  # fmt: skip
