"""The gradient of the probability that a response goes on, compared with autograd on full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.loss import elementwise
from minillm.loss.elementwise import Derivatives
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, TokenScores, token_scores
from minillm.loss.words import ChunkLogits, EndTokens
from minillm.models.head import LogitTransform
from tests.loss.heads import N, V, full_logits, known_rows, problem

ENDS = (3, 17, 39)


def loss_of(a: Tensor, r: Tensor, f: Tensor, g: Tensor) -> Any:
    def loss(part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        assert scores.going_on is not None
        value = (
            a[part] * scores.logq
            + r[part] * scores.reverse_kl
            + f[part] * scores.forward_kl
            + g[part] * scores.going_on
        )
        return value.sum(), ScoreGradients(a[part], r[part], f[part], going_on=g[part])

    return loss


@pytest.mark.parametrize("ends", [ENDS[:1], ENDS])
@pytest.mark.parametrize("head", [{}, {"bias": True}, {"softcap": 3.0}, {"scale": 0.3}])
@pytest.mark.parametrize("served", [False, True])
def test_the_gradient_is_that_of_autograd(head: dict[str, Any], ends: tuple[int, ...], served: bool) -> None:
    """Tokens that end a response and words are among the targets, with independent factors for all scores."""
    hidden, student, targets, teacher, (a, r, f) = problem(**head)
    g = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    targets[:2] = torch.tensor([3, 17])
    settings = ScoringSettings(temperature=0.7, chunk=5, end_ids=ends)
    given: Any = teacher
    if served:
        given, settings = (
            known_rows(full_logits(teacher.hidden, teacher.head), targets, 6),
            ScoringSettings(chunk=5, end_ids=ends),
        )
        f = torch.zeros_like(f)
    loss, scores = token_scores(hidden, student, targets, given, loss_fn=loss_of(a, r, f, g), settings=settings)
    inputs = [t for t in (hidden, student.weight, student.bias) if t is not None]
    got = torch.autograd.grad(loss, inputs)
    logq = torch.log_softmax(full_logits(hidden, student) / settings.temperature, -1)
    if served:
        logp = elementwise.complete_with_student(full_logits(hidden, student), given.ids, given.logprobs).detach()
    else:
        logp = torch.log_softmax(full_logits(teacher.hidden, teacher.head) / settings.temperature, -1)
    going_on = (1 - logq.exp()[:, list(ends)].sum(-1)).log()
    drawn = logq.gather(1, targets[:, None])[:, 0]
    want = (
        a * drawn + r * (logq.exp() * (logq - logp)).sum(-1) + g * going_on + f * (logp.exp() * (logp - logq)).sum(-1)
    )
    assert scores.going_on is not None
    torch.testing.assert_close(scores.going_on, going_on.detach(), rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(got, torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_word_has_no_gradient_by_the_end_and_sums_to_nothing() -> None:
    """With g = −a, the score of a word among words: no end token takes part, whatever its probability."""
    hidden, student, targets, _, (a, *_) = problem()
    targets = torch.where(torch.isin(targets, torch.tensor(ENDS)), 0, targets)
    projected = (hidden @ student.weight.t()).detach()
    transform = LogitTransform(None, 1.0, None, 1.0)
    transforms = elementwise.Transforms(transform, transform)
    measures = elementwise.measure(projected, projected, targets, transforms, torch.float64)
    chunk, ends = (
        ChunkLogits(projected, projected, targets, measures, transforms),
        EndTokens(ENDS, projected.device, torch.float64),
    )
    zero = torch.zeros_like(a)
    grad = ends.differentiate(
        elementwise.differentiate, chunk, Derivatives(a, zero, zero), -a, ends.going_on(chunk), torch.float64
    )
    assert float(grad[:, list(ENDS)].abs().max()) < 1e-12
    assert float(grad.sum(-1).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["plain", "compiled"])
def test_single_precision_is_near_where_the_end_is_almost_certain(kind: str) -> None:
    """1 − h is then below what float32 can tell from 0, and a word was sampled all the same."""
    function = {"plain": lambda: elementwise.differentiate, "compiled": lambda: elementwise.compiled()[1]}[kind]()
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, V, generator=g) for _ in range(2))
    student[:, 3] += torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0, 40.0])
    targets = torch.randint(4, 17, (6,), generator=g)
    transform = LogitTransform(None, 1.0, None, 1.0)
    transforms = elementwise.Transforms(transform, transform)
    grads = {}
    for wide in (torch.float64, torch.float32):
        s, t = student.to(wide), teacher.to(wide)
        measures = elementwise.measure(s, t, targets, transforms, wide)
        chunk, ends = ChunkLogits(s, t, targets, measures, transforms), EndTokens((3,), s.device, wide)
        a, zero = torch.ones(6, dtype=wide), torch.zeros(6, dtype=wide)
        going_on = ends.going_on(chunk)
        plain = elementwise.differentiate if wide == torch.float64 else function
        grads[wide] = ends.differentiate(plain, chunk, Derivatives(a, zero, zero), -a, going_on, wide).double()
    assert torch.isfinite(grads[torch.float32]).all()
    assert (
        float(grads[torch.float32].abs().max()) <= 1 + 1e-5
    )  # a score of a word is bounded by 1, however rare words are
    torch.testing.assert_close(grads[torch.float32][:3], grads[torch.float64][:3], rtol=1e-2, atol=1e-3)
