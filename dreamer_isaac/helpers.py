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
import platform
import re
import select
import subprocess
import sys
import tempfile
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
PATIENCE = 600.0
"""Seconds after which a helper is given up."""
MEMORY = 0.25
"""Part of the GPU's free memory that a helper may take."""


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
    precision: str = ""
    """torch.backends.cuda.matmul.fp32_precision, which is part of the cache's key."""


class Helper:
    """One process, from here."""

    def __init__(self, share: str, mark: Path):
        self.share, self.mark, self.given = share, mark, False
        package = Path(__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        threads = max(2, len(os.sched_getaffinity(0)) // (len(SHARES) + 1))
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-P", "-m", "dreamer_isaac.precompile", share],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
            env={"TORCHINDUCTOR_COMPILE_THREADS": str(threads), **os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def give(self, job: Job) -> None:
        """Let it begin."""
        assert self.process and self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # `wait` tells why it ended
            self.process.stdin.write(pickle.dumps(job))
            self.process.stdin.close()
        self.given = True

    def wait(self) -> bool:
        """Until its share is in the cache, or will not be. Returns whether it is; asked again,
        False at once."""
        process, self.process = self.process, None
        if process is None:
            return False
        answer, out = b"", process.stdout
        if self.given and out and select.select([out], [], [], PATIENCE)[0]:
            answer = out.readline().strip()
        process.kill()
        process.wait()
        if answer == b"done":
            with contextlib.suppress(OSError):
                self.mark.parent.mkdir(parents=True, exist_ok=True)
                self.mark.touch()
        elif self.given:
            self.said.seek(0)
            lines = self.said.read().decode(errors="replace").strip().splitlines()
            logging.getLogger(__name__).warning(
                "the process that was to compile %s ended with %s; the first update takes longer "
                "(%s)", self.share, process.returncode, lines[-1] if lines else "it said nothing",
            )  # fmt: skip
        self.said.close()
        return answer == b"done"


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
    for share in SHARES:
        mark = mark_of(cfg, share, *more)
        if not mark.exists():
            with contextlib.suppress(OSError):  # no more processes: as if there were no helpers
                _helpers[share] = Helper(share, mark)


def give(
    cfg: Config, observation: int, action: int, pixels: tuple[int, int, int] | None,
    reward_multiplier: float, device: Any,
) -> None:  # fmt: skip
    """Let the helpers begin: the learner's networks and device are known. Needs torch."""
    import torch

    rb = cfg.replay_buffer
    job = Job(
        cfg.model, cfg.algo, cfg.optimization, observation, action, pixels,
        rb.batch_size // rb.batch_length, rb.batch_length, reward_multiplier, str(device),
        str(getattr(torch.backends.cuda.matmul, "fp32_precision", "")),
    )  # fmt: skip
    for helper in _helpers.values():
        helper.give(job)


def helper_of(function: str) -> Helper | None:
    """Who compiles the function of this name, if anybody does."""
    return next((h for s, h in _helpers.items() if function in SHARES[s]), None)


def stop() -> None:
    """End those that still run."""
    for helper in _helpers.values():
        if helper.process is not None:
            helper.process.kill()
            helper.process.wait()
            helper.process = None
    _helpers.clear()


def mark_of(cfg: Config, share: str, *more: Any) -> Path:
    """A file beside the compilers' cache that says: what this share compiles is in it. A cache that
    is emptied takes it along."""
    user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())  # where torch has it
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(
        tempfile.gettempdir(), f"torchinductor_{user}"
    )
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    e, rb = cfg.env, cfg.replay_buffer
    key = [
        to_dict(cfg)["model"], to_dict(cfg)["algo"], to_dict(cfg)["optimization"],
        rb.batch_size, rb.batch_length, e.name, e.backend, e.from_pixels, e.pixels_only,
        e.image_size, e.cameras, e.cfg, share, more, platform.node(),
        importlib.metadata.version("torch"),
        [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sources],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()
    return Path(cache) / "dreamer_isaac" / digest[:32]


def _wanted(cfg: Config) -> bool:
    """Whether the update is compiled, for a GPU, and helpers are wanted or would not be in the
    way."""
    compiling = cfg.optimization.compile
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # dxg: WSL
    cores = len(os.sched_getaffinity(0))
    return (
        compiling.enabled != "false" and compiling.helpers != "false"
        and gpu and visible not in ("", "-1") and not cfg.optimization.device.startswith("cpu")
        and (compiling.helpers == "true" or cores >= CORES)
    )  # fmt: skip
