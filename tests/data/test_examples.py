from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

from minillm.data.config import Source
from minillm.data.examples import Example, Prompt, read_examples, read_texts
from minillm.data.templates import render, render_all, render_answer
from minillm.errors import DataError

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


def test_a_template_that_can_think_is_told_not_to(tokenizer: Any) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template += "{% if enable_thinking is defined and enable_thinking is false %}w7{% endif %}"
    assert tokenizer.decode(render(Example(0, "w1", ""), "chat", thinking)).endswith("w7")


def test_templates(tokenizer: Any) -> None:
    example = Example(0, "w1 w2", "w3")
    assert tokenizer.decode(render(example, "chat", tokenizer)) == "<user> w1 w2 w3 <bot>"
    assert tokenizer.decode(render(example, "chat", tokenizer, system="w9")).startswith("<user> w9 <user> w1")
    assert tokenizer.decode(render(example, "plain", tokenizer)) == "w1 w2 w3"

    class Text:  # a tokenizer that shows what it was given
        added_tokens_decoder: ClassVar = {}

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
            return {"input_ids": list(text)}

    with pytest.raises(DataError, match="row 0 is rendered by the alpaca template already"):
        render(Example(0, "### Instruction:\nw1\n\n### Response:\n", ""), "alpaca", Text())
    shown = "".join(render(example, "alpaca", Text()))  # pyright: ignore
    assert "paired with an input that provides further context. Write" in shown
    assert shown.endswith("### Instruction:\nw1 w2\n\n### Input:\nw3\n\n### Response:\n")


def lines(file: Path, *rows: Any) -> Source:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(file=file)


def test_columns_by_the_names_that_people_use(tmp_path: Path) -> None:
    rows = [
        {"instruction": "i", "context": "c", "response": "r", "category": "x"},  # Dolly
        {"instruction": "i", "input": "c", "output": "r"},  # Alpaca
        {"prompt": "i", "input": "c", "completion": "r"},
        {"instruction": "i", "input": "c", "output": ["r", "s"]},
    ]
    found = read_examples(lines(tmp_path / "x.jsonl", *rows))
    assert [(e.row, e.instruction, e.input, e.output) for e in found] == [(i, "i", "c", "r") for i in range(4)]
    assert found[3].references == ("r", "s")
    named = lines(tmp_path / "y.jsonl", {"q": "i", "a": "r", "instruction": "other"})
    [example] = read_examples(named.model_copy(update={"columns": {"instruction": "q", "output": "a"}}))
    assert (example.instruction, example.output) == ("i", "r")
    with pytest.raises(DataError, match=re.escape("y.jsonl:1: no column question; there are q, a, instruction")):
        read_examples(named.model_copy(update={"columns": {"instruction": "question"}}))
    with pytest.raises(ValueError, match="exactly one of file and dataset is needed"):
        Source(file=tmp_path, dataset="x")


def test_every_answer_of_a_chat_is_an_example(tmp_path: Path, tokenizer: Any) -> None:
    said = [("system", "w9"), ("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"), ("user", "w5")]
    chat = [{"role": role, "content": content} for role, content in said]
    shared = [
        {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content} for role, content in said
    ]
    file = tmp_path / "x.jsonl"
    for row in ({"messages": chat}, {"conversations": shared}, {"prompt": chat}):
        found = read_examples(lines(file, row))
        assert [(e.row, e.instruction, e.references) for e in found] == [
            (0, "w1", ("w2",)),
            (1, "w3", ("w4",)),
            (2, "w5", ()),
        ]
        assert [e.chat for e in found] == [tuple(said[:2]), tuple(said[:4]), tuple(said)]
        shown = tokenizer.decode(render(found[1], "chat", tokenizer, system="w8"))
        assert shown == "<user> w9 <user> w1 <user> w2 <user> w3 <bot>"  # the chat's own system message
        with pytest.raises(DataError, match="row 1 is a chat of several messages, not one for template alpaca"):
            render(found[1], "alpaca", tokenizer)
    [one] = read_examples(lines(file, {"prompt": chat[1:2], "completion": chat[2:3]}))
    assert (one.instruction, one.output, one.chat) == ("w1", "w2", ())  # what a row of columns gives
    assert render(one, "plain", tokenizer) == tokenizer("w1")["input_ids"]
    for row, message in (
        ({"messages": [{"role": "user"}]}, "x.jsonl:1: messages[0] needs a role and a content, both strings"),
        ({"messages": ["w1"]}, "x.jsonl:1: messages[0] needs a role and a content, both strings"),
        ({"messages": chat[2:]}, "x.jsonl:1: messages[0]: an answer of the assistant follows a message of the user"),
        ({"messages": chat[:1]}, "x.jsonl:1: messages holds no message of the user"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            read_examples(lines(file, row))


CHATML = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<bot> {% generation %}{{ m['content'] }} <eos>{% endgeneration %} w27 "
    "{% else %}<user> {{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def test_an_answer_ends_as_its_template_says(tokenizer: Any) -> None:
    example = Example(0, "w1", "", ("w2 w3",))
    before = tokenizer.chat_template
    plain = [*tokenizer("w2 w3")["input_ids"], tokenizer.eos_token_id]
    unmarked = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        for template in (CHATML, unmarked, before):  # the last makes no turn of the assistant's
            tokenizer.chat_template = template
            prompt = Prompt(example, render(example, "chat", tokenizer))
            assert render_answer(prompt, "chat", tokenizer) == plain, template
        tokenizer.chat_template = CHATML.replace("<eos>", "<pad>")  # another special token, as <|eot_id|> is
        prompt = Prompt(example, render(example, "chat", tokenizer))
        assert tokenizer.decode(render_answer(prompt, "chat", tokenizer)) == "w2 w3 <pad>"
    finally:
        tokenizer.chat_template = before
    assert render_answer(Prompt(example, []), "alpaca", tokenizer) == plain


def test_a_template_of_ones_own(tmp_path: Path, tokenizer: Any) -> None:
    text = "{{ instruction }}{% if input %} w8 {{ input }}{% endif %} {{ messages | length }}{{ system or '' }}"
    text = text.replace("{{ messages | length }}", "{{ 'w7' if messages | length == 1 else 'w6' }}")
    file = tmp_path / "own.jinja"
    file.write_text(text)
    for template in (text, str(file)):
        assert tokenizer.decode(render(Example(0, "w1", "w2"), template, tokenizer)) == "w1 w8 w2 w7"
    with pytest.raises(DataError, match=r"data\.template: unexpected"):
        render(Example(0, "w1"), "{{ instruction } }", tokenizer)
    with pytest.raises(DataError, match=r"data\.template: .*No such file"):
        render(Example(0, "w1"), str(tmp_path / "none.jinja"), tokenizer)


def test_any_source_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder of CSV stands for the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("question,answer,text\n" + "".join(f"q{i},a{i},t{i}\n" for i in range(20)))
    source = Source(dataset=str(folder), columns={"instruction": "question", "output": "answer"}, split="train[5:8]")
    assert [(e.row, e.instruction, e.output) for e in read_examples(source)] == [
        (i, f"q{i + 5}", f"a{i + 5}") for i in range(3)
    ]
    stream = read_texts(Source(dataset=str(folder)), seed=3)
    assert next(stream)["text"].startswith("t")
    texts = [row["text"] for row in read_texts(Source(dataset=str(folder)), seed=3)]
    assert sorted(texts) == sorted(f"t{i}" for i in range(20))
    assert texts != [f"t{i}" for i in range(20)]
    assert texts == [row["text"] for row in read_texts(Source(dataset=str(folder)), seed=3)]
    with pytest.raises(DataError, match="text is missing"):
        list(read_texts(lines(tmp_path / "x.jsonl", {"texts": "a"})))
    with pytest.raises(DataError, match=f"{folder}: "):
        read_examples(Source(dataset=str(folder), split="validation"))


def test_prompts_over_the_limit_are_left_out_whole(tokenizer: Any) -> None:
    examples = [Example(0, "w1"), Example(1, " ".join(["w2"] * 9))]
    prompts, too_long = render_all(examples, "chat", tokenizer, max_prompt_tokens=5)
    assert [p.example.row for p in prompts] == [0]
    assert [e.row for e in too_long] == [1]


def words(row: dict[str, str]) -> list[str]:
    return re.findall(r"[a-z0-9']+", f"{row['instruction']} {row['input']}".lower())


def test_the_quickstart_prompts_are_distinct() -> None:
    """No prompt is another with a word changed: three-word runs in common, and openings."""
    train, heldout = (
        [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").open()] for name in ("train", "heldout")
    )
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
