"""Recurrent state-space model: block-diagonal GRU with a categorical stochastic state.

Hafner et al. 2023 (arXiv 2301.04104) and its reference code. `belief` is the deterministic state
h, `state` the stochastic one z (one-hot, flattened). The networks equal TorchRL's `RSSMPriorV3`
with `recurrent_model="block_gru"` and `RSSMPosteriorV3` with `use_rms_norm=True`; they are our own
so that everything that does not depend on the recurrence can be computed for all steps at once:
the recurrence (`core`) takes the projected action, and the posterior the projected embedding.
`recurrence.py` runs them over a batch of sequences.

Weights may be bfloat16 or float16 (the learner's working copy); logits and probabilities are then
float32, everything else has the weights' dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-4


def full(x: Tensor) -> Tensor:
    """At least float32: for sums, logarithms and losses of half-precision values."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for widths that are no multiple of 8: in half precision they are padded with
    zeros, because the fast tensor-core kernels want rows that start at multiples of 16 bytes. One
    output in half precision is no product but a sum, in float32.

    Args:
        x: [..., I], or wider: with zeros at its end. weight: [O, I]. bias: [O].
    """
    outputs, inputs = weight.shape
    if x.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x[..., :inputs], weight, bias)
    width = max(x.shape[-1], inputs + -inputs % 8)
    x = F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
    more = -outputs % 8 if outputs > 1 else 0
    weight = F.pad(weight, (0, width - inputs, 0, more)) if width > inputs or more else weight
    if outputs == 1:
        out = (full(x) * full(weight)).sum(-1, keepdim=True)
        return out if bias is None else out + full(bias)
    if bias is not None and more:
        bias = F.pad(bias, (0, more))
    return F.linear(x, weight, bias)[..., :outputs]


def join(*parts: Tensor) -> Tensor:
    """[..., a], [..., b], ... -> [..., a + b + ...], in half precision with zeros up to a multiple
    of 8 (see `linear`)."""
    first = parts[0]
    more = -sum(x.shape[-1] for x in parts) % 8
    if more and first.dtype in (torch.bfloat16, torch.float16):
        parts = (*parts, first.new_zeros(*first.shape[:-1], more))
    return torch.cat(parts, -1)


def elu(x: Tensor) -> Tensor:
    """ELU. In half precision without expm1, whose last digits are rounded off anyway and which
    takes longer than the memory needs."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return F.elu(x)
    wide = x.float()
    return torch.where(wide > 0, wide, wide.clamp_max(0).exp() - 1).to(x.dtype)


def init_linear(module: nn.Module, scale: float = 1.0) -> None:
    """The reference's initialisation: truncated normal of variance 1/fan_in, zero bias.

    1.1368 undoes the loss of variance of a normal cut at two standard deviations.
    """
    if isinstance(module, nn.Linear):
        std = 1.1368 * module.in_features**-0.5
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        with torch.no_grad():
            module.weight.mul_(scale)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation with a learned scale (eps 1e-4, as the reference has it)."""

    def __init__(self, features: int):
        super().__init__(features, eps=NORM_EPS)


def layer(inputs: int, outputs: int) -> nn.Sequential:
    """Linear, RMS norm, SiLU."""
    block = nn.Sequential(nn.Linear(inputs, outputs), RMSNorm(outputs), nn.SiLU())
    block.apply(init_linear)
    return block


class BlockLinear(nn.Module):
    """G independent linear maps on G equal parts of the input; `[..., G*I] -> [..., G*O]`.

    Raises:
        ValueError: a width is no multiple of G.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int):
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(f"{inputs} and {outputs} must be multiples of {blocks} blocks.")
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        std = 1.1368 * inputs**-0.5  # the reference divides by the whole width, not by a block's
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        return block_mm(x, self.weight) + self.bias


def block_mm(x: Tensor, weight: Tensor) -> Tensor:
    """[..., G*I] times [G, I, O] block by block -> [..., G*O]."""
    lead, blocks = x.shape[:-1], len(weight)
    x = x.reshape(-1, blocks, x.shape[-1] // blocks).transpose(0, 1)
    return torch.bmm(x, weight).transpose(0, 1).reshape(*lead, -1)


class CoreParts(NamedTuple):
    """The recurrence's output and the pre-activations on the way to it, [..., width] each."""

    belief_in: Tensor
    state_in: Tensor
    mix: Tensor
    gates: Tensor
    raw: Tensor
    """[..., D]: the next belief, before any reset."""


class RSSM(nn.Module):
    """The world model's dynamics.

    Args:
        action: A, action components.
        embedding: E, width of the encoder's output.
        belief: D. hidden: width of the projections. categoricals: S. classes: K.
        blocks: blocks of the GRU. unimix: uniform share of every categorical.
    """

    noise = "uniform"
    """What `draw` takes: uniform numbers, `noise_width` (S) of them."""

    def __init__(
        self,
        action: int,
        embedding: int,
        belief: int,
        hidden: int,
        categoricals: int,
        classes: int,
        blocks: int,
        unimix: float,
    ):
        super().__init__()
        self.belief, self.categoricals, self.classes = belief, categoricals, classes
        self.blocks, self.unimix = blocks, unimix
        self.state = categoricals * classes
        self.noise_width = categoricals
        self.action = action
        self.belief_in = layer(belief, hidden)
        self.state_in = layer(self.state, hidden)
        self.action_in = layer(action, hidden)
        self.mix = BlockLinear(belief + 3 * hidden * blocks, belief, blocks)
        self.mix_norm = RMSNorm(belief)
        self.gates = BlockLinear(belief, 3 * belief, blocks)
        self.prior = nn.Sequential(
            *layer(belief, hidden), *layer(hidden, hidden), nn.Linear(hidden, self.state)
        )
        # One linear map over [belief, embedding], kept as two factors of one weight so that the
        # embedding's part can leave the time loop.
        self.posterior_in = nn.Linear(belief + embedding, hidden)
        self.posterior_norm = RMSNorm(hidden)
        self.posterior_out = nn.Linear(hidden, self.state)
        for module in (self.prior[-1], self.posterior_in, self.posterior_out):
            init_linear(module)

    # -- pieces without recurrence: all time steps at once -------------------------------------

    def project_action(self, action: Tensor) -> Tensor:
        """[..., A] -> [..., hidden]. Actions above 1 in size are scaled to 1 (reference)."""
        action = action / action.detach().abs().clamp_min(1)
        return self.action_in(action.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of beliefs and states."""
        return self.posterior_in.weight.dtype

    def project_embedding(self, embedding: Tensor) -> Tensor:
        """[..., E] -> [..., hidden]: the embedding's share of the posterior's first layer."""
        weight = self.posterior_in.weight[:, self.belief :]
        return F.linear(embedding, weight, self.posterior_in.bias)

    def prior_logits(self, belief: Tensor) -> Tensor:
        """[..., D] -> [..., S, K]."""
        return full(self.prior(belief)).unflatten(-1, (self.categoricals, self.classes))

    # -- the recurrence ------------------------------------------------------------------------

    def core(self, belief: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """h' = GRU(h, [z, a]) with block-diagonal weights.

        Args:
            belief: [N, D]. state: [N, S*K]. action: [N, hidden], from `project_action`.

        Returns:
            [N, D].
        """
        return self.core_parts(belief, state, action).raw

    def core_parts(self, belief: Tensor, state: Tensor, action: Tensor) -> CoreParts:
        """`core`, with what its derivative needs."""
        belief_in, state_in = self.belief_in[0](belief), self.state_in[0](state)
        shared = torch.cat([self.belief_in[1:](belief_in), self.state_in[1:](state_in), action], -1)
        mix = self._mix(belief, shared)
        gates = self.gates(F.silu(self.mix_norm(mix)))
        reset, candidate, update = self.split_gates(gates)
        candidate, update = torch.tanh(torch.sigmoid(reset) * candidate), torch.sigmoid(update - 1)
        raw = update * candidate + (1 - update) * belief
        return CoreParts(belief_in, state_in, mix, gates, raw)

    def split_gates(self, gates: Tensor) -> tuple[Tensor, ...]:
        """[..., 3D] -> reset, candidate, update: [..., D] each."""
        parts = gates.unflatten(-1, (self.blocks, 3, -1)).unbind(-2)
        return tuple(x.flatten(-2) for x in parts)

    def _mix(self, belief: Tensor, shared: Tensor) -> Tensor:
        """`self.mix` on [a block of the belief, shared]: what all blocks share is one dense map."""
        own = self.belief // self.blocks
        dense = self.mix.weight[:, own:].transpose(0, 1).flatten(1)
        return block_mm(belief, self.mix.weight[:, :own]) + shared @ dense + self.mix.bias

    def posterior_logits(self, belief: Tensor, embedding: Tensor) -> Tensor:
        """[N, D], [N, hidden] (from `project_embedding`) -> [N, S, K]."""
        return self.posterior_parts(belief, embedding)[1]

    def posterior_parts(self, belief: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's hidden pre-activation [N, hidden] and its logits."""
        x = F.linear(belief, self.posterior_in.weight[:, : self.belief]) + embedding
        logits = full(self.posterior_out(F.silu(self.posterior_norm(x))))
        return x, logits.unflatten(-1, (self.categoricals, self.classes))

    def initial_belief(self) -> Tensor:
        """[D]: the belief at the first observation of an episode, core(0, 0, 0)."""
        weight = self.posterior_in.weight
        zeros = weight.new_zeros(1, self.belief + self.state + self.action)
        belief, state, action = zeros.split([self.belief, self.state, self.action], -1)
        return self.core(belief, state, self.project_action(action))[0]

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities with the uniform share mixed in; shape of `logits`."""
        probs = torch.softmax(logits, -1)
        return (1 - self.unimix) * probs + self.unimix / self.classes

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One-hot sample by inverse CDF, without gradient.

        Args:
            logits: [..., S, K]. uniform: [..., S] in [0, 1).

        Returns:
            [..., S*K], in the networks' dtype.
        """
        below = uniform.unsqueeze(-1) > self.probs(logits).cumsum(-1)
        index = below.sum(-1).clamp_max(self.classes - 1)
        return F.one_hot(index, self.classes).flatten(-2).to(self.dtype)

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """`draw` with the straight-through gradient of the probabilities."""
        return self.straight_through(self.draw(logits.detach(), uniform), self.probs(logits))

    def straight_through(self, onehot: Tensor, probs: Tensor) -> Tensor:
        """[..., S*K] one-hot with the gradient of `probs` [..., S, K], in the networks' dtype."""
        flat = probs.flatten(-2)
        return (flat + (onehot.to(flat.dtype) - flat).detach()).to(self.dtype)

    def kl(self, left: Tensor, right: Tensor) -> Tensor:
        """KL(left || right) of two sets of categoricals, [..., S, K] logits -> [...]."""
        p, q = self.probs(left), self.probs(right)
        return (p * (p.log() - q.log())).sum((-2, -1))

    def compress(self, state: Tensor) -> Tensor:
        """[..., S*K] one-hot -> [..., S] class indices in a byte, as replay stores them."""
        return state.unflatten(-1, (self.categoricals, self.classes)).argmax(-1).to(torch.uint8)

    def expand(self, index: Tensor) -> Tensor:
        """The reverse of `compress`, in the networks' dtype."""
        onehot = F.one_hot(index.long(), self.classes).flatten(-2)
        return onehot.to(self.dtype)
