"""The threaded collector: nothing lost, torn or doubled; weights whole; errors and stops arrive."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch

from dreamer_isaac.collect import CollectorError, Mailbox, Setup, Sync, Thread
from dreamer_isaac.config import AlgoConfig, ModelConfig, ReplayConfig
from dreamer_isaac.envs.toy import LENGTH, ToyEnv
from dreamer_isaac.models import Agent
from dreamer_isaac.optim import flatten
from dreamer_isaac.replay import Replay
from dreamer_isaac.train import Limiter

MODEL = ModelConfig(
    belief=8, hidden=4, categoricals=2, classes=3, blocks=2, units=4, encoder_layers=1,
    decoder_layers=1, actor_layers=1, critic_layers=1, bins=9,
)  # fmt: skip
ENVS, STEPS = 6, 5


def make(sink: Any, env: Any = None, total: int = 10**9, eval_envs: int = 0, depth: int = 4) -> Any:
    torch.manual_seed(0)
    env = env or ToyEnv(ENVS, 0)
    agent = Agent(3, 1, MODEL, AlgoConfig())
    flat = flatten(agent.parameters())
    generator = torch.Generator().manual_seed(3)
    setup = Setup(env, agent, sink, generator, STEPS, 0, eval_envs)
    return Thread(setup, flat, torch.device("cpu"), total, depth), flat


class CountingEnv(ToyEnv):
    """Every observation names its env and step, the reward repeats it, and steps take as long as
    they like."""

    def __init__(self, envs: int):
        super().__init__(envs, 0)
        self.count = 0
        self.random = random.Random(0)

    def _mark(self, obs: torch.Tensor) -> torch.Tensor:
        obs[:, 0] = torch.arange(len(obs))
        obs[:, 1] = self.count
        return obs

    def reset(self) -> Any:
        first = super().reset()
        self._mark(first.obs)
        return first

    def step(self, action: torch.Tensor) -> Any:
        if self.random.random() < 0.2:
            time.sleep(self.random.random() * 0.004)
        action, outcome, following = super().step(action)
        outcome.reward.copy_(torch.arange(len(action)) * 1e6 + self.count)
        self.count += 1
        self._mark(following.obs)
        return action, outcome, following


def test_no_record_is_lost_doubled_torn_or_seen_too_early() -> None:
    """Random sleeps on both sides; what arrives, in replay too, is the sequence that happened."""
    total = 300 * STEPS * ENVS
    buffer = Replay(
        ReplayConfig(size=400 * STEPS * ENVS, batch_size=64, batch_length=8), ENVS, 3, 1, MODEL,
        torch.device("cpu"), torch.Generator().manual_seed(0),
    )  # fmt: skip
    collector, flat = make(buffer.extend, CountingEnv(ENVS), total)
    rng = random.Random(1)
    frames = samples = 0
    with collector:
        while frames < total:
            frames += collector.step()
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.01)
            with torch.no_grad():
                flat.mul_(0.999)
            collector.publish(frames)
            if buffer.ready:
                batch = buffer.sample()
                samples += 1
                steps = batch["obs"][..., 1]
                assert (steps.diff(dim=1) == 1).all()
                assert steps.max() < frames / ENVS
                assert (batch["reward"] == batch["obs"][..., 0] * 1e6 + steps).all()
    assert frames == total and collector.frames == total and samples > 50
    data = buffer.state_dict()["data"]
    expected = torch.arange(total // ENVS, dtype=torch.float32)
    for env in range(ENVS):
        assert torch.equal(data["obs"][:, env, 1], expected)
        assert (data["obs"][:, env, 0] == env).all()
    # Versions only rise, and the weights that acted were really exchanged.
    versions = data["version"][:, 0]
    assert (versions.diff() >= 0).all() and len(versions.unique()) > 20


def test_a_stress_test_would_notice_a_shared_buffer() -> None:
    """The test above can fail: hand the simulator's own tensors on, and rows repeat."""

    class Leaky(CountingEnv):
        def __init__(self, envs: int):
            super().__init__(envs)
            self.shared = torch.zeros(envs, 3)

        def _mark(self, obs: torch.Tensor) -> torch.Tensor:
            super()._mark(obs)
            self.shared.copy_(obs)
            obs.set_(self.shared)  # type: ignore[call-overload]
            return obs

    got: list[Any] = []
    collector, _ = make(got.append, Leaky(ENVS), 4 * STEPS * ENVS)
    with collector:
        while sum(b.numel() for b in got) < 4 * STEPS * ENVS:
            collector.step()
    steps = torch.cat(got, 1)["obs"][0, :, 1]
    assert not torch.equal(steps, torch.arange(4.0 * STEPS))


def test_thread_equals_sync_with_unchanged_weights() -> None:
    got: list[Any] = []
    collector, _ = make(got.append, total=6 * STEPS * ENVS, eval_envs=2)
    with collector:
        while collector.frames < collector.total or collector.pending:
            collector.step()
        stats = collector.read_stats()
    expected: list[Any] = []
    torch.manual_seed(0)
    setup = Setup(ToyEnv(ENVS, 0), Agent(3, 1, MODEL, AlgoConfig()), expected.append,
                  torch.Generator().manual_seed(3), STEPS, 0, 2)  # fmt: skip
    other = Sync(setup)
    with other:
        for _ in range(6):
            other.step()
    a, b = torch.cat(got, 1), torch.cat(expected, 1)
    for name in ("obs", "action", "reward", "is_first", "belief", "state"):
        assert torch.equal(a[name], b[name]), name
    assert {k: v for k, v in stats.items() if "time" not in k} == other.read_stats()


def test_an_exception_arrives_with_its_cause_within_a_second() -> None:
    class Broken(ToyEnv):
        def step(self, action: torch.Tensor) -> Any:
            raise ValueError("the simulator is on fire")

    collector, _ = make(lambda _: None, Broken(ENVS, 0))
    begin = time.monotonic()
    with pytest.raises(CollectorError, match="on fire") as e, collector:
        while time.monotonic() - begin < 10:
            collector.step()
    assert time.monotonic() - begin < 1
    assert isinstance(e.value.__cause__, ValueError) and e.value.__cause__.__traceback__


class Slow(ToyEnv):
    """Its steps take `seconds`; the one numbered `last` fails."""

    seconds, last, count = 0.0, 10**9, 0

    def step(self, action: torch.Tensor) -> Any:
        time.sleep(self.seconds)
        self.count += 1
        if self.count == self.last:
            raise ValueError("the simulator is on fire")
        return super().step(action)


def test_what_arrived_before_an_exception_is_counted() -> None:
    got: list[Any] = []
    env = Slow(ENVS, 0)
    env.last = 3 * STEPS + 2
    collector, _ = make(got.append, env)
    with collector:
        while collector._error is None:
            time.sleep(0.01)
        assert collector.step() == 3 * STEPS * ENVS and len(got) == 3
        with pytest.raises(CollectorError, match="on fire"):
            collector.step()


def test_every_wait_of_the_learner_is_counted() -> None:
    env = Slow(ENVS, 0)
    env.seconds = 0.35 / STEPS
    collector, _ = make(lambda _: None, env)
    with collector:
        begin = time.monotonic()
        while time.monotonic() - begin < 1.2:
            collector.step()
        spent = time.monotonic() - begin
    assert collector.waited["learner"] == pytest.approx(spent, rel=0.15)


def test_the_thread_ends_between_two_steps_or_says_that_it_does_not() -> None:
    env = Slow(ENVS, 0)
    env.seconds = 0.3
    collector, _ = make(lambda _: None, env)
    collector.start()
    time.sleep(0.1)
    begin = time.monotonic()
    collector.stop()
    assert time.monotonic() - begin < 0.6  # a batch takes 1.5
    assert env.count == 1 and collector.frames == 0 and collector._error is None
    env.seconds = 0.8
    collector, _ = make(lambda _: None, env)
    collector.PATIENCE = 0.2
    with pytest.raises(CollectorError, match="in one env step"), collector:
        time.sleep(0.1)
    time.sleep(1)


def test_a_full_queue_stops_the_collector_and_leaving_ends_the_thread() -> None:
    collector, _ = make(lambda _: None, depth=2)
    with collector:
        deadline = time.monotonic() + 5
        while not collector.queue.full() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        held = collector.frames
        assert held == 3 * STEPS * ENVS  # two wait, one is held
        time.sleep(0.2)
        assert collector.frames == held
        begin = time.monotonic()
    assert time.monotonic() - begin < 1
    assert not [t for t in threading.enumerate() if t.name == "collector"]
    assert collector.waited["collector"] > 0.3


def test_the_collector_goes_no_further_than_it_is_allowed() -> None:
    collector, _ = make(lambda _: None)
    collector.allow(4 * STEPS * ENVS)
    with collector:
        begin = time.monotonic()
        while time.monotonic() - begin < 0.5:
            collector.step()
        assert collector.frames == 4 * STEPS * ENVS
        collector.allow(6 * STEPS * ENVS)
        while time.monotonic() - begin < 1.0:
            collector.step()
        assert collector.frames == 6 * STEPS * ENVS


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_the_limiter_bounds_the_ratio_on_both_sides_and_never_locks(floor: float) -> None:
    """A fast collector against a learner of any speed, on a clock of its own."""
    rng = random.Random(2)
    limiter = Limiter(ratio=8, batch=64, start=100, floor=floor, share=0.75, slack=80)
    delivered = ahead = 0
    limit, trained, moved = float("inf"), 0, 0
    for _ in range(20_000):
        if ahead < limit:
            ahead += 20
        if rng.random() < 0.5 and ahead > delivered:
            limiter.collected(ahead, int((ahead - delivered) * 0.75))
            delivered = ahead
        for _ in limiter.due(True):
            trained += 64
            if rng.random() < 0.9:  # a slow learner: something arrived meanwhile
                break
        limit = limiter.allowance(delivered)
        moved = max(moved, delivered)
    stored = (delivered - 100) * 0.75
    assert trained <= 8 * stored + 64
    assert delivered > 5000 and trained > 5000
    if floor:
        assert trained >= floor * 8 * stored - 8 * 400


def test_weights_are_taken_whole() -> None:
    source, target = torch.zeros(200_000), torch.zeros(200_000)
    box = Mailbox(source, target)
    done = threading.Event()

    def write() -> None:
        for i in range(1, 400):
            source.fill_(i)
            box.put(i)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while not done.is_set() or box.version is not None:
        version = box.take()
        if version is not None:
            assert (target == version).all()
            seen.append(version)
    thread.join()
    assert seen == sorted(seen) and seen[-1] == 399 and box.take() is None


def test_the_observation_of_a_reset_is_never_an_ordinary_one() -> None:
    got: list[Any] = []
    collector, _ = make(got.append, total=20 * STEPS * ENVS)
    with collector:
        while sum(b.numel() for b in got) < 20 * STEPS * ENVS:
            collector.step()
    records = torch.cat(got, 1)
    ended = (records["terminated"] | records["truncated"])[:, :-1]
    assert torch.equal(records["is_first"][:, 1:], ended) and ended.any()
    assert (records["obs"][..., 2] < 1 + 1 / LENGTH).all()
