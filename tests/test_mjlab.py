"""The embedded simulator under the contract, its configuration by path, and its exact state."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mjlab", reason="the embedded simulator is not installed")

from dreamer_isaac import envs
from dreamer_isaac.cli import compose
from dreamer_isaac.config import ConfigError
from dreamer_isaac.envs import SimEnv, make_env
from dreamer_isaac.envs.mjlab import load_tasks
from dreamer_isaac.logger import Console
from dreamer_isaac.main import start_simulator

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def make(*overrides: str, envs: int = 8) -> SimEnv:
    cfg = compose([f"env.num_envs={envs}", "evaluation.num_envs=1", "env.backend=mjlab",
                   "collector.frames_per_batch=4096", *overrides])  # fmt: skip
    return make_env(cfg, "mjlab", CPU)


@pytest.fixture(scope="module")
def short() -> Iterator[SimEnv]:
    """Cartpole with episodes of 12 steps: terminations and truncations in a few steps."""
    env = make("env.cfg.episode_length_s=0.2")
    yield env
    env.close()


def test_time_table_on_the_embedded_simulator(short: SimEnv) -> None:
    assert short.info.max_episode_length == 12
    obs, first, _ = short.reset()
    assert bool(first.all())
    clock = torch.zeros(8)
    seen = 0
    for t in range(40):
        action = torch.full((8, 1), 0.5 if t % 2 else -0.5)
        before = obs.clone()
        _, outcome, (obs, first, _) = short.step(action)
        clock += 1
        assert torch.equal(outcome.truncated, clock == 12)
        assert torch.equal(first, outcome.done)
        clock[outcome.done] = 0
        seen += int(outcome.done.sum())
        # The observation after a reset is the new episode's: inside the ranges of a reset.
        fresh = obs[first]
        assert bool((fresh[:, 0].abs() <= 1.0).all() and (fresh[:, 2].abs() <= 0.5).all())
        # What goes on has moved on by about v dt, not stayed the same.
        moved = (obs[~first, 0] - before[~first, 0]).abs() - (before[~first, 2] / 60).abs()
        assert bool((moved.abs() < 0.1).all()) and not torch.equal(obs, before)
    assert seen == 24


def test_nothing_of_the_simulator_s_buffers_is_handed_out(short: SimEnv) -> None:
    short.reset()
    handed, copies = [], []
    for t in range(14):
        executed, outcome, observation = short.step(torch.full((8, 1), 0.1 * t))
        fresh = [executed, *outcome, observation.obs, observation.is_first]
        handed += fresh
        copies += [x.clone() for x in fresh]
    assert all(torch.equal(a, b) for a, b in zip(handed, copies, strict=True))
    rewards = torch.stack([h for h in handed[1::6]])
    assert len({tuple(r.tolist()) for r in rewards}) == 14  # not the last one fourteen times


def test_termination_is_not_truncation() -> None:
    env = make(
        "env.action_bound=5", "env.cfg.terminations.cart_out_of_bounds.params.bounds=[-1.2,1.2]"
    )
    env.reset()
    ended = torch.zeros(8, dtype=torch.bool)
    for _ in range(60):
        _, outcome, _ = env.step(torch.full((8, 1), 5.0))
        assert not bool((outcome.terminated & outcome.truncated).any())
        ended |= outcome.terminated
    assert bool(ended.all())


def test_names_of_joints() -> None:
    info = make("env.name=Isaac-Ant-v0").info
    assert info.action_names[0] == "front_left_leg" and len(info.action_names) == 8
    assert info.observation_names[12] == "joint_pos_norm[front_left_leg]"
    assert info.observation_names[-1] == "actions[right_back_foot]"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("env.cfg.rewards.aliv.weight=1", ["rewards has no 'aliv'", "alive", "pole_pos"]),
        ("env.cfg.episode_length=8", ["no 'episode_length'", "episode_length_s"]),
        ("env.cfg.episode_length_s=long", ["must be a float"]),
        ("env.cfg.rewards=1", ["section", "alive"]),
        ("env.cfg.rewards.alive.func=x", ["function"]),
    ],
)
def test_a_wrong_path_lists_what_is_there(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        make(override)
    for word in words:
        assert word in str(e.value)


def test_fields_by_path_reach_the_simulator() -> None:
    env: Any = make("env.cfg.rewards.alive.weight=0.7", "env.cfg.decimation=4")
    assert env.sim.cfg.rewards["alive"].weight == 0.7
    assert env.info.step_dt == pytest.approx(4 / 120)


def test_unknown_task_and_module() -> None:
    with pytest.raises(ConfigError, match="Mjlab-Cartpole-Balance"):
        make("env.name=Mjlab-Cartpole-Balanc")
    with pytest.raises(ConfigError, match=r"env\.import=no\.such"):
        make("env.name=X", "env.import=no.such")


def test_a_user_s_own_task(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks.py").write_text(
        "from mjlab.tasks.registry import load_env_cfg, load_rl_cfg, register_mjlab_task\n"
        "cfg = load_env_cfg('Mjlab-Cartpole-Balance')\n"
        "register_mjlab_task('My-Task', cfg, cfg, load_rl_cfg('Mjlab-Cartpole-Balance'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    env = make("env.name=My-Task", "env.import=my_tasks")
    assert env.key == "actor" and env.info.observation == 5
    assert "My-Task" in load_tasks()


@pytest.mark.parametrize(("name", "envs"), [("Isaac-Cartpole-v0", 16), ("Isaac-Ant-v0", 8)])
def test_saved_state_goes_on_bit_by_bit_in_a_new_simulation(name: str, envs: int) -> None:
    env = make(f"env.name={name}", "env.cfg.episode_length_s=0.6", envs=envs)
    generator = torch.Generator().manual_seed(0)
    actions = [2 * torch.randn(envs, env.info.action, generator=generator) for _ in range(90)]
    env.reset()
    for action in actions[:25]:
        env.step(action)
    state = env.state_dict()
    expected = [env.step(a) for a in actions[25:]]
    assert sum(int(e[1].done.sum()) for e in expected) >= envs

    other = make(f"env.name={name}", "env.cfg.episode_length_s=0.6", envs=envs)
    other.reset()
    for action in actions[40:47]:
        other.step(action)
    other.load_state_dict(state)
    for action, (executed, outcome, observation) in zip(actions[25:], expected, strict=True):
        result = other.step(action)
        pairs = zip(itertools.chain([result[0]], *result[1:]),
                    [executed, *outcome, *observation], strict=True)  # fmt: skip
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("there", "asked", "expected"), [
    (False, None, "disable"), (False, "osmesa", "osmesa"), (True, None, None),
])  # fmt: skip
def test_a_machine_without_egl(
    there: bool, asked: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> None:
        assert name.startswith("libEGL")
        if not there:
            raise OSError(f"{name}: not found")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "")  # so that it is put back
    monkeypatch.delenv("MUJOCO_GL")
    if asked:
        monkeypatch.setenv("MUJOCO_GL", asked)
    envs._without_egl()
    assert os.environ.get("MUJOCO_GL") == expected


@pytest.mark.cluster
@pytest.mark.parametrize("start", ["import dreamer_isaac.envs.tasks", "import ppo; ppo.main()"])
def test_mujoco_is_imported_without_egl(start: str) -> None:
    """mjlab asks for EGL if it comes first, and MuJoCo's import then fails."""
    hidden = (
        "import ctypes, os, sys\n"
        "class Hidden(ctypes.CDLL):\n"
        "    def __init__(self, name, *a, **k):\n"
        "        if str(name).startswith('libEGL'): raise OSError(f'{name}: not found')\n"
        "        super().__init__(name, *a, **k)\n"
        "ctypes.CDLL = ctypes.cdll._dlltype = Hidden\n"
        "sys.argv = ['ppo.py', '--device', 'nonsense']\n"
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in (".", "scripts"))
    code = f"{hidden}{start}\nprint(os.environ['MUJOCO_GL'])"
    run = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    if "ppo" in start:  # as far as its device
        assert run.returncode and "nonsense" in run.stderr, run.stderr
    else:
        assert run.stdout == "disable\n", run.stderr


def test_picture_without_opengl() -> None:
    cfg = compose(["env.num_envs=2", "evaluation.num_envs=1", "env.backend=mjlab",
                   "collector.frames_per_batch=4096"])  # fmt: skip
    env = make_env(cfg, "mjlab", CPU, render=True)
    env.reset()
    (first,) = env.render()
    assert first.shape == (360, 480, 3) and first.dtype.name == "uint8" and first.std() > 20
    for _ in range(10):
        env.step(torch.ones(2, 1))
    assert (env.render()[0] != first).any()


def test_pictures_of_several_envs() -> None:
    cfg = compose(["env.num_envs=3", "evaluation.num_envs=1", "env.backend=mjlab",
                   "collector.frames_per_batch=4095"])  # fmt: skip
    env = make_env(cfg, "mjlab", CPU, render=True)
    env.reset()
    for _ in range(10):
        env.step(torch.tensor([[-1.0], [0.0], [1.0]]))
    pictures = env.render(3)
    assert [p.shape for p in pictures] == [(180, 240, 3)] * 3
    carts = [(p[:, :, 0].astype(int) - p[:, :, 2]).clip(0).sum(0).argmax() for p in pictures]
    assert len(set(carts)) == 3  # each env's own state


def test_a_picture_shows_the_state_of_its_own_step() -> None:
    """Resets included: every picture is rendered again, from the positions of its step alone."""
    env = make("env.name=Isaac-Cartpole-RGB-v0", "env.cfg.episode_length_s=0.2",
               "env.pixels_only=false", "env.image_size=32", envs=4)  # fmt: skip
    sim: Any = env.sim  # type: ignore[attr-defined]
    observation = env.reset()
    assert env.info.pixels == (32, 32, 3) and env.info.observation == 4
    kept, ended = [], 0
    for t in range(30):
        qpos = sim.sim.data.qpos.clone()
        kept.append((qpos, observation))
        _, outcome, observation = env.step(torch.full((4, 1), (-1.0) ** t))
        ended += int(outcome.done.sum())
    assert ended == 8
    pictures = torch.stack([o.pixels for _, o in kept])
    for qpos, seen in kept:
        sim.sim.data.qpos[:] = qpos
        sim.sim.forward()
        sim.sim.sense()
        assert torch.equal(env.pixels(), seen.pixels)  # type: ignore[arg-type]
        assert torch.allclose(qpos[:, :1], seen.obs[:, :1], atol=1e-6)
    changed = (pictures[1:] != pictures[:-1]).flatten(2).any(2)
    assert changed.float().mean() > 0.5  # the cart moves, so the test can fail
    env.close()


def test_cameras_of_any_task_follow_the_robot() -> None:
    env = make("env.name=Isaac-Ant-v0", "env.from_pixels=true", "env.image_size=32",
               "env.cameras=[side,top]", "env.cameras.near.position=[1,1,1]",
               "env.cameras.near.target=[0,0,0]", envs=4)  # fmt: skip
    sim: Any = env.sim  # type: ignore[attr-defined]
    first = env.reset()
    assert env.info.pixels == (32, 32, 9) and env.info.observation == 0
    cameras = [sim.sim.mj_model.camera(n).id for n in ("side", "top", "near")]
    torso = sim.sim.mj_model.body("robot/torso").id
    for _ in range(5):
        _, _, observation = env.step(torch.randn(4, 8).clamp(-1, 1))
    away = sim.sim.data.cam_xpos[:, cameras] - sim.sim.data.xpos[:, torso, None]
    expected = torch.tensor([[0.0, -3.0, 1.0], [0.0, 0.0, 4.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(away, expected.expand(4, 3, 3), atol=1e-4, rtol=0)
    assert not torch.equal(observation.pixels, first.pixels)  # type: ignore[arg-type]
    env.close()


def test_isaac_labs_physics_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"env\.physics=physx is Isaac Lab's"):
        start_simulator(compose(["env.backend=mjlab", "env.physics=physx"]), Console(), CPU)
