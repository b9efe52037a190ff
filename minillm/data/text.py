"""Packs text into blocks for the language-model term, and chooses the blocks of each update."""

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
    """Pack documents into blocks. A document is cut into pieces where a block is full.

    Attention does not cross from one piece of a block to the next. A piece of one token predicts nothing and is left
    out.

    Args:
        documents: Token ids of each document, without an end token.
        block: Largest number of tokens in a block.
        eos: End token, appended to each document.
        several: Whether a block may hold pieces of more than one document.

    Returns:
        The blocks, each a list of pieces.
    """
    blocks: list[list[array[int]]] = [[]]
    room = block
    for document in documents:
        ids = array("i", document)  # lists of Python integers would take ten times the memory for a corpus
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
    """Packed text. Every update takes its next `each` blocks.

    When all blocks have been taken, the next pass over them begins, each pass in an order of its own that depends on
    the seed. A document begins with the tokenizer's prefix (BOS) and ends with EOS; the text of a special token in it
    is text.

    Args:
        dataset: Rows with `text`. From a stream, which has no length, only as many rows are read as `updates` need.
        tokenizer: Tokenizer of the models.
        block: Largest number of tokens in a block.
        each: Blocks of one update, over all processes.
        seed: Seed of the orders.
        updates: Number of updates to come. If it is not positive, a stream is read to its end.
        several: Whether a block may hold pieces of more than one document.

    Attributes:
        share_rows: The argument `several`.
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
        """Whether there is at least one block."""
        return bool(self._blocks)

    def pieces(self, block: int) -> list[array[int]]:
        """Return the pieces of documents in a block, given by its number. Attention does not cross them."""
        return self._blocks[block]

    def tokens(self, blocks: Sequence[int]) -> int:
        """Return the number of tokens that are predicted in some blocks: all but the first of each piece."""
        return sum(len(piece) - 1 for block in blocks for piece in self._blocks[block])

    def of_update(self, update: int) -> list[int]:
        """Return the numbers of the blocks that all processes together take for an update, counted from 0."""
        n = len(self._blocks)
        turns = range(update * self._each, (update + 1) * self._each)
        return [permutation(n, self._seed, "text", turn // n)[turn % n] for turn in turns]
