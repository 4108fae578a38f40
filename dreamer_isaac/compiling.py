"""torch.compile: what is done to a function, and how the first use is kept short."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import torch

from dreamer_isaac import helpers
from dreamer_isaac.config import Config, OptimizationConfig

only: frozenset[str] | None = None
"""In a helper (helpers.py): the names of the functions that are compiled here."""


def as_it_is(f: Any) -> Any:
    """No change: the eager way."""
    return f


def compile_function(f: Any) -> Any:
    """torch.compile for one set of shapes; a graph break is an error. Where another process
    compiles this function, the first call waits until it has."""
    if only is not None and f.__name__ not in only:
        return f
    compiled: Any = torch.compile(f, fullgraph=True, dynamic=False)
    helper = helpers.helper_of(f.__name__)
    if helper is None:
        return compiled

    def waiting(*args: Any, **kwargs: Any) -> Any:
        helper.wait()
        return compiled(*args, **kwargs)

    return waiting


_starting: list[threading.Thread] = []


def start_compiler(device: torch.device, optimization: OptimizationConfig) -> None:
    """Import the compiler and start its worker processes in the background: seconds that would
    otherwise come with the first compilation. Nothing is compiled here, because compiling sets the
    global random generators back to where it began, under whatever draws from them meanwhile."""
    if device.type != "cuda" or optimization.compile.enabled == "false" or _starting:
        return

    _starting.append(threading.Thread(target=import_compiler, name="compiler", daemon=True))
    _starting[0].start()


def import_compiler() -> None:
    """Import the compiler and start its worker processes."""
    # Private parts of torch; where they have changed, the first update takes longer.
    with suppress(Exception):
        from torch._inductor import compile_fx  # noqa: F401
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.warm_pool()
        AsyncCompile.use_process_pool()  # the workers come with the first job: an empty one


MEMORY = 0.25
"""Part of the GPU's free memory that a helper may take."""
LEAST = 2**30
"""Bytes without which none of them would come far."""


def hand_over(
    cfg: Config, observation: int, action: int, pixels: tuple[int, int, int] | None,
    reward_multiplier: float, device: torch.device, reserved: float = 0.0,
) -> None:  # fmt: skip
    """Let the helpers begin: the networks' widths and the learner's device are known.

    Args:
        reserved: GiB of the device that the replay buffer will take.
    """
    memory = 0.0
    if device.type == "cuda":
        memory = MEMORY * (torch.cuda.mem_get_info(device)[0] - reserved * 2**30)
    if memory < LEAST:
        helpers.stop()
        return
    rb = cfg.replay_buffer
    helpers.give(helpers.Job(
        cfg.model, cfg.algo, cfg.optimization, observation, action, pixels,
        rb.batch_size // rb.batch_length, rb.batch_length, reward_multiplier, str(device), memory,
        str(getattr(torch.backends.cuda.matmul, "fp32_precision", "")),
    ))  # fmt: skip


def wait_for_compiler() -> None:
    """Comes before a CUDA graph is captured, so that nothing in the background uses the device."""
    for thread in _starting:
        thread.join()
