"""Helpers of the compiler: processes that compile a part of the first update."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dreamer_isaac import compiling, helpers
from dreamer_isaac.cli import compose
from dreamer_isaac.config import Config

TINY = [
    "experiment=bench_12m", "size=1m", "replay_buffer.batch_size=16",
    "replay_buffer.batch_length=4", "replay_buffer.size=2048", "env.num_envs=32",
    "evaluation.num_envs=0", "model.units=32", "model.belief=64", "model.hidden=32",
    "algo.horizon=3", "optimization.autocast=false", "optimization.compile.enabled=true",
    "optimization.device=cpu",
]  # fmt: skip


@pytest.fixture
def cfg() -> Config:
    return compose(TINY)


@pytest.fixture(autouse=True)
def nobody_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    yield
    helpers.stop()


def test_every_function_of_a_share_is_there() -> None:
    """A function that is renamed would silently be compiled by the learner's process alone."""
    from dreamer_isaac.learner import Learner
    from dreamer_isaac.learner_v1 import LearnerV1
    from dreamer_isaac.optim import FlatOptimizer

    names = [n for share in helpers.SHARES.values() for n in share]
    assert len(set(names)) == len(names)
    for name in names:
        assert any(hasattr(owner, name) for owner in (Learner, LearnerV1, FlatOptimizer)), name


def test_helpers_are_for_gpus_with_cores(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    class Fake:
        process = None

        def __init__(self, share: str, mark: Path):
            started.append(share)

    def shares() -> list[str]:
        started.clear()
        helpers.start(cfg)
        helpers._helpers.clear()
        return list(started)

    monkeypatch.setattr(helpers, "Helper", Fake)
    monkeypatch.setattr(helpers, "CORES", 1)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shares() == []  # optimization.device=cpu
    cfg.optimization.device = "auto"
    assert shares() == list(helpers.SHARES)
    mark = helpers.mark_of(cfg, "heads")
    mark.parent.mkdir(parents=True)
    mark.touch()  # what it compiles is in the cache
    assert shares() == [s for s in helpers.SHARES if s != "heads"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert shares() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    cfg.optimization.compile.enabled = "false"
    assert shares() == []
    cfg.optimization.compile.enabled = "auto"
    monkeypatch.setattr(helpers, "CORES", 10_000)
    assert shares() == []
    cfg.optimization.compile.helpers = "true"
    assert len(shares()) == 2
    monkeypatch.setattr(helpers, "CORES", 1)
    cfg.optimization.compile.helpers = "false"
    assert shares() == []


def test_the_mark_goes_by_what_is_compiled(cfg: Config) -> None:
    before = helpers.mark_of(cfg, "heads")
    assert before == helpers.mark_of(compose(TINY), "heads")
    assert before.is_relative_to(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert before != helpers.mark_of(cfg, "behaviour") != helpers.mark_of(cfg, "behaviour", 48)
    cfg.env.seed += 1  # compiled just the same
    assert before == helpers.mark_of(cfg, "heads")
    cfg.algo.free_nats += 1
    assert before != helpers.mark_of(cfg, "heads")


def test_a_helper_that_fails_costs_nothing(
    cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    helper = helpers.Helper("no such share", tmp_path / "mark")
    helpers._helpers["heads"] = helper
    helpers.give(cfg, 5, 2, None, 1.0, "cpu")
    helper.share = "heads"

    def _imagine_step_(x: int) -> int:
        return x + 1

    compiled = compiling.compile_function(_imagine_step_)
    with caplog.at_level(logging.WARNING):
        assert not helper.wait()
    assert "KeyError" in caplog.text and "no such share" in caplog.text
    assert not (tmp_path / "mark").exists() and not helper.wait()
    assert compiled(1) == 2


def test_without_a_job_nobody_waits(tmp_path: Path) -> None:
    helper = helpers.Helper("heads", tmp_path / "mark")
    process = helper.process
    assert process is not None and not helper.wait()
    assert process.poll() is not None


@pytest.mark.parametrize("share", helpers.SHARES)
@pytest.mark.cluster
def test_what_a_helper_compiles_is_found_in_the_cache(share: str, tmp_path: Path) -> None:
    """The learner on a replay buffer, in a process of its own: nothing of the share is compiled."""
    script = f"""
import sys
from dreamer_isaac import helpers
from dreamer_isaac.cli import compose
from tests.test_helpers import TINY

cfg = compose(TINY)
helper = helpers._helpers["{share}"] = helpers.Helper("{share}", helpers.mark_of(cfg, "{share}"))
helpers.give(cfg, 5, 2, None, 1.0, "cpu")
assert helper.wait() and helper.mark.exists()

import torch
from torch._dynamo.utils import counters
from dreamer_isaac import compiling
from dreamer_isaac.learner_v1 import learner_class
from dreamer_isaac.models import Agent
sys.path.insert(0, "scripts")
from bench import filled_replay

compiling.only = frozenset(helpers.SHARES["{share}"])
agent = Agent(5, 2, cfg.model, cfg.algo)
learner = learner_class(cfg.algo)(agent, cfg.algo, cfg.optimization, torch.Generator())
learner.train(filled_replay(cfg, (5, 2), torch.device("cpu"))[0])
found = counters["aot_autograd"]
print("hits", found["autograd_cache_hit"], "of", found["total"])
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, text=True, capture_output=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    found = re.search(r"hits (\d+) of (\d+)", done.stdout)
    assert found and found[1] == found[2] != "0", done.stdout + done.stderr
