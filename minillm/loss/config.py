"""Settings of the loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from minillm.config import Section, Share
from minillm.errors import InputError


class DivergenceConfig(Section):
    """A divergence between the student's q and the teacher's p at each token; see `minillm.loss.divergences`."""

    name: Literal[
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
        "adaptive_kl",
        "alpha_beta",
    ]
    alpha: float | None = None
    """Of `alpha_beta`."""
    beta: float | None = None
    """Of `jensen_shannon` (GKD's β: towards 0 the forward, towards 1 the reverse KL) and of `alpha_beta`."""
    skew: float | None = None
    """λ of the skew divergences (DistiLLM: 0.1)."""
    head_mass: float | None = None
    """Of `adaptive_kl`: mass of p that counts as its head."""

    @model_validator(mode="before")
    @classmethod
    def _just_a_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _parameters(self) -> DivergenceConfig:
        takes = {
            "jensen_shannon": {"beta"}, "skew_forward_kl": {"skew"}, "skew_reverse_kl": {"skew"}, "adaptive_kl": {"head_mass"},
            "alpha_beta": {"alpha", "beta"},
        }.get(self.name, set())  # fmt: skip
        if spare := set(self.parameters) - takes:
            raise InputError(
                f"{self.name} takes {' and '.join(sorted(takes)) or 'no parameter'}, not {', '.join(sorted(spare))}"
            )
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """Those that were given."""
        named = {"alpha": self.alpha, "beta": self.beta, "skew": self.skew, "head_mass": self.head_mass}
        return {name: value for name, value in named.items() if value is not None}


class Objective(Section):
    """What is minimised; see `minillm.loss.credit` for the equations. Start from a preset and change what differs."""

    preset: Literal["paper", "reference", "recommended", "exact"] = "recommended"
    """Which preset the other fields start from."""
    reward: Literal["sampled", "expected"] = "expected"
    """r_k = log p(y_k) − log q_old(y_k), or its expectation −KL_k, as it was when the response was first trained on."""
    reward_scale: Annotated[float, Field(gt=0)] = 1.0
    """Sampled rewards are divided by this (the authors' code: 0.5). It scales the long-term term alone, against the single step."""
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    """Then clipped to ± this: one token that the teacher all but excludes must not outweigh the rest."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """γ: R_t = Σ_k γ^{k−s} r_k. 1, as in the paper, is the gradient of KL; less trades bias for variance."""
    return_from: Literal["next", "current"] = "next"
    """R_{t+1} (the paper; the single step holds the immediate reward) or R_t."""
    length_norm: bool = True
    """Divide a return by its number of summands (equation 6 of the paper): sums favour short responses."""
    baseline: Literal["none", "centre", "whiten", "whiten_padded"] = "centre"
    """`centre`: subtract the mean return of a token of the batch's other responses (leave-one-out); for expected rewards the student
    reads the rollouts once more, before it trains on them. `whiten`: mean and spread of the micro-batch; `whiten_padded`: its padding
    counted as zeros, as the authors' code does."""
    importance: Literal["none", "token", "prefix"] = "token"
    """Long-term weight: none, ρ_t, or the per-decision product ρ_1…ρ_k (equation B of `minillm.loss.credit`)."""
    old_logprobs: Literal["engine", "trainer"] = "engine"
    """Whose log q_old: the engine's, which drew the tokens, or those of one more forward of the student (the authors'
    code), from which ρ is then taken too."""
    importance_truncation: Annotated[float, Field(ge=1)] | None = None
    """Upper bound of an importance weight and, without `clip`, of the ratio q_θ/q_old, in which the numbers of the engine
    that drew and of the trainer may differ."""
    clip: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """ε of min(ρ̂·A, clip(ρ̂, 1±ε)·A), ρ̂ = q_θ/q_old (the paper after PPO); none: the plain ratio. It bounds the ratio where A > 0."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With `clip`, upper bound of the ratio where A < 0 (after arXiv 1912.09729; a token beyond it still counts, as much as the
    bound), where an engine that gives a token e^5 times less than the trainer would weigh it e^5 times. None in the paper and in the
    authors' code, nor in their presets."""
    weight_in_clip: bool = False
    """Clip w·ρ̂ (the authors' code) rather than ρ̂ (the paper)."""
    divergence: DivergenceConfig = DivergenceConfig(name="reverse_kl")
    """What the single step takes the exact gradient of; the long-term term knows the reverse KL alone."""
    single_step: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of the exact KL_t, the first part of (B) and of the paper's equation 7."""
    single_step_weight: Literal["none", "token", "prefix"] = "none"
    """Weight of KL_t: none, ρ_t (the paper), or ρ_1…ρ_{t−1}."""
    long_term: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of the policy-gradient term, the second part of (B) and of the paper's equation 7."""
    language_model: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient of −log q on text (L_PT of algorithm 1), which keeps what pre-training taught; only where text is given."""
    language_model_distill: Share = 0.0
    """Share of that term which is forward KL to the teacher (0.5 in the authors' code)."""
    language_model_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits in that term, whatever `rollout.temperature` divides them by in the others."""
    language_model_block: Annotated[int, Field(ge=2)] = 512
    """Tokens in a block of text; documents that share a block do not see each other."""
    normalise: Literal["update_tokens", "micro_batch_tokens"] = "update_tokens"
    """Divide sums over tokens by the token count of the whole update over all processes, or of the micro-batch."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict):
            preset = given.get("preset", "recommended")
            if isinstance(preset, str) and preset in PRESETS:
                return {**PRESETS[preset], **given}
        return given

    @model_validator(mode="after")
    def _combinations(self) -> Objective:
        if self.weight_in_clip and self.clip is None:
            raise InputError("weight_in_clip needs clip (a number between 0 and 1)")
        if self.clip and self.dual_clip and self.dual_clip <= 1 + self.clip:
            raise InputError(
                f"dual_clip ({self.dual_clip:g}) bounds what clip does not: it must be above 1 + clip ({1 + self.clip:g})"
            )
        if self.reward == "expected" and (self.reward_scale != 1.0 or self.reward_clip is not None):
            raise InputError(
                "reward_scale and reward_clip apply to reward: sampled; the expected reward is -KL as it is"
            )
        if self.reward == "expected" and self.baseline.startswith("whiten"):
            raise InputError("whitening needs every return beforehand: use reward: sampled, or baseline: centre")
        if self.importance == "none" and self.weight_in_clip:
            raise InputError("weight_in_clip has no weight to clip: set importance: token")
        if (
            self.importance_truncation is not None
            and self.clip
            and self.importance == "none"
            and self.single_step_weight == "none"
        ):
            raise InputError(
                "importance_truncation has no weight to truncate: set importance or single_step_weight, or clip: null"
            )
        if self.importance == "prefix" and self.weight_in_clip:
            raise InputError("weight_in_clip holds for importance: token")
        if self.importance == "prefix" and self.baseline != "none":
            raise InputError(
                "importance: prefix weighs rewards, not the score; a baseline would bias it: set baseline: none"
            )
        if self.divergence.name != "reverse_kl" and self.long_term:
            raise InputError(f"divergence: {self.divergence.name} has no long-term term; set long_term: 0")
        if self.importance == "prefix" and self.length_norm:
            raise InputError("importance: prefix weighs each future reward; it has no length-normalised form")
        return self

    @classmethod
    def paper(cls, **changes: Any) -> Objective:
        """Equations 5 to 8 of arXiv 2306.08543."""
        return cls(preset="paper", **changes)

    @classmethod
    def reference(cls, **changes: Any) -> Objective:
        """What the authors' released code computes."""
        return cls(preset="reference", **changes)

    @classmethod
    def recommended(cls, **changes: Any) -> Objective:
        """Expected future rewards, token weights outside the clip, centred, one token count per update."""
        return cls(preset="recommended", **changes)

    @classmethod
    def exact(cls, **changes: Any) -> Objective:
        """The unbiased gradient of KL(q‖p), equation (B), at the first update on a batch; its variance grows with length.

        Later updates on the same batch have moved away from q_old, which W does not follow: for an exact gradient at every
        update, one rollout batch an update and one inner epoch.
        """
        return cls(preset="exact", **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "paper": {"reward": "sampled", "baseline": "none", "single_step_weight": "token", "dual_clip": None},
    "reference": {
        "reward": "sampled", "reward_scale": 0.5, "reward_clip": 100.0, "discount": 0.95, "return_from": "current",
        "baseline": "whiten_padded", "dual_clip": None, "weight_in_clip": True, "language_model_distill": 0.5,
        "old_logprobs": "trainer", "normalise": "micro_batch_tokens",
    },
    "exact": {
        "length_norm": False, "baseline": "none", "importance": "prefix", "single_step_weight": "prefix", "clip": None,
    },
}  # fmt: skip
