"""Scores of held-out text, compared with full logits in float64, and their metrics with plain definitions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minillm.errors import InputError
from minillm.evaluation.heldout_text import evaluate_text
from minillm.evaluation.language_model import heldout_blocks, score_blocks
from minillm.evaluation.language_model_metrics import BINS, SUMS, TEXT_METRICS, text_intervals, text_scores
from minillm.evaluation.metrics import calibration_error
from minillm.loss.in_forward import bind_scoring
from minillm.models.conventions import settle
from minillm.models.load import load_model
from minillm.teacher.local import LocalTeacher
from tests.conftest import tiny_tokenizer

TEXT = [{"text": " ".join(f"w{(i * j + i) % 28}" for j in range(9 + i))} for i in range(12)]


def models(pair: tuple[str, str]) -> tuple[Any, Any]:
    student, teacher = (load_model(folder, torch.float32) for folder in pair)
    return bind_scoring(student), teacher


def reference(pair: tuple[str, str], blocks: list[Any]) -> dict[str, float]:
    """The metrics, token by token from full logits."""
    student, teacher = (load_model(folder, torch.float32).double() for folder in pair)  # pyright: ignore
    nll, kl, confidences, correct, size, theirs = [], [], [], [], 0, []
    for piece in (piece for block in blocks for piece in block):
        ids = torch.tensor([list(piece)])
        with torch.no_grad():
            q, p = (torch.log_softmax(model(ids).logits[0, :-1], -1) for model in (student, teacher))
        nll += (-q.gather(1, ids[0, 1:, None])).flatten().tolist()
        theirs += (-p.gather(1, ids[0, 1:, None])).flatten().tolist()
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        confidences += q.max(-1).values.exp().tolist()
        correct += (q.argmax(-1) == ids[0, 1:]).tolist()
        words = tiny_tokenizer().convert_ids_to_tokens(list(piece[1:]))
        size += sum(len(word) + 1 for word in words if word != "<eos>")  # a space before each
    return {
        "text_loss": float(np.mean(nll)),
        "bits_per_byte": sum(nll) / math.log(2) / size,
        "text_forward_kl": float(np.mean(kl)),
        "text_ece": calibration_error(confidences, correct, BINS),
        "teacher_text_loss": float(np.mean(theirs)),
    }


@pytest.mark.parametrize("share_rows", [True, False])
def test_scores_are_those_of_full_logits(pair: tuple[str, str], share_rows: bool) -> None:
    (student, teacher), tokenizer = models(pair), tiny_tokenizer()
    blocks = heldout_blocks(TEXT, tokenizer, 16, 9)
    assert len(blocks) == 9
    assert any(len(pieces) > 1 for pieces in blocks)
    rows = score_blocks(student, blocks, tokenizer, 32, share_rows=share_rows, teacher=LocalTeacher(teacher))
    assert all(row.keys() == set(SUMS) for row in rows)
    assert text_scores(rows) == pytest.approx(reference(pair, blocks), rel=1e-4, abs=1e-5)
    alone = score_blocks(student, blocks, tokenizer, 32, share_rows=share_rows)
    without = {key: value for key, value in text_scores(rows).items() if key in text_scores(alone)}
    assert text_scores(alone) == pytest.approx(without, rel=1e-6)
    assert text_scores(alone).keys() == {"text_loss", "bits_per_byte", "text_ece"}


def test_a_model_is_at_no_distance_from_itself(pair: tuple[str, str]) -> None:
    _, teacher = models(pair)
    blocks = heldout_blocks(TEXT, tiny_tokenizer(), 16, 4)
    rows = score_blocks(
        bind_scoring(teacher), blocks, tiny_tokenizer(), 32, share_rows=True, teacher=LocalTeacher(teacher)
    )
    found = text_scores(rows)
    assert found["text_forward_kl"] == pytest.approx(0, abs=1e-6)
    assert found["teacher_text_loss"] == pytest.approx(found["text_loss"], rel=1e-6)


def test_metrics_do_not_depend_on_how_blocks_are_grouped() -> None:
    g = np.random.default_rng(0)
    confidence, correct = g.uniform(size=(6, 40)), g.uniform(size=(6, 40)) < 0.6

    def row(index: list[int]) -> dict[str, Any]:
        some, right = confidence[index].ravel(), correct[index].ravel()
        bins = np.minimum((some * BINS).astype(int), BINS - 1)
        summed = {
            name: np.bincount(bins, values, minlength=BINS).tolist()
            for name, values in (("confidence", some), ("correct", right))
        }
        return {"tokens": some.size, "bytes": 3 * some.size, "nll": float(some.sum()), **summed}

    by_block, together = [row([i]) for i in range(6)], row([*range(6)])
    assert text_scores(by_block) == pytest.approx(text_scores([together]))
    flat: Any = correct.ravel()
    assert text_scores(by_block)["text_ece"] == pytest.approx(calibration_error(confidence.ravel(), flat))
    found = text_intervals(by_block, 200)
    assert found.keys() == {"text_loss", "bits_per_byte", "text_ece"}
    for key, value in text_scores(by_block).items():
        assert found[key]["low"] <= found[key]["high"]
        assert found[key]["mean"] == pytest.approx(value)


def test_every_model_is_scored_once(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    blocks, conventions = heldout_blocks(TEXT, tokenizer, 16, 5), settle(tokenizer, pair[1])
    named = {"teacher": pair[1], "student": pair[0]}
    results = evaluate_text(tmp_path, named, blocks, conventions, teacher=pair[1], bootstrap=100)
    assert results["blocks"] == 5
    assert results["models"]["teacher"]["text_forward_kl"]["mean"] == pytest.approx(
        0, abs=1e-2
    )  # bfloat16 on some CPUs
    assert set(results["models"]["student"]) == {metric.key for metric in TEXT_METRICS}
    exact = reference(pair, blocks)
    assert results["models"]["student"]["text_loss"]["mean"] == pytest.approx(exact["text_loss"], rel=2e-2)

    def fails(*_: Any) -> None:
        raise AssertionError("scored again")

    with monkeypatch.context() as patched:
        patched.setattr("minillm.evaluation.evaluator.load_model", fails)
        again = evaluate_text(tmp_path, named, blocks, conventions, teacher=pair[1], bootstrap=100)
        assert again == results
        with pytest.raises(AssertionError, match="scored again"):
            evaluate_text(tmp_path, named, blocks[:4], conventions, teacher=pair[1], bootstrap=100)


def test_text_without_a_token_to_predict_is_refused() -> None:
    with pytest.raises(InputError, match="no token to predict"):
        heldout_blocks([{"text": ""}], tiny_tokenizer(), 16, 4)
