"""The share of a gradient that is signal: sketches of gradients, and what several responses agree on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.loss.signal import SIZE, GradientSketch, SketchSums
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, TokenScores, token_scores
from tests.loss.heads import N, full_logits, problem


def test_a_chunk_is_seen_with_both_gradients() -> None:
    """The two gradients are those of autograd, for the part by log q and by log(1−q(end)), and for the whole loss."""
    hidden, student, targets, teacher, (a, r, _) = problem(bias=True)
    seen: dict[int, tuple[Tensor, ...]] = {}

    def loss_fn(part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        assert scores.going_on is not None
        value = (a[part] * (scores.logq - scores.going_on) + r[part] * scores.reverse_kl).sum()
        return value, ScoreGradients(a[part], r[part], going_on=-a[part])

    def sketch(part: slice, *given: Tensor) -> None:
        seen[part.start] = tuple(x.clone() for x in given)

    token_scores(
        hidden,
        student,
        targets,
        teacher,
        loss_fn=loss_fn,
        settings=ScoringSettings(chunk=7, end_ids=(39,)),
        sketch=sketch,
    )
    states, policy, whole = (torch.cat([seen[start][i] for start in sorted(seen)]) for i in range(3))
    logits = full_logits(hidden, student).detach().requires_grad_()
    logq, logp = torch.log_softmax(logits, -1), torch.log_softmax(full_logits(teacher.hidden, teacher.head), -1)
    drawn = logq.gather(1, targets[:, None])[:, 0] - (1 - logq[:, 39].exp()).log()
    [want] = torch.autograd.grad((a * drawn).sum(), logits, retain_graph=True)
    kl = (logq.exp() * (logq - logp)).sum(-1)
    [rest] = torch.autograd.grad((r * kl).sum(), logits)
    torch.testing.assert_close(states, hidden.detach())
    torch.testing.assert_close(policy, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole, want + rest, rtol=1e-9, atol=1e-12)


def gradients(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(40, 300), draw(40, 300), draw(40, 64), torch.arange(5).repeat_interleave(8)


@pytest.mark.parametrize("chunk", [7, 40])
def test_sums_are_of_the_sketched_gradients_of_each_response(chunk: int) -> None:
    """Text after the sampled tokens does not count, and chunks may divide a response."""
    long_term, whole, states, segments = gradients()
    sketch = GradientSketch(segments[:32], 4)
    for start in range(0, 40, chunk):
        part = slice(start, min(start + chunk, 40))
        sketch(part, states[part], long_term[part], whole[part])
    sums = sketch.sums()
    assert sums.responses == 4
    norms = []
    for grad in (long_term, whole - long_term):
        parts = [grad[segments == i].t() @ states[segments == i] for i in range(4)]
        norms.append((float(sum(parts[1:], parts[0]).square().sum()), sum(float(p.square().sum()) for p in parts)))
    _, found = sums.signal()
    for place, (total, squares) in enumerate(norms):
        assert float(found[place]) == pytest.approx(total, rel=0.3)  # the sketch of k = 32
        assert float(sums.squares[place]) == pytest.approx(squares, rel=0.3)


def test_signal_is_what_responses_agree_on() -> None:
    g = torch.Generator().manual_seed(1)
    common, estimates = torch.randn(SIZE * SIZE, generator=g, dtype=torch.float64), []
    for _ in range(400):
        noise = 3 * torch.randn(6, SIZE * SIZE, generator=g, dtype=torch.float64)
        sums = SketchSums()
        for rows in (noise[:2], noise[2:]):
            parts = torch.stack([rows + common, rows])
            sums.add(SketchSums(parts.sum(1), parts.square().sum((1, 2)), len(rows)))
        estimates.append(sums.signal()[0])
    mean = torch.stack(estimates).mean(0)
    assert float(mean[0]) == pytest.approx(36 * float(common.square().sum()), rel=0.02)
    assert abs(float(mean[1])) < 0.02 * float(mean[0])


def test_without_tokens_there_is_nothing() -> None:
    sketch: Any = GradientSketch(torch.zeros(0, dtype=torch.long), 0)
    sketch(slice(0, N), torch.zeros(N, 3), torch.zeros(N, 5), torch.zeros(N, 5))
    assert sketch.sums().responses == 0
