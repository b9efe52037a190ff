"""Divergences between next-token distributions, by definition: logits [T, V] in, one value a token [T] out.

The readable reference: `token_scores` gives the same numbers without ever holding [T, V].
"""

from __future__ import annotations

import torch
from torch import Tensor


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q‖p) = Σ_v q(v) [log q(v) − log p(v)], the divergence MiniLLM minimises (arXiv 2306.08543, equation 1)."""
    return _kl(student_logits, teacher_logits, temperature)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p‖q) = Σ_v p(v) [log p(v) − log q(v)], word-level knowledge distillation."""
    return _kl(teacher_logits, student_logits, temperature)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """−Σ_v q(v) log q(v)."""
    logq = torch.log_softmax(logits / temperature, dim=-1)
    return -(logq.exp() * logq).sum(-1)


def _kl(a_logits: Tensor, b_logits: Tensor, temperature: float) -> Tensor:
    a, b = (torch.log_softmax(logits / temperature, dim=-1) for logits in (a_logits, b_logits))
    return (a.exp() * (a - b)).sum(-1)
