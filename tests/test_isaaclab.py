"""The Isaac Lab backend. What needs no Isaac Lab runs everywhere; the contract runs where it is
installed: `pytest -m isaaclab` in Isaac Lab's Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_that_nothing_changes_later

from dreamer_isaac.cameras import POSES
from dreamer_isaac.cli import compose
from dreamer_isaac.config import ConfigError, isaaclab_available, module_exists
from dreamer_isaac.envs.isaaclab import task_id

ROOT = Path(__file__).resolve().parent.parent
isaaclab = [
    pytest.mark.isaaclab,
    pytest.mark.skipif(not isaaclab_available(), reason="Isaac Lab is not installed"),
]


def test_ids_with_and_without_their_version() -> None:
    assert task_id("Isaac-Ant-v0", ["Isaac-Ant"]) == "Isaac-Ant"
    assert task_id("Isaac-Ant", ["Isaac-Ant-v0"]) == "Isaac-Ant-v0"
    assert task_id("Isaac-Ant-v0", ["Isaac-Ant-v0", "Isaac-Ant"]) == "Isaac-Ant-v0"
    with pytest.raises(ConfigError, match="Known: Isaac-Ant-v0"):
        task_id("Isaac-Amt-v0", ["Isaac-Ant-v0"])


def which(folder: Path, *packages: str, task: str = "Isaac-Ant-v0") -> str:
    """What a process decides that sees these (empty) packages and not the real ones."""
    for package in packages:
        path = folder / package
        path.mkdir(parents=True)
        (path / "__init__.py").write_text("raise ImportError('must not be imported')")
    code = (
        "import importlib.util as u, sys\n"
        "real = u.find_spec\n"
        "hidden = {'isaaclab', 'isaacsim', 'newton', 'isaaclab_tasks'}\n"
        f"here = {str(folder)!r}\n"
        "import importlib.machinery as m\n"
        "def find(name, *rest):\n"
        "    if name.split('.')[0] in hidden:\n"
        "        return m.PathFinder.find_spec(name, [here])\n"
        "    return real(name, *rest)\n"
        "u.find_spec = find\n"
        "from dreamer_isaac.cli import compose\n"
        "from dreamer_isaac.launch import choose_backend\n"
        f"print(*choose_backend(compose(['env.name={task}'])), sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(not module_exists("mjlab"), reason="mjlab is not installed")
def test_the_package_without_a_simulator_is_not_taken_for_isaac_lab(tmp_path: Path) -> None:
    assert which(tmp_path / "none") == "mjlab|Isaac Lab is not installed"
    assert which(tmp_path / "wheel", "isaaclab", "isaaclab_tasks").startswith("mjlab|")
    three = which(tmp_path / "newton", "isaaclab", "isaaclab_tasks", "newton")
    assert three == "isaaclab|Isaac Lab is installed"
    two = which(tmp_path / "sim", "isaaclab", "isaaclab_tasks", "isaacsim")
    assert two == "isaaclab|Isaac Lab is installed"


@pytest.mark.skipif(not module_exists("mjlab"), reason="mjlab is not installed")
def test_a_task_of_mjlab_s_stays_there_and_the_reason_is_true(tmp_path: Path) -> None:
    found = which(tmp_path, "isaaclab", "isaaclab_tasks", "newton", task="Mjlab-Cartpole-Balance")
    assert found.startswith("mjlab|a task of mjlab's") and "env.import" in found


def test_isaac_lab_that_was_asked_for_and_is_not_there() -> None:
    if isaaclab_available():
        pytest.skip("Isaac Lab is installed")
    done = subprocess.run(
        [sys.executable, "dreamer_isaac.py", "env.backend=isaaclab", "env.name=Isaac-Ant-v0"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Isaac Lab cannot be imported here" in done.stderr


class TestContract:
    """On a real task, with episodes of half a second."""

    pytestmark = isaaclab
    ENVS = 6

    @pytest.fixture(scope="class")
    def env(self) -> Iterator[Any]:
        from dreamer_isaac.envs import make_env
        from dreamer_isaac.launch import simulator

        cfg = compose([
            "env.name=Isaac-Ant-v0", f"env.num_envs={self.ENVS}", "evaluation.num_envs=0",
            "env.device=cpu", "env.action_bound=0.8", "collector.frames_per_batch=60",
            "env.cfg.episode_length_s=0.5", "env.from_pixels=true", "env.pixels_only=false",
            "env.image_size=32", "env.cameras=[side,top]",
        ])  # fmt: skip
        with simulator(cfg):
            yield make_env(cfg, "isaaclab", torch.device("cpu"))

    def test_what_is_known_of_the_task(self, env: Any) -> None:
        info = env.info
        assert (info.backend, info.num_envs, info.action) == ("isaaclab", self.ENVS, 8)
        assert info.max_episode_length == 30 and info.step_dt == pytest.approx(1 / 60)
        assert len(info.observation_names) == info.observation == len(set(info.observation_names))
        assert len(set(info.action_names)) == 8 and any("leg" in n for n in info.action_names)

    def test_nothing_that_is_handed_out_changes_later(self, env: Any) -> None:
        actions = [torch.full((self.ENVS, 8), 0.1 * step) for step in range(8)]
        check_that_nothing_changes_later(env, actions)

    def test_time_table_and_rewards(self, env: Any) -> None:
        torch.manual_seed(0)
        obs = env.reset()
        assert obs.is_first.all()
        clock, ends = torch.zeros(self.ENVS), 0
        for _ in range(70):
            action = 2 * torch.rand(self.ENVS, 8) - 1
            executed, outcome, obs = env.step(action)
            assert torch.equal(executed, action.clamp(-1, 1))  # not scaled by the bound
            assert outcome.reward.shape == outcome.done.shape == (self.ENVS,)
            names, terms = env.reward_terms()
            assert names and torch.isfinite(terms).all()
            torch.testing.assert_close(terms.sum(1), outcome.reward, rtol=1e-4, atol=1e-5)
            clock += 1
            assert torch.equal(outcome.truncated & ~outcome.terminated, (clock == 30)
                               & ~outcome.terminated)  # fmt: skip
            assert torch.equal(obs.is_first, outcome.done)
            assert torch.isfinite(obs.obs).all()
            clock[outcome.done] = 0
            ends += int(outcome.done.sum())
        assert ends >= 2 * self.ENVS
        env.check_finite()

    def test_pictures_follow_the_robot_and_are_of_their_own_step(self, env: Any) -> None:
        from dreamer_isaac.launch import isaaclab_is_3

        torch.manual_seed(1)
        assert env.info.pixels == (32, 32, 6)
        pictures = [env.reset().pixels]
        scene, ended = env.sim.scene, 0
        for _ in range(40):
            _, outcome, seen = env.step(2 * torch.rand(self.ENVS, 8) - 1)
            assert torch.equal(seen.pixels, env.pixels())  # of now, and not rendered before
            pictures.append(seen.pixels)
            ended += int(outcome.done.sum())
            root = scene.articulations["robot"].data.root_pos_w
            root = root if isinstance(root, torch.Tensor) else root.torch
            for name, away in (("side", (0.0, -3.0, 1.0)), ("top", (0.0, 0.0, 4.0))):
                at = scene.sensors[f"camera_{name}"].data.pos_w
                at = at if isinstance(at, torch.Tensor) else at.torch
                expected = root + torch.tensor(away)
                torch.testing.assert_close(at, expected, atol=1e-3, rtol=0)
                turned = scene.sensors[f"camera_{name}"].data.quat_w_opengl
                turned = turned if isinstance(turned, torch.Tensor) else turned.torch
                w, x, y, z = POSES[name].quaternion()
                own = torch.tensor((x, y, z, w) if isaaclab_is_3() else (w, x, y, z))
                agree = (turned * own).sum(1).abs()  # a quaternion and its negative are the same
                torch.testing.assert_close(agree, torch.ones(self.ENVS), atol=1e-4, rtol=0)
        assert ended >= self.ENVS
        film = torch.stack(pictures)
        assert (film[1:] != film[:-1]).flatten(2).any(2).float().mean() > 0.9
        assert (film[:, 0] != film[:, 1]).any()

    def test_a_second_simulation_is_refused(self, env: Any) -> None:
        from dreamer_isaac.envs import make_env

        cfg = compose(["env.name=Isaac-Ant-v0", "env.device=cpu"])
        with pytest.raises(ConfigError, match="one simulation a process"):
            make_env(cfg, "isaaclab", torch.device("cpu"))

    def test_the_users_fields_are_set_and_wrong_ones_named(self, env: Any) -> None:
        from dreamer_isaac.envs.isaaclab import task_config

        cfg = compose(["env.name=Isaac-Ant", "env.cfg.rewards.alive.weight=0.75"])
        assert task_config(cfg, "cpu").rewards.alive.weight == 0.75
        cfg = compose(["env.name=Isaac-Ant", "env.cfg.rewards.alife.weight=0.75"])
        with pytest.raises(ConfigError, match="no 'alife'"):
            task_config(cfg, "cpu")
        cfg = compose(["env.name=Isaac-Ant", "env.physics=bullet"])
        with pytest.raises(ConfigError, match="newton_mjwarp"):
            task_config(cfg, "cpu")
