"""The recurrence's loops for small batches on a GPU in five kernels a step each way.

With a few dozen sequences a step of the recurrence is not work but waiting: each product reads its
weights once from the cache, and each kernel's start and end cost more than what it does. So every
kernel here is a product with the normalisation before it and the nonlinearity after it. Where a
norm needs a whole row and a product yields a few columns, the kernel leaves the sum over its
columns beside them and the next one adds the sums up.

`FusedRecurrence` equals `Recurrence`, up to rounding; tests/test_kernels.py holds them together, on
a CPU through Triton's interpreter. Sums, norms and gates are float32; products read the weights'
own type. Rows (sequences) come in tiles of ROWS, columns in tiles of COLUMNS.
"""

# Triton's functions are called by its compiler, with `[grid]`, which type checkers do not know.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dreamer_isaac.models.recurrence import Recurrence, Weights
from dreamer_isaac.models.rssm import NORM_EPS, RSSM

ROWS, COLUMNS, DEPTH = 16, 16, 128
"""Tile of a product: rows, columns, and what is read of the inner width at a time."""
SPLIT = 4
"""Parts in which the products with the longest inner width and few columns are computed, so that
they keep more of the GPU busy; their readers add the parts up."""
MOST_ROWS = 32
"""Above, the library's products are as fast as these small tiles."""


def fits(rssm: RSSM, rows: int) -> bool:
    """Whether these kernels can run this model on so many sequences, and are worth it."""
    first: Any = rssm.belief_in[0]
    width, hidden = rssm.belief // rssm.blocks, first.out_features
    shared = 0  # what the posterior's kernels hold at once, the most of all
    if first.weight.is_cuda:
        limit = torch.cuda.get_device_properties(first.weight.device)
        room = getattr(limit, "shared_memory_per_block_optin", 48 * 1024)
        shared = hidden * (rssm.classes + ROWS) * first.weight.element_size() - room
    power = all(n & (n - 1) == 0 for n in (hidden, rssm.classes))
    return (
        rows <= MOST_ROWS and power and shared <= 0 and rssm.classes >= 16 and hidden % DEPTH == 0
        and width % DEPTH == 0 and rssm.belief % (SPLIT * DEPTH) == 0 and rssm.state % DEPTH == 0
    )  # fmt: skip


def on_device(x: Tensor) -> Any:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def _norm_silu(x, scale, width, eps):
    """silu(scale * x / rms(x)) of whole rows, [rows, width]."""
    y = x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None] * scale[None, :]
    return y * _sigmoid(y)


@triton.jit
def _norm_silu_backward(x, scale, grad, width, eps):
    """Its derivative by x, times `grad`."""
    inverse = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    unit = x * inverse
    y = unit * scale[None, :]
    gate = _sigmoid(y)
    inner = grad * gate * (1 + y * (1 - gate)) * scale[None, :]
    return inverse * (inner - unit * (tl.sum(inner * unit, 1) / width)[:, None])


@triton.jit
def _parts(partial, m, columns, mask, rows, width, SPLIT: tl.constexpr):
    """Columns of a product that was computed in SPLIT parts, [SPLIT, rows, width] -> [m, c]."""
    at = m[:, None] * width + columns[None, :]
    out = tl.load(partial + at, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLIT):
        out += tl.load(partial + part * rows * width + at, mask=mask, other=0.0)
    return out


# -- forward: state and belief in, five kernels, the next state and belief out ---------------------


@triton.jit
def _inputs(
    projected, belief_bias, belief_norm, index, state_rows, state_bias, state_norm, out, rows, eps,
    H: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Normalised inputs [rows, 2, H] of the first block layer: the belief's and the state's. The
    product with a one-hot state is the sum of S rows."""
    row, which = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, H)
    if which == 0:
        x = tl.load(belief_bias + h).to(tl.float32)
        for part in tl.static_range(SPLIT):
            x += tl.load(projected + (part * rows + row) * 2 * H + h)
        scale = tl.load(belief_norm + h).to(tl.float32)
    else:
        s = tl.arange(0, BLOCK_S)
        at = s * K + tl.load(index + row * S + s, mask=s < S, other=0)
        known = (s < S)[:, None] & (h >= 0)[None, :]
        chosen = tl.load(state_rows + at[:, None] * H + h[None, :], mask=known, other=0.0)
        x = tl.sum(chosen.to(tl.float32), 0) + tl.load(state_bias + h).to(tl.float32)
        scale = tl.load(state_norm + h).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / H + eps) * scale
    tl.store(out + (row * 2 + which) * H + h, (y * _sigmoid(y)).to(out.dtype.element_ty))


@triton.jit
def _mix(
    inputs, shared, belief, own, share, mix, squares, rows,
    D: tl.constexpr, DG: tl.constexpr, H2: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The first block layer, [rows, D], and the sum of its squares over each tile of columns."""
    tile = tl.program_id(0)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    known = (m < rows)[:, None] & (n >= 0)[None, :]
    at = m[:, None] * D + n[None, :]
    total = tl.load(share + at, mask=known, other=0.0).to(tl.float32)
    for start in range(0, H2, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = tl.load(inputs + m[:, None] * H2 + k[None, :], mask=(m < rows)[:, None], other=0.0)
        w = tl.load(shared + k[:, None] * D + n[None, :])
        total = tl.dot(x, w, total, input_precision="ieee")
    group = tile * COLUMNS // DG
    for start in range(0, DG, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = tl.load(
            belief + m[:, None] * D + group * DG + k[None, :], mask=(m < rows)[:, None], other=0.0
        )
        w = tl.load(own + (group * DG + k)[:, None] * DG + (n - group * DG)[None, :])
        total = tl.dot(x, w, total, input_precision="ieee")
    rounded = total.to(mix.dtype.element_ty)
    tl.store(mix + at, rounded, mask=known)
    wide = rounded.to(tl.float32)
    tl.store(squares + tile * rows + m, tl.sum(wide * wide, 1), mask=m < rows)


@triton.jit
def _inverse(squares, m, rows, eps, D: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """1 / rms of whole rows from the tiles' sums of squares."""
    tiles = tl.arange(0, TILES)
    known = (tiles < D // COLUMNS)[:, None] & (m < rows)[None, :]
    sums = tl.load(squares + tiles[:, None] * rows + m[None, :], mask=known, other=0.0)
    return tl.rsqrt(tl.sum(sums, 0) / D + eps)


@triton.jit
def _gates(
    mix, squares, norm, gates, bias, belief, first, start, out, rows, eps,
    D: tl.constexpr, DG: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Norm, second block layer, gates: the next belief, [rows, D]."""
    tile = tl.program_id(0)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    known = (m < rows)[:, None] & (n >= 0)[None, :]
    inverse = _inverse(squares, m, rows, eps, D, TILES, COLUMNS)[:, None]
    group = tile * COLUMNS // DG
    local = n - group * DG
    reset = tl.zeros((ROWS, COLUMNS), tl.float32)
    candidate = tl.zeros((ROWS, COLUMNS), tl.float32)
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, DG, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        x = tl.load(
            mix + m[:, None] * D + group * DG + k[None, :], mask=(m < rows)[:, None], other=0.0
        )
        y = x.to(tl.float32) * inverse * tl.load(norm + group * DG + k).to(tl.float32)[None, :]
        y = (y * _sigmoid(y)).to(gates.dtype.element_ty)
        w = gates + ((group * DG + k) * 3 * DG)[:, None] + local[None, :]
        reset = tl.dot(y, tl.load(w), reset, input_precision="ieee")
        candidate = tl.dot(y, tl.load(w + DG), candidate, input_precision="ieee")
        update = tl.dot(y, tl.load(w + 2 * DG), update, input_precision="ieee")
    b = bias + group * 3 * DG + local
    reset += tl.load(b).to(tl.float32)[None, :]
    candidate += tl.load(b + DG).to(tl.float32)[None, :]
    update += tl.load(b + 2 * DG).to(tl.float32)[None, :]
    at = m[:, None] * D + n[None, :]
    before = tl.load(belief + at, mask=known, other=0.0).to(tl.float32)
    update = _sigmoid(update - 1)
    raw = update * _tanh(_sigmoid(reset) * candidate) + (1 - update) * before
    new = tl.load(first + m, mask=m < rows, other=0) != 0
    after = tl.where(new[:, None], tl.load(start + n).to(tl.float32)[None, :], raw)
    tl.store(out + at, after.to(out.dtype.element_ty), mask=known)


@triton.jit
def _project(
    belief, on_belief, projected, rows,
    D: tl.constexpr, H2: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What reads the belief, in parts: [SPLIT, rows, 2H], the GRU's input and the posterior's."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D // SPLIT, DEPTH):
        k = part * (D // SPLIT) + start + tl.arange(0, DEPTH)
        x = tl.load(belief + m[:, None] * D + k[None, :], mask=(m < rows)[:, None], other=0.0)
        w = tl.load(on_belief + k[:, None] + n[None, :] * D)
        total = tl.dot(x, w, total, input_precision="ieee")
    at = (part * rows + m)[:, None] * H2 + n[None, :]
    tl.store(projected + at, total, mask=(m < rows)[:, None] & (n >= 0)[None, :])


@triton.jit
def _posterior(
    projected, embedding, norm, weight, bias, uniform, index, rows, unimix, eps,
    H: tl.constexpr, S: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rest of the posterior, and a draw from one categorical: [rows, S] classes."""
    s = tl.program_id(0)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    h, c = tl.arange(0, H), tl.arange(0, K)
    known = (m < rows)[:, None] & (h >= 0)[None, :]
    x = tl.load(embedding + m[:, None] * H + h[None, :], mask=known, other=0.0).to(tl.float32)
    x += _parts(projected, m, H + h, known, rows, 2 * H, SPLIT)
    y = _norm_silu(x, tl.load(norm + h).to(tl.float32), H, eps).to(weight.dtype.element_ty)
    w = tl.load(weight + h[:, None] + (s * K + c)[None, :] * H)
    logits = (
        tl.dot(y, w, input_precision="ieee") + tl.load(bias + s * K + c).to(tl.float32)[None, :]
    )
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    probs = (1 - unimix) * e / tl.sum(e, 1)[:, None] + unimix / K
    u = tl.load(uniform + m * S + s, mask=m < rows, other=0.0)
    below = tl.sum((u[:, None] > tl.cumsum(probs, 1)).to(tl.int32), 1)
    tl.store(index + m * S + s, tl.minimum(below, K - 1), mask=m < rows)


# -- backward: one step of the reversed loop (`Recurrence._step_backward`) ------------------------


@triton.jit
def _to_posterior(
    later_inputs, state_in, state_norm, on_state, posterior, grad_posterior, out, rows, unimix, eps,
    H: tl.constexpr, S: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Through the state's norm and product to one categorical's logits, [rows, S*K]."""
    s = tl.program_id(0)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    h, c = tl.arange(0, H), tl.arange(0, K)
    known = (m < rows)[:, None] & (h >= 0)[None, :]
    grad = _parts(later_inputs, m, H + h, known, rows, 2 * H, SPLIT)
    x = tl.load(state_in + m[:, None] * H + h[None, :], mask=known, other=0.0).to(tl.float32)
    grad = _norm_silu_backward(x, tl.load(state_norm + h).to(tl.float32), grad, H, eps)
    w = tl.load(on_state + h[:, None] * S * K + (s * K + c)[None, :])
    later = tl.dot(grad.to(on_state.dtype.element_ty), w, input_precision="ieee")
    known = (m < rows)[:, None] & (c >= 0)[None, :]
    at = m[:, None] * S * K + (s * K + c)[None, :]
    logits = tl.load(posterior + at, mask=known, other=0.0)
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    probs = e / tl.sum(e, 1)[:, None]
    pull = probs * (later - tl.sum(later * probs, 1)[:, None])
    given = tl.load(grad_posterior + at, mask=known, other=0.0)
    tl.store(out + at, given + (1 - unimix) * pull, mask=known)


@triton.jit
def _to_hidden(
    grad_posterior, weight, out, rows,
    H: tl.constexpr, SK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Through the posterior's last product: [rows, H]."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SK, DEPTH):
        k = start + tl.arange(0, DEPTH)
        at = m[:, None] * SK + k[None, :]
        x = tl.load(grad_posterior + at, mask=(m < rows)[:, None], other=0.0)
        w = tl.load(weight + k[:, None] * H + n[None, :])
        total = tl.dot(x.to(weight.dtype.element_ty), w, total, input_precision="ieee")
    at = m[:, None] * H + n[None, :]
    tl.store(out + at, total, mask=(m < rows)[:, None] & (n >= 0)[None, :])


@triton.jit
def _to_gates(
    grad_x, hidden, hidden_norm, later_inputs, belief_in, belief_norm, on_belief, grad_belief,
    grad_raw, later, first, gates, previous, out_belief, grad_gates, rows, eps,
    D: tl.constexpr, DG: tl.constexpr, H: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """To the belief, [rows, D], and through the gates, [rows, G, 3, D/G]. `later`, what the later
    steps add to the belief, is read and becomes the direct share of the belief before."""
    tile = tl.program_id(0)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, H)
    inside = (m < rows)[:, None] & (h >= 0)[None, :]
    known = (m < rows)[:, None] & (n >= 0)[None, :]
    whole = m[:, None] * H + h[None, :]
    at = m[:, None] * D + n[None, :]
    dtype = on_belief.dtype.element_ty

    x = tl.load(belief_in + whole, mask=inside, other=0.0).to(tl.float32)
    grad = _parts(later_inputs, m, h, inside, rows, 2 * H, SPLIT)
    grad = _norm_silu_backward(x, tl.load(belief_norm + h).to(tl.float32), grad, H, eps)
    w = tl.load(on_belief + h[:, None] * D + n[None, :])
    total = tl.dot(grad.to(dtype), w, input_precision="ieee")
    x = tl.load(hidden + whole, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_x + whole, mask=inside, other=0.0)
    grad = _norm_silu_backward(x, tl.load(hidden_norm + h).to(tl.float32), grad, H, eps)
    w = tl.load(on_belief + (H + h)[:, None] * D + n[None, :])
    total = tl.dot(grad.to(dtype), w, total, input_precision="ieee")
    total += tl.load(grad_belief + at, mask=known, other=0.0).to(tl.float32)
    total += tl.load(later + at, mask=known, other=0.0)
    tl.store(out_belief + at, total.to(out_belief.dtype.element_ty), mask=known)

    new = tl.load(first + m, mask=m < rows, other=0) != 0
    core = tl.where(new[:, None], 0.0, total)
    core += tl.load(grad_raw + at, mask=known, other=0.0).to(tl.float32)
    group = tile * COLUMNS // DG
    three = m[:, None] * 3 * D + (group * 3 * DG + n - group * DG)[None, :]
    reset = _sigmoid(tl.load(gates + three, mask=known, other=0.0).to(tl.float32))
    candidate = tl.load(gates + three + DG, mask=known, other=0.0).to(tl.float32)
    update = _sigmoid(tl.load(gates + three + 2 * DG, mask=known, other=0.0).to(tl.float32) - 1)
    squashed = _tanh(reset * candidate)
    before = tl.load(previous + at, mask=known, other=0.0).to(tl.float32)
    inner = core * update * (1 - squashed * squashed)
    of_update = core * (squashed - before) * update * (1 - update)
    tl.store(grad_gates + three, (inner * candidate * reset * (1 - reset)).to(dtype), mask=known)
    tl.store(grad_gates + three + DG, (inner * reset).to(dtype), mask=known)
    tl.store(grad_gates + three + 2 * DG, of_update.to(dtype), mask=known)
    tl.store(later + at, core * (1 - update), mask=known)


@triton.jit
def _to_mix(
    grad_gates, gates, mix, norm, inverse, scaled, sums, rows,
    D: tl.constexpr, DG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Through the second block layer and, but for the term that needs the whole row, the norm
    before it: [rows, D], and that term's sum over each tile of columns."""
    tile = tl.program_id(0)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    known = (m < rows)[:, None] & (n >= 0)[None, :]
    group = tile * COLUMNS // DG
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, 3 * DG, DEPTH):
        k = start + tl.arange(0, DEPTH)
        at = m[:, None] * 3 * D + group * 3 * DG + k[None, :]
        x = tl.load(grad_gates + at, mask=(m < rows)[:, None], other=0.0)
        w = tl.load(gates + k[:, None] + n[None, :] * 3 * DG)
        total = tl.dot(x, w, total, input_precision="ieee")
    at = m[:, None] * D + n[None, :]
    scale = tl.load(norm + n).to(tl.float32)[None, :]
    inv = tl.load(inverse + m, mask=m < rows, other=0.0)[:, None]
    unit = tl.load(mix + at, mask=known, other=0.0).to(tl.float32) * inv
    y = unit * scale
    gate = _sigmoid(y)
    out = inv * total * gate * (1 + y * (1 - gate)) * scale
    tl.store(scaled + at, out, mask=known)
    tl.store(sums + tile * rows + m, tl.sum(out * unit, 1), mask=m < rows)


@triton.jit
def _to_inputs(
    scaled, sums, mix, inverse, own, shared, later, later_inputs, rows,
    D: tl.constexpr, DG: tl.constexpr, H2: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Through the first block layer: adds to the belief's `later` [rows, D], and writes the
    normalised inputs' gradients in parts, [SPLIT, rows, 2H]."""
    tile = tl.program_id(0)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = (m < rows)[:, None]
    tiles = tl.arange(0, TILES)
    known = (tiles < D // COLUMNS)[:, None] & (m < rows)[None, :]
    mean = tl.sum(tl.load(sums + tiles[:, None] * rows + m[None, :], mask=known, other=0.0), 0) / D
    inv = tl.load(inverse + m, mask=m < rows, other=0.0)
    pull = (mean * inv)[:, None]
    dtype = own.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if tile < D // COLUMNS:
        n = tile * COLUMNS + tl.arange(0, COLUMNS)
        group = tile * COLUMNS // DG
        for start in range(0, DG, DEPTH):
            k = start + tl.arange(0, DEPTH)
            at = m[:, None] * D + group * DG + k[None, :]
            x = tl.load(scaled + at, mask=here, other=0.0)
            x -= pull * tl.load(mix + at, mask=here, other=0.0).to(tl.float32)
            w = tl.load(own + k[:, None] + n[None, :] * DG)
            total = tl.dot(x.to(dtype), w, total, input_precision="ieee")
        at = m[:, None] * D + n[None, :]
        total += tl.load(later + at, mask=here, other=0.0)
        tl.store(later + at, total, mask=here & (n >= 0)[None, :])
    else:
        rest = tile - D // COLUMNS
        part = rest // (H2 // COLUMNS)
        n = rest % (H2 // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
        for start in range(0, D // SPLIT, DEPTH):
            k = part * (D // SPLIT) + start + tl.arange(0, DEPTH)
            at = m[:, None] * D + k[None, :]
            x = tl.load(scaled + at, mask=here, other=0.0)
            x -= pull * tl.load(mix + at, mask=here, other=0.0).to(tl.float32)
            w = tl.load(shared + k[:, None] + n[None, :] * D)
            total = tl.dot(x.to(dtype), w, total, input_precision="ieee")
        at = (part * rows + m)[:, None] * H2 + n[None, :]
        tl.store(later_inputs + at, total, mask=here & (n >= 0)[None, :])


@triton.jit
def _returns(
    reward, value, discount, lmbda, out, steps, columns, along, across,
    BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = m < columns
    later = tl.load(value + (steps - 1) * along + m * across, mask=known, other=0.0)
    for back in range(steps):
        t = steps - 1 - back
        at = t * along + m * across
        r = tl.load(reward + at, mask=known, other=0.0)
        v = tl.load(value + at, mask=known, other=0.0)
        d = tl.load(discount + at, mask=known, other=0.0)
        k = tl.load(lmbda + at, mask=known, other=0.0)
        later = r + d * (v + k * (later - v))
        tl.store(out + t * along + m * across, later, mask=known)


@torch.library.custom_op("dreamer_isaac::lambda_return", mutates_args=())
def lambda_return(
    reward: Tensor, value: Tensor, discount: Tensor, lmbda: Tensor, dim: int
) -> Tensor:
    """`learner.lambda_return` of two-dimensional tensors in one kernel, without a gradient; opaque
    to torch.compile, which takes seconds to fuse the other one."""
    given = [x.contiguous() for x in torch.broadcast_tensors(reward, value, discount, lmbda)]
    out = torch.empty_like(given[0])
    steps, columns = out.shape[dim], out.shape[1 - dim]
    along, across = out.stride(dim), out.stride(1 - dim)
    grid = (triton.cdiv(columns, 128),)
    with on_device(out):
        _returns[grid](*given, out, steps, columns, along, across, BLOCK=128)
    return out


@lambda_return.register_fake
def _(reward: Tensor, value: Tensor, discount: Tensor, lmbda: Tensor, dim: int) -> Tensor:
    return torch.empty_like(reward).contiguous()


@triton.jit
def _gru(four, belief, out, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = at < rows * D
    gates = four + at // D * (4 * D) + at % D
    reset = _sigmoid(tl.load(gates, mask=known, other=0.0).to(tl.float32))
    update = _sigmoid(tl.load(gates + D, mask=known, other=0.0).to(tl.float32))
    ours = tl.load(gates + 2 * D, mask=known, other=0.0).to(tl.float32)
    theirs = tl.load(gates + 3 * D, mask=known, other=0.0).to(tl.float32)
    before = tl.load(belief + at, mask=known, other=0.0).to(tl.float32)
    new = _tanh(ours + reset * theirs)
    after = (1 - update) * new + update * before
    tl.store(out + at, after.to(out.dtype.element_ty), mask=known)


@triton.jit
def _gru_backward(
    four, belief, grad, of_four, of_belief, rows, D: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = at < rows * D
    place = at // D * (4 * D) + at % D
    reset = _sigmoid(tl.load(four + place, mask=known, other=0.0).to(tl.float32))
    update = _sigmoid(tl.load(four + place + D, mask=known, other=0.0).to(tl.float32))
    ours = tl.load(four + place + 2 * D, mask=known, other=0.0).to(tl.float32)
    theirs = tl.load(four + place + 3 * D, mask=known, other=0.0).to(tl.float32)
    before = tl.load(belief + at, mask=known, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=known, other=0.0).to(tl.float32)
    new = _tanh(ours + reset * theirs)
    of_new = g * (1 - update) * (1 - new * new)
    dtype = of_four.dtype.element_ty
    of_reset = of_new * theirs * reset * (1 - reset)
    tl.store(of_four + place, of_reset.to(dtype), mask=known)
    of_update = g * (before - new) * update * (1 - update)
    tl.store(of_four + place + D, of_update.to(dtype), mask=known)
    tl.store(of_four + place + 2 * D, of_new.to(dtype), mask=known)
    tl.store(of_four + place + 3 * D, (of_new * reset).to(dtype), mask=known)
    tl.store(of_belief + at, (g * update).to(dtype), mask=known)


BLOCK = 1024
"""Elements that one program of an elementwise kernel handles."""


@torch.library.custom_op("dreamer_isaac::gru", mutates_args=())
def gru(four: Tensor, belief: Tensor) -> Tensor:
    """The gates of `gaussian.GaussianRSSM.core_joined` in one kernel: [N, 4D], [N, D] -> [N, D].
    torch.compile's kernel of its derivative took 2.4 of 41 ms (benchmarks/results/h200.jsonl)."""
    four, belief = four.contiguous(), belief.contiguous()
    out = torch.empty_like(belief)
    with on_device(out):
        _gru[(triton.cdiv(out.numel(), BLOCK),)](
            four, belief, out, len(out), D=belief.shape[1], BLOCK=BLOCK
        )
    return out


@gru.register_fake
def _(four: Tensor, belief: Tensor) -> Tensor:
    return belief.new_empty(belief.shape)


@torch.library.custom_op("dreamer_isaac::gru_backward", mutates_args=())
def gru_backward(four: Tensor, belief: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of `gru` by both, times `grad` [N, D]."""
    four, belief, grad = four.contiguous(), belief.contiguous(), grad.contiguous()
    of_four, of_belief = torch.empty_like(four), torch.empty_like(belief)
    with on_device(grad):
        _gru_backward[(triton.cdiv(grad.numel(), BLOCK),)](
            four, belief, grad, of_four, of_belief, len(grad), D=grad.shape[1], BLOCK=BLOCK
        )
    return of_four, of_belief


@gru_backward.register_fake
def _(four: Tensor, belief: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return four.new_empty(four.shape), belief.new_empty(belief.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


gru.register_autograd(
    lambda ctx, grad: gru_backward(*ctx.saved_tensors, grad), setup_context=_keep_for_backward
)


def returns(
    reward: Tensor, value: Tensor, discount: Tensor, lmbda: float | Tensor, dim: int = -1
) -> Tensor:
    """`learner.lambda_return`, without a gradient; two dimensions."""
    weight = lmbda if isinstance(lmbda, Tensor) else torch.full_like(reward, lmbda)
    return lambda_return(reward, value, discount, weight, dim % 2)


class FusedRecurrence(Recurrence):
    """`Recurrence` with its two loops in the kernels above, where they fit (`fits`)."""

    _preparing: threading.Thread | None = None

    def prepare(self, rows: int) -> None:
        """Compile the kernels in the background: call this before the first update, which has much
        to compile itself."""
        if fits(self.rssm, rows) and self._preparing is None:
            self._preparing = threading.Thread(target=self._try, args=(rows,), daemon=True)
            self._preparing.start()

    @torch.no_grad()
    def _try(self, rows: int) -> None:
        """One step of both loops on zeros."""
        r: Any = self.rssm
        device, hidden = r.gates.weight.device, r.belief_in[0].out_features
        with torch.cuda.stream(torch.cuda.Stream(device)):
            zeros = r.gates.weight.new_zeros
            logits = torch.zeros(1, rows, r.categoricals, r.classes, device=device)
            first = torch.zeros(1, rows, 1, dtype=torch.bool, device=device)
            belief, weights = zeros(1, rows, r.belief), self.weights()
            self._filter(
                weights, belief[0], zeros(rows, r.state), belief, zeros(1, rows, hidden), first,
                zeros(r.belief), logits[..., 0],
            )  # fmt: skip
            part = zeros(1, rows, hidden)
            saved = part, part, belief, zeros(1, rows, 3 * r.belief), part, logits, belief, first
            self._couple(weights, (belief, belief, logits), saved)

    def filter(
        self, weights: Weights, belief: Tensor, state: Tensor, share: Tensor, embedding: Tensor,
        first: Tensor, start: Tensor, uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        arguments = weights, belief, state, share, embedding, first, start, uniform
        if not fits(self.rssm, len(belief)):
            return super().filter(*arguments)
        if self._preparing is not None:
            self._preparing.join()
        with on_device(belief):
            return self._filter(*arguments)

    def _filter(
        self, weights: Weights, belief: Tensor, state: Tensor, share: Tensor, embedding: Tensor,
        first: Tensor, start: Tensor, uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rssm, rows, steps = self.rssm, len(belief), len(first)
        w, hidden = weights, len(weights.belief_bias)
        sizes = self._sizes(rows)
        d, tiles = rssm.belief, triton.cdiv(rows, ROWS)
        full = {"dtype": torch.float32, "device": belief.device}
        beliefs = belief.new_empty(steps + 1, rows, d)
        beliefs[0] = belief
        index = torch.empty(
            steps + 1, rows, rssm.categoricals, dtype=torch.int32, device=belief.device
        )
        index[0] = rssm.compress(state)
        projected = torch.empty(SPLIT, rows, 2 * hidden, **full)
        inputs = belief.new_empty(rows, 2 * hidden)
        mix = belief.new_empty(rows, d)
        squares = torch.empty(d // COLUMNS, rows, **full)
        state_rows = w.on_state.t().contiguous()
        share, embedding, first, start, uniform = (
            x.contiguous() for x in (share, embedding, first.view(torch.uint8), start, uniform)
        )
        columns = d // COLUMNS, tiles
        wide = {k: sizes[k] for k in ("D", "DG", "ROWS", "COLUMNS", "DEPTH")}
        draw = {k: sizes[k] for k in ("H", "S", "K", "SPLIT")}

        def project(t: int) -> None:
            _project[(2 * hidden // COLUMNS, SPLIT, tiles)](
                beliefs[t], w.on_belief, projected, rows, D=d, H2=2 * hidden, SPLIT=SPLIT,
                ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
            )  # fmt: skip

        project(0)
        for t in range(steps):
            _inputs[(rows, 2)](
                projected, w.belief_bias, w.belief_norm, index[t], state_rows, w.state_bias,
                w.state_norm, inputs, rows, NORM_EPS, BLOCK_S=sizes["BLOCK_S"], **draw,
            )  # fmt: skip
            _mix[columns](
                inputs, w.shared, beliefs[t], w.own, share[t], mix, squares, rows, H2=2 * hidden,
                **wide,
            )  # fmt: skip
            _gates[columns](
                mix, squares, w.mix_norm, w.gates, w.gates_bias, beliefs[t], first[t], start,
                beliefs[t + 1], rows, NORM_EPS, TILES=sizes["TILES"], **wide,
            )  # fmt: skip
            project(t + 1)
            _posterior[(rssm.categoricals, tiles)](
                projected, embedding[t], w.hidden_norm, w.out, w.out_bias, uniform[t],
                index[t + 1], rows, rssm.unimix, NORM_EPS, ROWS=ROWS, **draw,
            )  # fmt: skip
        states = F.one_hot(index.long(), rssm.classes).flatten(-2).to(belief.dtype)
        return beliefs, states

    def couple(
        self, weights: Weights, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        if not fits(self.rssm, grads[1].shape[1]):
            return super().couple(weights, grads, saved)
        with on_device(grads[1]):
            return self._couple(weights, grads, saved)

    def _couple(
        self, weights: Weights, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        rssm, rows = self.rssm, grads[1].shape[1]
        w, hidden = weights, len(weights.belief_bias)
        sizes = self._sizes(rows)
        d, tiles = rssm.belief, triton.cdiv(rows, ROWS)
        grad_raw, grad_belief, grad_posterior = (x.contiguous() for x in grads)
        belief_in, state_in, mix, gates, pre_hidden, posterior, previous, first = (
            x.contiguous() for x in (*saved[:-1], saved[-1].view(torch.uint8))
        )
        full = {"dtype": torch.float32, "device": mix.device}
        inverse = torch.rsqrt(mix.float().square().mean(-1) + NORM_EPS)
        of_belief, of_posterior = torch.empty_like(grad_belief), torch.empty_like(grad_posterior)
        later = torch.zeros(rows, d, **full)
        later_inputs = torch.zeros(SPLIT, rows, 2 * hidden, **full)
        grad_x = torch.empty(rows, hidden, **full)
        grad_gates = mix.new_empty(rows, 3 * d)
        scaled = torch.empty(rows, d, **full)
        sums = torch.empty(d // COLUMNS, rows, **full)
        columns = d // COLUMNS, tiles
        wide = {k: sizes[k] for k in ("D", "DG", "ROWS", "COLUMNS", "DEPTH")}
        draw = {k: sizes[k] for k in ("H", "S", "K", "SPLIT")}
        for t in reversed(range(len(first))):
            # At the last step `later_inputs` is 0 and it does not matter whose inputs these are.
            after = min(t + 1, len(first) - 1)
            _to_posterior[(rssm.categoricals, tiles)](
                later_inputs, state_in[after], w.state_norm, w.on_state, posterior[t],
                grad_posterior[t], of_posterior[t], rows, rssm.unimix, NORM_EPS, ROWS=ROWS, **draw,
            )  # fmt: skip
            _to_hidden[(hidden // COLUMNS, tiles)](
                of_posterior[t], w.out, grad_x, rows, H=hidden, SK=rssm.state, ROWS=ROWS,
                COLUMNS=COLUMNS, DEPTH=DEPTH,
            )  # fmt: skip
            _to_gates[columns](
                grad_x, pre_hidden[t], w.hidden_norm, later_inputs, belief_in[after],
                w.belief_norm, w.on_belief, grad_belief[t], grad_raw[t], later, first[t],
                gates[t], previous[t], of_belief[t], grad_gates, rows, NORM_EPS, D=d,
                DG=sizes["DG"], H=hidden, SPLIT=SPLIT, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
            )  # fmt: skip
            _to_mix[columns](
                grad_gates, w.gates, mix[t], w.mix_norm, inverse[t], scaled, sums, rows, **wide
            )
            _to_inputs[(d // COLUMNS + 2 * hidden // COLUMNS * SPLIT, tiles)](
                scaled, sums, mix[t], inverse[t], w.own, w.shared, later, later_inputs, rows,
                H2=2 * hidden, TILES=sizes["TILES"], SPLIT=SPLIT, num_warps=1, **wide,
            )  # fmt: skip
        return of_belief, of_posterior

    def _sizes(self, rows: int) -> dict[str, Any]:
        """What the kernels are compiled for."""
        r = self.rssm
        return {
            "D": r.belief, "DG": r.belief // r.blocks, "H": r.belief_in[0].out_features,
            "S": r.categoricals, "K": r.classes, "SPLIT": SPLIT, "ROWS": ROWS, "COLUMNS": COLUMNS,
            "DEPTH": DEPTH, "BLOCK_S": triton.next_power_of_2(r.categoricals),
            "TILES": triton.next_power_of_2(r.belief // COLUMNS),
        }  # fmt: skip
