"""Benchmarks: one JSON line a result.

    python scripts/bench.py learner [key=value ...]     one update, sampling and write-back included
    python scripts/bench.py replay [key=value ...]      extend, sample and write-back on a full ring
    python scripts/bench.py collect [key=value ...]     the collector alone, into the replay buffer
    python scripts/bench.py pipeline [key=value ...]    collector alone, learner alone, and both

The work is the configuration's (`experiment=bench_12m` is what others publish). `learner` and
`replay` work on random data of the given widths, the others on the configured simulator. Times are
medians over blocks, after warm-up.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
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


PARTS = {
    "forward": "_compile.compile_inner",
    "backward": "backward._backward_impl",
    "tracing": "bytecode_tracing",
    "differentiating": "aot_trace_joint_graph",
    "lowering": "GraphLowering.run",
    "fusing and writing code": "GraphLowering.codegen",
    "waiting for workers": "async_compile.wait",
    "choosing configurations": "CachingAutotuner.benchmark_all_configs",
}
"""Spans of torch's compiler. The first two are the whole, those below are parts of it, except the
last, which comes when a kernel runs for the first time."""


def compile_seconds() -> dict[str, float]:
    """Seconds that torch.compile has taken in this process, by part, as far as this torch tells
    them by these names."""
    try:
        from torch._dynamo.utils import compilation_time_metrics as spans
    except ImportError:
        return {}
    return {part: round(sum(spans[name]), 2) for part, name in PARTS.items() if name in spans}


def filled_replay(cfg: Any, widths: tuple[int, int], device: Any) -> Any:
    """A full ring of random records, where `replay_buffer.gpu_storage` says, and a function that
    makes more of them."""
    import torch
    from tensordict import TensorDict

    from dreamer_isaac.replay import Replay

    envs = cfg.env.num_envs - cfg.evaluation.num_envs
    device = device if cfg.replay_buffer.gpu_storage else torch.device("cpu")
    generator = torch.Generator(device=device).manual_seed(1)
    replay = Replay(cfg.replay_buffer, envs, *widths, cfg.model, device, generator)
    replay.check_memory()

    def records(steps: int) -> TensorDict:
        shape = (envs, steps)
        flags = torch.rand(shape, device=device)
        if cfg.model.latent == "gaussian":
            state = torch.randn(*shape, cfg.model.gaussian, device=device)
        else:
            classes = (*shape, cfg.model.categoricals)
            state = torch.randint(cfg.model.classes, classes, device=device).to(torch.uint8)
        return TensorDict(
            obs=torch.randn(*shape, widths[0], device=device), is_first=flags < 0.01,
            action=torch.randn(*shape, widths[1], device=device).clamp(-1, 1),
            reward=torch.randn(*shape, device=device), terminated=flags < 0.005,
            truncated=(flags >= 0.005) & (flags < 0.01),
            belief=torch.randn(*shape, cfg.model.belief, device=device), state=state,
            version=torch.zeros(shape, dtype=torch.int32, device=device), batch_size=list(shape),
        )  # fmt: skip

    for _ in range(-(-replay.steps // 8)):
        replay.extend(records(8))
    return replay, records


def timed(action: Any, wait: Any, count: int, blocks: int) -> list[float]:
    """Milliseconds of one `action`, block by block."""
    times = []
    for _ in range(blocks):
        begin = time.monotonic()
        for _ in range(count):
            action()
        wait()
        times.append(1000 * (time.monotonic() - begin) / count)
    return times


def prepared(arguments: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Configuration, torch, the device, and a function that waits for it."""
    from dreamer_isaac import helpers
    from dreamer_isaac.cli import compose

    cfg = compose(arguments.overrides)
    from dreamer_isaac.launch import wants_cameras

    if wants_cameras(cfg):
        raise SystemExit(f"error: `{arguments.what}` works on vectors of random numbers, not on "
                         "pictures. Remedy: `pipeline`.")  # fmt: skip
    if arguments.what == "learner":
        helpers.start(cfg, arguments.observation, arguments.action)
    import torch

    if cfg.optimization.num_threads:
        torch.set_num_threads(cfg.optimization.num_threads)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return cfg, torch, device, lambda: device.type == "cuda" and torch.cuda.synchronize(device)


def work(cfg: Any) -> dict[str, Any]:
    """The work in numbers."""
    rb, opt = cfg.replay_buffer, cfg.optimization
    return {
        "algo": cfg.algo.name, "size": cfg.model.size, "B": rb.batch_size // rb.batch_length,
        "T": rb.batch_length, "H": cfg.algo.horizon, "autocast": opt.autocast,
        "compile": opt.compile.enabled, "cudagraph": opt.compile.cudagraph,
        "kernels": opt.compile.kernels,
    }  # fmt: skip


def learner(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time of one update."""
    laps = [("start", 0.0)]

    def lap(name: str) -> None:
        laps.append((name, process_seconds()))

    cfg, torch, device, wait = prepared(arguments)
    lap("import torch")
    from dreamer_isaac import helpers
    from dreamer_isaac.compiling import hand_over, start_compiler
    from dreamer_isaac.learner_v1 import learner_class
    from dreamer_isaac.models import Agent
    from dreamer_isaac.replay import record_bytes

    lap("import the rest")
    start_compiler(device, cfg.optimization)
    torch.manual_seed(0)
    widths = arguments.observation, arguments.action
    stored = cfg.replay_buffer.size * record_bytes(*widths, cfg.model) / 2**30
    hand_over(cfg, *widths, None, 1.0, device, stored if cfg.replay_buffer.gpu_storage else 0.0)
    agent = Agent(*widths, cfg.model, cfg.algo).to(device)
    generator = torch.Generator(device=device).manual_seed(0)
    trainer = learner_class(cfg.algo)(agent, cfg.algo, cfg.optimization, generator)
    lap("networks")
    replay, _ = filled_replay(cfg, widths, device)
    wait()
    lap("replay")
    metrics: dict[str, Any] = {}

    def update() -> None:
        metrics.update(trainer.train(replay))

    if device.type == "cpu":
        many = 11 + arguments.updates * arguments.blocks
        print(f"no GPU: {many} updates on the CPU; --updates and --blocks make it fewer",
              file=sys.stderr)  # fmt: skip
    begin = time.monotonic()
    update()
    wait()
    first, warm_up = process_seconds(), time.monotonic() - begin
    lap("first update")
    compiling, helped = compile_seconds(), helpers.started()
    timed(update, wait, 10, 1)
    times = timed(update, wait, arguments.updates, arguments.blocks)
    trainer.check_finite()
    result = {
        "bench": "learner",
        "work": work(cfg) | {
            "parameters": sum(p.numel() for p in trainer.params.values()),
            "observation": widths[0], "action": widths[1],
        },
        "update_ms": spread(times),
        "transitions_per_second": round(1000 * cfg.replay_buffer.batch_size
                                        / statistics.median(times)),
        "first_update_seconds": round(warm_up, 2),
        "process_start_to_first_update_seconds": round(first, 2),
        "start_seconds": {b[0]: round(b[1] - a[1], 2) for a, b in itertools.pairwise(laps)},
        "compile_seconds": compiling, "helpers": helped,
        "metrics": {k: round(float(v), 5) for k, v in metrics.items() if k.startswith("loss")},
    }  # fmt: skip
    if device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        result |= kernels(torch, update, wait, arguments.top)
    if arguments.compare:
        result["torchrl"] = torchrl(arguments, cfg, torch, device, wait)
        theirs, ours = (x["update_ms"]["median"] for x in (result["torchrl"], result))
        result["torchrl"]["times_slower"] = round(theirs / ours, 2)
    return result | {"hardware": hardware(torch, device)}


def torchrl(
    arguments: argparse.Namespace, cfg: Any, torch: Any, device: Any, wait: Any
) -> dict[str, Any]:
    """The same work by TorchRL's own losses and optimisers, less sampling and write-back."""
    from torchrl_learners import v1_update, v3_update

    from dreamer_isaac.models import Agent

    torch.manual_seed(0)
    widths = arguments.observation, arguments.action
    agent = Agent(*widths, cfg.model, cfg.algo).to(device)
    rb = cfg.replay_buffer
    make = v1_update if cfg.algo.name == "dreamer_v1" else v3_update
    begin = time.monotonic()
    update = make(agent, cfg, rb.batch_size // rb.batch_length, rb.batch_length, device)
    update()
    wait()
    started = time.monotonic() - begin
    timed(update, wait, 3, 1)
    return {
        "what": (make.__doc__ or "").strip().replace("\n    ", " "),
        "update_ms": spread(timed(update, wait, max(1, arguments.updates // 5), arguments.blocks)),
        "first_update_seconds": round(started, 2),
    }  # fmt: skip


def replay(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of extend (8 env steps), sample and write-back on a full ring."""
    cfg, torch, device, wait = prepared(arguments)
    from tensordict import TensorDict

    buffer, records = filled_replay(cfg, (arguments.observation, arguments.action), device)
    batch, new = buffer.sample(), records(8)
    shape = len(batch), cfg.replay_buffer.batch_length
    latents = TensorDict(
        belief=torch.randn(*shape, cfg.model.belief, device=buffer.device),
        state=batch["state"].unsqueeze(1).expand(-1, shape[1], -1).clone(),
        batch_size=list(shape),
    )  # fmt: skip
    result: dict[str, Any] = {"bench": "replay", "work": work(cfg) | {
        "envs": buffer.envs, "records": buffer.steps * buffer.envs, "gib": round(buffer.gib, 2),
    }}  # fmt: skip
    for name, action in (
        ("extend_ms", lambda: buffer.extend(new.clone())), ("sample_ms", buffer.sample),
        ("refresh_ms", lambda: buffer.refresh(batch, latents)),
    ):  # fmt: skip
        timed(action, wait, 3, 1)
        result[name] = spread(timed(action, wait, arguments.updates, arguments.blocks))
    return result | {"hardware": hardware(torch, device)}


@contextlib.contextmanager
def running(arguments: argparse.Namespace) -> Iterator[Any]:
    """The parts of a training run, its simulator started, in a temporary folder."""
    import tempfile
    from pathlib import Path

    from dreamer_isaac.cli import compose
    from dreamer_isaac.launch import simulator

    cfg = compose(["collector.total_frames=1000000000000", *arguments.overrides])
    with simulator(cfg), tempfile.TemporaryDirectory() as folder:
        import torch

        from dreamer_isaac.logger import Console
        from dreamer_isaac.train import Run

        if cfg.optimization.num_threads:
            torch.set_num_threads(cfg.optimization.num_threads)
        yield Run(cfg, Path(folder), Console(Path(folder) / "log.txt"))


def resources(torch: Any, devices: set[Any]) -> dict[str, float]:
    """What a leak would make grow; of the GPUs that the run uses."""
    with open("/proc/self/status") as f:
        status = dict(line.split(":", 1) for line in f)
    out: dict[str, float] = {
        "rss_mib": int(status["VmRSS"].split()[0]) // 1024, "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
    }  # fmt: skip
    gpus = [d for d in devices if d.type == "cuda"]
    if gpus:
        out["gpu_mib"] = sum(torch.cuda.memory_reserved(d) for d in gpus) // 2**20
        free = [torch.cuda.mem_get_info(d) for d in gpus]  # simulator and other programs too
        out["device_mib"] = sum(total - left for left, total in free) // 2**20
    return out


def host_syncs(torch: Any, run: Any) -> dict[str, float]:
    """Where the host waits for the GPU while the collector steps: file and line -> times an env
    step, as torch reports them (what Warp waits for by itself is not in it)."""
    if run.sim_device.type != "cuda":
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            frames = run.collector.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts: dict[str, int] = {}
    for warning in seen:
        if "synchroniz" in str(warning.message):
            where = warning.filename.split("site-packages/")[-1].split("dreamer_isaac/")[-1]
            key = f"{where}:{warning.lineno}"
            counts[key] = counts.get(key, 0) + 1
    steps = float(frames) / run.env.info.num_envs
    return {k: round(n / steps, 3) for k, n in sorted(counts.items(), key=lambda kv: -kv[1])}


def drive(run: Any, seconds: float, learn: bool, collect: bool = True) -> dict[str, float]:
    """Run for `seconds` and report the rates."""
    import torch

    def wait() -> None:
        for device in {run.sim_device, run.device}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    wait()
    frames = updates = 0
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if collect:
            frames += run.collector.step(wait=not learn)
        if learn:
            run.learner.train(run.replay)
            run.collector.publish(run.learner.updates)
            updates += 1
    wait()
    spent = time.monotonic() - begin
    return {"frames_per_second": frames / spent, "updates_per_second": updates / spent}


def simulated(arguments: argparse.Namespace) -> dict[str, Any]:
    """`collect` and `pipeline`."""
    with running(arguments) as run:
        return rates_of(run, arguments)


def rates_of(run: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `collect` and `pipeline` measure on one run."""
    import torch

    from dreamer_isaac.collect import Thread

    cfg = run.cfg
    result: dict[str, Any] = {"bench": arguments.what, "work": work(cfg) | {
        "task": cfg.env.name, "envs": cfg.env.num_envs, "sim": str(run.sim_device),
        "learn": str(run.device), "collector": type(run.collector).__name__,
        "frames_per_batch": cfg.collector.frames_per_batch,
    }}  # fmt: skip
    run.collector.frames = cfg.collector.init_random_frames  # act with the policy from the start
    if isinstance(run.collector, Thread):
        run.collector.total = sys.maxsize  # the seconds end it
    phases = {"collect": (False, True)}
    if arguments.what == "pipeline":
        phases |= {"both": (True, True), "learn": (True, False)}
        phases = {k: v for k, v in phases.items() if k in arguments.phases.split(",")}
    enough = min(cfg.collector.init_random_frames, run.replay.steps * run.replay.envs)
    with run.collector:
        while not run.replay.ready or len(run.replay) < enough:
            run.collector.step()
        for name, (learn, collect) in phases.items():
            if not collect:
                run.collector.stop()
            drive(run, 2.0 if not learn else 5.0, learn, collect)  # compiles, the first time
            rates, used = [], []
            for _ in range(arguments.blocks):
                rates.append(drive(run, arguments.seconds / arguments.blocks, learn, collect))
                used.append(resources(torch, {run.sim_device, run.device}))
            result[f"{name}/resources"] = {k: [u[k] for u in used] for k in used[0]}
            for key in ("frames_per_second", "updates_per_second"):
                values = [r[key] for r in rates]
                if any(values):
                    result[f"{name}/{key}"] = spread(values)
        if arguments.what == "collect":
            result["host_syncs_per_step"] = host_syncs(torch, run)
    if {"collect", "both", "learn"} <= phases.keys():
        for key in ("frames_per_second", "updates_per_second"):
            alone = "collect" if key[0] == "f" else "learn"
            result[f"kept/{key}"] = round(
                result[f"both/{key}"]["median"] / result[f"{alone}/{key}"]["median"], 4
            )
    return result | {"hardware": hardware(torch, run.device)}


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
    parser.add_argument("what", choices=["learner", "replay", "collect", "pipeline"])
    parser.add_argument("overrides", nargs="*", help="key=value, as for dreamer_isaac.py")
    parser.add_argument("--observation", type=int, default=48)
    parser.add_argument("--action", type=int, default=12)
    parser.add_argument("--updates", type=int, default=100, help="in a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of every phase")
    parser.add_argument("--phases", default="collect,both,learn", help="of `pipeline`")
    parser.add_argument("--compare", action="store_true", help="time TorchRL's learner as well")
    parser.add_argument("--top", type=int, default=0, help="list this many slowest kernels")
    arguments = parser.parse_intermixed_args()
    if set(arguments.phases.split(",")) - {"collect", "both", "learn"}:
        parser.error("--phases: some of collect,both,learn")
    call = {"learner": learner, "replay": replay, "collect": simulated, "pipeline": simulated}
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        result = call[arguments.what](arguments)
    from dreamer_isaac.main import versions

    result["versions"] = versions()
    result["command"] = "python scripts/bench.py " + " ".join(sys.argv[1:])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
