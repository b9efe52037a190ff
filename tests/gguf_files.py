"""Writes small GGUF files: a random Llama, a vocabulary, and what a header says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<turn>"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SENTENCEPIECE = [*SPECIAL, "▁", "\n", *LETTERS, "▁a"]
BYTES = [*SPECIAL, "Ġ", "Ċ", *LETTERS, "Ġa"]
CONTROL, NORMAL = 3, 1


def write_gguf(file: Path, kind: str = "llama", *, seed: int = 0, **said: Any) -> LlamaForCausalLM:
    """Write a random Llama with a vocabulary of letters, and return it.

    Args:
        file: File to write.
        kind: `llama` for a SentencePiece vocabulary, `gpt2` for one of bytes.
        seed: Seed of the weights.
        said: What the header says of the tokenizer, by its keys in `tokenizer.ggml`; `chat_template` beside them.
    """
    tokens = SENTENCEPIECE if kind == "llama" else BYTES
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.25,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    if kind == "gpt2":
        writer.add_token_merges(["Ġ a"])
    template = said.pop("chat_template", None)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in ({"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 3} | said).items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    add_tensors(writer, model, gguf.MODEL_ARCH.LLAMA)
    return model


def add_tensors(writer: gguf.GGUFWriter, model: Any, architecture: gguf.MODEL_ARCH) -> None:
    """Add the weights of a model to a file, under the names of GGUF, and write it."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    names = gguf.get_tensor_name_map(architecture, layers)
    gemma = architecture == gguf.MODEL_ARCH.GEMMA3
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored is not None, name
        if gemma and name.endswith("norm.weight"):
            value = value + 1
        if not gemma and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp turns pairs of neighbours, transformers those half a head apart
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(stored, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
