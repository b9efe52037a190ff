"""Settles what the models of a run share: tokenizer, end tokens, vocabulary and context length.

A base student and a chat teacher disagree about where an answer ends. The teacher decides, because its answers are
imitated. It is decided once, every stage uses the result, and the student is saved with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from minillm.data.encoding import encoder_of
from minillm.data.sampling import Sampling, StopStrings
from minillm.errors import InputError
from minillm.models.configs import context_length, text_config
from minillm.models.load import load_tokenizer
from minillm.models.sources import find_gguf
from minillm.models.vocabulary import check_same_tokens, token_count


@dataclass(frozen=True)
class Conventions:
    """What all models of a run share.

    Attributes:
        tokenizer: The tokenizer, with chat template, BOS, EOS and pad token.
        eos_ids: Every token that ends an answer: those that the teacher's generation config and tokenizer name, and the
            one with which the chat template ends the assistant's turn.
        vocab_size: Number of ids that can be sampled: those for which every head has a row and that the tokenizer
            knows.
        context: Number of positions that every model has; None if no config says.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    vocab_size: int
    context: int | None

    def sampling(
        self, max_new_tokens: int, temperature: float = 1.0, stop: Sequence[str] = (), **more: Any
    ) -> Sampling:
        """Return sampling settings for these models.

        Args:
            max_new_tokens: Largest number of tokens of a response.
            temperature: Temperature of the softmax.
            stop: Stop strings. One that is the text of a special token becomes an end token.
            more: Other fields of `Sampling`.

        Raises:
            InputError: A stop string is empty.
        """
        special = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        ends = {special[text] for text in stop if text in special}
        strings = [text for text in stop if text not in special]
        return Sampling(
            max_new_tokens,
            tuple(sorted({*self.eos_ids, *ends})),
            self.vocab_size,
            temperature,
            stop=StopStrings(self.tokenizer, strings) if strings else None,
            **more,
        )

    def write_to(self, model: Any) -> None:
        """Write the special tokens into the configs of a model, in place.

        Whoever loads the model from where it is saved then ends its answers where this run ends them.
        """
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
    """Work out what a teacher and its students share.

    Args:
        tokenizer: Tokenizer of all of them (see `check_same_tokens`).
        teacher: A loaded model, or its folder or hub id. Its end tokens are used. None leaves them to the first
            student.
        students: Loaded models, or their folders or hub ids.
        template: Whether answers are turns of the tokenizer's chat template, which then also says where they end.

    Raises:
        InputError: Nothing says how an answer ends.
    """
    models = [model for model in (teacher, *students) if model is not None]
    configured = next((ids for model in models if (ids := _eos_of(model))), set())
    of_turn = encoder_of(tokenizer).end_of_answer() if template else None
    eos = configured | {end for end in (tokenizer.eos_token_id, of_turn) if end is not None}
    configs = [text_config(model) for model in models]
    width = min([token_count(tokenizer), *(config.vocab_size for config in configs)])
    if not (eos := {end for end in eos if 0 <= end < width}):
        names = dict.fromkeys(str(getattr(model, "name_or_path", model)) for model in models)
        raise InputError(
            f"{' and '.join(names) or 'the tokenizer'}: no end token: neither generation_config.json nor the tokenizer "
            "names one (eos_token_id), and the chat template ends no turn with one; answers would never end. Set "
            "eos_token in tokenizer_config.json"
        )
    contexts = [length for config in configs if (length := context_length(config)) is not None]
    return Conventions(tokenizer, tuple(sorted(eos)), width, min(contexts, default=None))


def settle_run(
    teacher: str, student: str | None = None, *, template: bool = True, others: Mapping[str, str] | None = None
) -> Conventions:
    """Work out what teacher and student share before any weights are loaded. The tokenizer is the teacher's.

    Args:
        teacher: Folder, hub id or GGUF file of the teacher.
        student: Folder, hub id or GGUF file of the student. If the teacher has no chat template, the student's is used.
        template: As for `settle`.
        others: Further teachers by what messages call them. Only their vocabulary and context count.

    Raises:
        VocabularyError: The tokenizers differ.
        InputError: As for `settle`.
    """
    tokenizer = load_tokenizer(teacher)
    if student is not None:
        own = load_tokenizer(student)
        check_same_tokens(own, tokenizer)
        if template and not tokenizer.chat_template:
            tokenizer.chat_template = own.chat_template
    for name, source in (others or {}).items():
        check_same_tokens(tokenizer, load_tokenizer(source), name)
    students = [] if student is None else [student]
    return settle(tokenizer, teacher, [*students, *(others or {}).values()], template=template)


def _eos_of(model: Any) -> set[int]:
    """Return the end tokens that a model's generation config names, or its config if that names none."""
    if isinstance(model, str):
        try:
            generation: Any = None if find_gguf(model) else GenerationConfig.from_pretrained(model)
        except (OSError, ValueError):
            generation = None
        named = getattr(generation, "eos_token_id", None)
        named = text_config(model).eos_token_id if named is None else named
    else:
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named = getattr(model.config.get_text_config(), "eos_token_id", None) if named is None else named
    return set() if named is None else set(named) if isinstance(named, list | tuple) else {int(named)}
