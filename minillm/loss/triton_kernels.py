"""The elementwise part of `token_scores` as Triton kernels: `measure` reads the logits twice, `differentiate` once.

Both functions take and return the same as the functions of the same names in `minillm.loss.elementwise`, which they are
tested against. All arithmetic is in float32, whatever dtype the projections have. Without Triton, those functions run.
"""

# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO
from minillm.loss.elementwise import Derivatives, Measures, Transforms

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MAX_BLOCK = 4096
"""Largest number of logits that a program handles at a time."""

_FLOOR = tl.constexpr(LOG_ZERO)


@triton.jit
def _transform(x, scale, cap, temperature, CAPPED: tl.constexpr):
    """Logits from projections that include the bias. tanh is computed from an exp that cannot overflow."""
    x = x * scale
    if CAPPED:
        decay = tl.exp(-2.0 * tl.abs(x) / cap)
        bent = cap * (1.0 - decay) / (1.0 + decay)
        x = tl.where(x < 0, -bent, bent)
    return x / temperature


@triton.jit
def _read(
    pointer, bias, row, width, columns, inside, scale, cap, temperature, CAPPED: tl.constexpr, BIASED: tl.constexpr
):
    """Logits of one token at some columns of the vocabulary."""
    x = tl.load(pointer + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias + columns, mask=inside, other=0.0)
    return _transform(x, scale, cap, temperature, CAPPED)


@triton.jit
def _floored(logs):
    """Log-probabilities of at least `LOG_ZERO`. NaN stays NaN, which `tl.maximum` would not guarantee."""
    return tl.where(logs < _FLOOR, _FLOOR, logs)


@triton.jit
def _measure_kernel(
    student,
    teacher,
    bias_s,
    bias_z,
    targets,
    out,
    rows,
    width,
    scale_s,
    cap_s,
    scale_z,
    cap_z,
    temperature,
    CAPPED_S: tl.constexpr,
    CAPPED_Z: tl.constexpr,
    BIASED_S: tl.constexpr,
    BIASED_Z: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token. It computes the normalisers, relative to the largest logit so far, and then the sums."""
    row = tl.program_id(0).to(tl.int64)
    top_s, top_z = -3.0e38, -3.0e38  # below every logit; unlike −inf, it gives 0 when subtracted from itself
    mass_s, mass_z = 0.0, 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        s = _read(student, bias_s, row, width, columns, inside, scale_s, cap_s, temperature, CAPPED_S, BIASED_S)
        z = _read(teacher, bias_z, row, width, columns, inside, scale_z, cap_z, temperature, CAPPED_Z, BIASED_Z)
        s, z = tl.where(inside, s, float("-inf")), tl.where(inside, z, float("-inf"))
        new_s, new_z = tl.maximum(top_s, tl.max(s, axis=0)), tl.maximum(top_z, tl.max(z, axis=0))
        mass_s = mass_s * tl.exp(top_s - new_s) + tl.sum(tl.exp(s - new_s), axis=0)
        mass_z = mass_z * tl.exp(top_z - new_z) + tl.sum(tl.exp(z - new_z), axis=0)
        top_s, top_z = new_s, new_z
    lse_s, lse_z = top_s + tl.log(mass_s), top_z + tl.log(mass_z)
    reverse, forward, entropy = 0.0, 0.0, 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        s = _read(student, bias_s, row, width, columns, inside, scale_s, cap_s, temperature, CAPPED_S, BIASED_S)
        z = _read(teacher, bias_z, row, width, columns, inside, scale_z, cap_z, temperature, CAPPED_Z, BIASED_Z)
        q, p = tl.where(inside, tl.exp(s - lse_s), 0.0), tl.where(inside, tl.exp(z - lse_z), 0.0)
        logq, logp = _floored(s - lse_s), _floored(z - lse_z)
        reverse += tl.sum(q * (logq - logp), axis=0)
        forward += tl.sum(p * (logp - logq), axis=0)
        entropy -= tl.sum(q * logq, axis=0)
    target = tl.load(targets + row)
    one = target + tl.arange(0, 1)
    chosen_s = _read(student, bias_s, row, width, one, one >= 0, scale_s, cap_s, temperature, CAPPED_S, BIASED_S)
    chosen_z = _read(teacher, bias_z, row, width, one, one >= 0, scale_z, cap_z, temperature, CAPPED_Z, BIASED_Z)
    tl.store(out + row, lse_s)
    tl.store(out + rows + row, lse_z)
    tl.store(out + 2 * rows + row + tl.arange(0, 1), _floored(chosen_s - lse_s))
    tl.store(out + 3 * rows + row + tl.arange(0, 1), _floored(chosen_z - lse_z))
    tl.store(out + 4 * rows + row, reverse)
    tl.store(out + 5 * rows + row, forward)
    tl.store(out + 6 * rows + row, entropy)


@triton.jit
def _differentiate_kernel(
    student,
    teacher,
    bias_s,
    bias_z,
    targets,
    lse_s,
    lse_z,
    reverse_kl,
    by_logq,
    by_reverse,
    by_forward,
    out,
    width,
    scale_s,
    cap_s,
    scale_z,
    cap_z,
    temperature,
    CAPPED_S: tl.constexpr,
    CAPPED_Z: tl.constexpr,
    BIASED_S: tl.constexpr,
    BIASED_Z: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and block of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    s = _read(student, bias_s, row, width, columns, inside, scale_s, cap_s, temperature, CAPPED_S, BIASED_S)
    z = _read(teacher, bias_z, row, width, columns, inside, scale_z, cap_z, temperature, CAPPED_Z, BIASED_Z)
    logq, logp = _floored(s - tl.load(lse_s + row)), _floored(z - tl.load(lse_z + row))
    a, r, f = tl.load(by_logq + row), tl.load(by_reverse + row), tl.load(by_forward + row)
    grad = tl.exp(logq) * (r * (logq - logp - tl.load(reverse_kl + row)) + f - a) - f * tl.exp(logp)
    grad = tl.where(columns == tl.load(targets + row), grad + a, grad)
    if CAPPED_S:
        bent = s * temperature / cap_s
        grad = grad * (1.0 - bent * bent)
    grad = grad * (scale_s / temperature)
    tl.store(out + row * width + columns, grad.to(out.dtype.element_ty), mask=inside)


def measure(
    student: Float[Tensor, "chunk vocab"],
    teacher: Float[Tensor, "chunk vocab"],
    targets: Int[Tensor, " chunk"],
    transforms: Transforms,
    wide: torch.dtype,
) -> Measures:
    """Compute the scores of each token; see `minillm.loss.elementwise.measure`. The projections must be contiguous."""
    rows, width = student.shape
    out = torch.empty(7, rows, dtype=wide, device=student.device)
    numbers, flags = _launch_arguments(transforms, width)
    _measure_kernel[(rows,)](student, teacher, *_biases(out, transforms), targets, out, rows, width, *numbers, **flags)
    return Measures(*out)


def differentiate(
    student: Float[Tensor, "chunk vocab"],
    teacher: Float[Tensor, "chunk vocab"],
    targets: Int[Tensor, " chunk"],
    measures: Measures,
    derivatives: Derivatives,
    transforms: Transforms,
    wide: torch.dtype,
    dtype: torch.dtype,
) -> Float[Tensor, "chunk vocab"]:
    """Compute the gradient by the student's projections; see `minillm.loss.elementwise.differentiate`."""
    rows, width = student.shape
    out = torch.empty(rows, width, dtype=dtype, device=student.device)
    numbers, flags = _launch_arguments(transforms, width)
    per_token = (measures.lse_q, measures.lse_p, measures.reverse_kl, *derivatives)
    scalars = [value.to(wide).contiguous() for value in per_token]
    _differentiate_kernel[(rows, triton.cdiv(width, flags["BLOCK"]))](
        student, teacher, *_biases(scalars[0], transforms), targets, *scalars, out, width, *numbers, **flags
    )
    return out


def _launch_arguments(transforms: Transforms, width: int) -> tuple[list[float], dict[str, Any]]:
    """Numbers and compile-time flags that the kernels take for two transforms and a vocabulary of size `width`."""
    q, p = transforms
    # The kernels take one temperature. That of both transforms is the same: a served teacher's rows, whose own
    # transform has temperature 1, come only with rollouts of temperature 1.
    numbers = [q.scale, q.softcap or 1.0, p.scale, p.softcap or 1.0, q.temperature]
    flags = {
        "CAPPED_S": q.softcap is not None,
        "CAPPED_Z": p.softcap is not None,
        "BIASED_S": q.bias is not None,
        "BIASED_Z": p.bias is not None,
        "BLOCK": min(MAX_BLOCK, triton.next_power_of_2(width)),
    }
    return numbers, flags


def _biases(unused: Tensor, transforms: Transforms) -> tuple[Tensor, Tensor]:
    """The biases to pass to a kernel. Without a bias any pointer will do (`unused`), because it is not read."""
    q, p = transforms
    return unused if q.bias is None else q.bias, unused if p.bias is None else p.bias
