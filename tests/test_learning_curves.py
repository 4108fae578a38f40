"""The comparison of Dreamer's and PPO's runs, on curves whose answers are known."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import learning_curves
import ppo
import pytest
from conftest import ROOT, embedded


def write(folder: Path, header: str, rows: list[str], result: str, value: float) -> None:
    folder.mkdir()
    name = "metrics.csv" if "time/seconds" in header else "curve.csv"
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    (folder / result).write_text(json.dumps({"evaluation": {"return_mean": value}}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """PPO: 0.1 a second, 1000 frames a second. Dreamer: the same at 50 frames a second for seed 0,
    100 for seed 1; its rows come every ten seconds, the first without any episode."""
    for seed, rate in ((0, 50), (1, 100)):
        rows = ["0,0,,0"] + [f"{t * rate},{t},{t / 10},5" for t in range(10, 601, 10)]
        write(tmp_path / f"dreamer_{seed}", "frames,time/seconds,episode/return,episodes", rows,
              "summary.json", 80.0)  # fmt: skip
        rows = ["100,0.1,0.0,0"] + [f"{t * 1000},{t},{t / 10 + seed},9" for t in range(1, 602)]
        write(tmp_path / f"ppo_{seed}", "frames,seconds,return,episodes", rows,
              "result.json", 64.0)  # fmt: skip
    return tmp_path


def test_returns_and_frames_are_compared(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["learning_curves.py", str(runs)])
    learning_curves.main()
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if line[0:1] == "|"}
    assert cells["| return after 60 s"] == ["6.0 (6.0, 6.0)", "6.5 (6.0, 7.0)", "0.92 |"]
    assert cells["| return after 600 s"] == ["60.0 (60.0, 60.0)", "60.5 (60.0, 61.0)", "0.99 |"]
    assert cells["| final policy without noise"][-1] == "1.25 |"
    half = cells["| frames to a return of 30.2, half of PPO's final one"]
    assert half == ["23,250 (15,500, 31,000)", "298,000 (303,000, 293,000)", "0.08 |"]
    assert lines[-1] == "Dreamer needs 12.8 times fewer frames for that."
    assert (runs / "curves.png").stat().st_size > 5000


def test_rows_without_a_finished_episode_still_take_time(runs: Path) -> None:
    """A run's end is its last row, not the last one in which an episode ended."""
    write(runs / "dreamer_9", "frames,time/seconds,episode/return,episodes",
          ["1000,100,,", "2000,200,7.5,3", "3000,600,,0"], "summary.json", 1.0)  # fmt: skip
    names = ("time/seconds", "frames", "episode/return")
    curve = learning_curves.read(runs, "dreamer_9/metrics.csv", names, "summary.json")[0]
    assert curve.frames[-1] == 3000 and curve.at(600) == 7.5 and curve.at(150) is None
    assert curve.reaches(7.0) == 2000
    learning_curves.draw([curve], [curve], runs / "drawn.png")
    text = learning_curves.compare([curve], [curve], 600.0)
    assert "| frames in all | 3,000 (3,000) |" in text
    result = runs / "ppo_0" / "result.json"
    noted = {**json.loads(result.read_text()), "note": "shared its GPU"}
    result.write_text(json.dumps(noted))
    names = ("seconds", "frames", "return")
    shared = learning_curves.read(runs, "ppo_*/curve.csv", names, "result.json")
    assert "\nPPO 0 shared its GPU.\n" in learning_curves.compare([curve], shared, 600.0)
    learning_curves.draw([curve], shared, runs / "drawn.png")
    write(runs / "other_0", "a,b", ["1,2"], "result.json", 1.0)
    with pytest.raises(SystemExit, match="no columns"):
        learning_curves.read(runs, "other_0/curve.csv", names, "")


def test_a_run_that_is_too_short_is_not_compared(runs: Path) -> None:
    dreamer = learning_curves.read(
        runs, "dreamer_*/metrics.csv", ("time/seconds", "frames", "episode/return"), "summary.json"
    )
    ppo = learning_curves.read(
        runs, "ppo_*/curve.csv", ("seconds", "frames", "return"), "result.json"
    )
    text = learning_curves.compare(dreamer, ppo, 700.0)
    assert "| return after 700 s | - | - | - |" in text
    assert "PPO's runs are shorter than 700 s." in text
    assert dreamer[0].reaches(61.0) is None
    with pytest.raises(SystemExit, match=r"no ppo_\*/curve.csv"):
        learning_curves.read(runs / "ppo_0", "ppo_*/curve.csv", ("seconds", "frames", "return"), "")


@pytest.mark.parametrize("num_envs", [1, 8, 4096, 65536])
def test_ppo_takes_any_number_of_envs(num_envs: int) -> None:
    """The default one too: what is checked for Dreamer must not refuse the yardstick."""
    assert ppo.configuration("Isaac-Ant-v0", num_envs, seed=3).env.num_envs == num_envs


@pytest.mark.cluster
@embedded
def test_ppo_writes_its_curve_and_a_result(tmp_path: Path) -> None:
    """The yardstick still runs on the installed rsl_rl; it takes a minute."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts/ppo.py"), "--num-envs", "8", "--seconds", "1",
         "--device", "cpu", "--seed", "3", "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not run.returncode, run.stderr
    with open(tmp_path / "curve.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    result = json.loads((tmp_path / "result.json").read_text())
    assert [int(row["frames"]) for row in rows] == [256 * (i + 1) for i in range(len(rows))]
    assert 1.0 < result["seconds"] == pytest.approx(float(rows[-1]["seconds"]), abs=1e-3)
    assert (result["seed"], result["evaluation"]["episodes"]) == (3, 8)
    assert 0.0 < result["evaluation"]["return_mean"] < 100.0
