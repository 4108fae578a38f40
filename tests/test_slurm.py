"""The Slurm script under a real Slurm: preempted, requeued, resumed, finished; cancelled; an
array."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TOY
from slurm import ENDED, Slurm, unpack

pytestmark = pytest.mark.cluster
SCRIPT = str(ROOT / "cluster" / "slurm" / "train.sbatch")
SMALL = ("--gres=none", "--cpus-per-task=2", "--mem=900")


def small(folder: Path) -> tuple[str, ...]:
    """Options of a job of this machine's size, whose runs are below `folder`."""
    return (*SMALL, f"--export=ALL,PROJECT={ROOT},OMP_NUM_THREADS=1,RUNS={folder / 'runs'}")


LONG = [o for o in TOY if not o.startswith(("collector.total_frames", "logger.interval"))] + [
    "collector.total_frames=400000", "logger.interval_frames=960",
    "checkpoint.interval_frames=9600", "evaluation.final=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """Installs it; that it cannot be installed is a failure, not a skip."""
    with Slurm(unpack(ROOT / ".venv" / "slurm")) as cluster:
        yield cluster


def frames(run: Path) -> list[int]:
    if not (run / "metrics.csv").exists():
        return []
    with open(run / "metrics.csv") as f:
        return [int(r["frames"]) for r in csv.DictReader(f) if r.get("frames")]


def test_preempted_requeued_resumed_finished(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("--partition=low", *small(tmp_path), SCRIPT, *LONG, cwd=tmp_path)
    run = tmp_path / "runs" / job
    slurm.wait(lambda: len(frames(run)) > 20, 120)
    (tmp_path / "high.sh").write_text("#!/bin/bash\nsleep 1\n")
    other = slurm.submit("--partition=high", "--cpus-per-task=2", "high.sh", cwd=tmp_path)
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", 60)
    before = frames(run)
    assert before[-1] < 400000  # in the middle
    slurm.wait(lambda: slurm.state(other) in ENDED, 60)
    slurm.wait(lambda: slurm.state(job) in ENDED, 240)
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert slurm.state(job) == "COMPLETED" and slurm.job(job)["ExitCode"] == "0:0", log
    assert "stopped by SIGTERM" in log and "saved and to be continued" in log
    assert f"resumed from {run}" in log and "start 2" in log
    after = frames(run)
    steps = [b - a for a, b in itertools.pairwise(after)]
    assert min(steps) > 0, "a row is there twice"
    assert max(steps) <= 960, "a row is missing"
    assert after[0] <= 960 and after[-1] == 400032  # whole batches of 96
    assert after[: len(before)] == before  # nothing was made again
    summary = json.loads((run / "summary.json").read_text())
    assert summary["frames"] == 400032 and summary["exit_reason"] == "finished"


def test_a_cancelled_job_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("--partition=low", *small(tmp_path), SCRIPT, *LONG, cwd=tmp_path)
    run = tmp_path / "runs" / job
    slurm.wait(lambda: len(frames(run)) > 5, 120)
    slurm.run("scancel", job)
    slurm.wait(lambda: slurm.state(job) in ENDED, 60)
    slurm.wait(lambda: not slurm.run("squeue", "-h"), 60)
    assert slurm.state(job) == "CANCELLED" and slurm.job(job)["Restarts"] == "0"
    assert (run / "checkpoints" / "latest").exists()


def test_an_array_trains_a_seed_a_task(slurm: Slurm, tmp_path: Path) -> None:
    short = [o for o in TOY if not o.startswith("evaluation.video")] + ["evaluation.final=false"]
    job = slurm.submit(
        "--partition=low", "--array=0-1", *small(tmp_path), SCRIPT, *short, cwd=tmp_path
    )
    slurm.wait(lambda: not slurm.run("squeue", "-h"), 180)
    for seed in (0, 1):
        config = (tmp_path / "runs" / f"{job}_{seed}" / "config.yaml").read_text()
        assert f"seed: {seed}" in config


def test_a_job_file_is_continued_by_its_id(slurm: Slurm, tmp_path: Path) -> None:
    from test_jobs import AS_TOY, job, write

    path = write(tmp_path / "asset" / "training" / "t.json", job("train"))
    number = slurm.submit(
        "--partition=low", *small(tmp_path), SCRIPT, *AS_TOY, f"job={path}", cwd=tmp_path
    )
    slurm.wait(lambda: slurm.state(number) in ENDED, 120)
    result = json.loads((tmp_path / "asset" / number / "result.json").read_text())
    assert result["status"] == "succeeded" and result["id"] == number


def test_a_container_without_pyxis_is_an_error(slurm: Slurm, tmp_path: Path) -> None:
    container = (f"--export=ALL,PROJECT={ROOT},CONTAINER=image",)
    job = slurm.submit("--partition=low", *SMALL, *container, SCRIPT, cwd=tmp_path)
    slurm.wait(lambda: slurm.state(job) in ENDED, 60)
    assert slurm.state(job) == "FAILED"
    assert "no --container-image (pyxis)" in (tmp_path / f"slurm-{job}.log").read_text()
