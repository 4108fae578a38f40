"""The benchmarks' command lines, small, and the README's table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench as program
import pytest
import results
import torch._dynamo.utils
from conftest import embedded

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["size=tiny", "env.num_envs=8", "evaluation.num_envs=0", "replay_buffer.size=2000",
         "replay_buffer.batch_size=32", "replay_buffer.batch_length=8", "algo.horizon=3",
         "collector.frames_per_batch=32", "collector.init_random_frames=400"]  # fmt: skip


def bench(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments], capture_output=True,
        text=True, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = done.stdout.splitlines()  # nothing else
    return json.loads(line)


@pytest.mark.parametrize("algo", ["dreamer_v3", "dreamer_v1"])
def test_learner_beside_torchrl(algo: str) -> None:
    v1 = ["algo=dreamer_v1", "model.belief=16", "model.hidden=16", "model.units=16"]
    more = v1 if algo == "dreamer_v1" else []
    overrides = [x for x in SMALL if not (more and x.startswith("size"))]
    out = bench("learner", *more, *overrides, "--updates", "2", "--blocks", "2", "--compare",
                "--observation", "7", "--action", "3")  # fmt: skip
    assert out["work"]["algo"] == algo and out["work"]["B"] == 4 and out["work"]["T"] == 8
    assert out["update_ms"]["median"] > 0 and out["torchrl"]["update_ms"]["median"] > 0
    ratio = out["torchrl"]["update_ms"]["median"] / out["update_ms"]["median"]
    assert out["torchrl"]["times_slower"] == pytest.approx(ratio, rel=0.02, abs=0.01)
    assert out["command"].startswith("python scripts/bench.py learner") and out["versions"]["torch"]


def test_where_the_compiler_s_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.utils, "compilation_time_metrics", {})
    assert program.compile_seconds() == {}
    x = torch.ones(3, requires_grad=True)
    # Without the compiler's second half, which takes half a minute on a CPU.
    torch.compile(lambda x: x.sin().sum(), backend="aot_eager")(x).backward()
    after = program.compile_seconds()
    assert {"forward", "tracing", "differentiating"} <= set(after) <= set(program.PARTS)
    assert 0 < after["forward"] >= after["tracing"] + after["differentiating"] - 0.02, after


def test_replay() -> None:
    out = bench("replay", *SMALL, "--updates", "2", "--blocks", "2")
    assert min(out[f"{k}_ms"]["median"] for k in ("extend", "sample", "refresh")) > 0
    assert out["work"]["records"] == 2000


@embedded
@pytest.mark.cluster
def test_pipeline_counts_both_sides() -> None:
    # More random frames than the ring has room for: a full one will do.
    out = bench("pipeline", *SMALL, "collector=thread", "optimization.replay_ratio_floor=0",
                "collector.init_random_frames=4000", "--seconds", "2", "--blocks", "2")  # fmt: skip
    for key in ("collect/frames_per_second", "both/frames_per_second", "both/updates_per_second",
                "learn/updates_per_second"):  # fmt: skip
        assert out[key]["median"] > 0
    assert out["work"]["collector"] == "Thread" and out["both/resources"]["threads"][-1] > 1


def test_memory_is_measured_with_overrides_and_says_what_went_wrong() -> None:
    script = [sys.executable, "scripts/measure_memory.py", "--task", "Isaac-Toy-v0"]
    run = {"capture_output": True, "text": True, "cwd": ROOT}
    done = subprocess.run([*script, "--envs", "4", "8", "replay_buffer.sice=3"], **run)  # type: ignore[call-overload]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["envs"] for f in found] == [4, 8], done.stderr
    assert all("replay_buffer.sice" in f["error"] for f in found), found
    done = subprocess.run([*script, "--envs", "four"], **run)  # type: ignore[call-overload]
    assert done.returncode == 2 and "'four' is no number of envs" in done.stderr


def test_the_table_is_what_the_results_say(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(results.START)[1].split(results.END)[0].strip()
    assert shown == results.table(ROOT / "benchmarks" / "results")
    assert shown.count("\n") > 2
    line = {
        "bench": "learner", "date": "2026-01-02", "commit": "abc", "cache": "cold",
        "work": {"algo": "dreamer_v3", "size": "12m", "B": 16, "T": 64},
        "update_ms": {"median": 8.0}, "transitions_per_second": 128000,
        "process_start_to_first_update_seconds": 61.4, "hardware": {"gpu": "NVIDIA X", "gpus": 1},
    }  # fmt: skip
    newer = line | {"date": "2026-01-03", "update_ms": {"median": 7.0}, "cache": "warm",
                    "process_start_to_first_update_seconds": 20.2, "commit": "def"}  # fmt: skip
    slow = line | {"work": line["work"] | {"B": 256}, "outdated": "mended since"}
    eager = newer | {"work": line["work"] | {"cudagraph": "false"}, "date": "2026-02-01"}
    wide = newer | {"work": line["work"] | {"observation": 2000}, "date": "2026-02-01"}
    lines = (newer, line, slow, eager, wide)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = results.table(tmp_path).splitlines()
    assert len(rows) == 3 and "7.00 ms" in rows[2]
    assert "61 s with a cold cache (abc), 20 s with a warm cache" in rows[2]
