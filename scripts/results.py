"""The README's table of figures, generated from the runs in `benchmarks/results/*.jsonl`.

    python scripts/results.py            print it
    python scripts/results.py --write    put it into README.md
    python scripts/results.py --check    fail if README.md says something else

A line of such a file is what `bench.py` printed, with `date`, `commit` and, for the learner's
start, `cache` (cold or warm) added. Of runs of the same work on the same hardware the last counts;
one that is `outdated` (the reason why) is not shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- figures: scripts/results.py -->", "<!-- end of figures -->"


def load(folder: Path) -> list[dict[str, Any]]:
    """Every result, with the file it is from."""
    out = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if line.strip():
                out.append(json.loads(line) | {"file": path.name})
    return out


USUAL = {"kernels": "auto", "compile": "auto", "cudagraph": "auto", "observation": 48, "action": 12}
"""What the table is of; other values are comparisons of their own, not the product's figures."""


def identity(result: dict[str, Any]) -> tuple:
    """Results with the same one replace each other."""
    w, h = result["work"], result["hardware"]
    names = ("algo", "size", "B", "T", "H", "task", "envs", "autocast", "frames_per_batch")
    work = tuple(w.get(k) for k in names) + tuple(w.get(k, v) for k, v in USUAL.items())
    gpus = h["gpus"] if result["bench"] in ("pipeline", "collect") else 1  # the others use one
    return (result["bench"], *work, h["gpu"], gpus)


def newest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of each kind; a learner's first update may come from a run of its own."""
    kept: dict[tuple, dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: r["date"]):  # stable: later lines win
        key = identity(result)
        starts = kept.get(key, {}).get("starts", {})
        seconds = result.get("process_start_to_first_update_seconds")
        if seconds and result.get("cache"):
            starts = starts | {result["cache"]: (seconds, result["commit"])}
        kept[key] = result | {"starts": starts}
    return list(kept.values())


def thousands(value: float) -> str:
    return f"{value / 1000:,.0f}k" if value >= 10_000 else f"{value:,.0f}"


def describe(r: dict[str, Any]) -> tuple[str, str, str]:
    """Work, hardware and result in words."""
    w, h = r["work"], r["hardware"]
    gpus = 2 if r["bench"] == "pipeline" and w["sim"] != w["learn"] else 1
    hardware = f"{gpus} x {h['gpu'].removeprefix('NVIDIA ')}" if h["gpu"] else "CPU"
    name = {"dreamer_v3": "V3", "dreamer_v1": "V1"}[w.get("algo", "dreamer_v3")]
    size = "" if name == "V1" else f" {w['size']}"
    work = f"{name}{size}, batch {w['B']} x {w['T']}"
    if r["bench"] == "learner":
        ms = r["update_ms"]["median"]
        text = f"{ms:.2f} ms an update, {thousands(r['transitions_per_second'])} trained steps/s"
        if "torchrl" in r:
            theirs = r["torchrl"]
            text += (f"; TorchRL in the same run {theirs['update_ms']['median']:.1f} ms "
                     f"({theirs['times_slower']:.1f} times slower)")  # fmt: skip
        starts = [
            f"{seconds:.0f} s with a {cache} cache"
            + ("" if commit == r["commit"] else f" ({commit})")
            for cache, (seconds, commit) in sorted(r["starts"].items())
        ]
        if starts:
            text += f"; first update after {', '.join(starts)}"
        return f"one update: {work}", hardware, text
    if r["bench"] == "pipeline":

        def rate(phase: str, what: str) -> float:
            return r[f"{phase}/{what}_per_second"]["median"]

        text = (
            f"together {thousands(rate('both', 'frames'))} frames/s and "
            f"{rate('both', 'updates'):.1f} updates/s; the collector alone "
            f"{thousands(rate('collect', 'frames'))}, the learner alone "
            f"{rate('learn', 'updates'):.1f}"
        )
        return f"collect and learn: {w['task']}, {w['envs']} envs, {work}", hardware, text
    if r["bench"] == "collect":
        rate_ = r["collect/frames_per_second"]["median"]
        return f"collect: {w['task']}, {w['envs']} envs", hardware, f"{thousands(rate_)} frames/s"
    parts = ", ".join(
        f"{k} {r[f'{k}_ms']['median']:.2f} ms" for k in ("extend", "sample", "refresh")
    )
    return f"replay buffer: {w['envs']} envs, {w['records']:,} records", hardware, parts


def table(folder: Path) -> str:
    """The table as Markdown."""
    rows = ["| work | hardware | result | run |", "|---|---|---|---|"]
    order = {"learner": 0, "pipeline": 1, "collect": 2, "replay": 3}
    shown = [r for r in newest(load(folder)) if r["hardware"]["gpu"] and "outdated" not in r]
    shown = [r for r in shown if all(r["work"].get(k, v) == v for k, v in USUAL.items())]
    for r in sorted(shown, key=lambda r: (order[r["bench"]], describe(r))):
        work, hardware, text = describe(r)
        source = f"[{r['date']}, {r['commit']}](benchmarks/results/{r['file']})"
        rows.append(f"| {work} | {hardware} | {text} | {source} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = table(ROOT / "benchmarks" / "results")
    readme = ROOT / "README.md"
    if not (arguments.write or arguments.check):
        print(text)
        return 0
    before = readme.read_text()
    head, rest = before.split(START)
    after = f"{head}{START}\n{text}\n{END}{rest.split(END)[1]}"
    if arguments.check and after != before:
        print("README.md is not what benchmarks/results says: python scripts/results.py --write")
        return 1
    if arguments.write:
        readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
