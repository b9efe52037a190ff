"""`minillm chat`, `generate` with several prompts, and `compare`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from minillm import cli
from minillm.data.files import read_jsonl
from minillm.data.templates import chat_ids
from minillm.errors import InputError
from minillm.evaluation.two_models import compare_models, suite_of
from minillm.models.load import load_model, load_tokenizer
from minillm.run import talk
from minillm.run.answering import examples_of
from minillm.run.talk import Talker, chat, talkers


def test_a_conversation_goes_on_from_its_own_answers(pair: tuple[str, str]) -> None:
    """The most likely tokens of every turn are those of a loop that knows nothing of streaming."""
    talker = Talker(pair[0], "one", max_new_tokens=6, temperature=0.0)
    tokenizer, model = load_tokenizer(pair[0]), load_model(pair[0], torch.float32)
    for text in ("w1 w2", "w3"):
        ids = chat_ids([*talker.messages, {"role": "user", "content": text}], tokenizer)
        wanted: list[int] = []
        while len(wanted) < 6 and (not wanted or wanted[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                wanted.append(int(model(torch.tensor([ids + wanted])).logits[0, -1].argmax()))
        assert "".join(talker.reply(text, seed=0)) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert [message["role"] for message in talker.messages] == ["user", "assistant"] * 2
    talker.undo()
    assert len(talker.messages) == 2
    talker.clear()
    assert talker.messages == []


def test_an_answer_is_sampled_by_its_seed_and_may_be_abandoned(pair: tuple[str, str]) -> None:
    talker = Talker(pair[0], "one", max_new_tokens=12)
    said = {seed: "".join(talker.reply("w1", seed)) for seed in (1, 2, 3)}
    talker.clear()
    assert "".join(talker.reply("w1", 1)) == said[1]
    assert len(set(said.values())) > 1
    before = list(talker.messages)
    answer: Any = talker.reply("w2", 1)
    next(answer)
    answer.close()
    assert talker.messages == before
    with pytest.raises(InputError, match="exceed its context"):
        list(Talker(pair[0], "one", max_new_tokens=10**6).reply("w1", 1))


def test_a_chat_with_two_models(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk.sys, "stdin", io.StringIO("w1 w2\n/what\n/new\n\nw3\n/quit\nw4\n"))
    speakers = talkers([pair[0], pair[1]], max_new_tokens=4)
    console = Console(file=io.StringIO(), width=100)
    chat(speakers, console=console)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert shown.count("student:") == shown.count("teacher:") == 2
    assert shown.count(talk.HELP) == 2
    assert all(speaker.messages[0]["content"] == "w3" for speaker in speakers)  # after /new
    names = [speaker.name for speaker in talkers([pair[0], pair[0]])]
    assert names == ["student (1)", "student (2)"]
    monkeypatch.setattr(talk.sys, "stdin", io.StringIO("w1\n"))
    wide = Console(file=io.StringIO(), width=100, force_terminal=True)
    chat(speakers, console=wide)
    assert "╭" in wide.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_several_prompts_and_a_file_are_answered(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, text = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    lines.write_text('{"instruction": "w5"}\n{"messages": [{"role": "user", "content": "w6"}]}\n')
    text.write_text("w7\n\nw8\n")
    out = tmp_path / "answers.jsonl"
    cli.generate(pair[0], ["w1", "w2"], prompts=lines, out=out, max_new_tokens=5, seed=3)
    found = read_jsonl(out)
    assert [(row["prompt"], row["seed"]) for row in found] == [("w1", 3), ("w2", 4), ("w5", 5), ("w6", 6)]
    capsys.readouterr()
    cli.generate(pair[0], ["w2"], max_new_tokens=5, seed=4)
    assert capsys.readouterr().out.strip() == found[1]["answer"]  # an answer does not depend on the others
    cli.generate(pair[0], prompts=text, max_new_tokens=5)
    assert capsys.readouterr().out.startswith("> w7\n")
    with pytest.raises(InputError, match="a prompt is needed"):
        examples_of([], None)


def test_two_models_are_compared_prompt_by_prompt(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"w{n} w{n + 1}", "output": f"w{n}"}) + "\n" for n in range(8)))
    settings: dict[str, Any] = {"seeds": [1, 2], "max_new_tokens": 6, "engine": "transformers"}
    suite = suite_of(file, tmp_path / "out", **settings)
    found = compare_models({"a": pair[0], "b": pair[1]}, suite)
    lengths = [
        np.mean(
            [[len(row["ids"]) for row in read_jsonl(suite.out / name / f"prompts-{seed}.jsonl")] for seed in (1, 2)]
        )
        for name in ("a", "b")
    ]
    change = found["differences"]["length"]
    assert (change["first"], change["second"]) == pytest.approx(tuple(lengths))
    assert change["mean"] == pytest.approx(lengths[1] - lengths[0])
    assert change["low"] <= change["mean"] <= change["high"]
    assert set(found["differences"]) == {"rouge_l", "exact_match", "finished", "length"}
    assert list(found["answers"][0]) == ["row", "a", "b"]
    same = compare_models({"a": pair[0], "again": pair[0]}, suite)
    assert {(change["low"], change["high"]) for change in same["differences"].values()} == {(0.0, 0.0)}
    cli.compare(pair[0], pair[1], file, out=tmp_path / "cli", max_new_tokens=4, seeds=1, limit=3, engine="transformers")
    shown = capsys.readouterr().out
    assert "3 prompts, 1 seeds; difference teacher − student" in " ".join(shown.split())
    assert (tmp_path / "cli" / "compared.json").is_file()
    assert (tmp_path / "cli" / "report.html").is_file()
    with pytest.raises(InputError, match="two models are compared, not 1"):
        compare_models({"a": pair[0]}, suite)
