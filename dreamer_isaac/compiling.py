"""torch.compile: what is done to a function, and how the first use is kept short."""

from __future__ import annotations

import threading
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
    """Compile something small in the background. The first compilation of a process imports the
    compiler, fills its table of patterns and starts its worker processes, seconds that would
    otherwise come after the networks are built and not while they are."""
    if device.type != "cuda" or optimization.compile.enabled == "false" or _starting:
        return

    def work() -> None:
        x = torch.ones(16, 16, device=device, requires_grad=True)
        torch.compile(lambda x: (x @ x).relu().sum(-1), dynamic=False)(x).sum().backward()

    _starting.append(threading.Thread(target=work, name="compiler", daemon=True))
    _starting[0].start()


def wait_for_compiler() -> None:
    """Must come before a CUDA graph is captured: compiling sets the random state of the device,
    which fails, in both threads, while one of them captures."""
    for thread in _starting:
        thread.join()
