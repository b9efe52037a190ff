"""The loss on sampled responses, with its derivatives by the scores of `token_scores`.

    L = single_step · Σ_t v_t KL_t  −  long_term · Σ_t w_t min(ρ̂_t A_t, clip(ρ̂_t, 1±ε) A_t)  +  language model

Sums over tokens are divided by a token count. ρ̂ = q/q_old is the ratio of the student to the student that sampled. The
advantages A and the importance weights w and v come from `minillm.loss.credit`. Where A < 0 the minimum does not
limit ρ̂ from above; `dual_clip` does.

With `credit_for: words` A is 0 for end tokens, and for words the gradient is that of log[q(y_t)/(1−q(end))] with the
same factor: ρ̂ and clip remain those of q(y_t), because the word was sampled with q_old(y_t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.terms import Tally, single_step_score
from minillm.loss.token_scores import ScoreGradients, TokenScores

if TYPE_CHECKING:
    from jaxtyping import Float


class OnPolicyLoss:
    """The `loss_fn` of `token_scores` for a batch of sampled responses, followed by text in the same flat tensors.

    Args:
        objective: The loss.
        tokens: The sampled responses, which are the first N tokens of the batch.
        baseline: Subtracted from the returns if `credit.is_centred(objective)`, one value for all tokens or one per
            token [N]; see `credit.baselines`.
        count: Divisor of the sums over sampled tokens.
        text_count: Divisor of the sums over tokens of text.
        slots: Number of responses × `max_new_tokens`, for `whiten_padded`.
        total: Sums a scalar over all processes, for whitening.

    Attributes:
        reverse_kl: KL(q‖p) at each of the N sampled tokens, complete when all chunks have been scored.
        advantages: A at each of them, likewise.
        tally: Sums for the metrics, complete when all chunks have been scored.
    """

    def __init__(
        self,
        objective: Objective,
        tokens: SampledTokens,
        *,
        baseline: float | Tensor = 0.0,
        count: float | Tensor = 1.0,
        text_count: float | Tensor = 1.0,
        slots: int | None = None,
        total: Callable[[Tensor], float] = float,
    ) -> None:
        self._objective, self._tokens = objective, tokens
        self._count, self._text_count = count, text_count
        self._n = len(tokens.student_logprobs)
        self._num_rewards = credit.num_rewards(tokens, objective)
        ones = torch.ones_like(tokens.student_logprobs)
        self._baseline = ones * baseline if credit.is_centred(objective) else torch.zeros_like(ones)
        truncation = objective.importance_truncation
        before, including = credit.prefix_weights(tokens, truncation)
        token = credit.token_weights(tokens, truncation)
        self._rho = credit.token_weights(tokens)
        kinds = {"none": ones, "token": token}
        self._weights = kinds.get(objective.importance, ones)
        self._single_weights = {**kinds, "prefix": before}[objective.single_step_weight]
        # With prefix products each future reward has its own weight: W_{k−1} for an expected reward, W_k for a
        # sampled one.
        by_reward = before if objective.reward == "expected" else including
        self._reward_weights = by_reward if objective.importance == "prefix" else ones
        self._walk = credit.ReturnWalk(tokens.segments, objective.discount, objective.return_from)
        if objective.credit_for == "words" and objective.long_term and tokens.is_end is None:
            raise InputError("credit_for: words needs to know which tokens end a response (SampledTokens.is_end)")
        fixed = objective.advantage == "fixed"
        rewards = torch.zeros_like(ones) if fixed else credit.precomputed_rewards(tokens, objective)
        if rewards is None and objective.baseline.startswith("whiten"):
            raise InputError(f"baseline: {objective.baseline} needs the rewards before the tokens are scored")
        self._known_advantages = None if rewards is None else -ones if fixed else self._known(rewards, slots, total)
        self.reverse_kl, self.advantages = torch.zeros_like(ones), torch.zeros_like(ones)
        self.tally = Tally()

    def __call__(self, part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        """Return the loss of a chunk and its derivatives by the scores; see `LossFn`."""
        if part.stop <= self._n:
            return self._policy(part, scores)
        if part.start >= self._n:
            return self._text(scores)
        cut = self._n - part.start
        text_loss, text = self._text(_selected(scores, slice(cut, None)))
        loss, policy = self._policy(slice(part.start, self._n), _selected(scores, slice(cut)))
        return loss + text_loss, _joined(policy, text, torch.zeros_like(scores.logq), cut)

    def _policy(self, part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        """Return the single-step and long-term terms of a chunk of sampled tokens, and their derivatives."""
        objective, old = self._objective, self._tokens.student_logprobs[part]
        self.reverse_kl[part] = scores.reverse_kl
        advantages = self._future(part, scores) if self._known_advantages is None else self._known_advantages[part]
        weights = self._weights[part]
        words = objective.credit_for == "words" and self._tokens.is_end is not None
        if words and self._tokens.is_end is not None:
            advantages = advantages.masked_fill(self._tokens.is_end[part], 0.0)
        self.advantages[part] = advantages
        # A ratio above its limit is replaced by the limit, so that a token far off policy still counts.
        ratio = credit.importance_weights(
            scores.logq - old, objective.importance_truncation if objective.clip is None else None
        )
        if objective.weight_in_clip:
            ratio, weights = ratio * weights, torch.ones_like(weights)
        if objective.clip is not None and objective.dual_clip is not None:
            ratio = torch.where(advantages < 0, ratio.clamp(max=objective.dual_clip), ratio)
        gain = surrogate = ratio * advantages
        active = torch.ones_like(ratio, dtype=torch.bool)
        if objective.clip is not None:
            clipped = ratio.clamp(1 - objective.clip, 1 + objective.clip) * advantages
            active = gain <= clipped
            surrogate = torch.minimum(gain, clipped)
        single = objective.single_step * self._single_weights[part] / self._count
        long = objective.long_term / self._count
        field, exact = single_step_score(objective.divergence, scores)
        loss = (single * exact).sum() - (long * weights * surrogate).sum()
        self.tally.add(
            tokens=torch.ones_like(old),
            reverse_kl=scores.reverse_kl,
            forward_kl=scores.forward_kl,
            entropy=scores.entropy,
            sampled_reverse_kl=self._rho[part] * (old - scores.logp),
            log_ratio=(scores.logq - old).abs(),
            importance_weight=self._rho[part],
            advantage=advantages,
            advantage_squared=advantages.double() ** 2,
            clipped=~active,
            policy_loss=-(long * weights * surrogate),
            single_step_loss=single * exact,
        )
        if field == "divergence":
            self.tally.add(divergence=exact)
        by_logq = -long * weights * gain * active
        gradients = replace(ScoreGradients(logq=by_logq), **{field: single})
        return loss, replace(gradients, going_on=-by_logq) if words else gradients

    def _text(self, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        """Return λ·Σ[(1−s)·(−log q(y)) + s·KL(p‖q)] over tokens of text, at their temperature, and its derivatives.

        λ is `language_model` and s is `language_model_distill`.
        """
        objective = self._objective
        share = objective.language_model_distill
        scale = torch.ones_like(scores.logq) * (objective.language_model / self._text_count)
        loss = scale * ((1 - share) * -scores.text_logq + share * scores.text_forward_kl)
        self.tally.add(text_tokens=torch.ones_like(scores.logq), text_nll=-scores.text_logq, language_model_loss=loss)
        return loss.sum(), ScoreGradients(text_logq=-scale * (1 - share), text_forward_kl=scale * share)

    def _future(self, part: slice, scores: TokenScores) -> Float[Tensor, " part"]:
        """Return advantages from the rewards of a chunk of tokens that are scored for the first time."""
        rewards = -scores.reverse_kl
        if self._objective.reward == "sampled":
            rewards = credit.sampled_rewards(scores.logp, self._tokens.student_logprobs[part], self._objective)
        if self._tokens.offset is not None:
            rewards = rewards + self._tokens.offset[part]
        value = self._walk(part, rewards * self._reward_weights[part])
        return self._finish(value, part, self._objective.length_norm)

    def _known(
        self, rewards: Float[Tensor, " tokens"], slots: int | None, total: Callable[[Tensor], float]
    ) -> Float[Tensor, " tokens"]:
        """Return advantages from rewards that are all known before the tokens are scored."""
        objective = self._objective
        if self._tokens.offset is not None:
            rewards = rewards + self._tokens.offset
        value = credit.returns(rewards * self._reward_weights, self._tokens, objective)
        if objective.baseline.startswith("whiten"):
            return credit.whiten(value, slots if objective.baseline == "whiten_padded" else None, total)
        return self._finish(value, slice(None), divide=False)

    def _finish(self, value: Float[Tensor, " part"], part: slice, divide: bool) -> Float[Tensor, " part"]:
        """Return advantages from returns: centred, and divided by the number of rewards if `divide`."""
        num_rewards = self._num_rewards[part]
        if divide:
            value = value / num_rewards.clamp(min=1)
        centred = value - self._baseline[part]
        if self._objective.length_norm:
            # The mean of no rewards is undefined. Such a token has only the single-step term, so that ending a
            # response is neither rewarded nor penalised for having no tokens after it.
            centred = torch.where(num_rewards > 0, centred, torch.zeros_like(centred))
        return centred


def _selected(scores: TokenScores, part: slice) -> TokenScores:
    selected: dict[str, Any] = {name: None if value is None else value[part] for name, value in vars(scores).items()}
    return TokenScores(**selected)


def _joined(policy: ScoreGradients, text: ScoreGradients, zeros: Tensor, cut: int) -> ScoreGradients:
    """Join derivatives of a chunk whose first `cut` tokens are sampled and whose other tokens are text."""
    joined: dict[str, Tensor | None] = {}
    for field in fields(ScoreGradients):
        a, b = getattr(policy, field.name), getattr(text, field.name)
        if a is not None or b is not None:
            joined[field.name] = torch.cat([zeros[:cut] if a is None else a, zeros[cut:] if b is None else b])
    return ScoreGradients(**joined)
