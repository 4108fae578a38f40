"""Training: the parts, then the loop."""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tensordict import TensorDictBase

from dreamer_isaac import checkpoint, cli
from dreamer_isaac.checkpoint import Checkpoints
from dreamer_isaac.collect import Collector, CollectorError, Setup, Sync, Thread
from dreamer_isaac.compiling import as_it_is, compile_function, hand_over, start_compiler
from dreamer_isaac.config import Config, ConfigError, build, to_dict
from dreamer_isaac.envs.contract import ObservationError
from dreamer_isaac.learner import NonFiniteError
from dreamer_isaac.learner_v1 import learner_class
from dreamer_isaac.logger import Console, Logger, duration
from dreamer_isaac.main import (
    devices,
    make_agent,
    report,
    seed_everything,
    start_simulator,
    versions,
    write_json,
)
from dreamer_isaac.models import Agent
from dreamer_isaac.profiling import Phases, Profiler
from dreamer_isaac.replay import Replay


class Limiter:
    """Keeps the replay ratio, trained steps per stored step, within bounds.

    Args:
        ratio: the learner owes this many trained steps for every stored one, and makes no more.
        batch: trained steps of one update. start: frames before which nothing is trained.
        floor: a collector that runs by itself may get ahead until what was trained is this part of
            what `ratio` asks for; 0 sets no limit. What is still owed beyond that when the last
            frame is there is not made up: the learning rate has come to its end by then.
        share: stored steps per frame. slack: frames that it may be ahead in any case.
    """

    def __init__(
        self, ratio: float, batch: int, start: int, floor: float = 0.0, share: float = 1.0,
        slack: int = 0,
    ):  # fmt: skip
        self.ratio, self.batch, self.start = ratio, batch, start
        self.floor, self.share = floor, share
        self.slack = slack + batch / ratio / share  # or both sides could wait for one update
        self.credit = 0.0
        """Trained steps that are owed."""
        self.paid = 0.0

    def collected(self, frames: int, stored: int) -> None:
        """Note `stored` new records; `frames` is the count so far."""
        if frames > self.start:
            self.credit += stored * self.ratio

    def owes(self, ready: bool) -> bool:
        """Whether an update is due."""
        return ready and self.credit >= self.batch

    def behind(self) -> bool:
        """Whether less than `floor` asks for has been trained."""
        return self.paid < self.floor * (self.paid + self.credit)

    def due(self, ready: bool) -> Iterator[None]:
        """One turn for every update that may be made now; it is paid for when it is taken. What is
        owed while the buffer is still too empty to sample from (a resumed run refills it) is
        dropped, not caught up on later."""
        if not ready:
            self.credit = 0.0
        while self.credit >= self.batch:
            self.credit -= self.batch
            self.paid += self.batch
            yield

    def allowance(self, frames: int) -> float:
        """The frame that the collector may reach, when `frames` have been handed over."""
        if not self.floor:
            return float("inf")
        ahead = self.paid * (1 / self.floor - 1) - self.credit
        return frames + ahead / self.ratio / self.share + self.slack


class StopSignal:
    """Remembers SIGINT and SIGTERM, so that the loop can end in order; another one after
    `PATIENCE` seconds ends the program at once."""

    PATIENCE = 3.0
    """`timeout`, schedulers and terminals signal a program and then its process group: what comes
    so soon is the same request."""

    def __init__(self) -> None:
        self.number = 0
        self.since = 0.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        def handle(number: int, _: FrameType | None) -> None:
            if self.number and time.monotonic() - self.since > self.PATIENCE:
                raise KeyboardInterrupt
            if not self.number:
                self.number, self.since = number, time.monotonic()

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, old in before.items():
                signal.signal(s, old)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process: two that train in one would mix their checkpoints.

    Raises:
        ConfigError: another process trains there.
    """
    with open(folder / ".lock", "a+") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                f.seek(0)
                raise ConfigError([
                    f"run.dir={folder} is in use by {f.read().strip() or 'another process'}. "
                    "Remedy: wait for it or stop it, or another run.dir."
                ]) from None  # fmt: skip
            # A file system without locks: nothing is known, and nothing is kept from running.
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        f.flush()
        yield


class Run:
    """All parts of one training run; `state`/`restore` are its checkpoint."""

    def __init__(self, cfg: Config, folder: Path, console: Console):
        self.cfg, self.folder, self.console = cfg, folder, console
        self.sim_device, self.device = devices(cfg)
        start_compiler(self.device, cfg.optimization)
        seed_everything(cfg.env.seed)
        self.env = start_simulator(cfg, console, self.sim_device, cfg.evaluation.video)
        seed_everything(cfg.env.seed)  # the networks do not depend on what the simulator drew
        self.agent = make_agent(cfg, self.env, self.device)
        store = self.device if cfg.replay_buffer.gpu_storage else torch.device("cpu")
        generators = [
            torch.Generator(device=d).manual_seed(cfg.env.seed * 1000 + i)
            for i, d in enumerate((self.sim_device, self.device, store))
        ]
        info, train_envs = self.env.info, cfg.env.num_envs - cfg.evaluation.num_envs
        self.learner = learner_class(cfg.algo)(
            self.agent, cfg.algo, cfg.optimization, generators[1],
            cfg.algo.reward_multiplier or (1 / info.step_dt if info.rewards_times_dt else 1.0),
        )  # fmt: skip
        self.replay = Replay(
            cfg.replay_buffer, train_envs, info.observation, info.action, cfg.model,
            store, generators[2], info.pixels,
        )  # fmt: skip
        self.limiter = Limiter(
            cfg.optimization.replay_ratio, cfg.replay_buffer.batch_size,
            cfg.collector.init_random_frames, 1.0, train_envs / cfg.env.num_envs,
            4 * cfg.collector.frames_per_batch,
        )  # fmt: skip
        self.extending = Phases(store, cfg.profiling.enabled)
        self.collector = self._collector(generators[0])
        if isinstance(self.collector, Thread):
            self.limiter.floor = cfg.optimization.replay_ratio_floor
        self.profiler: Profiler | None = None
        if cfg.profiling.enabled:
            self.learner.phases = Phases(self.device)
            self.collector.phases = Phases(self.sim_device)
            parts = {"learner": self.learner.phases, "buffer": self.extending,
                     "collector": self.collector.phases}  # fmt: skip
            self.profiler = Profiler(folder / "profile", parts, cfg.profiling.updates)
        self.checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep)
        self.frames = 0
        self.episodes = 0.0
        self.seconds = 0.0
        """Wall seconds of the training loop up to the last save."""
        self.logged = self.saved = 0
        """Frames at the last log point and checkpoint that were due, not forced by an end."""
        self.meter: Meter | None = None

    def _collector(self, generator: torch.Generator) -> Collector:
        cfg = self.cfg
        on_gpu = self.sim_device.type == "cuda"
        compiled = {"true": True, "false": False, "auto": on_gpu}
        setup = Setup(
            self.env, self.agent, self._extend, generator,
            cfg.collector.frames_per_batch // cfg.env.num_envs, cfg.collector.init_random_frames,
            cfg.evaluation.num_envs, cfg.algo.exploration_noise,
            on_gpu and compiled[cfg.optimization.compile.cudagraph],
            compile_function if on_gpu and compiled[cfg.optimization.compile.enabled] else as_it_is,
        )  # fmt: skip
        kind, why = cfg.collector.kind, "asked for"
        if kind == "auto":
            two = self.sim_device != self.device
            kind = "thread" if two else "sync"
            why = "two GPUs" if two else "one device"
        self.console.say(f"collector: {kind} ({why})")
        if kind == "sync":
            return Sync(setup)
        # A launch that finds the GPU's queue full spins in the driver, and the collector's launches
        # wait behind it: on two H200 it lost one frame in six to that.
        self.learner.ahead = 0
        return Thread(setup, self.learner.flat, self.device, cfg.collector.total_frames)

    def _extend(self, records: TensorDictBase) -> None:
        with self.extending("extend"):
            self.replay.extend(records)
        self.extending.add(self.extending.take())

    def hand_over(self) -> None:
        """Let the compiler's helpers begin."""
        reserved = self.replay.gib if self.replay.device == self.device else 0.0
        info = self.env.info
        hand_over(
            self.cfg, info.observation, info.action, info.pixels, self.learner.reward_multiplier,
            self.device, reserved,
        )  # fmt: skip

    def acting_agent(self) -> Agent:
        """The networks as they are now, on the simulator's device."""
        if self.sim_device == self.device:
            return self.agent
        return copy.deepcopy(self.agent).to(self.sim_device)

    def describe(self) -> None:
        parameters = sum(p.numel() for p in self.learner.params.values())
        self.console.say(
            f"networks: {parameters:,} parameters ({self.cfg.model.size}) on {self.device}"
        )
        self.console.say(self.replay.describe())
        if self.device.type == "cuda" and self.cfg.optimization.compile.enabled != "false":
            self.console.say("the first update is compiled, which takes about a minute on a new "
                             "machine and seconds from its cache")  # fmt: skip

    def save(self) -> None:
        """A complete checkpoint of now.

        Raises:
            NonFiniteError: spoiled weights are never saved.
            CheckpointError: it could not be written; older ones are intact.
        """
        self.learner.check_finite()
        if self.meter:
            self.seconds = self.meter.elapsed()
        exact, curriculum = self.cfg.checkpoint.exact, self.env.curriculum_state()
        parts: dict[str, Any] = {
            "networks": self.agent.state_dict(), "learner": self.learner.state_dict(),
        }  # fmt: skip
        if exact:
            parts["exact"] = {
                "collector": self.collector.state_dict(exact=True),
                "credit": self.limiter.credit,
            }
        if curriculum:
            parts["curriculum"] = curriculum
        if exact or self.cfg.checkpoint.replay:
            parts["replay"] = self.replay.state_dict()
        info = self.env.info
        meta = {
            "config": to_dict(self.cfg), "versions": versions(), "updates": self.learner.updates,
            "episodes": self.episodes, "seconds": self.seconds, "exact": exact,
            "logged": self.logged, "saved": self.saved,
            "limiter": {"credit": self.limiter.credit, "paid": self.limiter.paid},
            "task": {"task": info.task, "backend": info.backend,
                     "observation_names": info.observation_names,
                     "action_names": info.action_names, "step_dt": info.step_dt,
                     "pixels": list(info.pixels or [])},
        }  # fmt: skip
        self.checkpoints.save(self.frames, parts, meta)
        if self.cfg.checkpoint.models:
            self.checkpoints.save_model(
                self.learner.updates, parts["networks"], meta | {"frames": self.frames}
            )

    def progress(self) -> float:
        """The part of the run that is done, by what will end it: frames, or updates."""
        total, most = self.cfg.collector.total_frames, self.cfg.optimization.max_updates
        if not most:
            return self.frames / total
        start = self.cfg.collector.init_random_frames  # no update is due before it
        learned = (self.frames - start) / max(total - start, 1)
        return max(learned, self.learner.updates / most, 0.0)

    def restore(self, found: Path) -> None:
        """Go on from a checkpoint of this run.

        Raises:
            CheckpointError, ConfigError: nothing has been changed then.
        """
        parts = ["networks", "learner", "replay", "curriculum"] + (
            ["exact"] if self.cfg.checkpoint.exact else []
        )
        state = checkpoint.load(found, parts, self.device)
        self._check_same_run(state["meta"])
        if self.cfg.checkpoint.exact and "exact" not in state:
            raise ConfigError([
                f"checkpoint.exact=true, but {found} was saved without it. Remedy: "
                "checkpoint.exact=false, or a new run.dir."
            ])  # fmt: skip
        if "exact" in state:
            saved, mine = state["exact"]["collector"], self.collector.policy
            if saved["generator"].shape != mine.generator.get_state().shape:
                raise ConfigError([f"checkpoint.exact=true, and {found} was saved on another kind "
                                   "of device. Remedy: env.device as it was, or "
                                   "checkpoint.exact=false."])  # fmt: skip
        if "replay" in state:
            try:
                self.replay.check_state(state["replay"])
            except ValueError as e:
                raise ConfigError([str(e)]) from None
        checkpoint.load_networks(self.agent, state["networks"], found)
        self.learner.load_state_dict(state["learner"])
        meta = state["meta"]
        self.frames, self.episodes, self.seconds = meta["frames"], meta["episodes"], meta["seconds"]
        self.logged, self.saved = meta.get("logged", self.frames), meta.get("saved", self.frames)
        self.collector.frames = self.frames
        self.collector.publish(self.learner.updates)
        if "replay" in state:
            self.replay.load_state_dict(state["replay"])
            owed = meta.get("limiter", {})
            self.limiter.credit = owed.get("credit", 0.0)
            self.limiter.paid = owed.get("paid", 0.0)
        self.env.load_curriculum_state(state.get("curriculum", {}))
        if "exact" in state:
            self.collector.load_state_dict(state["exact"]["collector"])
            self.limiter.credit = state["exact"]["credit"]
        self.console.say(
            f"resumed from {found}: {self.frames:,} frames, {self.learner.updates:,} updates"
            + ("" if "replay" in state else "; the replay buffer is refilled first")
        )

    def _check_same_run(self, meta: dict[str, Any]) -> None:
        mine, info = to_dict(self.cfg), self.env.info
        # Of an older version: what has come since was as it is by default.
        saved = to_dict(build(meta["config"], stored=True))
        pixels = list(meta["task"].get("pixels") or [])
        fixed = [("env", k) for k in ("name", "num_envs", "seed", "cfg", "action_bound", "cameras")]
        fixed += [("model", k) for k in mine["model"] if k != "cnn_depth" or info.pixels]
        fixed += [("algo", "name"), ("evaluation", "num_envs")]
        fixed += [("env", "pixels_only")] if info.pixels else []
        odd = [
            f"{a}.{b}={mine[a][b]!r}, but the run has {saved[a].get(b)!r}"
            for a, b in fixed if mine[a][b] != saved[a].get(b)
        ]  # fmt: skip
        if pixels != list(info.pixels or []):
            odd.append(f"env.from_pixels, env.image_size: pictures of {list(info.pixels or [])}, "
                       f"but the run has {pixels}")  # fmt: skip
        if odd:
            remedy = f"Remedy: the same values, or another run.dir than {self.folder}."
            raise ConfigError([*odd[:-1], f"{odd[-1]}. {remedy}"])

    def start_from(self, source: str) -> None:
        """Take weights of another run (`checkpoint.init_from`); everything else starts fresh.

        Raises:
            CheckpointError
        """
        found = checkpoint.find(source)
        state = checkpoint.load(found, ["networks"], self.device)["networks"]
        modules = self.cfg.checkpoint.init_modules
        chosen = [n for n, _ in self.agent.named_children()] if "all" in modules else modules
        if "critic" in chosen and "slow_critic" not in chosen:
            chosen = [*chosen, "slow_critic"]
        own = self.agent.state_dict()
        own |= {k: v for k, v in state.items() if k.split(".")[0] in chosen}
        checkpoint.load_networks(self.agent, own, found)
        self.console.say(f"weights of {', '.join(chosen)} from {found}")


def train(cfg: Config, folder: Path, console: Console) -> int:
    """Train to `collector.total_frames`, evaluate, report. Returns the exit code.

    Raises:
        ConfigError: of the checkpoint or the machine, or the folder is in use.
    """
    with locked(folder):
        return _train(cfg, folder, console)


def _train(cfg: Config, folder: Path, console: Console) -> int:
    found = Checkpoints(folder / "checkpoints").latest()
    run = Run(cfg, folder, console)
    run.replay.check_memory()  # before helpers take some of it
    run.hand_over()
    run.describe()
    if cfg.checkpoint.exact:
        run.collector.start()
        run.env.state_dict()  # a simulator that cannot do this says so now, not at the first save
    if found:
        run.restore(found)
    elif cfg.checkpoint.init_from:
        run.start_from(cfg.checkpoint.init_from)
    (folder / "config.yaml").write_text(cli.dump(to_dict(cfg)))
    logger = Logger(folder, cfg.logger, to_dict(cfg), run.frames)
    logger.rewind(run.frames)
    if cfg.logger.backend == "wandb" and cfg.logger.mode == "offline":
        console.say(f"Weights & Biases: offline; `wandb sync {folder}/wandb/offline-*` sends it, "
                    "or logger.mode=online at once")  # fmt: skip
    stop = StopSignal()
    try:
        with stop.installed():
            reason = _loop(run, logger, stop)
    except NonFiniteError:
        torch.save(run.learner.last_batch, folder / "nonfinite_batch.pt")
        console.say(f"the batch is in {folder / 'nonfinite_batch.pt'}")
        raise
    except (CollectorError, ObservationError):  # what was learned is whole
        if not cfg.checkpoint.exact:  # the simulator's state would be saved as well, and is not
            run.save()
            console.say(
                f"saved at {run.frames:,} frames; the same command resumes: run.dir={folder}"
            )
        raise
    finally:
        logger.close()
        why = run.profiler.close() if run.profiler else None
        if why:
            console.say(f"profile: {why}")
    summary = _summary(run, reason)
    if cfg.evaluation.final and not stop.number:
        agent = run.acting_agent()
        summary["evaluation"] = report(cfg, folder, run.env, agent, console, logger.rows(),
                                       (run.frames, run.learner.updates))  # fmt: skip
    write_json(folder / "summary.json", summary)
    console.say(f"results: {folder}")
    run.env.close()
    return 128 + stop.number if stop.number else 0


def _loop(run: Run, logger: Logger, stop: StopSignal) -> str:
    """Collect and learn in turn; returns why it ended."""
    cfg, learner, replay = run.cfg, run.learner, run.replay
    meter = run.meter = Meter(run)
    metrics: dict[str, torch.Tensor] = {}
    published = learner.updates
    most = cfg.optimization.max_updates or sys.maxsize
    with run.collector as collector:
        done = run.frames >= cfg.collector.total_frames or learner.updates >= most
        done = done or bool(stop.number)
        # A signal may come between any two lines: what ends the loop is `done`, which is looked at
        # once a turn, before the turn's save.
        while not done:
            arrived = collector.step(wait=not run.limiter.owes(replay.ready))
            run.frames += arrived
            run.limiter.collected(run.frames, arrived // cfg.env.num_envs * replay.envs)
            learner.optimizer.progress.fill_(run.progress())
            for _ in run.limiter.due(replay.ready):
                metrics = learner.train(replay)
                # At once: what the collector waits for must not be the end of the whole debt.
                collector.allow(run.limiter.allowance(run.frames))
                if run.profiler:
                    run.profiler.updated(learner.updates)
                if run.device.type == "cpu":
                    learner.check_finite()  # costs nothing here, and keeps the batch that did it
                if learner.updates >= most or (stop.number and not cfg.checkpoint.exact):
                    break  # an exact run first makes the updates that it owes
                if collector.pending:
                    break
                if run.frames >= cfg.collector.total_frames and not run.limiter.behind():
                    break
            collector.allow(run.limiter.allowance(run.frames))
            if learner.updates > published and collector.publish(learner.updates):
                published = learner.updates

            done = run.frames >= cfg.collector.total_frames or learner.updates >= most
            done = done or bool(stop.number)
            due = run.frames - run.logged >= cfg.logger.interval_frames
            if due or done:
                run.logged = run.frames if due else run.logged
                learner.check_finite()
                row = meter.row(metrics, collector.read_stats())
                logger.write(row)
                run.console.progress(meter.line(row), keep=True)
                table = run.profiler.log_point(learner.updates, done) if run.profiler else None
                if table:
                    run.console.say(f"profile: {run.folder / 'profile'}\n{table}")
            else:
                run.console.progress(meter.line(meter.last), keep=False)
            due = run.frames - run.saved >= cfg.checkpoint.interval_frames
            if due or done:
                run.saved = run.frames if due else run.saved
                run.save()
    if stop.number:
        run.console.say(f"stopped by {signal.Signals(stop.number).name}; the same command resumes: "
                        f"run.dir={run.folder}")  # fmt: skip
        return signal.Signals(stop.number).name
    return "max_updates" if learner.updates >= most else "finished"


class Meter:
    """Rates, and the rows and lines that show them."""

    def __init__(self, run: Run):
        self.run = run
        self.started = self.window = time.monotonic()
        self.before = (run.frames, run.learner.updates)
        self.first, self.base = run.progress(), run.seconds
        self.last: dict[str, float] = {}

    def elapsed(self) -> float:
        """Wall seconds of the training loop, earlier sessions included."""
        return self.base + time.monotonic() - self.started

    def row(self, metrics: dict[str, torch.Tensor], stats: dict[str, float]) -> dict[str, float]:
        """One row of metrics since the last; the only place where the device is waited for."""
        run, now = self.run, time.monotonic()
        seconds = max(now - self.window, 1e-9)
        frames, updates = run.frames - self.before[0], run.learner.updates - self.before[1]
        stored = frames / run.cfg.env.num_envs * run.replay.envs
        run.episodes += stats.get("episode/episodes", 0.0)
        names = list(metrics)
        values = torch.stack([metrics[k].double() for k in names]).tolist() if names else []
        row: dict[str, float] = {
            "frames": run.frames, "updates": run.learner.updates, "episodes": run.episodes,
            **stats, **dict(zip(names, values, strict=True)),
            **{f"curriculum/{k}": v for k, v in run.env.curriculum().items()},
            "replay_ratio": updates * run.cfg.replay_buffer.batch_size / max(stored, 1.0),
            "time/seconds": self.elapsed(), "time/fps": frames / seconds,
            "time/updates_per_second": updates / seconds,
        }  # fmt: skip
        self.window, self.before = now, (run.frames, run.learner.updates)
        shown = ("episode/return", "eval/return")
        self.last = {**{k: self.last[k] for k in shown if k in self.last}, **row}
        return row

    def line(self, row: dict[str, float]) -> str:
        """The progress line."""
        run, total = self.run, self.run.cfg.collector.total_frames
        known = {**self.last, **row}
        spent = time.monotonic() - self.started
        done, now = run.progress() - self.first, run.progress()
        eta = spent / done * max(1 - now, 0.0) if done else 0.0
        most = run.cfg.optimization.max_updates
        share = f"{run.frames:,}/{total:,} frames ({now:.0%})"
        if most:
            share = f"{run.learner.updates:,}/{most:,} updates ({now:.0%}), {run.frames:,} frames"
        score = "".join(
            f", {label} {known[k]:.2f}"
            for k, label in (("episode/return", "return"), ("eval/return", "eval")) if k in known
        )  # fmt: skip
        if run.learner.updates == 0:
            score += ", filling the replay buffer"
        return (f"{share}, {known.get('time/fps', 0):,.0f} frames/s, "
                f"{known.get('time/updates_per_second', 0):.1f} updates/s{score}"
                + (f", ETA {duration(eta)}" if done else ""))  # fmt: skip


def _summary(run: Run, reason: str) -> dict[str, Any]:
    seconds = max(run.seconds, 1e-9)
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
    return {
        "env": run.cfg.env.name, "backend": run.env.info.backend, "versions": versions(),
        "device": gpu or f"cpu, {torch.get_num_threads()} threads", "frames": run.frames,
        "updates": run.learner.updates, "wall_seconds": run.seconds,
        "fps": run.frames / seconds, "updates_per_second": run.learner.updates / seconds,
        "episodes": int(run.episodes), "exit_reason": reason,
    }  # fmt: skip
