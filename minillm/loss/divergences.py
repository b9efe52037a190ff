"""Divergences between next-token distributions, written as their definitions.

Every function takes the logits [tokens, vocab] of student and teacher, and returns one value per token [tokens], in
nats. Autograd differentiates it, in the dtype of the logits (16-bit logits are converted to float32). q is the
student's softmax(logits / temperature) and p the teacher's; no value is multiplied by temperature². A token that
either model excludes (a logit of −∞) has the log-probability `LOG_ZERO`, see `minillm.data.logprobs`. `token_scores`
computes the two KL divergences without these functions, and uses them for the others, one chunk of tokens at a time.

To add a divergence, write its function here with the decorator `register`, and add its name to
`DIVERGENCE_PARAMETERS` in `minillm/loss/config.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from minillm.data.logprobs import floored_log_softmax, mixture_logprobs
from minillm.errors import InputError
from minillm.loss.config import BY_WEIGHTS, DIVERGENCE_PARAMETERS, DivergenceConfig

if TYPE_CHECKING:
    from jaxtyping import Float

    Logits = Float[Tensor, "tokens vocab"]
    PerToken = Float[Tensor, " tokens"]

_Function = TypeVar("_Function", bound=Callable[..., Tensor])

DIVERGENCES: dict[str, Callable[..., Tensor]] = {}
"""The function of every divergence that a recipe can name."""


def register(function: _Function) -> _Function:
    """Add a divergence to `DIVERGENCES` under the function's name.

    Raises:
        TypeError: The parameters after the two logits, without `temperature`, are not those in `DIVERGENCE_PARAMETERS`.
    """
    name = function.__name__
    _, _, *parameters = inspect.signature(function).parameters
    parameters = tuple(parameter for parameter in parameters if parameter != "temperature")
    if DIVERGENCE_PARAMETERS.get(name) != parameters:
        raise TypeError(f"DIVERGENCE_PARAMETERS in minillm/loss/config.py needs the entry {name!r}: {parameters}")
    DIVERGENCES[name] = function
    return function


def divergence_function(config: DivergenceConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the divergence that a recipe names, with its parameters, as a function of the two logits."""
    return partial(DIVERGENCES[config.name], **config.parameters)


@register
def reverse_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    temperature: float = 1.0,
) -> PerToken:
    """Return KL(q‖p) = Σ_v q(v) [log q(v) − log p(v)], which MiniLLM minimises (arXiv 2306.08543, equation 1)."""
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(q, p)


@register
def forward_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    temperature: float = 1.0,
) -> PerToken:
    """Return KL(p‖q) = Σ_v p(v) [log p(v) − log q(v)], used in word-level knowledge distillation."""
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(p, q)


@register
def jensen_shannon(
    student_logits: Logits,
    teacher_logits: Logits,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> PerToken:
    """Return β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q (GKD, arXiv 2306.13649).

    As β → 0 the value divided by β approaches the forward KL, and as β → 1 the value divided by 1−β approaches the
    reverse KL. At 0 and at 1 the value itself is 0 everywhere, so these two are not allowed.

    Args:
        student_logits: Logits of the student.
        teacher_logits: Logits of the teacher.
        beta: β, above 0 and below 1.
        temperature: Divides both logits.

    Raises:
        InputError: `beta` is not in its range.
    """
    _check_unit_interval("beta", beta)
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    m = mixture_logprobs(q, p, beta)
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


@register
def skew_forward_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    skew: float = 0.1,
    temperature: float = 1.0,
) -> PerToken:
    """Return KL(p ‖ λ·p + (1−λ)·q) (DistiLLM, arXiv 2402.03898).

    Args:
        student_logits: Logits of the student.
        teacher_logits: Logits of the teacher.
        skew: λ, at least 0 and below 1. 0 gives the forward KL.
        temperature: Divides both logits.

    Raises:
        InputError: `skew` is not in its range.
    """
    _check_unit_interval("skew", skew, low_included=True)
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(p, mixture_logprobs(q, p, skew))


@register
def skew_reverse_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    skew: float = 0.1,
    temperature: float = 1.0,
) -> PerToken:
    """Return KL(q ‖ λ·q + (1−λ)·p) (DistiLLM, arXiv 2402.03898).

    Args:
        student_logits: Logits of the student.
        teacher_logits: Logits of the teacher.
        skew: λ, at least 0 and below 1. 0 gives the reverse KL.
        temperature: Divides both logits.

    Raises:
        InputError: `skew` is not in its range.
    """
    _check_unit_interval("skew", skew, low_included=True)
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(q, mixture_logprobs(p, q, skew))


@register
def total_variation(
    student_logits: Logits,
    teacher_logits: Logits,
    temperature: float = 1.0,
) -> PerToken:
    """Return the total variation distance ½ Σ_v |q(v) − p(v)|, from 0 to 1 (f-distill, arXiv 2307.15190)."""
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return (q.exp() - p.exp()).abs().sum(-1) / 2


@register
def adaptive_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    head_mass: float = 0.5,
    temperature: float = 1.0,
) -> PerToken:
    """Return w·KL(p‖q) + (1−w)·KL(q‖p) with a weight w for each token (AKL, arXiv 2404.02657).

    The head of p is the smallest set of most likely tokens whose probability reaches `head_mass`. w is the share of
    Σ_v |p(v) − q(v)| that lies in the head. It is a constant for the gradient.

    Args:
        student_logits: Logits of the student.
        teacher_logits: Logits of the teacher.
        head_mass: Probability of the head, above 0 and below 1.
        temperature: Divides both logits.

    Raises:
        InputError: `head_mass` is not in its range.
    """
    _check_unit_interval("head_mass", head_mass)
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        teacher, order = p.exp().sort(-1, descending=True)
        gap = (teacher - q.exp().gather(-1, order)).abs()
        in_head = teacher.cumsum(-1) - teacher < head_mass  # includes the token with which the mass is reached
        total = gap.sum(-1)
        # Where the two distributions are equal both divergences are 0, and the weight does not matter.
        weight = torch.where(total > 0, (gap * in_head).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    return weight * _kl(p, q) + (1 - weight) * _kl(q, p)


@register
def alpha_beta(
    student_logits: Logits,
    teacher_logits: Logits,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
) -> PerToken:
    """Return the α–β divergence of p and q (ABKD, arXiv 2505.04560; Cichocki and others, 2011).

        −1/(αβ) Σ_v [ p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β) ]

    Where α, β or α+β is 0 it is the limit of this expression. α = 1, β = 0 gives the forward KL, and α = 0, β = 1 the
    reverse KL. Powers are limited to e^60. Only negative powers of the probability of a token that a model practically
    excludes would be larger.

    Args:
        student_logits: Logits of the student.
        teacher_logits: Logits of the teacher.
        alpha: α, any number.
        beta: β, any number.
        temperature: Divides both logits.
    """
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    total = alpha + beta
    if math.isclose(alpha, 0.0, abs_tol=1e-12) and math.isclose(beta, 0.0, abs_tol=1e-12):
        return ((p - q) ** 2).sum(-1) / 2
    if math.isclose(alpha, 0.0, abs_tol=1e-12):
        pb, qb = _power(beta * p), _power(beta * q)
        return (qb * beta * (q - p) - qb + pb).sum(-1) / beta**2
    if math.isclose(beta, 0.0, abs_tol=1e-12):
        pa, qa = _power(alpha * p), _power(alpha * q)
        return (pa * alpha * (p - q) - pa + qa).sum(-1) / alpha**2
    if math.isclose(total, 0.0, abs_tol=1e-12):
        ratio = alpha * (q - p)
        return (ratio + _power(-ratio) - 1).sum(-1) / alpha**2
    cross = _power(alpha * p + beta * q)
    own = (alpha * _power(total * p) + beta * _power(total * q)) / total
    return -(cross - own).sum(-1) / (alpha * beta)


@register
def mse(
    student_logits: Logits,
    teacher_logits: Logits,
    temperature: float = 1.0,
) -> PerToken:
    """Return Σ_v [q(v) − p(v)]², the squared error of probabilities (arXiv 2410.16215 has an MSE among its losses).

    It is not divided by the size of the vocabulary. Its gradient is linear in p.
    """
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return (q.exp() - p.exp()).square().sum(-1)


@register
def logit_mse(
    student_logits: Logits,
    teacher_logits: Logits,
    temperature: float = 1.0,
) -> PerToken:
    """Return 1/V Σ_v [s(v) − z(v)]² of logits of mean 0, divided by the temperature (Hinton and others, 2015).

    A constant that is added to all logits of a model changes no probability, so it does not count here either. A token
    that a model excludes has the logit of the probability e^−80.
    """
    s, z = (logs - logs.mean(-1, keepdim=True) for logs in _log_probs(student_logits, teacher_logits, temperature))
    return (s - z).square().mean(-1)


def gradient_is_linear_in_p(divergence: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Return whether a function of `divergence_function` has a gradient that is linear in p."""
    return any(getattr(divergence, "func", divergence) is DIVERGENCES[name] for name in BY_WEIGHTS)


def entropy(logits: Float[Tensor, "tokens vocab"], temperature: float = 1.0) -> PerToken:
    """Return the entropy −Σ_v q(v) log q(v), in nats."""
    logq = floored_log_softmax(logits / temperature)
    return -(logq.exp() * logq).sum(-1)


def _log_probs(
    student_logits: Float[Tensor, "tokens vocab"], teacher_logits: Float[Tensor, "tokens vocab"], temperature: float
) -> tuple[Logits, Logits]:
    if temperature <= 0:
        raise InputError(f"temperature must be above 0, not {temperature}")
    q, p = (floored_log_softmax(logits / temperature) for logits in (student_logits, teacher_logits))
    return q, p


def _kl(a: Logits, b: Logits) -> PerToken:
    return (a.exp() * (a - b)).sum(-1)


def _power(logs: Logits) -> Logits:
    return logs.clamp(max=60.0).exp()


def _check_unit_interval(name: str, value: float, low_included: bool = False) -> None:
    if not (0 < value < 1 or (low_included and value == 0)):
        raise InputError(f"{name} must be {'at least' if low_included else 'above'} 0 and below 1, not {value}")
