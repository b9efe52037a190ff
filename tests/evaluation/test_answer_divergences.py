"""The divergences of an answer: both directions of the KL, against their definitions on full logits."""

from __future__ import annotations

import pytest
import torch

from minillm.data.examples import Example, Prompt
from minillm.evaluation.answers import add_divergences
from minillm.evaluation.store import Row
from minillm.loss import divergences
from minillm.teacher.local import LocalTeacher
from tests.conftest import tiny_llama


def test_forward_kl_is_taken_over_full_distributions() -> None:
    student, teacher = tiny_llama(1), tiny_llama(2, layers=3)
    prompt, answer = [2, 5, 3], [7, 8, 1]
    rows: list[Row] = [{"row": 0, "seed": 1, "ids": answer}]
    with torch.no_grad():
        ids = torch.tensor([prompt + answer])
        logits = [model(ids).logits[0, len(prompt) - 1 : -1] for model in (student, teacher)]
    add_divergences(rows, [Prompt(Example(0, "x"), prompt)], student, LocalTeacher(teacher), 32, 0.7)
    assert rows[0]["forward_kl"] == pytest.approx(
        float(divergences.forward_kl(logits[0], logits[1], 0.7).sum()), rel=1e-4
    )
    assert rows[0]["reverse_kl"] == pytest.approx(
        float(divergences.reverse_kl(logits[0], logits[1], 0.7).sum()), rel=1e-4
    )
    assert rows[0]["forward_kl"] != pytest.approx(rows[0]["reverse_kl"], rel=1e-2)
