"""`token_scores` at its limits: excluded tokens, 16-bit numbers, compiled functions, and memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.data.rollouts import TeacherRows
from minillm.loss import divergences, elementwise
from minillm.loss.elementwise import Transforms
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, chunk_of, token_scores
from minillm.models.head import Head, LogitTransform, TeacherStates
from tests.loss.heads import DIVERGENCES, N, V, full_logits, known_rows, problem

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


@pytest.mark.parametrize(
    ("softcap", "dtype", "error"),
    [(None, torch.bfloat16, 5e-3), (5.0, torch.bfloat16, 5e-3), (None, torch.float32, 2e-6)],
)
def test_the_compiled_elementwise_part_is_the_eager_one(
    softcap: float | None, dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
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
        assert float((eager.float() - compiled.float()).norm()) < error * float(eager.float().norm())


@pytest.mark.parametrize("low", [-60.0, -79.0, -500.0, -torch.inf, torch.nan])
def test_one_logit_below_the_floor_is_enough_for_the_floor(low: float) -> None:
    """The compiled scores equal the plain ones in float64, whether the one low logit is in range, below it or NaN."""
    g = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(6, 64, generator=g), torch.randn(6, 64, generator=g)
    teacher[3, 5], targets = low, torch.full((6,), 5)
    transform = LogitTransform(None, 1.0, None, 1.0)
    transforms = Transforms(transform, LogitTransform(None, 1.0, None, 1.0))
    want = elementwise.measure(student.double(), teacher.double(), targets, transforms, torch.float64)
    got = elementwise.compiled()[0](student, teacher, targets, transforms, torch.float32)
    for single, double in zip(got, want, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_chunk_on_a_cpu_is_shorter_for_a_wide_vocabulary() -> None:
    assert [chunk_of(v, gpu=False) for v in (32, 49152, 262144, 1 << 26)] == [512, 512, 128, 1]
    assert chunk_of(262144, gpu=True) == 512


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
            self.matmuls += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
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
