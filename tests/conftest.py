"""Shared fixtures. Runs of the toy simulator are on the CPU with one thread, also where there is a
GPU, so that they repeat bit by bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TD_GET_DEFAULTS_TO_NONE", "1")
for _name in ("NO_PROXY", "no_proxy"):  # servers on loopback are ours
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost"]))
if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; it must be chosen before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

EMBEDDED = importlib.util.find_spec("mjlab") is not None
"""Whether the embedded simulator is installed; in Isaac Lab's container it is not."""
embedded = pytest.mark.skipif(not EMBEDDED, reason="the embedded simulator is not installed")
collect_ignore = [] if EMBEDDED else ["test_tasks.py", "test_direct.py", "test_mjlab.py"]

# A run of seconds: the toy simulator and networks of a few thousand parameters.
TOY = [
    "env.backend=toy", "env.device=cpu", "optimization.device=cpu", "env.num_envs=12",
    "evaluation.num_envs=4", "evaluation.episodes=12",
    "evaluation.video=false", "evaluation.open_loop_steps=10", "collector.frames_per_batch=96",
    "collector.init_random_frames=192", "collector.total_frames=960", "replay_buffer.size=640",
    "replay_buffer.batch_size=32", "replay_buffer.batch_length=8", "optimization.replay_ratio=0.5",
    "model.belief=16", "model.hidden=8", "model.categoricals=3", "model.classes=4",
    "model.blocks=2", "model.units=8", "model.bins=15", "algo.horizon=4",
    "checkpoint.interval_frames=192", "logger.interval_frames=96", "optimization.num_threads=1",
]  # fmt: skip


@pytest.fixture
def toy_overrides(tmp_path: Path) -> list[str]:
    """Overrides of a toy run in a fresh folder."""
    return [*TOY, f"run.dir={tmp_path / 'run'}"]


@pytest.fixture
def program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python dreamer_isaac.py ...` as a user does."""

    def run(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}  # type: ignore[dict-item]
        return subprocess.run(
            [sys.executable, str(ROOT / "dreamer_isaac.py"), *args],
            capture_output=True, text=True, timeout=240, env=env, **kwargs,  # type: ignore[call-overload]
        )  # fmt: skip

    return run


def check_that_nothing_changes_later(env: Any, actions: list[torch.Tensor]) -> None:
    """What a simulator hands out must not be written to again when it goes on."""
    handed: list[torch.Tensor] = [t for t in env.reset() if t is not None]
    copies = [t.clone() for t in handed]
    for action in actions:
        executed, outcome, observation = env.step(action)
        fresh = [executed, *outcome, *(t for t in observation if t is not None)]
        copies += [t.clone() for t in fresh]
        handed += fresh
    for now, then in zip(handed, copies, strict=True):
        assert torch.equal(now, then)
    places = [t.data_ptr() for t in handed]
    assert len(set(places)) == len(places)
