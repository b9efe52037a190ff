"""Blocks of text for the language-model term, and which of them an update takes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from minillm.data.encoding import encoder_of
from minillm.data.seeding import permutation


def pack_text(
    documents: Iterable[Iterable[int]], block: int, eos: int, *, several: bool = True
) -> list[list[array[int]]]:
    """Blocks of at most `block` tokens, each a list of pieces of documents, which `eos` ends.

    A piece sees nothing of its neighbours. A piece of one token predicts nothing and is left out.

    Args:
        several: whether a block may hold pieces of more than one document.
    """
    blocks: list[list[array[int]]] = [[]]
    room = block
    for document in documents:
        ids = array("i", document)  # a corpus of Python integers would take ten times the room
        ids.append(eos)
        while len(ids) > 1:
            if room < 2 or (blocks[-1] and not several):
                blocks.append([])
                room = block
            piece, ids = ids[:room], ids[room:]
            blocks[-1].append(piece)
            room -= len(piece)
    return [pieces for pieces in blocks if pieces]


class TextBlocks:
    """Packed text; every update takes `each` blocks, of passes over all of them, each pass in a seeded order of its own.

    A document begins with what the tokenizer puts before a text (BOS) and ends with EOS; in it, the text of a special token is text.

    Args:
        dataset: rows with `text`. Of a stream, which has no length, no more is read than `updates` need (all, if that is not positive).
        block: tokens.
        several: whether a block may hold pieces of more than one document.
    """

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        tokenizer: Any,
        block: int,
        each: int,
        seed: int,
        *,
        updates: int,
        several: bool,
    ) -> None:
        endless = not hasattr(dataset, "__len__") and updates > 0
        needed = updates * each * block if endless else math.inf
        encoder = encoder_of(tokenizer)
        documents, read = [], 0
        for row in dataset:
            documents.append(array("i", encoder.document(row["text"])))
            read += len(documents[-1]) + 1 if several else -(-(len(documents[-1]) + 1) // block) * block
            if read >= needed:
                break
        self.share_rows = several
        self._blocks = pack_text(documents, block, tokenizer.eos_token_id, several=several)
        self._each, self._seed = each, seed

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def pieces(self, block: int) -> list[array[int]]:
        """What a block holds; no piece sees another."""
        return self._blocks[block]

    def tokens(self, blocks: Sequence[int]) -> int:
        """Tokens that are predicted in some blocks."""
        return sum(len(piece) - 1 for block in blocks for piece in self._blocks[block])

    def of_update(self, update: int) -> list[int]:
        """The blocks that all processes together take for an update."""
        n = len(self._blocks)
        places = range(update * self._each, (update + 1) * self._each)
        return [permutation(n, self._seed, "text", place // n)[place % n] for place in places]
