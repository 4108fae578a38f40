"""The first Dreamer's losses on the same learner (Hafner et al. 2019, arXiv 1912.01603).

Gaussian states, squared errors instead of two-hot heads, no continue head, and an actor that is
trained by the gradient of its imagined return through the world model. The terms equal TorchRL's
`DreamerModelLoss`, `DreamerActorLoss` and `DreamerValueLoss` (tests/test_learner_v1.py). On purpose
different from TorchRL's example: the three optimisers step at once, after all gradients, instead of
one after the other within an update; arrivals at an episode's end are trained as `learner` says.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dreamer_isaac.config import OptimizationConfig
from dreamer_isaac.learner import Batch, Learner, Noise, Observed, lambda_return
from dreamer_isaac.models.gaussian import GaussianRecurrence
from dreamer_isaac.models.rssm import join
from dreamer_isaac.optim import FlatOptimizer, GroupAdam


class LearnerV1(Learner):
    """See `Learner`."""

    def _make_optimizer(self, optimization: OptimizationConfig) -> FlatOptimizer:
        algo, order = self.algo, {"actor": 1, "critic": 2}
        return GroupAdam(
            self.params, [order.get(name.split(".")[0], 0) for name in self.params],
            [optimization.lr, algo.lr_actor, algo.lr_critic], algo.grad_clip,
            optimization.warmup_updates, flat=self.flat, sources=self.net.learned(),
            anneal=optimization.anneal, wrap=self.wrap,
        )  # fmt: skip

    def _prepare(self) -> None:
        wrap = self.wrap
        self.frozen = copy.deepcopy(self.net).requires_grad_(False)
        """The same weights without gradients: imagination differentiates by states and actions."""
        for mine, shared in zip(self.frozen.parameters(), self.net.parameters(), strict=True):
            mine.data = shared.data
        self._encode, self._finish = wrap(self._encode_), wrap(self._finish_)
        self.recurrence = GaussianRecurrence(self.net.rssm, wrap)
        self._model_total = wrap(self._model_total_)
        self._dream_step = wrap(self._dream_step_)
        self._actor_total = wrap(self._actor_total_)
        self._critic_total = wrap(self._critic_total_)

    def scales(self) -> dict[str, float]:
        a = self.algo
        return {
            "reconstruction": a.reconstruction_scale, "reward": a.reward_scale, "kl": a.dyn_scale,
            "actor": a.actor_scale, "critic": a.critic_scale,
        }  # fmt: skip

    def losses(
        self, batch: Batch, noise: Noise
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Observed]:
        observed = self.observe(batch, noise)
        _, losses = self._model_total_(batch, observed)
        features, _ = self.dream(observed, noise)
        actor, targets, metrics = self._actor_total_(features)
        critic = self._critic_total_(features[:-1].detach(), targets)
        return losses | {"actor": actor, "critic": critic}, metrics, observed

    def _gradients(
        self, batch: Batch, noise: Noise
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Observed]:
        observed = self.observe(batch, noise)
        with self._beside():
            # The actor does not wait for this, and shares none of its gradients.
            total, losses = self._model_total(batch, observed)
            total.backward()
        features, _ = self.dream(observed, noise)
        actor, targets, metrics = self._actor_total(features)
        actor.backward()
        critic = self._critic_total(features[:-1].detach(), targets)
        critic.backward()
        self._join()
        losses = losses | {"actor": actor, "critic": critic}
        total = torch.stack([total, actor, critic]).detach().sum()
        return total, losses, metrics, observed

    # -- world model ---------------------------------------------------------------------------

    def observe(self, batch: Batch, noise: Noise) -> Observed:
        belief, state, action, embedding, first, start = self._inputs(batch)
        unrolled = self.recurrence.unroll(
            belief, state, action, embedding, first, start, noise.posterior
        )
        return Observed(*self._finish(*unrolled, first, start, noise.posterior, noise.arrival))

    def _finish_(
        self, raw: Tensor, belief: Tensor, posterior: Tensor, first: Tensor, start: Tensor,
        normal: Tensor, noise: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rssm = self.net.rssm
        raw, belief, posterior, normal, first = (
            x.transpose(0, 1) for x in (raw, belief, posterior, normal, first)
        )
        state = rssm.sample(posterior, normal)
        reached = rssm.prior_logits(raw)
        prior = torch.where(first, rssm.prior_logits(start), reached)
        arrival_state = torch.where(first, rssm.sample(reached, noise), state)
        return belief, state, posterior, prior, join(raw, arrival_state)

    def model_losses(self, batch: Batch, observed: Observed) -> dict[str, Tensor]:
        """Reconstruction, reward, and the KL divergence above the free nats."""
        net = self.net
        target = batch["reward"][:, :-1] * self.reward_multiplier
        kl = net.rssm.kl(observed.posterior, observed.prior)
        decoded = net.decoder(join(observed.belief, observed.state))
        return {
            "reconstruction": net.decoder.loss(decoded, batch["obs"][:, 1:]).mean(),
            "reward": (net.reward(observed.arrival) - target).square().mean(),
            "kl": kl.clamp_min(self.algo.free_nats).mean(),
        }

    # -- behaviour -----------------------------------------------------------------------------

    def dream(self, observed: Observed, noise: Noise) -> tuple[Tensor, Tensor]:
        """Imagination with the gradient of every step by the actor.

        Returns:
            features [H+1, M, F] (F padded as `join` does it) and actions [H, M, A].
        """
        features = join(observed.belief.detach(), observed.state.detach()).flatten(0, 1)
        rows, actions = [features], []
        for normal, other in zip(noise.prior, noise.action, strict=True):
            features, action = self._dream_step(features, normal, other)
            rows.append(features)
            actions.append(action)
        return torch.stack(rows), torch.stack(actions)

    def _dream_step_(
        self, features: Tensor, normal: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        rssm = self.frozen.rssm
        belief, state = features[:, : rssm.belief], features[:, rssm.belief :]
        action = self.net.actor.sample(*self.net.actor(features), noise)
        belief = rssm.core(belief, state, rssm.project_action(action))
        state = rssm.sample(rssm.prior_logits(belief), normal)
        return join(belief, state), action

    def _actor_total_(self, features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The actor's loss, the critic's targets [H, M], metrics."""
        reward, value = self.frozen.reward(features[1:]), self.frozen.critic(features[1:])
        gamma = 1 - 1 / self.algo.discount_horizon
        discount = torch.full_like(value, gamma)
        returns = lambda_return(reward, value, discount, self.algo.lmbda, dim=0)
        loss = -(self._weights(returns) * returns).sum(0).mean()
        metrics = {
            "imagined_reward": reward.detach().mean(), "imagined_return": returns.detach().mean(),
            "value": value.detach().mean(),
        }  # fmt: skip
        return loss, returns.detach(), metrics

    def _critic_total_(self, features: Tensor, targets: Tensor) -> Tensor:
        """Squared error of the value of the states before, [H, M, F] and [H, M]."""
        error = (self.net.critic(features) - targets).square()
        return (self._weights(targets) * error).sum(0).mean()

    def _weights(self, like: Tensor) -> Tensor:
        """1, gamma, gamma^2, ...: [H, 1]."""
        steps = torch.arange(len(like), device=like.device, dtype=like.dtype).unsqueeze(1)
        return (1 - 1 / self.algo.discount_horizon) ** steps

    def _move_slow_critic(self) -> None:
        """There is none."""
