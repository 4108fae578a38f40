"""The Dreamer update: one function, `Learner.update(batch) -> metrics`.

A batch is T+1 consecutive records of B envs. Record `t` holds `obs[t]`, `is_first[t]`, `action[t]`
and what the action led to: `reward`, `terminated`, `truncated`. The observations of steps
t = 1..T are trained, and what the actions of steps 0..T-1 led to; the first record's stored latents
are where the recurrence begins.

Where the formulas differ from TorchRL's `DreamerV3Loss` and the reference on purpose:

* **Arrivals.** Reward and continuation of the action of record t-1 are trained on the features at
  t, as everywhere, unless t starts a new episode: then what the action led to was never observed
  here (or differently by every simulator), and they are trained on the *prior* predicted from
  record t-1. The belief before the reset is computed by the recurrence anyway.
* **Replay critic.** The reference has a record for the terminal observation and masks its loss;
  here every record is a state in which an action was taken, so nothing is masked, and at an
  episode's end the return bootstraps from the critic's value of the arrival (times 0 where
  terminated): truncation is not termination.
* **Reset.** The state at `is_first` starts from core(0, 0, 0), computed once per update instead of
  zeroing the inputs of every step; the result is the same.

Four switches change how the update is executed and nothing else:

* `optimization.autocast=bfloat16` or `float16`: networks run on a copy of the weights in that type,
  made once an update; master weights, optimiser, noise and losses stay float32. With float16 the
  loss is scaled (`optim.LossScale`).
* `optimization.compile.enabled`: the time step of each loop, and what lies between the loops, are
  compiled (never the unrolled sequence: seconds instead of minutes).
* `optimization.compile.kernels`: small batches' recurrence runs in fused kernels (kernels.py).
* `optimization.compile.cudagraph`: the whole update is captured in one CUDA graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn import functional as F

from dreamer_isaac.compiling import as_it_is, compile_function, wait_for_compiler
from dreamer_isaac.config import AlgoConfig, OptimizationConfig
from dreamer_isaac.models import Agent
from dreamer_isaac.models.recurrence import Recurrence
from dreamer_isaac.optim import FlatOptimizer, LaProp, LossScale, flatten, set_generator
from dreamer_isaac.profiling import Phases

Batch = Mapping[str, Tensor]
"""Records by name; see `Learner.update`."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the run stops and keeps its last checkpoint."""


@dataclass
class Noise:
    """Every random number of one update, so that two learners can be fed the same. Uniform for
    categorical states, normal for gaussian ones; actions' noise is normal."""

    posterior: Tensor
    """[T, B, S]"""
    arrival: Tensor
    """[B, T, S], for the prior state that stands in at an episode's end."""
    prior: Tensor
    """[H, B*T, S], imagined states."""
    action: Tensor
    """[H, B*T, A], imagined actions."""


class Observed(NamedTuple):
    """The world model's pass over a batch, steps 1..T."""

    belief: Tensor
    """[B, T, D]"""
    state: Tensor
    """[B, T, S*K]"""
    posterior: Tensor
    """[B, T, S, K] logits."""
    prior: Tensor
    """[B, T, S, K] logits."""
    arrival: Tensor
    """[B, T, F] features of what the action of the record before led to."""

    @property
    def features(self) -> Tensor:
        """[B, T, F]"""
        return torch.cat([self.belief, self.state], -1)


def lambda_return(
    reward: Tensor, value: Tensor, discount: Tensor, lmbda: float | Tensor, dim: int = -1
) -> Tensor:
    """R[t] = r[t+1] + d[t+1] ((1 - l[t+1]) v[t+1] + l[t+1] R[t+1]), R[T] = v[T].

    Sutton and Barto's lambda return as DreamerV3 (eq. 7) writes it. A linear recurrence, solved by
    doubling (Hillis and Steele 1986): log2(T) rounds over all steps instead of T small ones.

    Args:
        reward, value, discount: entry t of dimension `dim` belongs to the state at t+1.
        lmbda: a number, or a tensor where it differs from step to step.

    Returns:
        The same shape.
    """
    reward, value, discount = (x.movedim(dim, 0) for x in (reward, value, discount))
    if isinstance(lmbda, Tensor):
        lmbda = lmbda.movedim(dim, 0)
    factor = discount * lmbda
    out = reward + (discount - factor) * value
    # The last step has nothing after it but its value.
    out = torch.cat([out[:-1], (reward + discount * value)[-1:]])
    factor = torch.cat([factor[:-1], torch.zeros_like(factor[-1:])])
    shift = 1
    while shift < len(out):
        head, tail = slice(None, -shift), slice(shift, None)
        out = torch.cat([out[head] + factor[head] * out[tail], out[-shift:]])
        factor = torch.cat([factor[head] * factor[tail], torch.zeros_like(factor[-shift:])])
        shift *= 2
    return out.movedim(0, dim)


class Learner:
    """Owns the optimiser and the return normaliser; trains `agent` in place.

    Args:
        agent: the networks, already on the learner's device.
        generator: draws the update's noise; on the agent's device.
        reward_multiplier: rewards are trained times this (config.AlgoConfig.reward_multiplier).
    """

    def __init__(
        self,
        agent: Agent,
        algo: AlgoConfig,
        optimization: OptimizationConfig,
        generator: torch.Generator,
        reward_multiplier: float = 1.0,
    ):
        self.agent, self.algo, self.generator = agent, algo, generator
        self.fields = FIELDS + (("pixels",) if agent.pixels else ())
        """The entries of a batch that an update reads."""
        self.reward_multiplier = reward_multiplier
        self.flat = flatten(agent.parameters())
        """All weights, the slow critic's last; `agent`'s parameters are views of it."""
        self.params = agent.learned()
        on_gpu = {"true": True, "false": False, "auto": self.flat.device.type == "cuda"}
        wrap = compile_function if on_gpu[optimization.compile.enabled] else as_it_is
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(optimization.autocast)
        self.net = copy.deepcopy(agent) if half else agent
        """The networks that the update runs: `agent`, or its copy in half precision."""
        self.working = flatten(self.net.parameters(), half) if half else self.flat
        self.scale = LossScale(self.flat.device) if half is torch.float16 else None
        self.wrap = wrap
        kernels = optimization.compile.kernels
        self._kernels = kernels == "true" or (kernels == "auto" and wrap is compile_function)
        self.optimizer = self._make_optimizer(optimization)
        self._slow: list[Tensor] = list(agent.slow_critic.parameters())
        self._critic: list[Tensor] = list(agent.critic.parameters())
        self.device, self.dtype = self.flat.device, self.flat.dtype
        self.return_low = self.flat.new_zeros(())
        self.return_high = self.flat.new_zeros(())
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.last_batch: dict[str, Tensor] | None = None
        """See `_keep_batch`."""
        self._kept: dict[Any, dict[str, Tensor]] = {}
        self.updates = 0
        self._prepare()
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._capture = on_gpu[optimization.compile.cudagraph]
        self._graphs: dict[Any, Captured] = {}
        self.phases = Phases(self.device, enabled=False)
        """What times the update's phases; to be set before the first update."""
        self.ahead = 2
        """Updates that may be under way when another one is launched."""
        self._launched: list[torch.cuda.Event] = []

    def _make_optimizer(self, optimization: OptimizationConfig) -> FlatOptimizer:
        return LaProp(
            self.params, optimization.lr, optimization.warmup_updates, optimization.agc,
            flat=self.flat, sources=self.net.learned(), anneal=optimization.anneal, wrap=self.wrap,
        )  # fmt: skip

    def _prepare(self) -> None:
        """The functions that are compiled."""
        wrap = self.wrap
        self.recurrence, self._returns = Recurrence(self.net.rssm, wrap), lambda_return
        if self._kernels and self.device.type == "cuda":
            from dreamer_isaac.models import kernels  # needs Triton

            self.recurrence = kernels.FusedRecurrence(self.net.rssm, wrap)
            self._returns = kernels.returns
        self._encode, self._finish = wrap(self._encode_), wrap(self._finish_)
        self._imagine_step = wrap(self._imagine_step_)
        self._model_total = wrap(self._model_total_)
        self._behaviour_total = wrap(self._behaviour_total_)

    # -- one update ----------------------------------------------------------------------------

    def update(self, batch: TensorDictBase) -> tuple[dict[str, Tensor], TensorDict]:
        """Train on one batch.

        Args:
            batch: obs [B, T+1, O], action [B, T+1, A], is_first, reward, terminated [B, T+1],
                pixels [B, T+1, H, W, C] uint8 where the agent sees any, and the latents of the
                first record, belief [B, D] and state [B, S].

        Returns:
            Scalar metrics on the device (nothing is read by the host), and the refreshed latents
            of steps 1..T: belief [B, T, D] and state [B, T, S]. With a captured update both
            are valid until the next one.
        """
        source = Given(batch)
        if self._capture:
            fields = tuple((k, batch[k].shape, batch[k].dtype) for k in self.fields)
            if fields not in self._graphs:  # another shape is another graph
                source.batch = batch.clone()
                self._graphs[fields] = Captured(self, source)
            graph = self._graphs[fields]
            assert isinstance(graph.source, Given)
            for name in self.fields:
                graph.source.batch[name].copy_(batch[name])
            metrics, latents = graph()
            marks = graph.marks
        else:
            metrics, latents = self._update(source)
            marks = self.phases.take()
        self.updates += 1
        self.phases.add(marks)
        return metrics, latents

    def train(self, source: Source) -> dict[str, Tensor]:
        """Sample a batch, train on it, and write its latents back; all of it in one CUDA graph
        where updates are captured. Returns the metrics of `update`.

        Args:
            source: the replay buffer, always the same one.

        Raises:
            ValueError: nothing can be sampled yet.
        """
        if source.device != self.device:  # records in main memory: they travel
            batch = source.sample()
            metrics, latents = self.update(batch.to(self.device))
            # Asynchronous copies would be waited for on the current device, which the learner's
            # need not be.
            source.refresh(batch, latents.to(source.device, non_blocking=False))
            return metrics
        if self._capture:
            if "source" not in self._graphs:
                self._graphs["source"] = Captured(self, source)
            assert self._graphs["source"].source is source
            graph = self._graphs["source"]
            self._keep_pace()
            metrics, _ = graph()
            event = torch.cuda.Event(blocking=True)  # sleeps instead of spinning
            event.record(torch.cuda.current_stream(self.device))
            self._launched.append(event)
            marks = graph.marks
        else:
            metrics, _ = self._update(source)
            marks = self.phases.take()
        self.updates += 1
        self.phases.add(marks)
        return metrics

    def _keep_pace(self) -> None:
        """Wait until no more than `ahead` updates are under way: weights are published, and the
        replay ratio counted, when updates are launched."""
        while len(self._launched) > self.ahead:
            self._launched.pop(0).synchronize()

    def _update(
        self, source: Source, write_back: bool = True
    ) -> tuple[dict[str, Tensor], TensorDict]:
        """The whole update as a fixed sequence of kernels: no host value is read or written."""
        phase = self.phases
        with phase("sample"):
            sampled = source.sample()
            batch = {k: sampled[k] for k in self.fields}
            self._keep_batch(batch)
        if self.working is not self.flat:
            self.working.copy_(self.flat)
        noise = self.draw_noise(batch["obs"].shape[0], batch["obs"].shape[1] - 1)
        self.optimizer.zero_grad()
        total, losses, metrics, observed = self._gradients(batch, noise)
        with phase("optimizer"):
            norm = self.optimizer.step(self.scale)
            self._move_slow_critic()
        healthy = torch.isfinite(norm)
        if self.scale:  # an overflow only costs this update, unless no scale is small enough
            healthy |= self.scale.value >= self.scale.SMALLEST
            metrics["loss_scale"] = self.scale.value.clone()
            norm = norm.nan_to_num(0.0, 0.0)
        self.finite.logical_and_(torch.isfinite(total) & healthy)
        metrics = metrics | {f"loss/{k}": v.detach() for k, v in losses.items()}
        metrics |= {"loss/total": total, "grad_norm": norm}
        belief, state = observed.belief.detach(), observed.state.detach()
        latents = TensorDict(
            {"belief": belief, "state": self.agent.rssm.compress(state)}, belief.shape[:2]
        )
        if write_back:
            with phase("write-back"):
                source.refresh(sampled, latents)
        return metrics, latents

    def _keep_batch(self, batch: Batch) -> None:
        """In `last_batch`: the last batch, or the one of the first update that was not finite."""
        shape = tuple(v.shape for v in batch.values())
        if shape not in self._kept:  # kept for good: a graph writes to it
            self._kept[shape] = {k: v.clone() for k, v in batch.items()}
        self.last_batch = self._kept[shape]
        for name, kept in self.last_batch.items():
            torch.where(self.finite, batch[name], kept, out=kept)

    def _gradients(
        self, batch: Batch, noise: Noise
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Observed]:
        """Leaves the gradients in `net`; returns the weighted loss, its terms, metrics, and the
        observed pass."""
        phase = self.phases
        with phase("observe forward"):
            observed = self.observe(batch, noise)
        # Cut here: what is above the observed states is differentiated on its own, so that the
        # world model's heads, forward and backward, can run beside the imagination. Two cuts, or
        # both streams would add to the same gradients.
        cuts = [Observed(*(x.detach().requires_grad_() for x in observed)) for _ in range(2)]
        with self._beside(), phase("world model's heads"):
            total, losses = self._model_total(batch, cuts[0])
            self._scaled(total).backward()
        with phase("imagination"):
            belief, state = (x.detach().flatten(0, 1) for x in (observed.belief, observed.state))
            features, actions = self.imagine(belief, state, noise)
        self._join()
        with phase("actor and critic"):
            other, more, metrics = self._behaviour_total(batch, cuts[1], features, actions)
            self._scaled(other).backward()
        with phase("observe backward"):
            pairs = zip(*cuts, strict=True)
            grads = [
                reduce(torch.add, [x.grad for x in pair if x.grad is not None]) for pair in pairs
            ]
            torch.autograd.backward(list(observed), grads)
        return (total + other).detach(), losses | more, metrics, observed

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale.value if self.scale else loss

    def scales(self) -> dict[str, float]:
        """Weight of each loss term."""
        a = self.algo
        return {
            "reconstruction": a.reconstruction_scale, "reward": a.reward_scale,
            "continue": a.continue_scale, "dynamics": a.dyn_scale,
            "representation": a.rep_scale, "actor": a.actor_scale, "critic": a.critic_scale,
            "replay_critic": a.replay_critic_scale,
        }  # fmt: skip

    def losses(
        self, batch: Batch, noise: Noise
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Observed]:
        """Every loss term, unweighted, as a scalar with its graph; metrics; the observed pass."""
        observed = self.observe(batch, noise)
        belief, state = (x.detach().flatten(0, 1) for x in (observed.belief, observed.state))
        features, actions = self.imagine(belief, state, noise)
        _, losses = self._model_total_(batch, observed)
        _, more, metrics = self._behaviour_total_(batch, observed, features, actions)
        return losses | more, metrics, observed

    def _model_total_(self, batch: Batch, observed: Observed) -> tuple[Tensor, dict[str, Tensor]]:
        """The world model's weighted sum of losses, and every term."""
        losses = self.model_losses(batch, observed)
        return self._weighted(losses), losses

    def _behaviour_total_(
        self, batch: Batch, observed: Observed, features: Tensor, actions: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Actor's and critic's weighted sum of losses, every term, metrics."""
        losses, metrics, returns = self.behaviour_losses(features, actions)
        first_return = returns[0].unflatten(0, observed.belief.shape[:2])
        losses["replay_critic"] = self.replay_critic_loss(batch, observed, first_return)
        return self._weighted(losses), losses, metrics

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        scales = self.scales()
        return torch.stack([scales[k] * v for k, v in losses.items()]).sum()

    def _beside(self) -> Any:
        """A context whose kernels may run beside what comes after it, until `_join`."""
        if self._side is None:
            return contextlib.nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._side)

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    # -- world model ---------------------------------------------------------------------------

    def observe(self, batch: Batch, noise: Noise) -> Observed:
        """Filter the batch: the recurrence over T steps, everything else at once."""
        belief, state, action, embedding, first, start = self._inputs(batch)
        unrolled = self.recurrence.unroll(
            belief, state, action, embedding, first, start, noise.posterior
        )
        return Observed(*self._finish(*unrolled, first, start, noise.arrival))

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the recurrence starts from and is fed with, time-major: belief [B, D] and state
        before the first step; action, embedding, first [T, B, ...]; the initial belief."""
        rssm = self.net.rssm
        obs, action = batch["obs"][:, 1:].transpose(0, 1), batch["action"][:, :-1].transpose(0, 1)
        first = batch["is_first"][:, 1:].transpose(0, 1).unsqueeze(-1).contiguous()  # [T, B, 1]
        pixels = batch["pixels"][:, 1:].transpose(0, 1) if "pixels" in batch else None
        embedding, action, start = self._encode(obs, action, pixels)
        belief, state = batch["belief"].to(rssm.dtype), rssm.expand(batch["state"])
        return belief, state, action, embedding, first, start

    def _encode_(
        self, obs: Tensor, action: Tensor, pixels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the recurrence is fed with: embedding, action, initial belief."""
        rssm = self.net.rssm
        embedding = rssm.project_embedding(self.net.encoder(obs, pixels))
        return embedding, rssm.project_action(action), rssm.initial_belief()

    def _finish_(
        self, raw: Tensor, belief: Tensor, posterior: Tensor, onehot: Tensor, first: Tensor,
        start: Tensor, uniform: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """From time-major results of the recurrence to the fields of `Observed`."""
        rssm = self.net.rssm
        raw, belief, posterior, onehot, first = (
            x.transpose(0, 1) for x in (raw, belief, posterior, onehot, first)
        )
        state = rssm.straight_through(onehot, rssm.probs(posterior))
        reached = rssm.prior_logits(raw)
        prior = torch.where(first.unsqueeze(-1), rssm.prior_logits(start), reached)
        arrival_state = torch.where(first, rssm.sample(reached, uniform), state)
        return belief, state, posterior, prior, torch.cat([raw, arrival_state], -1)

    def model_losses(self, batch: Batch, observed: Observed) -> dict[str, Tensor]:
        """Reconstruction, reward, continuation and both KL terms (DreamerV3 eq. 4 and 5)."""
        agent, algo = self.net, self.algo
        decoded = agent.decoder(observed.features)
        reward = agent.reward(observed.arrival)
        logit = agent.continuation(observed.arrival)
        target = batch["reward"][:, :-1] * self.reward_multiplier
        alive = batch["terminated"][:, :-1].logical_not().to(self.dtype)
        alive = alive * (1 - 1 / algo.discount_horizon)
        kl = agent.rssm.kl
        dynamics = kl(observed.posterior.detach(), observed.prior)
        representation = kl(observed.posterior, observed.prior.detach())
        return {
            "reconstruction": agent.decoder.loss(decoded, *seen(batch)).mean(),
            "reward": agent.reward.loss(reward, target).mean(),
            "continue": F.binary_cross_entropy_with_logits(logit, alive),
            "dynamics": dynamics.clamp_min(algo.free_nats).mean(),
            "representation": representation.clamp_min(algo.free_nats).mean(),
        }

    # -- behaviour -----------------------------------------------------------------------------

    @torch.no_grad()
    def imagine(self, belief: Tensor, state: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """Roll the policy out in the world model.

        Args:
            belief: [M, D]. state: [M, S*K].

        Returns:
            features [H+1, M, F] and actions [H, M, A].
        """
        features = belief.new_empty(len(noise.prior) + 1, len(belief), self.net.features)
        torch.cat([belief, state], -1, out=features[0])
        actions = [
            self._imagine_step(features[h], features[h + 1], uniform, normal)
            for h, (uniform, normal) in enumerate(zip(noise.prior, noise.action, strict=True))
        ]
        return features, torch.stack(actions)

    def _imagine_step_(
        self, features: Tensor, out: Tensor, uniform: Tensor, normal: Tensor
    ) -> Tensor:
        """Writes the next features [M, F] to `out` and returns the action [M, A] that led there."""
        agent, rssm = self.net, self.net.rssm
        belief, state = features.split([rssm.belief, rssm.state], -1)
        mean, std = agent.actor(features)
        action = agent.actor.sample(mean, std, normal)
        belief = rssm.core(belief, state, rssm.project_action(action))
        state = rssm.draw(rssm.prior_logits(belief), uniform)
        # Two copies, each made by the kernel that computes its part; joined first, the state's
        # softmax would be computed again for every element of the belief.
        out[:, : rssm.belief].copy_(belief)
        out[:, rssm.belief :].copy_(state)
        return action

    def behaviour_losses(
        self, features: Tensor, actions: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Actor (REINFORCE) and critic on imagined trajectories (DreamerV3 eq. 7 to 11).

        Args:
            features: [H+1, M, F]. actions: [H, M, A].

        Returns:
            The two losses, metrics, and the returns [H, M].
        """
        agent, algo = self.net, self.algo
        with torch.no_grad():
            reward = agent.reward.mean(agent.reward(features[1:]))
            alive = torch.sigmoid(agent.continuation(features))  # [H+1, M], discount included
            weight = alive.cumprod(0)[:-1]
            slow = agent.slow_critic.mean(agent.slow_critic(features[:-1]))
        logits = agent.critic(features[:-1])
        with torch.no_grad():
            # The last state only bootstraps, so it needs no graph.
            last = agent.critic.mean(agent.critic(features[-1:]))
            value = torch.cat([agent.critic.mean(logits), last])
            returns = self._returns(reward, value[1:], alive[1:], algo.lmbda, dim=0)
            scale = self._update_return_scale(returns)
            advantage = (returns - value[:-1]) / scale
        mean, std = agent.actor(features[:-1])
        entropy = agent.actor.entropy(std)
        policy = agent.actor.log_prob(mean, std, actions) * advantage + algo.entropy * entropy
        critic = agent.critic.loss(logits, returns, (slow, algo.slow_critic_scale))
        losses = {"actor": -(weight * policy).mean(), "critic": (weight * critic).mean()}
        metrics = {
            "imagined_reward": reward.mean(), "imagined_return": returns.mean(),
            "imagined_continue": alive.mean(), "value": value.mean(),
            "advantage_std": advantage.std(), "return_scale": scale.clone(),
            "actor_entropy": entropy.detach().mean(), "actor_std": std.detach().mean(),
        }  # fmt: skip
        return losses, metrics, returns

    def replay_critic_loss(self, batch: Batch, observed: Observed, first_return: Tensor) -> Tensor:
        """The critic on replayed rewards; its gradient also shapes the world model's features."""
        agent, algo = self.net, self.algo
        logits = agent.critic(observed.features[:, :-1])
        with torch.no_grad():
            reward = (
                batch["reward"][:, 1:-1] * self.reward_multiplier
            )  # led to by the actions of steps 1..T-1
            alive = batch["terminated"][:, 1:-1].logical_not().to(self.dtype)
            ended = batch["is_first"][:, 2:]
            reached = agent.critic.mean(agent.critic(observed.arrival[:, 1:]))
            value = torch.where(ended, reached, first_return[:, 1:])
            lmbda = algo.lmbda * (1 - ended.to(self.dtype))
            discount = alive * (1 - 1 / algo.discount_horizon)
            target = self._returns(reward, value, discount, lmbda)
            slow = agent.slow_critic.mean(agent.slow_critic(observed.features[:, :-1]))
        return agent.critic.loss(logits, target, (slow, algo.slow_critic_scale)).mean()

    # -- state ---------------------------------------------------------------------------------

    def draw_noise(self, batch: int, length: int) -> Noise:
        """All random numbers of one update, in two calls."""
        rssm, algo = self.net.rssm, self.algo
        starts, width = length * batch, rssm.noise_width
        sizes = [starts * width, starts * width, algo.horizon * starts * width]
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        make = torch.rand if rssm.noise == "uniform" else torch.randn
        flat = make(sum(sizes), generator=self.generator, **options).split(sizes)
        shape = (algo.horizon, starts, self.agent.action)
        return Noise(
            posterior=flat[0].view(length, batch, width),
            arrival=flat[1].view(batch, length, width),
            prior=flat[2].view(algo.horizon, starts, width),
            action=torch.randn(shape, generator=self.generator, **options),
        )

    def _update_return_scale(self, returns: Tensor) -> Tensor:
        """max(minimum, range of the 5th to 95th percentile), both as moving averages."""
        algo = self.algo
        ordered = returns.flatten().sort().values
        # As torch.quantile, whose levels would have to travel to the device in every update.
        low, high = (
            ordered[int(place)].lerp(ordered[min(int(place) + 1, len(ordered) - 1)], place % 1)
            for place in (
                q * (len(ordered) - 1) for q in (algo.return_norm_low, algo.return_norm_high)
            )
        )
        self.return_low.lerp_(low, algo.return_norm_rate)
        self.return_high.lerp_(high, algo.return_norm_rate)
        return (self.return_high - self.return_low).clamp_min(algo.return_norm_min)

    @torch.no_grad()
    def _move_slow_critic(self) -> None:
        torch._foreach_lerp_(self._slow, self._critic, self.algo.slow_critic_rate)

    def check_finite(self) -> None:
        """Wait for the device and complain if any update so far was not finite.

        Raises:
            NonFiniteError
        """
        if not bool(self.finite):
            raise NonFiniteError(
                "a loss or gradient became NaN or infinite. The networks are spoiled; the last "
                "checkpoint is from before. A smaller optimization.lr often helps."
            )

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, normaliser, noise generator, counter (the agent saves itself)."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "return_low": self.return_low.clone(),
            "return_high": self.return_high.clone(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
            "loss_scale": [self.scale.value.clone(), self.scale.good.clone()] if self.scale else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy into the existing tensors.

        Raises:
            ValueError: the optimiser's state is of other networks.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        self.return_low.copy_(state["return_low"])
        self.return_high.copy_(state["return_high"])
        set_generator(self.generator, state["generator"])
        self.updates = int(state["updates"])
        if self.scale and state.get("loss_scale"):  # a run may change its precision when it resumes
            for mine, saved in zip(
                (self.scale.value, self.scale.good), state["loss_scale"], strict=True
            ):
                mine.copy_(saved)

    def tensors(self) -> list[Tensor]:
        """Everything that an update changes in place, except the generator."""
        o = self.optimizer
        scale = [self.scale.value, self.scale.good] if self.scale else []
        return [self.flat, self.working, o.square, o.momentum, o.step_count, self.return_low,
                self.return_high, self.finite, *scale]  # fmt: skip


FIELDS = ("obs", "is_first", "action", "reward", "terminated", "belief", "state")
"""The entries of a batch that every update reads."""


def seen(batch: Batch) -> tuple[Tensor, ...]:
    """What was observed at steps 1..T: the vector, and the pictures if there are any."""
    return tuple(batch[k][:, 1:] for k in ("obs", "pixels") if k in batch)


class Source(Protocol):
    """Where batches come from, and where their refreshed latents go: the replay buffer. Both
    methods only enqueue work on the device."""

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        ...

    @property
    def generators(self) -> list[torch.Generator]:
        """What `sample` draws from; a CUDA graph that contains it must know."""
        ...

    @property
    def slices(self) -> int:
        """B."""
        ...

    def sample(self) -> TensorDictBase:
        """A batch of `FIELDS` (and pixels): [B, T+1, ...], of belief and state the first record's
        alone, [B, ...].

        Raises:
            ValueError: there is none yet.
        """
        ...

    def refresh(self, batch: TensorDictBase, latents: TensorDictBase) -> None:
        """Take the belief and state [B, T, ...] of steps 1..T of the batch sampled last."""
        ...


class Given:
    """One batch as a source."""

    def __init__(self, batch: TensorDictBase):
        self.batch, self.slices = batch, len(batch)
        self.device: torch.device = batch["obs"].device  # type: ignore[assignment]
        self.generators: list[torch.Generator] = []

    def sample(self) -> TensorDictBase:
        return self.batch

    def refresh(self, batch: TensorDictBase, latents: TensorDictBase) -> None:
        """The caller has the latents."""


class Captured:
    """One update of a learner as a CUDA graph, sampling and write-back included.

    Two updates are made first to compile and warm up, without write-back, and undone.
    """

    def __init__(self, learner: Learner, source: Any):
        self.source = source
        wait_for_compiler()
        learner.recurrence.prepare(source.slices)
        generators = [learner.generator, *source.generators]
        before = [t.clone() for t in learner.tensors()]
        states = [g.get_state() for g in generators]
        stream = torch.cuda.Stream(learner.device)
        stream.wait_stream(torch.cuda.current_stream(learner.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                learner._update(source, write_back=False)
        torch.cuda.current_stream(learner.device).wait_stream(stream)
        learner.optimizer.zero_grad()  # the graph makes its own
        learner.phases.take()
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)
        # Other threads (the simulator's) may use CUDA meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.out = learner._update(source)
        self.learner, self.kept = learner, learner.last_batch
        self.marks = learner.phases.take()
        for tensor, value in zip(learner.tensors(), before, strict=True):
            tensor.copy_(value)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    def __call__(self) -> tuple[dict[str, Tensor], TensorDict]:
        """Replay; the results live in the graph's memory until the next call."""
        self.graph.replay()
        self.learner.last_batch = self.kept
        return self.out
