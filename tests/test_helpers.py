"""Helpers of the compiler: processes that compile a part of the first update."""

from __future__ import annotations

import getpass
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from dreamer_isaac import compiling, helpers
from dreamer_isaac.cli import compose
from dreamer_isaac.config import Config, ConfigError
from dreamer_isaac.learner_v1 import learner_class
from dreamer_isaac.models import Agent
from dreamer_isaac.precompile import records
from dreamer_isaac.replay import Replay

ROOT = Path(__file__).parents[1]
SMALL = [
    "replay_buffer.batch_size=16", "replay_buffer.batch_length=4", "replay_buffer.size=2048",
    "env.num_envs=32", "evaluation.num_envs=0", "model.units=32", "model.belief=64",
    "model.hidden=32", "algo.horizon=3", "optimization.autocast=false",
    "optimization.compile.enabled=true",
]  # fmt: skip
V3 = ["experiment=bench_12m", "size=1m", *SMALL]
V1 = ["experiment=bench_v1", *SMALL, "collector.frames_per_batch=256"]


def job_of(cfg: Config, pixels: tuple[int, int, int] | None = None) -> helpers.Job:
    rb = cfg.replay_buffer
    slices = rb.batch_size // rb.batch_length
    return helpers.Job(
        cfg.model, cfg.algo, cfg.optimization, 5, 2, pixels, slices, rb.batch_length, 1.0, "cpu"
    )


@pytest.fixture
def cfg() -> Config:
    return compose(V3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    helpers.stop()


def test_shares_name_functions_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is renamed would silently be compiled by the learner's process alone."""
    from dreamer_isaac import learner

    found: set[str] = set()
    monkeypatch.setattr(learner, "compile_function", lambda f: found.add(f.__name__) or f)
    for options in (V3, V1):
        cfg = compose(options)
        agent = Agent(5, 2, cfg.model, cfg.algo)
        learner_class(cfg.algo)(agent, cfg.algo, cfg.optimization, torch.Generator())
    names = [n for share in helpers.SHARES.values() for n in share]
    first = {"_encode_", "_finish_", "_step", "_step_backward", "_parallel", "_action_share"}
    assert len(set(names)) == len(names) and found == {*names, *first}


def test_helpers_are_for_gpus_with_cores(
    cfg: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    class Fake:
        def __init__(self, share: str, mark: Path):
            begun.append(share)

        def stop(self) -> None: ...

    def shares() -> list[str]:
        begun.clear()
        helpers.start(cfg)
        helpers.stop()
        return list(begun)

    monkeypatch.setattr(helpers, "Helper", Fake)
    monkeypatch.setattr(helpers, "cores", lambda: 8)
    monkeypatch.setattr(helpers, "has_gpu", lambda: True)
    assert shares() == list(helpers.SHARES)
    mark = helpers.mark_of(cfg, "heads")
    mark.parent.mkdir(parents=True)
    mark.touch()  # what it compiles is in the cache
    assert shares() == ["behaviour"]
    monkeypatch.setattr(helpers, "cores", lambda: 7)
    assert shares() == []
    cfg.optimization.compile.helpers = "true"
    assert shares() == list(helpers.SHARES)
    for path, value in (
        ("optimization.compile.helpers", "false"), ("optimization.compile.enabled", "false"),
        ("optimization.device", "cpu"), ("env.device", "cpu"),
    ):  # fmt: skip
        cfg = compose([*V3, "optimization.compile.helpers=true", f"{path}={value}"])
        assert shares() == [], path
    cfg = compose([*V3, "optimization.compile.helpers=true"])
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    assert shares() == []
    monkeypatch.delenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES")
    monkeypatch.setattr(helpers, "has_gpu", lambda: False)
    assert shares() == []


def test_no_visible_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert helpers.has_gpu()
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert not helpers.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a6e")
    assert helpers.has_gpu()


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(128)))
    for limit, expected in (("max 100000", 128), ("450000 100000", 4), ("50000 100000", 1)):
        monkeypatch.setattr(Path, "read_text", lambda self, limit=limit: f"{limit}\n")
        assert helpers.cores() == expected


def test_a_run_ends_what_it_started(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamer_isaac import cli, main

    done: list[str] = []
    monkeypatch.setattr(helpers, "start", lambda cfg: done.append("start"))
    monkeypatch.setattr(helpers, "stop", lambda: done.append("stop"))
    cfg.env.backend = "toy"
    for mode in ("train", "evaluate"):
        cfg.mode, cfg.evaluation.policy = mode, "random"
        monkeypatch.setattr(main, "main", lambda cfg: done.append(cfg.mode) or 0)
        assert cli.execute(cfg) == 0
    monkeypatch.setattr(main, "main", lambda cfg: 1 / 0)
    cfg.mode = "train"
    with pytest.raises(ZeroDivisionError):
        cli.execute(cfg)
    assert done == ["start", "train", "stop", "evaluate", "stop", "start", "stop"]


def test_helpers_without_a_gpu_are_a_mistake(cfg: Config) -> None:
    from dreamer_isaac.main import devices

    cfg.env.device = cfg.optimization.device = "cpu"
    devices(cfg)
    cfg.optimization.compile.helpers = "true"
    with pytest.raises(ConfigError, match="helpers=true needs a GPU"):
        devices(cfg)


def test_starting_never_fails(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "cores", lambda: 8)
    monkeypatch.setattr(helpers, "has_gpu", lambda: True)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: 1 / 0)
    helpers.start(cfg)
    assert helpers.started() == []


def test_the_mark_goes_by_what_is_compiled(
    cfg: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = helpers.mark_of(cfg, "heads")
    assert before == helpers.mark_of(compose(V3), "heads")
    assert before.is_relative_to(cache)
    assert before != helpers.mark_of(cfg, "behaviour") != helpers.mark_of(cfg, "behaviour", 48)
    cfg.env.seed += 1  # compiled just the same
    assert before == helpers.mark_of(cfg, "heads")
    cfg.algo.free_nats += 1
    assert before != helpers.mark_of(cfg, "heads")
    cfg.algo.free_nats -= 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # the learner is on another one then
    two = helpers.mark_of(cfg, "heads")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert two != helpers.mark_of(cfg, "heads")
    monkeypatch.setattr(helpers, "_gpus", lambda: ["another model"])
    assert helpers.mark_of(cfg, "heads") not in (two, before)


def test_the_cache_is_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert str(helpers._cache()) == default_cache_dir()

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)  # docker run --user 1234
    assert helpers._cache().name == f"torchinductor_uid_{os.getuid()}"


def test_a_helper_that_fails_costs_nothing(
    cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    helper = helpers.Helper("no such share", tmp_path / "mark")
    helpers._helpers["heads"] = helper
    helpers.give(job_of(cfg))

    def _imagine_step_(x: int) -> int:
        return x + 1

    compiled = compiling.compile_function(_imagine_step_)
    with caplog.at_level(logging.WARNING):
        assert compiled(1) == 2
    assert "status 1" in caplog.text and "KeyError: 'no such share'" in caplog.text
    # This process has compiled it, so there is nothing for a helper to do the next time.
    assert (tmp_path / "mark").exists() and helper.process is None
    assert compiled(2) == 3 and not helper.wait()
    helpers.give(job_of(cfg))  # nobody is there


def test_helpers_take_a_part_of_what_the_replay_buffer_leaves(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[helpers.Job] = []
    stopped: list[bool] = []
    monkeypatch.setattr(helpers, "give", given.append)
    monkeypatch.setattr(helpers, "stop", lambda: stopped.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 80 * 2**30))
    gpu = torch.device("cuda", 1)
    compiling.hand_over(cfg, 5, 2, None, 60.0, gpu, reserved=8.0)
    assert given[0].memory == 4 * 2**30 and given[0].device == "cuda:1"
    assert (given[0].slices, given[0].length, given[0].reward_multiplier) == (4, 4, 60.0)
    compiling.hand_over(cfg, 5, 2, None, 60.0, gpu, reserved=21.0)
    compiling.hand_over(cfg, 5, 2, None, 60.0, torch.device("cpu"))
    assert len(given) == 1 and len(stopped) == 2


def test_without_a_job_nobody_waits(tmp_path: Path) -> None:
    helper = helpers.Helper("heads", tmp_path / "mark")
    process = helper.process
    assert process is not None and not helper.wait()
    assert process.poll() is not None and not (tmp_path / "mark").exists()


def test_one_that_does_not_answer_is_given_up(
    cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "PATIENCE", 0.5)
    helper = helpers.Helper("heads", tmp_path / "mark")
    process = helper.process
    assert process is not None
    helper.give(job_of(cfg))
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert not helper.wait() and time.monotonic() - begin < 10
    assert "did not answer" in caplog.text and process.poll() is not None


def test_an_answer_is_there_however_long_ago_it_came(cfg: Config, tmp_path: Path) -> None:
    """A run may fill its replay buffer for many minutes before the first update."""
    helper = helpers.Helper("heads", tmp_path / "mark")
    assert helper.process is not None
    helper.process.kill()
    helper.process.wait()
    helper.process = subprocess.Popen(["echo", "done"], stdout=subprocess.PIPE)
    helper.process.wait()
    helper.given = time.monotonic() - 10 * helpers.PATIENCE
    assert helper.wait() and (tmp_path / "mark").exists()


def test_an_interrupted_wait_leaves_nobody(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    helper = helpers.Helper("heads", tmp_path / "mark")
    process = helper.process
    assert process is not None
    helper.give(job_of(cfg))
    monkeypatch.setattr("select.select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        helper.wait()
    assert process.poll() is not None and not (tmp_path / "mark").exists()


@pytest.mark.cluster
def test_helpers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Killed, with one helper at work and one without a job."""
    script = f"""
import time
from pathlib import Path
from dreamer_isaac import helpers
from dreamer_isaac.cli import compose
from tests.test_helpers import V3, job_of

one, other = (helpers.Helper("heads", Path("{tmp_path}/mark")) for _ in range(2))
one.give(job_of(compose(V3)))
print(one.process.pid, other.process.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout
    children = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(8)  # imported, and the one compiles
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    left = children
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = [c for c in left if Path(f"/proc/{c}").exists() and state_of(c) != "Z"]
    assert len(children) == 2 and not left


def state_of(pid: int) -> str:
    """R, S, Z, ...; Z also where it has just gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("options", [V3, V1])
@pytest.mark.parametrize("pixels", [None, (16, 16, 3)])
def test_records_are_laid_out_as_the_replay_buffer_s(
    options: list[str], pixels: tuple[int, int, int] | None
) -> None:
    cfg = compose(options)
    cfg.replay_buffer.size = 64
    job = job_of(cfg, pixels)
    generator = torch.Generator().manual_seed(0)
    replay = Replay(
        cfg.replay_buffer, 8, 5, 2, cfg.model, torch.device("cpu"), generator, pixels
    )  # fmt: skip
    mine = records(job, torch.device("cpu"))
    flags = torch.zeros(8, 8, dtype=torch.bool)
    rssm = Agent(5, 2, cfg.model, cfg.algo).rssm
    state = rssm.compress(torch.zeros(8, 8, rssm.state))  # as the collector hands it over
    stored = TensorDict(
        obs=torch.zeros(8, 8, 5), is_first=flags, action=torch.zeros(8, 8, 2),
        reward=torch.zeros(8, 8), terminated=flags, truncated=flags,
        belief=torch.zeros(8, 8, cfg.model.belief), state=state,
        version=torch.zeros(8, 8, dtype=torch.int32), batch_size=[8, 8],
    )  # fmt: skip
    if pixels:
        stored["pixels"] = torch.zeros(8, 8, *pixels, dtype=torch.uint8)
    replay.extend(stored)
    theirs = replay.sample()
    assert set(mine.keys()) <= set(theirs.keys())
    for name, one in mine.items():
        other = theirs[name]
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize(
    ("share", "options"), [("behaviour", V3), ("heads", V3), ("behaviour", V1)]
)
@pytest.mark.cluster
def test_what_a_helper_compiles_is_found_in_the_cache(share: str, options: list[str]) -> None:
    """The learner on a replay buffer, in a process of its own: nothing of the share is compiled."""
    script = f"""
import sys
from dreamer_isaac import helpers
from dreamer_isaac.cli import compose
from tests.test_helpers import job_of

cfg = compose({options})
helper = helpers._helpers["{share}"] = helpers.Helper("{share}", helpers.mark_of(cfg, "{share}"))
helpers.give(job_of(cfg))
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
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found = re.search(r"hits (\d+) of (\d+)", done.stdout)
    assert found and found[1] == found[2] != "0", done.stdout + done.stderr
