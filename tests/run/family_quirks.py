"""What is peculiar about each family's published models, on small ones: tokenizers, special tokens, settings.

The tokenizers are built as those of the families are (bytes or SentencePiece, BOS or none, one end token or several, a
pad token or none, a space before every text or none), with a vocabulary of the texts that the tests use. The heads are
as padded as theirs are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.opt import OPTConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from minillm.data.examples import Example
from minillm.data.templates import prompt_text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "assistant\n{%", "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{%"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Quirks:
    """How the published models of a family differ from others.

    Attributes:
        recipe: The recipe that is run.
        special: Special tokens, in the order of their ids, which begin at 0.
        config: Makes the config of so many layers, given the settings that all have.
        bos, eos, pad: Names of special tokens; None if there is none.
        ends: Names of all tokens that end an answer.
        adds_bos: Whether the tokenizer puts BOS before a text.
        sentencepiece: Whether the tokenizer is one of SentencePiece, or else of bytes.
        adds_space: Whether it puts a space before a text.
        template: Chat template; None if there is none.
        padding: Rows of the head beyond the tokens.
        facts: What the table of the documents says beside that.
    """

    recipe: str
    special: tuple[str, ...]
    config: Callable[[int, dict[str, Any]], Any]
    eos: str
    bos: str | None = None
    pad: str | None = None
    ends: tuple[str, ...] = ()
    adds_bos: bool = False
    sentencepiece: bool = False
    adds_space: bool = False
    template: str | None = None
    padding: int = 0
    facts: tuple[str, ...] = field(default=())

    @property
    def all_ends(self) -> list[int]:
        return sorted({self.special.index(token) for token in (self.eos, *self.ends)})


BLOCKS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
END = "<|endoftext|>"
FAMILIES: dict[str, Quirks] = {
    "gpt2": Quirks(
        "gpt2/120m", (END,), lambda n, given: GPT2Config(
            **given, n_positions=256, n_embd=64, n_layer=n, n_head=2, initializer_range=0.2,
        ), eos=END, bos=END, facts=("tied", "learned positions"),
    ),
    "opt": Quirks(
        "opt/1.3b", ("<s>", "<pad>", "</s>", "<unk>"), lambda n, given: OPTConfig(
            **given, hidden_size=64, num_hidden_layers=n, num_attention_heads=2, ffn_dim=128, max_position_embeddings=256,
            word_embed_proj_dim=64, init_std=0.2,
        ), eos="</s>", bos="</s>", pad="<pad>", adds_bos=True, padding=7,
        facts=("tied", "learned positions, offset by 2", "BOS is EOS"),
    ),
    "pythia": Quirks(
        "pythia/160m", (END, "<|padding|>"), lambda n, given: GPTNeoXConfig(
            **given, hidden_size=64, num_hidden_layers=n, num_attention_heads=2, intermediate_size=128,
            max_position_embeddings=256, use_parallel_residual=True, **dict[str, Any](rotary_pct=0.25), tie_word_embeddings=False,
            initializer_range=0.2,
        ), eos=END, bos=END, padding=27, facts=("untied", "parallel residual", "a quarter of each head rotates"),
    ),
    "llama": Quirks(
        "llama/7b", ("<unk>", "<s>", "</s>"), lambda n, given: LlamaConfig(
            **given, **BLOCKS | dict[str, Any](num_key_value_heads=2), num_hidden_layers=n, tie_word_embeddings=False,
        ), eos="</s>", bos="<s>", adds_bos=True, sentencepiece=True, adds_space=True, facts=("untied",),
    ),
    "llama3": Quirks(
        "llama/llama3.2-1b",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        lambda n, given: LlamaConfig(
            **given, **BLOCKS, num_hidden_layers=n, tie_word_embeddings=True, rope_parameters={
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64, "rope_theta": 500000.0,
            },
        ), eos="<|eot_id|>", bos="<|begin_of_text|>", ends=("<|end_of_text|>", "<|eom_id|>"), adds_bos=True,
        template=LLAMA3, facts=("tied", "stretched rotary positions"),
    ),
    "qwen2": Quirks(
        "qwen2.5/0.5b", (END, "<|im_start|>", "<|im_end|>"), lambda n, given: Qwen2Config(
            **given, **BLOCKS, num_hidden_layers=n, tie_word_embeddings=True,
        ), eos="<|im_end|>", pad=END, ends=(END,), template=CHATML, padding=271, facts=("tied", "biases of q, k, v"),
    ),
    "qwen3": Quirks(
        "qwen3/0.6b", (END, "<|im_start|>", "<|im_end|>"), lambda n, given: Qwen3Config(
            **given, **BLOCKS, num_hidden_layers=n, tie_word_embeddings=True,
        ), eos="<|im_end|>", pad=END, ends=(END,), template=THINKING, padding=267,
        facts=("tied", "norms of q and k", "a template that thinks"),
    ),
    "smollm2": Quirks(
        "smollm2/135m", (END, "<|im_start|>", "<|im_end|>"), lambda n, given: LlamaConfig(
            **given, **BLOCKS, num_hidden_layers=n, tie_word_embeddings=True,
        ), eos="<|im_end|>", bos="<|im_start|>", pad="<|im_end|>", template=CHATML, facts=("tied",),
    ),
    "gemma2": Quirks(
        "gemma/gemma2-2b", ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        lambda n, given: Gemma2Config(
            **given, **BLOCKS, num_hidden_layers=n, query_pre_attn_scalar=32, sliding_window=16,
            final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
        ), eos="<eos>", bos="<bos>", pad="<pad>", ends=("<end_of_turn>",), adds_bos=True, sentencepiece=True,
        template=GEMMA, facts=("tied", "every other layer sees 16 tokens", "soft caps of 50 and 30"),
    ),
    "gemma3": Quirks(
        "gemma/gemma3-270m", ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        lambda n, given: Gemma3TextConfig(
            **given, **BLOCKS, num_hidden_layers=n, query_pre_attn_scalar=32, sliding_window=16,
            layer_types=["sliding_attention"] * (n - 1) + ["full_attention"],
        ), eos="<eos>", bos="<bos>", pad="<pad>", ends=("<end_of_turn>",), adds_bos=True, sentencepiece=True,
        template=GEMMA, facts=("tied", "all layers but the last see 16 tokens", "norms of q and k", "two rotary bases"),
    ),
}  # fmt: skip


def texts() -> list[str]:
    """What the vocabularies are made of."""
    words = [f"w{i}" for i in range(28)]
    example = Example(0, " ".join(words), "", (" ".join(words),))
    return [prompt_text(example, "alpaca"), "user\nassistant\nmodel\nsystem\n<think>\n\n</think>\n\n", *words] * 4


@cache
def _vocabulary(sentencepiece: bool, special: tuple[str, ...]) -> Tokenizer:
    raw: Any = Tokenizer(models.BPE(unk_token="<unk>" if sentencepiece else None, byte_fallback=sentencepiece))
    alphabet = [] if sentencepiece else pre_tokenizers.ByteLevel.alphabet()
    bytes_of = [f"<0x{number:02X}>" for number in range(256)] if sentencepiece else []
    if sentencepiece:
        raw.normalizer = normalizers.Replace(" ", "▁")
        raw.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁\n]*|\n+|[^▁\n]+"), behavior="isolated")
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer: Any = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=560, special_tokens=[*special, *bytes_of], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts(), trainer)
    return raw


def tokenizer_of(quirks: Quirks) -> Any:
    """The tokenizer of a small model of the family."""
    raw: Any = Tokenizer.from_str(_vocabulary(quirks.sentencepiece, quirks.special).to_str())
    if quirks.sentencepiece:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if quirks.adds_space:
            raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            steps.append(decoders.Strip(" ", 1, 0))
        raw.decoder = decoders.Sequence(steps)
    else:
        raw.decoder = decoders.ByteLevel()
    if quirks.adds_bos:
        assert quirks.bos is not None
        raw.post_processor = processors.TemplateProcessing(
            single=f"{quirks.bos} $A", special_tokens=[(quirks.bos, quirks.special.index(quirks.bos))]
        )
    named = {"bos_token": quirks.bos, "eos_token": quirks.eos, "pad_token": quirks.pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        chat_template=quirks.template,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in quirks.special if token not in named.values()],
        **{name: token for name, token in named.items() if token is not None},
    )


def save_model(quirks: Quirks, folder: Path, *, layers: int, seed: int, padding: int | None = None) -> str:
    """Save a small random model of a family with its tokenizer; returns the folder."""
    tokenizer = tokenizer_of(quirks)
    torch.manual_seed(seed)
    ids = {
        name: None if token is None else quirks.special.index(token)
        for name, token in (("bos_token_id", quirks.bos), ("eos_token_id", quirks.eos), ("pad_token_id", quirks.pad))
    }
    width = len(tokenizer) + (quirks.padding if padding is None else padding)
    model: Any = AutoModelForCausalLM.from_config(quirks.config(layers, {"vocab_size": width, **ids}))
    ends: Any = quirks.all_ends
    model.generation_config = GenerationConfig(**ids | {"eos_token_id": ends if len(ends) > 1 else ends[0]})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
