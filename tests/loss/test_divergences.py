"""Each divergence, compared with a loop over the vocabulary that spells out its definition, and its limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillm.loss import divergences as d
from minillm.loss.config import DIVERGENCE_PARAMETERS, DivergenceConfig

T, V = 5, 7


def logits(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(T, V, generator=g, dtype=dtype), 2 * torch.randn(T, V, generator=g, dtype=dtype)


def softmax(row: list[float], temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mix(a: list[float], b: list[float], share: float) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def adaptive(q: list[float], p: list[float]) -> float:
    order = sorted(range(len(p)), key=lambda v: -p[v])
    head, mass = [], 0.0
    for v in order:
        if mass >= 0.5:
            break
        head.append(v)
        mass += p[v]
    total = sum(abs(x - y) for x, y in zip(p, q, strict=True))
    share = sum(abs(p[v] - q[v]) for v in head) / total
    return share * kl(p, q) + (1 - share) * kl(q, p)


def alpha_beta(q: list[float], p: list[float], a: float, b: float) -> float:
    return -sum(
        x**a * y**b - a / (a + b) * x ** (a + b) - b / (a + b) * y ** (a + b) for x, y in zip(p, q, strict=True)
    ) / (a * b)


def logit_mse(q: list[float], p: list[float]) -> float:
    s, z = ([math.log(x) - sum(map(math.log, row)) / len(row) for x in row] for row in (q, p))
    return sum((x - y) ** 2 for x, y in zip(s, z, strict=True)) / len(s)


CASES: list[tuple[Callable[..., Tensor], Callable[[list[float], list[float]], float]]] = [
    (d.reverse_kl, lambda q, p: kl(q, p)),
    (d.forward_kl, lambda q, p: kl(p, q)),
    (d.jensen_shannon, lambda q, p: 0.5 * kl(p, mix(p, q, 0.5)) + 0.5 * kl(q, mix(p, q, 0.5))),
    (
        lambda *a, **k: d.jensen_shannon(*a, beta=0.1, **k),
        lambda q, p: 0.1 * kl(p, mix(p, q, 0.1)) + 0.9 * kl(q, mix(p, q, 0.1)),
    ),
    (d.skew_forward_kl, lambda q, p: kl(p, mix(p, q, 0.1))),
    (d.skew_reverse_kl, lambda q, p: kl(q, mix(q, p, 0.1))),
    (d.total_variation, lambda q, p: sum(abs(x - y) for x, y in zip(q, p, strict=True)) / 2),
    (d.adaptive_kl, adaptive),
    (d.mse, lambda q, p: sum((x - y) ** 2 for x, y in zip(q, p, strict=True))),
    (d.logit_mse, logit_mse),
    (d.alpha_beta, lambda q, p: alpha_beta(q, p, 0.2, 0.7)),
    (lambda *a, **k: d.alpha_beta(*a, alpha=1.3, beta=-0.4, **k), lambda q, p: alpha_beta(q, p, 1.3, -0.4)),
]
NAMES = ["rkl", "fkl", "jsd", "jsd-0.1", "skew-fkl", "skew-rkl", "tv", "akl", "mse", "logit-mse", "ab", "ab-negative"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("function", "definition"), CASES, ids=NAMES)
def test_a_divergence_is_its_definition(
    function: Callable[..., Tensor], definition: Callable[..., float], temperature: float
) -> None:
    student, teacher = logits(0)
    want = [
        definition(softmax(s, temperature), softmax(t, temperature))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    got = function(student, teacher, temperature=temperature)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("function", "definition"), CASES, ids=NAMES)
def test_gradients_are_finite_differences_and_equal_models_have_none(
    function: Callable[..., Tensor], definition: object
) -> None:
    student, teacher = logits(1)
    if function is not d.adaptive_kl:  # its weight is a constant for the gradient, but not for finite differences
        assert torch.autograd.gradcheck(lambda x: function(x, teacher), student.requires_grad_())
    same = teacher.clone().requires_grad_()
    value = function(same, teacher)
    assert value.abs().max() < 1e-12
    assert (value >= -1e-12).all()
    (grad,) = torch.autograd.grad(value.sum(), same)
    if function is not d.total_variation:  # it is not differentiable there
        assert grad.abs().max() < 1e-12


def test_adaptive_kl_does_not_differentiate_its_weight() -> None:
    student, teacher = logits(2)
    student.requires_grad_()
    forward, reverse = d.forward_kl(student, teacher), d.reverse_kl(student, teacher)
    weight = ((d.adaptive_kl(student, teacher) - reverse) / (forward - reverse)).detach()
    want = torch.autograd.grad((weight * forward + (1 - weight) * reverse).sum(), student)
    torch.testing.assert_close(torch.autograd.grad(d.adaptive_kl(student, teacher).sum(), student), want)


def test_limits_of_the_families() -> None:
    student, teacher = logits(3)
    forward, reverse = d.forward_kl(student, teacher), d.reverse_kl(student, teacher)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    close(d.alpha_beta(student, teacher, 1.0, 0.0), forward)
    close(d.alpha_beta(student, teacher, 0.0, 1.0), reverse)
    close(d.jensen_shannon(student, teacher, 1e-7) / 1e-7, forward)
    close(d.jensen_shannon(student, teacher, 1 - 1e-7) / 1e-7, reverse)
    close(d.skew_forward_kl(student, teacher, 0.0), forward)
    close(d.skew_reverse_kl(student, teacher, 0.0), reverse)
    step = 1e-5  # at its removable singularities the α–β divergence is continuous
    for a, b in ((0.0, 0.6), (0.6, 0.0), (0.5, -0.5), (0.0, 0.0)):
        around = d.alpha_beta(student, teacher, a + step, b + 2 * step)
        torch.testing.assert_close(d.alpha_beta(student, teacher, a, b), around, rtol=5e-3, atol=1e-3)


def test_impossible_settings_are_refused() -> None:
    student, teacher = logits(4)
    with pytest.raises(ValueError, match="beta must be above 0 and below 1, not 1"):
        d.jensen_shannon(student, teacher, beta=1)
    with pytest.raises(ValueError, match=r"skew must be at least 0 and below 1, not 1\.0"):
        d.skew_forward_kl(student, teacher, skew=1.0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        d.reverse_kl(student, teacher, temperature=0.0)


def test_every_name_of_a_recipe_has_a_function_with_these_parameters() -> None:
    """Names and parameters are listed without torch, and checked against the functions when those are defined."""
    assert d.DIVERGENCES.keys() == DIVERGENCE_PARAMETERS.keys()
    student, teacher = logits(7)
    for name, parameters in DIVERGENCE_PARAMETERS.items():
        config = DivergenceConfig.model_validate({"name": name} | dict.fromkeys(parameters, 0.3))
        assert config.parameters == dict.fromkeys(parameters, 0.3)
        want = getattr(d, name)(student, teacher, **config.parameters)
        assert torch.equal(d.divergence_function(config)(student, teacher), want)
        for other in {"alpha", "beta", "skew", "head_mass"} - set(parameters):
            with pytest.raises(ValueError, match=rf"{name} takes .*, not {other}"):
                DivergenceConfig.model_validate({"name": name, other: 0.3})


def test_a_function_that_the_table_does_not_list_is_a_defect() -> None:
    def forward_kl(student_logits: Tensor, teacher_logits: Tensor, order: float = 1.0) -> Tensor:
        return student_logits - teacher_logits * order

    with pytest.raises(TypeError, match=r"needs the entry 'forward_kl': \('order',\)"):
        d.register(forward_kl)
    assert d.DIVERGENCES["forward_kl"] is d.forward_kl


def test_very_unlike_distributions_stay_finite() -> None:
    student, teacher = torch.tensor([[80.0, 0.0, -80.0]]), torch.tensor([[-80.0, 0.0, 80.0]])
    for function, _ in CASES[:9]:
        value = function(student.requires_grad_(), teacher)
        assert torch.isfinite(value).all()
        assert torch.isfinite(torch.autograd.grad(value.sum(), student)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("function", "definition"), CASES, ids=NAMES)
def test_excluded_tokens_leave_values_and_gradients_finite(
    function: Callable[..., Tensor], definition: object, dtype: torch.dtype
) -> None:
    """Tokens are excluded by the student, the teacher or both, with a logit of −∞ or the lowest number of the dtype."""
    student, teacher = (x.to(dtype) for x in logits(5))
    for least in (-torch.inf, torch.finfo(dtype).min):
        q, p = student.clone(), teacher.clone()
        q[..., [0, 1]], p[..., [1, 2]] = least, least
        q.requires_grad_()
        value = function(q, p, temperature=0.7)
        assert torch.isfinite(value).all()
        # The gradient of a power of e^60 is beyond float16.
        assert torch.isfinite(torch.autograd.grad(value.sum(), q)[0]).all() or (dtype, function) == (
            torch.float16,
            CASES[-1][0],
        )
    assert torch.isfinite(d.entropy(q.detach())).all()


def test_a_token_that_both_exclude_contributes_nothing() -> None:
    student, teacher = logits(6)
    kept = [i for i in range(student.shape[-1]) if i != 2]
    q, p = student.clone(), teacher.clone()
    q[..., 2] = p[..., 2] = -torch.inf
    for function, _ in CASES[:9]:
        torch.testing.assert_close(
            function(q, p), function(student[..., kept], teacher[..., kept]), rtol=1e-9, atol=1e-9
        )
    p, q = teacher.clone(), student
    p[..., 2] = -torch.inf  # excluded by the teacher only: adds 0 to KL(p‖q), and 80 nats per unit of q to KL(q‖p)
    without = torch.log_softmax(teacher[..., kept], -1)
    own = torch.log_softmax(q, -1)
    torch.testing.assert_close(d.forward_kl(q, p), (without.exp() * (without - own[..., kept])).sum(-1))
    want = (own[..., kept].exp() * (own[..., kept] - without)).sum(-1) + own[..., 2].exp() * (own[..., 2] + 80.0)
    torch.testing.assert_close(d.reverse_kl(q, p), want)
