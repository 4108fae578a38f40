"""Dreamer's runs against PPO's: `python scripts/learning_curves.py benchmarks/results/<folder>`.

Reads `dreamer_<seed>/metrics.csv` (and `summary.json`) of dreamer_isaac.py and
`ppo_<seed>/curve.csv` (and `result.json`) of scripts/ppo.py; prints the comparison as Markdown and
draws `curves.png` there, dashed what has a `note` in its JSON file. Both curves are the mean return
of the last finished episodes with the exploration noise of training; the clocks start at the first
env step (Dreamer's a little before it, while the policy is compiled).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Curve:
    """A run: at `seconds[i]`, after `frames[i]`, the mean return was `returns[i]`."""

    seed: int
    seconds: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)
    returns: list[float | None] = field(default_factory=list)
    """None where no episode had ended yet; the last one where none has ended since."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    envs: int = 0
    """Of PPO's: how many collect; 0: not said."""
    length: float = 0.0
    """Of PPO's: steps of the last episodes, their mean."""
    note: str = ""
    """What a reader of the curve must know; drawn dashed."""

    def at(self, second: float) -> float | None:
        """The return at that time; None where the run had not begun to report, or had ended more
        than a tenth of that time before."""
        before = [i for i, s in enumerate(self.seconds) if s <= second]
        if not before or self.seconds[-1] < 0.9 * second:
            return None
        return self.returns[before[-1]]

    def reaches(self, level: float) -> float | None:
        """The frame at which the return is first that high."""
        pairs = zip(self.frames, self.returns, strict=True)
        return next((f for f, r in pairs if r is not None and r >= level), None)


def read(folder: Path, file: str, names: tuple[str, str, str], result: str) -> list[Curve]:
    """Every run's curve.

    Raises:
        SystemExit: there is none, or one of another program.
    """
    out = []
    for path in sorted(folder.glob(file)):
        curve = Curve(int(path.parent.name.rpartition("_")[2]))
        with open(path, newline="") as f:
            rows = csv.DictReader(f)
            if not set(names[:2]) <= set(rows.fieldnames or ()):
                raise SystemExit(f"error: {path} has no columns {names[0]} and {names[1]}")
            for row in rows:
                curve.seconds.append(float(row[names[0]]))
                curve.frames.append(float(row[names[1]]))
                known = row.get(names[2]) and float(row.get("episodes") or 0)
                last = curve.returns[-1] if curve.returns else None
                curve.returns.append(float(row[names[2]]) if known else last)
                curve.length = float(row.get("length") or 0) if known else curve.length
        if not curve.seconds:
            raise SystemExit(f"error: {path} has no rows")
        found = path.parent / result
        if found.exists():
            content = json.loads(found.read_text())
            curve.evaluation = content.get("evaluation", {})
            curve.envs = int(content.get("num_envs", 0))
            curve.note = content.get("note", "")
        out.append(curve)
    if not out:
        raise SystemExit(f"error: no {file} in {folder}")
    return out


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None


def shown(values: Sequence[float | None], digits: int = 1) -> str:
    """The mean, and every seed's."""
    middle = mean(values)
    if middle is None:
        return "-"
    each = ", ".join("-" if v is None else f"{v:,.{digits}f}" for v in values)
    return f"{middle:,.{digits}f} ({each})"


def compare(dreamer: list[Curve], ppo: list[Curve], seconds: float) -> str:
    """Markdown: returns at equal wall time, and frames for half of PPO's final return."""
    both = (("Dreamer", dreamer), ("PPO", ppo))
    noted = [f"{who} {c.seed} {c.note}." for who, curves in both for c in curves if c.note]
    lines = [
        f"Mean over seeds (Dreamer {', '.join(str(c.seed) for c in dreamer)}; PPO "
        f"{', '.join(str(c.seed) for c in ppo)}), in brackets every seed's.", *noted, "",
        "| | Dreamer | PPO | Dreamer / PPO |", "|---|---|---|---|",
    ]  # fmt: skip

    def row(
        what: str, a: Sequence[float | None], b: Sequence[float | None], digits: int = 1
    ) -> None:
        x, y = mean(a), mean(b)
        ratio = "-" if x is None or y is None or y <= 0 else f"{x / y:.2f}"
        lines.append(f"| {what} | {shown(a, digits)} | {shown(b, digits)} | {ratio} |")

    for share in (0.1, 0.25, 0.5, 1.0):
        time = share * seconds
        row(f"return after {time:,.0f} s", [c.at(time) for c in dreamer], [c.at(time) for c in ppo])
    runs = [c.evaluation for c in [*dreamer, *ppo]]
    if all(runs):
        ours, theirs = ([c.evaluation["return_mean"] for c in cs] for cs in (dreamer, ppo))
        row("final policy without noise", ours, theirs)
    ours, theirs = ([float(c.frames[-1]) for c in cs] for cs in (dreamer, ppo))
    row("frames in all", ours, theirs, digits=0)
    final = mean([c.at(seconds) for c in ppo])
    if final is None:
        lines += ["", f"PPO's runs are shorter than {seconds:,.0f} s."]
        return "\n".join(lines)
    if final <= 0:  # half of it would be better, not worse
        return "\n".join(lines)
    half = final / 2
    ours, theirs = ([c.reaches(half) for c in cs] for cs in (dreamer, ppo))
    row(f"frames to a return of {half:.1f}, half of PPO's final one", ours, theirs, digits=0)
    x, y = mean(ours), mean(theirs)
    if x and y and None not in ours:
        lines += ["", f"Dreamer needs {y / x:.1f} times fewer frames for that."]
        once = [round(c.envs * c.length) for c in ppo if c.envs]
        if once:
            lines += [
                f"(Episodes of {ppo[0].length:,.0f} steps in {ppo[0].envs:,} envs are {once[0]:,} "
                "frames: PPO with so many envs cannot show what it has learned much before, "
                "however fast it learns. With fewer envs it needs fewer frames.)"
            ]  # fmt: skip
    return "\n".join(lines)


def draw(dreamer: list[Curve], ppo: list[Curve], file: Path) -> None:
    """Returns against wall time and against frames."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time, frames) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for curves, colour, label in ((dreamer, "C1", "Dreamer"), (ppo, "C0", "PPO (rsl_rl)")):
        named: set[str] = set()
        for c in curves:
            name = f"{label}: {c.note}" if c.note else label
            style = {"color": colour, "lw": 1.2, "alpha": 0.8, "ls": "--" if c.note else "-",
                     "label": None if name in named else name}  # fmt: skip
            named.add(name)
            time.plot(c.seconds, c.returns, **style)
            frames.plot(c.frames, c.returns, **style)
    time.set_xlabel("seconds since the first env step")
    frames.set_xlabel("env frames")
    frames.set_xscale("log")
    time.set_ylabel("mean episode return, with exploration")
    for axes in (time, frames):
        axes.grid(alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0, help="wall time of the comparison")
    arguments = parser.parse_args()
    names = ("time/seconds", "frames", "episode/return")
    dreamer = read(arguments.folder, "dreamer_*/metrics.csv", names, "summary.json")
    ppo = read(arguments.folder, "ppo_*/curve.csv", ("seconds", "frames", "return"), "result.json")
    print(compare(dreamer, ppo, arguments.seconds))
    draw(dreamer, ppo, arguments.folder / "curves.png")


if __name__ == "__main__":
    main()
