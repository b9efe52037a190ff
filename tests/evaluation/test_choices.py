"""Probabilities of choices against slow definitions, and sets of choices that are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.data.examples import Example, Prompt
from minillm.data.files import read_jsonl
from minillm.data.sampling import Sampling
from minillm.errors import DataError, VocabularyError
from minillm.evaluation import evaluator, suite
from minillm.evaluation.choices import choice_ids, choice_logprobs, right_choices
from minillm.evaluation.config import Suite
from minillm.teacher.local import LocalTeacher
from tests.conftest import save, tiny_llama, tiny_tokenizer


def test_probabilities_of_all_answers_sum_to_one() -> None:
    """All answers of at most two words, each with either of two end tokens, and all longer answers."""
    model: Any = tiny_llama(1, vocab=6, scale=0.6)
    ends, words = (1, 3), [0, 2, 4, 5]
    options = [[], *([word] for word in words), *([one, two] for one in words for two in words)]
    [logs] = choice_logprobs(LocalTeacher(model), [Prompt(Example(0, "x"), [4, 5])], options, Sampling(8, ends, 6))
    with torch.no_grad():
        rows = {tuple(ids): torch.softmax(model(torch.tensor([[4, 5, *ids]])).logits[0, -1], -1) for ids in options}
    for ids, log in zip(options, logs, strict=True):
        want = float(rows[tuple(ids)][list(ends)].sum())
        for position, token in enumerate(ids):
            want *= float(rows[tuple(ids[:position])][token])
        assert float(log.exp()) == pytest.approx(want, rel=1e-4)
    longer = sum(
        float(rows[()][one] * rows[one,][two] * (1 - rows[one, two][list(ends)].sum()))
        for one in words
        for two in words
    )
    assert float(logs.exp().sum()) + longer == pytest.approx(1, abs=1e-5)


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(DataError, match="no token that ends an answer"):
        list(
            choice_logprobs(
                LocalTeacher(tiny_llama(1)), [Prompt(Example(0, "x"), [4])], [[5], [6]], Sampling(8, (), 32)
            )
        )


def test_choices_are_tokenised_as_text() -> None:
    tokenizer = tiny_tokenizer()
    assert choice_ids(["w1", "w1 w2"], tokenizer) == [[5], [5, 6]]
    # The tokenizer has no word for either text: both are unknown words, not the special tokens that they look like.
    with pytest.raises(DataError, match=r"'<user>' and '<bot>' are the same tokens, \[4\]; leave one out"):
        choice_ids(["<user>", "<bot>"], no_special_words())
    with pytest.raises(DataError, match=r"'a' and 'b' are the same tokens"):
        choice_ids(["w1", "a", "b"], tokenizer)


def no_special_words() -> Any:
    """A tokenizer that never splits text into its special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "w0": 4, "w1": 5}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", additional_special_tokens=["<user>", "<bot>"]
    )


@pytest.mark.parametrize(
    ("choices", "references", "right"),
    [
        (["<", ">"], ["<"], {0}),
        (["<", ">"], [" > "], {1}),
        (["+", "-"], ["-"], {1}),
        (["C", "C++", "C#"], ["C++"], {1}),
        (["B", "B minus"], ["B minus"], {1}),
        (["yes", "no"], ["Yes."], {0}),
        (["a", "A"], ["A"], {1}),
        (["yes", "no"], ["maybe"], set()),
        (["yes", "no"], ["maybe", "No"], {1}),
        (["yes", "no"], ["yes", "no"], {0, 1}),
        (["yes", "no"], [], set()),
    ],
)
def test_which_choices_the_references_name(choices: list[str], references: list[str], right: set[int]) -> None:
    assert right_choices(choices, references) == right


def classes(folder: Path, choices: list[str], rows: list[dict[str, Any]], **changes: Any) -> Suite:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = {"classes": {"file": "rows.jsonl", "choices": choices}}
    given = {
        "out": folder / "out",
        "data_dir": str(folder),
        "sets": sets,
        "template": "plain",
        "max_new_tokens": 2,
        "seeds": [1],
    }
    return Suite.model_validate({**given, "engine": "transformers", "bootstrap": 100, **changes})


def test_unusable_choices_are_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"one": save(tiny_llama(1), tmp_path / "model")}
    monkeypatch.setattr(evaluator, "load_model", lambda *_: pytest.fail("a model was loaded"))
    row = {"instruction": "w1", "output": "w3"}
    for choices, rows, message in (
        (
            ["w3", "w4"],
            [row, {**row, "output": "w5"}],
            r"sets.classes.choices: none is the reference 'w5' of row 1 .* \('w3', 'w4'\)",
        ),
        (["w3", "w4"], [{"instruction": "w1"}], r"sets.classes.choices: no row has a reference"),
        (["w3", "x", "y"], [row], r"sets.classes.choices, model one: 'x' and 'y' are the same tokens"),
    ):
        with pytest.raises((DataError, VocabularyError), match=message):
            suite.run_suite(classes(tmp_path, choices, rows), model)


def test_a_choice_does_not_include_a_longer_one_that_begins_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This model always answers w3 w4, so its answer is never w3 alone."""
    model: Any = tiny_llama(1)
    monkeypatch.setattr(evaluator, "working_dtype", lambda: torch.float32)
    folder = save(model, tmp_path / "model")

    def distribution(self: Any, hidden: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        rows = torch.full((len(hidden), sampling.vocab_size), -20.0)
        for position, token in enumerate((7, 8, 1)[: len(hidden)]):
            rows[position, token] = 0.0
        return rows

    monkeypatch.setattr(LocalTeacher, "distribution", distribution)
    rows = [{"instruction": "w1", "output": "w3 w4"}, {"instruction": "w2"}]
    results = suite.run_suite(classes(tmp_path, ["w3", "w3 w4"], rows), {"one": folder})
    [kept] = read_jsonl(tmp_path / "out" / "one" / "classes-choices.jsonl")  # the row without a reference is left out
    assert (kept["row"], kept["correct"]) == (0, True)
    assert kept["confidence"] == pytest.approx(1)
    assert results["models"]["one"]["classes"]["ece"]["mean"] == pytest.approx(0, abs=1e-6)
