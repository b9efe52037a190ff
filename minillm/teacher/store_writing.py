"""Writes a store with a teacher in this process: states, logits, samples, shard by shard."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.data.seeding import seed_of
from minillm.data.text import TextBlocks
from minillm.models.load import resolve_cached
from minillm.teacher.config import SamplerConfig
from minillm.teacher.sampling import Sample, sample
from minillm.teacher.states import StatesTeacher
from minillm.teacher.store import SHARD_BLOCKS, BlockSample, StoreWriter, hash_of
from minillm.terminal import Progress

_ROWS = 128  # positions whose logits exist at once; part of what decides the draws
_TOGETHER = 8  # blocks in one call of the teacher


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn.

    Attributes:
        sampler: the method.
        temperature: what the teacher's logits are divided by.
        vocab_size: tokens that the distributions are over.
        end: the end token, which a sampler may always keep; None if there is none.
        seed: with the numbers of draw and block it decides the draws of a block, so a continued store is the same.
    """

    sampler: SamplerConfig
    temperature: float
    vocab_size: int
    seed: int
    end: int | None = None


def write_missing(
    writer: StoreWriter,
    teacher: StatesTeacher,
    text: TextBlocks,
    blocks: Sequence[int],
    draw: int,
    drawing: Drawing,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Write the shards of some blocks that are not there yet, and show the progress.

    Args:
        writer: the store.
        teacher: the teacher.
        text: packed text.
        blocks: the numbers of the blocks.
        draw: the number of the draw.
        drawing: how samples are drawn.
        share: number of this process, and of how many; each writes shards of its own.

    Returns:
        The tokens that were written.

    Raises:
        RunError: a shard cannot be written; those before it are kept.
    """
    process, processes = share
    own = [block for block in blocks if block // SHARD_BLOCKS % processes == process]
    missing = writer.missing(own, draw)
    started, tokens = time.perf_counter(), 0
    with Progress(len(missing), "shards") as shown:
        for shard in missing:
            samples = []
            for first in range(0, len(shard), _TOGETHER):
                samples += _samples(teacher, text, shard[first : first + _TOGETHER], draw, drawing)
            writer.write(draw, samples)
            tokens += sum(len(block.sample.counts) for block in samples)
            shown.update(note=f"{tokens / (time.perf_counter() - started):.0f} tokens/s")
    return tokens


def _samples(
    teacher: StatesTeacher, text: TextBlocks, blocks: Sequence[int], draw: int, drawing: Drawing
) -> list[BlockSample]:
    """The samples of some blocks, of which each piece is scored by itself."""
    pieces = [text.pieces(block) for block in blocks]
    flat = [ids for some in pieces for ids in some]
    states = iter(teacher.hidden([ids[:1] for ids in flat], [ids[1:] for ids in flat]))
    head, out = teacher.head.narrow(drawing.vocab_size), []
    for block, some in zip(blocks, pieces, strict=True):
        hidden = torch.cat([next(states) for _ in some])
        always = torch.tensor([token for ids in some for token in ids[1:]], device=hidden.device)[:, None]
        if drawing.end is not None:
            always = torch.cat([always, torch.full_like(always, drawing.end)], 1)
        generator = torch.Generator().manual_seed(seed_of(drawing.seed, "store", draw, block))
        with torch.no_grad():
            parts = [
                sample(head.logits(rows, 1.0), drawing.sampler, drawing.temperature, generator, kept)
                for rows, kept in zip(hidden.split(_ROWS), always.split(_ROWS), strict=True)
            ]
        out.append(BlockSample(block, hash_of(some), _joined(parts)))
    return out


def _joined(parts: Sequence[Sample]) -> Sample:
    """Samples of consecutive positions as one; slots that only some of them have are empty in the others."""
    slots = max(part.ids.shape[1] for part in parts)
    ids, weights = (
        torch.cat([torch.nn.functional.pad(values, (0, slots - values.shape[1])) for values in each])
        for each in ([part.ids for part in parts], [part.weights for part in parts])
    )
    counts, explicit, entropy, kept = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("counts", "explicit", "entropy", "kept")
    )
    return Sample(ids, weights, counts, explicit, entropy, kept)


def digest_of_weights(source: str) -> str:
    """The digest of a model's weights: of the files in its folder, or of its name if it is not on this machine."""
    folder = Path(resolve_cached(source))
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return digest_of_files(files) if files else source


def digest_of_files(files: Sequence[Path]) -> str:
    """The digest of what files hold, read in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()
