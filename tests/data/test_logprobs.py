"""Log-probabilities of a mixture, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from minillm.data.logprobs import mixture_logprobs


@pytest.mark.parametrize("alpha", [1e-6, 0.2, 0.5, 0.999])
def test_the_mixture_of_student_and_teacher(alpha: float) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 40).mul(6).log_softmax(-1) for _ in range(2))
    q, p = student.double().exp(), teacher.double().exp()
    mixture = mixture_logprobs(student, teacher, alpha)
    torch.testing.assert_close(mixture.double(), ((1 - alpha) * q + alpha * p).log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixture.exp().sum(-1), torch.ones(5))


def test_the_mixture_where_probabilities_underflow() -> None:
    """exp(−200) is 0 in float32, and the logarithm of the sum is computed without it."""
    student, teacher = (
        torch.tensor([-200.0, -300.0, -torch.inf, -1.0]),
        torch.tensor([-300.0, -200.0, -2.0, -torch.inf]),
    )
    q, p = student.double().exp(), teacher.double().exp()
    torch.testing.assert_close(mixture_logprobs(student, teacher, 0.25).double(), (0.75 * q + 0.25 * p).log())


def test_the_gradient_of_the_mixture() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(7).sub(3).double().requires_grad_() for _ in range(2))
    (mixture_logprobs(student, teacher, 0.3) * torch.arange(7)).sum().backward()
    q, p = student.detach().exp(), teacher.detach().exp()
    share = 0.7 * q / (0.7 * q + 0.3 * p)
    torch.testing.assert_close(student.grad, share * torch.arange(7))
    torch.testing.assert_close(teacher.grad, (1 - share) * torch.arange(7))


def test_a_mixture_of_one_model_is_that_model() -> None:
    student, teacher = torch.tensor([-1.0, -torch.inf]), torch.tensor([-torch.inf, -2.0])
    assert mixture_logprobs(student, teacher, 0.0) is student
    assert mixture_logprobs(student, teacher, 1.0) is teacher
