"""The objective's presets and refused settings, its clips, and gradients that stay finite."""

from __future__ import annotations

import math

import pytest
import torch

from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.token_scores import TokenScores, token_scores
from minillm.models.head import Head, TeacherStates


def test_the_presets_are_what_their_sources_say() -> None:
    paper, reference = Objective.paper(), Objective.reference()
    assert (paper.reward, paper.reward_scale, paper.reward_clip, paper.discount, paper.return_from) == (
        "sampled",
        1,
        None,
        1,
        "next",
    )
    assert (paper.length_norm, paper.baseline, paper.importance, paper.clip, paper.weight_in_clip) == (
        True,
        "none",
        "token",
        0.2,
        False,
    )
    assert (paper.single_step, paper.single_step_weight, paper.long_term, paper.language_model) == (1, "token", 1, 1)
    assert (paper.language_model_distill, paper.old_logprobs, paper.normalise) == (0, "engine", "update_tokens")
    # Sections 1.4 to 1.9 of the notes on the LMOps code.
    assert (reference.reward, reference.reward_scale, reference.reward_clip) == ("sampled", 0.5, 100)
    assert (reference.discount, reference.return_from, reference.length_norm) == (0.95, "current", True)
    assert (reference.baseline, reference.importance, reference.clip, reference.weight_in_clip) == (
        "whiten_padded",
        "token",
        0.2,
        True,
    )
    assert (reference.single_step, reference.single_step_weight, reference.long_term) == (1, "none", 1)
    assert (reference.language_model, reference.language_model_distill) == (1, 0.5)
    assert (reference.old_logprobs, reference.normalise) == ("trainer", "micro_batch_tokens")


def test_the_clip_stops_the_gradient_of_a_token_that_moved_far_enough() -> None:
    old = torch.log(torch.tensor([0.5, 0.5], dtype=torch.float64))
    data = SampledTokens(old, old, old + torch.tensor([0.0, 1.0]), torch.tensor([2]))
    loss = OnPolicyLoss(Objective.paper(single_step=0.0), data)
    zeros = torch.zeros(2, dtype=torch.float64)
    for ratio, active in ((1.1, True), (1.3, False)):
        now = old + torch.log(torch.tensor([ratio, 1.0], dtype=torch.float64))
        _, weights = loss(slice(0, 2), TokenScores(now, old, zeros, zeros, zeros))
        assert weights.logq is not None
        assert (float(weights.logq[0]) != 0) is active  # its advantage is +1


def test_settings_that_cannot_be_combined_are_refused() -> None:
    for bad in (
        {"preset": "recommended", "weight_in_clip": True, "clip": None},
        {"reward_scale": 2.0},
        {"baseline": "whiten"},
    ):
        with pytest.raises(ValueError, match=r"weight_in_clip|reward_scale|whiten"):
            Objective.model_validate(bad)


@pytest.mark.parametrize("preset", ["exact", "paper", "reference", "recommended"])
@pytest.mark.parametrize("discount", [1.0, 0.99, 0.9, 0.5])
def test_long_responses_and_single_tokens_have_finite_gradients(preset: str, discount: float) -> None:
    """4,096 tokens (TRL's implementation was NaN from token 987 on at γ = 0.9) and a response of one token."""
    g = torch.Generator().manual_seed(0)
    n = 4097
    hidden, weight = torch.randn(n, 8, generator=g).requires_grad_(), torch.randn(12, 8, generator=g).requires_grad_()
    teacher_hidden, teacher_weight = torch.randn(n, 8, generator=g), torch.randn(12, 8, generator=g)
    ids = torch.randint(12, (n,), generator=g)
    with torch.no_grad():
        old, logp = (
            torch.log_softmax(h @ w.t(), -1).gather(1, ids[:, None])[:, 0]
            for h, w in ((hidden, weight), (teacher_hidden, teacher_weight))
        )
        behaviour = (0.8 * old.exp() + 0.2 * logp.exp()).log()
    sampled = SampledTokens(old, behaviour, logp, torch.tensor([4096, 1]))
    loss_of = OnPolicyLoss(
        Objective.model_validate({"preset": preset, "discount": discount}), sampled, count=n, slots=2 * 4096
    )
    teacher = TeacherStates(teacher_hidden, Head(teacher_weight))
    loss, _ = token_scores(hidden, Head(weight), ids, teacher, loss_fn=loss_of)
    loss.backward()
    for grad in (hidden.grad, weight.grad):
        assert grad is not None
        assert torch.isfinite(grad).all()
        assert grad.norm() > 0


GAPS = [100.0, 30.0, -30.0, -100.0, float("inf"), -float("inf")]


@pytest.mark.parametrize("preset", ["paper", "reference", "recommended", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_engine_and_trainer_may_differ_by_any_gap(preset: str, dtype: torch.dtype) -> None:
    """Weights are finite and limited for positive, negative and zero advantages and gaps."""
    n = len(GAPS)
    now = torch.full((3 * n,), -120.0, dtype=dtype)
    old = now - torch.tensor(GAPS, dtype=dtype).repeat_interleave(3)
    now, old = now.clamp(min=-250.0), old.nan_to_num(posinf=0.0)
    teacher = torch.tensor([-1.0, -float("inf"), -3.0], dtype=dtype).repeat(n)
    sampled = SampledTokens(old, old, teacher, torch.full((n,), 3))
    for clip in (None, 0.2) if preset == "exact" else (0.2,):
        objective = Objective.model_validate({"preset": preset, "length_norm": False, "clip": clip})
        loss_of = OnPolicyLoss(objective, sampled, slots=3 * n)
        zeros = torch.zeros(3 * n, dtype=dtype)
        loss, weights = loss_of(
            slice(0, 3 * n), TokenScores(now.clamp(min=-80.0), teacher.clamp(min=-80.0), zeros + 2.0, zeros, zeros)
        )
        assert weights.logq is not None
        assert torch.isfinite(loss)
        assert torch.isfinite(weights.logq).all()
        assert all(torch.isfinite(value) for value in loss_of.tally.sums.values())
        assert float((weights.logq.double() ** 2).sum()) < 1e30  # far below the largest float32


def weight_at(objective: Objective, gap: float, advantage: float) -> float:
    """Return the factor of ∇log q of a token whose log q is `gap` lower in the engine than in the trainer.

    The token has one reward, `advantage`.
    """
    now = torch.tensor([-30.0, -30.0], dtype=torch.float64)
    old = now - torch.tensor([gap, 0.0], dtype=torch.float64)
    sampled = SampledTokens(old, old, old + torch.tensor([0.0, advantage], dtype=torch.float64), torch.tensor([2]))
    zeros = torch.zeros_like(now)
    kl = torch.tensor([0.0, -advantage], dtype=torch.float64)  # the expected reward has the same value
    _, weights = OnPolicyLoss(objective, sampled)(slice(0, 2), TokenScores(now, now, kl, zeros, zeros))
    assert weights.logq is not None
    return -float(weights.logq[0])


def test_the_clip_bounds_a_mismatch_on_both_sides() -> None:
    """min(ρA, clip(ρ)A) does not limit ρ where A < 0. `dual_clip` does, and keeps a gradient beyond the limit."""
    recommended, paper = Objective.recommended(), Objective.paper()
    for objective in (
        recommended,
        Objective.paper(dual_clip=3.0),
        Objective.reference(baseline="none", return_from="next", dual_clip=3.0),
    ):
        scale = 1.0 / objective.reward_scale
        for gap in (2.0, 5.0, 12.0, 29.0):
            assert weight_at(objective, gap, 1.0) == 0.0  # clipped, so without gradient
            assert weight_at(objective, gap, -1.0) == pytest.approx(-3.0 * scale)
        for gap in (0.0, 0.1, -0.1, 1.0, -3.0):  # below the limit nothing changes
            assert weight_at(objective, gap, -1.0) == pytest.approx((0.0 if gap < -0.2 else -math.exp(gap)) * scale)
    for gap in (2.0, 5.0):  # as in the paper and in LMOps
        assert weight_at(paper, gap, -1.0) == pytest.approx(-math.exp(gap))
    assert weight_at(paper, 29.0, -1.0) == pytest.approx(-math.exp(20.0))
    assert weight_at(Objective.exact(importance_truncation=2.0), 5.0, -1.0) == pytest.approx(-2.0)
    with pytest.raises(ValueError, match=r"dual_clip \(1.1\) limits a ratio .*, so it must be above 1 \+ clip \(1.2\)"):
        Objective.recommended(dual_clip=1.1)
