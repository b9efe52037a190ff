"""Sampled answers to several prompts, for `minillm generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm.data.examples import Example, read_examples
from minillm.data.templates import render
from minillm.errors import InputError
from minillm.models.conventions import settle
from minillm.models.device import device, working_dtype
from minillm.models.load import load_model, load_tokenizer
from minillm.rollout.engines.transformers import TransformersEngine


def examples_of(prompts: Sequence[str], file: Path | None) -> list[Example]:
    """The prompts of a command line, and those of a file after them.

    Args:
        prompts: Instructions.
        file: JSON lines, with the rows that recipes read; or a text (`.txt`) of one instruction a line.

    Raises:
        InputError: there is no prompt, or the text file cannot be read.
        DataError: naming the line of the file.
    """
    found = [Example(number, prompt) for number, prompt in enumerate(prompts)]
    if file is not None and file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {file}: cannot be read: {error}") from None
        found += [Example(number, line.strip()) for number, line in enumerate(lines) if line.strip()]
    elif file is not None:
        found += read_examples(file)
    if not found:
        raise InputError("a prompt is needed: minillm generate MODEL PROMPT..., or --prompts FILE")
    return found


def generate_answers(
    model: str, examples: Sequence[Example], template: str, max_new_tokens: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    """Sample an answer to each prompt.

    Args:
        model: Folder or hub id.
        examples: The prompts.
        template: Value of `data.template`.
        max_new_tokens: Longest answer.
        temperature: Sampling temperature.
        seed: Seed of the first answer; each further one has the next.

    Returns:
        For each prompt `prompt`, `answer`, `finished` and `seed`.
    """
    tokenizer = load_tokenizer(model)
    prompts = [render(example, template, tokenizer) for example in examples]  # before the weights are loaded
    loaded: Any = load_model(model, working_dtype()).to(device())  # pyright: ignore[reportArgumentType]
    sampling = settle(tokenizer, loaded, template=template == "chat").sampling(max_new_tokens, temperature)
    seeds = [seed + number for number in range(len(prompts))]
    rollouts = TransformersEngine(loaded).generate(prompts, sampling, seeds)
    return [
        {
            "prompt": example.text,
            "answer": tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip(),
            "finished": rollout.finished,
            "seed": own,
        }
        for example, rollout, own in zip(examples, rollouts, seeds, strict=True)
    ]
