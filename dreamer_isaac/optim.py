"""The optimisers on flat parameters: LaProp with adaptive gradient clipping, and Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def set_generator(generator: torch.Generator, state: Tensor) -> None:
    """Let a generator go on where it was. One of another kind of device has a state of another
    size (a run may go on elsewhere, or move its replay buffer): it keeps the one it has."""
    state = state.cpu()
    if state.shape == generator.get_state().shape:
        generator.set_state(state)


def flatten(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None = None) -> Tensor:
    """Move parameters into one flat tensor, each a view of its part, so that one kernel can do
    what takes one per parameter otherwise. Views start at multiples of 16 elements, as vectorised
    kernels and tensor cores want it.

    Returns:
        The flat tensor, in `dtype` (default: the parameters' own).
    """
    parameters = list(parameters)
    first = parameters[0]
    offsets, total = offsets_of(parameters)
    flat = torch.zeros(total, device=first.device, dtype=dtype or first.dtype)
    with torch.no_grad():
        for p, view in zip(parameters, views_of(flat, parameters, offsets), strict=True):
            view.copy_(p)
            p.data = view
    return flat


def offsets_of(parameters: Iterable[Tensor]) -> tuple[list[int], int]:
    """Where each parameter starts in the flat tensor, and its length."""
    offsets, total = [], 0
    for p in parameters:
        offsets.append(total)
        total += -(-p.numel() // 16) * 16
    return offsets, total


def views_of(flat: Tensor, parameters: list[Any], offsets: list[int]) -> list[Tensor]:
    """The parts of `flat` in the parameters' shapes."""
    return [flat[o : o + p.numel()].view(p.shape) for p, o in zip(parameters, offsets, strict=True)]


class LossScale:
    """The factor of the loss that keeps float16 gradients from vanishing; torch.amp.GradScaler's
    rule, without asking the host: half after an overflow, double after 2000 updates without one.
    """

    INITIAL, PATIENCE = 2.0**16, 2000
    SMALLEST = 2.0**-10
    """Below, the gradients themselves are not finite, and no scale helps."""

    def __init__(self, device: torch.device):
        self.value = torch.full((), self.INITIAL, device=device)
        self.good = torch.zeros((), device=device)
        """Updates since the last change."""

    def update(self, applied: Tensor) -> None:
        """Note whether the gradients of this update were finite."""
        self.good.add_(1).mul_(applied)
        grown = self.good >= self.PATIENCE
        factor = torch.where(applied, torch.where(grown, 2.0, 1.0), 0.5)
        self.value.mul_(factor)
        self.good.mul_(~grown)


class FlatOptimizer:
    """What the optimisers share: gradients of many parameters in, one flat step out.

    Args:
        params: name -> parameter; names label the state in checkpoints. They become views of one
            flat tensor, `flat`, unless `flat` is given and they are already.
        warmup: updates over which the learning rate rises. anneal: the part of the run, at its end,
            over which it falls to 0; the run's `progress` (0 to 1) is a tensor that its owner sets.
        sources: name -> the parameter whose gradient is applied, where that is not the parameter
            itself but its copy in a lower precision.
        wrap: what is done to the arithmetic, e.g. `torch.compile`.
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        warmup: int,
        anneal: float = 0.0,
        flat: Tensor | None = None,
        sources: dict[str, nn.Parameter] | None = None,
        wrap: Callable[[Any], Any] = lambda f: f,
    ):
        self.params, self.sources = params, sources or params
        self.warmup, self.anneal = warmup, anneal
        parameters = list(params.values())
        offsets, length = offsets_of(parameters)
        self.flat = (flatten(parameters) if flat is None else flat)[:length]
        self.grad, self.square, self.momentum = (torch.zeros_like(self.flat) for _ in range(3))
        self._grads, self._squares, self._momenta = (
            views_of(x, parameters, offsets) for x in (self.grad, self.square, self.momentum)
        )
        sizes = torch.tensor([b - a for a, b in zip(offsets, [*offsets[1:], length], strict=True)])
        index = torch.arange(len(sizes), dtype=torch.int32)
        self.segment = torch.repeat_interleave(index, sizes).to(self.flat.device)
        """Which parameter every element of `flat` belongs to."""
        self.progress = torch.zeros((), device=self.flat.device, dtype=torch.float64)
        # The counter is a tensor, so a step needs no host value.
        self.step_count = torch.zeros((), device=self.flat.device, dtype=torch.float64)
        self._apply = wrap(self._arithmetic)

    @torch.no_grad()
    def step(self, scale: LossScale | None = None) -> Tensor:
        """Apply the gradients in `.grad` and return their norm over all tensors, before clipping.
        With `scale`, gradients of the loss times it are given, and nothing changes where one of
        them has overflowed.

        Raises:
            RuntimeError: if a parameter has no gradient.
        """
        missing = [k for k, p in self.sources.items() if p.grad is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing[:5])}")
        grads: list[Tensor] = [p.grad for p in self.sources.values() if p.grad is not None]
        torch._foreach_copy_(self._grads, grads)
        changed = [self.flat, self.square, self.momentum, self.step_count]
        before = [x.clone() for x in changed] if scale else []
        if scale:
            self.grad.div_(scale.value)
        norms = torch.stack(list(torch._foreach_norm(self._grads)))
        limits = torch.stack(list(torch._foreach_norm(list(self.params.values()))))
        norm = self._apply(
            norms, limits, self.flat, self.grad, self.square, self.momentum, self.segment,
            self.step_count, self.progress,
        )  # fmt: skip
        if scale:
            applied = torch.isfinite(norm)
            for now, old in zip(changed, before, strict=True):
                now.copy_(torch.where(applied, now, old))
            scale.update(applied)
        return norm

    def _arithmetic(
        self, norms: Tensor, limits: Tensor, flat: Tensor, grad: Tensor, square: Tensor,
        momentum: Tensor, segment: Tensor, t: Tensor, progress: Tensor,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError

    def _share(self, t: Tensor, progress: Tensor) -> Tensor:
        """The part of the learning rate that applies at update t."""
        share = ((t - 1) / self.warmup).clamp_max(1.0) if self.warmup else torch.ones_like(t)
        if self.anneal:
            share = torch.minimum(share, ((1 - progress) / self.anneal).clamp_min(0.0))
        return share

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.sources.values():
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Counter and both averages, by parameter name."""
        return {
            "step": self.step_count.clone(),
            "square": {k: s.clone() for k, s in zip(self.params, self._squares, strict=True)},
            "momentum": {k: m.clone() for k, m in zip(self.params, self._momenta, strict=True)},
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
        for mine, theirs in ((self._squares, state["square"]), (self._momenta, state["momentum"])):
            for a, b in zip(mine, theirs.values(), strict=True):
                a.copy_(b)


class LaProp(FlatOptimizer):
    """Clip, scale by the root mean square, then average (Ziyin et al. 2020, arXiv 2002.04839).

    Per tensor, with g the gradient and p the parameter::

        g <- g / max(1, |g| / (agc * max(1e-3, |p|)))          # AGC, per tensor as the reference
        v <- b2 v + (1 - b2) g^2
        m <- b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps)
        p <- p - lr * min(1, (t - 1) / warmup, (1 - progress) / anneal) * m / (1 - b1^t)

    TorchRL's `DreamerV3Optimizer` has the same arithmetic (tests/test_optim.py holds the two
    together) with the counter on the host.
    """

    def __init__(
        self, params: dict[str, nn.Parameter], lr: float, warmup: int, agc: float,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-20, **shared: Any,
    ):  # fmt: skip
        self.lr, self.agc, self.betas, self.eps = lr, agc, betas, eps
        super().__init__(params, warmup, **shared)

    def _arithmetic(
        self, norms: Tensor, limits: Tensor, flat: Tensor, grad: Tensor, square: Tensor,
        momentum: Tensor, segment: Tensor, t: Tensor, progress: Tensor,
    ) -> Tensor:  # fmt: skip
        beta1, beta2 = self.betas
        t += 1
        divisor = (norms / (self.agc * limits.clamp_min(1e-3))).clamp_min(1)
        clipped = grad / divisor[segment]
        square.mul_(beta2).addcmul_(clipped, clipped, value=1 - beta2)
        root = (square / (1 - beta2**t).to(flat.dtype)).sqrt() + self.eps
        momentum.lerp_(clipped / root, 1 - beta1)
        size = (self.lr * self._share(t, progress) / (1 - beta1**t)).to(flat.dtype)
        flat.sub_(momentum * size)
        return norms.square().sum().sqrt()


class GroupAdam(FlatOptimizer):
    """Adam (Kingma and Ba 2014) with a learning rate and a clipped gradient norm per group.

    Args:
        groups: for every parameter, in order, the number of its group.
        lrs: learning rate of every group. clip: norm that a group's gradient is clipped to, as
            torch.nn.utils.clip_grad_norm_ does it.
    """

    def __init__(
        self, params: dict[str, nn.Parameter], groups: list[int], lrs: list[float], clip: float,
        warmup: int = 0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        **shared: Any,
    ):  # fmt: skip
        self.clip, self.betas, self.eps = clip, betas, eps
        super().__init__(params, warmup, **shared)
        self.groups = torch.tensor(groups, device=self.flat.device)
        self.lrs = torch.tensor(lrs, device=self.flat.device, dtype=torch.float64)

    def _arithmetic(
        self, norms: Tensor, limits: Tensor, flat: Tensor, grad: Tensor, square: Tensor,
        momentum: Tensor, segment: Tensor, t: Tensor, progress: Tensor,
    ) -> Tensor:  # fmt: skip
        beta1, beta2 = self.betas
        t += 1
        squares = torch.zeros_like(self.lrs).to(norms.dtype).index_add(0, self.groups, norms**2)
        scale = (self.clip / (squares.sqrt() + 1e-6)).clamp_max(1)[self.groups]
        clipped = grad * scale[segment]
        square.mul_(beta2).addcmul_(clipped, clipped, value=1 - beta2)
        momentum.lerp_(clipped, 1 - beta1)
        root = (square / (1 - beta2**t).to(flat.dtype)).sqrt() + self.eps
        size = self.lrs[self.groups] * self._share(t, progress) / (1 - beta1**t)
        flat.sub_(momentum / root * size.to(flat.dtype)[segment])
        return squares.sum().sqrt()
