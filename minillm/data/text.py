"""Packs text into blocks for the language-model term, and chooses the blocks of each update."""

from __future__ import annotations

import math
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

from minillm.data.encoding import encoder_of
from minillm.data.lazy import IN_MEMORY
from minillm.data.seeding import ShuffledPasses
from minillm.errors import InputError

_TOKENS_IN_MEMORY = 1 << 22  # of a stream, which does not say how many rows it has: 16 MB, and seconds to tokenise
Block: TypeAlias = "list[array[int]]"


def pack_text(documents: Iterable[Iterable[int]], block: int, eos: int, *, several: bool = True) -> Iterator[Block]:
    """Pack documents into blocks. A document is cut into pieces where a block is full.

    Attention does not cross from one piece of a block to the next. A piece of one token predicts nothing and is left
    out.

    Args:
        documents: Token ids of each document, without an end token.
        block: Largest number of tokens in a block.
        eos: End token, appended to each document.
        several: Whether a block may hold pieces of more than one document.

    Yields:
        The blocks, each a list of pieces, as soon as they are full.
    """
    pieces: Block = []
    room = block
    for document in documents:
        ids = array("i", document)  # lists of Python integers would take ten times the memory for a corpus
        ids.append(eos)
        while len(ids) > 1:
            if room < 2 or (pieces and not several):
                if pieces:
                    yield pieces
                pieces, room = [], block
            piece, ids = ids[:room], ids[room:]
            pieces.append(piece)
            room -= len(piece)
    if pieces:
        yield pieces


class TextBlocks:
    """Packed text. Every update takes its next `each` blocks.

    When all blocks have been taken, the next pass over them begins, each pass in an order of its own that depends on
    the seed. A document begins with the tokenizer's prefix (BOS) and ends with EOS; the text of a special token in it
    is text.

    A large data set is tokenised and packed as updates need it, into a temporary file. Its first pass takes the blocks
    as they are packed, from documents in a random order (from a stream: in its own order). A resumed training packs
    the blocks before its update again.

    Args:
        dataset: Rows with `text`. From a stream, which has no length, only as many rows are read as `updates` need.
        tokenizer: Tokenizer of the models.
        block: Largest number of tokens in a block.
        each: Blocks of one update, over all processes.
        seed: Seed of the orders.
        updates: Number of updates to come. If it is not positive, a small stream is read to its end.
        several: Whether a block may hold pieces of more than one document.

    Attributes:
        share_rows: The argument `several`.
        each: Blocks of one update, over all processes.
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
        self.share_rows, self.each, self._seed = several, each, seed
        endless = not hasattr(dataset, "__len__")
        needed = updates * each * block if endless and updates > 0 else math.inf
        encoder = encoder_of(tokenizer)
        rows = iter(_in_order(dataset, seed))
        # While `documents` are a list, no other is read, so that a small data set is packed as a whole.
        documents, read = [], 0
        whole = not _is_large(dataset)
        while whole and read < needed and (row := next(rows, None)) is not None:
            documents.append(array("i", encoder.document(row["text"])))
            read += len(documents[-1]) + 1 if several else -(-(len(documents[-1]) + 1) // block) * block
            whole = not endless or read < _TOKENS_IN_MEMORY or read >= needed
        rest = () if whole else (encoder.document(row["text"]) for row in rows)
        self._packer = pack_text(chain(documents, rest), block, tokenizer.eos_token_id, several=several)
        self._blocks: list[Block] | _BlockFile = list(self._packer) if whole else _BlockFile()
        self._passes = ShuffledPasses(len(self._blocks), seed, "text") if len(self._blocks) else None

    def __bool__(self) -> bool:
        """Whether there is at least one block."""
        return self.has(0)

    def has(self, block: int) -> bool:
        """Return whether there is a block of this number. Blocks up to it are packed now."""
        while len(self._blocks) <= block and (packed := next(self._packer, None)) is not None:
            self._blocks.append(packed)
        return len(self._blocks) > block

    def pieces(self, block: int) -> Block:
        """Return the pieces of documents in a block, given by its number. Attention does not cross them."""
        return self._blocks[block]

    def tokens(self, blocks: Sequence[int]) -> int:
        """Return the number of tokens that are predicted in some blocks: all but the first of each piece."""
        return sum(len(piece) - 1 for block in blocks for piece in self.pieces(block))

    def of_update(self, update: int) -> list[int]:
        """Return the numbers of the blocks that all processes together take for an update, counted from 0."""
        return [self._at(turn) for turn in range(update * self.each, (update + 1) * self.each)]

    def passes_of_update(self, update: int) -> list[int]:
        """Return the number of the pass over all blocks that each block of `of_update` belongs to, counted from 0."""
        turns = range(update * self.each, (update + 1) * self.each)
        # While documents are left to pack, `has` is true of every turn that `_at` was asked for.
        return [0 if self.has(turn) else turn // len(self._blocks) for turn in turns]

    @property
    def is_whole(self) -> bool:
        """Whether all blocks are known: those of a small data set are packed as a whole."""
        return not isinstance(self._blocks, _BlockFile)

    def require(self, blocks: int) -> None:
        """Check that there are enough blocks for one update.

        Raises:
            InputError: There are fewer.
        """
        if not self.has(blocks - 1):
            raise InputError(
                f"the text has {len(self._blocks)} blocks, fewer than the {blocks} of one update "
                "(per_device_train_batch_size × gradient_accumulation_steps × processes): give more text, or a smaller "
                "block"
            )

    def __len__(self) -> int:
        """Return the number of blocks that have been packed: of a small data set, all."""
        return len(self._blocks)

    def _at(self, turn: int) -> int:
        """The number of the block at a turn of the endless sequence of passes over the blocks."""
        if isinstance(self._blocks, _BlockFile) and self.has(turn):
            return turn
        if self._passes is None:  # all documents of a large data set have been packed
            self._passes = ShuffledPasses(len(self._blocks), self._seed, "text")
        return self._passes[turn]


class _BlockFile:
    """Blocks in a temporary file, of which only the places are kept in memory.

    The file has no name, so nothing of it is left, however the process ends. It is as large as the tokens that were
    trained on, 4 bytes each, and lies where TMPDIR says.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it is closed with the object)
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, pieces: Block) -> None:
        """Write a block: the number of its pieces, their lengths, their tokens."""
        record = array("i", [len(pieces), *map(len, pieces)])
        for piece in pieces:
            record.extend(piece)
        os.pwrite(self._file.fileno(), record.tobytes(), self._starts[-1])
        self._starts.append(self._starts[-1] + len(record) * record.itemsize)

    def __getitem__(self, block: int) -> Block:
        start, end = self._starts[block], self._starts[block + 1]
        record = array("i", os.pread(self._file.fileno(), end - start, start))
        first = 1 + record[0]
        pieces = []
        for length in record[1:first]:
            pieces.append(record[first : first + length])
            first += length
        return pieces


def _is_large(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and len(dataset) > IN_MEMORY


def _in_order(dataset: Any, seed: int) -> Iterable[dict[str, Any]]:
    """The documents in the order in which they are packed: a random one if there are many, and otherwise their own."""
    if not _is_large(dataset):
        return dataset
    order = ShuffledPasses(len(dataset), seed, "documents")
    return (dataset[order[position]] for position in range(len(dataset)))
