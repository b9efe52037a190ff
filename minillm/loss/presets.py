"""The presets of the on-policy objective."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "recommended-2026-11": {},
    "paper": {"reward": "sampled", "baseline": "none", "single_step_weight": "token", "dual_clip": None},
    "reference": {
        "reward": "sampled",
        "reward_scale": 0.5,
        "reward_clip": 100.0,
        "discount": 0.95,
        "return_from": "current",
        "baseline": "whiten_padded",
        "dual_clip": None,
        "weight_in_clip": True,
        "language_model_distill": 0.5,
        "old_logprobs": "trainer",
        "normalise": "micro_batch_tokens",
    },
    "exact": {
        "length_norm": False,
        "baseline": "none",
        "importance": "prefix",
        "single_step_weight": "prefix",
        "clip": None,
    },
    "rate": {"credit_offset": "rate", "length_norm": False, "baseline": "none"},
    "words": {"credit_offset": "rate", "credit_for": "words", "length_norm": False, "baseline": "none"},
    "fixed_advantage": {
        "advantage": "fixed",
        "single_step": 0.0,
        "length_norm": False,
        "baseline": "none",
    },
}
"""Fields of `Objective` that each preset sets; all others keep their defaults, which are those of `recommended`."""
