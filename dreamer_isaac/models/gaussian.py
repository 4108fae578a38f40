"""Recurrent state-space model of the first Dreamer: a GRU with a Gaussian stochastic state.

Hafner et al. 2019 (arXiv 1811.04551, 1912.01603). The networks equal TorchRL's `RSSMPrior` and
`RSSMPosterior`. The interface is `RSSM`'s: `logits` are the Gaussian's parameters here, mean and
unbounded deviation side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamer_isaac.models.recurrence import Couple, Loops
from dreamer_isaac.models.rssm import elu, full, join, linear

MIN_STD = 0.1


class GaussianParts(NamedTuple):
    """The recurrence's output and the pre-activations on the way to it, [..., width] each."""

    joint: Tensor
    """[..., hidden]"""
    ours: Tensor
    """[..., 3D]: the gates' share of state and action."""
    theirs: Tensor
    """[..., 3D]: the gates' share of the belief."""
    raw: Tensor
    """[..., D]: the next belief, before any reset."""


class GaussianRSSM(nn.Module):
    """The world model's dynamics.

    Args:
        action: A, action components. embedding: E, width of the encoder's output.
        belief: D. hidden: width of the projections. state: components of the stochastic state.
    """

    noise = "normal"

    def __init__(self, action: int, embedding: int, belief: int, hidden: int, state: int):
        super().__init__()
        self.belief, self.state, self.action = belief, state, action
        self.noise_width = state
        self.joint_in = nn.Linear(state + action, hidden)
        self.rnn = nn.GRUCell(hidden, belief)
        self.prior = nn.Sequential(
            nn.Linear(belief, hidden), nn.ELU(), nn.Linear(hidden, 2 * state)
        )
        self.posterior = nn.Sequential(
            nn.Linear(belief + embedding, hidden), nn.ELU(), nn.Linear(hidden, 2 * state)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of beliefs and states."""
        return self.joint_in.weight.dtype

    def project_action(self, action: Tensor) -> Tensor:
        """[..., A] -> [..., hidden]: the action's share of the projection."""
        weight = self.joint_in.weight[:, self.state :]
        return linear(action.to(self.dtype), weight, self.joint_in.bias)

    def project_embedding(self, embedding: Tensor) -> Tensor:
        """[..., E] -> [..., hidden]: the embedding's share of the posterior's first layer."""
        first = self.posterior[0]
        assert isinstance(first, nn.Linear)
        return linear(embedding, first.weight[:, self.belief :], first.bias)

    def core(self, belief: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """h' = GRU(h, [z, a]); action from `project_action`; [N, D]."""
        return self.core_parts(belief, state, action).raw

    def core_parts(self, belief: Tensor, state: Tensor, action: Tensor) -> GaussianParts:
        """`core`, with what its derivative needs. state: [..., S], or with zeros at its end."""
        joint = linear(state, self.joint_in.weight[:, : self.state]) + action
        r = self.rnn
        ours = linear(elu(joint), r.weight_ih, r.bias_ih)
        theirs = linear(belief, r.weight_hh, r.bias_hh)
        update, new = self.gates(ours, theirs)[1:]
        raw = ((1 - update) * new + update * full(belief)).to(belief.dtype)
        return GaussianParts(joint, ours, theirs, raw)

    def joined(self) -> tuple[Tensor, Tensor]:
        """The GRU's weights as one product over [input, belief] with 4D outputs instead of two with
        3D each: reset, update, and both shares of the candidate. [4D, hidden + D] and [4D]."""
        r = self.rnn
        reset, update, ours = r.weight_ih.chunk(3)
        reset_h, update_h, theirs = r.weight_hh.chunk(3)
        rows = [
            torch.cat([reset, reset_h], 1), torch.cat([update, update_h], 1),
            torch.cat([ours, torch.zeros_like(theirs)], 1),
            torch.cat([torch.zeros_like(ours), theirs], 1),
        ]  # fmt: skip
        shared, last = 2 * self.belief, (r.bias_ih[2 * self.belief :], r.bias_hh[2 * self.belief :])
        return torch.cat(rows), torch.cat([r.bias_ih[:shared] + r.bias_hh[:shared], *last])

    def core_joined(
        self, belief: Tensor, state: Tensor, action: Tensor, weight: Tensor, bias: Tensor,
        gru: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """`core` of an action itself [N, A], with the weights as `joined` has them; `gru` is the
        function of this module or `kernels.gru`."""
        both = join(state[..., : self.state], action.to(self.dtype))
        joint = linear(both, self.joint_in.weight, self.joint_in.bias)
        return gru(linear(torch.cat([elu(joint), belief], -1), weight, bias), belief)

    @staticmethod
    def gates(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., 3D] twice -> reset, update and the candidate, [..., D] each."""
        o, t = full(ours).chunk(3, -1), full(theirs).chunk(3, -1)
        reset, update = torch.sigmoid(o[0] + t[0]), torch.sigmoid(o[1] + t[1])
        return reset, update, torch.tanh(o[2] + reset * t[2])

    def prior_logits(self, belief: Tensor) -> Tensor:
        """[..., D] -> [..., 2*state]."""
        first, _, last = self.prior
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        hidden = elu(linear(belief, first.weight, first.bias))
        return full(linear(hidden, last.weight, last.bias))

    def posterior_logits(self, belief: Tensor, embedding: Tensor) -> Tensor:
        """[..., D], [..., hidden] (from `project_embedding`) -> [..., 2*state]."""
        return self.posterior_parts(belief, embedding)[1]

    def posterior_parts(self, belief: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's hidden pre-activation [..., hidden] and its parameters."""
        first, _, last = self.posterior
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        x = linear(belief, first.weight[:, : self.belief]) + embedding
        return x, full(linear(elu(x), last.weight, last.bias))

    def initial_belief(self) -> Tensor:
        """[D]: the belief at the first observation of an episode, core(0, 0, 0)."""
        zeros = self.joint_in.weight.new_zeros(1, self.belief + self.state + self.action)
        belief, state, action = zeros.split([self.belief, self.state, self.action], -1)
        return self.core(belief, state, self.project_action(action))[0]

    @staticmethod
    def moments(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        mean, raw = logits.chunk(2, -1)
        return mean, F.softplus(raw).clamp_min(MIN_STD)

    def sample(self, logits: Tensor, normal: Tensor) -> Tensor:
        """mean + std * noise, with gradient; [..., state]."""
        mean, std = self.moments(logits)
        return (mean + std * normal).to(self.dtype)

    @torch.no_grad()
    def draw(self, logits: Tensor, normal: Tensor) -> Tensor:
        """`sample` without gradient."""
        return self.sample(logits, normal)

    def kl(self, left: Tensor, right: Tensor) -> Tensor:
        """KL(left || right), summed over the state's components: [...]."""
        (m, s), (n, t) = self.moments(left), self.moments(right)
        return (torch.log(t / s) + (s.square() + (n - m).square()) / (2 * t.square()) - 0.5).sum(-1)

    def compress(self, state: Tensor) -> Tensor:
        """As replay stores it."""
        return state.float()

    def expand(self, state: Tensor) -> Tensor:
        """The reverse of `compress`."""
        return state.to(self.dtype)


def gru(four: Tensor, belief: Tensor) -> Tensor:
    """Reset, update and both shares of the candidate [N, 4D], belief [N, D] -> the next belief."""
    reset, update, ours, theirs = full(four).chunk(4, -1)
    update, new = torch.sigmoid(update), torch.tanh(ours + torch.sigmoid(reset) * theirs)
    return ((1 - update) * new + update * full(belief)).to(belief.dtype)


class GaussianWeights(NamedTuple):
    """The recurrence's weights, those that act on the same input joined; made once per update."""

    on_belief: Tensor
    """[3D + hidden, D]: the gates and the posterior's first layer."""
    gates_bias: Tensor
    """[3D], of the gates' share of the belief."""
    on_state: Tensor
    """[hidden, S], S padded."""
    ours: Tensor
    """[3D, hidden]"""
    ours_bias: Tensor
    out: Tensor
    """[2S, hidden], 2S padded."""
    out_bias: Tensor


class Filtered(NamedTuple):
    """What the loop without gradients found."""

    weights: GaussianWeights
    beliefs: Tensor
    """[T+1, B, D], the given one first."""
    states: Tensor
    """[T+1, B, S], S padded."""


class GaussianRecurrence(Loops):
    """The two loops of `recurrence.Recurrence` for the Gaussian RSSM."""

    def widths(self, weights: GaussianWeights) -> tuple[int, ...]:
        return self.rssm.belief, len(weights.gates_bias), weights.on_state.shape[1]

    @torch.no_grad()
    def weights(self) -> GaussianWeights:
        """Join the weights as the loops read them."""
        r: Any = self.rssm  # a Sequential's entries have no type of their own
        # Padded here, once, or `linear` would pad them in every step.
        half = r.dtype in (torch.bfloat16, torch.float16)
        columns, rows = (-r.state % 8, -2 * r.state % 8) if half else (0, 0)
        return GaussianWeights(
            on_belief=torch.cat([r.rnn.weight_hh, r.posterior[0].weight[:, : r.belief]]),
            gates_bias=r.rnn.bias_hh,
            on_state=F.pad(r.joint_in.weight[:, : r.state], (0, columns)).contiguous(),
            ours=r.rnn.weight_ih, ours_bias=r.rnn.bias_ih,
            out=F.pad(r.posterior[2].weight, (0, 0, 0, rows)),
            out_bias=F.pad(r.posterior[2].bias, (0, rows)),
        )  # fmt: skip

    def filter(
        self, belief: Tensor, state: Tensor, action: Tensor, embedding: Tensor, first: Tensor,
        start: Tensor, normal: Tensor,
    ) -> Filtered:  # fmt: skip
        """The first loop, T steps without gradients; the arguments are `Recurrence.unroll`'s."""
        with torch.no_grad():
            action, embedding, start = (x.detach() for x in (action, embedding, start))
            weights = self.weights()
            state = join(state)
            theirs = F.linear(belief, weights.on_belief[: len(weights.gates_bias)])
            beliefs, states = [belief], [state]
            for t in range(len(first)):
                belief, theirs, state = self.step(
                    weights, belief, theirs, state, action[t], embedding[t], first[t], start,
                    normal[t],
                )  # fmt: skip
                beliefs.append(belief)
                states.append(state)
            return Filtered(weights, torch.stack(beliefs), torch.stack(states))

    def couple_steps(
        self, filtered: Filtered, action: Tensor, embedding: Tensor, first: Tensor, start: Tensor,
        normal: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The parallel pass over what `filter` found, with gradients.

        Returns:
            raw and belief [T, B, D], posterior [T, B, 2S].
        """
        previous = filtered.beliefs[:-1], filtered.states[:-1]
        parts, belief, hidden, posterior = self.parallel(*previous, action, embedding, first, start)
        saved = [x.detach() for x in (*parts[:3], hidden, posterior, previous[0], first, normal)]
        return Couple.apply(parts.raw, belief, posterior, self, filtered.weights, *saved)  # type: ignore[return-value]

    def _parallel(
        self, belief: Tensor, state: Tensor, action: Tensor, embedding: Tensor, first: Tensor,
        start: Tensor,
    ) -> tuple[GaussianParts, Tensor, Tensor, Tensor]:  # fmt: skip
        """All steps at once, from the belief and state before each, [T, B, ...]."""
        parts = self.rssm.core_parts(belief, state, action)
        belief = torch.where(first, start, parts.raw)
        hidden, posterior = self.rssm.posterior_parts(belief.detach(), embedding)
        return parts, belief, hidden, posterior

    def _step(
        self, w: GaussianWeights, belief: Tensor, theirs: Tensor, state: Tensor, action: Tensor,
        embedding: Tensor, first: Tensor, start: Tensor, normal: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """One step; `theirs` is the gates' share of `belief` without its bias, [B, 3D].

        Returns:
            belief, its share of the gates, state.
        """
        joint = F.linear(state, w.on_state) + action
        ours = F.linear(elu(joint), w.ours, w.ours_bias)
        update, new = self.rssm.gates(ours, theirs + w.gates_bias)[1:]
        raw = ((1 - update) * new + update * full(belief)).to(belief.dtype)
        belief = torch.where(first, start, raw)
        theirs, hidden = F.linear(belief, w.on_belief).split(
            [len(w.gates_bias), embedding.shape[-1]], -1
        )
        posterior = F.linear(elu(hidden + embedding), w.out, w.out_bias)
        state = self.rssm.draw(full(posterior[..., : 2 * self.rssm.state]), normal)
        return belief, theirs, join(state)

    def _step_backward(
        self, w: GaussianWeights, grad_raw: Tensor, grad_belief: Tensor, grad_posterior: Tensor,
        later_belief: Tensor, later_theirs: Tensor, later_state: Tensor, joint: Tensor,
        ours: Tensor, theirs: Tensor, hidden: Tensor, posterior: Tensor, previous: Tensor,
        first: Tensor, normal: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """One step of the reversed loop; see `Recurrence._step_backward`. `later_theirs` is what
        the later steps add to the belief's share of the gates."""
        size = self.rssm.state
        later = full(later_state[..., :size])
        raw_std = posterior[..., size:]
        slope = torch.sigmoid(raw_std) * (F.softplus(raw_std) > MIN_STD)
        grad_posterior = grad_posterior + torch.cat([later, later * normal * slope], -1)
        grad_hidden = elu_backward(hidden, join(grad_posterior.to(w.out.dtype)) @ w.out)
        grad_belief = grad_belief + later_belief
        grad_belief = grad_belief + torch.cat([later_theirs, grad_hidden], -1) @ w.on_belief
        grad_core = full(grad_raw + torch.where(first, 0.0, grad_belief))

        reset, update, new = self.rssm.gates(ours, theirs)
        grad_new = grad_core * (1 - update) * (1 - new.square())
        grad_update = grad_core * (full(previous) - new) * update * (1 - update)
        last = full(theirs).chunk(3, -1)[2]
        grad_reset = grad_new * last * reset * (1 - reset)
        dtype = w.ours.dtype
        shared = [grad_reset.to(dtype), grad_update.to(dtype)]
        grad_ours = torch.cat([*shared, grad_new.to(dtype)], -1)
        later_theirs = torch.cat([*shared, (grad_new * reset).to(dtype)], -1)
        later_belief = (grad_core * update).to(dtype)
        later_state = elu_backward(joint, grad_ours @ w.ours) @ w.on_state
        return grad_belief, grad_posterior, later_belief, later_theirs, later_state


def elu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """The derivative of `elu` by x, times `grad`."""
    wide = full(x)
    return (full(grad) * torch.where(wide > 0, 1.0, wide.clamp_max(0).exp())).to(x.dtype)


def elu_backward_of(y: Tensor, grad: Tensor) -> Tensor:
    """The same from y = elu(x): only one of the two needs to be kept."""
    wide = full(y)
    return (full(grad) * torch.where(wide > 0, 1.0, wide + 1)).to(y.dtype)
