"""Tiny random models and a tokenizer, made on the spot: no download, milliseconds a forward."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    # The processes of a test run, and those that tests start, share the cores alike.
    threads = max((os.cpu_count() or 1) // processes, 1)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

WORDS = [f"w{i}" for i in range(28)]
SPECIAL = ["<pad>", "<eos>", "<user>", "<bot>"]
CHAT = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def tiny_tokenizer() -> Any:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT,
        additional_special_tokens=["<user>", "<bot>"],
    )


def tiny_llama(
    seed: int, *, layers: int = 2, width: int = 64, vocab: int = 32, tied: bool = True, scale: float = 0.25
) -> LlamaForCausalLM:
    """A random Llama that vLLM's CPU build accepts too (head size 32). `scale` sets how peaked its predictions are."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=scale,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a student (2 layers) and a teacher (3 layers) of one vocabulary."""
    root = tmp_path_factory.mktemp("pair")
    return save(tiny_llama(1), root / "student"), save(tiny_llama(2, layers=3), root / "teacher")
