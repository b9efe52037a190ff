"""Per-token scores and the objective's gradient, from hidden states, in one pass over chunks of tokens.

No [N, V] tensor lives longer than its chunk. The gradients of the student's hidden states and head are computed in
the forward pass, because everything they depend on is at hand there: four matmuls a token (student logits, teacher
logits, two for the gradients; three with a frozen head) where autograd over recomputed chunks takes six. What stays
until the backward is one gradient [N, H] and, for a trained head, one float32 gradient of its weight [V, H], which the
backward hands over as it is and autograd adds in place to what earlier micro-batches left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO
from minillm.data.rollouts import TeacherRows
from minillm.models.device import cpu_multiplies_bfloat16
from minillm.models.head import Head, LogitTransform, project

CHUNK = 512
# Below this many logits a chunk is not worth compiling for. Float32 states stay eager: the compiled sums over a
# vocabulary carry 4e-5 of relative error, which bfloat16 states hide and float32 ones would not.
_COMPILE_FROM = 1 << 22


@dataclass
class TokenScores:
    """Float32, one value per response token [N], no gradient.

    logq, logp: log-probability of the token itself. reverse_kl: KL(q‖p). forward_kl: KL(p‖q). entropy: of q.
    Without a teacher logp is logq, and both divergences are zero. divergence: of another kind, where one was given.
    text_logq, text_forward_kl: logq and forward_kl at the temperature of text. No log-probability is below `LOG_ZERO` (see `floor`).
    """

    logq: Tensor
    logp: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    entropy: Tensor
    divergence: Tensor | None = None
    text_logq: Tensor = None  # pyright: ignore[reportAssignmentType]
    text_forward_kl: Tensor = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        if self.text_logq is None:
            self.text_logq, self.text_forward_kl = self.logq, self.forward_kl


@dataclass
class ScoreGradients:
    """Derivatives of the loss by a token's scores [N]; each may be None for zero.

    logq: by log q(y). reverse_kl: by KL(q‖p). forward_kl: by KL(p‖q). divergence: by the one that was given. text_logq,
    text_forward_kl: by these at the temperature of text.
    """

    logq: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    divergence: Tensor | None = None
    text_logq: Tensor | None = None
    text_forward_kl: Tensor | None = None


# Given a chunk's place and scores, the loss it contributes and the loss's derivatives. Called from the last chunk to
# the first, so that a return, which sums over the future, is complete when a token's turn comes.
LossFn = Callable[[slice, TokenScores], tuple[Tensor, ScoreGradients]]
# Logits of student and teacher [n, V], divided by the temperature, to one value a token [n]; see `minillm.loss.divergences`.
Divergence = Callable[[Tensor, Tensor], Tensor]


def token_scores(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    *,
    teacher_rows: TeacherRows | None = None,
    loss_fn: LossFn | None = None,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    text_temperature: float | None = None,
    width: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, TokenScores]:
    """Score N tokens, and differentiate a loss of the scores.

    Args:
        hidden: [N, H] student states that predict `targets` [N].
        teacher_hidden: [N, H_p], without gradient.
        teacher_rows: log p of a few tokens at each place, at the same temperature, instead of the teacher's states. All
            others count as one event, which makes both divergences those of a coarser partition: at most the true ones,
            short of KL(q‖p) by q(others) · KL within the others. Their gradients are the partition's own, exactly.
        width: the vocabulary is the first so many rows of both heads, and the rest padding; by default all of them, of
            which both heads must have as many.
        weigh: the loss; None scores only.
        divergence: one more to score by, besides the two KLs: any function that autograd can differentiate. It costs some
            passes over a chunk's logits, and no matmul.
        temperature: divides the logits of both.
        text_temperature: divides them for `text_logq` and `text_forward_kl`; by default the same. Another one costs two passes over a
            chunk's logits, and no matmul.

    Returns:
        The loss, a scalar that backpropagates into `hidden`, `head.weight` and `head.bias`; and the scores.
    """
    outs: list[TokenScores] = []
    loss = _GradientInForward.apply(
        hidden, head.weight, head.bias, head, targets, teacher_hidden, teacher_head, teacher_rows, loss_fn, divergence, temperature,
        temperature if text_temperature is None else text_temperature, width, chunk, outs,
    )  # fmt: skip
    return loss, outs[0]


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, head, targets, teacher_hidden, teacher_head, teacher_rows, loss_fn, divergence, temperature,
        text_temperature, width, chunk, outs,
    ):  # fmt: skip
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        rounded = dtype.itemsize <= 2
        if dtype == torch.bfloat16 and hidden.device.type == "cpu" and not cpu_multiplies_bfloat16():
            dtype = torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            return _forward(
                ctx, hidden, Head(weight, bias, head.scale, head.softcap), targets, teacher_hidden, teacher_head, teacher_rows, loss_fn,
                divergence, temperature, text_temperature, width, chunk, outs, dtype, rounded,
            )  # fmt: skip

    @staticmethod
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = [None if grad is None else grad.mul_(upstream).to(dtype) for grad, dtype in ctx.grads]
        ctx.grads = None
        return *grads, *(None,) * 12


def _forward(
    ctx, hidden, head, targets, teacher_hidden, teacher_head, teacher_rows, loss_fn, divergence, temperature, text_temperature, width,
    chunk, outs, dtype, rounded,
) -> Tensor:  # fmt: skip
    n = len(targets)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    apart = text_temperature != temperature
    left_out = ({"divergence"} if divergence is None else set()) | (
        set() if apart else {"text_logq", "text_forward_kl"}
    )
    kept = [field.name for field in fields(TokenScores) if field.name not in left_out]
    scores = TokenScores(**{name: hidden.new_zeros(n, dtype=wide) for name in kept})
    outs.append(scores)
    loss = hidden.new_zeros((), dtype=wide)
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    wants_grad = loss_fn is not None and any(ctx.needs_input_grad[:3])
    grad_hidden = torch.empty_like(hidden, dtype=wide) if wants_grad and needs_hidden else None
    grad_weight = torch.zeros_like(head.weight, dtype=wide) if wants_grad and needs_weight else None
    grad_bias = torch.zeros_like(head.bias, dtype=wide) if wants_grad and needs_bias else None

    width = head.weight.shape[0] if width is None else width
    # Gradients are of the whole head, so that nothing has to be widened after; padded rows keep their zeros.
    used_weight = None if grad_weight is None else grad_weight[:width]
    used_bias = None if grad_bias is None else grad_bias[:width]
    head = head.narrow(width)
    weight, curve = head.weight.detach().to(dtype), LogitTransform.of(head, temperature, wide)
    states = hidden.detach().to(dtype)
    teacher_curve = curve
    text_curve = text_teacher_curve = curve._replace(temperature=float(text_temperature))
    if teacher_hidden is not None:
        teacher_head = teacher_head.narrow(width)
        teacher_weight, teacher_curve = (
            teacher_head.weight.detach().to(dtype),
            LogitTransform.of(teacher_head, temperature, wide),
        )
        text_teacher_curve = teacher_curve._replace(temperature=float(text_temperature))
        teacher_hidden = teacher_hidden.to(dtype)
    elif teacher_rows is not None:
        teacher_curve = text_teacher_curve = LogitTransform(None, 1.0, None, 1.0)

    measure, differentiate = _elementwise(min(chunk, n) * weight.shape[0], hidden.device, wide, rounded)
    for start in range((max(n, 1) - 1) // chunk * chunk, -1, -chunk):
        part = slice(start, min(start + chunk, n))
        if part.start == part.stop:
            break
        student = project(states[part], weight)
        if teacher_hidden is not None:
            teacher = project(teacher_hidden[part], teacher_weight)
        elif teacher_rows is not None:
            teacher = _complete_with_student(
                curve.logits(student, wide), teacher_rows.ids[part], teacher_rows.logprobs[part]
            )
        else:
            teacher = student
        *normalisers, logq, logp, reverse, forward, entropy = measure(
            student, teacher, targets[part], curve, teacher_curve, wide
        )
        here = TokenScores(logq, logp, reverse, forward, entropy)
        if apart:
            measured = measure(student, teacher, targets[part], text_curve, text_teacher_curve, wide)
            *text_normalisers, here.text_logq, _, text_reverse, here.text_forward_kl, _ = measured
        if divergence is not None:
            with torch.enable_grad():
                logits = curve.logits(student, wide).requires_grad_()
                other = divergence(logits, teacher_curve.logits(teacher, wide))
            here.divergence = other.detach()
        for name in kept:
            getattr(scores, name)[part] = getattr(here, name)
        if loss_fn is None:
            continue
        value, weights = loss_fn(part, here)
        loss += value
        if not wants_grad:
            continue
        zero = torch.zeros_like(here.logq)
        by = {name: zero if w is None else w.to(wide) for name, w in vars(weights).items()}
        unit = None
        if dtype == torch.float16:
            # Shares of a token count are too small for float16, and no loss scale has reached them yet.
            unit = torch.stack([w.abs().max() for w in by.values()]).max().clamp(min=1e-30)
            by = {name: w / unit for name, w in by.items()}
        if not apart:
            by["logq"], by["forward_kl"] = by["logq"] + by["text_logq"], by["forward_kl"] + by["text_forward_kl"]
        grad = differentiate(
            student, teacher, *normalisers, here.reverse_kl, targets[part], by["logq"], by["reverse_kl"], by["forward_kl"],
            curve, teacher_curve, wide, dtype,
        )  # fmt: skip
        if apart and not (weights.text_logq is None and weights.text_forward_kl is None):
            grad = grad + differentiate(
                student, teacher, *text_normalisers, text_reverse, targets[part], by["text_logq"], zero, by["text_forward_kl"],
                text_curve, text_teacher_curve, wide, dtype,
            )  # fmt: skip
        if divergence is not None and weights.divergence is not None:
            [by_logits] = torch.autograd.grad(other, logits, by["divergence"])
            grad = grad + (by_logits * curve.slope(logits.detach())).to(dtype)
        del student, teacher
        if grad_hidden is not None:
            grad_hidden[part] = _scaled(grad @ weight, unit)
        if used_weight is not None:
            used_weight += _scaled(grad.t() @ states[part], unit)
        if used_bias is not None:
            used_bias += _scaled(grad.to(wide).sum(0), unit)
    ctx.grads = [
        (grad, None if tensor is None else tensor.dtype)
        for grad, tensor in ((grad_hidden, hidden), (grad_weight, head.weight), (grad_bias, head.bias))
    ]
    return loss


def _complete_with_student(student: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
    """Rows of log p [n, V] that are known at `ids` [n, K] and elsewhere q's own, scaled to the mass that is left.

    KL(q‖·) to such a row is that of the partition {ids, all others}, and so is its gradient.
    """
    logq = torch.log_softmax(student, -1)
    others_q = logq.scatter(1, ids, -torch.inf).logsumexp(-1).clamp(min=LOG_ZERO)
    repeated = ids == ids[:, :1]
    repeated[:, 0] = False
    known = logp.double().exp().masked_fill(repeated, 0.0).sum(-1)
    others_p = torch.log1p(-known.clamp(max=1 - 1e-7)).to(
        logq.dtype
    )  # float32 log-probabilities add up no closer to one
    return (logq + (others_p - others_q)[:, None]).scatter(1, ids, logp.to(logq.dtype))


def _scaled(value: Tensor, unit: Tensor | None) -> Tensor:
    return value if unit is None else value.to(unit.dtype) * unit


def _measure(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    curve: LogitTransform,
    teacher_curve: LogitTransform,
    wide: torch.dtype,
):
    """The two normalisers, then the fields of `TokenScores`; one exponential a logit."""
    s, z = curve.logits(student, wide), teacher_curve.logits(teacher, wide)
    top_s, top_z = s.amax(-1), z.amax(-1)
    s, z = s - top_s[:, None], z - top_z[:, None]  # sums of small numbers
    q, p = torch.exp(s), torch.exp(z)
    mass_q, mass_p = q.sum(-1), p.sum(-1)
    log_q, log_p = mass_q.log(), mass_p.log()
    s, z = torch.maximum(s, (log_q + LOG_ZERO)[:, None]), torch.maximum(z, (log_p + LOG_ZERO)[:, None])
    at = targets[:, None]
    chosen_s, chosen_z = s.gather(1, at)[:, 0], z.gather(1, at)[:, 0]
    gap = s - z
    reverse = (q * gap).sum(-1) / mass_q - log_q + log_p
    forward = log_q - log_p - (p * gap).sum(-1) / mass_p
    entropy = log_q - (q * s).sum(-1) / mass_q
    return top_s + log_q, top_z + log_p, chosen_s - log_q, chosen_z - log_p, reverse, forward, entropy


def _differentiate(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_z: Tensor, reverse_kl: Tensor, targets: Tensor, by_logq: Tensor,
    by_reverse: Tensor, by_forward: Tensor, curve: LogitTransform, teacher_curve: LogitTransform, wide: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gradient by the student's projection [n, V] of Σ by_logq·log q(y) + by_reverse·KL(q‖p) + by_forward·KL(p‖q).

    d log q(y) = 1[y] − q;  d KL(q‖p) = q (log q − log p − KL(q‖p));  d KL(p‖q) = q − p.
    """
    s = curve.logits(student, wide)
    logq = (s - lse_s[:, None]).clamp(min=LOG_ZERO)
    logp = (teacher_curve.logits(teacher, wide) - lse_z[:, None]).clamp(min=LOG_ZERO)
    factor = by_reverse[:, None] * (logq - logp - reverse_kl[:, None]) + (by_forward - by_logq)[:, None]
    grad = torch.exp(logq) * factor - by_forward[:, None] * torch.exp(logp)
    drawn = torch.arange(s.shape[1], device=s.device)[None, :] == targets[:, None]
    grad = torch.where(drawn, grad + by_logq[:, None], grad)
    return (grad * curve.slope(s)).to(dtype)


@cache
def _compiled() -> tuple[Callable, Callable]:
    return torch.compile(_measure, dynamic=True), torch.compile(_differentiate, dynamic=True)


def _elementwise(size: int, device: torch.device, wide: torch.dtype, rounded: bool) -> tuple[Callable, Callable]:
    if device.type == "cuda" and wide == torch.float32 and find_spec("triton") is not None:
        from minillm.loss import triton_kernels

        return triton_kernels.measure, triton_kernels.differentiate
    if size < _COMPILE_FROM or not rounded:
        return _measure, _differentiate
    return _compiled()
