"""Settings of the loss: the divergence of a single token, and the objective of on-policy training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from minillm.config import Section, Share
from minillm.errors import InputError
from minillm.loss.presets import PRESETS

DIVERGENCE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "forward_kl": (),
    "reverse_kl": (),
    "jensen_shannon": ("beta",),
    "skew_forward_kl": ("skew",),
    "skew_reverse_kl": ("skew",),
    "total_variation": (),
    "adaptive_kl": ("head_mass",),
    "alpha_beta": ("alpha", "beta"),
    "mse": (),
    "logit_mse": (),
}
"""Name of every divergence and names of its parameters.

`minillm.loss.divergences` registers one function for each, and checks its signature against this table. Recipes are
read without importing torch, so the names cannot be taken from there. A divergence with a new parameter also needs a
field of `DivergenceConfig`, which documents that parameter.
"""

BY_WEIGHTS = ("forward_kl", "mse")
"""Divergences whose gradient is linear in p, so that an unbiased estimate of p gives an unbiased gradient."""
NOT_LINEAR = (
    "weights of a few tokens are an estimate of p that is unbiased only in what is linear in p: the gradients of the "
    f"cross-entropy, of {' and of '.join(BY_WEIGHTS)}. For any other divergence take the live teacher"
)
"""Why a store gives no other divergence."""


class DivergenceConfig(Section):
    """A divergence between the student's distribution q and the teacher's distribution p of the next token.

    In a recipe a name alone is enough if the defaults of the parameters are wanted. `minillm.loss.divergences` has the
    definitions and the defaults.
    """

    # The unpacked names are a static Literal for pydantic, whose messages list them, but not for pyright.
    name: Literal[*DIVERGENCE_PARAMETERS]  # pyright: ignore[reportInvalidTypeForm]
    """Name of the divergence."""
    alpha: float | None = None
    """α of `alpha_beta`, the exponent of p. Default 0.2."""
    beta: float | None = None
    """For `jensen_shannon`, β of GKD, between 0 and 1: small values come close to the forward KL, large ones to the
    reverse KL; default 0.5. For `alpha_beta`, the exponent of q; default 0.7."""
    skew: float | None = None
    """λ of `skew_forward_kl` and `skew_reverse_kl`, at least 0 and below 1: the share of the KL's first distribution
    that is mixed into its second. 0 gives the plain KL. Default 0.1, as in DistiLLM."""
    head_mass: float | None = None
    """For `adaptive_kl`, the probability, between 0 and 1, that the most likely tokens of p must reach together to
    count as its head. Default 0.5."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check_parameters(self) -> DivergenceConfig:
        allowed = set(DIVERGENCE_PARAMETERS[self.name])
        if unknown := set(self.parameters) - allowed:
            raise InputError(
                f"{self.name} takes {' and '.join(sorted(allowed)) or 'no parameter'}, not {', '.join(sorted(unknown))}"
            )
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters that were given, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
        return {name: value for name, value in values.items() if value is not None}


class Objective(Section):
    """The loss that on-policy training minimises. Choose a preset, then set the fields that should differ from it.

    The loss is a sum over tokens of three terms:

    - the single-step term, a divergence between the next-token distributions of student and teacher at each token;
    - the long-term term, a policy gradient that credits each token with the rewards of the tokens after it;
    - the language-model term, on ordinary text, if there is any.

    The docstring of `minillm.loss.credit` has the equations (A) and (B). q is the student, q_old the student that
    sampled the responses, p the teacher. p̃ is the distribution that the tokens were really sampled from, which with
    `rollout.teacher_mix` is a mixture of q_old and p. A response y has tokens y_1 … y_T, and
    ρ_t = q_old(y_t)/p̃(y_t).
    """

    # The unpacked names are a static Literal for pydantic, whose messages list them, but not for pyright.
    preset: Literal[*PRESETS] = "recommended"  # pyright: ignore[reportInvalidTypeForm]
    """Values that the other fields start from. `recommended`: expected rewards, centred; `recommended-2026-11` is what
    that meant in November 2026. `paper`: equations 5 to 8 of arXiv 2306.08543. `reference`: what the LMOps code
    computes. `exact`: the unbiased gradient of KL(q‖p). `rate`: that of KL per token. `words`: the same with the
    probabilities of ending left to the single step. `fixed_advantage`: a control that reads no teacher, with one
    negative advantage for all tokens (asked for by arXiv 2608.31046)."""
    reward: Literal["sampled", "expected"] = "expected"
    """Reward r_k of a token. `sampled`: log p(y_k) − log q_old(y_k). `expected`: its expectation −KL_k, the negative
    reverse KL at that token. It is computed when a response is first trained on, and kept for later epochs over the
    same response."""
    reward_scale: Annotated[float, Field(gt=0)] = 1.0
    """Divides sampled rewards (LMOps: 0.5). It changes the size of the long-term term only, relative to the others."""
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    """Limits sampled rewards to ± this value after scaling (LMOps: 100), so that one token to which the teacher gives
    almost no probability cannot outweigh all others. null: no limit."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """γ in the return R_t = Σ_k γ^(k−s) r_k over the tokens k ≥ s (see `return_from`). 1, as in the paper, gives the
    gradient of the KL. Smaller values reduce variance and add bias (LMOps: 0.95)."""
    return_from: Literal["next", "current"] = "next"
    """First reward in a token's return. `next`: s = t+1, as in the paper, where the single-step term contains the
    immediate reward. `current`: s = t, as in LMOps."""
    credit_offset: Literal["none", "rate", "rate_per_prompt"] = "none"
    """What every future token costs, added to its reward. `none`: nothing; the sum of KL then praises every early end.
    `rate`: κ, the mean KL per token of the batch's other responses; the gradient is that of KL per token. It can
    exchange length between prompts. `rate_per_prompt`: κ of the other responses to the same prompt, which cannot; it
    needs `rollout.samples_per_prompt` of at least 2. Both need `reward: expected`, `return_from: next` and
    `length_norm: false`, and what `baseline: centre` needs. Equations (C) and (D)."""
    offset_memory: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the sums behind κ that a batch keeps of the batches before it, with `credit_offset: rate`. κ then varies
    less from batch to batch, and lags behind the student: the sums are those of about 1/(1 − `offset_memory`) batches.
    0: this batch alone."""
    credit_for: Literal["tokens", "words"] = "tokens"
    """Which choices the long-term term credits. `tokens`: every token, with ∇log q(y_t). `words`: which token follows,
    given that the response goes on, with ∇log[q(y_t)/(1−q(end))]. Whether to end is then left to the single-step term
    alone, which knows that exactly. Equation (E)."""
    length_norm: bool = True
    """Divide each return by the number of rewards in it (equation 6 of the paper). Sums without it favour short
    responses."""
    advantage: Literal["returns", "fixed"] = "returns"
    """Advantage A_t of the long-term term. `returns`: from rewards. `fixed`: −1 for every token, whatever the teacher
    says, scaled by `long_term`: a control. On samples of the current student its expected gradient is 0."""
    baseline: Literal["none", "centre", "position", "prompt_position", "value", "whiten", "whiten_padded"] = "centre"
    """What is subtracted from returns to reduce variance. `centre`: the mean return per token of the batch's other
    responses (leave-one-out); with expected rewards this takes one more forward pass of the student over the rollouts
    before it trains on them, unless an engine in the process mixes the teacher in (`rollout.teacher_mix`), which knows
    KL_k. `position`: the mean return of the other responses at the same position. `prompt_position`: that of the other
    responses to the same prompt, which needs `rollout.samples_per_prompt` of at least 2. `value`: a linear function of
    KL_t, entropy and position that is fitted to the returns of the batch before. `whiten`: normalise to mean 0 and
    standard deviation 1 in each micro-batch, over all processes; needs `reward: sampled`. `whiten_padded`: the same
    with padding counted as zeros, as in LMOps."""
    trace: Share = 1.0
    """λ with `baseline: value`. Below 1, rewards that come later count λ less for each token, and the value stands in
    for them (generalised advantage estimation, arXiv 1506.02438): less variance, and bias where the value is wrong."""
    importance: Literal["none", "token", "prefix"] = "token"
    """Importance weight in the long-term term, which corrects for sampling from p̃ instead of q_old. `token`: ρ_t.
    `prefix`: the product ρ_1 … ρ_k for each sampled reward r_k, or ρ_1 … ρ_(k−1) for an expected one, which is unbiased
    (equations (A) and (B)); needs `baseline: none` and `length_norm: false`. `none`: no weight."""
    old_logprobs: Literal["engine", "trainer"] = "engine"
    """Where log q_old comes from. `engine`: from the engine that sampled the tokens. `trainer`: from one more forward
    pass of the student, as in LMOps; importance weights then use these numbers too."""
    importance_truncation: Annotated[float, Field(ge=1)] | None = None
    """Upper limit of importance weights. Without `clip` it also limits the ratio q/q_old, in which the numbers of the
    engine and of the trainer may differ. null: no limit but e^20."""
    clip: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """ε in min(ρ̂·A, clip(ρ̂, 1−ε, 1+ε)·A), where ρ̂ = q/q_old and A is the advantage (the paper, after PPO). It
    limits the ratio where A > 0. null: use the ratio without clipping."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With `clip`, the upper limit of the ratio where A < 0 (after arXiv 1912.09729); it must be above 1 + `clip`. A
    token above the limit still counts, with the limit as its ratio. Without it, a token to which the engine gives a
    probability e^5 times lower than the trainer would count e^5 times. null, no limit, in the presets `paper` and
    `reference`, because neither the paper nor LMOps has one."""
    weight_in_clip: bool = False
    """Clip the product of importance weight and ratio, as in LMOps, instead of the ratio alone, as in the paper.
    Needs `clip` and `importance: token`."""
    divergence: DivergenceConfig = DivergenceConfig(name="reverse_kl")
    """Divergence of the single-step term, whose gradient is exact. The long-term term exists for the reverse KL only:
    any other divergence needs `long_term: 0`."""
    single_step: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of the single-step term: the first sum of equation (B), and the first part of equation 7 of the
    paper."""
    single_step_weight: Literal["none", "token", "prefix"] = "none"
    """Importance weight of the single-step term. `none`: 1. `token`: ρ_t, as in the paper. `prefix`: ρ_1 … ρ_(t−1),
    which is unbiased."""
    long_term: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of the long-term term: the second sum of equation (B), and the second part of equation 7 of the
    paper."""
    language_model: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of the language-model term, −log q on ordinary text (L_PT in algorithm 1 of the paper). It keeps the
    student from forgetting what it learnt in pre-training. Used only if a text dataset is given."""
    language_model_distill: Share = 0.0
    """Part of the language-model term, from 0 to 1, that is the forward KL to the teacher instead of −log q. LMOps uses
    0.5."""
    language_model_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits in the language-model term. The other terms use `rollout.temperature`."""
    language_model_block: Annotated[int, Field(ge=2)] = 512
    """Number of tokens in a block of text. Documents are packed into blocks and do not attend to each other."""
    signal_every: Annotated[int, Field(ge=0)] = 0
    """Every how many updates the long-term term is measured: its share of the gradient, and how much of it is signal
    rather than noise (`long_term_share`, `long_term_signal`, `single_step_signal` in the log). An update that is
    measured computes the gradient by the logits twice. 0: never. It changes nothing that is trained."""
    normalise: Literal["update_tokens", "micro_batch_tokens"] = "update_tokens"
    """What sums over tokens are divided by. `update_tokens`: the number of tokens of the whole weight update, over all
    processes. `micro_batch_tokens`: the number in each micro-batch, as in LMOps."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict):
            preset = given.get("preset", "recommended")
            if isinstance(preset, str) and preset in PRESETS:
                return {**PRESETS[preset], **given}
        return given

    @model_validator(mode="after")
    def _check_clipping(self) -> Objective:
        if self.weight_in_clip and self.clip is None:
            raise InputError("weight_in_clip needs clip (a number between 0 and 1)")
        if self.clip and self.dual_clip and self.dual_clip <= 1 + self.clip:
            raise InputError(
                f"dual_clip ({self.dual_clip:g}) limits a ratio that clip does not limit, so it must be above "
                f"1 + clip ({1 + self.clip:g})"
            )
        if self.importance == "none" and self.weight_in_clip:
            raise InputError(
                "weight_in_clip clips an importance weight, and importance: none has none: set importance: token"
            )
        unweighted = self.importance == "none" and self.single_step_weight == "none"
        if self.importance_truncation is not None and self.clip and unweighted:
            raise InputError(
                "importance_truncation has no weight to truncate: set importance or single_step_weight, or clip: null"
            )
        if self.importance == "prefix" and self.weight_in_clip:
            raise InputError("weight_in_clip applies to importance: token only, not to importance: prefix")
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> Objective:
        if self.reward == "expected" and (self.reward_scale != 1.0 or self.reward_clip is not None):
            raise InputError(
                "reward_scale and reward_clip apply to reward: sampled only; an expected reward is −KL without change"
            )
        if self.reward == "expected" and self.baseline.startswith("whiten"):
            raise InputError(
                "whitening needs every return beforehand, and reward: expected does not know them: "
                "set reward: sampled, or baseline: centre"
            )
        if self.importance == "prefix" and self.baseline != "none":
            raise InputError(
                "importance: prefix weights each reward, so a baseline would bias the gradient: set baseline: none"
            )
        if self.divergence.name != "reverse_kl" and self.long_term:
            raise InputError(
                f"divergence: {self.divergence.name} has no long-term term, which only reverse_kl has: set long_term: 0"
            )
        if self.importance == "prefix" and self.length_norm:
            raise InputError(
                "importance: prefix weights each reward and has no length-normalised form: set length_norm: false"
            )
        return self

    @model_validator(mode="after")
    def _check_credit(self) -> Objective:
        if self.advantage == "fixed" and (self.baseline != "none" or self.credit_offset != "none"):
            raise InputError(
                "advantage: fixed reads no returns, so nothing is subtracted from them or added to them: set "
                "baseline: none and credit_offset: none"
            )
        if self.advantage == "fixed" and (self.importance == "prefix" or self.length_norm):
            raise InputError(
                "advantage: fixed has no rewards to weight or to count: set length_norm: false, and importance: token "
                "or none"
            )
        if self.signal_every and not self.long_term:
            raise InputError("signal_every measures the long-term term, and there is none: set long_term, or 0")
        if self.trace < 1 and self.baseline != "value":
            raise InputError("trace puts a value in place of later rewards: set baseline: value, or trace: 1")
        if self.baseline == "value" and (self.length_norm or self.return_from == "current"):
            raise InputError(
                "baseline: value predicts the sum of the rewards after a token: set length_norm: false and "
                "return_from: next"
            )
        if self.baseline == "value" and self.reward == "sampled":
            raise InputError("baseline: value predicts −KL from KL: set reward: expected")
        if self.offset_memory and self.credit_offset != "rate":
            raise InputError(
                "offset_memory keeps the price of all prompts together over batches: set credit_offset: rate, or "
                "offset_memory: 0"
            )
        if self.credit_offset == "none":
            return self
        name = f"credit_offset: {self.credit_offset}"
        if self.length_norm:
            raise InputError(
                f"{name} charges every future token its price, and length_norm turns that into one constant for all "
                "tokens: set length_norm: false"
            )
        if self.reward == "sampled":
            raise InputError(f"{name} is the mean of KL, so the rewards must be −KL too: set reward: expected")
        if self.return_from == "current":
            raise InputError(
                f"{name} prices the tokens that a choice leads to, not the token itself: set return_from: next"
            )
        return self

    @classmethod
    def paper(cls, **changes: Any) -> Objective:
        """Return the objective of the paper, equations 5 to 8 of arXiv 2306.08543.

        Args:
            **changes: Fields that should differ from the preset.
        """
        return cls(preset="paper", **changes)

    @classmethod
    def reference(cls, **changes: Any) -> Objective:
        """Return the objective that the code published with the paper (LMOps) computes.

        Args:
            **changes: Fields that should differ from the preset.
        """
        return cls(preset="reference", **changes)

    @classmethod
    def recommended(cls, **changes: Any) -> Objective:
        """Return the objective we recommend.

        Rewards are expected future rewards, centred. Token weights stay outside the clip, and sums are divided by the
        token count of the whole update.

        Args:
            **changes: Fields that should differ from the preset.
        """
        return cls(preset="recommended", **changes)

    @classmethod
    def exact(cls, **changes: Any) -> Objective:
        """Return the objective with the unbiased gradient of KL(q‖p), equation (B) of `minillm.loss.credit`.

        The gradient is unbiased at the first update on a batch, and its variance grows with the length of responses. At
        later updates on the same batch the student differs from q_old, and the weights do not take that into account.
        For an exact gradient at every update, use one rollout batch per update and one inner epoch.

        Args:
            **changes: Fields that should differ from the preset.
        """
        return cls(preset="exact", **changes)

    @classmethod
    def rate(cls, **changes: Any) -> Objective:
        """Return the objective with the gradient of KL per token, equation (C) of `minillm.loss.credit`.

        It is unbiased at the first update on a batch without teacher mixing, but for the error of κ, which a batch
        estimates. `discount: 0.9` trades a little bias for much less variance.

        Args:
            **changes: Fields that should differ from the preset.
        """
        return cls(preset="rate", **changes)

    @classmethod
    def words(cls, **changes: Any) -> Objective:
        """Return the objective whose long-term term credits words only, equation (E) of `minillm.loss.credit`.

        It is the gradient of KL per token with the probabilities of ending held fixed in the distribution of responses,
        and unbiased where `rate` is.

        Args:
            **changes: Fields that should differ from the preset.
        """
        return cls(preset="words", **changes)
