"""Answers on disk, and the notes of what they depend on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minillm.data.examples import Example, Prompt
from minillm.evaluation import store as module
from minillm.evaluation.dependencies import Dependencies
from minillm.evaluation.store import AnswerStore, Row, Task, part
from tests.conftest import tiny_tokenizer

ROWS = [{"row": 0, "seed": 1, "text": "w1"}, {"row": 1, "seed": 1, "text": "w2"}]
PROMPTS = [Prompt(Example(0, "w0", references=("w1",)), [4, 5]), Prompt(Example(1, "w1"), [5, 6])]
SETTINGS = {"max_new_tokens": 5, "teacher": None}


@pytest.fixture
def facts(tmp_path: Path) -> Dependencies:
    for name in ("model", "teacher"):
        (tmp_path / name).mkdir()
        for file in ("model.safetensors", "generation_config.json", "README.md"):
            (tmp_path / name / file).write_text("")
    folders = str(tmp_path / "model"), str(tmp_path / "teacher")
    return Dependencies(
        model=folders[0],
        engine="vllm",
        tokenizer=tiny_tokenizer(),
        settings=SETTINGS,
        prompts=PROMPTS,
        choices=["yes", "no"],
        teacher=folders[1],
        ends=((1, 3), 32),
    )


def other_vocabulary(facts: Dependencies) -> Dependencies:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    return replace(facts, tokenizer=tokenizer)


def touched(model: str, file: str) -> Callable[[Dependencies], Dependencies]:
    def change(facts: Dependencies) -> Dependencies:
        path = Path(getattr(facts, model)) / file
        path.write_text("")
        os.utime(path, ns=(1, 1))
        return replace(facts)

    return change


@pytest.mark.parametrize(
    "change",
    [
        touched("model", "model.safetensors"),
        touched("model", "pytorch_model.bin"),
        touched("model", "generation_config.json"),
        touched("teacher", "model.safetensors"),
        other_vocabulary,
        lambda facts: replace(facts, model="someone/a-hub-id"),
        lambda facts: replace(facts, teacher=None),
        lambda facts: replace(facts, engine="transformers"),
        lambda facts: replace(facts, settings={**SETTINGS, "max_new_tokens": 6}),
        lambda facts: replace(facts, prompts=PROMPTS[:1]),
        lambda facts: replace(facts, prompts=[Prompt(Example(0, "w0", references=("w2",)), [4, 5]), PROMPTS[1]]),
        lambda facts: replace(facts, choices=["yes", "maybe"]),
        lambda facts: replace(facts, ends=((1,), 32)),
    ],
)
def test_a_part_is_there_only_with_the_same_dependencies(
    facts: Dependencies, tmp_path: Path, change: Callable[[Dependencies], Dependencies]
) -> None:
    store = AnswerStore(tmp_path / "new")
    assert not store.has("one", facts)
    store.write("one", ROWS, facts)
    assert store.read("one") == ROWS
    assert store.has("one", replace(touched("model", "README.md")(facts), settings=dict(reversed(SETTINGS.items()))))
    assert not store.has("two", facts)
    assert not store.has("one", change(facts))
    store.file("one").unlink()
    assert not store.has("one", facts)


def sha(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def time_of(folder: str | None, *names: str) -> dict[str, int]:
    return {name: (Path(str(folder)) / name).stat().st_mtime_ns for name in names}


def test_the_notes_of_earlier_versions_are_read(facts: Dependencies, tmp_path: Path) -> None:
    """In a run the note had fewer facts, in a suite it was a digest in a file `.made_from`."""
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("teacher", "some-1"):
        (folder / f"{name}.jsonl").write_text(json.dumps(ROWS[0]))
    of_run = {
        "weights": time_of(facts.model, "model.safetensors"),
        "settings": SETTINGS,
        "prompts": sha([[4, 5], [5, 6]], (1, 3), 32)[:16],
        "engine": "vllm",
    }
    (folder / "teacher.json").write_text(json.dumps(of_run))
    of_suite = replace(facts, ends=None)
    files = "model.safetensors", "generation_config.json"
    vocabulary = sorted(facts.tokenizer.get_vocab().items()), facts.tokenizer.eos_token_id
    shared = sha(time_of(facts.model, *files), SETTINGS, "vllm", vocabulary, time_of(str(facts.teacher), *files))
    (folder / "some-1.made_from").write_text(sha(shared, ["yes", "no"], [([4, 5], ("w1",)), ([5, 6], ())]))
    store, weights = AnswerStore(folder), Path(facts.model) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    for name, same in (("teacher", facts), ("some-1", of_suite)):
        assert store.has(name, same)
        for changed in (
            replace(same, settings={}),
            replace(same, engine="transformers"),
            replace(same, prompts=PROMPTS[:1]),
        ):
            assert not store.has(name, changed)
        newer = touched("model", "model.safetensors")(same)
        assert not store.has(name, newer)
        store.write(name, ROWS, newer)
        os.utime(weights, ns=(before, before))
    assert sorted(file.name for file in folder.iterdir()) == [
        "some-1.json",
        "some-1.jsonl",
        "teacher.json",
        "teacher.jsonl",
    ]


def test_an_interruption_leaves_no_note_beside_other_rows(
    facts: Dependencies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, changed = AnswerStore(tmp_path), replace(facts, settings={})
    store.write("one", ROWS, facts)
    original = module.write_jsonl

    def interrupted(*given: Any) -> None:
        original(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_jsonl", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write("one", ROWS[:1], changed)
    assert not store.has("one", facts)
    assert not store.has("one", changed)


def test_only_missing_parts_are_made_and_those_of_a_task_together(facts: Dependencies, tmp_path: Path) -> None:
    store, made = AnswerStore(tmp_path / "new"), []

    def make(seeds: Sequence[int]) -> list[Row]:
        made.append(list(seeds))
        return [{"row": row, "seed": seed} for seed in seeds for row in (0, 1)] or [{"row": 5}]

    tasks = [
        Task(facts, {"a-1": [1], "a-2": [2], "a-3": [3]}, make),
        Task(facts, {"b": [1, 2]}, make),
        Task(facts, {"c": []}, make),
    ]
    store.write("a-2", ROWS, facts)
    assert store.complete(tasks)
    assert made == [[1, 3], [1, 2], []]
    assert store.read("a-2") == ROWS
    assert store.read("a-3") == [{"row": 0, "seed": 3}, {"row": 1, "seed": 3}]
    assert [row["seed"] for row in store.read("b")] == [1, 1, 2, 2]
    assert store.read("c") == [{"row": 5}]
    assert not store.complete(tasks)
    assert len(made) == 3


def test_numbers_that_json_lacks_become_null(facts: Dependencies, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "model")
    store.write(part("some", 1), [{"row": 0, "reverse_kl": math.inf}], facts)
    assert (tmp_path / "model" / "some-1.jsonl").read_text() == '{"row": 0, "reverse_kl": null}\n'
    assert json.loads((tmp_path / "model" / "some-1.json").read_text())["engine"] == "vllm"
