"""How much GPU memory a number of envs takes: one JSON line for each.

    python scripts/measure_memory.py --task Isaac-Ant-v0 --envs 256 1024 4096 [key=value ...]

Each number runs in a process of its own (scripts/bench.py pipeline), which collects and learns for
a few seconds; what the GPU has in use then, everything included, is what counts. One that does not
fit says so, and the next is tried.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def measure(task: str, envs: int, overrides: list[str], seconds: float) -> dict[str, Any]:
    """One number of envs; an `error` where it does not run."""
    steps = 8
    command = [
        sys.executable, str(ROOT / "scripts" / "bench.py"), "pipeline", f"env.name={task}",
        f"env.num_envs={envs}", "evaluation.num_envs=0", "collector=sync",
        f"collector.frames_per_batch={steps * envs}", "--phases", "both", "--blocks", "1",
        "--seconds", str(seconds), *overrides,
    ]  # fmt: skip
    names = {o.partition("=")[0] for o in overrides}
    if "collector.init_random_frames" not in names:
        command.append(f"collector.init_random_frames={72 * envs}")
    if "replay_buffer.size" not in names:
        command.append(f"replay_buffer.size={max(500_000, 144 * envs)}")
    done = subprocess.run(command, capture_output=True, text=True)
    result: dict[str, Any] = {"task": task, "envs": envs}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tail = (done.stderr or done.stdout).strip().splitlines()
        return result | {"error": tail[-1] if tail else f"exit code {done.returncode}"}
    read = json.loads(lines[-1])
    used = read["both/resources"]
    return result | {
        "device_mib": max(used["device_mib"]) if "device_mib" in used else None,
        "rss_mib": max(used["rss_mib"]),
        "frames_per_second": read["both/frames_per_second"]["median"],
        "hardware": read["hardware"], "versions": read["versions"], "command": read["command"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--task", default="Isaac-Ant-v0")
    parser.add_argument("--envs", nargs="+", default=["256", "1024", "4096", "16384"])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("overrides", nargs="*", help="key=value, as for dreamer_isaac.py")
    arguments = parser.parse_args()
    # Overrides that follow the numbers are among them.
    overrides = arguments.overrides + [x for x in arguments.envs if "=" in x]
    numbers = [x for x in arguments.envs if "=" not in x]
    odd = [x for x in numbers if not x.isdigit()]
    if odd:
        parser.error(f"argument --envs: {odd[0]!r} is no number of envs")
    for envs in map(int, numbers):
        found = measure(arguments.task, envs, overrides, arguments.seconds)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
