"""What an evaluation says: statistics, the world model's errors, pictures, the page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import embedded

from dreamer_isaac import checkpoint, cli
from dreamer_isaac.cli import compose
from dreamer_isaac.config import AlgoConfig, EvaluationConfig, ModelConfig
from dreamer_isaac.envs import make_env
from dreamer_isaac.envs.contract import Observation
from dreamer_isaac.envs.toy import ToyEnv
from dreamer_isaac.evaluate import (
    Episodes,
    Trajectory,
    grid,
    labelled,
    play,
    shown,
    world_model,
)
from dreamer_isaac.models import Agent

CPU = torch.device("cpu")
SMALL: Any = {
    "belief": 8, "hidden": 4, "categoricals": 2, "classes": 3, "blocks": 2, "units": 4, "bins": 9,
}  # fmt: skip


def episodes(returns: list[float], endings: list[str]) -> Episodes:
    empty = torch.zeros(1, 1, 1)
    return Episodes(
        np.array(returns), np.arange(1.0, len(returns) + 1), np.arange(len(returns)), endings,
        {"alive": np.array(returns)}, Trajectory(*[empty] * 5), [], [],
    )  # fmt: skip


def test_statistics_by_hand() -> None:
    found = episodes([1.0, 2.0, 3.0, 10.0], ["fell", "success", "fell", "time_out"]).summary()
    assert found["return_mean"] == 4.0 and found["episodes"] == 4
    assert found["return_stderr"] == pytest.approx(np.std([1, 2, 3, 10], ddof=1) / 2)
    assert found["return_quantiles"]["0.5"] == 2.5 and found["return_quantiles"]["1"] == 10.0
    assert found["length_quantiles"]["0"] == 1.0
    assert found["endings"] == {"fell": 2, "success": 1, "time_out": 1} and found["success"] == 0.25
    assert "success" not in episodes([1.0], ["fell"]).summary()


def test_one_episode_has_no_standard_error() -> None:
    found = episodes([1.0], ["fell"]).summary()
    assert found["return_stderr"] is None and shown(found["return_stderr"]) == "-"


class Endless(ToyEnv):
    """Without a time limit, as a task can be; the first env never falls either."""

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        self.env.obs[0] = 0.0
        executed, outcome, observation = super().step(0 * action)
        outcome.truncated.zero_()
        return executed, outcome, observation

    def limit_episodes(self, steps: int) -> None:
        self.info.max_episode_length = steps


def test_a_task_without_a_time_limit_is_cut_off() -> None:
    env = Endless(4, 0)
    env.env.length = 10**6
    said: list[str] = []
    cfg = EvaluationConfig(episodes=8, max_steps=20, policy="zero", video=False)
    agent = Agent(3, 1, ModelConfig(**SMALL), AlgoConfig())
    env.reset()
    env.env.obs[1:, 0] = 1.4
    env.env.obs[1:, 1] = 5.0  # they fall at once, and start again
    env.reset = lambda: Observation(env.env.obs.clone(), torch.ones(4, dtype=torch.bool))  # type: ignore[method-assign]
    found = play(env, agent, cfg, 0, said.append)
    summary = found.summary()
    assert summary["endings"]["cut off"] >= 1 and summary["endings"]["terminated"] >= 3
    assert found.endings[0] == "cut off" and found.lengths[0] == 41 and found.lengths.min() > 0
    assert len(found.rows()) == len(found.returns) == sum(summary["endings"].values())
    assert "has no time limit" in said[0]


def test_an_env_that_has_played_its_episodes_stands_still_in_the_video() -> None:
    """Else its last return would stand over an episode that does not count."""
    env = ToyEnv(2, 0)
    env.reset()
    clock = iter(range(1000))
    env.render = lambda envs=1: [  # type: ignore[method-assign]
        np.full((40, 60, 3), 5 * next(clock) % 256, np.uint8) for _ in range(envs)
    ]
    cfg = EvaluationConfig(episodes=2, policy="zero", video_envs=2)
    env.env.obs[:] = torch.tensor([[1.4, 0.3, 0.0], [0.0, 0.0, 0.0]])
    env.reset = lambda: Observation(env.env.obs.clone(), torch.ones(2, dtype=torch.bool))  # type: ignore[method-assign]
    found = play(env, Agent(3, 1, ModelConfig(**SMALL), AlgoConfig()), cfg, 0)
    assert found.lengths[0] < 5 < 30 < found.lengths[1]
    left, right = ([f[:, :60] for f in found.frames], [f[:, 60:] for f in found.frames])
    over = int(found.lengths[0])
    assert not np.array_equal(left[over - 1], left[over - 2])
    assert all(np.array_equal(f, left[over - 1]) for f in left[over:])
    assert not np.array_equal(right[over], right[over + 1])


class Lagging:
    """Predicts every component to stay what it was, and the second one to be off by 3."""

    def predict(self, carry: Any, action: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
        steps = action.shape[1]
        first = carry.state[:, None].expand(-1, steps, -1)
        return first + torch.tensor([0.0, 3.0, 0.0]), None


def test_world_model_errors_by_horizon_and_term() -> None:
    """A component that grows by 1 a step is off by the horizon; the spread scales both."""
    length, steps = 40, 8
    clock = torch.arange(float(length)).repeat(2, 1)
    obs = torch.stack([clock, torch.zeros_like(clock), torch.zeros_like(clock)], 2)
    obs[1, :, 2] = 5.0
    done = torch.zeros(2, length, dtype=torch.bool)
    done[1, 15] = True  # no prediction of env 1 may look across it
    trajectory = Trajectory(obs, torch.zeros(2, length, 1), torch.zeros(2, length, 1), obs, done)
    names = ["pos[x]", "vel[x]", "pos[y]"]
    agent: Any = Lagging()
    found = world_model(agent, trajectory, names, steps, stride=10)
    assert found is not None and found.terms == ["pos", "vel"]
    assert found.error.shape == (steps, 2) and found.samples == 3 + 2
    spread = float(obs[:, :, 0].std())
    for n in (1, 4, 8):
        assert found.at(n)["pos"] == pytest.approx(n / spread / np.sqrt(2), rel=1e-5)
        assert found.at(n)["vel"] == pytest.approx(3 / 1e-3, rel=1e-5)  # it never moves
    assert world_model(agent, trajectory, names, length + 1) is None


def test_grid_and_labels() -> None:
    pictures = [np.full((40, 60, 3), 50 * i, np.uint8) for i in range(1, 4)]
    whole = grid(pictures)
    assert whole.shape == (80, 120, 3)
    assert whole[0, 0, 0] == 50 and whole[0, 60, 0] == 100 and whole[40, 0, 0] == 150
    assert (whole[40:, 60:] == 0).all() and grid(pictures[:1]).shape == (40, 60, 3)
    text = labelled(pictures[0], "return 1")
    assert text.shape == (40, 60, 3) and text.max() > 200 and (pictures[0] == 50).all()


@embedded
def test_an_episode_is_cut_off_and_says_why() -> None:
    cfg = compose(["env.name=Isaac-Cartpole-v0", "env.num_envs=4", "evaluation.num_envs=1",
                   "mode=evaluate", "evaluation.policy=zero", "evaluation.max_steps=30",
                   "evaluation.episodes=8", "evaluation.video=false"])  # fmt: skip
    env = make_env(cfg, "mjlab", CPU)
    info = env.info
    agent = Agent(info.observation, info.action, cfg.model, cfg.algo)
    found = play(env, agent, cfg.evaluation, 0)
    assert len(found.returns) == 8 and found.lengths.max() <= 30
    assert (found.lengths == 30).sum() == found.endings.count("time_out") > 0
    assert set(found.endings) <= {"time_out", "cart_out_of_bounds"}


def test_an_evaluation_takes_the_curriculum_and_says_what_differs(
    toy_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    loaded: list[Any] = []
    kept = {"common_step_counter": 77}
    monkeypatch.setattr(ToyEnv, "curriculum_state", lambda self: kept)
    monkeypatch.setattr(ToyEnv, "load_curriculum_state", lambda self, state: loaded.append(state))
    assert cli.run([*toy_overrides, "evaluation.final=false"]) == 0
    run = next(o for o in toy_overrides if o.startswith("run.dir=")).split("=", 1)[1]
    path = checkpoint.find(run) / "meta.json"
    meta = json.loads(path.read_text())
    meta["task"]["step_dt"] = 0.05  # half of the toy's
    path.write_text(json.dumps(meta))
    capsys.readouterr()
    evaluated = [*toy_overrides, "mode=evaluate", f"checkpoint={run}"]
    assert cli.run([*evaluated, f"run.dir={tmp_path / 'a'}"]) == 0
    said = capsys.readouterr().out
    assert loaded == [kept] and "begins anew" not in said
    assert "trained at 50.0 ms a step, and acts at 100.0 ms here" in said
    meta["files"].pop("curriculum.pt")  # as a model file, which has none
    meta["task"]["step_dt"] = 0.1
    path.write_text(json.dumps(meta))
    assert cli.run([*evaluated, f"run.dir={tmp_path / 'b'}"]) == 0
    said = capsys.readouterr().out
    assert loaded == [kept, {}] and "begins anew" in said and "ms here" not in said


def test_what_mode_evaluate_leaves(toy_overrides: list[str], tmp_path: Path) -> None:
    assert cli.run([*toy_overrides, "evaluation.final=false"]) == 0
    out = tmp_path / "evaluation"
    run = next(o for o in toy_overrides if o.startswith("run.dir=")).split("=", 1)[1]
    assert cli.run([*toy_overrides, "mode=evaluate", f"checkpoint={run}", f"run.dir={out}"]) == 0
    summary = json.loads((out / "summary.json").read_text())["evaluation"]
    with open(out / "metrics.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == summary["episodes"] == 12
    returns = [float(r["return"]) for r in rows]
    assert np.mean(returns) == pytest.approx(summary["return_mean"])
    assert sum(summary["endings"].values()) == 12
    with open(out / "world_model.csv") as f:
        ahead = list(csv.DictReader(f))
    assert len(ahead) == 10 and set(ahead[0]) == {"steps_ahead", "position", "velocity", "clock"}
    assert float(ahead[0]["clock"]) == pytest.approx(summary["world_model"]["1_steps"]["clock"])
    page = (out / "report.html").read_text()
    assert f"{summary['return_mean']:.3f}" in page and page.count("data:image/png") >= 3
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)  # nothing is fetched
    again = [*toy_overrides, "mode=evaluate", "evaluation.policy=random", f"run.dir={out}"]
    assert cli.run(again) == 0  # what the trained policy left is not taken for this one's
    assert not (out / "world_model.csv").exists() and not (out / "plots/open_loop.png").exists()
    assert "deterministic episodes" in page
    assert "deterministic episodes" not in (out / "report.html").read_text()
