"""How the processes of a run meet in its directory, and what is refused where they are on several machines."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minillm.errors import EngineError, RunError
from minillm.run import processes, runner
from minillm.run.context import Run
from minillm.run.recipe_file import load_recipe
from tests.run.tiny_recipe import RECIPE


@pytest.fixture
def recipe(pair: tuple[str, str], tmp_path: Path) -> Path:
    """A recipe that has not run."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}"}) + "\n" for i in range(10)))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(run=tmp_path / "run", data=data, teacher=pair[1]))
    return file


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int = 2) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))


def test_a_node_without_the_run_directory_says_so(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "RENDEZVOUS_TIMEOUT", 0.3)
    loaded = load_recipe(recipe, [f"run_dir={tmp_path / 'run'}", "training.per_device_train_batch_size=2"])
    as_process(monkeypatch, 1)
    with pytest.raises(RunError, match=r"run_dir: process 1 does not see in .*run what process 0 writes"):
        runner.run_recipe(loaded)
    as_process(monkeypatch, 0)
    with pytest.raises(
        RunError, match=r"run_dir: process\(es\) 1 have not written to .*run within 0.3 s.*what they pr"
    ):
        runner.run_recipe(loaded)  # before it works for hours
    as_process(monkeypatch, 1)
    monkeypatch.setattr(processes, "rendezvous", lambda *_: None)
    with pytest.raises(RunError, match="process 0 gave up at stage teacher"):  # and does not wait for ever
        runner.run_recipe(loaded)


def test_what_an_earlier_launch_left_is_no_meeting(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A killed launch leaves its files, and the next one has the same port. Process 1 waits until process 0 is there."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("launched", "launched-1", "launched-7"):
        (folder / name).write_text("0123456789abcdef")
    loaded = load_recipe(recipe, [f"run_dir={folder}", "training.per_device_train_batch_size=2"])
    one = Run(loaded)
    monkeypatch.setattr(processes, "RENDEZVOUS_TIMEOUT", 0.3)
    with pytest.raises(RunError, match="process 1 does not see"):
        processes.rendezvous(one, 1, 2)
    monkeypatch.setattr(processes, "RENDEZVOUS_TIMEOUT", 30)
    with ThreadPoolExecutor() as pool:
        met = [pool.submit(processes.rendezvous, one, 1, 2), pool.submit(processes.rendezvous, Run(loaded), 0, 2)]
        for each in met:
            each.result()
    assert sorted(file.name for file in folder.iterdir()) == ["launched", "launched-1"]


@pytest.mark.parametrize(
    ("servers", "fault"),
    [
        ("auto", "auto starts a server that listens on its own machine only, and the run has processes on 2 machines"),
        ("[http://localhost:8000]", "http://localhost:8000 is another server on each machine, and the run has proc"),
        ("[http://gpu-7:8000,http://127.0.0.1:8000/v1]", r"servers: http://127.0.0.1:8000/v1 is another server"),
    ],
)
def test_servers_that_a_second_machine_cannot_reach_are_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, servers: str, fault: str
) -> None:
    words = ["rollout.engine=server", f"rollout.servers={servers}", "training.per_device_train_batch_size=2"]
    loaded = load_recipe(recipe, [f"run_dir={tmp_path / 'run'}", *words])
    as_process(monkeypatch, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(EngineError, match=fault):
        runner.run_recipe(loaded)
    assert not (tmp_path / "run").exists()
