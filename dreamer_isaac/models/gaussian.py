"""Recurrent state-space model of the first Dreamer: a GRU with a Gaussian stochastic state.

Hafner et al. 2019 (arXiv 1811.04551, 1912.01603). The networks equal TorchRL's `RSSMPrior` and
`RSSMPosterior`. The interface is `RSSM`'s: `logits` are the Gaussian's parameters here, mean and
unbounded deviation side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamer_isaac.models.rssm import full

MIN_STD = 0.1


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
        return self.joint_in.weight.dtype

    def project_action(self, action: Tensor) -> Tensor:
        """[..., A] -> [..., hidden]: the action's share of the projection."""
        weight = self.joint_in.weight[:, self.state :]
        return F.linear(action.to(self.dtype), weight, self.joint_in.bias)

    def project_embedding(self, embedding: Tensor) -> Tensor:
        """[..., E] -> [..., hidden]: the embedding's share of the posterior's first layer."""
        first = self.posterior[0]
        assert isinstance(first, nn.Linear)
        return F.linear(embedding, first.weight[:, self.belief :], first.bias)

    def core(self, belief: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """h' = GRU(h, [z, a]); action from `project_action`; [N, D]."""
        x = F.elu(F.linear(state, self.joint_in.weight[:, : self.state]) + action)
        r = self.rnn
        ours = F.linear(x, r.weight_ih, r.bias_ih).chunk(3, -1)
        theirs = F.linear(belief, r.weight_hh, r.bias_hh).chunk(3, -1)
        reset = torch.sigmoid(ours[0] + theirs[0])
        update = torch.sigmoid(ours[1] + theirs[1])
        new = torch.tanh(ours[2] + reset * theirs[2])
        return (1 - update) * new + update * belief

    def prior_logits(self, belief: Tensor) -> Tensor:
        """[..., D] -> [..., 2*state]."""
        return full(self.prior(belief))

    def posterior_logits(self, belief: Tensor, embedding: Tensor) -> Tensor:
        """[..., D], [..., hidden] (from `project_embedding`) -> [..., 2*state]."""
        first = self.posterior[0]
        assert isinstance(first, nn.Linear)
        x = F.linear(belief, first.weight[:, : self.belief]) + embedding
        return full(self.posterior[2](F.elu(x)))

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
