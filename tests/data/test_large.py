"""Data sets that are not kept in memory: the same rows, read again, rendered and packed when they are asked for."""

from __future__ import annotations

import json
import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from minillm.data import examples, seeding, text
from minillm.data.config import Source
from minillm.data.examples import ExampleFile, open_examples, open_texts, read_examples
from minillm.data.lazy import LazySequence, mapped
from minillm.data.prompts import LazyPrompts, Rendering
from minillm.data.rows import RowReader
from minillm.data.seeding import ShuffledPasses, permutation
from minillm.data.text import TextBlocks
from minillm.errors import DataError, InputError


@pytest.fixture
def _few_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (examples, text):
        monkeypatch.setattr(module, "IN_MEMORY", 3)


def test_passes_are_permutations_and_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = seeding.torch.randperm
    monkeypatch.setattr(seeding.torch, "randperm", lambda n, **given: drawn.append(n) or original(n, **given))
    passes = ShuffledPasses(7, 5, "prompts")
    found = [passes[position] for position in range(21)]
    assert drawn == [7] * 3
    assert found == [row for number in range(3) for row in permutation(7, 5, "prompts", number)]
    assert ShuffledPasses(7, 5, "prompts")[17] == found[17]  # a resume begins anywhere


ROWS: list[Any] = [
    {"instruction": "w1", "output": "w2"},
    {"messages": [{"role": role, "content": f"w{i}"} for i, role in enumerate(("user", "assistant") * 3)]},
    {"instruction": "é", "input": "w3", "output": ["w4", "w5"], "teacher": "math"},
    {"prompt": "w6"},
]


def write(file: Path, *rows: Any) -> Source:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\n\n \n".encode() + "\r\n".join(lines[1:]).encode())
    return Source(file=file)


@pytest.mark.usefixtures("_few_in_memory")
@pytest.mark.parametrize("limit", [None, 4])
def test_examples_of_a_large_file_are_those_of_a_small_one(tmp_path: Path, limit: int | None) -> None:
    source = write(tmp_path / "x.jsonl", *ROWS)
    whole = read_examples(source, limit)
    assert len(whole) == (limit or 6)
    large = open_examples(source, limit)
    assert isinstance(large, ExampleFile)
    assert len(large) == len(whole)
    for found in (large, pickle.loads(pickle.dumps(large))):
        assert [found[i] for i in reversed(range(len(whole)))] == whole[::-1]
        assert list(found) == whole
        assert found[1:-1] == whole[1:-1]
        assert found[-1] == whole[-1]
    assert list(large.answered) == [e.row for e in whole if e.references]
    with pytest.raises(IndexError):
        large[len(whole)]
    assert open_examples(source, 3) == whole[:3]


@pytest.mark.usefixtures("_few_in_memory")
def test_examples_of_a_large_data_set(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("question,answer\n" + "".join(f"q{i},a{i}\n" for i in range(9)))
    source = Source(dataset=str(tmp_path), columns={"instruction": "question", "output": "answer"}, split="train[2:8]")
    large = open_examples(source)
    assert isinstance(large, ExampleFile)
    assert list(large) == read_examples(source)
    assert large[5].place == f"{tmp_path}[5]"


@pytest.mark.usefixtures("_few_in_memory")
@pytest.mark.parametrize("broken", ['{"instruction": ', '{"instruction": 3}', '{"instruction": "\\ud83d"}'])
def test_a_broken_row_is_named_when_the_file_is_opened(tmp_path: Path, broken: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"instruction": "w1"}\n' * 9 + broken)
    with pytest.raises(DataError, match=r"x\.jsonl:10: "):
        open_examples(Source(file=tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text('{"text": "w1"}\n' * 9 + broken)
    with pytest.raises(DataError, match=r"x\.jsonl:10: "):
        open_texts(Source(file=tmp_path / "x.jsonl"), 0)


@pytest.mark.usefixtures("_few_in_memory")
def test_a_file_that_changes_is_refused_and_one_that_is_replaced_is_read_on(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    large = open_examples(write(file, *ROWS))
    write(tmp_path / "y.jsonl", *ROWS[::-1]).file.replace(file)  # pyright: ignore[reportOptionalMemberAccess]
    assert large[0].instruction == "w1"
    large = open_examples(Source(file=file))
    file.write_text("{}\n" * 9)
    with pytest.raises(DataError, match=r"x\.jsonl: changed while it was being read"):
        large[0]


def test_items_are_made_when_they_are_asked_for_and_kept() -> None:
    made: list[int] = []
    items = mapped(LazySequence(10**6, lambda i: made.append(i) or i), lambda i: 2 * i)
    assert len(items) == 10**6
    assert [items[7], items[7], items[-1]] == [14, 14, 2 * 10**6 - 2]
    assert made == [7, 10**6 - 1]
    assert mapped([1, 2], str) == ["1", "2"]


def lazy_prompts(tmp_path: Path, tokenizer: Any, lengths: list[int], **rendering: Any) -> LazyPrompts:
    rows = [{"instruction": " ".join([f"w{i % 28}"] * length)} for i, length in enumerate(lengths)]
    given = {"template": "plain", "max_prompt_tokens": 5} | rendering
    return LazyPrompts(open_examples(write(tmp_path / "x.jsonl", *rows)), Rendering(tokenizer=tokenizer, **given))


@pytest.mark.usefixtures("_few_in_memory")
def test_another_row_stands_in_for_a_prompt_that_is_too_long(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = [9 if i % 4 == 0 else 1 + i % 5 for i in range(80)]
    lazy = lazy_prompts(tmp_path, tokenizer, lengths)
    short = [i for i in range(80) if lengths[i] <= 5]
    assert len(lazy) == 80
    found = [prompt.example.row for prompt in lazy]
    assert [row for i, row in enumerate(found) if i in short] == short  # in their own places
    stand_ins = [row for i, row in enumerate(found) if i not in short]
    assert set(stand_ins) <= set(short)
    assert max(Counter(stand_ins).values()) <= 4  # spread over the data
    assert all(len(prompt.ids) == lengths[prompt.example.row] for prompt in lazy)
    assert [prompt.example.row for prompt in lazy_prompts(tmp_path, tokenizer, lengths)[::-1]] == found[::-1]
    assert [prompt.example.row for prompt in lazy.in_order()] == short
    assert [prompt.example.row for prompt in lazy.in_order(after=40)] == [i for i in short if i > 40]
    with caplog.at_level(logging.WARNING):
        lazy.look_at_some("x.jsonl")
    assert caplog.messages == [
        "20 of 80 rows looked at (x.jsonl has 80) exceed data.max_prompt_tokens (5) and are left out, as all such rows "
        "are; the first is row 0"
    ]
    with pytest.raises(InputError, match=r"no prompt of 9 looked at is within data\.max_prompt_tokens \(5\)"):
        lazy_prompts(tmp_path, tokenizer, [9] * 9).look_at_some("x.jsonl")


@pytest.mark.usefixtures("_few_in_memory")
def test_a_row_that_the_template_refuses_is_left_out_and_named(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    picky = "{{ instruction if instruction != 'w3' else instruction + 1 }}"
    lazy = lazy_prompts(tmp_path, tokenizer, [1] * 9, template=picky)
    with caplog.at_level(logging.WARNING):
        lazy.look_at_some("x.jsonl")
        assert lazy[3].example.row != 3
        assert [prompt.example.row for prompt in lazy.in_order()] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert [message.split(": ")[0] for message in caplog.messages] == [
        "1 of 9 rows looked at (x.jsonl has 9) are left out",
        "A row is left out",
    ]
    assert "x.jsonl:6" in caplog.text  # two blank lines come before
    with pytest.raises(DataError, match=r"x\.jsonl:1: data\.template does not take it"):
        lazy_prompts(tmp_path, tokenizer, [1] * 9, template="{{ instruction + 1 }}").look_at_some("x.jsonl")


def blocks(tokenizer: Any, rows: Any, updates: int = -1) -> TextBlocks:
    return TextBlocks(rows, tokenizer, 8, 3, 5, updates=updates, several=True)


def taken(packed: TextBlocks, *updates: int) -> list[list[list[int]]]:
    """The blocks of some updates."""
    return [[list(piece) for piece in packed.pieces(block)] for update in updates for block in packed.of_update(update)]


@pytest.mark.parametrize("stream", [False, True])
def test_large_text_is_packed_as_it_is_needed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(text, "IN_MEMORY", 3)
    monkeypatch.setattr(text, "_TOKENS_IN_MEMORY", 20)
    read: list[int] = []

    def row(number: int) -> dict[str, str]:
        read.append(number)
        return {"text": " ".join(f"w{number}" for _ in range(1 + number % 11))}

    def rows() -> Any:
        return map(row, range(28)) if stream else LazySequence(28, row)

    packed = blocks(tokenizer, rows())
    assert packed
    first = taken(packed, 0)
    assert len(read) < 12
    if not stream:
        assert read[:3] == permutation(28, 5, "documents", 0)[:3]
    # The first pass holds every token once, in as many blocks as fit; later passes the same blocks in another order.
    tokens = sum(2 + number % 11 for number in range(28))
    assert first + taken(packed, 1) == taken(blocks(tokenizer, rows()), 0, 1)
    all_blocks: list[Any] = []
    while (
        sum(len(piece) for block in all_blocks for piece in block) < tokens - 1
    ):  # a last piece of one token is no text
        all_blocks += taken(packed, len(all_blocks) // 3)
    n = len(packed._blocks)
    seen = [block for update in range(n) for block in packed.of_update(update)]
    assert seen[:n] == list(range(n))
    assert sorted(seen[n : 2 * n]) == list(range(n))
    assert seen[n : 2 * n] == permutation(n, 5, "text", 1)
    assert Counter(word for i in range(n) for piece in packed.pieces(i) for word in piece if word != 1) == Counter(
        {tokenizer(f"w{number}")["input_ids"][0]: 1 + number % 11 for number in range(28)}
    )
    for update in (n // 3 + 2, 1):  # a resume, also in a later pass
        assert taken(blocks(tokenizer, rows()), update) == taken(packed, update)


def test_a_stream_that_needs_little_is_packed_as_a_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its order is that of a small data set, and no row more is read."""
    read: list[int] = []

    def endless() -> Iterator[dict[str, str]]:
        number = 0
        while True:
            read.append(number)
            yield {"text": " ".join([f"w{number % 28}"] * 7)}
            number += 1

    packed = blocks(tokenizer, endless(), updates=4)
    assert len(read) == 12
    assert sorted(block for update in range(4) for block in packed.of_update(update)) == list(range(12))
    assert packed.of_update(0) == permutation(12, 5, "text", 0)[:3]
    monkeypatch.setattr(text, "_TOKENS_IN_MEMORY", 20)
    read.clear()
    packed = blocks(tokenizer, endless(), updates=4)
    assert [packed.of_update(update) for update in range(4)] == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)]
    assert len(read) <= 13
    assert all(low < high for low, high in pairwise(read))


def test_texts_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"t{i}", "id": i} for i in range(9)]
    source = write(tmp_path / "x.jsonl", *rows)
    small = open_texts(source, 0)
    monkeypatch.setattr(examples, "IN_MEMORY", 3)
    large = open_texts(source, 0)
    assert isinstance(small, list)
    assert isinstance(large, LazySequence)
    assert list(large) == small == [{"text": f"t{i}"} for i in range(9)]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty; rows of text are needed"):
        open_texts(Source(file=tmp_path / "empty.jsonl"), 0)


def test_lines_are_read_again_by_several_processes(tmp_path: Path) -> None:
    """A pickled reader opens the file itself, as worker processes of a data loader do."""
    reader = RowReader(write(tmp_path / "x.jsonl", *ROWS))
    rows = list(reader.scan())
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy[i] for i in (3, 0)] == [rows[3], rows[0]]
