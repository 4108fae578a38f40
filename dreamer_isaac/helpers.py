"""Processes that compile a part of the first update each.

torch.compile is Python for the most part: one core's work, whatever the machine
(benchmarks/results/learner_start.md). So helpers are started before this process imports torch.
Each makes the same learner, runs one update on zeros, compiles its share of the update's
functions (the others run as they are), and leaves what comes out in the compilers' cache on disk,
where this process finds it: same functions, same shapes, same key (precompile.py). Meanwhile this
process compiles what an update begins with.

Nothing depends on a helper. One that fails, or finds too little memory on the GPU, leaves its share
to this process.

Imports no torch: `start` comes before everything that takes long.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import re
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dreamer_isaac.config import AlgoConfig, Config, ModelConfig, OptimizationConfig, to_dict

SHARES = {
    "behaviour": (
        "_behaviour_total_", "_dream_step_", "_value_", "_value_by_states_", "_value_by_weights_",
        "_actor_total_", "_critic_total_",
    ),
    "heads": ("_model_total_", "_imagine_step_", "_arithmetic"),
}  # fmt: skip
"""Functions of `learner.Learner`, `LearnerV1` and the optimisers, by the helper that compiles them.
The rest, up to the observed states, is needed first and left to this process: with a third helper
for it the first update was no sooner (benchmarks/results/learner_start.md)."""

CORES = 8
"""On fewer, helpers would only be in the way (`optimization.compile.helpers=auto`)."""
WORKERS = 10
"""Most processes that one helper starts to compile the code that it writes."""
PATIENCE = 120.0
"""Seconds after its job when a helper is given up; it took 20 to 29 (learner_start.md)."""


@dataclass
class Job:
    """What a helper has to know: the learner, and the shapes of its batches."""

    model: ModelConfig
    algo: AlgoConfig
    optimization: OptimizationConfig
    observation: int
    """O, 0 for none."""
    action: int
    """A"""
    pixels: tuple[int, int, int] | None
    slices: int
    """B"""
    length: int
    """T"""
    reward_multiplier: float
    device: str
    memory: float = 0.0
    """Bytes of the GPU's memory that the helper may take."""
    precision: str = ""
    """torch.backends.cuda.matmul.fp32_precision, which is part of the cache's key."""


class Helper:
    """One process, from here."""

    def __init__(self, share: str, mark: Path):
        self.share, self.mark, self.given = share, mark, 0.0
        package = Path(__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        workers = min(WORKERS, max(2, cores() // (len(SHARES) + 1)))
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-P", "-m", "dreamer_isaac.precompile", share],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
            env={"TORCHINDUCTOR_COMPILE_THREADS": str(workers), **os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def give(self, job: Job) -> None:
        """Let it begin. Asked again, or when it has ended: nothing."""
        if self.process is None or self.given:
            return
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # `wait` tells why it ended
            pickle.dump(job, self.process.stdin)
            self.process.stdin.flush()  # and stays open: when it closes, this process has ended
        self.given = time.monotonic()

    def wait(self) -> bool:
        """Until its share is in the cache, or will not be. Returns whether it is; asked again,
        False at once."""
        if self.process is None:
            return False
        try:
            done = bool(self.given) and self._answer()
            if self.given:
                # Whatever is missing is compiled here now: no helper has a use next time.
                with contextlib.suppress(OSError):
                    self.mark.parent.mkdir(parents=True, exist_ok=True)
                    self.mark.touch()
        finally:
            self.stop()
        return done

    def _answer(self) -> bool:
        """Whether it says "done" before it ends or is given up."""
        assert self.process and self.process.stdout
        out, said = self.process.stdout.fileno(), b""
        while b"done\n" not in said:
            left = max(0.0, self.given + PATIENCE - time.monotonic())
            late = not select.select([out], [], [], left)[0]
            part = b"" if late else os.read(out, 4096)
            if not part:
                self._complain(late)
                return False
            said += part
        return True

    def _complain(self, late: bool) -> None:
        assert self.process
        how = f"did not answer for {PATIENCE:.0f} s"
        if not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                how = f"ended with status {self.process.wait(5)}"
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        logging.getLogger(__name__).warning(
            "the process that was to compile a part of the update (%s) %s; the first update takes "
            "longer. The last that it said: %s", self.share, how, lines[-1] if lines else "nothing",
        )  # fmt: skip

    def stop(self) -> None:
        """End it."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout, self.said):
            with contextlib.suppress(OSError):  # something was still to be written
                if pipe:
                    pipe.close()
        process.wait()


_helpers: dict[str, Helper] = {}


def start(cfg: Config, *more: Any) -> None:
    """Start the helpers that a training run with this configuration has a use for: on a GPU, with
    the compiler, and with something to compile (`mark_of`).

    Args:
        more: what else the compiled functions depend on.
    """
    if _helpers or not _wanted(cfg):
        return
    atexit.register(stop)
    with contextlib.suppress(Exception):  # then there are none: nothing depends on them
        for share in SHARES:
            mark = mark_of(cfg, share, *more)
            if not mark.exists():
                _helpers[share] = Helper(share, mark)


def give(job: Job) -> None:
    """Let the helpers begin."""
    for helper in _helpers.values():
        helper.give(job)


def started() -> list[str]:
    """The shares of the helpers that were started."""
    return list(_helpers)


def helper_of(function: str) -> Helper | None:
    """Who compiles the function of this name, if anybody does."""
    return next((h for s, h in _helpers.items() if function in SHARES[s]), None)


def stop() -> None:
    """End those that still run."""
    for helper in _helpers.values():
        helper.stop()
    _helpers.clear()


def mark_of(cfg: Config, share: str, *more: Any) -> Path:
    """A file beside the compilers' cache that says: what this share compiles is in it. A cache that
    is emptied takes it along."""
    plain, e, rb = to_dict(cfg), cfg.env, cfg.replay_buffer
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    key = [
        plain["model"], plain["algo"], plain["optimization"], rb.batch_size, rb.batch_length,
        e.name, e.backend, e.from_pixels, e.pixels_only, e.image_size, e.cameras, e.cfg,
        share, more,
        # What the learner's device depends on: its index is in the cache's key, and its kind.
        e.device, cfg.collector.kind, visible and len(visible.split(",")), _gpus(),
        importlib.metadata.version("torch"),
        [p.read_bytes().hex() for p in sorted(Path(__file__).parent.rglob("*.py")) if p.is_file()],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()
    return _cache() / "dreamer_isaac" / digest[:32]


def _cache() -> Path:
    """Where torch has its compilers' cache (torch._inductor.runtime.cache_dir_utils)."""
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def cores() -> int:
    """Cores that this process may use, a container's limit included."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max 100000": no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def has_gpu() -> bool:
    """Whether there is a GPU, as far as files tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    found = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # dxg: WSL
    return found and visible not in ("", "-1")


def _gpus() -> list[str]:
    """The models of the GPUs, where the driver tells them."""
    out = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            lines = path.read_text().splitlines()
            out += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model")]
    return out


def _wanted(cfg: Config) -> bool:
    """Whether the update is compiled, for a GPU, and helpers are wanted or would not be in the
    way."""
    compiling, devices = cfg.optimization.compile, (cfg.env.device, cfg.optimization.device)
    return (
        compiling.enabled != "false" and compiling.helpers != "false" and has_gpu()
        and not any(name.startswith("cpu") for name in devices)
        and os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") != "1"
        and (compiling.helpers == "true" or cores() >= CORES)
    )  # fmt: skip
