"""Where the time goes: phases of the update and of the collector, and a trace, for one log window.

Off by default and then without cost. An update that is captured in a CUDA graph has no host code
while it runs; its phases are timed by events that are part of the graph.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Mark = tuple[str, Any, Any]
"""A phase, its start and its end: events, or seconds on a CPU."""


class Phases:
    """Times named phases on one device. `enabled=False` makes every method do nothing.

    Args:
        device: whose time is measured: its current stream's, where there are streams.
    """

    def __init__(self, device: torch.device, enabled: bool = True):
        self.device, self.enabled = device, enabled
        self.counting = False
        """Whether `add` adds: only within the window."""
        self.marks: list[Mark] = []
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Everything enqueued (on a CPU: done) inside counts as `name`."""
        if not self.enabled:
            yield
            return
        start = self._now()
        yield
        self.marks.append((name, start, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        # An event that a graph records belongs to the graph unless it is declared external.
        outside: dict[str, Any] = {}
        if torch.cuda.is_current_stream_capturing():
            outside["external"] = True
        event = torch.cuda.Event(enable_timing=True, **outside)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def take(self) -> list[Mark]:
        """The phases since the last call."""
        marks, self.marks = self.marks, []
        return marks

    def add(self, marks: list[Mark]) -> None:
        """Count these phases; waits for the device to reach them."""
        if not self.counting or not marks:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for name, start, end in marks:
            spent = end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1000
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.calls[name] = self.calls.get(name, 0) + 1

    def rows(self, label: str, wall: float) -> list[tuple[str, str, int, float, float]]:
        """Label, phase, calls, milliseconds a call, share of `wall` seconds; the longest first."""
        return [
            (label, name, self.calls[name], 1000 * spent / self.calls[name], spent / wall)
            for name, spent in sorted(self.seconds.items(), key=lambda kv: -kv[1])
        ]


class Profiler:
    """One window of a run: from the first log point with an update behind it to the next.

    Args:
        folder: gets `phases.md` and `trace.json.gz`. parts: name -> what is timed there.
        traced: updates in the trace, the first of the window; all of them would be gigabytes.
    """

    def __init__(self, folder: Path, parts: dict[str, Phases], traced: int):
        self.folder, self.parts, self.traced = folder, parts, traced
        self.state = "before"
        self._first: int | None = None  # updates at the first log point: a resumed run has some
        self._trace: Any = None
        self._began = 0.0
        self._updates = 0
        self._lost = 0.0  # seconds of the window that went into writing the trace

    def log_point(self, updates: int, last: bool = False) -> str | None:
        """Call at every log point, `last` where the run ends with it; the table when the window has
        just ended."""
        if self._first is None:
            self._first = updates
        if self.state == "before" and updates > self._first and not last:
            self.state, self._began, self._updates = "window", time.perf_counter(), updates
            for phases in self.parts.values():
                phases.counting = True
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU]
            if any(p.device.type == "cuda" for p in self.parts.values()):
                activities.append(ProfilerActivity.CUDA)
            self._trace = profile(activities=activities)
            self._trace.__enter__()
        elif self.state == "window" and updates > self._updates:
            self._end_trace()
            self.state = "after"
            wall = time.perf_counter() - self._began - self._lost
            for phases in self.parts.values():
                phases.counting = False
            return self._write(wall, updates - self._updates)
        return None

    def updated(self, updates: int) -> None:
        """Call after every update: ends the trace when it has enough."""
        if self.state == "window" and updates - self._updates >= self.traced:
            self._end_trace()

    def close(self) -> str | None:
        """The run is over; a window that had not ended gets its trace but no table. Returns why
        there is no table, where there is none."""
        self._end_trace()
        for phases in self.parts.values():
            phases.counting = False
        if self.state == "after":
            return None
        return ("no table of phases: the run ended before two log points with updates between "
                "them. Remedy: a longer run, or a smaller logger.interval_frames.")  # fmt: skip

    def _end_trace(self) -> None:
        begin = time.perf_counter()
        if self._trace is not None:
            self._trace.__exit__(None, None, None)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._trace.export_chrome_trace(str(self.folder / "trace.json.gz"))
            self._trace = None
        self._lost += time.perf_counter() - begin

    def _write(self, wall: float, updates: int) -> str:
        lines = [
            f"{wall:.1f} s of wall time, {updates:,} updates. Times are the devices'; phases of",
            "one device may overlap where it has several streams. `trace.json.gz` has the first "
            f"{min(updates, self.traced)} updates.",
            "", "| where | phase | calls | ms a call | of the wall time |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for label, phases in self.parts.items():
            for where, name, calls, ms, share in phases.rows(label, wall):
                lines.append(f"| {where} | {name} | {calls:,} | {ms:.3f} | {share:.1%} |")
        text = "\n".join(lines) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "phases.md").write_text(text)
        return text
