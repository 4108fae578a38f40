"""DESIGN's time table, row by row: on the toy env of known dynamics and on the embedded simulator.

obs[t], is_first[t]                          known before action[t]
action[t]                                    as executed, clipped
reward[t+1], terminated[t+1], truncated[t+1] what action[t] led to, stored with record t
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import check_that_nothing_changes_later
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded

from dreamer_isaac.collect import EpisodeStats, Setup, Sync
from dreamer_isaac.config import AlgoConfig, ConfigError, ModelConfig
from dreamer_isaac.envs import curriculum
from dreamer_isaac.envs.contract import ObservationError, SimEnv, check_specs
from dreamer_isaac.envs.toy import DT, LENGTH, LIMIT, PointEnv, ToyEnv
from dreamer_isaac.models import Agent

MODEL = ModelConfig(
    belief=8, hidden=4, categoricals=2, classes=3, blocks=2, units=4, encoder_layers=1,
    decoder_layers=1, actor_layers=1, critic_layers=1, bins=9,
)  # fmt: skip


def make_agent() -> Agent:
    return Agent(3, 1, MODEL, AlgoConfig())


def collect(env: SimEnv, steps: int, eval_envs: int = 0, bound: float = 1.0) -> Any:
    torch.manual_seed(0)
    agent = Agent(env.info.observation, env.info.action, MODEL, AlgoConfig())
    got: list[Any] = []
    generator = torch.Generator().manual_seed(3)
    collector = Sync(Setup(env, agent, got.append, generator, steps, 10**9, eval_envs))
    with collector:
        for _ in range(4):
            collector.step()
    return torch.cat(got, 1), collector, agent


def test_every_row_of_the_table_on_known_dynamics() -> None:
    records, _, _ = collect(ToyEnv(6, 0), 30)
    ends = {"terminated": 0, "truncated": 0}
    for env in records.unbind(0):
        assert bool(env["is_first"][0])
        for t in range(len(env) - 1):
            x, v, clock = env["obs"][t].tolist()
            a = env["action"][t].item()
            assert -1 <= a <= 1
            v = v + 4 * a * DT
            x = x + v * DT
            clock = clock + 1 / LENGTH
            assert env["reward"][t].item() == pytest.approx((1 - abs(x)) * DT, abs=1e-5)
            terminated = abs(x) > LIMIT
            truncated = not terminated and clock > 1 - 0.5 / LENGTH
            assert bool(env["terminated"][t]) == terminated
            assert bool(env["truncated"][t]) == truncated
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            following = env["obs"][t + 1].tolist()
            if terminated or truncated:  # the next record is the next episode's first observation
                assert bool(env["is_first"][t + 1])
                assert following[2] == 0 and -1 <= following[0] <= 1
            else:
                assert not bool(env["is_first"][t + 1])
                assert following == pytest.approx([x, v, clock], abs=1e-5)
    assert min(ends.values()) > 0  # both kinds of end were seen


def test_actions_are_clipped_to_1_and_scaled_by_the_bound() -> None:
    env = ToyEnv(2, 0, bound=0.5)
    obs = env.reset().obs
    executed, _, following = env.step(torch.tensor([[3.0], [-0.25]]))
    assert executed.flatten().tolist() == [1.0, -0.25]
    v = obs[:, 1] + 4 * 0.5 * executed[:, 0] * DT
    torch.testing.assert_close(following.obs[:, 1], v)


def test_nothing_that_is_handed_out_changes_later() -> None:
    actions = [torch.full((4, 1), 0.1 * step) for step in range(50)]
    check_that_nothing_changes_later(ToyEnv(4, 0), actions)


def test_latents_in_a_record_are_the_posterior_after_its_own_observation() -> None:
    records, _, agent = collect(ToyEnv(3, 0), 12)
    rssm = agent.rssm
    row = records[1]
    with torch.no_grad():
        for t in range(1, 40):
            state = rssm.expand(row["state"][t - 1 : t])
            raw = rssm.core(
                row["belief"][t - 1 : t], state, rssm.project_action(row["action"][t - 1 : t])
            )
            expected = rssm.initial_belief() if row["is_first"][t] else raw[0]
            torch.testing.assert_close(row["belief"][t], expected)


def test_evaluation_rows_act_deterministically_and_are_not_recorded() -> None:
    records, collector, _ = collect(ToyEnv(6, 0), 30, eval_envs=2)
    assert records.shape[0] == 4
    stats = collector.read_stats()
    assert stats["eval/episodes"] > 0 and stats["episode/episodes"] > 0
    assert collector.frames == 4 * 30 * 6


def test_episode_statistics_by_hand() -> None:
    stats = EpisodeStats(2, torch.device("cpu"))
    for t in range(1, 7):
        done = torch.tensor([t in (2, 5), t == 6])
        stats.update(torch.tensor([1.0, 10.0]), done)
    # env 0: two episodes of 2 and 3 steps; env 1: one of 6 with return 60. The last two are kept.
    assert stats.summary().tolist() == [63 / 2, 9 / 2, 3.0]


def test_episode_statistics_of_the_last_episodes_of_many() -> None:
    envs, g = 7, torch.Generator().manual_seed(0)
    stats = EpisodeStats(envs, torch.device("cpu"))
    finished: list[tuple[float, float]] = []
    running = [[0.0, 0.0] for _ in range(envs)]
    for _ in range(60):
        reward, done = torch.rand(envs, generator=g), torch.rand(envs, generator=g) < 0.15
        stats.update(reward, done)
        for i in range(envs):
            running[i][0] += reward[i].item()
            running[i][1] += 1
            if done[i]:
                finished.append((running[i][0], running[i][1]))
                running[i] = [0.0, 0.0]
        last = torch.tensor(finished[-envs:] or [(0.0, 0.0)], dtype=torch.float64).mean(0)
        torch.testing.assert_close(stats.summary()[:2], last)
        assert stats.summary()[2] == len(finished)


def test_statistics_are_read_when_an_episode_has_ended() -> None:
    collector = Sync(Setup(ToyEnv(2, 0), make_agent(), lambda _: None, torch.Generator(), 1, 0))
    assert collector.read_stats() == {}
    collector.train_stats.update(torch.tensor([4.0, 2.0]), torch.tensor([True, False]))
    assert collector.read_stats() == {
        "episode/return": 4, "episode/length": 1, "episode/episodes": 1,
    }  # fmt: skip
    assert collector.read_stats() == {}


@pytest.mark.parametrize("what", ["obs", "reward"])
def test_nan_from_the_simulator_is_an_error_and_is_not_recorded(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = ToyEnv(3, 0)
    step = env.env._step

    def poisoned(td: Any) -> Any:
        out = step(td)
        out["policy" if what == "obs" else "reward"][1] = torch.nan
        return out

    monkeypatch.setattr(env.env, "_step", poisoned)
    got: list[Any] = []
    agent = Agent(3, 1, MODEL, AlgoConfig())
    collector = Sync(Setup(env, agent, got.append, torch.Generator(), 4, 0, 0))
    with collector, pytest.raises(ObservationError, match="NaN"):
        collector.step()
    assert got == []


def test_a_simulator_without_restorable_state_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"checkpoint\.exact=false"):
        SimEnv(ToyEnv(2, 0).env, ToyEnv(2, 0).info, "policy", 1.0).state_dict()


def test_the_curriculum_is_logged_saved_and_restored(tmp_path: Path) -> None:
    """On an object with the parts of mjlab's and Isaac Lab's environments that it concerns."""

    class Adaptive:
        """A term that keeps something of its own, as Isaac Lab's DifficultyScheduler."""

        difficulty = torch.zeros(3)

        def get_state(self) -> torch.Tensor:
            return self.difficulty

        def set_state(self, state: torch.Tensor) -> None:
            self.difficulty = state.clone()

        def __call__(self, sim: Any, env_ids: torch.Tensor) -> float:
            sim.weight = 5.0 if sim.common_step_counter > 50 else 1.0
            return sim.weight

    class Sim(SimpleNamespace):
        def __init__(self, state: dict[str, Any]) -> None:
            super().__init__(
                curriculum_manager=SimpleNamespace(
                    _curriculum_state=state, active_terms=list(state), _term_names=["adr"],
                    _term_cfgs=[SimpleNamespace(func=Adaptive(), params={})], compute=None,
                ),
                device=torch.device("cpu"), common_step_counter=0,
                scene=SimpleNamespace(terrain=SimpleNamespace(
                    terrain_levels=torch.zeros(3, dtype=torch.long),
                    terrain_types=torch.tensor([1, 0, 1]), env_origins=torch.zeros(3, 3),
                    terrain_origins=torch.arange(4 * 2 * 3.0).reshape(4, 2, 3),
                )),
            )  # fmt: skip

    reported = {"terrain": {"mean": torch.tensor(1.5), "max": 3}, "weight": 0.25, "none": None}
    sim = Sim(reported)
    assert curriculum.levels(sim) == {"terrain/mean": 1.5, "terrain/max": 3.0, "weight": 0.25}
    sim.common_step_counter = 77
    sim.scene.terrain.terrain_levels[:] = torch.tensor([3, 0, 2])
    sim.curriculum_manager._term_cfgs[0].func.set_state(torch.tensor([0.1, 0.2, 0.3]))
    torch.save(curriculum.state(sim), tmp_path / "state.pt")
    other = Sim(reported)

    def promote(env_ids: Any = None) -> None:
        other.scene.terrain.terrain_levels += 1

    other.curriculum_manager.compute = promote
    curriculum.restore(other, torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.common_step_counter == 77
    assert other.weight == 5.0  # a schedule holds before any episode has ended
    kept = other.curriculum_manager._term_cfgs[0].func
    assert kept.difficulty.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert other.scene.terrain.terrain_levels.tolist() == [3, 0, 2]
    assert other.scene.terrain.env_origins[:, 0].tolist() == [21.0, 0.0, 15.0]
    other.curriculum_manager.compute(env_ids=None)  # the reset that a resumed run begins with
    assert other.scene.terrain.terrain_levels.tolist() == [3, 0, 2]
    other.curriculum_manager.compute(env_ids=None)
    assert other.scene.terrain.terrain_levels.tolist() == [4, 1, 3]
    assert curriculum.state(Sim({})) == {}
    untouched = Sim(reported)
    curriculum.restore(untouched, {})
    assert untouched.common_step_counter == 0
    silent = Sim({"of reward weights, reports nothing": None})
    assert curriculum.levels(silent) == {} and curriculum.state(silent)


def test_terms_that_cannot_be_computed_of_no_env_harm_nothing() -> None:
    class Mean:
        value: Any = torch.tensor(2.0)

        def get_state(self) -> Any:
            return self.value

        def set_state(self, state: Any) -> None:
            self.value = state

        def __call__(self, env: Any, ids: torch.Tensor, rate: float) -> None:
            self.value = (1 - rate) * self.value + rate * torch.zeros(3)[ids].mean()  # NaN

    def divides(env: Any, ids: torch.Tensor) -> float:
        return 1 / len(ids)

    def schedule(env: Any, ids: torch.Tensor) -> float:
        return 5.0 if env.common_step_counter > 50 else 1.0

    def cfg(func: Any, **params: Any) -> Any:
        return SimpleNamespace(func=func, params=params)

    terms = {"divides": cfg(divides), "mean": cfg(Mean(), rate=0.1), "weight": cfg(schedule)}
    manager = SimpleNamespace(
        _curriculum_state={}, active_terms=list(terms), _term_names=list(terms),
        _term_cfgs=list(terms.values()), compute=None,
    )  # fmt: skip
    sim = SimpleNamespace(curriculum_manager=manager, device=torch.device("cpu"),
                          common_step_counter=77, scene=SimpleNamespace(terrain=None))  # fmt: skip
    saved = curriculum.state(sim)
    assert saved == {"common_step_counter": 77, "terms": {"mean": torch.tensor(2.0)}}
    terms["mean"].func.set_state(torch.tensor(0.0))
    curriculum.restore(sim, saved)
    assert terms["mean"].func.value == 2.0 and manager._curriculum_state["weight"] == 5.0
    terms["mean"].func.set_state(np.float64(3.0))
    assert type(curriculum.state(sim)["terms"]["mean"]) is float  # or it could not be read again


def test_a_curriculum_goes_over_to_another_number_of_envs() -> None:
    levels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3])
    assert curriculum._spread(levels, 4).tolist() == [0, 1, 2, 2]
    assert curriculum._spread(levels, 16).tolist() == sorted(2 * levels.tolist())
    assert curriculum._spread(levels, 8).tolist() == levels.tolist()


class Task(SimpleNamespace):
    """What `check_specs` looks at."""


def test_tasks_that_do_not_fit_are_refused_in_words() -> None:
    vector, real = Unbounded(torch.Size([4, 3])), Unbounded(torch.Size([4, 2]))

    def complaint(group: str, observed: Any, action: Any) -> str:
        env: Any = Task(observation_spec=Composite(policy=observed), action_spec=action)
        try:
            check_specs("T", env, group)
        except ConfigError as e:
            return str(e)
        return ""

    assert complaint("policy", vector, real) == ""
    parts = Composite(joints=vector, base=vector)
    assert complaint("", parts, real) == ""  # from pixels alone
    assert "joints, base" in complaint("policy", parts, real)
    assert "group 'actor'. There: policy." in complaint("actor", vector, real)
    assert "arrays of [5, 3]" in complaint("policy", Unbounded(torch.Size([4, 5, 3])), real)
    assert "no vector of real" in complaint("policy", vector, Categorical(3, torch.Size([4])))


class Several(PointEnv):
    """Observes two tensors, as an observation group does that is not concatenated."""

    def _step(self, tensordict: Any) -> Any:
        out = super()._step(tensordict)
        parts = {"clock": out["policy"][:, 2:].clone(), "flag": torch.zeros(3, dtype=torch.bool)}
        return out.set("policy", TensorDict(parts, out.batch_size))

    def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
        out = super()._reset(tensordict, **kwargs)
        return out.set("policy", TensorDict({"clock": out["policy"][:, 2:]}, out.batch_size))


def test_what_is_not_seen_may_be_several_tensors() -> None:
    env = ToyEnv(3, 0)
    env.env = Several(3)
    env.info.observation = 0
    env.reset()
    env.step(torch.zeros(3, 1))
    env.check_finite()
    env.env.obs[2, 2] = torch.nan
    env.step(torch.zeros(3, 1))
    with pytest.raises(ObservationError):
        env.check_finite()


def test_a_finite_horizon_ends_in_a_terminal_state() -> None:
    """As mjlab and Isaac Lab mean `is_finite_horizon`: nothing comes after the time limit."""
    for finite in (False, True):
        env: SimEnv = ToyEnv(5, 0)
        env.sim = SimpleNamespace(cfg=SimpleNamespace(is_finite_horizon=finite))
        SimEnv.__init__(env, env.env, env.info, "policy", 1.0)
        env.reset()
        ends = torch.zeros(2)
        for _ in range(45):
            _, outcome, _ = env.step(torch.zeros(5, 1))
            ends += torch.stack([outcome.terminated.sum(), outcome.truncated.sum()])
        assert (ends[1] > 0) != finite and ends.sum() >= 5


def test_nan_that_only_the_simulator_sees_ends_a_run_from_pixels() -> None:
    env = ToyEnv(3, 0)
    env.info.observation = 0  # as with env.pixels_only
    env.reset()
    env.step(torch.zeros(3, 1))
    env.check_finite()
    env.env.obs[1, 2] = torch.nan  # the clock, which no reward depends on
    env.step(torch.zeros(3, 1))
    with pytest.raises(ObservationError):
        env.check_finite()


def test_observations_and_actions_are_matched_by_name() -> None:
    """Isaac Lab's engines order the ant's joints differently; the rest is the same."""
    plain, bound = ToyEnv(5, 3), ToyEnv(5, 3)
    bound.bind(["clock", "position", "velocity"], ["push"])
    places = [2, 0, 1]
    assert torch.equal(bound.reset().obs, plain.reset().obs[:, places])
    for t in range(50):
        action = torch.full((5, 1), (-1.0) ** (t // 3))
        executed, outcome, seen = bound.step(action)
        _, expected, original = plain.step(action)
        assert torch.equal(seen.obs, original.obs[:, places])
        assert torch.equal(outcome.reward, expected.reward) and torch.equal(executed, action)
    with pytest.raises(ValueError, match="other names: clock, time"):
        ToyEnv(2, 0).bind(["time", "position", "velocity"], ["push"])


def test_actions_reach_the_joints_that_they_are_named_after() -> None:
    class Two(ToyEnv):
        """Two actions, of which the second pushes."""

        def __init__(self) -> None:
            super().__init__(3, 0)
            self.info.action, self.info.action_names = 2, ["idle", "push"]
            inner = self.env._step
            self.env._step = lambda td: inner(td.set("action", td["action"][:, 1:]))  # type: ignore
            self.env.action_spec = type(self.env.action_spec)(-9, 9, torch.Size([3, 2]))

    one, other = Two(), Two()
    other.bind(one.info.observation_names, ["push", "idle"])
    one.reset(), other.reset()
    _, _, first = one.step(torch.tensor([[0.0, 0.7]] * 3))
    executed, _, second = other.step(torch.tensor([[0.7, 0.0]] * 3))
    assert torch.equal(first.obs, second.obs)
    assert executed[0].tolist() == pytest.approx([0.7, 0.0])  # in the order that was asked for
