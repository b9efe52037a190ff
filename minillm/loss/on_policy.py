"""The terms of the loss, as the weights that `token_scores` differentiates by.

    L = single_step · Σ_t v_t KL_t  −  long_term · Σ_t w_t min(ρ̂_t A_t, clip(ρ̂_t, 1±ε) A_t)  +  language model

divided by a token count. ρ̂ = q_θ/q_old; A, w and v come from `credit`. Where A < 0 the minimum leaves ρ̂ unbounded above:
`dual_clip` bounds it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.terms import Tally, single_step_score
from minillm.loss.token_scores import ScoreGradients, TokenScores


class OnPolicyLoss:
    """The `loss_fn` of `token_scores` for sampled responses followed, in the same flat batch, by text.

    Args:
        tokens: the sampled responses; the first N tokens of the batch.
        baseline: what `baseline: centre` subtracts from the returns, one for all or one a token [N]; see `credit.baselines`.
        count, text_count: divisors of the two kinds of token.
        slots: B × max_new_tokens, for `whiten_padded`.
        total: sum of a scalar over processes, for whitening.

    `reverse_kl` [N] holds KL(q_θ‖p) of the tokens once they are scored.
    """

    def __init__(
        self, objective: Objective, tokens: SampledTokens, *, baseline: float | Tensor = 0.0, count: float | Tensor = 1.0,
        text_count: float | Tensor = 1.0, slots: int | None = None, total: Callable[[Tensor], float] = float,
    ) -> None:  # fmt: skip
        self._objective, self._tokens = objective, tokens
        self._count, self._text_count = count, text_count
        self._n = len(tokens.student_logprobs)
        self._num_rewards = credit.num_rewards(tokens, objective)
        ones = torch.ones_like(tokens.student_logprobs)
        self._baseline = ones * baseline if objective.baseline == "centre" else torch.zeros_like(ones)
        truncation = objective.importance_truncation
        before, including = credit.prefix_weights(tokens, truncation)
        token = credit.token_weights(tokens, truncation)
        self._rho = credit.token_weights(tokens)
        kinds = {"none": ones, "token": token}
        self._weights = kinds.get(objective.importance, ones)
        self._single_weights = {**kinds, "prefix": before}[objective.single_step_weight]
        # With products, each future reward has its own: W_{k−1} for an expected reward, W_k for a sampled one.
        by_reward = before if objective.reward == "expected" else including
        self._reward_weights = by_reward if objective.importance == "prefix" else ones
        self._walk = credit.ReturnWalk(tokens.segments, objective.discount, objective.return_from)
        rewards = credit.precomputed_rewards(tokens, objective)
        self._advantages = None if rewards is None else self._known(rewards, slots, total)
        self.reverse_kl = torch.zeros_like(tokens.student_logprobs)
        self.tally = Tally()

    def __call__(self, part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        if part.stop <= self._n:
            return self._policy(part, scores)
        if part.start >= self._n:
            return self._text(scores)
        cut = self._n - part.start
        split = lambda s: TokenScores(*(None if v is None else v[s] for v in vars(scores).values()))  # pyright: ignore  # noqa: E731
        text_loss, text = self._text(split(slice(cut, None)))
        loss, policy = self._policy(slice(part.start, self._n), split(slice(cut)))
        zeros = torch.zeros_like(scores.logq)
        pairs = {name: (getattr(policy, name), getattr(text, name)) for name in vars(policy)}
        joined = {
            name: None
            if a is b is None
            else torch.cat([zeros[:cut] if a is None else a, zeros[cut:] if b is None else b])
            for name, (a, b) in pairs.items()
        }
        return loss + text_loss, ScoreGradients(**joined)

    def _policy(self, part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        objective, old = self._objective, self._tokens.student_logprobs[part]
        self.reverse_kl[part] = scores.reverse_kl
        advantages = self._future(part, scores.reverse_kl) if self._advantages is None else self._advantages[part]
        weights = self._weights[part]
        # A ratio beyond its bound is truncated, not cut off: a token far off policy still counts, as much as the bound.
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
            tokens=torch.ones_like(old), reverse_kl=scores.reverse_kl, forward_kl=scores.forward_kl, entropy=scores.entropy,
            sampled_reverse_kl=self._rho[part] * (old - self._tokens.teacher_logprobs[part]), log_ratio=(scores.logq - old).abs(),
            importance_weight=self._rho[part],
            advantage=advantages, advantage_squared=advantages.double() ** 2, clipped=~active,
            policy_loss=-(long * weights * surrogate), single_step_loss=single * exact,
        )  # fmt: skip
        if field == "divergence":
            self.tally.add(divergence=exact)
        by_logq = -long * weights * gain * active
        return loss, replace(ScoreGradients(logq=by_logq), **{field: single})

    def _text(self, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        """λ·[(1−s)·(−log q(y)) + s·KL(p‖q)] over text tokens, at the temperature of text."""
        objective = self._objective
        share = objective.language_model_distill
        scale = torch.ones_like(scores.logq) * (objective.language_model / self._text_count)
        loss = scale * ((1 - share) * -scores.text_logq + share * scores.text_forward_kl)
        self.tally.add(text_tokens=torch.ones_like(scores.logq), text_nll=-scores.text_logq, language_model_loss=loss)
        return loss.sum(), ScoreGradients(text_logq=-scale * (1 - share), text_forward_kl=scale * share)

    def _future(self, part: slice, reverse_kl: Tensor) -> Tensor:
        """Advantages from expected rewards −KL_k of tokens scored for the first time, on the walk."""
        value = self._walk(part, -reverse_kl * self._reward_weights[part])
        return self._finish(value, part, self._objective.length_norm)

    def _known(self, rewards: Tensor, slots: int | None, total: Callable[[Tensor], float]) -> Tensor:
        """Advantages from rewards that are all there beforehand."""
        objective = self._objective
        value = credit.returns(rewards * self._reward_weights, self._tokens, objective)
        if objective.baseline.startswith("whiten"):
            return credit.whiten(value, slots if objective.baseline == "whiten_padded" else None, total)
        return self._finish(value, slice(None), divide=False)

    def _finish(self, value: Tensor, part: slice, divide: bool) -> Tensor:
        num_rewards = self._num_rewards[part]
        if divide:
            value = value / num_rewards.clamp(min=1)
        centred = value - self._baseline[part]
        if self._objective.length_norm:
            # The mean of no rewards is undefined: such a token is judged by the single step alone, so that ending a
            # response is neither rewarded nor punished for having no future.
            centred = torch.where(num_rewards > 0, centred, torch.zeros_like(centred))
        return centred
