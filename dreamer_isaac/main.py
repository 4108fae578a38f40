"""From a checked configuration to a finished run: builds the parts, then trains or evaluates."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import shutil
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamer_isaac import checkpoint, cli, evaluate
from dreamer_isaac.config import Config, ConfigError, build, to_dict
from dreamer_isaac.envs import make_env
from dreamer_isaac.envs.contract import SimEnv
from dreamer_isaac.launch import choose_backend
from dreamer_isaac.logger import Console, duration
from dreamer_isaac.models import Agent
from dreamer_isaac.report import page as report_page

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk, whatever file it was."""
DENIED = (errno.EACCES, errno.EPERM, errno.EIO)
"""In the run folder: it has become read-only. Elsewhere: a file of the task's, say."""


def main(cfg: Config) -> int:
    """Run `cfg`; returns the exit code and says every error in words."""

    def ours(error: OSError) -> bool:
        path = os.path.abspath(str(error.filename or cfg.run.dir))
        return Path(path).is_relative_to(os.path.abspath(cfg.run.dir))

    try:
        folder = Path(cfg.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        console = Console(folder / "log.txt")
        (folder / "traceback.txt").unlink(missing_ok=True)  # of an earlier start
    except OSError as e:
        print(f"error: run.dir={cfg.run.dir} cannot be written: {e}. Remedy: another run.dir.",
              file=sys.stderr)  # fmt: skip
        return 1
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    if cfg.optimization.num_threads:
        torch.set_num_threads(cfg.optimization.num_threads)
    try:
        if cfg.mode == "train":
            from dreamer_isaac.train import train

            return train(cfg, folder, console)
        if cfg.mode == "export":
            return export_run(cfg, folder, console)
        return evaluate_run(cfg, folder, console)
    except ConfigError as e:
        console.say(f"error: {e}")
        return 2
    except KeyboardInterrupt as e:
        console.say("stopped at once; the last checkpoint is what there is")
        return e.code if isinstance(e, cli.Terminated) else 130
    except Exception as e:
        if isinstance(e, OSError) and (e.errno in FULL or (e.errno in DENIED and ours(e))):
            where = e.filename or folder
            console.say(f"error: {where}: {e.strerror or e}. Complete checkpoints are intact. "
                        "Remedy: free disk space or make the folder writable, then the same "
                        f"command with run.dir={folder}.")  # fmt: skip
            return 1
        console.say(f"error: {type(e).__name__}: {e}{remedy(e)}")
        if not isinstance(e, checkpoint.CheckpointError):
            with contextlib.suppress(OSError):
                (folder / "traceback.txt").write_text(traceback.format_exc())
                console.say(f"the traceback is in {folder / 'traceback.txt'}")
        return 1
    finally:
        console.close()


def remedy(error: Exception) -> str:
    """What helps against an error of torch's, as the end of its message."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "\nRemedy: a smaller replay_buffer.size, or replay_buffer.gpu_storage=false; a smaller "
            "replay_buffer.batch_size; fewer envs; or another program off the GPU."
        )
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo", "triton")):
        return (
            "\nRemedy: the version of torch that pyproject.toml asks for (the compilers of others "
            "fail on some sizes of networks), or optimization.compile.enabled=false, which is "
            "slower."
        )
    return ""


def devices(cfg: Config) -> tuple[torch.device, torch.device]:
    """Simulation device and learner device.

    Raises:
        ConfigError: for a device that is not here.
    """
    count = torch.cuda.device_count()

    def pick(path: str, wanted: str, auto: str) -> torch.device:
        name = auto if wanted == "auto" else wanted
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(
                [f"{path}={wanted}: allowed are auto, cpu, cuda, cuda:0, ..."]
            ) from None
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ConfigError([f"{path}={wanted}: this machine has {count} CUDA devices. Remedy: "
                               f"{path}=auto."])  # fmt: skip
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        return device

    sim = pick("env.device", cfg.env.device, "cuda:0" if count else "cpu")
    other = sim
    if cfg.mode == "train" and count > 1 and sim.type == "cuda" and cfg.collector.kind != "sync":
        other = torch.device("cuda", next(i for i in range(count) if i != sim.index))
    learn = pick("optimization.device", cfg.optimization.device, str(other))
    if sim != learn and cfg.collector.kind == "sync":
        raise ConfigError([
            f"env.device={sim} and optimization.device={learn} differ: collector=sync acts with "
            "the learner's own networks. Remedy: collector=thread."
        ])  # fmt: skip
    if sim.type == "cuda" and learn.type == "cpu":
        raise ConfigError([
            f"env.device={sim} and optimization.device=cpu: a GPU that simulates can learn too. "
            "Remedy: optimization.device=auto, or env.device=cpu."
        ])  # fmt: skip
    if sim != learn and cfg.checkpoint.exact:
        raise ConfigError(["checkpoint.exact=true needs one device. Remedy: optimization.device="
                           f"{sim}."])  # fmt: skip
    for key in ("cudagraph", "kernels", "helpers"):
        if learn.type != "cuda" and getattr(cfg.optimization.compile, key) == "true":
            name = f"optimization.compile.{key}"
            raise ConfigError([f"{name}=true needs a GPU. Remedy: {name}=auto."])
    return sim, learn


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    out = {"python": platform.python_version()}
    for name in ("dreamer_isaac", "torch", "torchrl", "tensordict", "mjlab", "mujoco",
                 "mujoco-warp", "warp-lang", "isaaclab"):  # fmt: skip
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def seed_everything(seed: int) -> None:
    """The global generators, which simulators and initialisation draw from."""
    import random

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def start_simulator(
    cfg: Config, console: Console, device: torch.device, render: bool = False
) -> SimEnv:
    """Choose and build the environment, saying which and why."""
    backend, reason = choose_backend(cfg)
    if cfg.env.physics != "auto" and backend != "isaaclab":
        raise ConfigError([f"env.physics={cfg.env.physics} is Isaac Lab's, and the simulator is "
                           f"{backend} ({reason}). Remedy: leave it out."])  # fmt: skip
    console.say(f"simulator: {backend} ({reason}), task {cfg.env.name}, {cfg.env.num_envs} envs on "
                f"{device}; the first start on a machine compiles its kernels")  # fmt: skip
    start = time.monotonic()
    env = make_env(cfg, backend, device, render)
    info = env.info
    seen = [str(info.observation)] if info.observation or not info.pixels else []
    if info.pixels:
        seen.append("pictures of {} x {} x {}".format(*info.pixels))
    console.say(f"simulator ready in {duration(time.monotonic() - start)}: observation "
                f"{' and '.join(seen)}, action {info.action}, {info.step_dt * 1000:.1f} ms a step, "
                f"episodes of {info.max_episode_length} steps")  # fmt: skip
    return env


def make_agent(cfg: Config, env: SimEnv, device: torch.device) -> Agent:
    """The networks for this task."""
    info = env.info
    return Agent(info.observation, info.action, cfg.model, cfg.algo, info.pixels).to(device)


def _write_video(path: Path, frames: list[np.ndarray], fps: float, console: Console) -> None:
    try:
        evaluate.write_video(path, frames, fps)
        console.say(f"video: {path}")
    except Exception as e:  # a missing encoder must not cost the run its result
        console.say(f"no video: {type(e).__name__}: {e}")


def report(
    cfg: Config, folder: Path, env: SimEnv, agent: Agent, console: Console,
    rows: list[dict[str, str]], trained: tuple[int, int] | None,
) -> dict[str, Any]:  # fmt: skip
    """The final evaluation: episodes, video and plots, in the run folder.

    Args:
        rows: of metrics.csv. trained: frames and updates of the policy, where it has any.

    Returns:
        The `evaluation` part of summary.json.
    """
    for name in OF_AN_EVALUATION:  # an older one must not pass for this one
        (folder / name).unlink(missing_ok=True)
    start = time.monotonic()
    film = "; rendering them takes most of the time on a CPU (evaluation.video=false: no video)"
    console.say(f"evaluating {cfg.evaluation.episodes} episodes or more"
                + (film if cfg.evaluation.video else ""))  # fmt: skip
    episodes = evaluate.play(env, agent, cfg.evaluation, cfg.env.seed + 1, console.say)
    summary = episodes.summary()
    console.say(f"evaluation ({cfg.evaluation.policy} policy): return "
                f"{summary['return_mean']:.3f} +- {evaluate.shown(summary['return_stderr'])} over "
                f"{summary['episodes']} episodes of {summary['length_mean']:.0f} steps on average "
                f"({duration(time.monotonic() - start)})")  # fmt: skip
    if summary["reward_terms"]:
        terms = summary["reward_terms"].items()
        shares = (f"{k} {v['mean']:.3f}" for k, v in terms if v["mean"])  # not of weight 0
        console.say("  of which " + ", ".join(shares))
    views = {"evaluation.mp4": episodes.frames, "policy_view.mp4": episodes.view}
    views = {k: v for k, v in views.items() if v}
    loop, model = None, None
    names, steps = env.info.observation_names, cfg.evaluation.open_loop_steps
    if cfg.evaluation.policy == "trained":
        loop = evaluate.open_loop(agent, episodes.trajectory, steps)
        model = evaluate.world_model(agent, episodes.trajectory, names, steps)
    pictures = evaluate.plots(folder / "plots", rows, loop, names, cfg.env.name, episodes, model)
    evaluate.write_csv(folder / "episodes.csv", episodes.rows())
    if model is not None:
        ahead = range(1, len(model.error) + 1)
        evaluate.write_csv(folder / "world_model.csv", [
            {"steps_ahead": n, **model.at(n)} for n in ahead
        ])  # fmt: skip
        summary["world_model"] = {
            "samples": model.samples,
            **{f"{n}_steps": model.at(n) for n in ahead if n in (1, 5, 10, 20, 50)},
        }
        one, last = float(model.error[0].mean()), float(model.error[-1].mean())
        console.say(f"world model: error {one:.3f} of the data's spread one step ahead, {last:.3f} "
                    f"{len(model.error)} steps ahead")  # fmt: skip
    if loop is not None:
        summary["open_loop_error"] = float(loop.error.mean())
        if loop.video is not None and cfg.evaluation.video:
            views["open_loop.mp4"] = loop.video
    videos = [folder / "videos" / name for name in views]
    for path, frames in zip(videos, views.values(), strict=True):
        _write_video(path, frames, 1 / env.info.step_dt, console)
    page = report_page(
        cfg, env.info.backend, summary, pictures, [v for v in videos if v.exists()], trained
    )
    (folder / "report.html").write_text(page)
    return summary


OF_AN_EVALUATION = (
    "videos/evaluation.mp4", "videos/policy_view.mp4", "videos/open_loop.mp4", "world_model.csv",
    *(f"plots/{name}.png" for name in ("open_loop", "open_loop_pixels", "world_model", "episodes")),
)  # fmt: skip
"""What `report` writes, or does not, by what there is to show."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write completely or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def export_run(cfg: Config, folder: Path, console: Console) -> int:
    """`mode=export`: the policy of a checkpoint in files that run without this package."""
    from dreamer_isaac import export

    agent, meta, bound = export.load(cfg)
    for kind, path in export.write(agent, meta, bound, folder).items():
        console.say(f"{kind}: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    console.say("python scripts/run_policy.py <one of them> plays it (policy.onnx: with "
                "onnxruntime, which has to be installed)")  # fmt: skip
    return 0


def evaluate_run(cfg: Config, folder: Path, console: Console) -> int:
    """`mode=evaluate`: a trained policy, or a baseline without one."""
    device, _ = devices(cfg)
    state: dict[str, Any] | None = None
    if (folder / "checkpoints").exists():  # its metrics and summary would be overwritten
        raise ConfigError([
            f"run.dir={folder} is a training run's. Remedy: another run.dir, or none, for what is "
            "evaluated."
        ])  # fmt: skip
    if cfg.evaluation.policy == "trained":
        found = checkpoint.find(cfg.checkpoint.path)
        state = checkpoint.load(found, ["networks", "curriculum"], device)
        saved = build(state["meta"]["config"], stored=True)
        cfg.model, cfg.algo = saved.model, saved.algo
        console.say(f"checkpoint: {found}")
        other = cli.as_trained(cfg)
        if other:
            console.say(f"note: {other}")
    seed_everything(cfg.env.seed)
    (folder / "config.yaml").write_text(cli.dump(to_dict(cfg)))
    env = start_simulator(cfg, console, device, cfg.evaluation.video)
    agent = make_agent(cfg, env, device)
    if state is not None:
        names = state["meta"]["task"]
        wanted = names["observation_names"], names["action_names"]
        if wanted != (env.info.observation_names, env.info.action_names):
            try:
                env.bind(*wanted)
            except ValueError as e:
                raise checkpoint.CheckpointError(
                    f"the checkpoint is for {names['task']} ({len(wanted[0])} observations, "
                    f"{len(wanted[1])} actions), this task is {env.info.task} "
                    f"({env.info.observation}, {env.info.action}): {e}"
                ) from None
            console.say("observations and actions are in another order here; they are matched by "
                        "name")  # fmt: skip
        if list(names.get("pixels", [])) != list(env.info.pixels or []):
            raise checkpoint.CheckpointError(
                f"the checkpoint's policy sees pictures of {names.get('pixels') or 'nothing'}, "
                f"this task shows {list(env.info.pixels or []) or 'none'}."
            )
        checkpoint.load_networks(agent, state["networks"], found)
        if (names["task"], names["backend"]) == (env.info.task, env.info.backend):
            env.load_curriculum_state(state.get("curriculum", {}))
            if "curriculum" not in state and env.curriculum_state():
                console.say("note: the task's curriculum begins anew: this checkpoint holds none")
        step = names.get("step_dt") or env.info.step_dt
        if abs(step / env.info.step_dt - 1) > 1e-3:
            console.say(f"note: the policy was trained at {1000 * step:.1f} ms a step, and acts at "
                        f"{1000 * env.info.step_dt:.1f} ms here")  # fmt: skip
    trained = (state["meta"]["frames"], state["meta"]["updates"]) if state else None
    summary = report(cfg, folder, env, agent, console, [], trained)
    shutil.copyfile(folder / "episodes.csv", folder / "metrics.csv")
    write_json(folder / "summary.json", {
        "env": cfg.env.name, "backend": env.info.backend, "versions": versions(),
        "device": str(device), "policy": cfg.evaluation.policy, "checkpoint": cfg.checkpoint.path,
        "evaluation": summary, "exit_reason": "finished",
    })  # fmt: skip
    console.say(f"results: {folder}")
    env.close()
    return 0
