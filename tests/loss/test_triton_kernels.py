"""The Triton kernels, run by Triton's interpreter on the CPU, compared with the plain functions that they implement."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from minillm.loss import elementwise as plain
from minillm.loss.elementwise import Derivatives, Transforms
from minillm.loss.words import ChunkLogits, EndTokens
from minillm.models.head import Head, LogitTransform

N, V = 5, 300  # three blocks of 128 columns, the last of them not full
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_the_kernels_in_the_interpreter() -> None:
    """A new process is needed: Triton reads the variable when it is first imported, and torch.compile imports it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "12 passed" in done.stdout


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("runs in the process with Triton's interpreter")
    from minillm.loss import triton_kernels

    monkeypatch.setattr(triton_kernels, "MAX_BLOCK", 128)
    return triton_kernels


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "teacher_kind"), [("plain", "bias"), ("bias", "softcap"), ("softcap", "scale"), ("scale", "plain")]
)
def test_kernels_are_the_plain_functions(
    kernels: ModuleType, kind: str, teacher_kind: str, storage: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw: Any = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    student, teacher = (4 * draw(N, V)).to(storage), (4 * draw(N, V)).to(storage)
    student[0] += 60.0  # far from zero and ascending, so that the running maximum changes in every block
    student[0] = student[0].sort().values
    targets = torch.tensor([0, 127, 128, 299, 5], device=device)

    def transform_of(kind: str) -> Any:
        bias = draw(V) if kind == "bias" else None
        head = Head(draw(V, 2), bias, 0.3 if kind == "scale" else 1.0, 9.0 if kind == "softcap" else None)
        return LogitTransform.of(head, 0.7, torch.float32)

    transforms = Transforms(transform_of(kind), transform_of(teacher_kind))
    arguments = (student, teacher, targets, transforms, torch.float32)
    want, got = plain.measure(*arguments), kernels.measure(*arguments)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    derivatives = Derivatives(draw(N), draw(N), draw(N))
    arguments = (student, teacher, targets, want, derivatives, transforms, torch.float32, torch.float32)
    torch.testing.assert_close(kernels.differentiate(*arguments), plain.differentiate(*arguments), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min, -9999.0])
def test_excluded_tokens_are_the_plain_functions_too(kernels: ModuleType, least: float) -> None:
    """The student excludes the whole first block, and the teacher some tokens. Some targets are excluded."""
    g = torch.Generator().manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (4 * torch.randn(N, V, generator=g).to(device) for _ in range(2))
    student[:, :130], teacher[:, 125:140] = least, least
    teacher[0, 299] = least
    targets = torch.tensor([0, 127, 135, 299, 200], device=device)
    transform = LogitTransform(None, 1.0, None, 0.7)
    transforms = Transforms(transform, transform)
    arguments = (student, teacher, targets, transforms, torch.float32)
    want, got = plain.measure(*arguments), kernels.measure(*arguments)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    derivatives = Derivatives(*(torch.randn(N, generator=g).to(device) for _ in range(3)))
    by_score = (student, teacher, targets, want, derivatives, transforms, torch.float32, torch.float32)
    grad = kernels.differentiate(*by_score)
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(grad, plain.differentiate(*by_score), rtol=2e-5, atol=2e-6)
    student[1, 7] = torch.nan  # NaN is not hidden by the lower limit of log-probabilities
    assert all(bool(value[1].isnan()) for value in kernels.measure(*arguments)[4:])


def test_the_score_of_words_is_that_of_the_plain_function(kernels: ModuleType) -> None:
    """The kernel computes all columns but those of the end tokens and of the tokens themselves."""
    g = torch.Generator().manual_seed(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (4 * torch.randn(N, V, generator=g).to(device) for _ in range(2))
    targets = torch.tensor([0, 127, 128, 299, 5], device=device)
    transform = LogitTransform(None, 1.0, None, 0.7)
    transforms = Transforms(transform, transform)
    measures = plain.measure(student, teacher, targets, transforms, torch.float32)
    chunk = ChunkLogits(student, teacher, targets, measures, transforms)
    ends = EndTokens((128, 130, 7), student.device, torch.float32)
    factors = [torch.randn(N, generator=g).to(device) for _ in range(4)]
    going_on = ends.going_on(chunk)
    want, got = (
        ends.differentiate(module.differentiate, chunk, Derivatives(*factors[:3]), factors[3], going_on, torch.float32)
        for module in (plain, kernels)
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
