"""The elementwise halves of `token_scores` on a GPU: two reads of the logits to measure, one to differentiate.

`measure` and `differentiate` take and return what `token_scores._measure` and `_differentiate` do, and are tested
against them; everything is float32, whatever the logits are stored in. Without Triton those two run instead.
"""

# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO

_BLOCK = 4096
_FLOOR = tl.constexpr(LOG_ZERO)


@triton.jit
def _curve(x, scale, cap, temperature, CAPPED: tl.constexpr):
    """Logits from projections (the bias is in them); tanh by way of exp, which cannot overflow here."""
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
    x = tl.load(pointer + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias + columns, mask=inside, other=0.0)
    return _curve(x, scale, cap, temperature, CAPPED)


@triton.jit
def _floored(logs):
    """What is not a number stays so, as `tl.maximum` would not leave it."""
    return tl.where(logs < _FLOOR, _FLOOR, logs)


@triton.jit
def _measure_kernel(
    student, teacher, bias_s, bias_z, targets, out, rows, width, scale_s, cap_s, scale_z, cap_z, temperature,
    CAPPED_S: tl.constexpr, CAPPED_Z: tl.constexpr, BIASED_S: tl.constexpr, BIASED_Z: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token: the normalisers, which are kept relative to the greatest logit so far, then the sums."""
    row = tl.program_id(0).to(tl.int64)
    top_s, top_z = -3.0e38, -3.0e38  # below every logit; minus itself it is 0, which −inf would not be
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
    student, teacher, bias_s, bias_z, targets, lse_s, lse_z, reverse_kl, by_logq, by_reverse, by_forward, out, width,
    scale_s, cap_s, scale_z, cap_z, temperature,
    CAPPED_S: tl.constexpr, CAPPED_Z: tl.constexpr, BIASED_S: tl.constexpr, BIASED_Z: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token and block of the vocabulary."""
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
    student: Tensor, teacher: Tensor, targets: Tensor, curve: Any, teacher_curve: Any, wide: torch.dtype
) -> tuple[Tensor, ...]:
    """See `token_scores._measure`. student, teacher: [n, V], contiguous; targets: [n]."""
    rows, width = student.shape
    out = torch.empty(7, rows, dtype=wide, device=student.device)
    settings, flags = _settings(student, curve, teacher_curve)
    _measure_kernel[(rows,)](
        student, teacher, *_biases(out, curve, teacher_curve), targets, out, rows, width, *settings, **flags
    )
    return tuple(out)


def differentiate(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_z: Tensor, reverse_kl: Tensor, targets: Tensor, by_logq: Tensor,
    by_reverse: Tensor, by_forward: Tensor, curve: Any, teacher_curve: Any, wide: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `token_scores._differentiate`."""
    rows, width = student.shape
    out = torch.empty(rows, width, dtype=dtype, device=student.device)
    settings, flags = _settings(student, curve, teacher_curve)
    scalars = [value.to(wide).contiguous() for value in (lse_s, lse_z, reverse_kl, by_logq, by_reverse, by_forward)]
    _differentiate_kernel[(rows, triton.cdiv(width, flags["BLOCK"]))](
        student, teacher, *_biases(scalars[0], curve, teacher_curve), targets, *scalars, out, width, *settings, **flags
    )
    return out


def _settings(student: Tensor, curve: Any, teacher_curve: Any) -> tuple[list[float], dict[str, Any]]:
    numbers = [curve.scale, curve.softcap or 1.0, teacher_curve.scale, teacher_curve.softcap or 1.0, curve.temperature]
    flags = {
        "CAPPED_S": curve.softcap is not None, "CAPPED_Z": teacher_curve.softcap is not None,
        "BIASED_S": curve.bias is not None, "BIASED_Z": teacher_curve.bias is not None,
        "BLOCK": min(_BLOCK, triton.next_power_of_2(student.shape[1])),
    }  # fmt: skip
    return numbers, flags


def _biases(stand_in: Tensor, curve: Any, teacher_curve: Any) -> tuple[Tensor, Tensor]:
    """Any pointer serves where there is no bias: it is not read."""
    return (
        stand_in if curve.bias is None else curve.bias,
        stand_in if teacher_curve.bias is None else teacher_curve.bias,
    )
