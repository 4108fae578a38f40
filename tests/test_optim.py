"""The optimiser against TorchRL's, and one step by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrl.trainers.algorithms import DreamerV3Optimizer

from dreamer_isaac.optim import LaProp, flatten


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(4, 3)), "b": nn.Parameter(torch.zeros(5))}


def test_equals_torchrl() -> None:
    mine, theirs = parameters(), parameters()
    ours = LaProp(mine, lr=1e-2, warmup=5, agc=0.3)
    other = DreamerV3Optimizer(list(theirs.values()), lr=1e-2, warmup_steps=5, agc=0.3)
    g = torch.Generator().manual_seed(1)
    for _ in range(12):
        for p, q in zip(mine.values(), theirs.values(), strict=True):
            p.grad = 3 * torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        ours.step()
        other.step()
    for p, q in zip(mine.values(), theirs.values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_one_step_by_hand() -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LaProp({"p": p}, lr=0.1, warmup=0, agc=0.3)
    p.grad = torch.tensor([30.0, -40.0])  # norm 50, limit 0.3 * 5
    norm = optimizer.step()
    assert norm == 50
    # The first step divides by the gradient's own size: lr * sign.
    torch.testing.assert_close(p.detach(), torch.tensor([2.9, 4.1]))


def test_warm_up_starts_at_zero() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = LaProp({"p": p}, lr=0.1, warmup=10, agc=0.3)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.99))


def test_the_rate_falls_to_zero_at_the_end() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = LaProp({"p": p}, lr=0.1, warmup=0, agc=1e9, anneal=0.4)
    steps = []
    for i in range(10):
        p.grad = torch.ones(1)
        optimizer.progress.fill_((i + 1) / 10)
        before = p.item()
        optimizer.step()
        steps.append(round(before - p.item(), 4))
    # Equal gradients make every step lr times the schedule.
    assert steps == [0.1] * 6 + [0.075, 0.05, 0.025, 0.0]


def test_state_is_restored_in_place() -> None:
    a, b = parameters(), parameters()
    first, second = LaProp(a, 1e-2, 0, 0.3), LaProp(b, 1e-2, 0, 0.3)
    for p in a.values():
        p.grad = torch.ones_like(p)
    first.step()
    held = second.momentum
    second.load_state_dict(first.state_dict())
    assert second.momentum is held and torch.equal(held, first.momentum) and held.any()
    with pytest.raises(ValueError, match="another network"):
        LaProp({"x": a["a"]}, 1e-2, 0, 0.3).load_state_dict(first.state_dict())


def test_a_missing_gradient_is_named() -> None:
    optimizer = LaProp(parameters(), 1e-2, 0, 0.3)
    with pytest.raises(RuntimeError, match="no gradient for a, b"):
        optimizer.step()


def test_parameters_become_views_of_one_tensor() -> None:
    params = parameters()
    values = {k: p.detach().clone() for k, p in params.items()}
    flat = flatten(params.values())
    assert all(torch.equal(params[k], v) for k, v in values.items())
    flat.zero_()
    assert not any(p.any() for p in params.values())


def test_gradients_of_a_lower_precision_copy_are_applied() -> None:
    params = parameters()
    copies = {k: nn.Parameter(p.detach().bfloat16()) for k, p in params.items()}
    optimizer = LaProp(params, lr=0.1, warmup=0, agc=0.3, sources=copies)
    before = params["a"].detach().clone()
    for p in copies.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(params["a"].detach(), before - 0.1)
