"""LaProp with adaptive gradient clipping and linear warm-up: the optimiser of DreamerV3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LaProp:
    """Clip, scale by the root mean square, then average (Ziyin et al. 2020, arXiv 2002.04839).

    Per tensor, with g the gradient and p the parameter::

        g <- g / max(1, |g| / (agc * max(1e-3, |p|)))          # AGC, per tensor as the reference
        v <- b2 v + (1 - b2) g^2
        m <- b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps)
        p <- p - lr * min(1, (t - 1) / warmup) * m / (1 - b1^t)

    The counter t is a tensor, so a step needs no host value. TorchRL's `DreamerV3Optimizer` has
    the same arithmetic (tests/test_optim.py holds the two together) with the counter on the host.

    Args:
        params: name -> parameter; names label the state in checkpoints.
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        lr: float,
        warmup: int,
        agc: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
    ):
        self.params = params
        self.lr, self.warmup, self.agc, self.betas, self.eps = lr, warmup, agc, betas, eps
        first = next(iter(params.values()))
        self.step_count = torch.zeros((), device=first.device, dtype=torch.float64)
        self.square = [torch.zeros_like(p) for p in params.values()]
        self.momentum = [torch.zeros_like(p) for p in params.values()]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Apply the gradients in `.grad` and return their norm over all tensors, before clipping.

        Raises:
            RuntimeError: if a parameter has no gradient.
        """
        params: list[Tensor] = list(self.params.values())
        missing = [k for k, p in self.params.items() if p.grad is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing[:5])}")
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        beta1, beta2 = self.betas
        norms = torch._foreach_norm(grads)
        limits = torch._foreach_norm(params)
        torch._foreach_clamp_min_(limits, 1e-3)
        torch._foreach_mul_(limits, self.agc)
        scale = torch._foreach_div(norms, limits)
        torch._foreach_clamp_min_(scale, 1.0)
        grads = list(torch._foreach_div(grads, scale))

        self.step_count += 1
        t = self.step_count
        torch._foreach_mul_(self.square, beta2)
        torch._foreach_addcmul_(self.square, grads, grads, value=1 - beta2)
        root = torch._foreach_sqrt(self.square)
        torch._foreach_div_(root, torch.sqrt(1 - beta2**t).to(root[0].dtype))
        torch._foreach_add_(root, self.eps)
        torch._foreach_div_(grads, root)
        torch._foreach_lerp_(self.momentum, grads, 1 - beta1)
        warm = ((t - 1) / self.warmup).clamp_max(1.0) if self.warmup else torch.ones_like(t)
        size = (self.lr * warm / (1 - beta1**t)).to(root[0].dtype)
        torch._foreach_sub_(params, torch._foreach_mul(self.momentum, size))
        return torch.stack(list(norms)).square().sum().sqrt()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.params.values():
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Counter and both averages, by parameter name."""
        names = list(self.params)
        return {
            "step": self.step_count.clone(),
            "square": dict(zip(names, [s.clone() for s in self.square], strict=True)),
            "momentum": dict(zip(names, [m.clone() for m in self.momentum], strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy into the existing tensors, which a captured graph may hold.

        Raises:
            ValueError: when the names or shapes are another network's.
        """
        for kind in ("square", "momentum"):
            if list(state[kind]) != list(self.params):
                raise ValueError(f"the optimiser state '{kind}' belongs to another network")
        self.step_count.copy_(state["step"])
        for mine, theirs in ((self.square, state["square"]), (self.momentum, state["momentum"])):
            for a, b in zip(mine, theirs.values(), strict=True):
                a.copy_(b)
