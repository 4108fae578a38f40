"""Collection: the acting policy steps the simulator and hands records to a sink.

`Sync` steps in the caller's thread. `Thread` steps in a background thread without pause, with its
own copy of the networks, on its own device if it has one; what it collects waits in a bounded queue
until the learner's thread calls `step`, and new weights wait in a one-slot mailbox until the
collector is between two env steps. Both have `start`, `step`, `publish`, `stop`.

The first `eval_envs` rows act deterministically all the time; they are in the frame count, in
the evaluation curve, and nowhere else.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from dreamer_isaac.compiling import wait_for_compiler
from dreamer_isaac.envs.contract import Observation, SimEnv
from dreamer_isaac.models import Agent, Carry
from dreamer_isaac.optim import flatten, set_generator
from dreamer_isaac.profiling import Phases

Sink = Callable[[TensorDict], None]
"""Receives records [training envs, steps]."""


class CollectorError(RuntimeError):
    """The collector's thread died, the cause is chained; or it cannot be stopped."""


class _Stopped(Exception):
    """The collector's thread is to end, between two env steps."""


class EpisodeStats:
    """Mean return and length of the last N finished episodes of N envs, kept on the device.

    Means over the episodes that happen to end between two log points would jump: envs that start
    together end together, and in between only those that fail early.
    """

    def __init__(self, envs: int, device: torch.device):
        self.running = torch.zeros(2, envs, dtype=torch.float64, device=device)
        """Return and length of the running episode of every env."""
        self.last = torch.zeros(2, envs + 1, dtype=torch.float64, device=device)
        """Return and length of the last N finished episodes, a ring, and a column for nothing."""
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        """Finished episodes so far."""

    def update(self, reward: Tensor, done: Tensor) -> None:
        """Add one step: reward [N], done [N]."""
        envs = self.running.shape[1]
        self.running[0] += reward
        self.running[1] += 1
        place = (self.count + done.cumsum(0) - 1) % max(envs, 1)
        place = torch.where(done, place, envs)
        self.last.scatter_(1, place.expand(2, -1), self.running)
        self.count += done.sum()
        self.running.masked_fill_(done, 0.0)

    def summary(self) -> Tensor:
        """[3]: mean return, mean length, and the number of episodes so far."""
        envs = self.running.shape[1]
        known = torch.arange(envs + 1, device=self.count.device) < self.count.clamp_max(envs)
        means = (self.last * known).sum(1) / self.count.clamp(1, max(envs, 1))
        return torch.cat([means, self.count.double().unsqueeze(0)])

    def state_dict(self) -> dict[str, Tensor]:
        return {k: getattr(self, k).clone() for k in ("running", "last", "count")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, saved in state.items():
            getattr(self, name).copy_(saved)


class Policy:
    """Acts for N envs, one observation after the other, and remembers what acting needs.

    Args:
        agent: the acting networks, on the simulator's device.
        generator: its noise.
        deterministic: [N] bool: these rows take the policy's mean.
        exploration: standard deviation of noise added to the other rows' actions.
        capture: replay one step as a CUDA graph. wrap: what is done to the networks' step first,
            e.g. `torch.compile`.
    """

    def __init__(
        self,
        agent: Agent,
        generator: torch.Generator,
        deterministic: Tensor,
        exploration: float = 0.0,
        capture: bool = False,
        wrap: Callable[[Any], Any] = lambda f: f,
    ):
        self.agent, self.generator = agent, generator
        self.deterministic, self.exploration, self.capture = deterministic, exploration, capture
        self.carry = agent.initial_carry(len(deterministic))
        """Belief, state and executed action of the last step, changed in place."""
        self.random = torch.zeros((), dtype=torch.bool, device=deterministic.device)
        """Whether the other rows act uniformly at random."""
        self._networks = wrap(agent.act)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Observation | None = None

    @torch.no_grad()
    def __call__(self, observation: Observation) -> Carry:
        """Belief, state and action after `observation`; tensors of the caller's own."""
        if not self.capture:
            self._act(observation)
        else:
            if self._graph is None:
                self.prepare(observation)
            assert self._inputs is not None and self._graph is not None
            self._inputs.copy_(observation)
            self._graph.replay()
        return Carry(*(t.clone() for t in self.carry))

    def _act(self, observation: Observation) -> None:
        envs, device = len(self.deterministic), self.deterministic.device
        options: dict[str, Any] = {"generator": self.generator, "device": device}
        noise = self.agent.draw_noise((envs,), self.generator)
        normal = torch.randn(envs, self.agent.action, **options)
        draw = 2 * torch.rand(envs, self.agent.action, **options) - 1
        belief, state, action = self._networks(
            observation.obs, observation.is_first, self.carry, noise, normal, self.deterministic,
            observation.pixels,
        )  # fmt: skip
        if self.exploration:
            extra = self.exploration * torch.randn(envs, self.agent.action, **options)
            action = torch.where(self.deterministic.unsqueeze(-1), action, action + extra)
        at_random = (self.random & ~self.deterministic).unsqueeze(-1)
        action = torch.where(at_random, draw, action).clamp(-1, 1)
        for mine, new in zip(self.carry, (belief, state, action), strict=True):
            mine.copy_(new)

    @torch.no_grad()
    def prepare(self, observation: Observation) -> None:
        """Compile and capture, with an example; leaves no trace in what the policy remembers."""
        wait_for_compiler()
        self._inputs = observation.clone()
        before, noise = [t.clone() for t in self.carry], self.generator.get_state()
        device = self.deterministic.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._act(self._inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self.generator)
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._act(self._inputs)
        for mine, old in zip(self.carry, before, strict=True):
            mine.copy_(old)
        self.generator.set_state(noise)


@dataclass
class Setup:
    """What a collector is made of.

    Args:
        env: the simulator. agent: the learner's networks. sink: receives the records.
        generator: the policy's noise, on the env's device. steps: env steps per batch.
        random_frames: frames with uniform actions at first. eval_envs: deterministic rows.
        exploration, capture, wrap: see `Policy`.
    """

    env: SimEnv
    agent: Agent
    sink: Sink
    generator: torch.Generator
    steps: int
    random_frames: int
    eval_envs: int = 0
    exploration: float = 0.0
    capture: bool = False
    wrap: Callable[[Any], Any] = lambda f: f


class Collector:
    """What both collectors share: one env step, and the state between two."""

    def __init__(self, setup: Setup, agent: Agent):
        self.env, self.sink = setup.env, setup.sink
        self.steps, self.random_frames = setup.steps, setup.random_frames
        self.eval_envs, envs = setup.eval_envs, setup.env.info.num_envs
        self.train_envs = envs - setup.eval_envs
        self.frames = 0
        """Frames collected so far, handed over or not."""
        self.version = 0
        device = setup.env.device
        self.train_stats = EpisodeStats(self.train_envs, device)
        self.eval_stats = EpisodeStats(self.eval_envs, device)
        self.policy = Policy(
            agent, setup.generator,
            torch.arange(envs, device=device) < setup.eval_envs, setup.exploration, setup.capture,
            setup.wrap,
        )  # fmt: skip
        self.observation: Observation | None = None
        self._read = torch.zeros(2, dtype=torch.float64)
        self.phases = Phases(device, enabled=False)
        """What times the phases of an env step."""

    def __enter__(self) -> Collector:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Reset the simulator, unless a checkpoint has restored it."""
        if self.observation is None:
            self.observation = self.env.reset()

    def stop(self) -> None:
        """End what runs in the background."""

    def step(self, wait: bool = True) -> int:
        """Hand records to the sink; returns the frames that they come from."""
        raise NotImplementedError

    def publish(self, version: int) -> bool:
        """Offer the learner's weights as they are now; False where the last ones have not been
        taken yet."""
        raise NotImplementedError

    @property
    def pending(self) -> bool:
        """Whether `step` would hand something over without waiting."""
        return False

    def allow(self, frames: float) -> None:
        """Collect no further than this frame until told otherwise."""

    def collect(self) -> TensorDict:
        """`steps` env steps: records [training envs, steps] on the simulator's device.

        Raises:
            ObservationError: when the simulator returned NaN; nothing of this batch is kept.
        """
        records = [self._one() for _ in range(self.steps)]
        self.env.check_finite()
        self.phases.add(self.phases.take())
        batch: Any = TensorDict.stack(records, 1)
        self.frames += self.steps * self.env.info.num_envs
        return batch

    def _one(self) -> TensorDict:
        """One env step; the record of the training rows."""
        assert self.observation is not None, "start() comes first"
        obs, is_first, pixels = self.observation
        self.policy.random.fill_(self.frames < self.random_frames)
        with self.phases("policy step"):
            belief, state, action = self.policy(self.observation)
        with self.phases("env step"):
            action, outcome, self.observation = self.env.step(action)
        rows = slice(self.eval_envs, None)
        self.train_stats.update(outcome.reward[rows], outcome.done[rows])
        if self.eval_envs:
            head = slice(0, self.eval_envs)
            self.eval_stats.update(outcome.reward[head], outcome.done[head])
        envs = len(obs)
        record = TensorDict(
            obs=obs, is_first=is_first, action=action, reward=outcome.reward,
            terminated=outcome.terminated, truncated=outcome.truncated, belief=belief,
            state=self.policy.agent.rssm.compress(state),
            version=torch.full((envs,), self.version, dtype=torch.int32, device=obs.device),
            batch_size=[envs],
        )  # fmt: skip
        if pixels is not None:
            record["pixels"] = pixels
        return record[rows]

    def totals(self) -> Tensor:
        """[2, 3]: `EpisodeStats.summary` of the training and of the evaluation rows."""
        return torch.stack([self.train_stats.summary(), self.eval_stats.summary()])

    def read_stats(self) -> dict[str, float]:
        """`episode/*` (training rows) and `eval/*`: mean return and length of the last N finished
        episodes, and how many have finished since the last call; nothing where none has."""
        totals = self._latest_totals().cpu()
        new, self._read = totals[:, 2] - self._read, totals[:, 2].clone()
        out = {}
        for label, row, count in zip(
            ("episode", "eval"), totals.tolist(), new.tolist(), strict=True
        ):
            if count:
                out |= {f"{label}/return": row[0], f"{label}/length": row[1],
                        f"{label}/episodes": count}  # fmt: skip
        return out

    def _latest_totals(self) -> Tensor:
        return self.totals()

    def state_dict(self, exact: bool) -> dict[str, Any]:
        """The frame count; with `exact`, everything that decides what comes next."""
        state: dict[str, Any] = {"frames": self.frames}
        if exact:
            assert self.observation is not None
            state |= {
                "env": self.env.state_dict(),
                "carry": [t.clone() for t in self.policy.carry],
                **{k: v.clone() for k, v in self.observation._asdict().items() if v is not None},
                "generator": self.policy.generator.get_state(),
                "train_stats": self.train_stats.state_dict(),
                "eval_stats": self.eval_stats.state_dict(),
                "read": self._read.clone(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; without the exact part the simulator starts new episodes."""
        self.frames = state["frames"]
        if "env" not in state:
            return
        self.env.load_state_dict(state["env"])
        for mine, saved in zip(self.policy.carry, state["carry"], strict=True):
            mine.copy_(saved)
        self.observation = Observation(state["obs"], state["is_first"], state.get("pixels"))
        set_generator(self.policy.generator, state["generator"])
        self.train_stats.load_state_dict(state["train_stats"])
        self.eval_stats.load_state_dict(state["eval_stats"])
        self._read = state["read"].cpu()


class Sync(Collector):
    """Collects in the caller's thread; on one device the learner's own networks act."""

    def __init__(self, setup: Setup):
        super().__init__(setup, setup.agent)

    def step(self, wait: bool = True) -> int:
        before = self.frames
        self.sink(self.collect())
        return self.frames - before

    def publish(self, version: int) -> bool:
        self.version = version
        return True


@dataclass
class _Parcel:
    """A batch on its way to the learner."""

    batch: TensorDict
    frames: int
    totals: Tensor
    ready: torch.cuda.Event | None
    """Recorded when the copy to the learner's device is complete."""


class Mailbox:
    """One slot for weights; they are taken whole, between two env steps.

    Args:
        source: the learner's flat weights. target: the acting networks', on their device.

    Both sides only enqueue work and never wait. On GPUs the learner's stream makes a snapshot and
    streams of their own carry it to the slot on the acting device. It counts as there when it has
    arrived: were it taken before, the simulator's stream would stand still until the learner's has
    come to the snapshot, behind the updates that are queued there.
    """

    def __init__(self, source: Tensor, target: Tensor):
        self.source, self.target = source, target
        self.slot = target.detach().clone()
        self.lock = threading.Lock()
        self.version: int | None = None
        self.on_gpu = target.device.type == "cuda"
        if self.on_gpu:
            self.snapshot = source.detach().clone()
            self.send, self.receive = (torch.cuda.Stream(t.device) for t in (source, target))
            self.arrived, self.taken = torch.cuda.Event(), torch.cuda.Event()

    def put(self, version: int) -> bool:
        """Called by the learner's thread. On a GPU a full slot stays as it is; returns whether
        these weights are in it. On a CPU the newest win."""
        with self.lock:
            if not self.on_gpu:
                self.slot.copy_(self.source)
            elif self.version is not None:
                return False
            else:
                here = torch.cuda.current_stream(self.source.device)
                self.snapshot.copy_(self.source)
                self.send.wait_stream(here)
                self.send.wait_event(self.taken)  # the slot before has been read
                # A copy between GPUs waits for the current streams of both: neither may be one
                # on which the learner or the simulator has work.
                with torch.cuda.stream(self.receive), torch.cuda.stream(self.send):
                    self.slot.copy_(self.snapshot, non_blocking=True)
                self.arrived.record(self.send)
            self.version = version
            return True

    def take(self) -> int | None:
        """Called by the collector's thread: load new weights; returns their version, or None."""
        if self.version is None or (self.on_gpu and not self.arrived.query()):
            return None
        with self.lock:
            if self.on_gpu:
                self.target.copy_(self.slot)
                self.taken.record(torch.cuda.current_stream(self.target.device))
            else:
                self.target.copy_(self.slot)
            version, self.version = self.version, None
        return version


class Thread(Collector):
    """Collects in a background thread.

    Args:
        weights: the learner's flat weights (`Learner.flat`). device: the learner's.
        depth: batches that may wait for the learner. total: frames after which the thread ends.

    Every wait of either side is counted: `waited`.
    """

    PATIENCE = 30.0
    """Seconds that an env step may take when the thread is to end."""

    def __init__(
        self, setup: Setup, weights: Tensor, device: torch.device, total: int, depth: int = 4
    ):
        agent = copy.deepcopy(setup.agent).to(setup.env.device)
        flat = flatten(agent.parameters())
        super().__init__(setup, agent)
        self.mailbox = Mailbox(weights, flat)
        self.device, self.total = device, total
        self.queue: queue.Queue[_Parcel | None] = queue.Queue(depth)
        self.waited = {"learner": 0.0, "collector": 0.0}
        """Seconds, since the start."""
        self._limit = float("inf")
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._delivered = torch.zeros(2, 3, dtype=torch.float64)
        self._seen = dict(self.waited)

    # -- the learner's thread ------------------------------------------------------------------

    def start(self) -> None:
        super().start()
        self.mailbox.put(self.version)
        if self.policy.capture:
            assert self.observation is not None
            self.policy.prepare(self.observation)  # compiling in two threads at once is not safe
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits for its current env step. What it has collected of a batch is
        dropped.

        Raises:
            CollectorError: the step does not end.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self.PATIENCE)
            if self._thread.is_alive():
                raise CollectorError(
                    f"the collector's thread has been in one env step for {self.PATIENCE:.0f} s"
                )
            self._thread = None

    @property
    def pending(self) -> bool:
        return not self.queue.empty()

    def allow(self, frames: float) -> None:
        self._limit = frames

    def step(self, wait: bool = True) -> int:
        """Hand over everything that has arrived; with `wait`, at least one batch, unless the thread
        has ended or a tenth of a second has passed (signals are looked at then).

        Raises:
            CollectorError: the thread has died of an exception.
        """
        frames = 0
        begin = time.monotonic()
        while True:
            try:
                parcel = self.queue.get(timeout=0.1) if wait and not frames else (
                    self.queue.get_nowait()
                )  # fmt: skip
            except queue.Empty:
                if wait and not frames:
                    self.waited["learner"] += time.monotonic() - begin
                break
            if parcel is None:
                break
            if wait and not frames:
                self.waited["learner"] += time.monotonic() - begin
            frames += self._deliver(parcel)
        if self._error is not None and not frames:  # what has arrived is counted first
            raise CollectorError(
                f"the collector's thread died of {type(self._error).__name__}: {self._error}"
            ) from self._error
        return frames

    def _deliver(self, parcel: _Parcel) -> int:
        if parcel.ready is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(parcel.ready)
            for tensor in (*parcel.batch.values(), parcel.totals):
                tensor.record_stream(here)
        self.sink(parcel.batch)
        self._delivered = parcel.totals
        return parcel.frames

    def publish(self, version: int) -> bool:
        return self.mailbox.put(version)

    def _latest_totals(self) -> Tensor:
        return self._delivered

    def read_stats(self) -> dict[str, float]:
        out = super().read_stats()
        for side, seconds in self.waited.items():
            out[f"time/{side}_waited"] = seconds - self._seen[side]
            self._seen[side] = seconds
        return out

    # -- the collector's thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._on_device():
                while not self._stop.is_set() and self.frames < self.total:
                    begin = time.monotonic()
                    while self.frames >= self._limit and not self._stop.is_set():
                        time.sleep(0.001)
                    self.waited["collector"] += time.monotonic() - begin
                    before = self.frames
                    self._hand_over(self.collect(), self.frames - before)
        except _Stopped:
            pass
        except BaseException as e:
            self._error = e
            self._stop.set()
        finally:
            with suppress(queue.Full):
                self.queue.put_nowait(None)  # wakes a waiting learner

    def _one(self) -> TensorDict:
        if self._stop.is_set():
            raise _Stopped
        version = self.mailbox.take()
        if version is not None:
            self.version = version
        return super()._one()

    def _on_device(self) -> AbstractContextManager[Any]:
        device = self.env.device
        if device.type != "cuda":
            return nullcontext()
        self._copy = torch.cuda.Stream(device)
        self._arrive = torch.cuda.Stream(self.device)
        return torch.cuda.device(device)

    def _hand_over(self, batch: TensorDict, frames: int) -> None:
        totals, ready = self.totals(), None
        if self.env.device.type == "cuda":
            # On streams of their own on both devices, so that neither the simulator waits for the
            # learner's queue nor the learner for the simulator's.
            self._copy.wait_stream(torch.cuda.current_stream(self.env.device))
            sent: list[Any] = [*batch.values(), totals]
            for tensor in sent:
                tensor.record_stream(self._copy)
            with torch.cuda.stream(self._arrive), torch.cuda.stream(self._copy):
                batch = batch.to(self.device, non_blocking=True)
                totals = totals.to(self.device, non_blocking=True)
            ready = torch.cuda.Event()
            # On one device nothing was copied: it is ready when made.
            ready.record(self._copy if self.device == self.env.device else self._arrive)
        begin = time.monotonic()
        parcel = _Parcel(batch, frames, totals, ready)
        while not self._stop.is_set():
            try:
                self.queue.put(parcel, timeout=0.05)
                break
            except queue.Full:
                continue
        self.waited["collector"] += time.monotonic() - begin
