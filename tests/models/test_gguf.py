"""What the header of a GGUF file says holds for the tokenizer, the config and the models that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from minillm.data.encoding import TextEncoder
from minillm.data.examples import Example
from minillm.data.templates import render
from minillm.data.text import TextBlocks
from minillm.errors import InputError
from minillm.models.configs import read_config
from minillm.models.conventions import settle_run
from minillm.models.gguf import gguf_header, tokenizer_facts
from minillm.models.load import load_model, load_tokenizer
from tests.gguf_files import BYTES, SENTENCEPIECE, write_gguf

CHAT = "{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"
TEMPLATES = ("plain", "alpaca", "{{ instruction }}", "{{ bos_token }}{{ instruction }}")
A = SENTENCEPIECE.index("a")
SPACED = SENTENCEPIECE.index("▁a")


@pytest.mark.parametrize(
    ("kind", "said", "ids"),
    [
        ("llama", {}, [1, SPACED]),  # llama.cpp's defaults for SentencePiece
        ("llama", {"add_bos_token": False}, [SPACED]),
        ("llama", {"add_space_prefix": False}, [1, A]),
        ("llama", {"add_bos_token": True, "add_eos_token": True, "add_space_prefix": False}, [1, A, 2]),
        ("llama", {"bos_token_id": None, "add_space_prefix": False}, [A]),
        ("gpt2", {}, [A]),
        ("gpt2", {"add_bos_token": True}, [1, A]),
        ("gpt2", {"pre": "llama-bpe"}, [1, A]),
        ("gpt2", {"pre": "llama-bpe", "add_bos_token": False}, [A]),
        ("gpt2", {"add_space_prefix": True}, [SPACED]),
    ],
)
def test_a_text_is_what_the_header_says(kind: str, said: dict[str, Any], ids: list[int], tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", kind, **said)
    tokenizer = load_tokenizer(tmp_path / "x.gguf")
    assert tokenizer("a")["input_ids"] == ids
    assert tokenizer.decode(tokenizer("a b")["input_ids"], skip_special_tokens=True).lstrip() == "a b"
    # What is saved is the same tokenizer for everybody.
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")):
        for text in ("a", "a b\na", " a", "ba<turn>a", ""):
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(loaded, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("saved", [False, True])
def test_bos_begins_every_prompt_and_text_once(kind: str, saved: bool, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", kind, add_bos_token=True, add_eos_token=True, chat_template=CHAT)
    tokenizer = load_tokenizer(tmp_path / "x.gguf")
    if saved:
        tokenizer.save_pretrained(tmp_path / "saved")
        tokenizer = load_tokenizer(tmp_path / "saved")
    assert TextEncoder(tokenizer).prefix == [1]
    for template in (*TEMPLATES, "chat"):
        ids = render(Example(0, "ab"), template, tokenizer)
        assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 0), template  # an end is no part of a prompt
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)[:2].count(1) == 1
    blocks = TextBlocks([{"text": "ab"}], tokenizer, 64, 1, 0, updates=1, several=True)
    assert [list(blocks.pieces(0)[0]).count(token) for token in (1, 2)] == [1, 1]


def test_a_chat_template_that_writes_bos_is_left_as_it_is(tmp_path: Path) -> None:
    for number, (template, adds) in enumerate([("{{ bos_token }}" + CHAT, True), (CHAT, False)]):
        write_gguf(tmp_path / f"{number}.gguf", add_bos_token=adds, chat_template=template)
        tokenizer = load_tokenizer(tmp_path / f"{number}.gguf")
        assert tokenizer.chat_template == template
        assert render(Example(0, "ab"), "chat", tokenizer).count(1) == adds


def test_every_end_that_the_header_names_ends_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    write_gguf(file, eot_token_id=4, padding_token_id=None)
    assert read_config(file).eos_token_id == [2, 4]
    conventions = settle_run(str(file), template=False)
    assert conventions.eos_ids == (2, 4)
    assert conventions.tokenizer.pad_token_id == 2  # the file names none
    model = load_model(file, torch.float32)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == [2, 4]
    model.save_pretrained(tmp_path / "saved")
    conventions.tokenizer.save_pretrained(tmp_path / "saved")
    assert settle_run(str(tmp_path / "saved"), template=False).eos_ids == (2, 4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_weights_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "x.gguf", kind, seed=3)
    read = load_model(tmp_path / "x.gguf", torch.float32)
    ids = torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, written(ids).logits)


def test_a_header_is_read_without_the_vocabulary(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", "gpt2", pre="llama-bpe")
    header = gguf_header(tmp_path / "x.gguf")
    assert header["tokenizer.ggml.tokens"] == len(BYTES)
    assert tokenizer_facts(header).adds_bos


def test_the_config_is_the_one_that_transformers_reads(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    write_gguf(file)
    ours, theirs = read_config(file).to_dict(), AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf").to_dict()
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing <= {"pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path"}
    assert ours["vocab_size"] == len(SENTENCEPIECE)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a file of weights", None])
def test_a_file_that_is_cut_short_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:600] if content is None else content)
    for read in (load_tokenizer, read_config, load_model):
        with pytest.raises(InputError, match=r"x\.gguf: its header cannot be read"):
            read(file)
