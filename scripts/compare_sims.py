"""The same policies on several simulators: does what was learned on one hold on another?

    python scripts/compare_sims.py runs/embedded runs/isaaclab \\
        --on mjlab --on isaaclab=/path/to/isaaclab/python env.num_envs=64 assets.offline=true

Every run is evaluated (`mode=evaluate`, deterministic) on every simulator, and random and zero
actions beside them. A simulator may need a Python of its own; `--on NAME` takes this one. Joints
are matched by name, so their order may differ. Prints a table and writes `compare_sims.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run folders or checkpoints, then key=value")
    parser.add_argument("--on", action="append", metavar="NAME[=PYTHON]", required=True,
                        help="a simulator (env.backend) and the Python that has it")  # fmt: skip
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_sims"))
    a = parser.parse_intermixed_args()
    overrides = [x for x in a.runs if "=" in x]
    runs = [x for x in a.runs if "=" not in x]
    if not runs:
        parser.error("name at least one run")
    pythons = {n: p or sys.executable for n, _, p in (x.partition("=") for x in a.on)}
    results: list[dict[str, Any]] = []
    names = [Path(r).name for r in runs]
    if len(set(names)) < len(names) or {"random", "zero"} & set(names):
        names = [r.strip("/").replace("/", "_") for r in runs]
    policies = dict(zip(names, runs, strict=True)) | {"random": "", "zero": ""}
    task = trained_on(runs[0])["task"]
    for label, run in policies.items():
        for backend, python in pythons.items():
            result = evaluate(
                label, run, backend, python, task, a.episodes, a.out, overrides, runs[0]
            )
            results.append(result)
            print(line(result), file=sys.stderr, flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "compare_sims.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results, list(pythons)))
    return 1 if any("error" in r for r in results) else 0


def trained_on(run: str) -> dict[str, Any]:
    """Task and simulator of a run from its checkpoint, and as overrides what a policy without a
    checkpoint has to be told: `env` anywhere, `changes` of the task where it was trained."""
    from dreamer_isaac import checkpoint
    from dreamer_isaac.config import leaves

    meta = checkpoint.read_meta(checkpoint.find(run))
    env = meta["config"]["env"]
    changes = [f"env.cfg.{k}={written(v)}" for k, v in leaves(env["cfg"]).items()]
    told = [f"env.action_bound={env['action_bound']}"]
    told += [f"env.import={env['import']}"] if env.get("import") else []
    return meta["task"] | {"env": told, "changes": changes}


def written(value: Any) -> str:
    """As Hydra reads it."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    from dreamer_isaac.cli import quoted

    return quoted(value)


def evaluate(
    label: str, run: str, backend: str, python: str, task: str, episodes: int, out: Path,
    overrides: list[str], first: str,
) -> dict[str, Any]:  # fmt: skip
    """One policy on one simulator; baselines play the task of the run `first`."""
    folder = out / f"{label}_on_{backend}"
    origin = trained_on(run or first)
    policy = [f"checkpoint={Path(run).resolve()}"] if run else [f"evaluation.policy={label}"]
    policy += origin["env"]
    if not run and origin["backend"] == backend:  # a trained policy takes its own
        policy += origin["changes"]
    command = [
        python, str(ROOT / "dreamer_isaac.py"), "mode=evaluate", f"env.backend={backend}",
        f"env.name={task}", f"evaluation.episodes={episodes}", "evaluation.video=false",
        f"run.dir={folder.resolve()}", *policy, *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    result: dict[str, Any] = {"policy": label, "on": backend}
    if run:
        result["trained_on"] = origin["backend"]
    summary = folder / "summary.json"
    if done.returncode or not summary.exists():
        tail = (done.stdout + done.stderr).strip().splitlines()[-5:]
        return result | {"error": "\n".join(tail) or f"exit code {done.returncode}"}
    read = json.loads(summary.read_text())
    return result | {
        "evaluation": read["evaluation"], "versions": read["versions"], "device": read["device"],
    }  # fmt: skip


def line(result: dict[str, Any]) -> str:
    return f"{result['policy']} on {result['on']}: {cell(result)}"


def cell(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"].splitlines()[-1]
    e = result["evaluation"]
    error = e["return_stderr"]
    return f"{e['return_mean']:.2f} +- " + ("-" if error is None else f"{error:.2f}")


def table(results: list[dict[str, Any]], backends: list[str]) -> str:
    """Policies down, simulators across, as Markdown."""
    rows = [f"| policy | trained on | {' | '.join(backends)} |", "|---" * (2 + len(backends)) + "|"]
    for policy in dict.fromkeys(r["policy"] for r in results):
        mine = {r["on"]: r for r in results if r["policy"] == policy}
        origin = next((r["trained_on"] for r in mine.values() if "trained_on" in r), "")
        cells = [cell(mine[b]) if "error" not in mine[b] else "failed" for b in backends]
        rows.append(f"| {policy} | {origin} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
