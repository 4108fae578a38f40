"""`mode=export`: the acting policy in one file that runs without this package.

One step of the policy is a function of its inputs alone: what it remembers goes in and comes out.

    action, belief, state = policy(observation, [pixels,] is_first, belief, state, action, noise)

`action` is the one that was executed last; with `is_first` what is remembered does not matter. The
policy's mean is taken, but its state is sampled, as in training (see `Agent.act`), from the
caller's `noise`: the step is deterministic. `policy.json`, which is also inside both files, names
everything.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamer_isaac import checkpoint
from dreamer_isaac.config import Config, build, to_dict
from dreamer_isaac.models import Agent, Carry

FORMAT = 1
"""Raised when inputs, outputs or names change."""


class Policy(nn.Module):
    """One acting step in the simulator's units.

    Args:
        bound: `env.action_bound` of the run; what comes out is within.
    """

    def __init__(self, agent: Agent, bound: float):
        super().__init__()
        self.agent, self.bound = agent, bound

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of `example`; N rows each. Returns action [N, A], belief [N, D] and state
        [N, S*K]."""
        observation, *rest = inputs
        pixels = rest.pop(0) if self.agent.pixels else None
        is_first, belief, state, action, noise = rest
        carry = Carry(belief, state, action / self.bound)
        belief, state, new = self.agent.act(
            observation, is_first, carry, noise, torch.zeros_like(action),
            torch.ones_like(is_first), pixels,
        )  # fmt: skip
        return new.clamp(-1, 1) * self.bound, belief, state


SEES = ("from_pixels", "pixels_only", "image_size", "cameras")
"""Keys of `env` that decide what the policy is shown."""

OUTPUTS = ("next_action", "next_belief", "next_state")


def example(agent: Agent, rows: int) -> dict[str, Tensor]:
    """Inputs at an episode's start, by name, in their order."""
    carry = agent.initial_carry(rows)
    inputs = {"observation": torch.zeros(rows, agent.observation)}
    if agent.pixels:
        inputs["pixels"] = torch.zeros(rows, *agent.pixels, dtype=torch.uint8)
    return inputs | {
        "is_first": torch.ones(rows, dtype=torch.bool), "belief": carry.belief,
        "state": carry.state, "action": carry.action,
        "noise": torch.full((rows, agent.rssm.noise_width), 0.5),
    }  # fmt: skip


def description(agent: Agent, meta: dict[str, Any], bound: float) -> dict[str, Any]:
    """Everything that a caller must know."""
    task = meta["task"]
    inputs = example(agent, 1)
    return {
        "format": FORMAT, "what": "dreamer_isaac policy", "task": task["task"],
        "trained_on": task["backend"], "frames": meta["frames"], "updates": meta["updates"],
        "step_seconds": task.get("step_dt"), "versions": meta["versions"],
        "observation_names": task["observation_names"], "action_names": task["action_names"],
        "action_low": -bound, "action_high": bound, "pixels": list(agent.pixels or []),
        "sees": {k: meta["config"]["env"][k] for k in SEES},
        "env_cfg": meta["config"]["env"]["cfg"],
        "noise": {"uniform": "uniform in [0, 1)", "normal": "standard normal"}[agent.rssm.noise],
        "inputs": {k: {"shape": ["N", *v.shape[1:]], "dtype": str(v.dtype).removeprefix("torch.")}
                   for k, v in inputs.items()},
        "outputs": {"next_action": "the action to execute, and `action` of the next step",
                    "next_belief": "`belief` of the next step", "next_state": "`state` likewise"},
        "first_step": "is_first true; belief, state and action zero",
    }  # fmt: skip


def load(cfg: Config) -> tuple[Agent, dict[str, Any], float]:
    """The agent of `checkpoint.path` on the CPU, its meta, in which keys that came after it have
    their defaults, and its bound of actions.

    Raises:
        CheckpointError
    """
    found = checkpoint.find(cfg.checkpoint.path)
    saved = checkpoint.load(found, ["networks"], torch.device("cpu"))
    meta = saved["meta"]
    run = build(meta["config"], stored=True)
    names = meta["task"]
    height, width, channels = names.get("pixels") or (0, 0, 0)
    pixels = (height, width, channels) if height else None
    agent = Agent(
        len(names["observation_names"]), len(names["action_names"]), run.model, run.algo, pixels
    )
    checkpoint.load_networks(agent, saved["networks"], found)
    return agent.eval(), meta | {"config": to_dict(run)}, run.env.action_bound


def write(agent: Agent, meta: dict[str, Any], bound: float, folder: Path) -> dict[str, Path]:
    """`policy.onnx`, `policy.pt` (TorchScript) and `policy.json`, which the others contain too.

    Args:
        meta: of the checkpoint.

    Returns:
        The files by kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy = Policy(agent, bound).eval()
    text = json.dumps(description(agent, meta, bound), indent=1)
    files = {k: folder / f"policy.{k}" for k in ("onnx", "pt", "json")}
    inputs = example(agent, 3)  # 1 would be taken for a constant
    with warnings.catch_warnings(), _silent(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(policy, tuple(inputs.values()), check_trace=False)
        torch.jit.save(script, files["pt"], _extra_files={"policy.json": text.encode()})
        rows = torch.export.Dim("N")
        program: Any = torch.onnx.export(
            policy, tuple(inputs.values()), dynamo=True, input_names=list(inputs),
            output_names=list(OUTPUTS), dynamic_shapes=(tuple({0: rows} for _ in inputs),),
        )  # fmt: skip
        program.model.metadata_props["policy.json"] = text
        program.save(files["onnx"], include_initializers=True)
    files["json"].write_text(text + "\n")
    return files


@contextlib.contextmanager
def _silent() -> Any:
    """The exporter's progress is of no use to anyone who exports."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
