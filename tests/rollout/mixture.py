"""The mixture of two tiny models by enumeration, and the χ² statistic of samples from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from minillm.data.sampling import Sampling

V, LENGTH, EOS = 5, 3, 1
SAMPLING = Sampling(LENGTH, (EOS,), V, temperature=1.3)
PROMPT = [2, 4, 3]


def distribution(model: Any, prefix: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *prefix]])).logits[0, -1, :V]
    return torch.softmax(logits.double() / SAMPLING.temperature, -1)


def enumerate_mixture(student: Any, teacher: Any, alpha: float) -> dict[tuple[int, ...], float]:
    """The probability of every response to `PROMPT`."""
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    done = {}
    for _ in range(LENGTH):
        longer = {}
        for prefix, mass in probability.items():
            mix = (1 - alpha) * distribution(student, prefix) + alpha * distribution(teacher, prefix)
            for token in range(V):
                (done if token == EOS else longer)[(*prefix, token)] = mass * float(mix[token])
        probability = longer
    return {**done, **probability}


def chi_square(counts: Counter, expected: dict[tuple[int, ...], float], n: int) -> tuple[float, int]:
    """The statistic and its degrees of freedom. Responses that are expected fewer than five times count as one."""
    pooled, statistic, cells = [0.0, 0.0], 0.0, 0
    for key, p in expected.items():
        if p * n < 5:
            pooled[0] += counts[key]
            pooled[1] += p * n
        else:
            statistic += (counts[key] - p * n) ** 2 / (p * n)
            cells += 1
    if pooled[1] > 0:
        statistic += (pooled[0] - pooled[1]) ** 2 / pooled[1]
        cells += 1
    return statistic, cells - 1


def fits(counts: Counter, expected: dict[tuple[int, ...], float], n: int) -> bool:
    """Whether the statistic lies within four standard deviations of its mean."""
    statistic, freedom = chi_square(counts, expected, n)
    return statistic < freedom + 4 * (2 * freedom) ** 0.5
