"""The recipes that are shipped: they say what the paper says, and nothing that cannot run."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.models.glm import GlmConfig

from minillm.models.initialise import config_like
from minillm.run.plan.machine import Machine
from minillm.run.plan.work import why_refused
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe
from minillm.run.stages import stage_named

ROOT = Path(__file__).parents[2] / "recipes"
CPU = "-cpu"  # recipes that are complete by themselves, for two cores
PRETRAINING = sorted([*ROOT.glob("pretraining/*.yaml"), *ROOT.glob("lab/*.yaml")])
FAMILIES = sorted(
    path
    for path in ROOT.glob("*/*.yaml")
    if path.parent.name != "accelerate" and not path.stem.endswith(CPU) and path not in PRETRAINING
)


def load(path: Path, folder: Path, *overrides: str) -> Recipe:
    """With files in place of the hub's data sets."""
    file = folder / "prompts.jsonl"
    file.write_text(json.dumps({"instruction": "w1", "output": "w2"}) + "\n")
    return load_recipe(path, [*(f"data.{name}={file}" for name in ("train", "heldout", "validation")), *overrides])


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_is_valid_and_short(path: Path, tmp_path: Path) -> None:
    recipe = load(path, tmp_path)
    own = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(own) <= 12
    assert "extends" in own[0]
    assert recipe.run_dir.name == f"{path.parent.name}-{path.stem}" or path.stem.startswith(path.parent.name)
    assert recipe.teacher.first.source != recipe.student.source
    shipped = load_recipe(path).data
    assert shipped.heldout != shipped.validation  # what chooses a checkpoint does not score it
    assert (shipped.text is None) == (recipe.data.template == "chat")  # the paper's term, where the paper speaks
    for training in (recipe.training, recipe.sft, recipe.warmup.training):
        assert training["load_best_model_at_end"]
        assert training["metric_for_best_model"] == "rouge_l"
    # An update divides a rollout batch, and has one size on any usual number of processes.
    assert recipe.training["responses_per_update"] in (64, 256)
    for processes in (1, 2, 4, 8, 16):
        assert why_refused(recipe, Machine(processes)) is None
    # The language-model term is one setting away.
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "w1 w2"}\n')
    assert load(path, tmp_path, f"data.text={text}").data.text is not None
    assert recipe.objective.language_model == 1.0


def test_gemmas_recipe_for_two_cores_has_its_data() -> None:
    recipe = load_recipe(ROOT / "gemma" / f"gemma3-270m{CPU}.yaml")
    assert os.path.normpath(recipe.teacher.first.source) == str(
        ROOT.parent / ".assets" / "gemma" / "gemma-3-270m-q4_k_m.gguf"
    )
    rows, prompts = (
        [json.loads(line) for line in (ROOT / folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in ("gemma", "quickstart")
    )
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in prompts]
    answered = [row for row in rows if "output" in row]
    assert len(answered) == 95
    assert all(row["output"].strip() == row["output"] for row in answered)
    assert recipe.stages[:3] == ["teacher", "finetune", "student"]  # as the paper: the base teacher is fine-tuned first
    assert recipe.rollout.teacher_mix == 0.2


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_recipes_of_pretraining_are_valid(path: Path, tmp_path: Path) -> None:
    recipe = load(path, tmp_path)
    assert recipe.run_dir.name == f"{path.parent.name}-{path.stem}"
    assert recipe.data.text is not None
    assert "pretrain" in recipe.stages
    assert all(stage_named(name).refusal(recipe, 1) is None for name in recipe.stages)
    assert recipe.pretrain.alpha.value > 0


def test_pd_star_is_the_papers(tmp_path: Path) -> None:
    recipe = load(ROOT / "pretraining" / "pd-star.yaml", tmp_path)
    sampler, alpha = recipe.logits.sampler, recipe.pretrain.alpha
    assert (sampler.method, sampler.tokens, sampler.top_p) == ("top_p_k", 50, 0.95)
    assert (recipe.pretrain.temperature, alpha.value, alpha.schedule) == (2.0, 0.9, "wsd")
    assert recipe.pretrain.training["lr_scheduler_type"] == "warmup_stable_decay"
    assert recipe.pretrain.training["learning_rate"] == 6e-4


def test_the_recipe_of_the_paper_has_its_sizes(tmp_path: Path) -> None:
    recipe = load(ROOT / "pretraining" / "glm4-1.9b.yaml", tmp_path)
    training, shape = recipe.pretrain.training, recipe.student.shape
    blocks = training["responses_per_update"]
    assert blocks % (64 * training["per_device_train_batch_size"]) == 0
    assert (blocks, recipe.pretrain.block) == (2048, 4096)
    assert training["max_steps"] * blocks * 4096 == pytest.approx(100e9, rel=1e-3)
    assert (shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]) == (2048, 6912, 24)
    assert (training["lr_scheduler_type"], training["learning_rate"]) == ("cosine", 6e-4)
    assert (recipe.pretrain.alpha.value, recipe.pretrain.alpha.schedule) == (0.9, "constant")
    made = config_like(GlmConfig(), shape, 151552)
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(made).num_parameters() == pytest.approx(1.9e9, rel=0.1)


def commands(start: str) -> list[list[str]]:
    """Those in the recipes' README, as a shell takes them apart."""
    lines = (ROOT / "README.md").read_text().splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(start)]


def test_the_readmes_commands_are_valid(tmp_path: Path) -> None:
    found = commands("minillm run ")
    assert len(found) >= 11
    for recipe, *overrides in found:
        load(ROOT.parent / recipe, tmp_path, *overrides)


def test_run_directories_differ(tmp_path: Path) -> None:
    folders = [load(path, tmp_path).run_dir for path in FAMILIES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    "name", ["gpt2/120m", "gpt2/340m", "gpt2/760m", "opt/1.3b", "opt/2.7b", "opt/6.7b", "llama/7b"]
)
def test_the_papers_recipes_are_the_papers(name: str, tmp_path: Path) -> None:
    recipe = load(ROOT / f"{name}.yaml", tmp_path)
    training, rollout = recipe.training, recipe.rollout
    assert training["responses_per_update"] == 64
    assert (rollout.num_rollouts, rollout.inner_epochs, rollout.teacher_mix, rollout.temperature) == (256, 4, 0.2, 1.0)
    assert (training["learning_rate"], training["max_steps"], training["warmup_steps"]) == (5e-6, 5000, 100)
    assert (recipe.objective.preset, recipe.objective.clip) == ("paper", 0.2)
    assert (recipe.data.template, recipe.data.max_prompt_tokens, rollout.max_new_tokens) == ("alpaca", 256, 256)
    assert recipe.sft["responses_per_update"] == recipe.warmup.training["responses_per_update"] == 32
    rates = {"gpt2/120m": 5e-4, "gpt2/340m": 1e-4, "gpt2/760m": 1e-4, "opt/1.3b": 5e-5, "opt/2.7b": 5e-5}
    rate = rates.get(name, 1e-5)
    assert recipe.sft["learning_rate"] == recipe.warmup.training["learning_rate"] == rate
    assert recipe.sft["num_train_epochs"] == (20 if name in ("gpt2/120m", "gpt2/340m") else 10)
    assert recipe.warmup.training["num_train_epochs"] == 3
    assert recipe.finetune["learning_rate"] == (5e-5 if name.startswith("gpt2") else 1e-5)


def test_where_the_released_scripts_differ_they_have_a_recipe_of_their_own(tmp_path: Path) -> None:
    released = load(ROOT / "gpt2" / "120m-released.yaml", tmp_path)
    assert released.objective.preset == "reference"
    assert released.training["responses_per_update"] == 256
    lora = load(ROOT / "llama" / "7b-lora.yaml", tmp_path).student.lora
    assert lora is not None
    assert (lora.rank, lora.alpha) == (8, 32)


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == "bf16"
    given = yaml.safe_load(path.read_text())
    if "fsdp" in path.stem:
        assert given["fsdp_config"]["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if "zero3" in path.stem:
        assert given["deepspeed_config"]["zero3_save_16bit_model"] is True
