"""scripts/compare_sims.py with the toy simulator on both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_policies_down_and_simulators_across(
    program: Callable[..., subprocess.CompletedProcess[str]], toy_overrides: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    done = program(*toy_overrides, "evaluation.final=false")
    assert done.returncode == 0, done.stdout + done.stderr
    run = toy_overrides[-1].split("=", 1)[1]
    command = [sys.executable, str(ROOT / "scripts" / "compare_sims.py"), run, "--on", "toy",
               "--on", f"isaaclab={sys.executable}", "--episodes", "12", "--out",
               str(tmp_path / "out"), "env.num_envs=12"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "compare_sims.json").read_text())
    assert [(r["policy"], r["on"]) for r in results] == [
        (p, on) for p in ("run", "random", "zero") for on in ("toy", "isaaclab")
    ]
    for r in results:
        if r["on"] == "toy":
            assert r["evaluation"]["episodes"] == 12 and r["versions"]["torch"]
        else:
            assert "Isaac Lab cannot be imported here" in r["error"]
    rows = done.stdout.splitlines()
    assert rows[0] == "| policy | trained on | toy | isaaclab |"
    mean = results[0]["evaluation"]["return_mean"]
    assert rows[2].startswith(f"| run | toy | {mean:.2f} +- ") and rows[2].endswith("| failed |")
    assert done.returncode == 1  # something failed
