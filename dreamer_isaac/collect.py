"""Collection: the acting policy steps the simulator and hands records to a sink.

`Sync` steps in the caller's thread. A collector has `start`, `step`, `publish`, `stop` and is a
context manager; the training loop needs no more, so that a threaded one fits the same place.

The first `eval_envs` rows act deterministically all the time; they are in the frame count, in
the evaluation curve, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from dreamer_isaac.envs.contract import Observation, SimEnv
from dreamer_isaac.models import Agent, Carry

Sink = Callable[[TensorDict], None]
"""Receives records [training envs, steps], on the simulator's device."""


class EpisodeStats:
    """Returns and lengths of finished episodes, summed on the device, read at log points."""

    def __init__(self, envs: int, device: torch.device):
        self.running = torch.zeros(2, envs, dtype=torch.float64, device=device)
        """Return and length of the running episode of every env."""
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        """Sums over finished episodes: return, length, count."""

    def update(self, reward: Tensor, done: Tensor) -> None:
        """Add one step: reward [N], done [N]."""
        self.running[0] += reward
        self.running[1] += 1
        ended = torch.where(done, self.running, 0.0)
        self.totals[:2] += ended.sum(1)
        self.totals[2] += done.sum()
        self.running.masked_fill_(done, 0.0)

    def read(self) -> dict[str, float]:
        """Means since the last call; empty when no episode ended."""
        total, length, count = self.totals.tolist()
        self.totals.zero_()
        if not count:
            return {}
        return {"return": total / count, "length": length / count, "episodes": count}

    def state_dict(self) -> dict[str, Tensor]:
        return {"running": self.running.clone(), "totals": self.totals.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.running.copy_(state["running"])
        self.totals.copy_(state["totals"])


class Sync:
    """Collects in the caller's thread.

    Args:
        env: the simulator. agent: the acting networks; on one device they are the learner's own.
        sink: receives the records. generator: the policy's noise, on the env's device.
        steps: env steps per `step()`. random_frames: frames with uniform actions at first.
        eval_envs: deterministic rows, the first ones.
    """

    def __init__(
        self,
        env: SimEnv,
        agent: Agent,
        sink: Sink,
        generator: torch.Generator,
        steps: int,
        random_frames: int,
        eval_envs: int,
    ):
        self.env, self.agent, self.sink, self.generator = env, agent, sink, generator
        self.steps, self.random_frames, self.eval_envs = steps, random_frames, eval_envs
        envs = env.info.num_envs
        self.frames = 0
        self.version = 0
        self.train_stats = EpisodeStats(envs - eval_envs, env.device)
        self.eval_stats = EpisodeStats(eval_envs, env.device)
        self.carry = agent.initial_carry(envs)
        self.observation: Observation | None = None
        self.deterministic = torch.arange(envs, device=env.device) < eval_envs

    def __enter__(self) -> Sync:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Reset the simulator, unless a checkpoint has restored it."""
        if self.observation is None:
            self.observation = self.env.reset()

    def stop(self) -> None:
        """Nothing runs in the background."""

    def publish(self, version: int) -> None:
        """Note the version of the weights; here the learner's own weights act."""
        self.version = version

    def step(self) -> int:
        """Collect `steps` env steps into the sink.

        Returns:
            Frames collected.

        Raises:
            ObservationError: when the simulator returned NaN; nothing of this batch is kept.
        """
        records = [self._one() for _ in range(self.steps)]
        self.env.check_finite()
        batch: Any = TensorDict.stack(records, 1)  # [envs, steps]
        self.sink(batch)
        collected = self.steps * self.env.info.num_envs
        self.frames += collected
        return collected

    def _one(self) -> TensorDict:
        """One env step; the record of the training rows."""
        assert self.observation is not None, "start() comes first"
        obs, is_first = self.observation
        rssm, device = self.agent.rssm, self.env.device
        envs = len(obs)
        uniform = torch.rand(envs, rssm.categoricals, generator=self.generator, device=device)
        normal = torch.randn(envs, self.agent.action, generator=self.generator, device=device)
        belief, state, action = self.agent.act(
            obs, is_first, self.carry, uniform, normal, self.deterministic
        )
        if self.frames < self.random_frames:
            bound = self.env.action_bound
            draw = torch.rand(action.shape, generator=self.generator, device=device)
            action = torch.where(self.deterministic.unsqueeze(-1), action, (2 * draw - 1) * bound)
        action, outcome, following = self.env.step(action)
        self.carry = Carry(belief, state, action)
        self.observation = following
        rows = slice(self.eval_envs, None)
        self.train_stats.update(outcome.reward[rows], outcome.done[rows])
        if self.eval_envs:
            head = slice(0, self.eval_envs)
            self.eval_stats.update(outcome.reward[head], outcome.done[head])
        record = TensorDict(
            obs=obs, is_first=is_first, action=action, reward=outcome.reward,
            terminated=outcome.terminated, truncated=outcome.truncated, belief=belief,
            state_index=rssm.compress(state),
            version=torch.full((envs,), self.version, dtype=torch.int32, device=device),
            batch_size=[envs],
        )  # fmt: skip
        return record[rows]

    def read_stats(self) -> dict[str, float]:
        """Episode means since the last call: `episode/*` (training rows), `eval/*`."""
        out = {f"episode/{k}": v for k, v in self.train_stats.read().items()}
        return out | {f"eval/{k}": v for k, v in self.eval_stats.read().items()}

    def state_dict(self, exact: bool) -> dict[str, Any]:
        """The frame count; with `exact`, everything that decides what comes next."""
        state: dict[str, Any] = {"frames": self.frames}
        if exact:
            assert self.observation is not None
            state |= {
                "env": self.env.state_dict(),
                "carry": [t.clone() for t in self.carry],
                "obs": self.observation.obs.clone(),
                "is_first": self.observation.is_first.clone(),
                "generator": self.generator.get_state(),
                "train_stats": self.train_stats.state_dict(),
                "eval_stats": self.eval_stats.state_dict(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; without the exact part the simulator starts new episodes."""
        self.frames = state["frames"]
        if "env" not in state:
            return
        self.env.load_state_dict(state["env"])
        self.carry = Carry(*state["carry"])
        self.observation = Observation(state["obs"], state["is_first"])
        self.generator.set_state(state["generator"].cpu())
        self.train_stats.load_state_dict(state["train_stats"])
        self.eval_stats.load_state_dict(state["eval_stats"])
