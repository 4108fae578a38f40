"""Isaac Lab's Direct tasks on the embedded simulator, step by step against their formulas, written
out for one env at a time in numpy from the simulator's raw positions and velocities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mjlab", reason="the embedded simulator is not installed")

from dreamer_isaac.cli import compose
from dreamer_isaac.envs import SimEnv, make_env

ANT_JOINTS = [f"{leg}_{part}" for part in ("leg", "foot")
              for leg in ("front_left", "front_right", "left_back", "right_back")]  # fmt: skip
HUMANOID_JOINTS = [
    "lower_waist:0", "lower_waist:1", "right_upper_arm:0", "right_upper_arm:2", "left_upper_arm:0",
    "left_upper_arm:2", "pelvis", "right_lower_arm", "left_lower_arm", "right_thigh:0",
    "right_thigh:1", "right_thigh:2", "left_thigh:0", "left_thigh:1", "left_thigh:2", "right_shin",
    "left_shin", "right_foot:0", "right_foot:1", "left_foot:0", "left_foot:1",
]  # fmt: skip
# Of `AntEnvCfg` and `HumanoidEnvCfg` in direct/ant and direct/humanoid.
TASKS = {
    "Isaac-Ant-Direct-v0": {
        "joints": ANT_JOINTS, "height": 0.31, "death": -2.0, "alive": 0.5, "action": 0.005,
        "speed": 0.2, "spin": 1.0,
    },
    "Isaac-Humanoid-Direct-v0": {
        "joints": HUMANOID_JOINTS, "height": 0.8, "death": -1.0, "alive": 2.0, "action": 0.01,
        "speed": 0.1, "spin": 0.25,
    },
}  # fmt: skip
ENVS = 5


def make(name: str, *more: str) -> SimEnv:
    cfg = compose([f"env.name={name}", f"env.num_envs={ENVS}", "evaluation.num_envs=1",
                   "env.backend=mjlab", "collector.frames_per_batch=4000", *more])  # fmt: skip
    return make_env(cfg, "mjlab", torch.device("cpu"))


class State:
    """One env's state by the names of the joints."""

    def __init__(self, env: Any, i: int, joints: list[str]):
        model, data = env.sim.sim.mj_model, env.sim.sim.data
        qpos, qvel = (data.qpos[i].double().numpy(), data.qvel[i].double().numpy())
        of = [model.joint(f"robot/{j}") for j in joints]
        self.q = np.array([qpos[j.qposadr[0]] for j in of])
        self.v = np.array([qvel[j.dofadr[0]] for j in of])
        self.range = np.array([j.range for j in of])
        self.root, w, x, y, z = qpos[:3], *qpos[3:7]
        self.R = np.array([
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ])  # fmt: skip
        root = model.body("robot/torso")
        self.spin = qvel[3:6]  # MuJoCo: in the body's own axes
        # Isaac Lab's root velocity is the centre of mass's.
        self.velocity = qvel[:3] + np.cross(self.R @ self.spin, self.R @ root.ipos)
        origin = env.sim.scene.env_origins[i].double().numpy()
        self.away = (origin + [1000.0, 0, 0] - self.root)[:2]

    def potential(self) -> float:
        return -float(np.hypot(*self.away)) * 120

    def scaled(self) -> np.ndarray:
        low, high = self.range.T
        return (2 * self.q - high - low) / (high - low)


def wrap(angle: float) -> float:
    return math.atan2(math.sin(angle), math.cos(angle))


def locomotion_observation(s: State, t: dict[str, Any], action: np.ndarray) -> np.ndarray:
    yaw = math.atan2(s.R[1, 0], s.R[0, 0])
    roll = math.atan2(s.R[2, 1], s.R[2, 2])
    bearing = math.atan2(s.away[1], s.away[0])
    heading = s.R[:2, 0] @ s.away / np.hypot(*s.away)
    return np.concatenate([
        [s.root[2]], s.R.T @ s.velocity, t["spin"] * s.spin, [wrap(yaw), wrap(roll)],
        [wrap(bearing - yaw)], [s.R[2, 2]], [heading], s.scaled(), t["speed"] * s.v, action,
    ])  # fmt: skip


def locomotion_reward(
    s: State, before: float, t: dict[str, Any], action: np.ndarray
) -> dict[str, float]:
    heading = s.R[:2, 0] @ s.away / np.hypot(*s.away)
    return {
        "progress": s.potential() - before, "alive": t["alive"],
        "upright": 0.1 if s.R[2, 2] > 0.93 else 0.0,
        "heading": 0.5 if heading > 0.8 else 0.5 * heading / 0.8,
        "actions": -t["action"] * float((action**2).sum()),
        "electricity": -0.05 * float(np.abs(action * s.v * t["speed"]).sum()),
        "joints_at_limit": -float((s.scaled() > 0.98).sum()), "death": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_locomotion_step_by_step(name: str) -> None:
    t = TASKS[name]
    # An ant hardly ever falls: it counts as fallen earlier here.
    more = ["env.cfg.terminations.fell.params.minimum_height=0.42"] if t["height"] < 0.5 else []
    env = make(name, *more)
    joints = t["joints"]
    assert env.info.action_names == joints
    assert env.info.observation == 12 + 3 * len(joints) == {8: 36, 21: 75}[len(joints)]
    assert env.info.max_episode_length == 900 and env.info.step_dt == pytest.approx(1 / 60)
    torch.manual_seed(0)
    seen = env.reset()
    zero = np.zeros(len(joints))
    states = [State(env, i, joints) for i in range(ENVS)]
    for i, s in enumerate(states):
        np.testing.assert_allclose(seen.obs[i], locomotion_observation(s, t, zero), atol=2e-5)
        assert np.abs(s.v).max() == 0 and np.abs(s.velocity).max() < 1e-6  # nothing random
    potentials = [s.potential() for s in states]
    falls = limits = 0
    for _ in range(120):
        action = 2 * torch.rand(ENVS, len(joints)) - 1
        _, outcome, seen = env.step(action)
        names, terms = env.reward_terms()
        torch.testing.assert_close(terms.sum(1), outcome.reward)
        for i in range(ENVS):
            s, a = State(env, i, joints), action[i].double().numpy()
            got = dict(zip(names, terms[i].tolist(), strict=True))
            if outcome.terminated[i]:
                falls += 1
                assert outcome.reward[i].item() == t["death"]
                assert all(v == 0 for k, v in got.items() if k != "death")
                a = zero
            else:
                expected = locomotion_reward(s, potentials[i], t, a)
                assert got.keys() == expected.keys()
                for key, value in expected.items():
                    # Around 120,000 float32 resolves the potential to 1/128.
                    tolerance = 0.03 if key == "progress" else 2e-4
                    assert got[key] == pytest.approx(value, abs=tolerance), key
                limits += expected["joints_at_limit"] < 0
            np.testing.assert_allclose(
                seen.obs[i], locomotion_observation(s, t, a), atol=2e-4, err_msg=str(i)
            )
            potentials[i] = s.potential()
    assert falls >= 2 and limits > 10
    env.close()


def test_cartpole_step_by_step() -> None:
    env = make("Isaac-Cartpole-Direct-v0", "env.action_bound=1")
    assert [n.split("[")[0] for n in env.info.observation_names] == [
        "pole_pos", "pole_vel", "cart_pos", "cart_vel",
    ]  # fmt: skip
    assert env.info.max_episode_length == 300
    sim: Any = env.sim  # type: ignore[attr-defined]
    model = sim.sim.mj_model
    cart, pole = (model.joint(f"robot/{n}").qposadr[0] for n in ("slider_to_cart", "cart_to_pole"))
    seen = env.reset()
    assert bool((seen.obs[:, 0].abs() <= math.pi / 4).all()) and seen.obs[:, 0].std() > 0.05
    assert bool((seen.obs[:, 1:] == 0).all())
    ends = 0
    for step in range(200):
        _, outcome, seen = env.step(torch.full((ENVS, 1), 1.0 if step % 40 < 20 else -1.0))
        names, terms = env.reward_terms()
        q, v = sim.sim.data.qpos, sim.sim.data.qvel
        expected = torch.stack([q[:, pole], v[:, pole], q[:, cart], v[:, cart]], 1)
        torch.testing.assert_close(seen.obs, expected)
        for i in range(ENVS):
            got = dict(zip(names, terms[i].tolist(), strict=True))
            if outcome.terminated[i]:
                ends += 1
                assert got["alive"] == 0 and got["terminated"] == -2
                assert got["pole_pos"] < 0  # is not replaced, as the locomotion tasks' are
                continue
            p, pv, _, cv = seen.obs[i].tolist()
            assert abs(p) <= math.pi / 2 and abs(seen.obs[i, 2]) <= 3
            assert got == pytest.approx({
                "alive": 1.0, "terminated": 0.0, "pole_pos": -(p**2), "cart_vel": -0.01 * abs(cv),
                "pole_vel": -0.005 * abs(pv)}, abs=1e-5)  # fmt: skip
            assert outcome.reward[i].item() == pytest.approx(sum(got.values()), abs=1e-5)
    assert ends > 5
    env.close()


def test_rewards_that_are_not_multiplied_by_the_step_are_trained_as_they_are() -> None:
    from dreamer_isaac.logger import Console
    from dreamer_isaac.train import Run

    for name, multiplier in (("Isaac-Ant-Direct-v0", 1.0), ("Isaac-Ant-v0", 60.0)):
        cfg = compose([f"env.name={name}", "env.num_envs=4", "evaluation.num_envs=1",
                       "env.backend=mjlab", "collector.frames_per_batch=4000"])  # fmt: skip
        run = Run(cfg, Path("."), Console())
        assert run.learner.reward_multiplier == pytest.approx(multiplier)
        run.env.close()


def test_heights_at_which_a_fall_is_a_fall() -> None:
    from mjlab.tasks.registry import load_env_cfg

    from dreamer_isaac.envs.mjlab import load_tasks

    load_tasks()
    for name, t in TASKS.items():
        fell = load_env_cfg(name).terminations["fell"]
        assert fell.params == {"minimum_height": t["height"]} and not fell.time_out


def test_an_episode_is_a_step_shorter_than_its_time() -> None:
    env = make("Isaac-Ant-Direct-v0", "env.cfg.episode_length_s=0.5")
    env.reset()
    ends = []
    for step in range(1, 70):
        _, outcome, _ = env.step(torch.zeros(ENVS, 8))
        assert not outcome.terminated.any()
        if outcome.truncated.all():
            ends.append(step)
    assert ends == [29, 58]
    env.close()
