"""Benchmarks: one JSON line a result.

    python scripts/bench.py learner [key=value ...]     one update, sampling and write-back included

The work is the configuration's (`experiment=bench_12m` is the size that others publish), on random
data of the given widths. Times are medians over blocks of updates, after warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from typing import Any

START = time.monotonic()


def process_seconds() -> float:
    """Seconds since this process was started, by the kernel's clock."""
    try:
        with open("/proc/self/stat") as f:
            ticks = int(f.read().rsplit(")", 1)[1].split()[19])
        with open("/proc/uptime") as f:
            return float(f.read().split()[0]) - ticks / 100
    except (OSError, ValueError, IndexError):
        return time.monotonic() - START


def hardware(torch: Any, device: Any) -> dict[str, Any]:
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "gpu": gpu, "gpus": torch.cuda.device_count(), "cpu_threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {
        "median": round(statistics.median(values), 4), "min": round(min(values), 4),
        "max": round(max(values), 4), "blocks": len(values),
    }  # fmt: skip


def learner(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time of one update, and of its parts where asked for."""
    from dreamer_isaac.cli import compose

    cfg = compose(arguments.overrides)
    import torch
    from tensordict import TensorDict

    from dreamer_isaac.learner import Learner
    from dreamer_isaac.main import versions
    from dreamer_isaac.models import Agent
    from dreamer_isaac.replay import Replay

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    torch.manual_seed(0)
    widths = arguments.observation, arguments.action
    agent = Agent(*widths, cfg.model, cfg.algo).to(device)
    generators = [torch.Generator(device=device).manual_seed(i) for i in range(2)]
    trainer = Learner(agent, cfg.algo, cfg.optimization, generators[0])
    replay = Replay(cfg.replay_buffer, cfg.env.num_envs, *widths, cfg.model, device, generators[1])
    shape = (cfg.env.num_envs, 256)
    while len(replay) < replay.steps * cfg.env.num_envs:  # a full ring
        draw = torch.randn
        flags = torch.rand(shape, device=device)
        replay.extend(
            TensorDict(
                obs=draw(*shape, widths[0], device=device), is_first=flags < 0.01,
                action=draw(*shape, widths[1], device=device).clamp(-1, 1),
                reward=draw(*shape, device=device), terminated=flags < 0.005,
                truncated=(flags >= 0.005) & (flags < 0.01),
                belief=draw(*shape, cfg.model.belief, device=device),
                state_index=torch.randint(
                    cfg.model.classes, (*shape, cfg.model.categoricals), device=device
                ).to(torch.uint8),
                version=torch.zeros(shape, dtype=torch.int32, device=device),
                batch_size=list(shape),
            )
        )  # fmt: skip

    def update() -> dict[str, torch.Tensor]:
        batch = replay.sample()
        metrics, latents = trainer.update(batch)
        replay.refresh(batch, latents)
        return metrics

    begin = time.monotonic()
    update()
    wait()
    first, warm_up = process_seconds(), time.monotonic() - begin
    for _ in range(10):
        update()
    wait()
    times = []
    for _ in range(arguments.blocks):
        begin = time.monotonic()
        for _ in range(arguments.updates):
            metrics = update()
        wait()
        times.append(1000 * (time.monotonic() - begin) / arguments.updates)
    trainer.check_finite()
    result = {
        "bench": "learner", "work": {
            "size": cfg.model.size, "parameters": sum(p.numel() for p in trainer.params.values()),
            "B": replay.slices, "T": cfg.replay_buffer.batch_length, "H": cfg.algo.horizon,
            "observation": widths[0], "action": widths[1],
            "autocast": cfg.optimization.autocast, "compile": cfg.optimization.compile.enabled,
            "cudagraph": cfg.optimization.compile.cudagraph,
        },
        "update_ms": spread(times),
        "transitions_per_second": round(1000 * cfg.replay_buffer.batch_size
                                        / statistics.median(times)),
        "first_update_seconds": round(warm_up, 2),
        "process_start_to_first_update_seconds": round(first, 2),
        "metrics": {k: round(float(v), 5) for k, v in metrics.items() if k.startswith("loss")},
    }  # fmt: skip
    if device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        result |= kernels(torch, update, wait, arguments.top)
    return result | {"hardware": hardware(torch, device), "versions": versions()}


def kernels(torch: Any, update: Any, wait: Any, top: int) -> dict[str, Any]:
    """Kernels per update, from the profiler, and the ones that take most of the time."""
    from torch.profiler import ProfilerActivity, profile

    rounds = 3
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            update()
        wait()
    totals: dict[str, list[float]] = {}
    for event in profiler.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = totals.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += event.device_time_total
    count = sum(v[0] for v in totals.values())
    busy = sum(v[1] for v in totals.values())
    out: dict[str, Any] = {
        "kernels_per_update": round(count / rounds),
        "kernel_ms_per_update": round(busy / rounds / 1000, 3),
    }
    if top:
        ranked = sorted(totals.items(), key=lambda kv: -kv[1][1])[:top]
        out["top_kernels"] = [
            {
                "ms": round(v[1] / rounds / 1000, 4),
                "count": round(v[0] / rounds, 1),
                "name": k[:110],
            }
            for k, v in ranked
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["learner"])
    parser.add_argument("overrides", nargs="*", help="key=value, as for dreamer_isaac.py")
    parser.add_argument("--observation", type=int, default=48)
    parser.add_argument("--action", type=int, default=12)
    parser.add_argument("--updates", type=int, default=100, help="in a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--top", type=int, default=0, help="list this many slowest kernels")
    arguments = parser.parse_intermixed_args()
    result = {"learner": learner}[arguments.what](arguments)
    result["command"] = "python scripts/bench.py " + " ".join(sys.argv[1:])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
