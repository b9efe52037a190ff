"""Classification by choice: the probability that a model's whole answer is one of several given answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from minillm.data.encoding import encoder_of
from minillm.data.examples import Example, Prompt
from minillm.data.sampling import Sampling
from minillm.errors import DataError
from minillm.evaluation.text_metrics import exact_match
from minillm.teacher.local import LocalTeacher

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def choice_ids(choices: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise each choice as a response is tokenised after its prompt.

    Text that looks like a special token stays text.

    Args:
        choices: The answers to choose from.
        tokenizer: The model's tokenizer.

    Returns:
        The token ids of each choice.

    Raises:
        DataError: A choice has no token, or two choices have the same tokens, so that no probability tells them apart.
    """
    encoder = encoder_of(tokenizer)
    options = [list(encoder.text(choice, first=False)) for choice in choices]
    for number, ids in enumerate(options):
        if not ids:
            raise DataError(f"{choices[number]!r} has no token; leave it out")
        if ids in options[:number]:
            other = choices[options.index(ids)]
            raise DataError(
                f"{other!r} and {choices[number]!r} are the same tokens, {ids}; "
                "leave one out, or write them differently"
            )
    return options


def right_choices(choices: Sequence[str], references: Sequence[str]) -> set[int]:
    """Find the choices that the references name.

    Args:
        choices: The answers to choose from.
        references: The right answers of a row.

    Returns:
        Indices of the choices that equal a reference as written; if there are none, of those that equal one by
        `exact_match`.
    """
    written = [reference.strip() for reference in references]
    equal = {number for number, choice in enumerate(choices) if choice.strip() in written}
    return equal or {number for number, choice in enumerate(choices) if references and exact_match(choice, references)}


def check_references(choices: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuse a set that has no reference, or in which the reference of a row is none of the choices.

    Args:
        choices: The answers to choose from.
        examples: The rows of the set.

    Raises:
        DataError: The message names the row.
    """
    referenced = [example for example in examples if example.references]
    if not referenced:
        raise DataError("no row has a reference that tells which is right")
    for example in referenced:
        if not right_choices(choices, example.references):
            given, allowed = (", ".join(map(repr, texts)) for texts in (example.references, choices))
            raise DataError(
                f"none is the reference {given} of row {example.row} (counted from 0): "
                f"correct it, or the choices ({allowed})"
            )


@torch.no_grad()
def choice_logprobs(
    scorer: LocalTeacher, prompts: Sequence[Prompt], options: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[Float[Tensor, " options"]]:
    """Compute the log-probability that a response consists of one option and ends there.

    A response may end with any of the end tokens. No two of these events can happen together, even where one option
    begins with another.

    Args:
        scorer: The model.
        prompts: Rendered prompts.
        options: Token ids of the choices.
        sampling: Gives the vocabulary, the temperature and the end tokens.

    Yields:
        For each prompt the log-probability of every option, on the CPU.

    Raises:
        DataError: The model has no token that ends a response.
    """
    ends = [token for token in sampling.eos_ids if token < sampling.vocab_size]
    if not ends:
        raise DataError(
            "choices: the model has no token that ends an answer (eos_token_id in its generation_config.json)"
        )
    for prompt in prompts:
        hidden = scorer.hidden([prompt.ids] * len(options), [[*ids, ends[0]] for ids in options])
        rows = [scorer.distribution(states, sampling) for states in hidden]
        yield torch.stack(
            [_option_logprob(some, ids, ends) for some, ids in zip(rows, options, strict=True)],
        ).cpu()


def _option_logprob(
    logprobs: Float[Tensor, "positions vocabulary"], ids: Sequence[int], ends: Sequence[int]
) -> Float[Tensor, ""]:
    """Log-probability of an option's tokens at all but the last position, and of any end token at the last."""
    tokens = torch.tensor(list(ids), device=logprobs.device)[:, None]
    return logprobs[:-1].gather(1, tokens).sum() + logprobs[-1, list(ends)].logsumexp(0)
