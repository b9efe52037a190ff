"""The prompts of a large data set, rendered when they are asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minillm.data.encoding import encoder_of
from minillm.data.examples import Example, Prompt
from minillm.data.lazy import LazySequence
from minillm.data.seeding import seed_of
from minillm.data.templates import render
from minillm.errors import DataError, InputError

logger = logging.getLogger(__name__)

_LOOKED_AT = 1000  # rows that are rendered before training begins, spread evenly; under a second
_ATTEMPTS = 10_000  # rows that are tried in place of one that is left out


@dataclass(frozen=True)
class Rendering:
    """How examples become prompts; the attributes are the arguments of `minillm.data.templates.render_all`."""

    template: str
    tokenizer: Any
    max_prompt_tokens: int
    system: str | None = None


class LazyPrompts(LazySequence[Prompt]):
    """Prompts of a large data set, in the order of its rows.

    Which prompts are too long is known once they are rendered. Their places are not closed up, because the place of a
    prompt must follow from its number alone, in every process and after a resume. Another row stands in for the one
    that is left out: the same one each time, drawn with the number of the place as its seed. A pass over the prompts
    therefore has every prompt that is short enough, and as many of them twice as are left out.

    Args:
        examples: The examples.
        rendering: How they are rendered.
        numbers: Numbers of the examples that become prompts; by default all.
    """

    def __init__(self, examples: Sequence[Example], rendering: Rendering, numbers: Sequence[int] | None = None) -> None:
        self._examples, self._rendering = examples, rendering
        self._numbers = range(len(examples)) if numbers is None else numbers
        self._refused: set[str] = set()
        super().__init__(len(self._numbers), self._prompt, rendering.max_prompt_tokens)

    def in_order(self, after: int = -1, teacher: str = "") -> Iterator[Prompt]:
        """Yield the prompts that are short enough, each once, in the order of the rows.

        Args:
            after: Number of the example before the first one.
            teacher: The teacher that rows must name; rows of other teachers are passed over. Empty for all rows.
        """
        for number in self._numbers:
            example = self._examples[number] if number > after else None
            if example is not None and teacher in ("", example.teacher):
                prompt = self._rendered(example)
                if prompt is not None:
                    yield prompt

    def look_at_some(self, source: str) -> None:
        """Render some of the prompts, to report before training begins what would be left out, and how often.

        Args:
            source: Name of the data, for messages.

        Raises:
            DataError: The template refuses all of them.
            InputError: All of them are too long.
        """
        numbers = self._numbers[:: -(-len(self) // _LOOKED_AT)]
        some = [self._examples[number] for number in numbers]
        refused: list[DataError] = []
        too_long = []
        for example in some:
            try:
                if len(self._ids(example)) > self._rendering.max_prompt_tokens:
                    too_long.append(example)
            except DataError as error:
                refused.append(error)
        if refused and len(refused) + len(too_long) == len(some):
            raise refused[0]
        if len(too_long) == len(some):
            raise InputError(
                f"{source}: no prompt of {len(some)} looked at is within data.max_prompt_tokens "
                f"({self._rendering.max_prompt_tokens})"
            )
        report = f"of {len(some)} rows looked at ({source} has {len(self._examples)})"
        if refused:
            logger.warning("%d %s are left out: the template refuses them. %s", len(refused), report, refused[0])
        if too_long:
            logger.warning(
                "%d %s exceed data.max_prompt_tokens (%d) and are left out, as all such rows are; the first is row %d",
                len(too_long), report, self._rendering.max_prompt_tokens, too_long[0].row,
            )  # fmt: skip
        literal = literal_specials(some, self._rendering.tokenizer)
        if literal:
            logger.warning(
                "%d %s hold the text of a special token of the tokenizer, which is read as ordinary text (first: %s)",
                len(literal), report, literal[0].place,
            )  # fmt: skip

    def _prompt(self, place: int) -> Prompt:
        """The prompt at a place, or the one that stands in for it."""
        for attempt in range(_ATTEMPTS):
            at = place if attempt == 0 else seed_of("stand-in", place, attempt) % len(self)
            prompt = self._rendered(self._examples[self._numbers[at]])
            if prompt is not None:
                return prompt
        raise InputError(
            f"no prompt of {_ATTEMPTS} tried is within data.max_prompt_tokens ({self._rendering.max_prompt_tokens})"
        )

    def _rendered(self, example: Example) -> Prompt | None:
        """The prompt of an example; None if it is left out."""
        try:
            ids = self._ids(example)
        except DataError as error:  # work must not be lost to one of a million rows
            if example.place not in self._refused:
                self._refused.add(example.place)
                logger.warning("A row is left out: %s", error)
            return None
        return Prompt(example, ids) if len(ids) <= self._rendering.max_prompt_tokens else None

    def _ids(self, example: Example) -> list[int]:
        how = self._rendering
        return render(example, how.template, how.tokenizer, how.system)

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyPrompts, (self._examples, self._rendering, self._numbers)


def literal_specials(examples: Sequence[Example], tokenizer: Any) -> list[Example]:
    """Return the examples that hold the text of a special token."""
    has_special = encoder_of(tokenizer).has_special
    return [e for e in examples if any(map(has_special, (e.text, *e.references, *(text for _, text in e.chat))))]
