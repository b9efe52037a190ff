from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minillm.data.examples import DataError, Example, read_examples, render, render_all

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; one JSON object a line is needed"),
        ('{"prompt": "a"}\n{"prompt": \n', "x.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n\n[1]\n', "x.jsonl:3: a JSON object is needed, not list"),
        ('{"question": "a"}\n', "x.jsonl:1: instruction is missing; a string is needed"),
        ('{"instruction": 3}\n', "x.jsonl:1: instruction is int; a string is needed"),
        ('{"instruction": " "}\n', "x.jsonl:1: instruction is blank"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        read_examples(file)
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "y.jsonl")


def test_templates(tokenizer: Any) -> None:
    example = Example(0, "w1 w2", "w3")
    assert tokenizer.decode(render(example, "chat", tokenizer)) == "<user> w1 w2 w3 <bot>"
    assert tokenizer.decode(render(example, "chat", tokenizer, system="w9")).startswith("<user> w9 <user> w1")
    assert tokenizer.decode(render(example, "plain", tokenizer)) == "w1 w2 w3"

    class Text:  # a tokenizer that shows what it was given
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[str]]:
            assert not add_special_tokens
            return {"input_ids": list(text)}

    shown = "".join(render(example, "alpaca", Text()))  # pyright: ignore
    assert "paired with an input that provides further context. Write" in shown
    assert shown.endswith("### Instruction:\nw1 w2\n\n### Input:\nw3\n\n### Response:\n")


def test_prompts_over_the_limit_are_left_out_whole(tokenizer: Any) -> None:
    examples = [Example(0, "w1"), Example(1, " ".join(["w2"] * 9))]
    prompts, too_long = render_all(examples, "chat", tokenizer, max_prompt_tokens=5)
    assert [p.example.row for p in prompts] == [0]
    assert [e.row for e in too_long] == [1]


def words(row: dict[str, str]) -> list[str]:
    return re.findall(r"[a-z0-9']+", f"{row['instruction']} {row['input']}".lower())


def test_the_quickstart_prompts_are_distinct() -> None:
    """No prompt is another with a word changed: three-word runs in common, and openings."""
    train, heldout = ([json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").open()] for name in ("train", "heldout"))
    rows = train + heldout
    assert len(rows) >= 400
    assert len(heldout) >= 80
    assert len({row["kind"] for row in rows}) >= 20
    assert sum(bool(row["input"]) for row in rows) >= 80
    openings = [" ".join(row["instruction"].lower().split()[:5]) for row in rows]
    assert len(set(openings)) == len(rows)
    runs = [{tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in map(words, rows)]
    for i, a in enumerate(runs):
        for j in range(i):
            alike = len(a & runs[j]) / max(1, len(a | runs[j]))
            assert alike <= 0.2, (rows[i]["instruction"], rows[j]["instruction"])
