"""A teacher's distributions on disk: read back as they were, refused by name, continued after a kill at any byte."""

from __future__ import annotations

import errno
import os
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.data.rollouts import SparseTargets
from minillm.errors import DataError, InputError, RunError
from minillm.loss.supervised import SupervisedLoss
from minillm.loss.token_scores import token_scores
from minillm.models.head import Head
from minillm.teacher.config import SamplerConfig
from minillm.teacher.sampling import Sample, sample
from minillm.teacher.store import (
    SHARD_BLOCKS,
    BlockSample,
    StoreFacts,
    StoreWriter,
    TargetStore,
    hash_of,
    summary,
)

FACTS = StoreFacts(
    tokenizer="t", teacher="p", text="x", block=8, vocab_size=100, temperature=1.0, sampler={"tokens": 6}, seed=0
)


def pieces(block: int) -> list[array[int]]:
    return [array("i", [block % 50 + i for i in range(5)]), array("i", [block % 50, 7])]


def block_sample(block: int, method: str = "threshold", width: int = 100, draw: int = 0) -> BlockSample:
    g = torch.Generator().manual_seed(block)
    logits = 3 * torch.randn(5, width, generator=g)  # 4 + 1 predicted tokens
    config = SamplerConfig.model_validate({"method": method, "tokens": 6})
    found = sample(logits, config, 1.0, torch.Generator().manual_seed(100 * draw + block))
    return BlockSample(block, hash_of(pieces(block)), found)


def write(folder: Path, blocks: list[int], facts: StoreFacts = FACTS, draw: int = 0, **options: Any) -> int:
    """Write what is missing; returns the number of shards that were."""
    writer = StoreWriter(folder, facts)
    shards = writer.missing(blocks, draw)
    for shard in shards:
        writer.write(draw, [block_sample(block, width=facts.vocab_size, draw=draw, **options) for block in shard])
    return len(shards)


def dense(ids: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    return torch.zeros(len(ids), width, dtype=torch.float64).scatter_add(1, ids, weights.double())


@pytest.mark.parametrize("method", ["threshold", "top_p_k", "random"])
@pytest.mark.parametrize("width", [100, 70_000])
def test_what_is_read_is_what_was_written(method: str, width: int, tmp_path: Path) -> None:
    facts = replace(FACTS, vocab_size=width)
    write(tmp_path, [3, 70, 5], facts, method=method)
    store = TargetStore(tmp_path, facts)
    got = store.targets([(70, 0, pieces(70)), (3, 0, pieces(3))])
    wanted: list[Sample] = [block_sample(number, method, width).sample for number in (70, 3)]
    expected = torch.cat([dense(found.ids, found.weights, width) for found in wanted])
    torch.testing.assert_close(dense(got.ids, got.weights, width), expected, rtol=1e-3, atol=3e-4)
    torch.testing.assert_close(got.weights.sum(-1), torch.ones(10), rtol=0, atol=3e-7)
    assert got.entropy is not None
    torch.testing.assert_close(got.entropy.double(), torch.cat([s.entropy for s in wanted]), rtol=0, atol=3e-4)
    for row, found in zip(got.ids[:5], wanted[0].ids, strict=True):
        assert set(found.tolist()) <= {*row.tolist(), 0}


def test_the_gradient_is_that_of_the_same_targets_in_memory_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path, [1])
    first, again = (TargetStore(tmp_path, FACTS).targets([(1, 0, pieces(1))]) for _ in range(2))
    in_memory = SparseTargets(first.ids.clone(), first.weights.clone())
    results = []
    for targets in (again, in_memory):
        g = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(5, 8, generator=g).requires_grad_(), torch.randn(100, 8, generator=g)
        head = Head(weight.requires_grad_(), None, 1.0, None)
        loss, _ = token_scores(hidden, head, torch.arange(5), targets, loss_fn=SupervisedLoss(0.1, 5))
        results.append([loss, *torch.autograd.grad(loss, [hidden, head.weight])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokenizer", "u"), ("teacher", "r"), ("text", "y"), ("block", 16), ("temperature", 2.0), ("seed", 1)],
)
def test_a_store_of_something_else_is_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, [1])
    other = replace(FACTS, **{name: value})
    for opened in (TargetStore, StoreWriter):
        with pytest.raises(InputError, match=f"a store of another {name}: "):
            opened(tmp_path, other)
    with pytest.raises(InputError, match="no store of teacher distributions"):
        TargetStore(tmp_path / "none", FACTS)


def test_a_block_of_another_text_is_found_by_its_tokens(tmp_path: Path) -> None:
    write(tmp_path, [1])
    store = TargetStore(tmp_path, FACTS)
    with pytest.raises(DataError, match="block 1 has other tokens"):
        store.targets([(1, 0, pieces(2))])
    with pytest.raises(DataError, match="block 2 of the text is not in it"):
        store.targets([(2, 0, pieces(2))])


def test_only_what_is_missing_or_torn_is_written_again(tmp_path: Path) -> None:
    blocks = [1, SHARD_BLOCKS, 2 * SHARD_BLOCKS]
    assert write(tmp_path, blocks) == 3
    assert write(tmp_path, blocks) == 0
    assert write(tmp_path, [*blocks, 2]) == 1  # its shard lacks a block
    files = sorted(tmp_path.glob("draw-*.safetensors"))
    whole = files[1].read_bytes()
    for end in (0, 4, len(whole) // 3, len(whole) - 1):
        files[1].write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"shard-000001.*torn"):
            TargetStore(tmp_path, FACTS).targets([(SHARD_BLOCKS, 0, pieces(SHARD_BLOCKS))])
        assert write(tmp_path, blocks) == 1
        assert files[1].read_bytes() == whole
    for place in range(len(whole) - 200, len(whole), 41):
        files[1].write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert write(tmp_path, blocks) == 1, "a changed bit"
    (tmp_path / "draw-0-shard-000001.safetensors.77.part").write_bytes(whole[:100])  # of a process that was killed
    assert TargetStore(tmp_path, FACTS).targets([(1, 0, pieces(1))]).ids.shape[0] == 5


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [1])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left"):
            write(tmp_path, [1, SHARD_BLOCKS])
    assert not list(tmp_path.glob("*.part"))
    assert write(tmp_path, [1, SHARD_BLOCKS]) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file: cannot be written \((Not a directory|File exists)\)"):
        StoreWriter(tmp_path / "file", FACTS)


def test_ids_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ids of 3 bytes, and the vocabulary has 16777217 tokens"):
        StoreWriter(tmp_path / "store", replace(FACTS, vocab_size=(1 << 24) + 1))
    assert not (tmp_path / "store").exists()


def test_a_shard_that_another_process_was_to_write_is_waited_for(tmp_path: Path) -> None:
    blocks, asked = [1, SHARD_BLOCKS], []

    def others_write() -> bool:
        asked.append(len(list(tmp_path.glob("draw-*"))))
        write(tmp_path, blocks)
        return True

    write(tmp_path, blocks[:1])
    StoreWriter(tmp_path, FACTS).wait(blocks, 1, others_write)
    assert asked == [1]
    with pytest.raises(RunError, match=r"draw-1-shard-000000.*another process was to write it, and has stopped"):
        StoreWriter(tmp_path, FACTS).wait(blocks, 2, lambda: False)


def test_each_pass_reads_a_draw_of_its_own(tmp_path: Path) -> None:
    facts = replace(FACTS, draws=2)
    for draw in range(2):
        write(tmp_path, [1], facts, draw)
    store = TargetStore(tmp_path, facts)
    first, second, third = (store.targets([(1, number, pieces(1))]).ids for number in range(3))
    assert not torch.equal(first, second)
    assert torch.equal(first, third)


def test_the_size_and_the_kept_mass_are_reported(tmp_path: Path) -> None:
    write(tmp_path, list(range(SHARD_BLOCKS)))
    found = summary(tmp_path)
    assert found["tokens"] == 5 * SHARD_BLOCKS
    kept = torch.cat([block_sample(block).sample.kept for block in range(SHARD_BLOCKS)]).mean()
    assert found["kept_mass"] == pytest.approx(float(kept))
    assert found["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("draw-*"))
    assert 16 < found["bytes_per_token"] < 50  # 6 ids, up to 7 weights, entropy, counts, and a share of the block's
