"""Data sets as a trainer needs them: tokenised prompts, and packed text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from minillm.data.encoding import encoder_of
from minillm.data.examples import Example, Prompt, example_of
from minillm.data.lazy import IN_MEMORY, LazySequence
from minillm.data.templates import render, render_answer
from minillm.data.text import TextBlocks
from minillm.errors import InputError
from minillm.loss.config import Objective
from minillm.models.configs import context_length, text_config
from minillm.models.head import keeps_sequences_apart
from minillm.rollout.config import RolloutConfig

logger = logging.getLogger(__name__)

_TRIED = 1000  # rows of a large data set, spread evenly; to tokenise them takes under a second


def check_context(config: RolloutConfig, student: PreTrainedModel) -> None:
    """Check that the longest prompt and response fit into the student's context.

    Raises:
        InputError: they do not.
    """
    limit = context_length(text_config(student))
    if limit is not None and config.max_prompt_tokens + config.max_new_tokens > limit:
        raise InputError(
            f"rollout.max_prompt_tokens + max_new_tokens ({config.max_prompt_tokens} + {config.max_new_tokens}) "
            f"exceed the student's context of {limit}"
        )


def longest_scored(config: RolloutConfig, objective: Objective, text: bool, responses: Sequence[dict[str, Any]]) -> int:
    """Tokens of the longest sequence that the teacher will score.

    Args:
        config: the longest prompt and response.
        objective: whether the teacher reads text too, and the length of its blocks.
        text: whether there is text.
        responses: given responses.
    """
    reads_text = text and objective.language_model > 0 and objective.language_model_distill > 0
    rollout = config.max_prompt_tokens + config.max_new_tokens
    return max(rollout, objective.language_model_block if reads_text else 0, longest_row(responses))


def longest_row(rows: Sequence[dict[str, Any]]) -> int:
    """Tokens of the longest prompt with its response, at least 1; an upper bound where rows are not made yet."""
    if isinstance(rows, LazySequence) and rows.longest is not None:
        return rows.longest
    return max((len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows), default=1)


def tokenize_prompts(dataset: Sequence[dict[str, Any]], tokenizer: Any, max_prompt_tokens: int) -> Sequence[list[int]]:
    """Token ids of every prompt of a data set; if it is large, they are made when they are asked for.

    Args:
        dataset: rows with `prompt_ids`, or with `prompt` as text or as a list of chat messages; or with `messages`, of
            which what comes before the last answer is the prompt; or with `instruction` and `input`.
        tokenizer: the student's tokenizer.
        max_prompt_tokens: the most tokens of a prompt.

    Raises:
        InputError: there are no rows, a row has no prompt, or a prompt is too long. Of a large data set some rows are
            tried now, and the error of another is raised when it is asked for.
    """
    if len(dataset) > IN_MEMORY:
        large = LazySequence(len(dataset), lambda row: _short_prompt(dataset, row, tokenizer, max_prompt_tokens))
        if not isinstance(dataset, LazySequence):  # of a run's own prompts some have been rendered already
            for row in range(0, len(large), -(-len(large) // _TRIED)):
                _ = large[row]
        return large
    prompts = [_prompt_ids(dataset[i], tokenizer) for i in range(len(dataset))]
    if not prompts:
        raise InputError("train_dataset is empty")
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    _check_length(prompts[longest], longest, max_prompt_tokens)
    return prompts


def _short_prompt(dataset: Sequence[dict[str, Any]], row: int, tokenizer: Any, max_prompt_tokens: int) -> list[int]:
    ids = _prompt_ids(dataset[row], tokenizer)
    _check_length(ids, row, max_prompt_tokens)
    return ids


def _check_length(ids: list[int], row: int, max_prompt_tokens: int) -> None:
    if len(ids) > max_prompt_tokens:
        raise InputError(
            f"train_dataset row {row} has {len(ids)} prompt tokens; rollout.max_prompt_tokens is {max_prompt_tokens}"
        )


def _prompt_ids(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of one row's prompt."""
    row = _filled(row)
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    if "prompt" not in row and _is_example(row):
        return render(example_of(row, "a row of train_dataset"), "chat", tokenizer)
    if "prompt" not in row:
        raise InputError(
            "train_dataset: a row needs prompt or prompt_ids, or messages, or instruction; it has " + ", ".join(row)
        )
    if isinstance(row["prompt"], str):
        return encoder_of(tokenizer).document(row["prompt"])
    return encoder_of(tokenizer).chat(row["prompt"], "a prompt of train_dataset")


def _is_example(row: dict[str, Any]) -> bool:
    """Whether a row is one that recipes read, or of TRL's chats: `render` and its chat template make its tokens."""
    return "messages" in row or "instruction" in row


def tokenize_answered(
    dataset: Sequence[dict[str, Any]], tokenizer: Any, name: str = "train_dataset"
) -> Sequence[dict[str, Any]]:
    """Rows with `prompt_ids` and `response_ids` of rows in any form that has a prompt and its answer.

    Args:
        dataset: rows with `prompt_ids` and `response_ids`, which are returned as they are; or with `messages`, of which
            the last answer is the response; or with `instruction`, `input` and `output`; or TRL's `prompt` and
            `completion`, both as text or both as messages.
        tokenizer: the student's tokenizer, whose chat template renders what is not plain text.
        name: what errors call the data set.

    Raises:
        InputError, DataError: naming the row that has no answer, or cannot be read.
    """
    if len(dataset) == 0 or "prompt_ids" in dataset[0]:
        return dataset
    return [_answered(dataset[number], tokenizer, f"{name} row {number}") for number in range(len(dataset))]


def tokenize_validation(dataset: Any, tokenizer: Any) -> Any:
    """Rows with `prompt_ids` and `references` of rows in any form that has a prompt and its answers.

    Args:
        dataset: rows with `prompt_ids` and `references`, which are returned as they are, as None is; or in another form
            that `tokenize_answered` reads.
        tokenizer: the student's tokenizer.

    Raises:
        InputError, DataError: naming the row that has no answer, or cannot be read.
    """
    if isinstance(dataset, dict) or not dataset or "prompt_ids" in dataset[0]:
        return dataset
    return [
        _with_references(dataset[number], tokenizer, f"eval_dataset row {number}") for number in range(len(dataset))
    ]


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that a row fills; a `datasets.Dataset` has None in those of other rows."""
    return {name: value for name, value in row.items() if value is not None}


def _with_references(row: dict[str, Any], tokenizer: Any, place: str) -> dict[str, Any]:
    row = _filled(row)
    if _is_plain(row):
        return {
            "prompt_ids": encoder_of(tokenizer).document(row["prompt"]),
            "references": [row["completion"].strip()],
            **_teacher(row),
        }
    example = _answered_example(row, place)
    return {
        "prompt_ids": render(example, "chat", tokenizer),
        "references": [text.strip() for text in example.references],
        **_teacher(row),
    }


def _answered(row: dict[str, Any], tokenizer: Any, place: str) -> dict[str, Any]:
    row = _filled(row)
    if _is_plain(row):
        encoder, prompt = encoder_of(tokenizer), row["prompt"]
        response = [*encoder.text(row["completion"], first=not prompt), tokenizer.eos_token_id]
        return {"prompt_ids": encoder.document(prompt), "response_ids": response, **_teacher(row)}
    example = _answered_example(row, place)
    rendered = Prompt(example, render(example, "chat", tokenizer))
    response = render_answer(rendered, "chat", tokenizer)
    return {"prompt_ids": rendered.ids, "response_ids": response, **_teacher(row)}


def _is_plain(row: dict[str, Any]) -> bool:
    """Whether a row is TRL's `prompt` and `completion` as text, which no template renders."""
    return isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)


def _teacher(row: dict[str, Any]) -> dict[str, Any]:
    return {"teacher": row["teacher"]} if "teacher" in row else {}


def _answered_example(row: dict[str, Any], place: str) -> Example:
    """The example of a row that is to have an answer.

    Raises:
        InputError, DataError: it has none, or cannot be read.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        row = {"messages": [*prompt, *completion]}
    elif not _is_example(row):
        raise InputError(
            f"{place}: a row needs prompt_ids and response_ids, or prompt and completion, or messages, or instruction "
            f"and output; it has {', '.join(row)}"
        )
    example = example_of(row, place)
    if not example.output:
        raise InputError(f"{place}: there is no answer in it")
    return example


def pack_text_dataset(
    dataset: Iterable[dict[str, Any]] | None,
    student: PreTrainedModel,
    tokenizer: Any,
    objective: Objective,
    args: TrainingArguments,
    blocks_per_update: int,
) -> TextBlocks | None:
    """Packed text for the language-model term; None if there is no text, or if the objective does not use it.

    Args:
        dataset: rows with `text`. Of a stream (which has no length), only what `max_steps` updates need is read.
        student: the model; some families let packed documents attend to each other, and then a block holds one
            document.
        tokenizer: the student's tokenizer.
        objective: the coefficient of the term, and the length of a block.
        args: seed and number of updates.
        blocks_per_update: blocks of one update, over all processes.
    """
    if dataset is None:
        return None
    if not objective.language_model:
        logger.warning("text_dataset is not used: objective.language_model is 0")
        return None
    several = keeps_sequences_apart(student)
    if not several:
        logger.warning(
            "%s lets packed documents attend to each other, so a block of text holds one document.",
            type(student).__name__,
        )
    return TextBlocks(
        dataset,
        tokenizer,
        objective.language_model_block,
        blocks_per_update,
        args.seed,
        updates=args.max_steps,
        several=several,
    )
