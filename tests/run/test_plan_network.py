"""What a plan says of several machines: bytes by kind, worked out by hand here, and the bottleneck."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from minillm import cli
from minillm.errors import InputError
from minillm.models.shape import shape_of
from minillm.run.plan.growth import growth, update_time
from minillm.run.plan.machine import Machine, machine_for
from minillm.run.plan.network import Flow, seconds, traffic
from minillm.run.plan.network_text import network_report
from minillm.run.plan.phases import Planner
from minillm.run.plan.work import StageTraining
from minillm.run.recipe import Recipe
from tests.run.plans import on_disk, recipe, rows_file

TWO = Machine(16, nodes=2)
FAR = ["http://gpu-1:8000", "http://gpu-2:8000"]


def flows(of: Recipe, machine: Machine, stage: str = "minillm") -> dict[str, Flow]:
    return {flow.name: flow for flow in traffic(Planner(of, machine), StageTraining(of, machine, stage))}


def with_prompts(tmp_path: Path, **changes: Any) -> Recipe:
    """A recipe whose prompts have 10 tokens; responses have 64 on average."""
    file = rows_file(tmp_path / "a.jsonl", [{"instruction": "x" * 40, "output": "y" * 160}] * 640)
    data = {"train": file, "heldout": file, "template": "plain"}
    return recipe(tmp_path, data=data, **changes)


def served(tmp_path: Path, servers: list[str], **rollout: Any) -> Recipe:
    return with_prompts(
        tmp_path,
        teacher={"source": str(tmp_path / "t"), "servers": servers},
        rollout={"num_rollouts": 256, "engine": "server", "servers": servers, "teacher_mix": 0} | rollout,
    )


def test_gradients_go_around_a_ring_that_leaves_each_machine_once(tmp_path: Path) -> None:
    of = recipe(tmp_path)
    n = shape_of(str(tmp_path / "s")).parameters
    found = flows(of, TWO)
    assert list(found) == ["gradients, all-reduce"]
    leaving = 2 * 15 / 16 * 4 * n  # a reduce-scatter and an all-gather, of which a sixteenth is there already
    assert found["gradients, all-reduce"] == Flow("gradients, all-reduce", 2 * leaving, leaving)
    assert not flows(of, Machine(8))
    assert flows(of, Machine(16, nodes=4))["gradients, all-reduce"].total == 4 * leaving
    adapter = recipe(tmp_path, student={"source": str(tmp_path / "s"), "lora": {"rank": 1}})
    assert flows(adapter, TWO)["gradients, all-reduce"].busiest < 0.1 * leaving


@pytest.mark.parametrize("gpu", [True, False])
def test_shards_are_gathered_for_every_micro_batch_and_for_the_engines(tmp_path: Path, gpu: bool) -> None:
    training = {"max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": True}
    of = recipe(tmp_path, training=training, rollout={"num_rollouts": 256, "teacher_mix": 0})
    model = shape_of(str(tmp_path / "s"))
    n, rest = model.parameters, model.parameters - model.head
    found = flows(of, replace(TWO, shard=True, gpu=gpu))
    ring = 15 / 16
    # 256 rollouts are two updates of 16 × 4 × 2 responses, twice: four updates with one set of weights in the engines.
    want = {
        "weights in shards, all-gather": ring * 2 * 2 * (n + rest),
        "gradients, reduce-scatter": ring * 4 * n * (1 if gpu else 2),
        "weights in shards to score a batch first, all-gather": ring * 4 / 4 * 2 * rest,
        "weights to the engines, all-gather": ring * 2 * n / 4,
    }
    assert {name: flow.busiest for name, flow in found.items()} == pytest.approx(want)


def test_a_sharded_teacher_is_gathered_for_its_forwards(tmp_path: Path) -> None:
    source = {"source": str(tmp_path / "t"), "shard": True}
    of = recipe(tmp_path, teacher=source, rollout={"num_rollouts": 512, "teacher_mix": 0})
    found = flows(of, TWO)["weights of the teacher's shards"]
    # 32 rollouts in each process are two forwards of 16, and the batch lasts for 4 updates, twice.
    assert found.busiest == pytest.approx(15 / 16 * 2 * 2 * shape_of(str(tmp_path / "t")).body / 8)


def test_what_servers_get_and_return(tmp_path: Path) -> None:
    of = served(tmp_path, FAR)
    model, hidden = shape_of(str(tmp_path / "s")), shape_of(str(tmp_path / "t")).hidden
    n = sum(value.numel() for value in AutoModelForCausalLM.from_config(model.config).state_dict().values())
    found = flows(of, TWO)
    # A batch of 256 lasts for two updates, twice. The file has the tied head under both of its names.
    assert found["weights to the servers"] == Flow("weights to the servers", 2 * 2 * n / 4, 2 * 2 * n / 4)
    states, rollouts = found["states of the teacher"], found["requests for rollouts, and their answers"]
    tokens = 256 / 4 * (10 + 64 - 1)
    assert states.total == pytest.approx(tokens * (2 * hidden + 6) + 256 / 4 * 550)
    assert states.busiest == pytest.approx((tokens * 2 * hidden + 256 / 4 * 200) / 2)  # each of two machines gets half
    assert rollouts.total == pytest.approx(256 / 4 * (540 + 60 + 790 + 60 + 84 * 64))
    one = flows(served(tmp_path, FAR[:1]), TWO)
    assert one["weights to the servers"].busiest == 2 * n / 4
    assert one["states of the teacher"].busiest == pytest.approx(2 * states.busiest)  # its own link is the narrowest
    # Servers on the loopback interface send nothing; alone they need no second machine to be counted.
    assert not flows(served(tmp_path, ["http://127.0.0.1:8000", "http://localhost:8001/v1"]), Machine(8))
    assert flows(of, Machine(8)).keys() == found.keys() - {"gradients, all-reduce"}


def test_a_served_teacher_in_the_warm_up(tmp_path: Path) -> None:
    of = with_prompts(
        tmp_path,
        stages=["warmup"],
        teacher={"source": str(tmp_path / "t"), "servers": FAR},
        rollout={"teacher_mix": 0},
        warmup={"targets": "references", "training": {"per_device_train_batch_size": 4, "max_steps": 5}},
    )
    hidden = shape_of(str(tmp_path / "t")).hidden
    found = flows(of, TWO, "warmup")
    assert found.keys() == {"gradients, all-reduce", "states of the teacher"}
    assert found["states of the teacher"].total == pytest.approx(64 * ((10 + 41 - 1) * (2 * hidden + 6) + 550))


def test_the_part_that_takes_longest_is_named(tmp_path: Path) -> None:
    """By the width of the link, and by the number of GPUs where the servers stay the same."""
    of = recipe(tmp_path, rollout={"num_rollouts": 128, "teacher_mix": 0})
    assert update_time(of, replace(TWO, link=1e12)).bottleneck == "sampling"
    slow = update_time(of, replace(TWO, link=1e6))
    assert slow.bottleneck == "network"
    found = traffic(Planner(of, TWO), StageTraining(of, TWO, "minillm"))
    assert slow.parts["network"] == pytest.approx(seconds(found, TWO) * TWO.link / 1e6)
    times = growth(of, replace(TWO, link=1e6))
    assert [time.machine.processes for time in times] == [8, 16, 32, 64]
    assert [time.responses for time in times] == [64, 128, 256, 512]
    assert times[0].parts["network"] == 0
    assert times[0].parts["sampling"] == pytest.approx(times[3].parts["sampling"])  # an engine for every GPU
    far = growth(served(tmp_path, FAR), replace(TWO, link=1e12))
    assert far[3].parts["sampling"] > 1.5 * far[0].parts["sampling"]  # steps of small models take their least time
    assert far[3].parts["teacher"] == pytest.approx(8 * far[0].parts["teacher"])
    waits = update_time(served(tmp_path, FAR, overlap=True), TWO)
    assert waits.seconds == pytest.approx(
        max(waits.parts["sampling"], waits.parts["training"]) + waits.parts["teacher"] + waits.parts["network"]
    )


def test_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(on_disk(tmp_path, rollout={"num_rollouts": 128}))

    def plan(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["minillm", "plan", file, "--memory", "80GiB", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out = capsys.readouterr()
        return out.out if not stopped.value.code else out.err

    said = plan("--gpus", "16", "--nodes", "2", "--link", "25")
    assert "network: 2 machine(s) with 8 process(es) each, 25 GB/s to and from each" in said
    assert "minillm: gradients, all-reduce " in said
    assert "bottleneck by the number of processes: sampling from 8 to 64" in said
    assert "network" not in plan("--gpus", "8")
    assert plan("--gpus", "9", "--nodes", "2").startswith("error: --nodes 2: --gpus 9 counts the GPUs of all nodes")
    assert plan("--gpus", "8", "--link", "0").startswith("error: --link 0: a number of GB in a second above 0")


def test_machines_and_their_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine_for(nodes=4)[0].processes == 32  # eight H100 on each
    assert machine_for(16, nodes=4, link=5e10)[0] == replace(machine_for(16)[0], nodes=4, link=5e10)
    cpus = machine_for(0, flops=1e12, nodes=2)[0]
    assert (cpus.processes, cpus.nodes) == (2, 2)
    with pytest.raises(InputError, match="--gpus 6 counts the GPUs of all nodes, and must be a multiple of it"):
        machine_for(6, nodes=4)


def test_one_machine_by_itself_has_no_network(tmp_path: Path) -> None:
    assert not network_report(recipe(tmp_path), Machine(8))
