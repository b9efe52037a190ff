"""Jobs in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from minillm.errors import JobError
from minillm.run.experiments import jobs
from minillm.run.experiments.jobs import Job, run_jobs


def note(folder: Path, name: str, others: int) -> None:
    """End once `others` jobs have begun, so that only jobs that run at the same time end."""
    threads, gpu = torch.get_num_threads(), os.environ.get("CUDA_VISIBLE_DEVICES")
    print(f"{name} runs with {threads} threads, GPU {gpu}", flush=True)
    (folder / f"{name}.begun").write_text(str(os.getpid()))
    until = time.monotonic() + 120
    while len(list(folder.glob("*.begun"))) < others:
        assert time.monotonic() < until
        time.sleep(0.05)
    if name == "bad":
        raise ValueError("no such thing")


def make(folder: Path, names: list[str], others: int = 1) -> list[Job]:
    return [Job(name, note, (folder, name, others), folder / f"{name}.log") for name in names]


def test_jobs_run_side_by_side_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "gpu_of_slot", lambda slot: f"gpu-{slot}")
    ended: list[int] = []
    with pytest.raises(JobError, match=r"1 of 3 failed.*bad \(.*bad\.log\)"):
        run_jobs(make(tmp_path, ["bad", "one", "two"], others=2), 2, lambda: ended.append(len(ended)))
    assert ended == [0, 1]
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("bad", "one", "two")}
    assert "ValueError: no such thing" in logs["bad"]
    assert "GPU gpu-0" in logs["bad"]
    assert "GPU gpu-1" in logs["one"]
    assert len({(tmp_path / f"{name}.begun").read_text() for name in ("bad", "one", "two")}) == 3
    assert f"{max(1, (os.cpu_count() or 1) // 2)} threads" in logs["two"]


def note_with_cores(folder: Path, name: str, others: int) -> None:
    """The same, and write down the cores that the process may use."""
    (folder / f"{name}.cores").write_text(",".join(map(str, sorted(os.sched_getaffinity(0)))))
    note(folder, name, others)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or (os.cpu_count() or 1) < 2, reason="no cores to share out")
def test_without_gpus_each_has_cores_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "gpu_of_slot", lambda _: None)
    run_jobs([Job(name, note_with_cores, (tmp_path, name, 2), tmp_path / f"{name}.log") for name in ("one", "two")], 2)
    one, two = (set((tmp_path / f"{name}.cores").read_text().split(",")) for name in ("one", "two"))
    assert not one & two
    assert len(one) == len(two) == len(os.sched_getaffinity(0)) // 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert [jobs.cores_of_slot(slot, 2) for slot in range(2)] == [[0], [1]]
    assert [jobs.cores_of_slot(slot, 4) for slot in range(4)] == [[0], [1], [2], [0]]


def test_one_at_a_time_is_here(tmp_path: Path) -> None:
    run_jobs(make(tmp_path, ["one", "two"]), 1)
    assert {path.read_text() for path in tmp_path.glob("*.begun")} == {str(os.getpid())}


def test_gpus_are_given_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [jobs.gpu_of_slot(slot) for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [jobs.gpu_of_slot(slot) for slot in range(3)] == ["4", "6", "4"]
