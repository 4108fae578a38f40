"""Metrics: `metrics.csv` always, TensorBoard or Weights & Biases on request; the progress line."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from dreamer_isaac.config import LoggerConfig


class Logger:
    """Writes one row of metrics per log point.

    Args:
        folder: the run folder. config: the resolved configuration, for Weights & Biases.
        frames: where the run goes on; what TensorBoard shows after it is about to be made again.
    """

    def __init__(self, folder: Path, cfg: LoggerConfig, config: dict[str, Any], frames: int = 0):
        self.folder, self.cfg = folder, cfg
        self.path = folder / "metrics.csv"
        self._tensorboard: Any = None
        self._wandb: Any = None
        if cfg.backend == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            path = folder / "tensorboard"
            again = frames + 1 if path.exists() else None  # also where a run began anew
            self._tensorboard = SummaryWriter(str(path), purge_step=again)
        elif cfg.backend == "wandb" and cfg.mode != "disabled":
            import wandb

            os.environ["WANDB_MODE"] = os.environ.get("WANDB_MODE", cfg.mode)
            self._wandb = wandb.init(
                project=cfg.project, dir=str(folder), config=config, name=folder.name,
                id=_run_id(folder), resume="allow",
            )  # fmt: skip

    def write(self, row: dict[str, float]) -> None:
        """Append a row; `frames` is its x axis. New columns may appear at any time."""
        columns = self._columns()
        new = [k for k in row if k not in columns]
        if new:
            self._rewrite(columns + new, self.rows())
            columns += new
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow([_text(row.get(k)) for k in columns])
        with open(self.path, "a") as f:  # one write: a kill leaves whole lines
            f.write(buffer.getvalue())
        step = int(row["frames"])
        if self._tensorboard:
            for k, v in row.items():
                self._tensorboard.add_scalar(k, v, step)
        if self._wandb:
            self._wandb.log(row, step=step)

    def rewind(self, frames: int) -> None:
        """Drop rows after `frames`, which are about to be made again, and half a last line, to
        which the next row would be joined."""
        rows = self.rows()
        kept = [r for r in rows if int(float(r["frames"])) <= frames]
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        if len(kept) < len(rows) or torn:
            self._rewrite(self._columns(), kept)

    def rows(self) -> list[dict[str, str]]:
        """Everything written so far; a line cut off by a kill is left out."""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as f:
            text = f.read()
        whole = text[: text.rfind("\n") + 1]
        table = list(csv.reader(io.StringIO(whole)))
        return [dict(zip(table[0], r, strict=True)) for r in table[1:] if len(r) == len(table[0])]

    def _columns(self) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as f:
            return next(csv.reader(f), [])

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".csv.partial")
        with open(temporary, "w", newline="") as f:
            writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path)

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)


def _run_id(folder: Path) -> str:
    """A name for the run that stays the same when it is resumed."""
    return "".join(c if c.isalnum() or c == "-" else "-" for c in "-".join(folder.parts[-2:]))


class Console:
    """Says things to the terminal and to `log.txt`; on a terminal also a live progress line."""

    def __init__(self, file: Path | None = None, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._file = open(file, "a") if file else None  # noqa: SIM115 (closed in close)
        self._shown = False

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        # A closed pipe (`... | head`) or a full disk must not end a training run, nor keep an error
        # from being told: what must be written is checkpoints, and they complain.
        with contextlib.suppress(OSError):
            print(text, file=self.stream, flush=True)
        self._log(text)

    def _log(self, text: str) -> None:
        if self._file:
            stamp = time.strftime("%H:%M:%S")
            with contextlib.suppress(OSError):
                for line in text.splitlines():
                    self._file.write(f"{stamp} {line}\n")
                self._file.flush()

    def progress(self, text: str, keep: bool) -> None:
        """The progress line: replaced in place on a terminal, a line of its own at log points
        (`keep`) elsewhere and in the log file."""
        if self.live:
            self._clear()
            with contextlib.suppress(OSError):
                width = os.get_terminal_size(self.stream.fileno()).columns
                print(text[: width - 1], end="", file=self.stream, flush=True)
            self._shown = True
        elif keep:
            with contextlib.suppress(OSError):
                print(text, file=self.stream, flush=True)
        if keep:
            self._log(text)

    def _clear(self) -> None:
        if self._shown:
            with contextlib.suppress(OSError):
                print("\r\033[K", end="", file=self.stream)
            self._shown = False

    def close(self) -> None:
        self._clear()
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()


def duration(seconds: float) -> str:
    """`95` -> `1m35s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
