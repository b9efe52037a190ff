"""The elementwise part of `token_scores`: scores from logits, and the gradient of the loss by the projections.

A projection is h Wᵀ, the product of hidden states and the head's weight. A `LogitTransform` turns it into logits. All
functions here take the projections of one chunk of tokens, because the logits of a whole batch never exist at once.

`measure` and `differentiate` are written in plain PyTorch and define the results. `elementwise_functions` returns them,
or faster implementations of the same: Triton kernels on a GPU, compiled code for large chunks on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO
from minillm.models.head import LogitTransform

if TYPE_CHECKING:
    from jaxtyping import Float, Int

COMPILE_FROM = 1 << 22
"""Compiling is worth its time for chunks of at least this many logits."""


class Precision(NamedTuple):
    """The dtypes of a computation.

    Attributes:
        matmul: dtype of the states, weights and gradients of logits that are multiplied. It is float32 on a CPU also
            where they are rounded: see `float32_from_bfloat16_products`.
        wide: dtype of logits, scores and accumulated gradients.
        rounded: Whether states and weights have 16 bits, or are rounded to 16 bits by autocast.
    """

    matmul: torch.dtype
    wide: torch.dtype
    rounded: bool

    @classmethod
    def of(cls, hidden: Tensor) -> Precision:
        """Return the dtypes for these hidden states, under the autocast that is active here."""
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        rounded = dtype.itemsize <= 2
        if dtype == torch.bfloat16 and device == "cpu":
            dtype = torch.float32
        return cls(dtype, torch.float64 if hidden.dtype == torch.float64 else torch.float32, rounded)

    def factor(self, weight: Tensor) -> Tensor:
        """Return the weight of a head as it is multiplied.

        On a CPU, weights in bfloat16 stay so: `project` converts them block by block, so that no whole copy exists.
        """
        kept = self.rounded and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        return weight.detach() if kept else weight.detach().to(self.matmul)


class Transforms(NamedTuple):
    """What turns the student's and the teacher's projections into the logits that are compared."""

    student: LogitTransform
    teacher: LogitTransform


class Measures(NamedTuple):
    """What `measure` finds for each token of a chunk.

    Attributes:
        lse_q: log Σ exp of the student's logits, which turns logits into log-probabilities.
        lse_p: log Σ exp of the teacher's logits.
        logq: log q(y) of the token y itself.
        logp: log p(y) of the token y itself.
        reverse_kl: KL(q‖p).
        forward_kl: KL(p‖q).
        entropy: Entropy of q.
    """

    lse_q: Float[Tensor, " chunk"]
    lse_p: Float[Tensor, " chunk"]
    logq: Float[Tensor, " chunk"]
    logp: Float[Tensor, " chunk"]
    reverse_kl: Float[Tensor, " chunk"]
    forward_kl: Float[Tensor, " chunk"]
    entropy: Float[Tensor, " chunk"]


class Derivatives(NamedTuple):
    """Derivatives of the loss by log q(y), by KL(q‖p) and by KL(p‖q) of each token of a chunk."""

    logq: Float[Tensor, " chunk"]
    reverse_kl: Float[Tensor, " chunk"]
    forward_kl: Float[Tensor, " chunk"]


def measure(
    student: Float[Tensor, "chunk vocab"],
    teacher: Float[Tensor, "chunk vocab"],
    targets: Int[Tensor, " chunk"],
    transforms: Transforms,
    wide: torch.dtype,
) -> Measures:
    """Compute the scores of each token, with one exponential per logit.

    Args:
        student: Projections of the student.
        teacher: Projections of the teacher, or of the student itself where there is no teacher.
        targets: The token ids y that the scores are about.
        transforms: Turn the projections into logits.
        wide: dtype of the computation and of the results: float32, or float64 for float64 states.

    Returns:
        The scores, and the normalisers that `differentiate` needs. No log-probability is below `LOG_ZERO`.
    """
    s, z = transforms.student.logits(student, wide), transforms.teacher.logits(teacher, wide)
    return _measures(s, z, s.amax(-1), z.amax(-1), targets, floored=True)


def _measures(s: Tensor, z: Tensor, top_s: Tensor, top_z: Tensor, targets: Tensor, *, floored: bool) -> Measures:
    """Compute the scores from logits and their maxima. `floored` tells whether any may be below the floor.

    A floor is relative to the sum of the exponentials. Without one, all sums are taken in one pass over the logits.
    """
    wide = s.dtype
    s, z = s - top_s[:, None], z - top_z[:, None]  # the sums below are then of small numbers
    q, p = torch.exp(s), torch.exp(z)
    mass_q, mass_p = _sum(q), _sum(p)
    log_q, log_p = mass_q.log().to(wide), mass_p.log().to(wide)
    if floored:
        s, z = torch.maximum(s, (log_q + LOG_ZERO)[:, None]), torch.maximum(z, (log_p + LOG_ZERO)[:, None])
    at = targets[:, None]
    chosen_s, chosen_z = s.gather(1, at)[:, 0], z.gather(1, at)[:, 0]
    gap = s - z
    reverse = (_sum(q * gap) / mass_q).to(wide) - log_q + log_p
    forward = log_q - log_p - (_sum(p * gap) / mass_p).to(wide)
    entropy = log_q - (_sum(q * s) / mass_q).to(wide)
    return Measures(top_s + log_q, top_z + log_p, chosen_s - log_q, chosen_z - log_p, reverse, forward, entropy)


def _extremes(
    student: Tensor, teacher: Tensor, transforms: Transforms, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logits of student and teacher, and the least of all logits relative to its row's largest."""
    s, z = transforms.student.logits(student, wide), transforms.teacher.logits(teacher, wide)
    top_s, top_z = s.amax(-1), z.amax(-1)
    return top_s, top_z, torch.minimum(s.amin(-1) - top_s, z.amin(-1) - top_z)


def _measure_in_range(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    transforms: Transforms,
    wide: torch.dtype,
    tops: tuple[Tensor, Tensor],
) -> Measures:
    s, z = transforms.student.logits(student, wide), transforms.teacher.logits(teacher, wide)
    return _measures(s, z, *tops, targets, floored=False)


def _sum(values: Float[Tensor, "chunk vocab"]) -> Float[Tensor, " chunk"]:
    """Sum over the vocabulary in float64: a compiled sum of float32 numbers would be off by 2e-5 of its value."""
    return values.sum(-1, dtype=torch.float64)


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
    """Compute the gradient by the student's projections of a loss whose derivatives by the scores are known.

    The loss is Σ a·log q(y) + r·KL(q‖p) + f·KL(p‖q) with the factors a, r and f of `derivatives`. By the logits,

        d log q(y) = 1[y] − q;  d KL(q‖p) = q (log q − log p − KL(q‖p));  d KL(p‖q) = q − p.

    Args:
        student: Projections of the student.
        teacher: Projections of the teacher, or of the student itself where there is no teacher.
        targets: The token ids y.
        measures: What `measure` returned for the same projections and transforms.
        derivatives: Derivatives of the loss by the scores.
        transforms: Turn the projections into logits.
        wide: dtype of the computation.
        dtype: dtype of the result, in which it is multiplied by states and weights.
    """
    s = transforms.student.logits(student, wide)
    logq = (s - measures.lse_q[:, None]).clamp(min=LOG_ZERO)
    logp = (transforms.teacher.logits(teacher, wide) - measures.lse_p[:, None]).clamp(min=LOG_ZERO)
    by_logq, by_reverse, by_forward = derivatives
    factor = by_reverse[:, None] * (logq - logp - measures.reverse_kl[:, None]) + (by_forward - by_logq)[:, None]
    grad = torch.exp(logq) * factor - by_forward[:, None] * torch.exp(logp)
    is_target = torch.arange(s.shape[1], device=s.device)[None, :] == targets[:, None]
    grad = torch.where(is_target, grad + by_logq[:, None], grad)
    return (grad * transforms.student.slope(s)).to(dtype)


def complete_with_student(
    student: Float[Tensor, "chunk vocab"], ids: Int[Tensor, "chunk known"], logp: Float[Tensor, "chunk known"]
) -> Float[Tensor, "chunk vocab"]:
    """Return log p, which is known for some tokens, and for the others is q scaled to the probability that is left.

    KL(q‖·) to this distribution is that of the partition {known tokens, all others}, and so is its gradient.

    Args:
        student: Logits of the student, divided by the temperature.
        ids: Tokens whose log-probability is known. Slot 0 is the sampled token; an unused slot repeats it.
        logp: Log-probabilities of these tokens.
    """
    logq = torch.log_softmax(student, -1)
    others_q = logq.scatter(1, ids, -torch.inf).logsumexp(-1).clamp(min=LOG_ZERO)
    repeated = ids == ids[:, :1]
    repeated[:, 0] = False
    known = logp.double().exp().masked_fill(repeated, 0.0).sum(-1)
    # float32 log-probabilities add up to one no more exactly than this.
    others_p = torch.log1p(-known.clamp(max=1 - 1e-7)).to(logq.dtype)
    return (logq + (others_p - others_q)[:, None]).scatter(1, ids, logp.to(logq.dtype))


@cache
def compiled() -> tuple[Callable[..., Measures], Callable[..., Tensor]]:
    """Return `measure` and `differentiate`, compiled by torch.compile at their first call.

    Where no log-probability of a chunk can be below `LOG_ZERO`, which is so unless a model excludes tokens, `measure`
    takes a third of the time: it needs no sum of exponentials before the others.
    """
    extremes, in_range = torch.compile(_extremes, dynamic=True), torch.compile(_measure_in_range, dynamic=True)
    floored, differentiated = torch.compile(measure, dynamic=True), torch.compile(differentiate, dynamic=True)

    def measured(
        student: Tensor, teacher: Tensor, targets: Tensor, transforms: Transforms, wide: torch.dtype
    ) -> Measures:
        top_s, top_z, least = extremes(student, teacher, transforms, wide)
        # The log of the sum is at most log V above the largest logit. NaN compares as not in range.
        if float(least.min()) > LOG_ZERO + math.log(student.shape[1]) + 1e-3:
            return in_range(student, teacher, targets, transforms, wide, (top_s, top_z))
        return floored(student, teacher, targets, transforms, wide)

    return measured, differentiated


def elementwise_functions(
    num_logits: int, device: torch.device, precision: Precision
) -> tuple[Callable[..., Measures], Callable[..., Tensor]]:
    """Choose the implementation of `measure` and `differentiate`.

    Args:
        num_logits: Number of logits of the largest chunk.
        device: Device of the hidden states.
        precision: The dtypes of the computation. That in float64 is not compiled.

    Returns:
        The two functions.
    """
    if device.type == "cuda" and precision.wide == torch.float32 and find_spec("triton") is not None:
        from minillm.loss import triton_kernels

        return triton_kernels.measure, triton_kernels.differentiate
    if num_logits < COMPILE_FROM or precision.wide != torch.float32:
        return measure, differentiate
    return compiled()
