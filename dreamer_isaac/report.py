"""One HTML page of an evaluation that opens anywhere: pictures and videos are inside."""

from __future__ import annotations

import base64
import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from dreamer_isaac.config import Config
from dreamer_isaac.evaluate import shown

LARGEST = 24 << 20
"""Videos of more bytes are named and not included."""

TEMPLATE = Path(__file__).with_name("report.html.j2")


def _inside(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def page(
    cfg: Config, backend: str, evaluation: dict[str, Any], pictures: list[Path],
    videos: list[Path], trained: tuple[int, int] | None = None,
) -> str:  # fmt: skip
    """The page.

    Args:
        evaluation: as `Episodes.summary` and the world model's figures. pictures: PNG files.
        videos: mp4 files. trained: frames and updates of the policy.
    """
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text())
    return template.render(
        task=cfg.env.name, policy=cfg.evaluation.policy, checkpoint=cfg.checkpoint.path,
        backend=backend, seed=cfg.env.seed, e=evaluation, trained=trained,
        shown=shown, date=datetime.date.today().isoformat(),
        pictures=[(p.stem.replace("_", " "), _inside(p)) for p in pictures],
        videos=[
            (v.name, _inside(v) if v.stat().st_size <= LARGEST else "") for v in videos
        ],
    )  # fmt: skip
