"""The long-term term of KL per token: credit with a price for every token, for all tokens and for words only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.loss import credit, leave_one_out
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.leave_one_out import RateSums
from minillm.loss.on_policy import OnPolicyLoss
from tests.loss.worlds import EOS, World


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def error(got: list[Tensor], want: list[Tensor]) -> float:
    return float((flat(got) - flat(want)).norm() / flat(want).norm())


def preset(name: str, **changes: Any) -> Objective:
    return Objective.model_validate({"preset": name, **changes})


@pytest.mark.parametrize("name", ["rate", "words"])
def test_each_preset_has_the_gradient_of_its_objective(name: str) -> None:
    for seed in range(6):
        world = World.random(seed)
        got = world.expectation(preset(name), 0.0, offset=world.kappa())
        assert error(got, world.rate({"rate": "tokens", "words": "words"}[name])) < 1e-9


@pytest.mark.parametrize("alpha", [0.2, 0.5])
@pytest.mark.parametrize("name", ["rate", "words"])
def test_products_of_weights_are_unbiased_at_every_mix(name: str, alpha: float) -> None:
    objective = preset(name, importance="prefix", single_step_weight="prefix", clip=None)
    for seed in range(3):
        world = World.random(seed)
        got = world.expectation(objective, alpha, offset=world.kappa())
        # A word's own weight ρ_t is not in W_{k−1} of the rewards before it, but in that of the rewards after it.
        assert error(got, world.rate({"rate": "tokens", "words": "words"}[name])) < 1e-9


def test_words_without_a_price_are_the_sum_with_ending_held_fixed() -> None:
    world = World.random(3)
    got = world.expectation(preset("words", credit_offset="none"), 0.0)
    assert error(got, world.rate("words", kappa=0.0)) < 1e-9
    assert error(world.expectation(preset("rate", credit_offset="none"), 0.0), world.exact()) < 1e-9


# Median relative bias over 20 worlds at α = 0.2 and 0.5, against the objective of each preset.
BIASES = {"rate": (0.127, 0.277), "words": (0.132, 0.306)}


@pytest.mark.parametrize("name", BIASES)
def test_the_bias_at_a_mix_is_a_known_number(name: str) -> None:
    for alpha, known in zip((0.2, 0.5), BIASES[name], strict=True):
        biases = []
        for seed in range(20):
            world = World.random(seed)
            got = world.expectation(preset(name), alpha, offset=world.kappa())
            biases.append(error(got, world.rate("words" if name == "words" else "tokens")))
        assert float(torch.tensor(biases).median()) == pytest.approx(known, abs=0.001)


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("name", ["rate", "words", "fixed_advantage"])
def test_each_response_counts_as_written(name: str, alpha: float, discount: float) -> None:
    """A plain loop with autograd, by a student that has moved since it sampled: ratios differ from 1."""
    world, kappa, objective = World.random(8), 0.7, preset(name, discount=discount, clip=None)
    g = torch.Generator().manual_seed(1)
    moved = world.states + 0.4 * torch.randn(world.states.shape, generator=g, dtype=torch.float64)
    logq_old = torch.log_softmax(moved @ world.head.t(), -1).detach()
    for y in world.responses():
        rows, ids, n = torch.tensor(world.rows(y)), torch.tensor(y), len(y)
        logq, logp = world.logq()[rows], world.logp()[rows]
        drawn, p, old = (values.gather(1, ids[:, None])[:, 0] for values in (logq, logp, logq_old[rows]))
        kl = (logq.exp() * (logq - logp)).sum(-1)
        rho = old.exp() / ((1 - alpha) * old.exp() + alpha * p.exp())
        score = drawn - torch.log1p(-logq[:, EOS].exp()) if name == "words" else drawn
        loss = objective.single_step * kl.sum()
        for t in range(n):
            future = range(t + 1, n)
            advantage = sum(discount ** (k - t - 1) * (kappa - float(kl[k].detach())) for k in future)
            if name == "fixed_advantage":
                advantage = -1.0
            elif name == "words" and y[t] == EOS:
                continue
            loss = loss - float(rho[t]) * float((drawn[t] - old[t]).exp().detach()) * score[t] * advantage
        want = torch.autograd.grad(loss, [world.states, world.head], allow_unused=True)
        _, got = world.one(y, objective, alpha, logq_old, offset=None if name == "fixed_advantage" else kappa)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_even_kl_teaches_nothing_about_length() -> None:
    """Where every token has the same KL, the long-term term of `rate` is 0, and that of the sum is not."""
    lengths = torch.tensor([5, 2, 9])
    old = torch.zeros(16, dtype=torch.float64)
    tokens = SampledTokens(old, old, None, lengths, torch.full_like(old, 0.4), is_end=torch.zeros(16, dtype=torch.bool))
    for name, zero in (("rate", True), ("words", True), ("none", False)):
        objective = preset("rate" if name == "none" else name, **({"credit_offset": "none"} if name == "none" else {}))
        offsets, _ = leave_one_out.offsets(tokens, objective, "abc")
        tokens.offset = None if name == "none" else offsets[tokens.segments]
        rewards = credit.precomputed_rewards(tokens, objective)
        assert rewards is not None
        values = credit.returns(rewards + (0.0 if tokens.offset is None else tokens.offset), tokens, objective)
        assert (float(values.abs().max()) < 1e-12) is zero


def rollouts(weights: bool = False) -> SampledTokens:
    g = torch.Generator().manual_seed(2)
    lengths = torch.tensor([5, 1, 8, 3, 2])
    draw = lambda: -2 * torch.rand(int(lengths.sum()), generator=g, dtype=torch.float64)  # noqa: E731
    old = draw()
    return SampledTokens(old, draw() if weights else old, None, lengths, -draw())


@pytest.mark.parametrize("prefix", [False, True])
def test_the_price_is_the_rate_of_the_other_responses(prefix: bool) -> None:
    tokens = rollouts(weights=prefix)
    objective = preset("rate", **({"importance": "prefix", "clip": None} if prefix else {}))
    got, _ = leave_one_out.offsets(tokens, objective, "abcde")
    assert tokens.reverse_kl is not None
    weights = credit.prefix_weights(tokens)[0] if prefix else torch.ones_like(tokens.reverse_kl)
    for i in range(5):
        others = tokens.segments != i
        want = (weights * tokens.reverse_kl)[others].sum() / weights[others].sum()
        assert float(got[i]) == pytest.approx(float(want), rel=1e-12)


def test_the_price_of_a_prompt_is_that_of_its_other_responses() -> None:
    tokens, objective = rollouts(), preset("rate", credit_offset="rate_per_prompt")
    assert tokens.reverse_kl is not None
    got, _ = leave_one_out.offsets(tokens, objective, ["a", "b", "a", "c", "a"])
    parts = tokens.reverse_kl.split(tokens.lengths.tolist())
    mean = lambda *chosen: float(torch.cat([parts[i] for i in chosen]).mean())  # noqa: E731
    want = [mean(2, 4), mean(0, 2, 3, 4), mean(0, 4), mean(0, 1, 2, 4), mean(0, 2)]  # b and c are alone
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_a_price_remembers_batches_and_does_not_depend_on_the_processes() -> None:
    tokens, objective = rollouts(), preset("rate", offset_memory=0.5)
    assert tokens.reverse_kl is not None
    got, after = leave_one_out.offsets(tokens, objective, "abcde", RateSums(30.0, 10.0))
    sums, count = float(tokens.reverse_kl.sum()), len(tokens.reverse_kl)
    assert (after.reverse_kl, after.tokens) == (pytest.approx(sums + 15.0), count + 5.0)
    own = float(tokens.reverse_kl[:5].sum())
    assert float(got[0]) == pytest.approx((sums + 15.0 - own) / (count + 5.0 - 5))
    parts, payloads = [], []
    for chosen in ([0, 1, 2], [3, 4]):
        mine = torch.isin(tokens.segments, torch.tensor(chosen))
        old = tokens.student_logprobs[mine]
        part = SampledTokens(old, old, None, tokens.lengths[chosen], tokens.reverse_kl[mine])
        keep: list[Any] = []
        leave_one_out.offsets(
            part, objective, ["abcde"[i] for i in chosen], None, lambda x, keep=keep: keep.append(x) or [x]
        )
        parts.append((part, ["abcde"[i] for i in chosen]))
        payloads += keep
    joined = [
        leave_one_out.offsets(part, objective, names, RateSums(30.0, 10.0), lambda _: payloads)[0]
        for part, names in parts
    ]
    torch.testing.assert_close(torch.cat(joined), got)


def test_a_response_that_is_compared_with_nothing_has_its_own_price() -> None:
    old = torch.zeros(2, dtype=torch.float64)
    tokens = SampledTokens(old, old, None, torch.tensor([2]), torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert leave_one_out.offsets(tokens, preset("rate"), "a")[0].tolist() == [2.0]


@pytest.mark.parametrize("baseline", ["centre", "position", "prompt_position"])
@pytest.mark.parametrize("name", ["rate", "words"])
def test_baselines_of_the_other_responses_bias_nothing(name: str, baseline: str) -> None:
    """Over every pair of responses, with the probability that both are sampled; the price too is the other's."""
    world, objective = World.random(7), preset(name, single_step=0.0)
    centred = objective.model_copy(update={"baseline": baseline})
    logq, logp = world.logq().detach(), world.logp()
    kl = (logq.exp() * (logq - logp)).sum(-1)
    want: Any = 0.0
    got: Any = 0.0
    for one in world.responses():
        for other in world.responses():
            parts = [torch.tensor(world.rows(y)) for y in (one, other)]
            rows, ids = torch.cat(parts), torch.tensor([*one, *other])
            q = logq[rows, ids]
            lengths = torch.tensor([len(one), len(other)])
            sampled = SampledTokens(q, q, None, lengths, kl[rows], is_end=ids == EOS)
            sampled.offset = leave_one_out.offsets(sampled, objective, "ab")[0][sampled.segments]
            if baseline == "centre":
                baselines = credit.baselines(sampled, centred)[sampled.segments]
            else:
                baselines = leave_one_out.baselines_by_position(sampled, centred, "aa")
            probability = math.exp(float(q.sum()))
            got = got + probability * flat(
                world.gradients(rows, ids, OnPolicyLoss(centred, sampled, baseline=baselines))
            )
            want = want + probability * flat(world.gradients(rows, ids, OnPolicyLoss(objective, sampled)))
    assert float((got - want).norm() / want.norm()) < 1e-9


REFUSED = [
    ({"preset": "rate", "length_norm": True}, "set length_norm: false"),
    ({"preset": "rate", "reward": "sampled"}, "set reward: expected"),
    ({"preset": "rate", "return_from": "current"}, "set return_from: next"),
    ({"preset": "paper", "offset_memory": 0.5}, "set credit_offset: rate, or offset_memory: 0"),
    ({"preset": "rate", "credit_offset": "rate_per_prompt", "offset_memory": 0.5}, "offset_memory keeps the price"),
    ({"preset": "rate", "trace": 0.5}, "set baseline: value, or trace: 1"),
    ({"baseline": "value"}, "set length_norm: false and return_from: next"),
    ({"preset": "paper", "baseline": "value", "length_norm": False}, "set reward: expected"),
    ({"preset": "fixed_advantage", "baseline": "centre"}, "set baseline: none"),
    ({"preset": "fixed_advantage", "length_norm": True}, "has no rewards to weight or to count"),
    ({"preset": "words", "divergence": "forward_kl"}, "set long_term: 0"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_combined_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective.model_validate(fields)


def test_an_old_recipe_can_name_what_was_recommended() -> None:
    old, new = (preset(name).model_dump(exclude={"preset"}) for name in ("recommended-2026-11", "recommended"))
    assert old == new
    fields = (old["credit_offset"], old["credit_for"], old["baseline"], old["length_norm"], old["discount"])
    assert fields == ("none", "tokens", "centre", True, 1.0)


def test_words_need_to_know_which_tokens_end_a_response() -> None:
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="needs to know which tokens end a response"):
        OnPolicyLoss(preset("words"), SampledTokens(zeros, zeros, None, torch.tensor([2])))


def plain_returns(tokens: SampledTokens, discount: float, offset: float) -> list[list[float]]:
    assert tokens.reverse_kl is not None
    parts = tokens.reverse_kl.split(tokens.lengths.tolist())
    return [
        [
            sum(discount ** (k - t - 1) * (offset - float(part[k])) for k in range(t + 1, len(part)))
            for t in range(len(part))
        ]
        for part in parts
    ]


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("baseline", ["position", "prompt_position"])
def test_a_baseline_by_position_is_a_mean_of_the_others(baseline: str, words: bool) -> None:
    tokens, prompts = rollouts(), ["a", "b", "a", "b", "a"]
    objective = preset("words" if words else "rate", baseline=baseline, discount=0.9)
    tokens.is_end = torch.zeros(len(tokens.segments), dtype=torch.bool)
    tokens.is_end[tokens.lengths.cumsum(0) - 1] = torch.tensor([True, True, False, True, True])
    offsets, _ = leave_one_out.offsets(tokens, objective, prompts)
    tokens.offset = offsets[tokens.segments]
    got = leave_one_out.baselines_by_position(tokens, objective, prompts).split(tokens.lengths.tolist())
    ends = [part.tolist() for part in tokens.is_end.split(tokens.lengths.tolist())]
    mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
    for i in range(5):
        values = plain_returns(tokens, 0.9, float(offsets[i]))
        others = {
            (j, t): value
            for j in range(5)
            for t, value in enumerate(values[j])
            if j != i and not (words and ends[j][t])
        }
        for t in range(len(values[i])):
            at = [value for (_, s), value in others.items() if s == t]
            want = mean([*at, mean(list(others.values()))])
            if baseline == "prompt_position":
                want = mean([*(v for (j, s), v in others.items() if s == t and prompts[j] == prompts[i]), want])
            assert float(got[i][t]) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_a_baseline_by_position_does_not_depend_on_the_processes() -> None:
    tokens, objective = rollouts(), preset("rate", baseline="prompt_position", credit_offset="none")
    assert tokens.reverse_kl is not None
    prompts = ["a", "b", "a", "b", "a"]
    whole = leave_one_out.baselines_by_position(tokens, objective, prompts)
    payloads: list[Any] = []
    parts = []
    for chosen in ([0, 1, 2], [3, 4]):
        mine = torch.isin(tokens.segments, torch.tensor(chosen))
        old = tokens.student_logprobs[mine]
        part = SampledTokens(old, old, None, tokens.lengths[chosen], tokens.reverse_kl[mine])
        names = [prompts[i] for i in chosen]
        leave_one_out.baselines_by_position(part, objective, names, lambda x: payloads.append(x) or [x])
        parts.append((part, names))
    joined = [leave_one_out.baselines_by_position(part, objective, names, lambda _: payloads) for part, names in parts]
    torch.testing.assert_close(torch.cat(joined), whole)
