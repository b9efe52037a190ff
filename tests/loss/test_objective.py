"""The objective in toy worlds that are small enough to enumerate every response in float64.

The expectation of the estimated gradient, under the distribution that responses are sampled from, is compared with the
exact gradient of KL(q‖p).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.token_scores import token_scores
from minillm.models.head import Head, TeacherStates
from tests.loss.worlds import World


def median_bias(objective: Objective, alpha: float) -> float:
    biases = []
    for seed in range(20):
        world = World.random(seed)
        settings = {"baseline": world.mean_return(objective, alpha)} if objective.baseline == "centre" else {}
        exact, got = (
            torch.cat([g.flatten() for g in gs])
            for gs in (world.exact(), world.expectation(objective, alpha, **settings))
        )
        biases.append(float((got - exact).norm() / exact.norm()))
    return float(torch.tensor(biases).median())


UNBIASED_PAPER = {"length_norm": False, "clip": None}


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("reward", ["expected", "sampled"])
def test_exact_is_unbiased_at_every_mix(alpha: float, reward: str) -> None:
    objective = Objective.exact(reward=reward)
    for seed in range(3):
        assert World.random(seed).bias(objective, alpha) < 1e-9


def test_the_paper_without_norm_and_clip_is_unbiased_on_policy() -> None:
    for seed in range(3):
        assert World.random(seed).bias(Objective.paper(**UNBIASED_PAPER), 0.0) < 1e-9


BARE = {"length_norm": False, "baseline": "none", "clip": None}
# Median relative bias over 20 worlds, with responses of up to 3 tokens, at α = 0.2 and 0.5; part of the table in
# docs/concepts/methods/index.md. Each micro-batch has one response, so whitening is over the tokens of one response.
BIASES: dict[str, tuple[Objective, float, float]] = {
    "recommended": (Objective.recommended(), 0.420, 0.426),
    "recommended, uncentred": (Objective.recommended(baseline="none"), 0.191, 0.341),
    "recommended, no length norm": (Objective.recommended(length_norm=False), 0.113, 0.258),
    "recommended, bare": (Objective.recommended(**BARE), 0.113, 0.258),
    "recommended, no weights": (Objective.recommended(importance="none", **BARE), 0.210, 0.475),
    "exact, weights at most 2": (Objective.exact(importance_truncation=2.0), 0.0, 0.003),
    "paper, bare": (Objective.paper(**UNBIASED_PAPER), 0.197, 0.465),
    "paper, no weights": (
        Objective.paper(importance="none", single_step_weight="none", **UNBIASED_PAPER),
        0.252,
        0.495,
    ),
    "paper, discount 0.95": (Objective.paper(discount=0.95, **UNBIASED_PAPER), 0.201, 0.465),
    "paper, weight in clip": (
        Objective.paper(length_norm=False, weight_in_clip=True, single_step_weight="none"),
        0.220,
        0.511,
    ),
    "paper, R_t": (Objective.paper(return_from="current", **UNBIASED_PAPER), 0.869, 0.960),
    "paper, whitened": (Objective.paper(baseline="whiten", **UNBIASED_PAPER), 0.499, 0.562),
    "paper": (Objective.paper(), 0.255, 0.439),
    "reference": (Objective.reference(), 0.519, 0.693),
    "exact, R_t": (Objective.exact(reward="sampled", return_from="current"), 0.927, 0.927),
}


@pytest.mark.parametrize("name", BIASES)
def test_the_bias_of_each_preset_and_approximation_is_a_known_number(name: str) -> None:
    objective, low, high = BIASES[name]
    assert median_bias(objective, 0.2) == pytest.approx(low, abs=0.001)
    assert median_bias(objective, 0.5) == pytest.approx(high, abs=0.001)


def test_a_baseline_of_the_recommended_kind_does_not_bias_on_policy() -> None:
    """A constant does not bias because E[∇log q(y_t)] is 0. Off policy this holds because of the weight ρ_t."""
    world = World.random(4)
    for alpha in (0.0, 0.5):
        plain, centred = (
            world.expectation(Objective.recommended(length_norm=False, clip=None), alpha, baseline=b)
            for b in (0.0, -1.7)
        )
        for ours, theirs in zip(plain, centred, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_match_a_plain_loop_response_by_response() -> None:
    """A missing detach of the reward adds a gradient with mean zero, which the expectation does not show."""
    world = World.random(5)
    for y in world.responses():
        rows, ids = torch.tensor(world.rows(y)), torch.tensor(y)
        logq, logp = world.logq()[rows], world.logp()[rows]
        q_token, p_token = logq.gather(1, ids[:, None])[:, 0], logp.gather(1, ids[:, None])[:, 0]
        kl = (logq.exp() * (logq - logp)).sum(-1)
        reward = (p_token - q_token).detach()
        loss = kl.sum()
        for t in range(len(y)):
            future = reward[t + 1 :].mean() if t + 1 < len(y) else torch.zeros((), dtype=torch.float64)
            loss = loss - q_token[t] * future
        want = torch.autograd.grad(loss, [world.states, world.head])
        _, got = world.one(y, Objective.paper(), alpha=0.0)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


OFF_POLICY = {
    "paper": Objective.paper(),
    "paper, weights at most 1.1": Objective.paper(importance_truncation=1.1),
    "paper, weight in clip": Objective.paper(weight_in_clip=True),
    "paper, no clip": Objective.paper(clip=None),
    "paper, no clip, ratio at most 1.1": Objective.paper(clip=None, importance_truncation=1.1),
    "recommended": Objective.recommended(),
    "reference, tight reward clip": Objective.reference(reward_clip=0.7, baseline="none"),
}


@pytest.mark.parametrize("name", OFF_POLICY)
def test_after_the_student_has_moved_each_response_counts_as_written(name: str) -> None:
    """At α = 0.3 ρ, ρ̂ and A all differ. Some tokens are clipped from above, some from below, and some not."""
    objective, world, alpha, baseline = OFF_POLICY[name], World.random(8), 0.3, -0.4
    g = torch.Generator().manual_seed(1)
    moved = world.states + 0.4 * torch.randn(world.states.shape, generator=g, dtype=torch.float64)
    logq_old = torch.log_softmax(moved @ world.head.t(), -1).detach()
    cases = set()
    for y in world.responses():
        rows, ids, n = torch.tensor(world.rows(y)), torch.tensor(y), len(y)
        logq, logp = world.logq()[rows], world.logp()[rows]
        drawn, p, old = (values.gather(1, ids[:, None])[:, 0] for values in (logq, logp, logq_old[rows]))
        kl = (logq.exp() * (logq - logp)).sum(-1)
        limit = objective.importance_truncation or math.inf
        rho = (old.exp() / ((1 - alpha) * old.exp() + alpha * p.exp())).clamp(max=limit)
        reward = (p - old) / objective.reward_scale
        if objective.reward_clip is not None:
            reward = reward.clamp(-objective.reward_clip, objective.reward_clip)
        if objective.reward == "expected":
            reward = -kl.detach()
        loss = torch.zeros((), dtype=torch.float64)
        for t in range(n):
            first = t + (objective.return_from == "next")
            later = range(first, n)
            advantage = sum(objective.discount ** (k - first) * float(reward[k]) for k in later) / max(len(later), 1)
            if objective.baseline == "centre" and later:
                advantage -= baseline
            ratio, weight = (drawn[t] - old[t]).exp(), float(rho[t])
            if objective.weight_in_clip:
                ratio, weight = ratio * weight, 1.0
            if objective.clip is None:
                # A truncated ratio is a constant factor of ∇log q.
                term = ratio * advantage if float(ratio.detach()) <= limit else drawn[t] * limit * advantage
                cases.add((float(ratio.detach()) > limit, advantage > 0))
            else:
                bounded = ratio.clamp(1 - objective.clip, 1 + objective.clip)
                term = torch.minimum(ratio * advantage, bounded * advantage)
                cases.add((float((ratio - bounded).detach()), advantage > 0))
            single = float(rho[t]) if objective.single_step_weight == "token" else 1.0
            loss = loss + single * kl[t] - weight * term
        want = torch.autograd.grad(loss, [world.states, world.head])
        _, got = world.one(y, objective, alpha, logq_old, baseline=baseline)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    sides = {(0 if size == 0 else 1 if size > 0 else -1, positive) for size, positive in cases}
    assert {(0, True), (0, False)} <= sides  # both signs of A
    if objective.clip is not None or objective.importance_truncation is not None:
        assert (1, True) in sides  # the upper limit applies to some token
    assert objective.clip is None or (-1, False) in sides  # and so does the lower one


def test_the_metrics_are_what_their_names_say() -> None:
    world, alpha = World.random(9), 0.3
    y = next(y for y in world.responses() if len(y) == 3)
    rows, ids = torch.tensor(world.rows(y)), torch.tensor(y)
    logq, logp = world.logq().detach()[rows], world.logp()[rows]
    old, p = logq.gather(1, ids[:, None])[:, 0], logp.gather(1, ids[:, None])[:, 0]
    behaviour = ((1 - alpha) * old.exp() + alpha * p.exp()).log()
    loss_of = OnPolicyLoss(Objective.paper(length_norm=False), SampledTokens(old, behaviour, p, torch.tensor([3])))
    loss, _ = token_scores(
        world.states[rows],
        Head(world.head),
        ids,
        TeacherStates(world.teacher_states[rows], Head(world.teacher_head)),
        loss_fn=loss_of,
    )
    rho = (old - behaviour).exp()
    advantage = torch.stack([(p - old)[t + 1 :].sum() for t in range(3)])
    want = {
        "tokens": 3.0,
        "reverse_kl": (logq.exp() * (logq - logp)).sum(),
        "forward_kl": (logp.exp() * (logp - logq)).sum(),
        "entropy": -(logq.exp() * logq).sum(),
        "sampled_reverse_kl": (rho * (old - p)).sum(),
        "importance_weight": rho.sum(),
        "advantage": advantage.sum(),
        "advantage_squared": (advantage**2).sum(),
        "clipped": 0.0,
        "log_ratio": 0.0,
        "single_step_loss": (rho * (logq.exp() * (logq - logp)).sum(-1)).sum(),
        "policy_loss": -(rho * advantage).sum(),
    }
    assert loss_of.tally.sums.keys() == want.keys()
    for name, value in want.items():
        assert float(loss_of.tally.sums[name]) == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
    assert float(loss.detach()) == pytest.approx(float(want["single_step_loss"] + want["policy_loss"]))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_returns_before_the_first_scoring_have_the_mean_of_the_expected_ones(alpha: float) -> None:
    """Tokens come from the mixture, so the mean of sampled rewards is that of −KL only with importance weights."""
    world, objective = World.random(2), Objective.recommended(length_norm=False)
    logq, logp = world.logq().detach(), world.logp()
    kl = (logq.exp() * (logq - logp)).sum(-1)
    sampled, expected = 0.0, 0.0
    for y in world.responses():
        rows, ids = torch.tensor(world.rows(y)), torch.tensor(y)
        q, p = logq[rows, ids], logp[rows, ids]
        behaviour = ((1 - alpha) * q.exp() + alpha * p.exp()).log()
        probability = float(behaviour.sum().exp())
        total, _ = credit.return_sum(SampledTokens(q, behaviour, p, torch.tensor([len(y)])), objective)
        sampled += probability * float(total)
        expected += probability * float(sum(-kl[rows][t + 1 :].sum() for t in range(len(y))))
    assert sampled == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("preset", ["recommended", "exact"])
def test_our_presets_match_a_plain_loop_response_by_response(preset: str, alpha: float) -> None:
    world, baseline = World.random(6), -0.8
    for y in world.responses():
        rows, ids = torch.tensor(world.rows(y)), torch.tensor(y)
        logq, logp = world.logq()[rows], world.logp()[rows]
        drawn, p = logq.gather(1, ids[:, None])[:, 0], logp.gather(1, ids[:, None])[:, 0]
        kl = (logq.exp() * (logq - logp)).sum(-1)
        rho = (drawn.exp() / ((1 - alpha) * drawn.exp() + alpha * p.exp())).tolist()
        fixed, loss = kl.tolist(), torch.zeros((), dtype=torch.float64)
        for t in range(len(y)):
            later = range(t + 1, len(y))
            if preset == "exact":
                past = [math.prod(rho[:k]) for k in range(len(y))]  # W_{k−1}
                loss = loss + past[t] * kl[t] + drawn[t] * sum(past[k] * fixed[k] for k in later)
            elif later:
                advantage = -sum(fixed[k] for k in later) / len(later) - baseline
                loss = loss + kl[t] - rho[t] * drawn[t] * advantage
            else:
                loss = loss + kl[t]
        want = torch.autograd.grad(loss, [world.states, world.head])
        _, got = world.one(y, Objective.model_validate({"preset": preset}), alpha, baseline=baseline)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_the_teachers_logprobs_come_with_the_scores_where_nobody_knows_them_before(preset: str) -> None:
    world, objective = World.random(8), Objective.model_validate({"preset": preset, "baseline": "none"})
    for y in world.responses():
        rows, ids = torch.tensor(world.rows(y)), torch.tensor(y)
        q, p = (logs.detach()[rows, ids] for logs in (world.logq(), world.logp()))
        found = []
        for logp in (p, None):
            loss_of = OnPolicyLoss(
                objective, SampledTokens(q, (q.exp() / 2 + p.exp() / 2).log(), logp, ids.new_tensor([len(y)]))
            )
            gradients = world.gradients(rows, ids, loss_of)
            found.append([*gradients, *(loss_of.tally.sums[name] for name in ("sampled_reverse_kl", "advantage"))])
        for known, unknown in zip(*found, strict=True):
            torch.testing.assert_close(unknown, known, rtol=1e-9, atol=1e-12)


def test_rewards_that_a_batch_is_whitened_or_centred_by_have_to_be_known_before() -> None:
    tokens = SampledTokens(torch.zeros(3), torch.zeros(3), None, torch.tensor([3]))
    with pytest.raises(ValueError, match="baseline: whiten needs the rewards before"):
        OnPolicyLoss(Objective.paper(baseline="whiten"), tokens)
    with pytest.raises(ValueError, match="a baseline of returns needs log p"):
        credit.baselines(tokens, Objective.paper(baseline="centre"))


@pytest.mark.parametrize("reward", ["expected", "sampled"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_returns_are_centred_on_those_of_the_other_responses_and_nothing_is_biased(reward: str, alpha: float) -> None:
    """The expectation is over every pair of responses, with the probability that both are sampled."""
    world = World.random(7)
    objective = Objective.recommended(reward=reward, length_norm=False, single_step=0.0)
    plain = objective.model_copy(update={"baseline": "none"})
    drawn = {y: world.one(y, plain, alpha)[0] for y in world.responses()}
    logq, logp = world.logq().detach(), world.logp()
    kl = (logq.exp() * (logq - logp)).sum(-1)
    got: Any = None
    for one in drawn:
        for other in drawn:
            parts = [torch.tensor(world.rows(y)) for y in (one, other)]
            rows, ids = torch.cat(parts), torch.tensor([*one, *other])
            q, p = logq[rows, ids], logp[rows, ids]
            behaviour = ((1 - alpha) * q.exp() + alpha * p.exp()).log()
            sampled = SampledTokens(q, behaviour, p, torch.tensor([len(one), len(other)]), kl[rows])
            rewards = -kl[rows] if reward == "expected" else p - q
            future = [
                [float(part[t + 1 :].sum()) for t in range(len(part) - 1)]
                for part in rewards.split([len(one), len(other)])
            ]
            means = [sum(values) / len(values) if values else 0.0 for values in future]
            baseline = credit.baselines(sampled, objective)
            assert baseline.tolist() == pytest.approx(means[::-1], abs=1e-12)
            loss_of = OnPolicyLoss(objective, sampled, baseline=baseline[sampled.segments])
            grads = [drawn[one] * drawn[other] * g for g in world.gradients(rows, ids, loss_of)]
            got = grads if got is None else [a + b for a, b in zip(got, grads, strict=True)]
    for ours, theirs in zip(got, world.expectation(plain, alpha), strict=True):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reward", ["expected", "sampled"])
def test_advantages_have_no_mean_and_do_not_depend_on_the_split(reward: str) -> None:
    """The mean is zero if each response is weighted by the share of tokens that the other responses have."""
    g = torch.Generator().manual_seed(2)
    lengths = torch.tensor([5, 1, 64, 9, 30])
    n = int(lengths.sum())
    old, teacher, kl = (-3 * torch.rand(n, generator=g, dtype=torch.float64) for _ in range(3))
    sampled = SampledTokens(old, old, teacher, lengths, -kl)
    objective = Objective.recommended(reward=reward)
    baseline = credit.baselines(sampled, objective)
    rewards = credit.precomputed_rewards(sampled, objective)
    assert rewards is not None
    values = credit.returns(rewards, sampled, objective)
    future = sampled.remaining > 0
    counts = (lengths - 1).double()
    advantages = (values - baseline[sampled.segments]) * future
    share = ((counts.sum() - counts) / counts.sum())[sampled.segments]
    assert abs(float((advantages * share).sum() / future.sum())) < 1e-12
    # Two processes, each with a part of the responses.
    sums, numbers = credit.return_sum(sampled, objective)
    parts = []
    for chosen in ([0, 1, 2], [3, 4]):
        mine = torch.isin(sampled.segments, torch.tensor(chosen))
        part = SampledTokens(old[mine], old[mine], teacher[mine], lengths[chosen], -kl[mine])
        total = iter([float(numbers.sum()), float(sums.sum())])
        parts.append(credit.baselines(part, objective, lambda _, total=total: next(total)))
    torch.testing.assert_close(torch.cat(parts), baseline)
    alone = SampledTokens(old[:5], old[:5], teacher[:5], lengths[:1], -kl[:5])
    assert credit.baselines(alone, objective).tolist() == [0.0]
