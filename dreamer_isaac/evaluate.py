"""Deterministic episodes, their video, and how well the world model predicts without looking."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamer_isaac.config import EvaluationConfig
from dreamer_isaac.envs.contract import SimEnv
from dreamer_isaac.models import Agent, Carry


@dataclass
class Trajectory:
    """What env 0..M-1 went through from their first observation on, for the open-loop plot."""

    obs: Tensor
    """[M, T, O]"""
    action: Tensor
    """[M, T, A]"""
    belief: Tensor
    """[M, T, D]"""
    state: Tensor
    """[M, T, S*K]"""
    done: Tensor
    """[M, T]: the action ended the episode."""
    pixels: Tensor | None = None
    """[M, T, H, W, C] uint8"""


@dataclass
class Episodes:
    """Results of an evaluation."""

    returns: np.ndarray
    """[E]"""
    lengths: np.ndarray
    """[E], env steps"""
    envs: np.ndarray
    """[E], the env that played it."""
    endings: list[str]
    """[E], what ended it: the task's termination terms that held, joined by `+`."""
    terms: dict[str, np.ndarray]
    """Every reward term's share of the return [E], where the simulator tells them."""
    trajectory: Trajectory
    frames: list[np.ndarray]
    """Video frames [height, width, 3] uint8."""
    view: list[np.ndarray]
    """What the policy of env 0 saw: frames [height, width, 3] uint8, cameras side by side."""

    def summary(self) -> dict[str, Any]:
        """Mean, standard error of the mean, quantiles, lengths, count, what ended the episodes, and
        the reward terms' shares."""
        counts = {name: self.endings.count(name) for name in sorted(set(self.endings))}
        success = [n for n in counts if "success" in n]
        return {
            "return_mean": float(self.returns.mean()),
            "return_stderr": _standard_error(self.returns),
            "return_quantiles": _quantiles(self.returns),
            "length_mean": float(self.lengths.mean()),
            "length_stderr": _standard_error(self.lengths),
            "length_quantiles": _quantiles(self.lengths),
            "episodes": len(self.returns),
            "endings": counts,
            **({"success": sum(counts[n] for n in success) / len(self.endings)} if success else {}),
            "reward_terms": {
                name: {"mean": float(share.mean()), "stderr": _standard_error(share)}
                for name, share in self.terms.items()
            },
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row an episode, for a table."""
        return [
            {"episode": i, "env": int(self.envs[i]), "return": float(self.returns[i]),
             "length": int(self.lengths[i]), "ended_by": self.endings[i],
             **{f"reward/{k}": float(v[i]) for k, v in self.terms.items()}}
            for i in range(len(self.returns))
        ]  # fmt: skip


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def _quantiles(sample: np.ndarray) -> dict[str, float]:
    return {
        f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(sample, QUANTILES), strict=True)
    }


def _standard_error(sample: np.ndarray) -> float | None:
    """None where it is unknown: of one episode."""
    return float(sample.std(ddof=1) / np.sqrt(len(sample))) if len(sample) > 1 else None


def shown(error: float | None) -> str:
    """A standard error for people."""
    return "-" if error is None else f"{error:.3f}"


def play(
    env: SimEnv,
    agent: Agent,
    cfg: EvaluationConfig,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    watched: int = 16,
) -> Episodes:
    """Play the same number of episodes in every env, `cfg.episodes` in all at least.

    The same number from every env, because taking whichever finish first would favour the short
    ones.

    Args:
        cfg: `policy` chooses trained (deterministic), uniformly random or zero actions.
        watched: envs whose trajectory is kept.

    An episode that has not ended when all should have, in a task without a time limit, is cut off.
    """
    envs = env.info.num_envs
    rounds = -(-cfg.episodes // envs)
    if cfg.max_steps:
        env.limit_episodes(cfg.max_steps)
    generator = torch.Generator(device=env.device).manual_seed(seed)
    carry = agent.initial_carry(envs)
    device = env.device
    returns = torch.zeros(envs, rounds, dtype=torch.float64, device=device)
    lengths = torch.zeros_like(returns)
    shares: Tensor | None = None
    ended: Tensor | None = None
    reasons: list[str] = []
    filmed = min(cfg.video_envs, envs)
    panels: list[np.ndarray] = []
    finished = torch.zeros(envs, dtype=torch.long, device=device)
    greedy = torch.ones(envs, dtype=torch.bool, device=device)
    watched = min(watched, envs)
    kept: list[tuple[Tensor, ...]] = []
    frames: list[np.ndarray] = []
    limit = int(cfg.video_seconds / env.info.step_dt)
    recording = cfg.video
    longest = env.info.max_episode_length * rounds + 1
    view: list[Tensor] = []
    observation = env.reset()
    for t in range(longest):
        noise = agent.draw_noise((envs,), generator)
        normal = torch.zeros(envs, agent.action, device=device)
        obs, is_first, pixels = observation
        belief, state, action = agent.act(obs, is_first, carry, noise, normal, greedy, pixels)
        if pixels is not None and cfg.video and t < limit:
            view.append(pixels[0].clone())  # not a view of all envs
        if cfg.policy == "random":
            draw = torch.rand(action.shape, generator=generator, device=device)
            action = 2 * draw - 1
        elif cfg.policy == "zero":
            action = torch.zeros_like(action)
        if recording and t < limit:
            pictures = env.render(filmed)
            if pictures is None:
                recording = False
                say("no video: this simulator has no off-screen renderer here")
            else:
                now = finished.clamp_max(rounds - 1).unsqueeze(1)
                so_far = [x.gather(1, now)[:filmed, 0].tolist() for x in (returns, lengths)]
                playing = (finished[:filmed] < rounds).tolist()
                panels = [  # one that has played its episodes stands still
                    labelled(np.asarray(p), f"return {r:.2f}   step {int(n)}") if on else panels[i]
                    for i, (p, on, r, n) in enumerate(zip(pictures, playing, *so_far, strict=True))
                ]
                frames.append(grid(panels))
        executed, outcome, following = env.step(action)
        open_ = finished < rounds
        slot = finished.clamp_max(rounds - 1).unsqueeze(1)
        returns.scatter_add_(1, slot, (outcome.reward.double() * open_).unsqueeze(1))
        lengths.scatter_add_(1, slot, open_.double().unsqueeze(1))
        names, terms = env.reward_terms()
        if shares is None:
            shares = torch.zeros(envs, rounds, len(names), dtype=torch.float64, device=device)
        shares.scatter_add_(
            1, slot.unsqueeze(2).expand(-1, -1, len(names)),
            (terms.double() * open_.unsqueeze(1)).unsqueeze(1),
        )  # fmt: skip
        reasons, holds = env.endings(outcome)
        if ended is None:
            ended = torch.zeros(envs, rounds, len(reasons), dtype=torch.bool, device=device)
        over = (outcome.done & open_).unsqueeze(1)
        held = ended.gather(1, slot.unsqueeze(2).expand(-1, -1, len(reasons))).squeeze(1)
        ended.scatter_(
            1, slot.unsqueeze(2).expand(-1, -1, len(reasons)),
            torch.where(over, holds, held).unsqueeze(1),
        )  # fmt: skip
        finished += outcome.done & open_
        if len(kept) < 4 * cfg.open_loop_steps:
            row = (obs, executed, belief, state, outcome.done, pixels)
            kept.append(tuple(x[:watched].clone() for x in row if x is not None))
        carry = Carry(belief, state, executed)
        observation = following
        if t % 16 == 15 and bool((finished >= rounds).all()):
            break
    env.check_finite()
    assert shares is not None and ended is not None
    begun = (lengths > 0).flatten()  # all of them, unless some were cut off
    open_ = (torch.arange(rounds, device=device) >= finished.unsqueeze(1)).flatten()[begun].tolist()
    if any(open_):
        say(f"{sum(open_)} episodes had not ended after {longest:,} steps and are cut off there: "
            "the task has no time limit")  # fmt: skip
    endings = [
        "cut off" if cut else "+".join(r for r, y in zip(reasons, row, strict=True) if y) or "?"
        for row, cut in zip(ended.flatten(0, 1)[begun].tolist(), open_, strict=True)
    ]
    by_term = shares.flatten(0, 1)[begun].cpu().numpy()
    columns = [torch.stack(x, 1) for x in zip(*kept, strict=True)]
    return Episodes(
        returns.flatten()[begun].cpu().numpy(), lengths.flatten()[begun].cpu().numpy(),
        np.arange(envs).repeat(rounds)[begun.cpu().numpy()], endings,
        {name: by_term[:, i] for i, name in enumerate(names)}, Trajectory(*columns), frames,
        [enlarged(x) for x in view],
    )  # fmt: skip


def labelled(picture: np.ndarray, text: str) -> np.ndarray:
    """A copy of [height, width, 3] uint8 with a line of text on it, readable on any ground."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(10, len(picture) // 14))
    left, top, right, bottom = draw.textbbox((6, 4), text, font)
    draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=(0, 0, 0))
    draw.text((6, 4), text, (255, 255, 255), font)
    return np.asarray(image)


def grid(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures of one size in rows of equal length, black where there are none left."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    blank = np.zeros_like(pictures[0])
    padded = pictures + [blank] * (-len(pictures) % columns)
    rows = [np.concatenate(padded[i : i + columns], 1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, 0)


def enlarged(pixels: Tensor, least: int = 256) -> np.ndarray:
    """[H, W, C] uint8 -> [height, width, 3] for people: cameras side by side, pixels repeated until
    the picture is `least` high."""
    cameras = torch.cat(pixels.split(3, -1), 1).cpu().numpy()
    times = -(-least // len(cameras))
    return cameras.repeat(times, 0).repeat(times, 1)


@dataclass
class OpenLoop:
    """Predictions from one posterior on, fed with the actions that were really taken."""

    truth: np.ndarray
    """[M, T, O]"""
    prediction: np.ndarray
    """[M, T, O]"""
    error: np.ndarray
    """[T] root mean square over envs and components, each divided by its spread in the data, so
    that 1 is what predicting the mean would give. Of the pictures where nothing else is seen."""
    video: list[np.ndarray] | None = None
    """Truth, prediction and their difference of one env, one below the other: T frames."""


def open_loop(agent: Agent, trajectory: Trajectory, steps: int) -> OpenLoop | None:
    """Predict `steps` steps ahead from the posterior after a few observed ones.

    Only envs whose episode did not end meanwhile are used; None when there are none, or a single
    step of a single one, which has no spread. The episode start is looked for as late as possible,
    so that the posterior has seen something.
    """
    length = trajectory.obs.shape[1]
    for start in range(min(length - steps - 1, steps), -1, -5):
        span = slice(start, start + steps)
        whole = ~trajectory.done[:, start : start + steps].any(1)
        if int(whole.sum()) * steps > 1:
            break
    else:
        return None
    carry = Carry(
        trajectory.belief[whole, start], trajectory.state[whole, start],
        trajectory.action[whole, start],
    )  # fmt: skip
    generator = torch.Generator(device=carry.belief.device).manual_seed(0)
    prediction, imagined = agent.predict(carry, trajectory.action[whole, span], generator)
    later = slice(start + 1, start + steps + 1)
    truth = trajectory.obs[whole, later]
    prediction = prediction[:, : truth.shape[1]]
    video = None
    compared = truth, prediction
    if imagined is not None and trajectory.pixels is not None:
        real = trajectory.pixels[whole, later]
        video = side_by_side(real[0], imagined[0, : real.shape[1]])
        if not truth.shape[2]:
            compared = real.flatten(2) / 255, imagined[:, : real.shape[1]].flatten(2)
    spread = compared[0].std((0, 1))
    if compared[0] is not truth:  # most of a picture never changes: one spread for all of it
        spread = spread.square().mean().sqrt()
    spread = spread.clamp_min(1e-3)
    error = ((compared[1] - compared[0]) / spread).square().mean((0, 2)).sqrt()
    return OpenLoop(truth.cpu().numpy(), prediction.cpu().numpy(), error.cpu().numpy(), video)


@dataclass
class WorldModel:
    """How far predictions are off, by how far ahead they look."""

    terms: list[str]
    """Groups of observation components, e.g. `joint_pos`; `pixels` where pictures are observed."""
    error: np.ndarray
    """[T, terms]: root mean square at 1, 2, ... T steps ahead, over starts, envs and components, in
    units of each component's spread in the data: predicting the mean gives 1."""
    samples: int
    """Predictions that every figure is made of."""

    def at(self, steps: int) -> dict[str, float]:
        """Errors `steps` ahead by term."""
        return dict(zip(self.terms, self.error[steps - 1].tolist(), strict=True))


def world_model(
    agent: Agent, trajectory: Trajectory, names: list[str], steps: int, stride: int = 10
) -> WorldModel | None:
    """Predict from many posteriors, fed with the actions that were taken; None where no episode was
    long enough. The first row is the one-step error, the others are open loop.

    Args:
        names: of the observation's components. stride: env steps between two starts.
    """
    starts = range(stride, trajectory.obs.shape[1] - steps, stride)
    parts = []
    for s in starts:
        whole = ~trajectory.done[:, s : s + steps].any(1)
        if not bool(whole.any()):
            continue
        carry = Carry(
            *(x[whole, s] for x in (trajectory.belief, trajectory.state, trajectory.action))
        )
        generator = torch.Generator(device=carry.belief.device).manual_seed(s)
        guess, imagined = agent.predict(carry, trajectory.action[whole, s : s + steps], generator)
        later = slice(s + 1, s + steps + 1)
        off = [(guess[:, :steps] - trajectory.obs[whole, later])]
        if imagined is not None and trajectory.pixels is not None:
            real = trajectory.pixels[whole, later].float() / 255
            off.append((imagined[:, :steps] - real).square().mean((2, 3, 4), keepdim=True).sqrt())
            off[-1] = off[-1].flatten(2)
        parts.append(torch.cat(off, 2))
    if not parts:
        return None
    off = torch.cat(parts)
    groups = [n.partition("[")[0] for n in names]
    spread = [trajectory.obs.std((0, 1))] if names else []
    if trajectory.pixels is not None and off.shape[2] > len(names):
        groups.append("pixels")  # most of a picture never changes: one spread for all of it
        moving = trajectory.pixels.float().div(255).std((0, 1)).square().mean().sqrt()
        spread.append(moving.reshape(1))
    scaled = (off / torch.cat(spread).clamp_min(1e-3)).square()
    terms = list(dict.fromkeys(groups))
    columns = [[i for i, g in enumerate(groups) if g == t] for t in terms]
    error = torch.stack([scaled[:, :, c].mean((0, 2)).sqrt() for c in columns], 1)
    return WorldModel(terms, error.cpu().numpy(), len(off))


def side_by_side(real: Tensor, imagined: Tensor) -> list[np.ndarray]:
    """Frames with the truth above, the prediction in the middle and their difference below.

    Args:
        real: [T, H, W, C] uint8. imagined: [T, H, W, C] in [0, 1].
    """
    guess = (255 * imagined).round().to(torch.uint8)
    apart = (real.int() - guess.int()).abs().to(torch.uint8)
    return [enlarged(x, 3 * 192) for x in torch.cat([real, guess, apart], 1)]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table with the first row's keys as its columns, completely or not at all."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def write_video(path: Path, frames: list[np.ndarray], fps: float) -> None:
    """H.264 in an mp4 that every player and browser opens.

    Raises:
        RuntimeError: when no ffmpeg can be found or it fails.
    """
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.stem + ".partial.mp4")
    writer: Any = imageio.get_writer(temporary, fps=fps, codec="libx264", macro_block_size=2)
    with writer:
        for frame in frames:
            writer.append_data(frame)
    temporary.replace(path)


def plots(
    folder: Path, rows: list[dict[str, str]], loop: OpenLoop | None, names: list[str], title: str,
    episodes: Episodes | None = None, model: WorldModel | None = None,
) -> list[Path]:  # fmt: skip
    """Learning curve, losses and open-loop prediction as PNG files.

    Args:
        rows: of metrics.csv. names: of the observation's components.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def series(column: str) -> tuple[list[float], list[float]]:
        points = [(float(r["frames"]), float(r[column])) for r in rows if r.get(column)]
        return [p[0] for p in points], [p[1] for p in points]

    def save(figure: Any, name: str) -> None:
        figure.suptitle(title, fontsize=11)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        written.append(folder / name)

    figure, axis = plt.subplots(figsize=(7, 4))
    for column, label in (("episode/return", "training rows"), ("eval/return", "deterministic")):
        x, y = series(column)
        if x:
            axis.plot(x, y, marker=".", label=label)
    axis.set(xlabel="frames", ylabel="episode return")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
        save(figure, "learning_curve.png")
    else:
        plt.close(figure)

    columns = [c for r in rows[-1:] for c in r if c.startswith("loss/") and series(c)[0]]
    losses = [c for c in columns if c != "loss/total"]
    if losses:
        across = -(-len(losses) // 3)
        figure, axes = plt.subplots(
            across, 3, figsize=(10, 0.5 + 2.5 * across), sharex=True, squeeze=False
        )
        for axis, column in zip(axes.flat, losses, strict=False):
            axis.plot(*series(column))
            axis.set_title(column.removeprefix("loss/"), fontsize=10)
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(losses) :]:
            axis.axis("off")
        for axis in axes.flat[max(len(losses) - 3, 0) : len(losses)]:
            axis.set_xlabel("frames")
            axis.tick_params(labelbottom=True)
        save(figure, "losses.png")

    if loop is not None and loop.video is not None:
        steps = [i for i in (0, 4, 9, 14, 19, 29, 39, 49) if i < len(loop.video)]
        figure, axes = plt.subplots(1, len(steps), figsize=(1.5 * len(steps), 5.2), squeeze=False)
        for axis, i in zip(axes[0], steps, strict=True):
            axis.imshow(loop.video[i])
            axis.set_title(f"{i + 1} ahead", fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        third = len(loop.video[0]) / 3
        places = [third / 2, 1.5 * third, 2.5 * third]
        axes[0][0].set_yticks(places, ["truth", "open loop", "difference"], fontsize=9)
        save(figure, "open_loop_pixels.png")

    if loop is not None and loop.truth.shape[2]:
        drawn = min(8, loop.truth.shape[2])
        down = -(-(drawn + 1) // 3)
        figure, axes = plt.subplots(down, 3, figsize=(11, 2.4 * down))
        flat, ahead = axes.flat, np.arange(1, loop.truth.shape[1] + 1)
        for i in range(drawn):
            flat[i].plot(ahead, loop.truth[0, :, i], label="truth")
            flat[i].plot(ahead, loop.prediction[0, :, i], "--", label="open loop")
            flat[i].set_title(names[i], fontsize=9)
            flat[i].grid(alpha=0.3)
        flat[0].legend(fontsize=8)
        flat[drawn].plot(ahead, loop.error, color="k")
        flat[drawn].set_title("error / spread, all components", fontsize=9)
        flat[drawn].set_ylim(bottom=0)
        flat[drawn].grid(alpha=0.3)
        for axis in axes.flat[-3:]:
            axis.set_xlabel("steps ahead")
        for axis in list(flat)[drawn + 1 :]:
            axis.axis("off")
        save(figure, "open_loop.png")

    if episodes is not None and len(episodes.returns) > 1:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
        for axis, sample, label in zip(
            axes, (episodes.returns, episodes.lengths), ("return", "length (steps)"), strict=True
        ):
            axis.hist(sample, bins=min(30, max(5, len(sample) // 4)))
            axis.axvline(float(np.median(sample)), color="k", linestyle="--", label="median")
            axis.set(xlabel=label, ylabel="episodes")
            axis.grid(alpha=0.3)
        axes[0].legend()
        save(figure, "episodes.png")

    if model is not None:
        figure, axis = plt.subplots(figsize=(7, 4))
        ahead = np.arange(1, len(model.error) + 1)
        for i, term in enumerate(model.terms):
            style = ("-", "--", ":")[i // 10 % 3]  # there are ten colours
            axis.plot(ahead, model.error[:, i], style, label=term)
        axis.axhline(1, color="k", linestyle=":", label="predicting the mean")
        axis.set(xlabel="steps ahead", ylabel="error / spread")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        save(figure, "world_model.png")
    return written
