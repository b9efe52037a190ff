"""The recipes that the plan writes to fit, the machine that it plans for, and its command line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config
from typer.testing import CliRunner

from minillm.cli import app
from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.plan import work
from minillm.run.plan.fit import fewest_gpus, fit_recipe
from minillm.run.plan.machine import Machine, machine_for
from minillm.run.plan.phases import Plan, plan
from minillm.run.plan.work import StageTraining
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe
from tests.conftest import save
from tests.run.plans import RECIPES, on_disk, phase, recipe


@pytest.fixture(autouse=True)
def no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have calibrated the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_no_change_is_proposed_that_the_run_would_refuse(tmp_path: Path) -> None:
    """A run refuses a quantised student that is sharded, or whose model is GPT-2."""
    whole = recipe(tmp_path)
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    gpt2 = recipe(tmp_path, student={"source": save(AutoModelForCausalLM.from_config(config), tmp_path / "gpt2")})
    tried: list[str] = []
    for given, machine in ((whole, Machine(8, 1)), (whole, Machine(8, 1, shard=True)), (gpt2, Machine(8, 1))):
        tried.clear()

        def override(settings: list[str], given: Recipe = given) -> Recipe:
            tried.extend(settings)
            return given

        fit_recipe(given, machine, override)
        assert ("student.lora.quantization=4bit" in tried) == (given is whole and not machine.shard)


def test_the_fewest_gpus(tmp_path: Path) -> None:
    given = recipe(tmp_path, teacher={"source": str(tmp_path / "s")})
    two = int(plan(given, Machine(2, shard=True)).peak)
    assert two < plan(given, Machine(1)).peak
    assert fewest_gpus(given, Machine(8, two + 1)) == 2
    assert fewest_gpus(given, Machine(8, 1 << 40)) == 1
    three = int(plan(given, Machine(3, shard=True)).peak)
    assert fewest_gpus(given, Machine(3, three + 1)) == 3
    assert fewest_gpus(given, Machine(8, 1)) is None


@pytest.mark.full
def test_the_table_of_recipes_is_what_the_command_says() -> None:
    said = CliRunner().invoke(app, ["plan", str(RECIPES), "--gpus", "8", "--memory", "80GiB"])
    assert said.exit_code == 0, said.output
    assert said.stdout.rstrip() in (RECIPES / "README.md").read_text(encoding="utf-8")


def test_the_command_line(tmp_path: Path) -> None:
    run = CliRunner()
    shown = run.invoke(app, ["plan", str(RECIPES / "smollm2" / "360m.yaml"), "--gpus", "8", "--memory", "80GiB"])
    assert shown.exit_code == 0, shown.output
    assert "fits in 80 GiB" in shown.output
    assert "estimated for 8 process(es)" in shown.output
    target = tmp_path / "small.yaml"
    given = [str(RECIPES / "smollm2" / "360m.yaml"), "data.system=Be short.", "--memory", "20GiB"]
    shown = run.invoke(app, ["plan", *given, "--fit", str(target)])
    assert shown.exit_code == 0, shown.output
    assert "fits in 20 GiB" in shown.output
    before, after = load_recipe(RECIPES / "smollm2" / "360m.yaml"), load_recipe(target)
    assert plan(after, Machine(8, 20 * GIB)).fits
    assert not plan(before, Machine(8, 20 * GIB)).fits
    assert after.data.system == "Be short."
    assert after.training["gradient_checkpointing"] is True
    for training, original in ((after.warmup.training, before.warmup.training), (after.training, before.training)):
        size = [t["responses_per_update"] for t in (training, original)]
        assert size[0] == size[1]  # an update keeps its responses
    shown = run.invoke(app, ["plan", str(RECIPES / "smollm2" / "360m.yaml"), "--memory", "2GiB"])
    assert "does not fit in 2 GiB" in shown.output
    assert "what would help: " in shown.output
    assert "student.lora.rank=16" in shown.output
    shown = run.invoke(app, ["plan", *given[:-1], "2GiB", "--fit", str(tmp_path / "none.yaml")])
    assert shown.exit_code == 1
    assert "none.yaml is not written" in shown.output
    assert not (tmp_path / "none.yaml").exists()
    with pytest.raises(ValueError, match="--memory lots: a size such as 80GiB is needed"):
        run.invoke(app, ["plan", str(RECIPES / "smollm2" / "360m.yaml"), "--memory", "lots"], catch_exceptions=False)


def fit(file: Path, machine: Machine, *given: str) -> tuple[Plan, Recipe]:
    return fit_recipe(load_recipe(file, given), machine, lambda changes: load_recipe(file, [*given, *changes]))


def test_a_card_that_the_cache_of_all_rollouts_does_not_fit_on_samples_fewer_at_a_time() -> None:
    """The keys and values of 256 rollouts of 1,024 tokens take 48 GiB in SmolLM2 1.7B alone."""
    found, changed = fit(RECIPES / "smollm2" / "135m.yaml", Machine(memory=24 * GIB))
    assert found.fits
    assert found.overrides == []
    assert GIB < phase(found, "rollouts").parts["vLLM's cache"] < 20 * GIB
    assert changed.rollout.num_rollouts == 256


def test_fewer_rollouts_are_a_multiple_of_an_update_and_then_mixing_goes(tmp_path: Path) -> None:
    file = on_disk(
        tmp_path,
        rollout={"num_rollouts": 4096 * 3, "samples_per_prompt": 3, "max_new_tokens": 1024, "engine": "transformers"},
        training={"max_steps": 10, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 64, "bf16": True},
    )
    given = load_recipe(file)
    need, parts = plan(given, Machine()).peak, phase(plan(given, Machine()), "rollouts").parts
    held = 2 * parts["teacher's hidden states"]  # of the last batch, and of the one that is being sampled
    found, changed = fit(file, Machine(memory=int(need - held / 2)))
    assert found.overrides == [f"rollout.num_rollouts={2048 * 3}"]
    found, changed = fit(file, Machine(memory=int(need - held * 7 / 8)))
    assert found.fits
    assert changed.rollout.num_rollouts == 512 * 3  # an update of 512, three responses to a prompt
    assert work.why_refused(changed, Machine()) is None
    found, changed = fit(file, Machine(memory=1))
    assert not found.fits
    assert "rollout.teacher_mix=0" in found.overrides
    assert changed.rollout.num_rollouts % StageTraining(changed, Machine(), "minillm").responses_per_update == 0
    assert changed.rollout.num_rollouts % 3 == 0


def test_what_costs_nothing_is_tried_again_when_another_phase_is_the_largest(tmp_path: Path) -> None:
    """With fewer rollouts the update is the largest phase; checkpointing, which changed nothing before, reduces it."""
    file = on_disk(tmp_path, rollout={"num_rollouts": 4096, "max_new_tokens": 1024, "engine": "transformers"})
    given = load_recipe(file)
    update = phase(plan(given, Machine()), "update").peak
    checkpointed = phase(
        plan(load_recipe(file, ["training.gradient_checkpointing=true", "rollout.num_rollouts=8"]), Machine()), "update"
    ).peak
    assert checkpointed < update < plan(given, Machine()).peak
    found, _ = fit(file, Machine(memory=int(checkpointed)), "rollout.num_rollouts=4096")
    assert found.fits
    assert "training.gradient_checkpointing=true" in found.overrides
    assert not [
        setting for setting in found.overrides if setting.startswith(("teacher", "student", "rollout.teacher_mix"))
    ]


def test_a_cpu_is_offered_a_smaller_cache(tmp_path: Path) -> None:
    file = on_disk(
        tmp_path,
        rollout={"num_rollouts": 1 << 16, "teacher_mix": 0},
        training={"max_steps": 1, "per_device_train_batch_size": 1},
    )
    machine = Machine(gpu=False)
    peak = plan(load_recipe(file), machine).peak
    found, changed = fit(file, replace(machine, memory=int(peak - 1.5 * GIB)))
    assert found.fits
    assert changed.rollout.engine_memory == 2
    found, changed = fit(file, replace(machine, memory=int(peak)), "rollout.engine_memory=20")
    assert changed.rollout.engine_memory is None


def test_what_the_run_refuses_is_said_and_not_fitted(tmp_path: Path) -> None:
    arguments = ["plan", str(on_disk(tmp_path)), "--gpus", "5"]
    said = CliRunner().invoke(app, arguments)
    refusal = "rollout.num_rollouts (64) must be a multiple of the 40 responses of an update on 5 process(es)"
    assert f"the run refuses this: {refusal}" in said.output
    with pytest.raises(ValueError, match=r"64.*40.*--fit"):
        CliRunner().invoke(app, [*arguments, "--fit", str(tmp_path / "x.yaml")], catch_exceptions=False)
    assert not (tmp_path / "x.yaml").exists()


def test_the_card_that_is_there_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(*cards: tuple[str, float]) -> None:
        properties = [
            SimpleNamespace(name=name, total_memory=int(memory * GIB), major=7 if "T4" in name else 8)
            for name, memory in cards
        ]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties[number])

    here(("NVIDIA GeForce RTX 4090", 23.6), ("NVIDIA GeForce RTX 4090", 23.5))
    machine, said = machine_for()
    assert (machine.processes, machine.memory) == (2, int(23.5 * GIB))
    assert (machine.flops, machine.bandwidth) == (165e12, 1.01e12)
    assert "NVIDIA GeForce RTX 4090, which is here" in said
    assert machine_for(gpus=1, memory=GIB, flops=1e12)[0] == replace(
        machine, processes=1, memory=GIB, flops=1e12, float32=1e12
    )
    shown = CliRunner().invoke(app, ["plan", str(on_disk(tmp_path))])
    assert "fits in 24 GiB" in shown.output, shown.output
    assert "estimated for 2 process(es)" in shown.output
    for name, flops in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", 65e12),
    ):
        here((name, 40))
        assert machine_for()[0].flops == flops, name
        assert machine_for()[0].bf16 == ("T4" not in name)
    here(("A card of tomorrow", 300))
    machine, said = machine_for()
    assert (machine.processes, machine.memory, machine.flops) == (1, 300 * GIB, 989e12)
    assert "A card of tomorrow, which is here, is not known" in said
    here()
    machine, said = machine_for()
    assert machine == Machine(8)
    assert "no GPU is here" in said


def test_a_cpu_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.float32: 1e11, torch.bfloat16: 4e11}
    monkeypatch.setattr("minillm.run.plan.machine.multiplication_speed", speeds.__getitem__)
    monkeypatch.setattr("minillm.run.plan.machine.reading_speed", lambda: 2e10)
    monkeypatch.setattr("minillm.run.plan.machine.machine_memory", lambda: 7 * GIB)
    monkeypatch.setattr("minillm.run.plan.machine.cpu_multiplies_bfloat16", lambda: True)
    machine, said = machine_for(gpus=0)
    assert (machine.gpu, machine.memory) == (False, 7 * GIB)
    assert (machine.flops, machine.float32, machine.bandwidth) == (4e11, 1e11, 2e10)
    assert "4.0e+11 operations a second in bfloat16, as measured just now" in said
    given, bare = recipe(tmp_path), recipe(tmp_path, training={"max_steps": 10, "per_device_train_batch_size": 8})
    assert phase(plan(bare, machine), "update").seconds == pytest.approx(
        4 * phase(plan(given, machine), "update").seconds
    )
    monkeypatch.setattr("minillm.run.plan.machine.cpu_multiplies_bfloat16", lambda: False)
    machine, said = machine_for(gpus=0, memory=GIB)
    assert (machine.memory, machine.flops, machine.float32, machine.bf16) == (GIB, 1e11, 1e11, False)
    assert machine_for(gpus=0, flops=3e11)[0].float32 == 3e11
    shown = CliRunner().invoke(app, ["plan", str(on_disk(tmp_path)), "--gpus", "0"])
    assert "in 7 GiB" in shown.output, shown.output
    assert "1.0e+11 operations a second in float32" in shown.output
    monkeypatch.undo()
    assert 1e9 < machine_for(gpus=0)[0].float32 < 1e14
    assert machine_for(gpus=0)[0].memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_recipe_for_24_gb_fits_on_such_cards() -> None:
    """On the smallest, of which 22 GiB are left (L4, A10G)."""
    for name in ("RTX 4090", "L4"):
        shown = CliRunner().invoke(app, ["plan", str(RECIPES / "qwen2.5" / "0.5b-24gb.yaml"), "--card", name])
        assert shown.exit_code == 0, shown.output
        assert "fits in 24 GiB" in shown.output
        assert f"the maker's numbers for {name}" in shown.output
        assert "minillm 64 (2 × 32 × 1)" in shown.output
    small = load_recipe(RECIPES / "qwen2.5" / "0.5b-24gb.yaml")
    assert plan(small, Machine(1, 22 * GIB)).fits
    assert not plan(load_recipe(RECIPES / "qwen2.5" / "0.5b.yaml"), Machine(1, 22 * GIB)).fits
    shown = CliRunner().invoke(app, ["plan", "quickstart", "--card", "4090", "--gpus", "0"])
    assert "--gpus 0 plans for a CPU" in str(shown.exception)
