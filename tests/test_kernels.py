"""The fused kernels against the plain recurrence. Without a GPU Triton's interpreter runs them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (it comes with CUDA builds of torch)")

from dreamer_isaac.learner import lambda_return
from dreamer_isaac.models import gaussian, kernels
from dreamer_isaac.models.kernels import FusedRecurrence
from dreamer_isaac.models.recurrence import Recurrence
from dreamer_isaac.models.rssm import RSSM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
A, E, D, HIDDEN, S, K, BLOCKS = 3, 7, 64, 16, 6, 16, 2


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEPTH", 16)


def run(
    kind: type[Recurrence], rows: int, steps: int, dtype: torch.dtype, noise: Tensor | None = None
) -> list[Tensor]:
    """Values of every output, then the gradient of every parameter."""
    torch.manual_seed(0)
    rssm = RSSM(A, E, D, HIDDEN, S, K, blocks=BLOCKS, unimix=0.01)
    with torch.no_grad():
        for p in rssm.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rssm = rssm.to(DEVICE, dtype)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape).to(DEVICE, to)

    first = (torch.rand(steps, rows, 1) < 0.2).to(DEVICE)
    onehot = torch.nn.functional.one_hot(torch.randint(K, (rows, S)), K).flatten(1)
    belief, state = draw(rows, D), onehot.to(DEVICE, dtype)
    embeddings, actions = draw(steps, rows, E), draw(steps, rows, A)
    uniform = torch.rand(steps, rows, S).to(DEVICE)
    uniform = uniform if noise is None else noise
    weights = [draw(steps, rows, n, to=torch.float32) for n in (D, D, S * K, S * K)]
    action, embedding = rssm.project_action(actions), rssm.project_embedding(embeddings)
    if kind is FusedRecurrence:
        assert kernels.fits(rssm, rows)
    u = kind(rssm).unroll(belief, state, action, embedding, first, rssm.initial_belief(), uniform)
    sampled = rssm.straight_through(u.onehot, rssm.probs(u.posterior))
    out = [u.raw, u.belief, u.posterior.flatten(2), sampled]
    total = sum((w * x.float().sin()).sum() for w, x in zip(weights, out, strict=True))
    assert isinstance(total, Tensor)
    parameters = [p for k, p in rssm.named_parameters() if not k.startswith("prior")]
    return [*(x.detach() for x in out), *torch.autograd.grad(total, parameters)]


@pytest.mark.parametrize(("rows", "steps"), [(16, 4), (5, 3), (20, 2)])
def test_float32(rows: int, steps: int) -> None:
    plain, fused = (run(k, rows, steps, torch.float32) for k in (Recurrence, FusedRecurrence))
    for i, (a, b) in enumerate(zip(plain, fused, strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4 * float(a.abs().max()), msg=str(i))


# Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def test_half_precision() -> None:
    """As near to the plain recurrence in float32 as the plain one in half precision is."""
    first = run(Recurrence, 16, 3, torch.float32)
    # Noise in the middle of the class that was drawn, so that rounding does not change a draw.
    onehot, probs = (x.unflatten(-1, (S, K)) for x in (first[3].round(), first[2]))
    probs = 0.99 * probs.softmax(-1) + 0.01 / K
    noise = ((probs.cumsum(-1) - probs / 2) * onehot).sum(-1)
    exact, plain, fused = (
        run(k, 16, 3, t, noise)
        for k, t in ((Recurrence, torch.float32), (Recurrence, HALF), (FusedRecurrence, HALF))
    )
    for other in (plain, fused):
        assert torch.equal(exact[3].round(), other[3].float().round())
    for i, (a, b, c) in enumerate(zip(exact, plain, fused, strict=True)):
        near, mine = (float((x.float() - a).norm() / a.norm()) for x in (b, c))
        assert mine < 1.5 * near + 0.005, (i, near, mine)


@pytest.mark.parametrize("dim", [0, 1])
def test_returns(dim: int) -> None:
    reward, value, discount, lmbda = (torch.rand(7, 150, device=DEVICE) for _ in range(4))
    if dim:
        reward, value = reward.T.contiguous().T, value.T.contiguous().T
    for weight in (lmbda, 0.9):
        expected = lambda_return(reward, value, discount, weight, dim)
        mine = kernels.returns(reward, value, discount, weight, dim)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gru(dtype: torch.dtype) -> None:
    given = [torch.randn(70, n, device=DEVICE, dtype=dtype, requires_grad=True) for n in (80, 20)]
    grad = torch.randn(70, 20, device=DEVICE, dtype=dtype)
    results = [
        (out := function(*given), *torch.autograd.grad(out, given, grad))
        for function in (gaussian.gru, kernels.gru)
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_a_model_or_batch_that_does_not_fit_is_left_to_the_plain_loops() -> None:
    rssm = RSSM(A, E, D, HIDDEN, S, 8, blocks=BLOCKS, unimix=0.01)
    assert not kernels.fits(rssm, 16)  # 8 classes are no tile
    assert not kernels.fits(RSSM(A, E, D, HIDDEN, S, K, BLOCKS, 0.01), kernels.MOST_ROWS + 1)


def test_the_interpreter_is_what_runs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: a wrong kernel gives another result."""
    right = run(FusedRecurrence, 4, 2, torch.float32)
    monkeypatch.setattr(kernels, "NORM_EPS", 0.5)
    wrong = run(FusedRecurrence, 4, 2, torch.float32)
    assert not torch.allclose(right[0], wrong[0], atol=1e-3)
