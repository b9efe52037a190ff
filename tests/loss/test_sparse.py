"""Weights of a few tokens as the teacher, compared with autograd through full logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.data.rollouts import SparseTargets
from minillm.errors import InputError
from minillm.loss.config import DivergenceConfig
from minillm.loss.divergences import divergence_function, reverse_kl
from minillm.loss.supervised import SupervisedLoss
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, TokenScores, token_scores
from tests.loss.heads import N, V, full_logits, known_rows, problem


def some_targets(slots: int = 6) -> SparseTargets:
    """Random weights; in every row one token occurs twice and one slot has no weight."""
    g = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(V, generator=g)[:slots] for _ in range(N)])
    ids[:, 1] = ids[:, 0]
    weights = torch.rand(N, slots, generator=g, dtype=torch.float64)
    weights[:, 2] = 0.0
    return SparseTargets(ids, weights)


def dense(targets: SparseTargets) -> Tensor:
    return torch.zeros(N, V, dtype=torch.float64).scatter_add(1, targets.ids, targets.weights.double())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "scale"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_score_and_gradient_are_those_of_full_logits(kind: str, chunk: int, temperature: float) -> None:
    hidden, head, labels, _, (a, b, c) = problem(
        bias=kind == "bias", softcap=3.0 if kind == "softcap" else None, scale=0.3 if kind == "scale" else 1.0
    )
    targets = some_targets()
    targets.ids[::2, 3] = labels[::2]  # the hard label is one of the tokens

    def loss_fn(part: slice, s: TokenScores) -> tuple[Tensor, ScoreGradients]:
        assert s.target_cross_entropy is not None
        value = (a[part] * s.logq + b[part] * s.target_cross_entropy + c[part] * s.text_logq).sum()
        return value, ScoreGradients(logq=a[part], target_cross_entropy=b[part], text_logq=c[part])

    settings = ScoringSettings(temperature, 1.3, chunk=chunk)
    loss, scores = token_scores(hidden, head, labels, targets, loss_fn=loss_fn, settings=settings)
    (2.5 * loss).backward()
    got = [hidden.grad, head.weight.grad, None if head.bias is None else head.bias.grad]
    leaves = [hidden, head.weight] + ([head.bias] if head.bias is not None else [])
    student = full_logits(hidden, head)
    logq, text = (torch.log_softmax(student / t, -1) for t in (temperature, 1.3))
    cross = -(dense(targets) * logq).sum(-1)
    own, own_text = (values.gather(1, labels[:, None])[:, 0] for values in (logq, text))
    expected = (a * own + b * cross + c * own_text).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores.target_cross_entropy, cross.detach())
    for ours, theirs in zip(got, torch.autograd.grad(2.5 * expected, leaves), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def update(teacher: object, share: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    hidden, head, labels, _, _ = problem(dtype)
    loss_fn = SupervisedLoss(share, N)
    loss, _ = token_scores(hidden, head, labels, teacher, loss_fn=loss_fn)  # pyright: ignore[reportArgumentType]
    return [loss, *torch.autograd.grad(loss, [hidden, head.weight])]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_all_tokens_give_the_update_of_the_live_teacher(share: float) -> None:
    """The loss differs by the teacher's entropy, and the gradient not at all: forward KL and cross-entropy are one."""
    *_, teacher, _ = problem()
    p = torch.softmax(full_logits(teacher.hidden, teacher.head), -1)
    targets = SparseTargets(torch.arange(V).expand(N, V), p)
    (live, *expected), (kept, *got) = update(teacher, share), update(targets, share)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(kept - (1 - share) * entropy, live, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_one_token_of_weight_one_is_the_hard_label() -> None:
    *_, labels, _, _ = problem()
    targets = SparseTargets(labels[:, None], torch.ones(N, 1))
    for ours, theirs in zip(update(targets, 0.4), update(None, 1.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_hard_label_may_be_one_more_token() -> None:
    """(1−α)·CE + α·KD is one set of weights: a schedule of α needs no second pass."""
    *_, labels, _, _ = problem()
    targets = some_targets()
    mixed = SparseTargets(
        torch.cat([targets.ids, labels[:, None]], 1),
        torch.cat([0.7 * targets.weights, torch.full((N, 1), 0.3, dtype=torch.float64)], 1),
    )
    for ours, theirs in zip(update(mixed, 0.0), update(targets, 0.3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mse_to_the_weights_is_that_of_full_logits(temperature: float) -> None:
    hidden, head, labels, _, _ = problem()
    targets = some_targets()
    targets.weights /= targets.weights.sum(-1, keepdim=True)
    config = DivergenceConfig(name="mse")
    loss_fn, settings = SupervisedLoss(0.3, N, config), ScoringSettings(temperature, 1.0, chunk=7)
    loss, _ = token_scores(
        hidden, head, labels, targets, loss_fn=loss_fn, divergence=divergence_function(config), settings=settings
    )
    got = torch.autograd.grad(loss, [hidden, head.weight])
    student = full_logits(hidden, head)
    nll = -torch.log_softmax(student, -1).gather(1, labels[:, None])[:, 0]
    error = (torch.softmax(student / temperature, -1) - dense(targets)).square().sum(-1)
    expected = (0.3 * nll + 0.7 * error).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(got, torch.autograd.grad(expected, [hidden, head.weight]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert loss_fn.tally.sums.keys() == {"divergence", "target_cross_entropy", "tokens", "cross_entropy", "entropy"}


def test_the_mean_gradient_of_mse_over_unbiased_weights_is_that_to_p() -> None:
    """One token, drawn from p, has weight 1. All draws are enumerated, each weighted by its probability."""
    hidden, head, labels, teacher, _ = problem()
    p = torch.softmax(full_logits(teacher.hidden, teacher.head), -1).detach()
    config = DivergenceConfig(name="mse")

    def gradient(targets: SparseTargets, share: Tensor) -> Tensor:
        loss_fn, divergence = SupervisedLoss(0.0, 1 / share, config), divergence_function(config)
        loss, _ = token_scores(hidden, head, labels, targets, loss_fn=loss_fn, divergence=divergence)
        return torch.autograd.grad(loss, head.weight)[0]

    full = gradient(SparseTargets(torch.arange(V).expand(N, V), p), torch.ones(N, dtype=torch.float64))
    ones = torch.ones(N, 1)
    mean = sum(gradient(SparseTargets(torch.full((N, 1), token), ones), p[:, token]) for token in range(V))
    torch.testing.assert_close(mean, full, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["hard label", "top-k", "counts of draws", "drawn tokens, renormalised p"])
def test_every_kind_of_targets_is_a_choice_of_weights(kind: str) -> None:
    hidden, head, labels, teacher, _ = problem()
    p = torch.softmax(full_logits(teacher.hidden, teacher.head), -1).detach()
    if kind == "hard label":
        ids, weights = labels[:, None], torch.ones(N, 1, dtype=torch.float64)
    elif kind == "top-k":  # arXiv 2410.16215
        top, ids = p.topk(5, -1)
        weights = top / top.sum(-1, keepdim=True)
    else:
        ids = torch.multinomial(p, 9, replacement=True, generator=torch.Generator().manual_seed(4))
        weights = torch.full((N, 9), 1 / 9, dtype=torch.float64)  # RS-KD; a token that is drawn twice counts twice
        if kind == "drawn tokens, renormalised p":  # Gemma
            first = torch.stack([torch.tensor([t not in row[:i] for i, t in enumerate(row)]) for row in ids.tolist()])
            weights = torch.where(first, p.gather(1, ids), 0.0)
            weights = weights / weights.sum(-1, keepdim=True)
    target = torch.zeros(N, V, dtype=torch.float64).scatter_add(1, ids, weights)
    expected = -(target * torch.log_softmax(full_logits(hidden, head), -1)).sum(-1).mean()
    loss, _ = token_scores(hidden, head, labels, SparseTargets(ids, weights), loss_fn=SupervisedLoss(0.0, N))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(x, [hidden, head.weight]) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_partition_is_at_most_as_far_and_as_far_where_the_tails_are_proportional() -> None:
    """The chain rule of the KL, for rows of a few log-probabilities in place of weights."""
    hidden, head, labels, teacher, _ = problem()
    rows = known_rows(full_logits(teacher.hidden, teacher.head), labels, 6)
    _, scores = token_scores(hidden, head, labels, rows)
    logq = torch.log_softmax(full_logits(hidden, head), -1).detach()
    logp = torch.log_softmax(full_logits(teacher.hidden, teacher.head), -1)
    known = torch.zeros(N, V, dtype=torch.bool).scatter(1, rows.ids, True)
    p, q = logp.exp(), logq.exp()
    rest_p, rest_q = (torch.where(known, 0.0, x).sum(-1, keepdim=True) for x in (p, q))
    proportional = torch.where(known, logp, logq + (rest_p / rest_q).log())
    for got, a, b in ((scores.forward_kl, logp, logq), (scores.reverse_kl, logq, logp)):
        assert bool((got <= (a.exp() * (a - b)).sum(-1) + 1e-12).all())
    for got, a, b in ((scores.forward_kl, proportional, logq), (scores.reverse_kl, logq, proportional)):
        torch.testing.assert_close(got, (a.exp() * (a - b)).sum(-1), rtol=1e-9, atol=1e-11)


def test_float32_is_close_to_float64() -> None:
    targets = some_targets()
    for ours, theirs in zip(update(targets, 0.2, torch.float32), update(targets, 0.2), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_what_is_not_linear_in_p_is_refused() -> None:
    hidden, head, labels, _, (a, _, _) = problem()
    targets = some_targets()
    with pytest.raises(InputError, match="unbiased only in what is linear in p"):
        token_scores(hidden, head, labels, targets, divergence=reverse_kl)

    def reverse(part: slice, s: TokenScores) -> tuple[Tensor, ScoreGradients]:
        return (a[part] * s.reverse_kl).sum(), ScoreGradients(reverse_kl=a[part])

    with pytest.raises(InputError, match="live teacher"):
        token_scores(hidden, head, labels, targets, loss_fn=reverse)
    short = SparseTargets(targets.ids[1:], targets.weights[1:])
    with pytest.raises(InputError, match="for 23 tokens"):
        token_scores(hidden, head, labels, short, loss_fn=SupervisedLoss(0.0, N, DivergenceConfig(name="forward_kl")))
