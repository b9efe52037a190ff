"""Divergences between next-token distributions, by definition: logits [T, V] in, one value a token [T] out.

The readable reference, differentiable by autograd in whatever dtype the logits have: `token_scores` gives the two KLs
without ever holding [T, V]. q is the student's softmax(logits / temperature), p the teacher's; no value is multiplied
by temperature². A token that either model excludes (a logit of −inf) has the log-probability `LOG_ZERO` of `floor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minillm.data.logprobs import floored_log_softmax
from minillm.errors import InputError
from minillm.loss.config import DivergenceConfig


def named(config: DivergenceConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of student's and teacher's logits that a recipe asks for."""
    return partial(globals()[config.name], **config.parameters)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q‖p) = Σ_v q(v) [log q(v) − log p(v)], the divergence MiniLLM minimises (arXiv 2306.08543, equation 1)."""
    q, p = _logs(student_logits, teacher_logits, temperature)
    return _kl(q, p)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p‖q) = Σ_v p(v) [log p(v) − log q(v)], word-level knowledge distillation."""
    q, p = _logs(student_logits, teacher_logits, temperature)
    return _kl(p, q)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """β·KL(p‖m) + (1−β)·KL(q‖m), m = β·p + (1−β)·q, 0 < β < 1 (GKD, arXiv 2306.13649).

    Divided by β it tends to the forward KL as β → 0, divided by 1−β to the reverse KL as β → 1; at either end itself
    it is 0, so those are refused.
    """
    _inside("beta", beta)
    q, p = _logs(student_logits, teacher_logits, temperature)
    m = _mix(p, q, beta)
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(p ‖ λ·p + (1−λ)·q), 0 ≤ λ < 1 (DistiLLM, arXiv 2402.03898); λ = 0 is the forward KL."""
    _inside("skew", skew, low_included=True)
    q, p = _logs(student_logits, teacher_logits, temperature)
    return _kl(p, _mix(p, q, skew))


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(q ‖ λ·q + (1−λ)·p), 0 ≤ λ < 1 (DistiLLM, arXiv 2402.03898); λ = 0 is the reverse KL."""
    _inside("skew", skew, low_included=True)
    q, p = _logs(student_logits, teacher_logits, temperature)
    return _kl(q, _mix(q, p, skew))


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """½ Σ_v |q(v) − p(v)|, between 0 and 1 (f-distill, arXiv 2307.15190)."""
    q, p = _logs(student_logits, teacher_logits, temperature)
    return (q.exp() - p.exp()).abs().sum(-1) / 2


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, head_mass: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """w·KL(p‖q) + (1−w)·KL(q‖p), w the share of Σ|p − q| that lies in the teacher's head (AKL, arXiv 2404.02657).

    The head is the fewest tokens that hold `head_mass` of p, 0 < head_mass < 1; the weight w is not differentiated.
    """
    _inside("head_mass", head_mass)
    q, p = _logs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        teacher, order = p.exp().sort(-1, descending=True)
        gap = (teacher - q.exp().gather(-1, order)).abs()
        in_head = teacher.cumsum(-1) - teacher < head_mass  # the token that reaches the mass belongs to it
        total = gap.sum(-1)
        # Where the two agree there is nothing to weigh, and both divergences are 0.
        weight = torch.where(total > 0, (gap * in_head).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    return weight * _kl(p, q) + (1 - weight) * _kl(q, p)


def alpha_beta(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.2, beta: float = 0.7, temperature: float = 1.0
) -> Tensor:
    """The α–β divergence of p and q (ABKD, arXiv 2505.04560; Cichocki and others, 2011).

        −1/(αβ) Σ_v [ p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β) ]

    and its limits where α, β or α+β is 0; α = 1, β = 0 is the forward KL, α = 0, β = 1 the reverse KL. A power is at most e^60,
    which only negative ones of a token that a model all but excludes can exceed.
    """
    q, p = _logs(student_logits, teacher_logits, temperature)
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


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """−Σ_v q(v) log q(v)."""
    logq = floored_log_softmax(logits / temperature)
    return -(logq.exp() * logq).sum(-1)


def _logs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature <= 0:
        raise InputError(f"temperature must be above 0, not {temperature}")
    q, p = (floored_log_softmax(logits / temperature) for logits in (student_logits, teacher_logits))
    return q, p


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def _power(logs: Tensor) -> Tensor:
    return logs.clamp(max=60.0).exp()


def _mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    """log(share·A + (1−share)·B) from logarithms."""
    if share == 0:
        return b
    return torch.logaddexp(a + math.log(share), b + math.log1p(-share))


def _inside(name: str, value: float, low_included: bool = False) -> None:
    if not (0 < value < 1 or (low_included and value == 0)):
        raise InputError(f"{name} must be {'at least' if low_included else 'above'} 0 and below 1, not {value}")
