"""The phase table and the trace."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from dreamer_isaac import cli
from dreamer_isaac.profiling import Phases, Profiler

LEARNER = {"sample", "observe forward", "world model's heads", "imagination", "actor and critic",
           "observe backward", "optimizer", "write-back"}  # fmt: skip


@pytest.mark.parametrize("collector", ["sync", "thread"])
def test_a_profiled_run_writes_phases_and_a_trace(
    toy_overrides: list[str], tmp_path: Path, collector: str
) -> None:
    overrides = [*toy_overrides, f"run.dir={tmp_path}", "evaluation.final=false",
                 f"collector={collector}", "profiling.enabled=true"]  # fmt: skip
    assert cli.run(overrides) == 0
    lines = (tmp_path / "profile" / "phases.md").read_text().splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    rows = {(c[0], c[1]): c for c in cells[2:]}
    assert {phase for where, phase in rows if where == "learner"} == LEARNER
    assert {("collector", "policy step"), ("collector", "env step"), ("buffer", "extend")} <= set(
        rows
    )
    for row in rows.values():
        assert int(row[2].replace(",", "")) > 0 and float(row[3]) > 0
    # One device, one thread: the parts cannot take longer than the whole.
    if collector == "sync":
        assert sum(float(row[4].rstrip("%")) for row in rows.values()) <= 100.5
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as f:
        names = {event.get("name", "") for event in json.load(f)["traceEvents"]}
    assert any("addmm" in name for name in names)


def test_the_trace_has_as_many_updates_as_it_says(
    toy_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a turn of the loop makes several."""
    ended: list[int] = []
    updated = Profiler.updated

    def watch(self: Profiler, updates: int) -> None:
        tracing = self._trace is not None
        updated(self, updates)
        if tracing and self._trace is None:
            ended.append(updates - self._updates)

    monkeypatch.setattr(Profiler, "updated", watch)
    overrides = [*toy_overrides, f"run.dir={tmp_path}", "evaluation.final=false",
                 "optimization.replay_ratio=2", "profiling.enabled=true",
                 "profiling.updates=1"]  # fmt: skip
    assert cli.run(overrides) == 0
    assert ended == [1]
    assert "has the first 1 updates" in (tmp_path / "profile" / "phases.md").read_text()


def test_a_run_that_is_not_profiled_writes_nothing(
    toy_overrides: list[str], tmp_path: Path
) -> None:
    overrides = [*toy_overrides, f"run.dir={tmp_path}", "evaluation.final=false"]
    assert cli.run([*overrides, "collector.total_frames=480"]) == 0
    assert not (tmp_path / "profile").exists()


def test_a_run_too_short_for_a_window_says_so(toy_overrides: list[str], tmp_path: Path) -> None:
    overrides = [*toy_overrides, f"run.dir={tmp_path}", "evaluation.final=false"]
    assert cli.run([*overrides, "profiling.enabled=true", "collector.total_frames=288"]) == 0
    assert "logger.interval_frames" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "profile" / "phases.md").exists()


def test_phases_count_only_in_their_window() -> None:
    phases = Phases(torch.device("cpu"))
    for window in (False, True, True):
        phases.counting = window
        with phases("sleep"):
            time.sleep(0.02)
        phases.add(phases.take())
    assert phases.calls == {"sleep": 2} and 0.04 <= phases.seconds["sleep"] < 1
    off = Phases(torch.device("cpu"), enabled=False)
    with off("sleep"):
        pass
    assert off.take() == []
