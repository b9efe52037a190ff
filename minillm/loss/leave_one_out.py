"""Prices of tokens, and baselines of returns, from the other responses of a batch.

A response has no part in its own. They are then independent of it, given its prompt, and do not bias the gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens

if TYPE_CHECKING:
    from jaxtyping import Float

Gather = Callable[[Any], list[Any]]
"""Returns the objects that all processes pass, in one order in all of them."""


def alone(value: Any) -> list[Any]:
    """Gather over a single process."""
    return [value]


@dataclass
class RateSums:
    """Sums of the batches before, of which every new batch forgets a part.

    Attributes:
        reverse_kl: Sum of KL_t, in nats.
        tokens: Number of tokens.
    """

    reverse_kl: float = 0.0
    tokens: float = 0.0


def offsets(
    tokens: SampledTokens,
    objective: Objective,
    prompts: Sequence[Hashable],
    before: RateSums | None = None,
    gather: Gather = alone,
) -> tuple[Float[Tensor, " responses"], RateSums]:
    """Return κ of each response: KL per token, Σ KL_t / T, of the other responses, as a ratio of sums.

    With `rate_per_prompt` they are the other responses to the same prompt; a prompt with a single response takes the
    batch's κ. With `importance: prefix` each KL_t and each token counts W_{t−1}, which makes κ that of the student
    whatever the share of the teacher was.

    Args:
        tokens: The sampled tokens of this process, with KL(q‖p).
        objective: `credit_offset`, `importance` and `offset_memory` are read.
        prompts: What tells the prompts apart, for each response.
        before: The sums of the batches before, for `offset_memory`.
        gather: Collects objects from all processes.

    Returns:
        κ in float64, in nats per token; and the sums to pass with the next batch. A response that is compared with
        nothing gets its own KL per token.
    """
    assert tokens.reverse_kl is not None
    weights = torch.ones_like(tokens.student_logprobs, dtype=torch.float64)
    if objective.importance == "prefix":
        weights = credit.prefix_weights(tokens, objective.importance_truncation)[0].double()
    columns = torch.stack([weights * tokens.reverse_kl.double(), weights])
    own = columns.new_zeros(2, len(tokens.lengths)).index_add(1, tokens.segments, columns)
    everywhere = [row for rows in gather(list(zip(prompts, *own.tolist(), strict=True))) for row in rows]
    kept, before = objective.offset_memory, before or RateSums()
    total = own.new_tensor(
        [
            kept * before.reverse_kl + sum(row[1] for row in everywhere),
            kept * before.tokens + sum(row[2] for row in everywhere),
        ]
    )
    others = total[:, None] - own
    if objective.credit_offset == "rate_per_prompt":
        of_prompt: dict[Hashable, list[float]] = {}
        for prompt, reverse_kl, count in everywhere:
            sums = of_prompt.setdefault(prompt, [0.0, 0.0])
            of_prompt[prompt] = [sums[0] + reverse_kl, sums[1] + count]
        numbers = Counter(prompt for prompt, _, _ in everywhere)
        same = own.new_tensor([of_prompt[prompt] for prompt in prompts]).t() - own
        several = torch.tensor([numbers[prompt] > 1 for prompt in prompts], device=own.device)
        others = torch.where(several, same, others)
    compared = torch.tensor(len(everywhere) > 1 or kept * before.tokens > 0, device=own.device)
    others = torch.where(compared, others, own)
    return others[0] / others[1], RateSums(*total.tolist())


def baselines_by_position(
    tokens: SampledTokens, objective: Objective, prompts: Sequence[Hashable], gather: Gather = alone
) -> Float[Tensor, " tokens"]:
    """Return the baseline of each token: the mean return of the batch's other responses at the same position.

    The n other responses that are as long are averaged together with one more, which stands for the others: at each
    position it has the mean return of all their tokens. With `prompt_position` the mean is over the n other responses
    to the same prompt, and the one more has the mean of the others at that position, whatever their prompt. So a mean
    of few is drawn towards a mean of many, and none is of nothing. A baseline depends on the other responses and on
    the position alone, and biases nothing.

    Args:
        tokens: The sampled tokens of this process, with their rewards.
        objective: Defines rewards and returns. With `length_norm`, tokens without a future are left out; with
            `credit_for: words`, end tokens.
        prompts: What tells the prompts apart, for each response.
        gather: Collects objects from all processes.

    Returns:
        The baselines in float64. With `tokens.offset` they are of returns that contain the offset of the response that
        they are for.
    """
    rewards = credit.precomputed_rewards(tokens, objective)
    assert rewards is not None
    counted = torch.ones_like(rewards, dtype=torch.float64)
    if objective.length_norm:
        counted *= credit.num_rewards(tokens, objective) > 0
    if objective.credit_for == "words" and tokens.is_end is not None:
        counted *= ~tokens.is_end
    charges = credit.returns(torch.ones_like(rewards), tokens, objective).double()
    own = (
        torch.stack([credit.returns(rewards, tokens, objective).double(), charges, torch.ones_like(counted)]) * counted
    )
    starts = tokens.lengths.cumsum(0) - tokens.lengths
    position = torch.arange(len(rewards), device=rewards.device) - starts[tokens.segments]
    everywhere = gather((own, position, tokens.lengths, list(prompts)))
    sums, positions = (torch.cat([part[i].to(own.device) for part in everywhere], -1) for i in (0, 1))
    size = int(positions.max()) + 1
    of_response = own.new_zeros(3, len(tokens.lengths)).index_add(1, tokens.segments, own)
    mean = _mean((sums.sum(1)[:, None] - of_response)[:, tokens.segments], None)
    at_position = own.new_zeros(3, size).index_add(1, positions, sums)
    mean = _mean(at_position[:, position] - own, mean)
    if objective.baseline == "prompt_position":
        names = [prompt for part in everywhere for prompt in part[3]]
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(names))}
        lengths = torch.cat([part[2].to(own.device) for part in everywhere])
        groups = torch.tensor([index[prompt] for prompt in names], device=own.device).repeat_interleave(lengths)
        mine = torch.tensor([index[prompt] for prompt in prompts], device=own.device)[tokens.segments]
        table = own.new_zeros(3, len(index) * size).index_add(1, groups * size + positions, sums)
        mean = _mean(table[:, mine * size + position] - own, mean)
    return mean[0] if tokens.offset is None else mean[0] + tokens.offset.double() * mean[1]


def _mean(sums: Float[Tensor, "3 tokens"], one_more: Float[Tensor, "2 tokens"] | None) -> Float[Tensor, "2 tokens"]:
    """Means of returns and charges from their sums and counts, with one more value of each; of nothing, 0."""
    if one_more is None:
        return sums[:2] / sums[2].clamp(min=1)
    return (sums[:2] + one_more) / (sums[2] + 1)
