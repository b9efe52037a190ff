"""Heads with random weights, and what full logits in float64 say about them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minillm.data.rollouts import TeacherRows
from minillm.loss import divergences
from minillm.loss.token_scores import Divergence
from minillm.models.head import Head, TeacherStates

N, H, HP, V = 23, 8, 12, 40


def problem(dtype: torch.dtype = torch.float64, bias: bool = False, softcap: float | None = None, scale: float = 1.0):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    hidden, teacher_hidden = make(N, H).requires_grad_(), make(N, HP)
    head = Head(make(V, H).requires_grad_(), make(V).requires_grad_() if bias else None, scale, softcap)
    teacher_states = TeacherStates(teacher_hidden, Head(make(V, HP), None, 1.0, None))
    targets = torch.randint(30, (N,), generator=g)
    return hidden, head, targets, teacher_states, (make(N), make(N), make(N))


def full_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


DIVERGENCES: dict[str, Divergence] = {
    "reverse KL, by definition": divergences.reverse_kl,
    "Jensen-Shannon": partial(divergences.jensen_shannon, beta=0.3),
    "skew forward": partial(divergences.skew_forward_kl, skew=0.1),
    "skew reverse": partial(divergences.skew_reverse_kl, skew=0.1),
    "total variation": divergences.total_variation,
    "adaptive": divergences.adaptive_kl,
    "alpha-beta": partial(divergences.alpha_beta, alpha=0.2, beta=0.7),
}


def known_rows(teacher: Tensor, targets: Tensor, k: int) -> TeacherRows:
    """Return log p [N, 1+k] of the sampled token and of k others, some of which repeat it."""
    g = torch.Generator().manual_seed(1)
    others = torch.stack([torch.randperm(V, generator=g)[:k] for _ in targets])
    ids = torch.cat([targets[:, None], others], 1)
    return TeacherRows(ids, torch.log_softmax(teacher, -1).gather(1, ids))
