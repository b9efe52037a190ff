"""Rows as people have them: every one read, or refused or reported with its place."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from minillm.data.config import Source
from minillm.data.examples import read_examples, read_texts
from minillm.errors import DataError


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_name_that_speakers_go_by(tmp_path: Path) -> None:
    names = [
        ("human", "gpt"),
        ("human", "chatgpt"),
        ("Human", "bing"),
        ("user", "model"),
        ("prompter", "bot"),
        ("user", "assistant"),
    ]
    rows = [
        {"conversations": [{"from": u, "value": f"q{i}"}, {"from": a, "value": "r"}]} for i, (u, a) in enumerate(names)
    ]
    found = read_examples(write(tmp_path / "x.jsonl", *rows))
    assert [(e.instruction, e.output) for e in found] == [(f"q{i}", "r") for i in range(len(names))]
    assert found[2].place == f"{tmp_path / 'x.jsonl'}:3"
    write(
        tmp_path / "x.jsonl",
        *rows,
        {"messages": [{"role": "user", "content": "q"}, {"role": "narrator", "content": "r"}]},
    )
    with pytest.raises(
        DataError, match=r"x\.jsonl:7: messages\[1\]: unknown role 'narrator'; known are user, assistant and system"
    ):
        read_examples(tmp_path / "x.jsonl")


def test_columns_that_are_passed_over_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"instruction": "i", "output": "o", "id": 3, "category": "c", "knowledge": "k", "response": "other"}
    with caplog.at_level(logging.WARNING):
        assert read_examples(write(tmp_path / "x.jsonl", {"instruction": "i"}, row, row))[1].output == "o"
    assert [message.split(" (columns")[0] for message in sorted(caplog.messages)] == [
        f"{tmp_path / 'x.jsonl'}:2: column {name} is not read" for name in ("knowledge", "response")
    ]
    assert all(message.endswith("(2 rows, the first here)") for message in caplog.messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        [one] = read_examples(
            write(tmp_path / "x.jsonl", {"instruction": "q2", "output": "r", "system": "s", "history": [["q1", "r1"]]})
        )
        chat = {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}],
            "system": "s",
            "output": "o",
        }
        read_examples(write(tmp_path / "x.jsonl", chat, {"instruction": "i"}))
    assert one.chat == (("system", "s"), ("user", "q1"), ("assistant", "r1"), ("user", "q2"))
    assert one.output == "r"
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        "a row of messages has output too, which is not read (this row)",
        "an answer of the assistant is blank, and not trained on (this row)",
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            b'{"instruction": "a"}\n{"instruction": "cut \\ud83d"}\n',
            "x.jsonl:2: instruction: character 5 is half of a surrogate pair",
        ),
        (
            b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n',
            "x.jsonl:1: messages[0].content: character 1 is half",
        ),
        (b'{"instruction": "a", "output": ["b", "\\ud83d"]}\n', "x.jsonl:1: output[1]: character 1 is half"),
        (b'{"a": ' * 100_000 + b"\n", "x.jsonl:1: JSON nested too deeply"),
        ('{"instruction": "a"}\n'.encode("utf-16"), "x.jsonl: UTF-16; save it as UTF-8"),
        (b'[\n{"instruction": "a"}\n]\n', "x.jsonl: one JSON array; JSONL is needed"),
        (b'{"messages": "hello"}\n', "x.jsonl:1: messages is str; a list is needed"),
        (b'{"instruction": "a", "history": ["b"]}\n', "x.jsonl:1: history[0] needs a question and an answer"),
        (b'{"instruction": "a", "system": 3}\n', "x.jsonl:1: system is int; a string is needed"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=re.escape(message)):
        read_examples(tmp_path / "x.jsonl")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"instruction": "a", "text": "t"}\n')
    assert read_examples(tmp_path / "x.jsonl")[0].instruction == "a"
    assert list(read_texts(Source(file=tmp_path / "x.jsonl"))) == [{"text": "t"}]
