"""The rollouts in a checkpoint, when machines have disks of their own and when they share one."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.errors import InputError
from minillm.train.rollout_checkpoint import RolloutCheckpoint

SAMPLING = Sampling(4, (1,), 30)


def saved(folder: Path, rank: int, processes: int, *, within: bool = True) -> None:
    """What a process leaves in a checkpoint: its rank is the token of its rollout."""
    rollout = Rollout.drawn([2], [rank + 3, 1], [-0.5, -0.5], SAMPLING, 0, stopped=True)
    folder.mkdir(exist_ok=True)
    RolloutCheckpoint(1, [rollout] if within else [], [rollout]).save(folder, rank, processes)


def token(found: RolloutCheckpoint | None) -> int:
    assert found is not None
    return found.rollouts[0].response_ids[0]


def test_a_disk_of_its_own_holds_what_its_machine_saved(tmp_path: Path) -> None:
    """Of four processes on two machines, the second disk has the files of two."""
    for rank in (2, 3):
        saved(tmp_path, rank, 4)
    assert [token(RolloutCheckpoint.load(tmp_path, rank, 4)) for rank in (2, 3)] == [5, 6]
    with pytest.raises(InputError, match=r"4 process\(es\) saved .*; resume with as many processes, not 2"):
        RolloutCheckpoint.load(tmp_path, 2, 2)


def test_a_machine_that_has_another_rank_now_is_refused(tmp_path: Path) -> None:
    for rank in (2, 3):
        saved(tmp_path, rank, 4)
    with pytest.raises(InputError, match=r"rollouts-0\.pt is not there: .* give each machine the rank that it had"):
        RolloutCheckpoint.load(tmp_path, 0, 4)


def test_between_two_batches_the_number_of_processes_may_change(tmp_path: Path) -> None:
    saved(tmp_path, 0, 1, within=False)
    found = RolloutCheckpoint.load(tmp_path, 3, 4)
    assert found is not None
    assert not found.rollouts
    assert [rollout.response_ids[0] for rollout in found.replay] == [3]
