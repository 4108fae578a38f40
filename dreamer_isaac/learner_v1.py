"""The first Dreamer's losses on the same learner (Hafner et al. 2019, arXiv 1912.01603).

Gaussian states, squared errors instead of two-hot heads, no continue head, and an actor that is
trained by the gradient of its imagined return through the world model. The terms equal TorchRL's
`DreamerModelLoss`, `DreamerActorLoss` and `DreamerValueLoss` (tests/test_learner_v1.py). On purpose
different from TorchRL's example: the three optimisers step at once, after all gradients, instead of
one after the other within an update; arrivals at an episode's end are trained as `learner` says.

What TorchRL does, and this with it, and the paper's own code (github.com/danijar/dreamer) does not:
the free nats bound every step's KL, not the batch's mean; squared errors are not halved, so the KL
weighs half as much beside them; the state's standard deviation is bounded below by a maximum, not
by adding the bound.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamer_isaac.config import AlgoConfig, OptimizationConfig
from dreamer_isaac.learner import Batch, Learner, Noise, Observed, lambda_return, seen
from dreamer_isaac.models.gaussian import Filtered, GaussianRecurrence, elu_backward_of, gru
from dreamer_isaac.models.rssm import elu, full, join, linear
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
        self._gru = gru
        if self._kernels and self.device.type == "cuda":
            from dreamer_isaac.models import kernels  # needs Triton

            self._gru = kernels.gru
        self._encode, self._finish = wrap(self._encode_), wrap(self._finish_)
        self.recurrence = GaussianRecurrence(self.net.rssm, wrap)
        self._model_total = wrap(self._model_total_)
        self._dream_step = wrap(self._dream_step_)
        self._actor_total = wrap(self._actor_total_)
        self._critic_total = wrap(self._critic_total_)
        self._value = wrap(self._value_)
        self._value_by_states = wrap(self._value_by_states_)
        self._value_by_weights = wrap(self._value_by_weights_)

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
        features = self.dream(*self._starts(observed.belief, observed.state), noise)
        actor, targets, metrics = self._actor_total_(features, self.frozen.critic(features[1:]))
        critic = self._critic_total_(self.net.critic(features[:-1].detach()), targets)
        return losses | {"actor": actor, "critic": critic}, metrics, observed

    def _gradients(
        self, batch: Batch, noise: Noise
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Observed]:
        # The world model's small kernels run beside the imagination's large ones: all of it,
        # forward too, on the other stream, because a backward runs where its forward ran.
        phase = self.phases
        with self._beside(), phase("observe forward"):
            inputs = self._inputs(batch)
            filtered = self.recurrence.filter(*inputs, noise.posterior)
        self._join()
        with self._beside(), phase("world model's heads and observe backward"):
            observed = self._observed(filtered, inputs, noise)
            total, losses = self._model_total(batch, observed)
            self._scaled(total).backward()
        with phase("imagination"):
            found = (x[1:].transpose(0, 1) for x in (filtered.beliefs, filtered.states))
            features = self.dream(*self._starts(*found), noise)
        with phase("actor and critic"):
            actor, critic, metrics = self._behaviour_gradients(features)
        self._join()
        losses = losses | {"actor": actor, "critic": critic}
        scales = self.scales()
        total = total.detach() + (scales["actor"] * actor + scales["critic"] * critic).detach()
        return total, losses, metrics, observed

    def _behaviour_gradients(self, features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Leaves the actor's and the critic's gradients in `net`. The actor's loss and the critic's
        both evaluate the critic on the imagined states: once is enough, with one derivative by the
        states and one by the weights."""
        scales, starts = self.scales(), features.shape[1]
        with torch.no_grad():
            constant = features.detach().flatten(0, 1)
            value, *hidden = self._value(constant)
        later, now = (
            x.unflatten(0, (-1, starts)).detach().requires_grad_()
            for x in (value[starts:], value[:-starts])
        )
        actor, targets, metrics = self._actor_total(features, later)
        loss = self._scaled(scales["actor"] * actor)
        by_features, by_value = torch.autograd.grad(loss, [features, later])
        with torch.no_grad():
            by_features = by_features.contiguous()  # and nobody else's: it is changed in place
            by_features[1:].flatten(0, 1).add_(
                self._value_by_states(by_value.flatten(), [y[starts:] for y in hidden])
            )
        features.backward(by_features)
        critic = self._critic_total(now, targets)
        (by_value,) = torch.autograd.grad(self._scaled(scales["critic"] * critic), [now])
        with torch.no_grad():
            grads = self._value_by_weights(
                by_value.flatten(), constant[:-starts], [y[:-starts] for y in hidden]
            )
        for parameter, grad in zip(self.net.critic.parameters(), grads, strict=True):
            parameter.grad = grad
        return actor, critic, metrics

    # -- world model ---------------------------------------------------------------------------

    def observe(self, batch: Batch, noise: Noise) -> Observed:
        inputs = self._inputs(batch)
        filtered = self.recurrence.filter(*inputs, noise.posterior)
        return self._observed(filtered, inputs, noise)

    def _observed(self, filtered: Filtered, inputs: tuple[Tensor, ...], noise: Noise) -> Observed:
        """What the filtered states are to the losses; `inputs` are `_inputs`."""
        action, embedding, first, start = inputs[2:]
        unrolled = self.recurrence.couple_steps(
            filtered, action, embedding, first, start, noise.posterior
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
            "reconstruction": net.decoder.loss(decoded, *seen(batch)).mean(),
            "reward": (net.reward(observed.arrival) - target).square().mean(),
            "kl": kl.clamp_min(self.algo.free_nats).mean(),
        }

    # -- behaviour -----------------------------------------------------------------------------

    def _starts(self, belief: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, ...] -> [B*T, ...], constants."""
        return belief.detach().flatten(0, 1), state.detach().flatten(0, 1)

    def dream(self, belief: Tensor, state: Tensor, noise: Noise) -> Tensor:
        """Imagination with the gradient of every step by the actor.

        Args:
            belief: [M, D]. state: [M, S], or with zeros at its end.

        Returns:
            features [H+1, M, F], F padded as `join` does it.
        """
        rssm = self.frozen.rssm
        features = join(belief, state[:, : rssm.state])
        weights = rssm.joined()
        rows = [features]
        for normal, other in zip(noise.prior, noise.action, strict=True):
            features = self._dream_step(features, normal, other, *weights)
            rows.append(features)
        return torch.stack(rows)

    def _dream_step_(
        self, features: Tensor, normal: Tensor, noise: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        rssm = self.frozen.rssm
        belief, state = features[:, : rssm.belief], features[:, rssm.belief :]
        action = self.net.actor.sample(*self.net.actor(features), noise)
        belief = rssm.core_joined(belief, state, action, weight, bias, self._gru)
        state = rssm.sample(rssm.prior_logits(belief), normal)
        return join(belief, state)

    def _actor_total_(
        self, features: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The actor's loss, the critic's targets [H, M], metrics, from features [H+1, M, F] and
        the value [H, M] of all but the first."""
        reward = self.frozen.reward(features[1:])
        gamma = 1 - 1 / self.algo.discount_horizon
        discount = torch.full_like(value, gamma)
        returns = lambda_return(reward, value, discount, self.algo.lmbda, dim=0)
        loss = -(self._weights(returns) * returns).sum(0).mean()
        metrics = {
            "imagined_reward": reward.detach().mean(), "imagined_return": returns.detach().mean(),
            "value": value.detach().mean(),
        }  # fmt: skip
        return loss, returns.detach(), metrics

    def _critic_total_(self, value: Tensor, targets: Tensor) -> Tensor:
        """Squared error of the value of the states before, [H, M] each."""
        return (self._weights(targets) * (value - targets).square()).sum(0).mean()

    # -- the critic, differentiated by hand ----------------------------------------------------

    def _critic_layers(self) -> list[Any]:
        return [m for m in self.net.critic.net if hasattr(m, "weight")]

    def _value_(self, features: Tensor) -> tuple[Tensor, ...]:
        """[N, F] -> the value [N], and the hidden layers' outputs [N, units]."""
        *layers, last = self._critic_layers()
        hidden = [features]
        for layer in layers:
            hidden.append(elu(linear(hidden[-1], layer.weight, layer.bias)))
        value = full(linear(hidden[-1], last.weight, last.bias)).squeeze(-1)
        return value, *hidden[1:]

    def _value_by_states_(self, grad: Tensor, hidden: list[Tensor]) -> Tensor:
        """The value's gradient: `grad` [N] times its derivative by the features, [N, F]."""
        *layers, last = self._critic_layers()
        x = grad.unsqueeze(-1) * full(last.weight)
        for layer, y in zip(reversed(layers), reversed(hidden), strict=True):
            x = elu_backward_of(y, x)
            more = -layer.weight.shape[1] % 8 if layer is layers[0] and x.dtype != self.dtype else 0
            x = x @ F.pad(layer.weight, (0, more))
        return x

    def _value_by_weights_(
        self, grad: Tensor, features: Tensor, hidden: list[Tensor]
    ) -> list[Tensor]:
        """The gradients of the critic's parameters, in their order."""
        *layers, last = self._critic_layers()
        inputs, dtype = [features, *hidden], features.dtype
        out = [grad.to(dtype).unsqueeze(0) @ inputs[-1], grad.sum().unsqueeze(0)]
        x = grad.unsqueeze(-1) * full(last.weight)
        for i in reversed(range(len(layers))):
            x = elu_backward_of(hidden[i], x)
            width = layers[i].weight.shape[1]
            out = [(x.T @ inputs[i])[:, :width], full(x).sum(0), *out]
            if i:
                x = x @ layers[i].weight
        return [g.to(dtype) for g in out]

    def _weights(self, like: Tensor) -> Tensor:
        """1, gamma, gamma^2, ...: [H, 1]."""
        steps = torch.arange(len(like), device=like.device, dtype=like.dtype).unsqueeze(1)
        return (1 - 1 / self.algo.discount_horizon) ** steps

    def _move_slow_critic(self) -> None:
        """There is none."""


def learner_class(algo: AlgoConfig) -> type[Learner]:
    """Who trains with these losses."""
    return {"dreamer_v3": Learner, "dreamer_v1": LearnerV1}[algo.name]
