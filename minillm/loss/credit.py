"""Rewards to returns to advantages, and importance weights: what each sampled token is credited with.

Notation: q_old drew (with p, at mix α) the tokens y_1…y_T; p̃ = (1−α)·q_old + α·p; r_k = log p(y_k) − log q_old(y_k).
Everything here is per token, float, without gradient, and flat: responses one after another, [N], with lengths [B].

    exact gradient of KL(q‖p):  E_{y~p̃} Σ_t W_{t−1} ∇KL_t + Σ_t ∇log q(y_t) Σ_{k>t} W_{k−1} KL_k        (B)
    with sampled rewards:       the second sum is −Σ_t ∇log q(y_t) Σ_{k>t} W_k r_k                          (A)

W_t = ρ_1…ρ_t, ρ = q/p̃. (A) is the paper's equation 3 to 5 with the weights of every token; (B) replaces each r_k by
its expectation given the past, which cannot raise the variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO
from minillm.errors import InputError
from minillm.loss.config import Objective

_WALK = 512
_MOST = 20.0  # log of the greatest weight: with rewards, states and their squares it stays far from float32's end


@dataclass
class SampledTokens:
    """What sampling left behind, flat over the responses of a batch.

    student_logprobs: log q_old(y). behaviour_logprobs: log p̃(y), of the distribution that drew y.
    teacher_logprobs: log p(y). Each [N] float32, and none below `LOG_ZERO` (see `floor`): a token that the teacher excludes may
    have been drawn all the same. lengths: [B]. reverse_kl: KL(q_old‖p) where the token was drawn, [N]; None until the tokens have
    been scored once.
    """

    student_logprobs: Tensor
    behaviour_logprobs: Tensor
    teacher_logprobs: Tensor
    lengths: Tensor
    reverse_kl: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("student_logprobs", "behaviour_logprobs", "teacher_logprobs"):
            setattr(self, name, getattr(self, name).clamp(min=LOG_ZERO))

    def to(self, device: torch.device) -> SampledTokens:
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return SampledTokens(**moved)

    @property
    def segments(self) -> Tensor:
        """The response each token belongs to, [N]."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    @property
    def remaining(self) -> Tensor:
        """Tokens that follow each token in its response, [N]."""
        ends = torch.repeat_interleave(self.lengths.cumsum(0), self.lengths)
        return ends - 1 - torch.arange(len(ends), device=ends.device)


def sampled_rewards(tokens: SampledTokens, objective: Objective) -> Tensor:
    """r_k = log p(y_k) − log q_old(y_k), scaled, then clipped. [N]"""
    rewards = (tokens.teacher_logprobs - tokens.student_logprobs) / objective.reward_scale
    if objective.reward_clip is not None:
        rewards = rewards.clamp(-objective.reward_clip, objective.reward_clip)
    return rewards


def precomputed_rewards(tokens: SampledTokens, objective: Objective) -> Tensor | None:
    """Rewards of each token [N]; None for expected rewards −KL_k of tokens not scored yet.

    They belong to the rollout, not to the pass over it: on a later inner epoch the student's KL on these very prefixes
    has fallen by rote, and a return of today's KL against yesterday's baseline would praise every token.
    """
    if objective.reward == "sampled":
        return sampled_rewards(tokens, objective)
    return None if tokens.reverse_kl is None else -tokens.reverse_kl


def importance_weights(logs: Tensor, truncation: float | None = None) -> Tensor:
    """exp(logs), at most `truncation`, and at most e^20 in any case: two models may differ by hundreds of nats, and infinity times
    an advantage of 0 is not a number."""
    weights = logs.clamp(max=_MOST).exp()
    return weights if truncation is None else weights.clamp(max=truncation)


def token_weights(tokens: SampledTokens, truncation: float | None = None) -> Tensor:
    """ρ_t = q_old(y_t)/p̃(y_t), at most 1/(1−α). [N]"""
    return importance_weights(tokens.student_logprobs - tokens.behaviour_logprobs, truncation)


def prefix_weights(tokens: SampledTokens, truncation: float | None = None) -> tuple[Tensor, Tensor]:
    """W_{t−1} and W_t, the products of ρ before and including each token; as bounded as each factor. Each [N]."""
    logs = (tokens.student_logprobs - tokens.behaviour_logprobs).double()
    total = logs.cumsum(0)
    starts = tokens.lengths.cumsum(0) - tokens.lengths
    base = torch.repeat_interleave((total - logs)[starts.clamp(max=max(len(logs) - 1, 0))], tokens.lengths)
    before, including = (importance_weights(sums, truncation) for sums in (total - logs - base, total - base))
    return before.to(tokens.student_logprobs.dtype), including.to(tokens.student_logprobs.dtype)


class ReturnWalk:
    """Returns of responses walked from their ends, a stretch of tokens at a time.

    R_t = Σ_{k≥s} γ^{k−s} r_k over the same response, s = t+1 (`next`) or t (`current`). Because the walk starts at
    the end, rewards may be computed on the way: a token's return is complete when its stretch is.
    """

    def __init__(self, segments: Tensor, discount: float, return_from: str) -> None:
        self._segments = segments
        self._log_discount = torch.tensor(discount, dtype=torch.float64).log().item()
        self._shift = 1 if return_from == "next" else 0
        self._carry: tuple[int, Tensor] | None = None  # where the later stretch begins, and Σ_{k≥there} of its rewards

    def __call__(self, part: slice, rewards: Tensor) -> Tensor:
        """Returns [n] of the tokens in `part`, which must end where the previous part began."""
        segments = self._segments[part]
        place = torch.arange(part.start, part.stop, device=rewards.device, dtype=torch.float64)
        values = rewards.double()
        ahead = place[None, :] - place[:, None]
        same = segments[None, :] == segments[:, None]
        out = (self._decay(ahead - self._shift) * (same & (ahead >= self._shift))) @ values
        # The sum from a stretch's first token on, itself included, is what an earlier stretch needs.
        first = (self._decay(ahead[0]) * (same[0] & (ahead[0] >= 0))) @ values
        if self._carry is not None and len(segments):
            start, tail = self._carry
            joined = segments == self._segments[start]
            out = out + joined * self._decay((start - place - self._shift).clamp(min=0)) * tail
            first = first + joined[0] * self._decay(start - place[:1])[0] * tail
        self._carry = (part.start, first)
        return out.to(rewards.dtype)

    def _decay(self, steps: Tensor) -> Tensor:
        return (steps.clamp(min=0) * self._log_discount).exp()


def returns(rewards: Tensor, tokens: SampledTokens, objective: Objective) -> Tensor:
    """Returns of rewards that are all known, [N]; divided by their summands if `length_norm`."""
    walk = ReturnWalk(tokens.segments, objective.discount, objective.return_from)
    out = torch.empty_like(rewards)
    for start in range((max(len(rewards), 1) - 1) // _WALK * _WALK, -1, -_WALK):
        part = slice(start, min(start + _WALK, len(rewards)))
        out[part] = walk(part, rewards[part])
    return out / num_rewards(tokens, objective).clamp(min=1) if objective.length_norm else out


def num_rewards(tokens: SampledTokens, objective: Objective) -> Tensor:
    """How many rewards a token's return sums, [N]."""
    return tokens.remaining + (objective.return_from == "current")


def return_sum(tokens: SampledTokens, objective: Objective) -> tuple[Tensor, Tensor]:
    """Of each response, the sum of the returns that a baseline averages, and their count: those that have a summand. Each [B].

    Expected rewards of tokens not scored yet are estimated by ρ_k r_k: tokens are drawn from p̃, under which the mean of r_k is
    not −KL_k but that of ρ_k r_k is.
    """
    rewards = precomputed_rewards(tokens, objective)
    if rewards is None:
        rewards = sampled_rewards(tokens, objective) * token_weights(tokens)
    has_future = num_rewards(tokens, objective) > 0
    values = returns(rewards, tokens, objective).double() * has_future
    sums = torch.stack([values, has_future.double()])
    nothing = sums.new_zeros(2, len(tokens.lengths))
    total, count = nothing.index_add(1, tokens.segments, sums).unbind()
    return total, count


def baselines(tokens: SampledTokens, objective: Objective, total: Callable[[Tensor], float] = float) -> Tensor:
    """For each response, the mean return of a token of the others (leave-one-out, so that it biases nothing); 0 without others. [B]

    Args:
        total: sum of a scalar over processes.
    """
    sums, counts = return_sum(tokens, objective)
    others = total(counts.sum()) - counts
    return (total(sums.sum()) - sums) / others.clamp(min=1) * (others > 0)


def whiten(values: Tensor, slots: int | None = None, total: Callable[[Tensor], float] = float) -> Tensor:
    """Mean 0, spread 1, over the values of all processes.

    Args:
        slots: count as many, the missing ones as zeros (the authors' code whitens over padding).
        total: sum of a scalar over processes.
    """
    slots = len(values) if slots is None else slots
    if slots < len(values):
        raise InputError(f"{len(values)} values do not fit into {slots} slots")
    count = total(torch.tensor(float(slots)))
    mean = total(values.double().sum()) / count
    squares = ((values.double() - mean) ** 2).sum() + (slots - len(values)) * mean**2
    return (values - mean) / (total(squares) / count + 1e-8) ** 0.5
