"""The two loops against autograd through the unrolled recurrence, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamer_isaac.models.gaussian import (
    GaussianRecurrence,
    GaussianRSSM,
    elu_backward,
    elu_backward_of,
)
from dreamer_isaac.models.recurrence import Recurrence, norm_silu, norm_silu_backward
from dreamer_isaac.models.rssm import RSSM, elu, join, linear

T, B, A, E, D, HIDDEN, S, K = 6, 4, 2, 7, 12, 5, 3, 4


def make_rssm() -> RSSM:
    torch.manual_seed(0)
    rssm = RSSM(A, E, D, HIDDEN, S, K, blocks=3, unimix=0.01).double()
    with torch.no_grad():
        for p in rssm.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return rssm


def plain(
    rssm: RSSM, belief: Tensor, state: Tensor, action: Tensor, embedding: Tensor, first: Tensor,
    start: Tensor, uniform: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `unroll` replaces: one step after the other under autograd."""
    out: list[list[Tensor]] = [[], [], [], []]
    for t in range(T):
        raw = rssm.core(belief, state, action[t])
        belief = torch.where(first[t], start, raw)
        posterior = rssm.posterior_logits(belief, embedding[t])
        state = rssm.sample(posterior, uniform[t])
        for column, x in zip(out, (raw, belief, posterior, state), strict=True):
            column.append(x)
    return tuple(torch.stack(column) for column in out)


def test_values_and_every_gradient_equal_autograd_through_the_sequence() -> None:
    rssm = make_rssm()
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    first = torch.zeros(T, B, 1, dtype=torch.bool)
    first[0, 0] = first[3, 1] = first[5, 2] = first[2, 2] = True
    onehot = torch.nn.functional.one_hot(torch.randint(K, (B, S), generator=g), K)
    belief, state = draw(B, D), onehot.flatten(1).double()
    embeddings, actions = draw(T, B, E), draw(T, B, A)
    uniform = torch.rand(T, B, S, generator=g, dtype=torch.float64)
    weights = [draw(T, B, D), draw(T, B, D), draw(T, B, S, K), draw(T, B, S * K), draw(T, B, S * K)]

    results = []
    for fast in (False, True):
        action, embedding = rssm.project_action(actions), rssm.project_embedding(embeddings)
        start = rssm.initial_belief()
        args = (belief, state, action, embedding, first, start, uniform)
        if fast:
            u = Recurrence(rssm).unroll(*args)
            sampled = rssm.straight_through(u.onehot, rssm.probs(u.posterior))
            out = (u.raw, u.belief, u.posterior, sampled)
        else:
            out = plain(rssm, *args)
        # A nonlinear function of everything, with the prior in it as the losses have it.
        prior = rssm.prior_logits(out[0]).flatten(2)
        total = sum((w * x.sin()).sum() for w, x in zip(weights, (*out, prior), strict=True))
        assert isinstance(total, Tensor)
        grads = torch.autograd.grad(total, list(rssm.parameters()))
        results.append(([x.detach() for x in out], grads))
    (values, grads), (fast_values, fast_grads) = results
    for a, b in zip(values, fast_values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for (name, _), a, b in zip(rssm.named_parameters(), grads, fast_grads, strict=True):
        assert a.any(), name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)


def test_without_the_reverse_loop_the_gradients_would_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail: uncoupled steps give other gradients."""
    monkeypatch.setattr(Recurrence, "couple", lambda self, weights, grads, saved: grads[1:])
    with pytest.raises(AssertionError):
        test_values_and_every_gradient_equal_autograd_through_the_sequence()


def test_norm_silu_backward_is_its_derivative() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=g, dtype=torch.float64)
    grad = torch.randn(3, 8, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad(norm_silu(x, weight), x, grad)
    torch.testing.assert_close(norm_silu_backward(x.detach(), weight, grad), expected)


def test_the_gaussian_recurrence_equals_autograd_through_the_sequence() -> None:
    torch.manual_seed(0)
    rssm = GaussianRSSM(A, E, D, HIDDEN, S).double()
    with torch.no_grad():
        for p in rssm.parameters():
            p.add_(0.3 * torch.randn_like(p))
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    first = torch.zeros(T, B, 1, dtype=torch.bool)
    first[0, 0] = first[3, 1] = first[5, 2] = first[2, 2] = True
    belief, state, normal = draw(B, D), draw(B, S), draw(T, B, S)
    embeddings, actions = draw(T, B, E), draw(T, B, A)
    weights = [draw(T, B, D), draw(T, B, D), draw(T, B, 2 * S), draw(T, B, S)]
    results = []
    for fast in (False, True):
        action, embedding = rssm.project_action(actions), rssm.project_embedding(embeddings)
        args = (belief, state, action, embedding, first, rssm.initial_belief(), normal)
        if fast:
            recurrence = GaussianRecurrence(rssm)
            filtered = recurrence.filter(*(x.detach() for x in args))
            raw, beliefs, posterior = recurrence.couple_steps(filtered, *args[2:])
            torch.testing.assert_close(filtered.beliefs[1:], beliefs.detach())
            out = (raw, beliefs, posterior, rssm.sample(posterior, normal))
        else:
            out = plain(rssm, *args)  # type: ignore[arg-type]
        total = sum((w * x.sin()).sum() for w, x in zip(weights, out, strict=True))
        assert isinstance(total, Tensor)
        names, parameters = zip(*(
            (k, p) for k, p in rssm.named_parameters() if not k.startswith("prior")), strict=True
        )  # fmt: skip
        results.append(([x.detach() for x in out], torch.autograd.grad(total, parameters)))
    (values, grads), (fast_values, fast_grads) = results
    for a, b in zip(values, fast_values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name, a, b in zip(names, grads, fast_grads, strict=True):
        assert a.any(), name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize(("inputs", "outputs"), [(13, 6), (16, 8), (13, 1), (16, 24)])
def test_padded_products_equal_plain_ones(inputs: int, outputs: int) -> None:
    """Half precision against the plain product of the same numbers, values and gradients."""
    g = torch.Generator().manual_seed(0)
    full = [torch.randn(5, inputs, generator=g), torch.randn(outputs, inputs, generator=g),
            torch.randn(outputs, generator=g)]  # fmt: skip
    half = [x.bfloat16().requires_grad_() for x in full]
    full = [x.detach().float().requires_grad_() for x in half]
    wide = linear(join(half[0]), *half[1:])
    narrow, expected = linear(*half), torch.nn.functional.linear(*full)
    assert wide.shape == narrow.shape == expected.shape
    for out in (wide, narrow):
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
        grads = torch.autograd.grad(out.float().sin().sum(), half)
        for mine, theirs in zip(
            grads, torch.autograd.grad(expected.sin().sum(), full, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(mine.float(), theirs, rtol=5e-2, atol=5e-2)


def test_elu_in_half_precision_and_its_derivative() -> None:
    x = torch.cat([torch.linspace(-9, 9, 37), torch.tensor([1e-3, -1e-3, 0.0, 300.0, -300.0])])
    half = x.bfloat16().requires_grad_()
    wide = half.detach().float().requires_grad_()
    torch.testing.assert_close(elu(half).float(), elu(wide).detach(), rtol=1e-2, atol=1e-5)
    (expected,) = torch.autograd.grad(elu(wide).sum(), wide)
    ones = torch.ones_like(half)
    for mine in (torch.autograd.grad(elu(half).sum(), half)[0], elu_backward(half.detach(), ones)):
        torch.testing.assert_close(mine.float(), expected, rtol=1e-2, atol=1e-5)
    near = elu_backward_of(elu(half).detach(), ones)  # near -1 it has the output's precision
    torch.testing.assert_close(near.float(), expected, rtol=1e-2, atol=4e-3)
