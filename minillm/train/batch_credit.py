"""What is computed over a batch of rollouts before it is trained on: prices of tokens, and baselines of returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.leave_one_out import Gather, RateSums, alone, baselines_by_position, offsets
from minillm.loss.value import baselines_by_value, features, fit
from minillm.train.assembly import sampled_tokens


@dataclass(frozen=True)
class CreditState:
    """What one batch leaves to the next. A checkpoint holds it.

    Attributes:
        rate: sums for κ (`objective.offset_memory`).
        value: θ of the value that is fitted to the batch (`baseline: value`); empty before the first.
    """

    rate: RateSums = field(default_factory=RateSums)
    value: list[float] = field(default_factory=list)


class BatchCredit:
    """Computes κ and the baselines of each batch, over all processes.

    Args:
        objective: the loss.
        eos_ids: the tokens that end a response.
        total: the sum of a number over all processes.
        gather: the objects of all processes.

    Attributes:
        baselines: what is subtracted from the returns of each rollout of this process: one number, or one per token.
        scores_first: whether KL(q‖p) of a batch must be known before it is trained on.
        needs_entropy: whether the entropy of each token must be known too, which only the trainer computes.
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
        self.needs_entropy = objective.baseline == "value" and objective.long_term > 0
        self.end_ids = tuple(eos_ids) if objective.credit_for == "words" and objective.long_term else ()
        self.baselines: Sequence[Tensor] | Tensor = torch.zeros(0)
        self._offsets: Tensor | None = None
        self._before = self._after = CreditState()

    def lacks_scores(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether a forward of the student has to score this process's rollouts first."""
        kl, entropy = (any(getattr(r, name) is None for r in rollouts) for name in ("reverse_kl", "entropy"))
        return (self.scores_first and kl) or (self.needs_entropy and entropy)

    def start(self, rollouts: Sequence[Rollout]) -> None:
        """Compute κ and baselines of a batch; of one without rollouts, which is left out, there are none.

        Every process must call this.
        """
        objective = self._objective
        self.baselines, self._offsets, self._before = torch.zeros(len(rollouts)), None, self._after
        if not rollouts:
            return
        tokens, prompts = self._tokens(rollouts), [tuple(rollout.prompt_ids) for rollout in rollouts]
        if objective.credit_offset != "none" and objective.long_term:
            self._offsets, rate = offsets(tokens, objective, prompts, self._before.rate, self._gather)
            self._after = replace(self._after, rate=rate)
        if not credit.is_centred(objective):
            return
        tokens = self._with_offsets(tokens, slice(None))
        if objective.baseline == "centre":
            self.baselines = credit.baselines(tokens, objective, self._total).float()
        elif objective.baseline == "value":
            self.baselines = self._by_token(self._by_value(tokens, rollouts), tokens)
        else:
            self.baselines = self._by_token(baselines_by_position(tokens, objective, prompts, self._gather), tokens)

    def _by_value(self, tokens: SampledTokens, rollouts: Sequence[Rollout]) -> Tensor:
        """Baselines by the value of the batch before; this batch's value is fitted for the next one."""
        entropy = [rollout.entropy for rollout in rollouts if rollout.entropy is not None]
        phi = features(tokens, torch.cat(entropy))
        found, returns = baselines_by_value(tokens, self._objective, phi, self._before.value)
        self._after = replace(self._after, value=fit(phi, returns, self._gather))
        return found

    def tokens(self, rollouts: Sequence[Rollout], chosen: list[int]) -> tuple[SampledTokens, Tensor]:
        """The tokens of some rollouts of the batch, with their κ; and the baseline of each token.

        Args:
            rollouts: the rollouts.
            chosen: their places in the batch.
        """
        tokens = self._with_offsets(self._tokens(rollouts), chosen)
        if isinstance(self.baselines, Tensor):
            return tokens, self.baselines[chosen][tokens.segments]
        return tokens, torch.cat([self.baselines[i] for i in chosen])

    def _tokens(self, rollouts: Sequence[Rollout]) -> SampledTokens:
        tokens = sampled_tokens(rollouts)
        if self.end_ids:
            ids = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
            tokens.is_end = torch.isin(ids, torch.tensor(self.end_ids))
        return tokens

    def _with_offsets(self, tokens: SampledTokens, chosen: Any) -> SampledTokens:
        if self._offsets is None:
            return tokens
        return replace(tokens, offset=self._offsets[chosen][tokens.segments].to(tokens.student_logprobs.dtype))

    def _by_token(self, values: Tensor, tokens: SampledTokens) -> Sequence[Tensor]:
        return values.to(tokens.student_logprobs.dtype).split(tokens.lengths.tolist())

    def state(self, *, finished: bool) -> dict[str, Any]:
        """What a checkpoint needs: the state after the batch if it is finished, and else that before it."""
        state = self._after if finished else self._before
        return asdict(state)

    def load_state(self, saved: dict[str, Any]) -> None:
        """Continue from what `state` returned; an unfinished batch is then started again."""
        self._after = CreditState(RateSums(**saved.get("rate", {})), list(saved.get("value", [])))
