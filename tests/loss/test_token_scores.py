"""`token_scores`, compared with autograd through full logits in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.data.rollouts import TeacherRows
from minillm.loss import divergences, elementwise
from minillm.loss.token_scores import Divergence, ScoreGradients, ScoringSettings, TokenScores, token_scores
from minillm.models.head import Head, TeacherStates

N, H, HP, V = 23, 8, 12, 40


def problem(dtype: torch.dtype = torch.float64, bias: bool = False, softcap: float | None = None, scale: float = 1.0):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    hidden, teacher_hidden = make(N, H).requires_grad_(), make(N, HP)
    head = Head(make(V, H).requires_grad_(), make(V).requires_grad_() if bias else None, scale, softcap)
    teacher_states = TeacherStates(teacher_hidden, Head(make(V, HP), None, 1.0, None))
    targets = torch.randint(30, (N,), generator=g)
    return hidden, head, targets, teacher_states, (make(N), make(N), make(N))


def full_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


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


DIVERGENCES: dict[str, Divergence] = {
    "reverse KL, by definition": divergences.reverse_kl,
    "Jensen-Shannon": partial(divergences.jensen_shannon, beta=0.3),
    "skew forward": partial(divergences.skew_forward_kl, skew=0.1),
    "skew reverse": partial(divergences.skew_reverse_kl, skew=0.1),
    "total variation": divergences.total_variation,
    "adaptive": divergences.adaptive_kl,
    "alpha-beta": partial(divergences.alpha_beta, alpha=0.2, beta=0.7),
}


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


MASKED = {"student": [3], "teacher": [5, 6], "both": [30, 31]}


def masked_problem(dtype: torch.dtype, least: float):
    """Heads whose bias excludes some tokens. Some targets are excluded by the student only, or by the teacher only."""
    hidden, head, targets, teacher_states, weights = problem(torch.float64, bias=True)
    assert head.bias is not None
    bias, teacher_bias = head.bias.detach().clone(), torch.zeros(V, dtype=torch.float64)
    bias[MASKED["student"] + MASKED["both"]] = least
    teacher_bias[MASKED["teacher"] + MASKED["both"]] = least
    targets[:3] = torch.tensor([3, 5, 30])
    head = Head(head.weight.detach().to(dtype).requires_grad_(), bias.to(dtype))
    teacher_head = Head(teacher_states.head.weight.to(dtype), teacher_bias.to(dtype))
    hidden = hidden.detach().to(dtype).requires_grad_()
    teacher_states = TeacherStates(teacher_states.hidden.to(dtype), teacher_head)
    return hidden, head, targets, teacher_states, weights


def floored(hidden: Tensor, head: Head) -> Tensor:
    """Log-probabilities with the lower limit, from low but finite logits. The gradient ignores the limit."""
    assert head.bias is not None
    logs = torch.log_softmax(hidden @ head.weight.t() + head.bias.clamp(min=-300.0), -1)
    return logs + (logs.clamp(min=-80.0) - logs).detach()


@pytest.mark.parametrize("least", [-torch.inf, -1e30, -9999.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_model_excludes_has_the_least_log_probability(least: float, compiled: bool) -> None:
    from minillm.loss import token_scores as module

    hidden, head, targets, teacher_states, (a, b, c) = masked_problem(torch.float64, least)
    functions = elementwise.compiled() if compiled else (elementwise.measure, elementwise.differentiate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "elementwise_functions", lambda *_: functions)
        loss, scores = token_scores(
            hidden,
            head,
            targets,
            teacher_states,
            settings=ScoringSettings(chunk=7),
            loss_fn=lambda part, s: (
                (a[part] * s.logq + b[part] * s.reverse_kl + c[part] * s.forward_kl).sum(),
                ScoreGradients(a[part], b[part], c[part]),
            ),
        )
    got = torch.autograd.grad(loss, [hidden, head.weight])
    q, p = floored(hidden, head), floored(teacher_states.hidden, teacher_states.head)
    reverse, forward = (q.exp() * (q - p)).sum(-1), (p.exp() * (p - q)).sum(-1)
    logq = q.gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad((a * logq + b * reverse + c * forward).sum(), [hidden, head.weight])
    torch.testing.assert_close(scores.reverse_kl, reverse.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores.forward_kl, forward.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores.logq, logq.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores.logp, p.gather(1, targets[:, None])[:, 0], rtol=1e-9, atol=1e-9)
    assert float(scores.logq[0]) == float(scores.logp[1]) == -80.0
    # A token that only the teacher excludes costs the student almost 80 nats per unit of probability.
    mass = q.detach().exp()[:, MASKED["teacher"]].sum(-1)
    assert (scores.reverse_kl > 60 * mass - 1).all()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [None, *DIVERGENCES, "alpha-beta, negative"])
def test_exclusion_leaves_every_score_and_gradient_finite(dtype: torch.dtype, name: str | None) -> None:
    if dtype == torch.float16 and name == "alpha-beta, negative":
        pytest.skip("the gradient of a power of e^60 is beyond float16")
    known = DIVERGENCES | {"alpha-beta, negative": partial(divergences.alpha_beta, alpha=-2.0, beta=1.5)}
    hidden, head, targets, teacher_states, (a, b, c) = masked_problem(dtype, -torch.inf)
    a, b, c = (w.float() if dtype.itemsize < 8 else w for w in (a, b, c))
    loss, scores = token_scores(
        hidden,
        head,
        targets,
        teacher_states,
        divergence=None if name is None else known[name],
        settings=ScoringSettings(temperature=0.7, text_temperature=1.0, chunk=7),
        loss_fn=lambda part, s: (
            (s.text_logq + s.reverse_kl).sum() + (0 if s.divergence is None else s.divergence.sum()),
            ScoreGradients(a[part], b[part], c[part], None if name is None else c[part], a[part], b[part]),
        ),
    )
    loss.backward()
    for value in (hidden.grad, head.weight.grad, loss.detach(), *(v for v in vars(scores).values() if v is not None)):
        assert value is not None
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("least", [-torch.inf, -9999.0])
@pytest.mark.parametrize("name", [None, "Jensen-Shannon", "adaptive"])
def test_a_served_teachers_zero_is_a_mass_of_zero(least: float, name: str | None) -> None:
    """vLLM writes −9999 for −∞. Both become the lower limit; the others share the remaining probability."""
    hidden, head, targets, teacher_states, (_, b, c) = problem()
    rows = known_rows(full_logits(teacher_states.hidden, teacher_states.head), targets, 6)
    found = []
    for value in (least, -80.0):
        logprobs = rows.logprobs.clone()
        logprobs[:, 2] = torch.where(rows.ids[:, 2] == targets, logprobs[:, 2], value)
        logprobs[:2] = logprobs[:2].masked_fill(rows.ids[:2] == targets[:2, None], value)  # the sampled token itself
        loss, scores = token_scores(
            hidden,
            head,
            targets,
            TeacherRows(rows.ids, logprobs),
            settings=ScoringSettings(chunk=5),
            divergence=None if name is None else DIVERGENCES[name],
            loss_fn=lambda part, s: (
                (b[part] * s.reverse_kl + c[part] * s.forward_kl).sum()
                + (0 if s.divergence is None else s.divergence.sum()),
                ScoreGradients(None, b[part], c[part], None if name is None else torch.ones_like(b[part])),
            ),
        )
        grads = torch.autograd.grad(loss, [hidden, head.weight])
        found.append([*grads, *(v for v in vars(scores).values() if v is not None)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


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


def known_rows(teacher: Tensor, targets: Tensor, k: int) -> TeacherRows:
    """Return log p [N, 1+k] of the sampled token and of k others, some of which repeat it."""
    g = torch.Generator().manual_seed(1)
    others = torch.stack([torch.randperm(V, generator=g)[:k] for _ in targets])
    ids = torch.cat([targets[:, None], others], 1)
    return TeacherRows(ids, torch.log_softmax(teacher, -1).gather(1, ids))


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


def test_float32_is_within_1e_5_of_float64() -> None:
    grads = {}
    for dtype in (torch.float64, torch.float32):
        hidden, head, targets, teacher_states, (a, b, _) = problem(dtype)
        loss, _ = token_scores(
            hidden,
            head,
            targets,
            teacher_states,
            settings=ScoringSettings(chunk=5),
            loss_fn=lambda part, s, a=a, b=b: (
                (a[part] * s.logq + b[part] * s.reverse_kl).sum(),
                ScoreGradients(a[part], b[part]),
            ),
        )
        loss.backward()
        assert head.weight.grad is not None
        assert hidden.grad is not None
        grads[dtype] = head.weight.grad.double(), hidden.grad.double()
    for single, double in zip(grads[torch.float32], grads[torch.float64], strict=True):
        assert (single - double).norm() < 1e-5 * double.norm()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_compiled_elementwise_part_is_the_eager_one(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g).bfloat16()  # noqa: E731
    hidden, teacher_hidden = make(96, 16), make(96, 16)
    weight, teacher_weight, bias = make(50_000, 16), make(50_000, 16), make(50_000)
    targets, (a, b, c) = torch.randint(50_000, (96,), generator=g), torch.rand(3, 96, generator=g)
    found = []
    for threshold in (1 << 40, 1):
        monkeypatch.setattr(elementwise, "COMPILE_FROM", threshold)
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, scores = token_scores(
            states,
            Head(head, bias, 1.0, softcap),
            targets,
            TeacherStates(teacher_hidden, Head(teacher_weight, bias)),
            loss_fn=lambda part, s: (
                (a[part] * s.logq + b[part] * s.reverse_kl + c[part] * s.forward_kl).sum(),
                ScoreGradients(a[part], b[part], c[part]),
            ),
        )
        loss.backward()
        found.append(
            [states.grad, head.grad, scores.logq, scores.logp, scores.reverse_kl, scores.forward_kl, scores.entropy]
        )
    for eager, compiled in zip(*found, strict=True):
        assert float((eager.float() - compiled.float()).norm()) < 5e-3 * float(eager.float().norm())


def test_float16_keeps_gradients_that_are_shares_of_many_tokens() -> None:
    """Weights of 1e-5 times probabilities of 1e-3 become 0 in float16 unless they are scaled first."""
    errors = {}
    for dtype in (torch.float16, torch.float64):
        hidden, head, targets, teacher_states, _ = problem(torch.float64)
        hidden, head = hidden.detach().to(dtype).requires_grad_(), Head(head.weight.detach().to(dtype).requires_grad_())
        teacher_states = TeacherStates(teacher_states.hidden.to(dtype), Head(teacher_states.head.weight.to(dtype)))
        share = torch.full((N,), 1e-5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        loss, _ = token_scores(
            hidden,
            head,
            targets,
            teacher_states,
            settings=ScoringSettings(chunk=5),
            loss_fn=lambda part, s, share=share: (
                (share[part] * s.reverse_kl).sum(),
                ScoreGradients(None, share[part]),
            ),
        )
        (loss * 65536).backward()  # what a loss scaler does
        assert head.weight.grad is not None
        errors[dtype] = head.weight.grad.double()
    assert (errors[torch.float16] - errors[torch.float64]).norm() < 0.01 * errors[torch.float64].norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_matmuls_and_live_memory(frozen: bool) -> None:
    """There are four matrix products per chunk, three with a frozen head, and no tensor as large as [N, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    g = torch.Generator().manual_seed(0)
    n, v, h = 64, 1000, 8
    hidden = torch.randn(n, h, generator=g).requires_grad_()
    head = Head(torch.randn(v, h, generator=g).requires_grad_(not frozen))
    teacher_states = TeacherStates(torch.randn(n, h, generator=g), Head(torch.randn(v, h, generator=g)))
    targets, one = torch.randint(v, (n,), generator=g), torch.ones(n)

    class Watch(TorchDispatchMode):
        matmuls, largest = 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.matmuls += func is torch.ops.aten.mm.default
            if isinstance(out, Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    with Watch() as watch:
        loss, _ = token_scores(
            hidden,
            head,
            targets,
            teacher_states,
            settings=ScoringSettings(chunk=16),
            loss_fn=lambda part, s: (s.reverse_kl.sum(), ScoreGradients(None, one[part])),
        )
        loss.backward()
    assert watch.matmuls == (3 if frozen else 4) * n // 16
    assert watch.largest == 16 * v


def test_bfloat16_is_no_worse_than_full_logits_in_bfloat16() -> None:
    """With the vocabulary size of the quickstart, and the compiled elementwise part."""
    g = torch.Generator().manual_seed(2)
    n, v, h = 96, 49152, 64
    hidden, teacher_hidden = torch.randn(n, h, generator=g).bfloat16(), torch.randn(n, h, generator=g).bfloat16()
    weight, teacher_weight = ((3 * torch.randn(v, h, generator=g) / h**0.5).bfloat16() for _ in range(2))
    targets, share = torch.randint(v, (n,), generator=g), torch.full((n,), 1 / n)

    def full(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        student, teacher = leaves[0] @ leaves[1].t(), teacher_hidden.to(dtype) @ teacher_weight.to(dtype).t()
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        grads = torch.autograd.grad(divergences.reverse_kl(student.to(wide), teacher.to(wide)).mean(), leaves)
        return grads[0].double(), grads[1].double()

    states, head = hidden.clone().requires_grad_(), Head(weight.clone().requires_grad_())
    loss, _ = token_scores(
        states,
        head,
        targets,
        TeacherStates(teacher_hidden, Head(teacher_weight)),
        loss_fn=lambda part, s: ((share[part] * s.reverse_kl).sum(), ScoreGradients(None, share[part])),
    )
    ours = torch.autograd.grad(loss, [states, head.weight])
    for got, rounded, exact in zip(ours, full(torch.bfloat16), full(torch.float64), strict=True):
        assert (got.double() - exact).norm() <= 1.05 * (rounded - exact).norm()


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
