"""The Dreamer update: one function, `Learner.update(batch) -> metrics`.

A batch is a TensorDict [B, T+1] of consecutive records of one env each (DESIGN: record `t` holds
`obs[t]`, `is_first[t]`, `action[t]` and what the action led to: `reward`, `terminated`,
`truncated`). The first record only gives context: its stored latents and its action. Steps
t = 1..T are trained.

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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn import functional as F

from dreamer_isaac.config import AlgoConfig, OptimizationConfig
from dreamer_isaac.models import Agent
from dreamer_isaac.optim import LaProp


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the run stops and keeps its last checkpoint."""


@dataclass
class Noise:
    """Every random number of one update, so that two learners can be fed the same."""

    posterior: Tensor
    """[T, B, S] uniform."""
    arrival: Tensor
    """[B, T, S] uniform, for the prior state that stands in at an episode's end."""
    prior: Tensor
    """[H, B*T, S] uniform, imagined states."""
    action: Tensor
    """[H, B*T, A] normal, imagined actions."""


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


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lmbda: float | Tensor) -> Tensor:
    """R[t] = r[t+1] + d[t+1] ((1 - l[t+1]) v[t+1] + l[t+1] R[t+1]), R[T] = v[T].

    Sutton and Barto's lambda return as DreamerV3 (eq. 7) writes it.

    Args:
        reward, value, discount: [..., T], entry t belongs to the state at t+1.
        lmbda: a number, or [..., T] where it differs from step to step.

    Returns:
        [..., T].
    """
    mix = torch.as_tensor(lmbda, dtype=reward.dtype, device=reward.device).expand_as(reward)
    base = reward + discount * (1 - mix) * value
    carry = value[..., -1]
    out = []
    for t in reversed(range(reward.shape[-1])):
        carry = base[..., t] + (discount * mix)[..., t] * carry
        out.append(carry)
    return torch.stack(out[::-1], -1)


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
        self.reward_multiplier = reward_multiplier
        self.params = agent.learned()
        self.optimizer = LaProp(
            self.params, optimization.lr, optimization.warmup_updates, optimization.agc
        )
        weight = next(iter(self.params.values()))
        self.device, self.dtype = weight.device, weight.dtype
        self.return_low = weight.new_zeros(())
        self.return_high = weight.new_zeros(())
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.last_batch: TensorDictBase | None = None
        self.updates = 0

    # -- one update ----------------------------------------------------------------------------

    def update(self, batch: TensorDictBase) -> tuple[dict[str, Tensor], TensorDict]:
        """Train on one batch.

        Args:
            batch: [B, T+1] with obs [.., O], is_first, action [.., A], reward, terminated,
                truncated [..], belief [.., D] and state_index [.., S] (of which only the first
                record's are read).

        Returns:
            Scalar metrics on the device (nothing is read by the host), and the refreshed latents
            of steps 1..T: belief [B, T, D] and state_index [B, T, S].
        """
        noise = self.draw_noise(batch.shape[0], batch.shape[1] - 1)
        losses, metrics, observed = self.losses(batch, noise)
        scales = self.scales()
        total = torch.stack([scales[k] * v for k, v in losses.items()]).sum()
        self.optimizer.zero_grad()
        total.backward()
        norm = self.optimizer.step()
        self._move_slow_critic()
        self.updates += 1
        ok = torch.isfinite(total.detach()) & torch.isfinite(norm)
        self.last_batch = batch
        self.finite &= ok
        metrics |= {f"loss/{k}": v.detach() for k, v in losses.items()}
        metrics |= {"loss/total": total.detach(), "grad_norm": norm}
        latents = TensorDict(
            belief=observed.belief.detach(),
            state_index=self.agent.rssm.compress(observed.state.detach()),
            batch_size=observed.belief.shape[:2],
        )
        return metrics, latents

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
        self, batch: TensorDictBase, noise: Noise
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Observed]:
        """Every loss term, unweighted, as a scalar with its graph; metrics; the observed pass."""
        observed = self.observe(batch, noise)
        losses = self.model_losses(batch, observed)
        actor_losses, metrics, first_return = self.behaviour_losses(observed, noise)
        losses |= actor_losses
        losses["replay_critic"] = self.replay_critic_loss(batch, observed, first_return)
        return losses, metrics, observed

    # -- world model ---------------------------------------------------------------------------

    def observe(self, batch: TensorDictBase, noise: Noise) -> Observed:
        """Filter the batch: the recurrence over T steps, everything else at once."""
        rssm = self.agent.rssm
        first = batch["is_first"][:, 1:].unsqueeze(-1)  # [B, T, 1]
        embedding = rssm.project_embedding(self.agent.encoder(batch["obs"][:, 1:]))
        action = rssm.project_action(batch["action"][:, :-1])
        start = rssm.initial_belief()
        belief = batch["belief"][:, 0].to(self.dtype)
        state = rssm.expand(batch["state_index"][:, 0])
        raws, beliefs, states, posteriors = [], [], [], []
        steps = zip(action.unbind(1), embedding.unbind(1), first.unbind(1), noise.posterior,
                    strict=True)  # fmt: skip
        for action_t, embedding_t, first_t, uniform_t in steps:
            raw = rssm.core(belief, state, action_t)
            belief = torch.where(first_t, start, raw)
            posterior = rssm.posterior_logits(belief, embedding_t)
            state = rssm.sample(posterior, uniform_t)
            raws.append(raw)
            beliefs.append(belief)
            states.append(state)
            posteriors.append(posterior)
        raw, belief, state = (torch.stack(x, 1) for x in (raws, beliefs, states))
        reached = rssm.prior_logits(raw)
        prior = torch.where(first.unsqueeze(-1), rssm.prior_logits(start), reached)
        arrival_state = torch.where(first, rssm.sample(reached, noise.arrival), state)
        arrival = torch.cat([raw, arrival_state], -1)
        return Observed(belief, state, torch.stack(posteriors, 1), prior, arrival)

    def model_losses(self, batch: TensorDictBase, observed: Observed) -> dict[str, Tensor]:
        """Reconstruction, reward, continuation and both KL terms (DreamerV3 eq. 4 and 5)."""
        agent, algo = self.agent, self.algo
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
            "reconstruction": agent.decoder.loss(decoded, batch["obs"][:, 1:]).mean(),
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
            features [M, H+1, F] and actions [M, H, A].
        """
        agent = self.agent
        features, actions = [torch.cat([belief, state], -1)], []
        for uniform, normal in zip(noise.prior, noise.action, strict=True):
            mean, std = agent.actor(features[-1])
            actions.append(mean + std * normal)
            belief = agent.rssm.core(belief, state, agent.rssm.project_action(actions[-1]))
            state = agent.rssm.sample(agent.rssm.prior_logits(belief), uniform)
            features.append(torch.cat([belief, state], -1))
        return torch.stack(features, 1), torch.stack(actions, 1)

    def behaviour_losses(
        self, observed: Observed, noise: Noise
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Actor (REINFORCE) and critic on imagined trajectories (DreamerV3 eq. 7 to 11).

        Returns:
            The two losses, metrics, and the return of every start [B, T] for the replay critic.
        """
        agent, algo = self.agent, self.algo
        shape = observed.belief.shape[:2]
        features, actions = self.imagine(
            observed.belief.detach().flatten(0, 1), observed.state.detach().flatten(0, 1), noise
        )
        with torch.no_grad():
            reward = agent.reward.mean(agent.reward(features[:, 1:]))
            alive = torch.sigmoid(agent.continuation(features))  # [M, H+1], discount included
            weight = alive.cumprod(1)[:, :-1]
            slow = agent.slow_critic.mean(agent.slow_critic(features[:, :-1]))
        logits = agent.critic(features[:, :-1])
        with torch.no_grad():
            # The last state only bootstraps, so it needs no graph.
            last = agent.critic.mean(agent.critic(features[:, -1:]))
            value = torch.cat([agent.critic.mean(logits), last], 1)
            returns = lambda_return(reward, value[:, 1:], alive[:, 1:], algo.lmbda)
            scale = self._update_return_scale(returns)
            advantage = (returns - value[:, :-1]) / scale
        mean, std = agent.actor(features[:, :-1])
        entropy = agent.actor.entropy(std)
        policy = agent.actor.log_prob(mean, std, actions) * advantage + algo.entropy * entropy
        critic = agent.critic.loss(logits, returns)
        critic = critic + algo.slow_critic_scale * agent.critic.loss(logits, slow)
        losses = {"actor": -(weight * policy).mean(), "critic": (weight * critic).mean()}
        metrics = {
            "imagined_reward": reward.mean(), "imagined_return": returns.mean(),
            "imagined_continue": alive.mean(), "value": value.mean(),
            "advantage_std": advantage.std(), "return_scale": scale.clone(),
            "actor_entropy": entropy.detach().mean(), "actor_std": std.detach().mean(),
        }  # fmt: skip
        return losses, metrics, returns[:, 0].unflatten(0, shape)

    def replay_critic_loss(
        self, batch: TensorDictBase, observed: Observed, first_return: Tensor
    ) -> Tensor:
        """The critic on replayed rewards; its gradient also shapes the world model's features."""
        agent, algo = self.agent, self.algo
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
            target = lambda_return(reward, value, discount, lmbda)
            slow = agent.slow_critic.mean(agent.slow_critic(observed.features[:, :-1]))
        loss = agent.critic.loss(logits, target)
        return (loss + algo.slow_critic_scale * agent.critic.loss(logits, slow)).mean()

    # -- state ---------------------------------------------------------------------------------

    def draw_noise(self, batch: int, length: int) -> Noise:
        """All random numbers of one update, in two calls."""
        rssm, algo = self.agent.rssm, self.algo
        steps, starts, sets = length * batch, length * batch, rssm.categoricals
        sizes = [steps * sets, steps * sets, algo.horizon * starts * sets]
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        uniform = torch.rand(sum(sizes), generator=self.generator, **options).split(sizes)
        shape = (algo.horizon, starts, self.agent.action)
        return Noise(
            posterior=uniform[0].view(length, batch, sets),
            arrival=uniform[1].view(batch, length, sets),
            prior=uniform[2].view(algo.horizon, starts, sets),
            action=torch.randn(shape, generator=self.generator, **options),
        )

    def _update_return_scale(self, returns: Tensor) -> Tensor:
        """max(minimum, range of the 5th to 95th percentile), both as moving averages."""
        algo = self.algo
        levels = returns.new_tensor([algo.return_norm_low, algo.return_norm_high])
        low, high = torch.quantile(returns.flatten(), levels)
        self.return_low.lerp_(low, algo.return_norm_rate)
        self.return_high.lerp_(high, algo.return_norm_rate)
        return (self.return_high - self.return_low).clamp_min(algo.return_norm_min)

    @torch.no_grad()
    def _move_slow_critic(self) -> None:
        slow: list[Tensor] = list(self.agent.slow_critic.parameters())
        fast: list[Tensor] = list(self.agent.critic.parameters())
        torch._foreach_lerp_(slow, fast, self.algo.slow_critic_rate)

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy into the existing tensors."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.return_low.copy_(state["return_low"])
        self.return_high.copy_(state["return_high"])
        self.generator.set_state(state["generator"].cpu())
        self.updates = int(state["updates"])
