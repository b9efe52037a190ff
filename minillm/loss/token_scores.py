"""Per-token scores and the objective's gradient, from hidden states, in one pass over chunks of tokens.

No [N, V] tensor lives longer than its chunk. The gradients of the student's hidden states and head are computed in
the forward pass, because everything they depend on is at hand there: four matmuls a token (student logits, teacher
logits, two for the gradients) where autograd over recomputed chunks takes six. What stays until the backward is one
gradient [N, H] and, for a trained head, one float32 gradient of its weight [V, H].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

CHUNK = 512
# Below this many logits a chunk is not worth compiling for. Float32 logits stay eager: the compiled sums over a
# vocabulary carry 4e-5 of relative error, which bfloat16 logits hide and float32 ones would not.
_COMPILE_FROM = 1 << 22


@dataclass
class Head:
    """The map from hidden states [N, H] to logits [N, V]: softcap(scale · (h Wᵀ + b)) / temperature."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def narrow(self, width: int) -> Head:
        """The head of the first `width` tokens."""
        if width == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:width]
        return Head(self.weight[:width], bias, self.scale, self.softcap)


@dataclass
class TokenScores:
    """Float32, one value per response token [N], no gradient.

    logq, logp: log-probability of the token itself. reverse_kl: KL(q‖p). forward_kl: KL(p‖q). entropy: of q.
    Without a teacher logp is logq, and both divergences are zero.
    """

    logq: Tensor
    logp: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    entropy: Tensor


@dataclass
class TokenWeights:
    """Derivatives of the loss by a token's scores [N]; each may be None for zero.

    logq: by log q(y). reverse_kl: by KL(q‖p). forward_kl: by KL(p‖q).
    """

    logq: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None


# Given a chunk's place and scores, the loss it contributes and the loss's derivatives. Called from the last chunk to
# the first, so that a return, which sums over the future, is complete when a token's turn comes.
Weigh = Callable[[slice, TokenScores], tuple[Tensor, TokenWeights]]


def token_scores(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    *,
    weigh: Weigh | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, TokenScores]:
    """Score N tokens, and differentiate a loss of the scores.

    Args:
        hidden: [N, H] student states that predict `targets` [N].
        teacher_hidden: [N, H_p], without gradient. Heads must have one width (`Head.narrow`).
        weigh: the loss; None scores only.

    Returns:
        The loss, a scalar that backpropagates into `hidden`, `head.weight` and `head.bias`; and the scores.
    """
    outs: list[TokenScores] = []
    loss = _GradientInForward.apply(
        hidden, head.weight, head.bias, head, targets, teacher_hidden, teacher_head, weigh, temperature, chunk, outs
    )
    return loss, outs[0]


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, targets, teacher_hidden, teacher_head, weigh, temperature, chunk, outs):
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            return _forward(
                ctx, hidden, Head(weight, bias, head.scale, head.softcap), targets, teacher_hidden, teacher_head, weigh,
                temperature, chunk, outs, dtype,
            )  # fmt: skip

    @staticmethod
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = [None if grad is None else grad.mul_(upstream).to(dtype) for grad, dtype in ctx.grads]
        ctx.grads = None
        return *grads, *(None,) * 8


def _forward(ctx, hidden, head, targets, teacher_hidden, teacher_head, weigh, temperature, chunk, outs, dtype) -> Tensor:
    n = len(targets)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scores = TokenScores(*(hidden.new_zeros(n, dtype=wide) for _ in fields(TokenScores)))
    outs.append(scores)
    loss = hidden.new_zeros((), dtype=wide)
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    wants_grad = weigh is not None and any(ctx.needs_input_grad[:3])
    grad_hidden = torch.empty_like(hidden, dtype=wide) if wants_grad and needs_hidden else None
    grad_weight = torch.zeros_like(head.weight, dtype=wide) if wants_grad and needs_weight else None
    grad_bias = torch.zeros_like(head.bias, dtype=wide) if wants_grad and needs_bias else None

    weight = head.weight.detach().to(dtype)
    states = hidden.detach().to(dtype)
    if teacher_hidden is not None:
        teacher_head = Head(teacher_head.weight.detach().to(dtype), teacher_head.bias, teacher_head.scale, teacher_head.softcap)
        teacher_hidden = teacher_hidden.to(dtype)

    measure, differentiate = _elementwise(min(chunk, n) * weight.shape[0], dtype, wide)
    for start in range((max(n, 1) - 1) // chunk * chunk, -1, -chunk):
        part = slice(start, min(start + chunk, n))
        if part.start == part.stop:
            break
        student = _logits(states[part], weight, head, temperature)
        teacher = student if teacher_hidden is None else _logits(
            teacher_hidden[part], teacher_head.weight, teacher_head, temperature
        )  # fmt: skip
        normaliser, teacher_normaliser, *values = measure(student, teacher, targets[part])
        here = TokenScores(*values)
        for field in fields(TokenScores):
            getattr(scores, field.name)[part] = getattr(here, field.name)
        if weigh is None:
            continue
        value, weights = weigh(part, here)
        loss += value
        if not wants_grad:
            continue
        zero = torch.zeros_like(here.logq)
        by_logq, by_reverse, by_forward = (
            zero if w is None else w.to(wide) for w in (weights.logq, weights.reverse_kl, weights.forward_kl)
        )
        grad = differentiate(
            student, teacher, normaliser, teacher_normaliser, here.reverse_kl, targets[part], by_logq, by_reverse, by_forward
        )
        if head.softcap is not None:
            # d softcap(x)/dx = 1 − (y/cap)², and y is the capped logit before the temperature.
            grad = grad * (1 - (student.to(wide) * temperature / head.softcap) ** 2)
        grad = (grad * (head.scale / temperature)).to(dtype)
        if grad_hidden is not None:
            grad_hidden[part] = grad @ weight
        if grad_weight is not None:
            grad_weight += grad.t() @ states[part]
        if grad_bias is not None:
            grad_bias += grad.to(wide).sum(0)
    ctx.grads = [
        (grad, None if tensor is None else tensor.dtype)
        for grad, tensor in ((grad_hidden, hidden), (grad_weight, head.weight), (grad_bias, head.bias))
    ]
    return loss


def _logits(states: Tensor, weight: Tensor, head: Head, temperature: float) -> Tensor:
    logits = states @ weight.t()
    if head.bias is not None:
        logits = logits + head.bias.to(logits.dtype)
    factor = head.scale if head.softcap is not None else head.scale / temperature
    if factor != 1.0:
        logits = logits * factor
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * (head.softcap / temperature)
    return logits


def _measure(student: Tensor, teacher: Tensor, targets: Tensor, wide: torch.dtype):
    s, z = student.to(wide), teacher.to(wide)
    lse_s, lse_z = torch.logsumexp(s, -1), torch.logsumexp(z, -1)
    q, p = torch.exp(s - lse_s[:, None]), torch.exp(z - lse_z[:, None])
    qs, qz, pz, ps = (q * s).sum(-1), (q * z).sum(-1), (p * z).sum(-1), (p * s).sum(-1)
    at = targets[:, None]
    logq = student.gather(1, at)[:, 0].to(wide) - lse_s
    logp = teacher.gather(1, at)[:, 0].to(wide) - lse_z
    gap = lse_s - lse_z
    return lse_s, lse_z, logq, logp, qs - qz - gap, pz - ps + gap, lse_s - qs


def _differentiate(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_z: Tensor, reverse_kl: Tensor, targets: Tensor,
    by_logq: Tensor, by_reverse: Tensor, by_forward: Tensor, wide: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gradient by the student's logits [n, V] of Σ by_logq·log q(y) + by_reverse·KL(q‖p) + by_forward·KL(p‖q).

    d log q(y) = 1[y] − q;  d KL(q‖p) = q (log q − log p − KL(q‖p));  d KL(p‖q) = q − p.
    """
    logq, logp = student.to(wide) - lse_s[:, None], teacher.to(wide) - lse_z[:, None]
    factor = by_reverse[:, None] * (logq - logp - reverse_kl[:, None]) + (by_forward - by_logq)[:, None]
    grad = torch.exp(logq) * factor - by_forward[:, None] * torch.exp(logp)
    return grad.scatter_add(1, targets[:, None], by_logq[:, None])


_compiled: dict[str, Callable] = {}


def _elementwise(size: int, dtype: torch.dtype, wide: torch.dtype) -> tuple[Callable, Callable]:
    def bind(function: Callable) -> Callable:
        return lambda *args: function(*args, wide)

    if size < _COMPILE_FROM or dtype.itemsize > 2:
        return bind(_measure), bind(_differentiate)
    if not _compiled:
        _compiled["measure"] = torch.compile(_measure, dynamic=True)
        _compiled["differentiate"] = torch.compile(_differentiate, dynamic=True)
    return bind(_compiled["measure"]), bind(_compiled["differentiate"])
