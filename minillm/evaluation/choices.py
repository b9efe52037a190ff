"""Classification by choice: how probable is it that a model's whole answer is one of several?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.data.encoding import encoder_of
from minillm.data.examples import Example, Prompt
from minillm.data.sampling import Sampling
from minillm.errors import DataError
from minillm.evaluation.metrics import exact_match
from minillm.teacher.local import LocalTeacher


def choice_ids(choices: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each choice, as a response has them after its prompt; what looks like a special token is text.

    Raises:
        DataError: a choice has no token, or two have the same, which no probability tells apart.
    """
    encoder = encoder_of(tokenizer)
    options = [list(encoder.text(choice, first=False)) for choice in choices]
    for place, ids in enumerate(options):
        if not ids:
            raise DataError(f"{choices[place]!r} has no token; leave it out")
        if ids in options[:place]:
            other = choices[options.index(ids)]
            raise DataError(
                f"{other!r} and {choices[place]!r} are the same tokens, {ids}; leave one out, or write them otherwise"
            )
    return options


def right_choices(choices: Sequence[str], references: Sequence[str]) -> set[int]:
    """Which of the choices the references are: as they are written, or, where none is, by `exact_match`."""
    written = {
        place
        for place, choice in enumerate(choices)
        if choice.strip() in [reference.strip() for reference in references]
    }
    return written or {place for place, choice in enumerate(choices) if references and exact_match(choice, references)}


def check_references(choices: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuse a set of which a reference is none of the choices, or that has no reference.

    Raises:
        DataError: naming the row.
    """
    referenced = [example for example in examples if example.references]
    if not referenced:
        raise DataError("no row has a reference that tells which is right")
    for example in referenced:
        if not right_choices(choices, example.references):
            given, allowed = (", ".join(map(repr, texts)) for texts in (example.references, choices))
            raise DataError(
                f"none is the reference {given} of row {example.row} (counted from 0): correct it, or the choices ({allowed})"
            )


@torch.no_grad()
def choice_logprobs(
    scorer: LocalTeacher, prompts: Sequence[Prompt], options: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[Tensor]:
    """For each prompt log P [len(options)] that the response is the option and ends there, with any token that ends one: events of which
    no two happen together, even where one option begins like another.

    Raises:
        DataError: no token ends a response.
    """
    ends = [token for token in sampling.eos_ids if token < sampling.vocab_size]
    if not ends:
        raise DataError(
            "choices: the model has no token that ends an answer (eos_token_id in its generation_config.json)"
        )
    for prompt in prompts:
        hidden = scorer.hidden([prompt.ids] * len(options), [[*ids, ends[0]] for ids in options])
        logs = [scorer.distribution(states, sampling) for states in hidden]
        yield torch.stack([
            rows[:-1].gather(1, torch.tensor(list(ids), device=rows.device)[:, None]).sum() + rows[-1, ends].logsumexp(0)
            for rows, ids in zip(logs, options, strict=True)
        ]).cpu()  # fmt: skip
