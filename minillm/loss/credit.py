"""Credit of sampled tokens: rewards, returns, advantages and importance weights.

q_old is the student that sampled the responses y_1 … y_T, p the teacher, and α the share of the teacher in the mixture
p̃ = (1−α)·q_old + α·p that the tokens were sampled from. The reward is r_k = log p(y_k) − log q_old(y_k). KL_t is the
reverse KL(q‖p) of the next-token distributions at token t. Then, with expected rewards −KL_k,

    exact gradient of KL(q‖p):  E_{y~p̃} Σ_t W_{t−1} ∇KL_t + Σ_t ∇log q(y_t) Σ_{k>t} W_{k−1} KL_k        (B)

and with sampled rewards r_k the second sum is

                                −Σ_t ∇log q(y_t) Σ_{k>t} W_k r_k                                         (A)

where W_t = ρ_1…ρ_t and ρ = q/p̃. (A) is equations 3 to 5 of the paper with an importance weight for every token. (B)
replaces each r_k by its expectation given the tokens before it, which cannot increase the variance.

The sum Σ KL_t praises every early end. KL per token, J₂ = E[Σ_t KL_t] / E[T], does not. With κ = J₂ without gradient,

    E[T] · ∇J₂ = E_{y~q} Σ_t ∇KL_t + Σ_t ∇log q(y_t) Σ_{k>t} (KL_k − κ)                                  (C)

is the gradient of E[Σ_t KL_t] − κ·E[T], in which every future token is charged its average price (the policy gradient
of the average reward; `credit_offset: rate`). E[T] is the token count that the loss is divided by. With a κ of each
prompt x (`rate_per_prompt`),

    E_x E_{y|x} Σ_t ∇KL_t + Σ_t ∇log q(y_t) Σ_{k>t} (KL_k − κ_x) = E_x E[T|x] · ∇J₂(x)                   (D)

which lowers the KL per token of every prompt by itself: none gets shorter because another one is easier. Both hold for
y ~ q, and for y ~ p̃ with the weights W_{k−1} of (B) (`importance: prefix`).

`credit_for: words` leaves the choice to end to the single step. Let h_t = q(end|y_<t) be the probability of all end
tokens together, and q(y_t) = (1−h_t) · w(y_t) for every other token, a word. With h fixed in the distribution of
responses, though not in KL_t, the gradient of the same objective by θ is, with sums over words y_t,

    E_{y~q} Σ_t ∇KL_t + Σ_{t: y_t a word} ∇log[q(y_t)/(1−h_t)] Σ_{k>t} (KL_k − κ)                        (E)

A `discount` below 1 takes the later terms of each inner sum for less, which is the gradient of no objective.

All values are per token, floating point and without gradient. They are stored flat: one tensor of N tokens holds all
responses of a batch, one after another, and `lengths` has the length of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO
from minillm.errors import InputError
from minillm.loss.config import Objective

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_WALK = 128  # tokens that `returns` handles at a time, at a cost of the square of it
# Logarithm of the largest importance weight. Products of such a weight with rewards and hidden states, and the
# squares of those, are far below the largest float32.
_MAX_LOG_WEIGHT = 20.0


@dataclass
class SampledTokens:
    """The sampled tokens of a batch of responses, with log-probabilities from the time of sampling.

    Log-probabilities below `LOG_ZERO` are raised to it, because a token that the teacher excludes may have been
    sampled.

    Attributes:
        student_logprobs: log q_old(y), float32.
        behaviour_logprobs: log p̃(y), of the distribution that y was sampled from, float32.
        teacher_logprobs: log p(y), float32. None if they are not known before the tokens are scored; only rewards that
            a batch is centred or whitened by need them earlier.
        lengths: Number of tokens of each response.
        reverse_kl: KL(q_old‖p) of the next-token distributions at each token. None until the tokens have been scored
            once.
        offset: κ of the response that each token belongs to, in nats per token; added to every reward. None: nothing.
        is_end: Whether a token is an end token, which can only be the last of a response. None where nobody asks.
    """

    student_logprobs: Float[Tensor, " tokens"]
    behaviour_logprobs: Float[Tensor, " tokens"]
    teacher_logprobs: Float[Tensor, " tokens"] | None
    lengths: Int[Tensor, " responses"]
    reverse_kl: Float[Tensor, " tokens"] | None = None
    offset: Float[Tensor, " tokens"] | None = None
    is_end: Bool[Tensor, " tokens"] | None = None

    def __post_init__(self) -> None:
        for name in ("student_logprobs", "behaviour_logprobs", "teacher_logprobs"):
            if (logs := getattr(self, name)) is not None:
                setattr(self, name, logs.clamp(min=LOG_ZERO))

    def to(self, device: torch.device) -> SampledTokens:
        """Return a copy with all tensors on a device."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return SampledTokens(**moved)

    @property
    def segments(self) -> Int[Tensor, " tokens"]:
        """Index of the response that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    @property
    def remaining(self) -> Int[Tensor, " tokens"]:
        """Number of tokens after each token in its response."""
        ends = torch.repeat_interleave(self.lengths.cumsum(0), self.lengths)
        return ends - 1 - torch.arange(len(ends), device=ends.device)


def sampled_rewards(
    logp: Float[Tensor, " tokens"], old_logq: Float[Tensor, " tokens"], objective: Objective
) -> Float[Tensor, " tokens"]:
    """Return the rewards r_k = log p(y_k) − log q_old(y_k), scaled and then clipped as the objective says."""
    rewards = (logp - old_logq) / objective.reward_scale
    if objective.reward_clip is not None:
        rewards = rewards.clamp(-objective.reward_clip, objective.reward_clip)
    return rewards


def precomputed_rewards(tokens: SampledTokens, objective: Objective) -> Float[Tensor, " tokens"] | None:
    """Return the rewards that are known before the tokens are scored.

    Rewards belong to the rollout and stay the same in later inner epochs. By then the student has trained on these very
    prefixes and its KL on them is lower. A return of the current KL, compared with a baseline of the earlier KL, would
    give every token a positive advantage.

    Returns:
        The rewards. None if they depend on scores, −KL_k or log p(y_k), that the tokens do not have yet.
    """
    if objective.reward == "sampled":
        logp = tokens.teacher_logprobs
        return None if logp is None else sampled_rewards(logp, tokens.student_logprobs, objective)
    return None if tokens.reverse_kl is None else -tokens.reverse_kl


def is_centred(objective: Objective) -> bool:
    """Whether a baseline is subtracted that depends on the returns of a whole batch."""
    return objective.baseline not in ("none", "whiten", "whiten_padded") and objective.long_term > 0


def needs_sampled_rewards_first(objective: Objective) -> bool:
    """Whether sampled rewards, and with them log p(y), must be known for a batch before its tokens are scored."""
    return objective.reward == "sampled" and (is_centred(objective) or objective.baseline.startswith("whiten"))


def needs_expected_rewards_first(objective: Objective) -> bool:
    """Whether expected rewards, −KL(q‖p), must be known for a batch before its tokens are scored for the loss."""
    compared = is_centred(objective) or (objective.credit_offset != "none" and objective.long_term > 0)
    return objective.reward == "expected" and compared


def importance_weights(logs: Float[Tensor, " tokens"], truncation: float | None = None) -> Float[Tensor, " tokens"]:
    """Return exp(logs), limited from above.

    Args:
        logs: Logarithms of the weights.
        truncation: Upper limit of a weight. A weight is at most e^20 in any case: two models may differ by hundreds
            of nats, and infinity times an advantage of 0 is not a number.
    """
    weights = logs.clamp(max=_MAX_LOG_WEIGHT).exp()
    return weights if truncation is None else weights.clamp(max=truncation)


def token_weights(tokens: SampledTokens, truncation: float | None = None) -> Float[Tensor, " tokens"]:
    """Return ρ_t = q_old(y_t)/p̃(y_t), which is at most 1/(1−α), limited by `truncation`."""
    return importance_weights(tokens.student_logprobs - tokens.behaviour_logprobs, truncation)


def prefix_weights(
    tokens: SampledTokens, truncation: float | None = None
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return W_{t−1} and W_t, the products of ρ over the tokens before t and up to t, each limited by `truncation`."""
    logs = (tokens.student_logprobs - tokens.behaviour_logprobs).double()
    total = logs.cumsum(0)
    starts = tokens.lengths.cumsum(0) - tokens.lengths
    base = torch.repeat_interleave((total - logs)[starts.clamp(max=max(len(logs) - 1, 0))], tokens.lengths)
    before, including = (importance_weights(sums, truncation) for sums in (total - logs - base, total - base))
    return before.to(tokens.student_logprobs.dtype), including.to(tokens.student_logprobs.dtype)


class ReturnWalk:
    """Computes returns part by part, from the last tokens of a batch to the first.

    The return of token t is R_t = Σ_{k≥s} γ^{k−s} r_k over the tokens of its response, with s = t+1 (`next`) or s = t
    (`current`). Because the parts come from the end, the rewards of a part need to be known only when the part is
    given.

    Args:
        segments: Index of the response that each token belongs to.
        discount: γ.
        return_from: "next" or "current".
    """

    def __init__(self, segments: Int[Tensor, " tokens"], discount: float, return_from: str) -> None:
        self._segments = segments
        self._log_discount = torch.tensor(discount, dtype=torch.float64).log().item()
        self._shift = 1 if return_from == "next" else 0
        # First token of the previous part, and the discounted sum of rewards from it to the end of its response.
        self._carry: tuple[int, Tensor] | None = None

    def __call__(self, part: slice, rewards: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
        """Return the returns of one part.

        Args:
            part: Positions of the tokens. The part must end where the previous one began.
            rewards: Rewards of these tokens.
        """
        segments = self._segments[part]
        position = torch.arange(part.start, part.stop, device=rewards.device, dtype=torch.float64)
        values = rewards.double()
        ahead = position[None, :] - position[:, None]
        same = segments[None, :] == segments[:, None]
        out = (self._decay(ahead - self._shift) * (same & (ahead >= self._shift))) @ values
        # The earlier part needs the sum from the first token of this part on, including that token.
        first = (self._decay(ahead[0]) * (same[0] & (ahead[0] >= 0))) @ values
        if self._carry is not None and len(segments):
            start, tail = self._carry
            joined = segments == self._segments[start]
            out = out + joined * self._decay((start - position - self._shift).clamp(min=0)) * tail
            first = first + joined[0] * self._decay(start - position[:1])[0] * tail
        self._carry = (part.start, first)
        return out.to(rewards.dtype)

    def _decay(self, steps: Tensor) -> Tensor:
        return (steps.clamp(min=0) * self._log_discount).exp()


def returns(rewards: Float[Tensor, " tokens"], tokens: SampledTokens, objective: Objective) -> Float[Tensor, " tokens"]:
    """Return the returns of rewards that are all known. With `length_norm` each is divided by its number of rewards."""
    walk = ReturnWalk(tokens.segments, objective.discount, objective.return_from)
    out = torch.empty_like(rewards)
    for start in range((max(len(rewards), 1) - 1) // _WALK * _WALK, -1, -_WALK):
        part = slice(start, min(start + _WALK, len(rewards)))
        out[part] = walk(part, rewards[part])
    return out / num_rewards(tokens, objective).clamp(min=1) if objective.length_norm else out


def num_rewards(tokens: SampledTokens, objective: Objective) -> Int[Tensor, " tokens"]:
    """Return the number of rewards in the return of each token."""
    return tokens.remaining + (objective.return_from == "current")


def return_sum(
    tokens: SampledTokens, objective: Objective, rewards: Float[Tensor, " tokens"] | None = None
) -> tuple[Float[Tensor, " responses"], Float[Tensor, " responses"]]:
    """Return the sum and the number of the returns of each response that a baseline averages, in float64.

    Returns that contain no reward, such as that of a last token, are not counted. Expected rewards of tokens that
    have not been scored yet are estimated by ρ_k r_k: the tokens are sampled from p̃, and the mean of ρ_k r_k under
    p̃ is −KL_k, while that of r_k is not.

    Args:
        tokens: The sampled tokens.
        objective: Defines rewards and returns.
        rewards: Other rewards, in place of those of the objective.
    """
    rewards = precomputed_rewards(tokens, objective) if rewards is None else rewards
    if rewards is None:
        if tokens.teacher_logprobs is None:
            raise InputError("a baseline of returns needs log p(y) or KL(q‖p) of the tokens, and neither is known")
        sampled = sampled_rewards(tokens.teacher_logprobs, tokens.student_logprobs, objective)
        rewards = sampled * token_weights(tokens)
    has_future = num_rewards(tokens, objective) > 0
    values = returns(rewards, tokens, objective).double() * has_future
    sums = torch.stack([values, has_future.double()])
    zeros = sums.new_zeros(2, len(tokens.lengths))
    total, count = zeros.index_add(1, tokens.segments, sums).unbind()
    return total, count


def baselines(
    tokens: SampledTokens, objective: Objective, total: Callable[[Tensor], float] = float
) -> Float[Tensor, " responses"]:
    """Return the baseline of each response: the mean return per token of the other responses.

    A response is left out of its own baseline (leave-one-out), so that the baseline does not bias the gradient.

    Args:
        tokens: The sampled tokens of this process.
        objective: Defines rewards and returns.
        total: Sums a scalar over all processes.

    Returns:
        The baselines in float64; 0 for a response without others. With `tokens.offset` they are of returns that
        contain the offset of the response that they are for, which that response has no part in either.
    """
    sums, counts = return_sum(tokens, objective)
    others = total(counts.sum()) - counts
    means = (total(sums.sum()) - sums) / others.clamp(min=1) * (others > 0)
    if tokens.offset is None:
        return means
    sums, _ = return_sum(tokens, objective, torch.ones_like(tokens.student_logprobs))
    charges = (total(sums.sum()) - sums) / others.clamp(min=1) * (others > 0)
    return means + charges * tokens.offset[tokens.lengths.cumsum(0) - 1].double()


def whiten(
    values: Float[Tensor, " tokens"], slots: int | None = None, total: Callable[[Tensor], float] = float
) -> Float[Tensor, " tokens"]:
    """Normalise values to mean 0 and standard deviation 1 over all processes.

    Args:
        values: The values of this process.
        slots: Number of values to assume; the missing ones count as zeros. LMOps normalises over padding in this way.
            By default the number of values.
        total: Sums a scalar over all processes.

    Raises:
        InputError: There are more values than `slots`.
    """
    slots = len(values) if slots is None else slots
    if slots < len(values):
        raise InputError(f"{len(values)} values do not fit into {slots} slots")
    count = total(torch.tensor(float(slots)))
    mean = total(values.double().sum()) / count
    squares = ((values.double() - mean) ** 2).sum() + (slots - len(values)) * mean**2
    return (values - mean) / (total(squares) / count + 1e-8) ** 0.5
