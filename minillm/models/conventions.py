"""How text enters and leaves the models of a run: one tokenizer, one set of end tokens, one vocabulary, one context.

A base student and a chat teacher disagree about where an answer ends. What they agree on is settled once, by the teacher,
whose answers are imitated; every stage reads it here, and the student is saved with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from minillm.data.encoding import encoder_of
from minillm.data.sampling import Sampling, StopStrings
from minillm.errors import InputError
from minillm.models.configs import context_length, text_config
from minillm.models.load import load_tokenizer
from minillm.models.vocabulary import check_same_tokens, token_count


@dataclass(frozen=True)
class Conventions:
    """Facts about text that all models of a run share.

    Attributes:
        tokenizer: with the chat template, BOS, EOS and pad.
        eos_ids: every token that ends an answer: those that the teacher's generation config and tokenizer name, and the one
            with which the chat template ends what the assistant says.
        vocab_size: ids that can be drawn: the rows that all heads have and the tokenizer knows.
        context: tokens that every model takes; None where no config says.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    vocab_size: int
    context: int | None

    def sampling(
        self, max_new_tokens: int, temperature: float = 1.0, stop: Sequence[str] = (), **more: Any
    ) -> Sampling:
        """How tokens are drawn. A stop string that is the text of a special token means that token."""
        special = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        ends = {special[text] for text in stop if text in special}
        strings = [text for text in stop if text not in special]
        return Sampling(
            max_new_tokens, tuple(sorted({*self.eos_ids, *ends})), self.vocab_size, temperature,
            stop=StopStrings(self.tokenizer, strings) if strings else None, **more,
        )  # fmt: skip

    def write_to(self, model: Any) -> None:
        """Have a model say the same of itself, so that whoever loads it from where it is saved ends its answers where they end here."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        [first, *others] = self.eos_ids
        eos: Any = [first, *others] if others else first
        generation = getattr(base, "generation_config", None)
        for holder in (generation, base.config, base.config.get_text_config()):
            if holder is not None:
                holder.eos_token_id = eos
                holder.pad_token_id = self.tokenizer.pad_token_id
                holder.bos_token_id = self.tokenizer.bos_token_id


def settle(tokenizer: Any, teacher: Any = None, students: Iterable[Any] = (), *, template: bool = True) -> Conventions:
    """Settle what a teacher and its students share.

    Args:
        tokenizer: of all of them (`check_same_tokens`).
        teacher: a loaded model, or a folder or hub id, whose end tokens hold; None leaves it to the first student.
        students: likewise.
        template: whether answers are turns of the tokenizer's chat template, which then says where they end.

    Raises:
        ValueError: nothing says how an answer ends.
    """
    models = [model for model in (teacher, *students) if model is not None]
    configured = next((ids for model in models if (ids := _eos_of(model))), set())
    of_turn = encoder_of(tokenizer).end_of_answer() if template else None
    eos = configured | {end for end in (tokenizer.eos_token_id, of_turn) if end is not None}
    configs = [text_config(model) for model in models]
    width = min([token_count(tokenizer), *(config.vocab_size for config in configs)])
    if not (eos := {end for end in eos if 0 <= end < width}):
        names = (
            " and ".join(dict.fromkeys(str(getattr(model, "name_or_path", model)) for model in models))
            or "the tokenizer"
        )
        raise InputError(
            f"{names}: no end token: neither generation_config.json nor the tokenizer names one (eos_token_id), nor does the chat template "
            "end a turn with one; answers would never end. Set eos_token in tokenizer_config.json"
        )
    contexts = [length for config in configs if (length := context_length(config)) is not None]
    return Conventions(tokenizer, tuple(sorted(eos)), width, min(contexts, default=None))


def settle_run(teacher: str, student: str | None = None, *, template: bool = True) -> Conventions:
    """Settle it from folders, hub ids or GGUF files, before any weights load: the tokenizer is the teacher's.

    Raises:
        VocabularyError: their tokenizers differ.
        ValueError: see `settle`.
    """
    tokenizer = load_tokenizer(teacher)
    if student is not None:
        own = load_tokenizer(student)
        check_same_tokens(own, tokenizer)
        if template and not tokenizer.chat_template:
            tokenizer.chat_template = own.chat_template
    return settle(tokenizer, teacher, [] if student is None else [student], template=template)


def _eos_of(model: Any) -> set[int]:
    """End tokens that a model's generation config names, or its config where there is none."""
    if isinstance(model, str):
        try:
            generation: Any = GenerationConfig.from_pretrained(model)
        except (OSError, ValueError):
            generation = None
        named = getattr(generation, "eos_token_id", None)
        named = text_config(model).eos_token_id if named is None else named
    else:
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named = getattr(model.config.get_text_config(), "eos_token_id", None) if named is None else named
    return set() if named is None else set(named) if isinstance(named, list | tuple) else {int(named)}
