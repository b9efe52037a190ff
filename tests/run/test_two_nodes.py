"""Two machines, as accelerate launches them by the shipped files: two launchers on loopback, each with a disk of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillm.models import load
from minillm.models.device import fast_bfloat16
from minillm.rollout.engines.vllm_memory import vllm_is_installed
from tests.conftest import save, tiny_llama
from tests.run.tiny_recipe import RECIPE

ROOT = Path(__file__).parents[2]
FILES = {"two-nodes": "8-gpus", "fsdp2-two-nodes": "fsdp2-8-gpus"}  # for two nodes, and for one
vllm = pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")


def start(file: str, disk: Path, words: list[str], flags: list[str]) -> subprocess.Popen[str]:
    """Launch the processes of one machine, with its own home, cache and temporary files, and another working directory."""
    disk.mkdir()
    own = {name: str(disk) for name in ("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT")}
    environment = {
        **os.environ, **own, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / f"{file}.yaml"),
        "--num_processes", "2", "--mixed_precision", "bf16" if fast_bfloat16() else "no", "--dynamo_backend", "no", *flags,
        "-m", "tests.sharded_run", *words,
    ]  # fmt: skip
    with (disk / "log").open("w") as log:
        return subprocess.Popen(launch, stdout=log, stderr=log, text=True, env=environment, cwd=disk)


def finish(started: list[subprocess.Popen[str]], disks: list[Path]) -> None:
    try:
        for process in started:
            process.wait(timeout=900)
    finally:
        for process in started:
            process.kill()
    said = "\n".join((disk / "log").read_text()[-3000:] for disk in disks)
    assert [process.returncode for process in started] == [0] * len(started), said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("file", "engine"),
    [
        ("two-nodes", "transformers"),
        ("fsdp2-two-nodes", "transformers"),
        pytest.param("fsdp2-two-nodes", "vllm", marks=[vllm, pytest.mark.vllm]),
    ],
)
def test_two_nodes_end_with_what_two_processes_of_one_node_do(tmp_path: Path, file: str, engine: str) -> None:
    """Stages that one process runs, and stages that all run. Only the run directory and the data are shared."""
    teacher = save(tiny_llama(2, layers=3), tmp_path / "teacher")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}"}) + "\n" for i in range(12)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=tmp_path / "run", data=data, teacher=teacher))
    settings = [f"rollout.engine={engine}", "training.per_device_train_batch_size=2", "rollout.teacher_mix=0"]
    settings += [f"{section}.bf16=true" for section in ("training", "warmup.training")]
    settings += ["stages=[teacher,student,responses,warmup,minillm]"]

    def words(name: str) -> list[str]:
        return ["run", str(recipe), f"run_dir={tmp_path / name}", *settings]

    port, disks = str(free_port()), [tmp_path / "first", tmp_path / "second"]
    nodes = [
        start(
            file, disk, words("two"),
            ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port],
        )
        for rank, disk in enumerate(disks)
    ]  # fmt: skip
    finish(nodes, disks)
    alone = tmp_path / "alone"
    finish([start(FILES[file], alone, words("one"), ["--main_process_port", "0"])], [alone])
    for name in ("one", "two"):
        stages = json.loads((tmp_path / name / "state.json").read_text())["stages"]
        assert {stage: made["processes"] for stage, made in stages.items()} == {
            "teacher": 1, "student": 1, "responses": 1, "warmup": 2, "minillm": 2,
        }  # fmt: skip
        assert not list((tmp_path / name).glob("launched*"))
    one, two = ((tmp_path / name / "responses.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    for folder, start_of in (("warmed", "pruned"), ("student", "warmed")):
        ours, theirs, before = (
            torch.cat([value.flatten() for value in load.load_model(source, torch.float32).state_dict().values()])
            for source in (tmp_path / "two" / folder, tmp_path / "one" / folder, tmp_path / "one" / start_of)
        )
        moved = float((theirs - before).norm())
        assert moved > 0, folder
        assert float((ours - theirs).norm()) <= 1e-5 * moved, folder
