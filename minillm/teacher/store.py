"""A store of a teacher's distributions on disk: a few weighted tokens at each predicted token of packed text.

The folder holds `store.json`, which says what the store is of, and a safetensors file for each shard of blocks.
safetensors is the format of the models themselves: mapped into memory, read slice by slice, and refused if a file is
cut short. Nothing compresses it further, because ids of drawn tokens are as good as random. A shard is written under
another name and renamed when it is whole, so a process that is killed leaves whole shards only, and the next one writes
those that are missing. Several processes write different shards.

A position takes 2 bytes for each id (3 if the vocabulary has more than 65,536 tokens), 2 for each weight of its own, 2
for the entropy and 2 for the counts. Weights are steps of 1/2048 nat of their logarithm, and are made to sum to 1 when
they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from minillm.data.files import read_json, write_json
from minillm.data.rollouts import SparseTargets
from minillm.errors import DataError, InputError, RunError
from minillm.teacher.sampling import Sample

SHARD_BLOCKS = 64
"""Numbers of blocks in a shard. Work on a shard that was not finished is done again."""
_STEPS = 2048.0  # of the logarithm of a weight, for each nat; 16 bits then reach e^-32
_FORMAT = 1
_MOST_TOKENS = 1 << 24
_OPEN = 256  # shards that a reader keeps open


@dataclass(frozen=True)
class StoreFacts:
    """What a store is of. A store with another fact is refused by the name of the fact.

    Attributes:
        tokenizer: digest of the tokenizer's vocabulary.
        teacher: digest of the teacher's weights.
        text: digest of the text's source.
        block: most tokens of a block.
        vocab_size: tokens that the distributions are over.
        temperature: what the teacher's logits are divided by.
        sampler: settings of the sampler.
        seed: seed of the draws and of the order of the text.
        draws: independent samples of each block; pass i over the text reads draw i mod `draws`.
    """

    tokenizer: str
    teacher: str
    text: str
    block: int
    vocab_size: int
    temperature: float
    sampler: Mapping[str, Any]
    seed: int
    draws: int = 1


def check_facts(folder: Path, expected: StoreFacts) -> None:
    """Compare the facts of a store with those that are needed.

    Raises:
        InputError: there is no store, or one fact differs, with both values.
    """
    path = folder / "store.json"
    try:
        kept = read_json(path)
    except OSError:
        raise InputError(f"{folder}: no store of teacher distributions (store.json); stage logits writes one") from None
    except ValueError:
        raise InputError(f"{path}: not JSON; delete the folder to write the store again") from None
    if kept.get("format") != _FORMAT:
        raise InputError(f"{path}: format {kept.get('format')}; this version reads format {_FORMAT}")
    for name, value in asdict(expected).items():
        if kept["facts"].get(name) != value:
            raise InputError(
                f"{folder}: a store of another {name}: {kept['facts'].get(name)!r}, and {value!r} is needed. Name "
                "another folder, or delete this one to write it again"
            )


def _shard_path(folder: Path, draw: int, shard: int) -> Path:
    return folder / f"draw-{draw}-shard-{shard:06d}.safetensors"


def hash_of(pieces: Iterable[array[int]]) -> int:
    """The hash of a block's tokens, by which a store knows its text; a signed number of 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(len(piece).to_bytes(4, "little") + array("i", piece).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass
class BlockSample:
    """The samples of a block: its number, the hash of its tokens, and one position for each predicted token."""

    number: int
    hash: int
    sample: Sample


class StoreWriter:
    """Writes a store, or the part of one that is not there yet.

    Args:
        folder: the folder of the store.
        facts: what it is of.

    Raises:
        InputError: the folder holds a store of something else, or the vocabulary has more tokens than 3 bytes name.
        RunError: the folder cannot be written.
    """

    def __init__(self, folder: Path, facts: StoreFacts) -> None:
        self.folder, self._wide_ids = folder, facts.vocab_size > 1 << 16
        if facts.vocab_size > _MOST_TOKENS:
            raise InputError(
                f"{folder}: a store keeps ids of 3 bytes, and the vocabulary has {facts.vocab_size} tokens, more than "
                f"{_MOST_TOKENS}: leave the logits stage out, and pretrain takes the live teacher"
            )
        if (folder / "store.json").is_file():
            check_facts(folder, facts)
        else:
            # Several processes may begin at once: each has a file of its own to rename.
            own = folder / f"store-{os.getpid()}.json"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(own, {"format": _FORMAT, "facts": asdict(facts)})
                own.replace(folder / "store.json")
            except OSError as error:
                raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from None

    def missing(self, blocks: Sequence[int], draw: int) -> list[list[int]]:
        """The blocks of each shard that has to be written: it is not there, it is torn, or it lacks one of them."""
        wanted: dict[int, list[int]] = {}
        for block in sorted(set(blocks)):
            wanted.setdefault(block // SHARD_BLOCKS, []).append(block)
        return [some for shard, some in wanted.items() if not self._holds(draw, shard, some)]

    def wait(self, blocks: Sequence[int], draws: int, going_on: Callable[[], bool]) -> None:
        """Wait until every shard of some blocks is there, written by this process or by others.

        Args:
            blocks: the numbers of the blocks.
            draws: how many draws of each.
            going_on: whether the others can still write them; it is asked every second.

        Raises:
            RunError: they cannot.
        """
        shards = sorted({block // SHARD_BLOCKS for block in blocks})
        paths = [_shard_path(self.folder, draw, shard) for draw in range(draws) for shard in shards]
        while missing := [path for path in paths if not path.is_file()]:
            if not going_on():
                raise RunError(
                    f"{missing[0]}: another process was to write it, and has stopped; what it printed says why. The "
                    "same command continues"
                )
            time.sleep(1)

    def _holds(self, draw: int, shard: int, blocks: list[int]) -> bool:
        path = _shard_path(self.folder, draw, shard)
        try:
            return path.is_file() and set(blocks) <= _Shard(path).places.keys()
        except DataError:
            return False

    def write(self, draw: int, samples: Sequence[BlockSample]) -> int:
        """Write the samples of the blocks of one shard.

        Returns:
            The bytes of the file.

        Raises:
            RunError: it cannot be written, for example because the disk is full. What was written before is kept.
        """
        [shard] = {sample.number // SHARD_BLOCKS for sample in samples}
        data = to_bytes(*self._encode(samples))
        path = _shard_path(self.folder, draw, shard)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise RunError(
                f"{path}: {error.strerror or error}. The shards before it are whole, and the same command continues"
            ) from None
        return len(data)

    def _encode(self, samples: Sequence[BlockSample]) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
        """The arrays of a shard, and their checksum with the sums for the report."""
        arrays: dict[str, list[np.ndarray[Any, Any]]] = {}
        starts = [np.zeros(3, np.int64)]
        for block in samples:
            found = block.sample
            slot = torch.arange(found.ids.shape[1], device=found.ids.device)
            ids = found.ids[slot < found.counts[:, None]].cpu().numpy()
            weights = found.weights[slot < found.explicit[:, None]].cpu().numpy()
            arrays.setdefault("ids", []).append(ids.astype(np.uint16))
            if self._wide_ids:
                arrays.setdefault("high", []).append((ids >> 16).astype(np.uint8))
            arrays.setdefault("weights", []).append(_steps(-np.log(np.maximum(weights, 1e-300))))
            arrays.setdefault("entropy", []).append(_steps(found.entropy.cpu().numpy()))
            arrays.setdefault("counts", []).append(found.counts.cpu().numpy().astype(np.uint8))
            arrays.setdefault("explicit", []).append(found.explicit.cpu().numpy().astype(np.uint8))
            starts.append(starts[-1] + np.array([len(found.counts), len(ids), len(weights)]))
        out = {name: np.concatenate(parts) for name, parts in arrays.items()}
        out["starts"] = np.stack(starts)
        out["blocks"] = np.array([block.number for block in samples], np.int64)
        out["hashes"] = np.array([block.hash for block in samples], np.int64)
        kept = sum(float(block.sample.kept.sum()) for block in samples)
        return out, {
            "facts": json.dumps({"checksum": _checksum(out), "kept": kept})
        }  # two keys would have no fixed order


def _steps(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.clip(np.rint(values * _STEPS), 0, 65535).astype(np.uint16)


def _checksum(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


class _Shard:
    """A file of samples, checked when it is opened and then read by slices.

    Args:
        path: the file.
        check: whether to compare its checksum, which reads all of it.

    Attributes:
        places: the index of each block in the shard, by its number.

    Raises:
        DataError: it cannot be read, or it is not what was written.
    """

    def __init__(self, path: Path, check: bool = True) -> None:
        self.path = path
        arrays: dict[str, Any] = {}
        try:
            self._file: Any = safe_open(path, framework="numpy")
            names = list(self._file.keys())
            arrays = {
                name: self._file.get_tensor(name) for name in names if check or name in ("starts", "hashes", "blocks")
            }
            facts = json.loads(self._file.metadata()["facts"])
            whole = not check or facts["checksum"] == _checksum(arrays)
            self.kept = float(facts["kept"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            whole, names = False, []
        if not whole:
            raise DataError(f"{path}: torn, or changed since it was written; stage logits writes it again")
        self._starts, self._hashes = arrays["starts"], arrays["hashes"].tolist()
        self.places = {number: place for place, number in enumerate(arrays["blocks"].tolist())}
        self.tokens, self._wide_ids = int(self._starts[-1, 0]), "high" in names

    def targets(self, block: int, hash_: int) -> SparseTargets:
        """The samples of a block as targets.

        Raises:
            DataError: the block is not here, or has other tokens.
        """
        if block not in self.places:
            raise DataError(f"{self.path}: block {block} of the text is not in it; stage logits adds it")
        place = self.places[block]
        if self._hashes[place] != hash_:
            raise DataError(
                f"{self.path}: a store of another text: block {block} has other tokens than data.text, packed as it is "
                "now, gives it"
            )
        (tokens, ids_, weights_), (tokens_end, ids_end, weights_end) = self._starts[place : place + 2].tolist()
        counts, explicit = (self._part(name, tokens, tokens_end).astype(np.int64) for name in ("counts", "explicit"))
        ids = self._part("ids", ids_, ids_end).astype(np.int64)
        if self._wide_ids:
            ids |= self._part("high", ids_, ids_end).astype(np.int64) << 16
        own = np.exp(self._part("weights", weights_, weights_end) / -_STEPS)
        slot = np.arange(int(counts.max(initial=1)))
        used = slot < counts[:, None]
        all_ids, weights = np.zeros(used.shape, np.int64), np.zeros(used.shape)
        all_ids[used] = ids
        weights[slot < explicit[:, None]] = own
        shared = np.take_along_axis(weights, explicit[:, None] - 1, 1)
        weights = np.where(used & (slot >= explicit[:, None]), shared, weights)
        weights /= weights.sum(-1, keepdims=True)
        entropy = self._part("entropy", tokens, tokens_end) / _STEPS
        return SparseTargets(
            torch.from_numpy(all_ids), torch.from_numpy(weights).float(), torch.from_numpy(entropy).float()
        )

    def _part(self, name: str, start: int, end: int) -> np.ndarray[Any, Any]:
        return self._file.get_slice(name)[start:end]


class TargetStore:
    """Reads a store.

    Args:
        folder: the folder of the store.
        facts: what it has to be of.

    Raises:
        InputError: it is a store of something else, or none.
    """

    def __init__(self, folder: Path, facts: StoreFacts) -> None:
        check_facts(folder, facts)
        self._folder, self._draws = folder, facts.draws
        self._shards: dict[tuple[int, int], _Shard] = {}
        self._checked: set[tuple[int, int]] = set()

    def targets(self, blocks: Sequence[tuple[int, int, Sequence[array[int]]]]) -> SparseTargets:
        """The targets of all predicted tokens of some blocks, in their order.

        Args:
            blocks: the number of each block, that of the pass over the text, which chooses among the draws, and the
                pieces of the block.

        Raises:
            DataError: a block is missing or torn, or has other tokens.
        """
        found = [
            self._shard(number_of_pass % self._draws, number).targets(number, hash_of(pieces))
            for number, number_of_pass, pieces in blocks
        ]
        slots = max(part.ids.shape[1] for part in found)
        ids, weights = (
            torch.cat([torch.nn.functional.pad(values, (0, slots - values.shape[1])) for values in parts])
            for parts in ([part.ids for part in found], [part.weights for part in found])
        )
        return SparseTargets(ids, weights, torch.cat([part.entropy for part in found if part.entropy is not None]))

    def _shard(self, draw: int, block: int) -> _Shard:
        key = draw, block // SHARD_BLOCKS
        if key not in self._shards:
            if len(self._shards) >= _OPEN:
                del self._shards[next(iter(self._shards))]
            self._shards[key] = _Shard(_shard_path(self._folder, *key), check=key not in self._checked)
            self._checked.add(key)
        return self._shards[key]


def summary(folder: Path) -> dict[str, float]:
    """Size of a store: bytes of a token, tokens, and the mean probability of the tokens that are kept.

    Raises:
        DataError: a shard is torn, or there is none.
    """
    paths = sorted(folder.glob("draw-*.safetensors"))
    if not paths:
        raise DataError(f"{folder}: no shard has been written")
    shards = [_Shard(path) for path in paths]
    tokens, size = sum(shard.tokens for shard in shards), sum(path.stat().st_size for path in paths)
    kept = sum(shard.kept for shard in shards) / max(tokens, 1)
    return {"tokens": tokens, "bytes": size, "bytes_per_token": size / max(tokens, 1), "kept_mass": kept}
