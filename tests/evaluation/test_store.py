"""Answers on disk, and the notes of what they depend on."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from minillm.evaluation import store as module
from minillm.evaluation.store import AnswerStore, digest, file_times, seed_part, suite_store

ROWS = [{"row": 0, "text": "w1"}, {"row": 1, "text": "w2"}]


@pytest.mark.parametrize(
    ("depends_on", "other"), [("0a1b", "0a1c"), ({"engine": "vllm", "seeds": [1, 2]}, {"engine": "vllm", "seeds": [1]})]
)
def test_a_part_is_there_only_with_the_same_dependencies(tmp_path: Path, depends_on: Any, other: Any) -> None:
    store = AnswerStore(tmp_path / "new", ".note")
    assert not store.has("one", depends_on)
    store.write("one", ROWS, depends_on)
    assert store.has("one", depends_on)
    assert store.read("one") == ROWS
    assert not store.has("one", other)
    assert not store.has("two", depends_on)
    store.file("one").unlink()
    assert not store.has("one", depends_on)


def test_settings_may_be_listed_in_another_order(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, ".json")
    (tmp_path / "one.jsonl").write_text("{}\n")
    (tmp_path / "one.json").write_text(json.dumps({"b": 1, "a": None}))
    assert store.has("one", {"a": None, "b": 1})


def test_an_interruption_leaves_no_note_beside_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnswerStore(tmp_path, ".note")
    store.write("one", ROWS, "before")
    original = module.write_jsonl

    def interrupted(*given: Any) -> None:
        original(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_jsonl", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write("one", ROWS[:1], "after")
    assert not store.has("one", "before")
    assert not store.has("one", "after")


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    store = suite_store(tmp_path, "model")
    store.write(seed_part("some", 1), [{"row": 0, "reverse_kl": math.inf}], "x")
    assert (tmp_path / "model" / "some-1.jsonl").read_text() == '{"row": 0, "reverse_kl": null}\n'
    assert (tmp_path / "model" / "some-1.made_from").read_text() == "x"


def test_digests_and_file_times(tmp_path: Path) -> None:
    assert digest([1], (2,), 3) == hashlib.sha256(b"([1], (2,), 3)").hexdigest()
    for name in ("b.safetensors", "a.safetensors", "generation_config.json", "README.md"):
        (tmp_path / name).write_text("")
    found = file_times(tmp_path, "*.safetensors", "generation_config.json")
    assert list(found) == ["a.safetensors", "b.safetensors", "generation_config.json"]
    assert found["a.safetensors"] == (tmp_path / "a.safetensors").stat().st_mtime_ns
    assert file_times("someone/a-hub-id", "*.safetensors") == {}
