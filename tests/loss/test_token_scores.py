"""`token_scores`, compared with autograd through full logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.data.rollouts import TeacherRows
from minillm.loss import divergences
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, TokenScores, token_scores
from tests.loss.heads import DIVERGENCES, N, V, full_logits, known_rows, problem


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "scale"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_scores_and_gradients_are_those_of_full_logits(kind: str, chunk: int, temperature: float) -> None:
    hidden, head, targets, teacher_states, (a, b, c) = problem(
        bias=kind == "bias", softcap=3.0 if kind == "softcap" else None, scale=0.3 if kind == "scale" else 1.0
    )

    def loss_fn(part: slice, s: TokenScores) -> tuple[Tensor, ScoreGradients]:
        value = (a[part] * s.logq + b[part] * s.reverse_kl + c[part] * s.forward_kl).sum()
        return value, ScoreGradients(a[part], b[part], c[part])

    loss, scores = token_scores(
        hidden, head, targets, teacher_states, loss_fn=loss_fn, settings=ScoringSettings(temperature, chunk=chunk)
    )
    (2.5 * loss).backward()  # an upstream gradient that is not 1
    got = [hidden.grad, head.weight.grad, None if head.bias is None else head.bias.grad]
    leaves = [hidden, head.weight] + ([head.bias] if head.bias is not None else [])
    student, teacher = full_logits(hidden, head), full_logits(teacher_states.hidden, teacher_states.head)
    logq = torch.log_softmax(student / temperature, -1).gather(1, targets[:, None])[:, 0]
    reverse = divergences.reverse_kl(student, teacher, temperature)
    forward = divergences.forward_kl(student, teacher, temperature)
    expected = (a * logq + b * reverse + c * forward).sum()
    want = torch.autograd.grad(2.5 * expected, leaves)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(got, want, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores.logq, logq.detach())
    torch.testing.assert_close(scores.reverse_kl, reverse.detach())
    torch.testing.assert_close(scores.forward_kl, forward.detach())
    torch.testing.assert_close(scores.entropy, divergences.entropy(student.detach(), temperature))
    logp = torch.log_softmax(teacher / temperature, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scores.logp, logp)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_any_divergence_can_join(name: str, kind: str) -> None:
    hidden, head, targets, teacher_states, (a, b, _) = problem(softcap=3.0 if kind == "softcap" else None)
    loss, scores = token_scores(
        hidden,
        head,
        targets,
        teacher_states,
        divergence=DIVERGENCES[name],
        settings=ScoringSettings(0.6, chunk=7),
        loss_fn=lambda part, s: (
            (a[part] * s.logq + b[part] * s.divergence).sum(),  # pyright: ignore
            ScoreGradients(a[part], divergence=b[part]),
        ),
    )
    got = torch.autograd.grad(3 * loss, [hidden, head.weight])
    student, teacher = full_logits(hidden, head), full_logits(teacher_states.hidden, teacher_states.head)
    values = DIVERGENCES[name](student / 0.6, teacher / 0.6)
    logq = torch.log_softmax(student / 0.6, -1).gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad(3 * (a * logq + b * values).sum(), [hidden, head.weight])
    torch.testing.assert_close(scores.divergence, values.detach(), rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("text_temperature", [1.0, 0.6, 1.7])
def test_text_has_a_temperature_of_its_own(kind: str, text_temperature: float) -> None:
    hidden, head, targets, teacher_states, (a, b, c) = problem(
        bias=kind == "bias", softcap=3.0 if kind == "softcap" else None
    )
    loss, scores = token_scores(
        hidden,
        head,
        targets,
        teacher_states,
        settings=ScoringSettings(0.6, text_temperature, chunk=7),
        divergence=divergences.total_variation,
        loss_fn=lambda part, s: (
            (
                a[part] * s.text_logq + b[part] * s.text_forward_kl + c[part] * (s.logq + s.reverse_kl + s.divergence)  # pyright: ignore
            ).sum(),
            ScoreGradients(c[part], c[part], None, c[part], a[part], b[part]),
        ),
    )
    leaves = [hidden, head.weight] + ([head.bias] if head.bias is not None else [])
    got = torch.autograd.grad(loss, leaves)
    student, teacher = full_logits(hidden, head), full_logits(teacher_states.hidden, teacher_states.head)
    logq, text_logq = (
        torch.log_softmax(student / t, -1).gather(1, targets[:, None])[:, 0] for t in (0.6, text_temperature)
    )
    text_forward = divergences.forward_kl(student, teacher, text_temperature)
    rest = logq + divergences.reverse_kl(student, teacher, 0.6) + divergences.total_variation(student, teacher, 0.6)
    want = (a * text_logq + b * text_forward + c * rest).sum()
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores.text_logq, text_logq.detach())
    torch.testing.assert_close(scores.text_forward_kl, text_forward.detach())
    torch.testing.assert_close(scores.logq, logq.detach())
    for ours, theirs in zip(got, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def partition(log_probs: Tensor, ids: Tensor) -> list[Tensor]:
    """Return, for each position, the probabilities of the tokens in `ids` and of all others together."""
    cells = []
    for row, named in zip(log_probs.exp(), ids, strict=True):
        named = sorted(set(named.tolist()))
        rest = [token for token in range(V) if token not in named]
        cells.append(torch.cat([row[named], row[rest].sum()[None]]))
    return cells


@pytest.mark.parametrize("kind", ["plain", "softcap"])
@pytest.mark.parametrize("chunk", [5, 64])
def test_of_a_teacher_that_tells_some_tokens_the_others_are_one_event(kind: str, chunk: int) -> None:
    hidden, head, targets, teacher_states, (a, b, c) = problem(softcap=3.0 if kind == "softcap" else None)
    student, teacher = full_logits(hidden, head), full_logits(teacher_states.hidden, teacher_states.head)
    rows = known_rows(teacher, targets, 6)
    loss, scores = token_scores(
        hidden,
        head,
        targets,
        rows,
        settings=ScoringSettings(chunk=chunk),
        loss_fn=lambda part, s: (
            (a[part] * s.logq + b[part] * s.reverse_kl + c[part] * s.forward_kl).sum(),
            ScoreGradients(a[part], b[part], c[part]),
        ),
    )
    loss.backward()
    q, p = partition(torch.log_softmax(student, -1), rows.ids), partition(torch.log_softmax(teacher, -1), rows.ids)
    reverse = torch.stack([(x * (x.log() - y.log())).sum() for x, y in zip(q, p, strict=True)])
    forward = torch.stack([(y * (y.log() - x.log())).sum() for x, y in zip(q, p, strict=True)])
    logq = torch.log_softmax(student, -1).gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad((a * logq + b * reverse + c * forward).sum(), [hidden, head.weight])
    torch.testing.assert_close(scores.reverse_kl, reverse.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores.forward_kl, forward.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores.logp, rows.logprobs[:, 0])
    for ours, theirs in zip([hidden.grad, head.weight.grad], want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    # The docstring says how much lower KL(q‖p) of the partition is: q(others) · KL within the others.
    whole = divergences.reverse_kl(student, teacher)
    within = torch.zeros(N, dtype=torch.float64)
    for i, named in enumerate(rows.ids):
        rest = [token for token in range(V) if token not in named.tolist()]
        mass = torch.softmax(student[i], -1)[rest].sum()
        within[i] = mass * divergences.reverse_kl(student[i : i + 1, rest], teacher[i : i + 1, rest])[0]
    torch.testing.assert_close((whole - reverse).detach(), within.detach(), rtol=1e-8, atol=1e-10)


def test_a_teacher_that_tells_every_token_is_a_teacher_at_hand() -> None:
    hidden, head, targets, teacher_states, (_, b, _) = problem()
    teacher = full_logits(teacher_states.hidden, teacher_states.head)
    everything = torch.stack([torch.tensor([y, *(v for v in range(V) if v != y)]) for y in targets.tolist()])
    rows = TeacherRows(everything, torch.log_softmax(teacher, -1).gather(1, everything))
    loss_fn = lambda part, s: ((b[part] * s.reverse_kl).sum(), ScoreGradients(reverse_kl=b[part]))  # noqa: E731
    grads = []
    for known in (rows, teacher_states):
        loss, scores = token_scores(hidden, head, targets, known, loss_fn=loss_fn)
        grads.append((*torch.autograd.grad(loss, [hidden, head.weight]), scores.reverse_kl, scores.forward_kl))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_chunks_come_from_the_last_to_the_first() -> None:
    hidden, head, targets, teacher_states, _ = problem()
    seen: list[tuple[int, int]] = []

    def loss_fn(part: slice, s: TokenScores) -> tuple[Tensor, ScoreGradients]:
        seen.append((part.start, part.stop))
        return s.logq.sum() * 0, ScoreGradients()

    token_scores(hidden, head, targets, teacher_states, loss_fn=loss_fn, settings=ScoringSettings(chunk=10))
    assert seen == [(20, 23), (10, 20), (0, 10)]


def test_a_frozen_head_gets_no_gradient_and_the_states_do() -> None:
    grads = []
    for trained in (True, False):
        hidden, head, targets, teacher_states, (a, _, _) = problem()
        head.weight.requires_grad_(trained)
        loss, _ = token_scores(
            hidden,
            head,
            targets,
            teacher_states,
            loss_fn=lambda part, s, a=a: ((a[part] * s.logq).sum(), ScoreGradients(a[part])),
        )
        loss.backward()
        assert (head.weight.grad is not None) is trained
        grads.append(hidden.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)


def test_the_heads_gradient_accumulates_in_place() -> None:
    """The tensor that the backward pass returns becomes the gradient, and later ones are added to it."""
    hidden, head, targets, teacher_states, (a, _, _) = problem(torch.float32)
    places, sums = [], []
    for _ in range(3):
        loss, _ = token_scores(
            hidden,
            head,
            targets,
            teacher_states,
            settings=ScoringSettings(width=30, chunk=7),
            loss_fn=lambda part, s: ((a[part] * s.reverse_kl).sum(), ScoreGradients(None, a[part])),
        )
        loss.backward()
        assert head.weight.grad is not None
        places.append(head.weight.grad.data_ptr())
        sums.append(head.weight.grad.clone())
        assert not head.weight.grad[30:].any()
    assert len(set(places)) == 1
    torch.testing.assert_close(sums[2], 3 * sums[0])
