"""What is computed over a batch of rollouts before it is trained on: prices of tokens, and baselines of returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.leave_one_out import Gather, RateSums, alone, offsets
from minillm.train.assembly import sampled_tokens


@dataclass
class CreditState:
    """What one batch leaves to the next. A checkpoint holds it.

    Attributes:
        rate: sums for κ (`objective.offset_memory`).
    """

    rate: RateSums


class BatchCredit:
    """Computes κ and the baselines of each batch, over all processes.

    Args:
        objective: the loss.
        eos_ids: the tokens that end a response.
        total: the sum of a number over all processes.
        gather: the objects of all processes.

    Attributes:
        baselines: what is subtracted from the returns of each rollout of this process.
        scores_first: whether KL(q‖p) of a batch must be known before it is trained on.
        end_ids: the tokens whose probability the loss needs; empty if it does not.
    """

    def __init__(
        self,
        objective: Objective,
        eos_ids: Sequence[int],
        total: Callable[[Tensor], float] = float,
        gather: Gather = alone,
    ) -> None:
        self._objective, self._total, self._gather = objective, total, gather
        self.scores_first = credit.needs_expected_rewards_first(objective)
        self.end_ids = tuple(eos_ids) if objective.credit_for == "words" and objective.long_term else ()
        self.baselines = torch.zeros(0)
        self._offsets: Tensor | None = None
        self._before = self._after = CreditState(RateSums())

    def start(self, rollouts: Sequence[Rollout]) -> None:
        """Compute κ and baselines of a batch. Every process must call this."""
        objective = self._objective
        self.baselines, self._offsets, self._before = torch.zeros(len(rollouts)), None, self._after
        tokens = sampled_tokens(rollouts)
        if objective.credit_offset != "none" and objective.long_term:
            prompts = [tuple(rollout.prompt_ids) for rollout in rollouts]
            self._offsets, rate = offsets(tokens, objective, prompts, self._before.rate, self._gather)
            self._after = CreditState(rate)
        if credit.is_centred(objective):
            tokens = self._with_offsets(tokens, slice(None))
            self.baselines = credit.baselines(tokens, objective, self._total).float()

    def tokens(self, rollouts: Sequence[Rollout], chosen: list[int]) -> tuple[SampledTokens, Tensor]:
        """The tokens of some rollouts of the batch, with their κ; and the baseline of each token.

        Args:
            rollouts: the rollouts.
            chosen: their places in the batch.
        """
        tokens = self._with_offsets(sampled_tokens(rollouts), chosen)
        if self.end_ids:
            ids = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
            tokens.is_end = torch.isin(ids, torch.tensor(self.end_ids))
        return tokens, self.baselines[chosen][tokens.segments]

    def _with_offsets(self, tokens: SampledTokens, chosen: Any) -> SampledTokens:
        if self._offsets is None:
            return tokens
        return replace(tokens, offset=self._offsets[chosen][tokens.segments].to(tokens.student_logprobs.dtype))

    def state(self, *, finished: bool) -> dict[str, Any]:
        """What a checkpoint needs: the state after the batch if it is finished, and else that before it."""
        state = self._after if finished else self._before
        return {"rate": vars(state.rate)}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Continue from what `state` returned; an unfinished batch is then started again."""
        self._after = CreditState(RateSums(**saved.get("rate", {})))
