"""torch.compile: what is done to a function, and how the first use is kept short."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import torch

from dreamer_isaac.config import OptimizationConfig


def as_it_is(f: Any) -> Any:
    """No change: the eager way."""
    return f


def compile_function(f: Any) -> Any:
    """torch.compile for one set of shapes; a graph break is an error."""
    return torch.compile(f, fullgraph=True, dynamic=False)


_starting: list[threading.Thread] = []


def start_compiler(device: torch.device, optimization: OptimizationConfig) -> None:
    """Import the compiler and start its worker processes in the background: seconds that would
    otherwise come with the first compilation. Nothing is compiled here, because compiling sets the
    global random generators back to where it began, under whatever draws from them meanwhile."""
    if device.type != "cuda" or optimization.compile.enabled == "false" or _starting:
        return

    def work() -> None:
        # Private parts of torch; where they have changed, the first update takes longer.
        with suppress(Exception):
            from torch._inductor import compile_fx  # noqa: F401
            from torch._inductor.async_compile import AsyncCompile

            AsyncCompile.warm_pool()

    _starting.append(threading.Thread(target=work, name="compiler", daemon=True))
    _starting[0].start()


def wait_for_compiler() -> None:
    """Comes before a CUDA graph is captured, so that nothing in the background uses the device."""
    for thread in _starting:
        thread.join()
