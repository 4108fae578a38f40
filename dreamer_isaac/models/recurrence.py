"""The RSSM over a batch of sequences: two short loops instead of a long graph.

Autograd through T steps of the recurrence launches several times the kernels that are needed, most
of them for weights' gradients that could be had for all steps at once. Here

1. a loop without gradients finds the belief and state of every step;
2. one parallel pass with gradients evaluates the recurrence at all steps, each from the belief and
   state before it as constants. Autograd through it yields the weights' gradients, for all steps
   at once, if it is given the right gradients of its outputs;
3. `Couple`, an identity, makes them right: its backward is the loop over time in reverse, which
   adds to the gradient at each step what comes from the steps after it. Only the derivative by
   belief and state is needed for that, written out in `_step_backward`.

In exact arithmetic this equals autograd through the unrolled recurrence; tests/test_recurrence.py
holds the two together in float64. Everything is time-major here: [T, B, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamer_isaac.models.rssm import NORM_EPS, RSSM, CoreParts, block_mm, full


class Weights(NamedTuple):
    """The recurrence's weights, those that act on the same input joined; made once per update."""

    on_belief: Tensor
    """[2*hidden, D]: the GRU's input projection and the posterior's first layer."""
    belief_bias: Tensor
    """[hidden]"""
    belief_norm: Tensor
    on_state: Tensor
    """[hidden, S*K]"""
    state_bias: Tensor
    state_norm: Tensor
    shared: Tensor
    """[2*hidden, D]: what all blocks of the first block layer read."""
    own: Tensor
    """[G, D/G, D/G]: what each block reads of the belief."""
    mix_norm: Tensor
    gates: Tensor
    """[G, D/G, 3*D/G]"""
    gates_bias: Tensor
    hidden_norm: Tensor
    out: Tensor
    """[S*K, hidden]"""
    out_bias: Tensor


class Unrolled(NamedTuple):
    """What the networks make of T observed steps."""

    raw: Tensor
    """[T, B, D]: the recurrence's output, before any reset."""
    belief: Tensor
    """[T, B, D]: `raw`, or the initial belief where an episode starts."""
    posterior: Tensor
    """[T, B, S, K] logits."""
    onehot: Tensor
    """[T, B, S*K]: the sampled state, a constant."""


def norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    """silu(weight * x / rms(x))."""
    return F.silu(F.rms_norm(x, weight.shape, weight, NORM_EPS))


def norm_silu_backward(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """The derivative of `norm_silu` by x, times `grad`."""
    wide, scale = full(x), full(weight)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    unit = wide * inverse
    y = unit * scale
    sigmoid = torch.sigmoid(y)
    inner = full(grad) * sigmoid * (1 + y * (1 - sigmoid)) * scale
    out = inverse * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    return out.to(x.dtype)


class Loops:
    """What the recurrences of both kinds of latent state share.

    Args:
        rssm: the networks. wrap: what is done to the step functions, e.g. `torch.compile`.
    """

    _step: Callable[..., Any]
    _step_backward: Callable[..., Any]
    _parallel: Callable[..., Any]

    def __init__(self, rssm: Any, wrap: Callable[[Any], Any] = lambda f: f):
        self.rssm = rssm
        self.step = wrap(self._step)
        self.step_backward = wrap(self._step_backward)
        self.parallel = wrap(self._parallel)

    def prepare(self, rows: int) -> None:
        """Start in the background what takes time before the first batch of `rows` sequences."""

    def widths(self, weights: Any) -> tuple[int, ...]:
        """Of what the reversed loop hands from step to step."""
        raise NotImplementedError

    def couple(
        self, weights: Any, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """The loop in reverse.

        Args:
            grads: of raw, belief and posterior, [T, B, ...], without the later steps.
            saved: what `_step_backward` needs of every step, [T, B, ...] each.

        Returns:
            The gradients of belief and posterior with them.
        """
        belief = grads[1]
        later = tuple(belief.new_zeros(belief.shape[1], n) for n in self.widths(weights))
        of_belief: list[Tensor] = []
        of_posterior: list[Tensor] = []
        for t in reversed(range(len(belief))):
            one, other, *rest = self.step_backward(
                weights, *(g[t] for g in grads), *later, *(x[t] for x in saved)
            )
            later = tuple(rest)
            of_belief.append(one)
            of_posterior.append(other)
        return torch.stack(of_belief[::-1]), torch.stack(of_posterior[::-1])


class Recurrence(Loops):
    """Runs an `RSSM` over sequences."""

    def __init__(self, rssm: RSSM, wrap: Callable[[Any], Any] = lambda f: f):
        super().__init__(rssm, wrap)
        self.action_share = wrap(self._action_share)

    def widths(self, weights: Weights) -> tuple[int, ...]:
        return self.rssm.belief, len(weights.belief_bias), self.rssm.state

    @torch.no_grad()
    def weights(self) -> Weights:
        """Join the weights as the loops read them."""
        r: Any = self.rssm  # a Sequential's entries have no type of their own
        own = r.belief // r.blocks
        mix = r.mix.weight
        width = r.state_in[0].out_features
        return Weights(
            on_belief=torch.cat([r.belief_in[0].weight, r.posterior_in.weight[:, : r.belief]]),
            belief_bias=r.belief_in[0].bias, belief_norm=r.belief_in[1].weight,
            on_state=r.state_in[0].weight, state_bias=r.state_in[0].bias,
            state_norm=r.state_in[1].weight,
            shared=mix[:, own : own + 2 * width].transpose(0, 1).flatten(1),
            own=mix[:, :own].contiguous(), mix_norm=r.mix_norm.weight,
            gates=r.gates.weight, gates_bias=r.gates.bias,
            hidden_norm=r.posterior_norm.weight, out=r.posterior_out.weight,
            out_bias=r.posterior_out.bias,
        )  # fmt: skip

    def unroll(
        self,
        belief: Tensor,
        state: Tensor,
        action: Tensor,
        embedding: Tensor,
        first: Tensor,
        start: Tensor,
        uniform: Tensor,
    ) -> Unrolled:
        """Filter T steps.

        Args:
            belief: [B, D], state: [B, S*K] before the first step, constants.
            action: [T, B, hidden] from `RSSM.project_action`, embedding: [T, B, hidden] from
                `RSSM.project_embedding`. first: [T, B, 1] bool. start: [D].
            uniform: [T, B, S] noise.
        """
        with torch.no_grad():
            weights = self.weights()
            share = self.action_share(action)
            constant = embedding.detach()
            origin = start.detach()
            beliefs, states = self.filter(
                weights, belief, state, share, constant, first, origin, uniform
            )
            previous, onehot = (beliefs[:-1], states[:-1]), states[1:]
        parts, belief, hidden, posterior = self.parallel(*previous, action, embedding, first, start)
        saved = [x.detach() for x in (*parts[:4], hidden, posterior, previous[0], first)]
        raw, belief, posterior = Couple.apply(parts.raw, belief, posterior, self, weights, *saved)  # type: ignore[misc]
        return Unrolled(raw, belief, posterior, onehot)

    def filter(
        self, weights: Weights, belief: Tensor, state: Tensor, share: Tensor, embedding: Tensor,
        first: Tensor, start: Tensor, uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The first loop.

        Returns:
            beliefs [T+1, B, D] and states [T+1, B, S*K], those given first.
        """
        before = F.linear(belief, weights.on_belief[: len(weights.belief_bias)])
        before = before + weights.belief_bias
        beliefs, states = [belief], [state]
        for t in range(len(first)):
            belief, before, state = self.step(
                weights, belief, before, state, share[t], embedding[t], first[t], start, uniform[t]
            )
            beliefs.append(belief)
            states.append(state)
        return torch.stack(beliefs), torch.stack(states)

    def _action_share(self, action: Tensor) -> Tensor:
        """[T, B, hidden] -> [T, B, D]: what the action adds to the first block layer."""
        mix, own = self.rssm.mix, self.rssm.belief // self.rssm.blocks
        weight = mix.weight[:, own + 2 * action.shape[-1] :].transpose(0, 1).flatten(1)
        return action @ weight + mix.bias

    def _parallel(
        self,
        belief: Tensor,
        state: Tensor,
        action: Tensor,
        embedding: Tensor,
        first: Tensor,
        start: Tensor,
    ) -> tuple[CoreParts, Tensor, Tensor, Tensor]:
        """All steps at once, from the belief and state before each, [T, B, ...]."""
        parts = self.rssm.core_parts(belief, state, action)
        belief = torch.where(first, start, parts.raw)
        hidden, posterior = self.rssm.posterior_parts(belief.detach(), embedding)
        return parts, belief, hidden, posterior

    def _step(
        self,
        w: Weights,
        belief: Tensor,
        before: Tensor,
        state: Tensor,
        share: Tensor,
        embedding: Tensor,
        first: Tensor,
        start: Tensor,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step; `before` is the GRU's input projection of `belief`, [B, hidden].

        Returns:
            belief, its input projection, state.
        """
        projected = F.linear(state, w.on_state, w.state_bias)
        shared = torch.cat(
            [norm_silu(before, w.belief_norm), norm_silu(projected, w.state_norm)], -1
        )
        mix = share + shared @ w.shared + block_mm(belief, w.own)
        gates = block_mm(norm_silu(mix, w.mix_norm), w.gates) + w.gates_bias
        reset, candidate, update = self.rssm.split_gates(gates)
        update = torch.sigmoid(update - 1)
        raw = update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * belief
        belief = torch.where(first, start, raw)
        before, hidden = F.linear(belief, w.on_belief).split(len(w.belief_bias), -1)
        x = norm_silu(hidden + embedding, w.hidden_norm)
        logits = full(F.linear(x, w.out, w.out_bias))
        logits = logits.unflatten(-1, (self.rssm.categoricals, self.rssm.classes))
        return belief, before + w.belief_bias, self.rssm.draw(logits, uniform)

    def _step_backward(
        self,
        w: Weights,
        grad_raw: Tensor,
        grad_belief: Tensor,
        grad_posterior: Tensor,
        later_belief: Tensor,
        later_before: Tensor,
        later_state: Tensor,
        belief_in: Tensor,
        state_in: Tensor,
        mix: Tensor,
        gates: Tensor,
        hidden: Tensor,
        posterior: Tensor,
        previous: Tensor,
        first: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One step of the reversed loop.

        Args:
            grad_*: [B, ...] gradients of this step's outputs without the later steps.
            later_*: what the later steps add to the belief, to the GRU's input projection of the
                belief, and to the state.
            belief_in ... posterior: this step's pre-activations. previous: [B, D] belief before.

        Returns:
            The gradients of this step's belief and posterior, and `later_*` of the step before.
        """
        rssm = self.rssm
        probs = torch.softmax(posterior, -1)
        grad = full(later_state).view_as(probs)
        pull = probs * (grad - (grad * probs).sum(-1, keepdim=True))
        grad_posterior = grad_posterior + (1 - rssm.unimix) * pull
        grad_x = grad_posterior.flatten(-2).to(w.out.dtype) @ w.out
        grad_hidden = norm_silu_backward(hidden, w.hidden_norm, grad_x)
        grad_belief = grad_belief + later_belief
        grad_belief = grad_belief + torch.cat([later_before, grad_hidden], -1) @ w.on_belief
        grad_core = grad_raw + torch.where(first, 0.0, grad_belief)

        reset, candidate, update = (full(x) for x in rssm.split_gates(gates))
        reset, update = torch.sigmoid(reset), torch.sigmoid(update - 1)
        squashed = torch.tanh(reset * candidate)
        wide = full(grad_core)
        inner = wide * update * (1 - squashed.square())
        three = (
            inner * candidate * reset * (1 - reset),
            inner * reset,
            wide * (squashed - full(previous)) * update * (1 - update),
        )
        blocks = [x.unflatten(-1, (rssm.blocks, -1)) for x in three]
        grad_gates = torch.stack(blocks, -2).flatten(-3).to(w.gates.dtype)
        grad_mix = norm_silu_backward(
            mix, w.mix_norm, block_mm(grad_gates, w.gates.transpose(1, 2))
        )
        later_belief = (wide * (1 - update)).to(grad_mix.dtype) + block_mm(
            grad_mix, w.own.transpose(1, 2)
        )
        grad_shared = F.linear(grad_mix, w.shared).unflatten(-1, (2, -1))
        inputs = torch.stack([belief_in, state_in], -2)
        norms = torch.stack([w.belief_norm, w.state_norm])
        later_before, later_state = norm_silu_backward(inputs, norms, grad_shared).unbind(-2)
        return grad_belief, grad_posterior, later_belief, later_before, later_state @ w.on_state


class Couple(torch.autograd.Function):
    """Identity on (raw, belief, posterior); its backward, `recurrence.couple`, couples the steps
    (module docstring)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        raw: Tensor,
        belief: Tensor,
        posterior: Tensor,
        recurrence: Any,
        weights: Any,
        *saved: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.recurrence, ctx.weights = recurrence, weights
        ctx.save_for_backward(*saved)
        return raw.view_as(raw), belief.view_as(belief), posterior.view_as(posterior)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        with torch.no_grad():
            belief, posterior = ctx.recurrence.couple(ctx.weights, grads, ctx.saved_tensors)
        return (grads[0], belief, posterior) + (None,) * (len(ctx.saved_tensors) + 2)
