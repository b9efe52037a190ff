"""Recipes: inheritance, overrides, and errors that say what, where and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillm.recipe import Objective, RolloutConfig
from minillm.recipe_file import RecipeError, load_recipe

BASE = """\
run_dir: runs/x
data:
  train: ./prompts.jsonl
  heldout: ./prompts.jsonl
teacher:
  source: some/teacher
student:
  source: some/student
training:
  learning_rate: 5e-6
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE)
    return file


def test_paths_are_relative_to_the_file_and_numbers_are_numbers(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.data.train.file == recipe.parent / "prompts.jsonl"
    assert loaded.training["learning_rate"] == 5e-6


def test_a_child_says_only_what_differs(recipe: Path) -> None:
    below = recipe.parent / "family"
    below.mkdir()
    child = below / "child.yaml"
    child.write_text("extends: ../recipe.yaml\nrollout:\n  teacher_mix: 0.5\ntraining:\n  max_steps: 3\n")
    loaded = load_recipe(child, ["rollout.num_rollouts=64", "training.learning_rate=1e-5"])
    assert loaded.data.train.file is not None
    assert loaded.data.train.file.resolve() == (recipe.parent / "prompts.jsonl").resolve()
    assert (loaded.rollout.teacher_mix, loaded.rollout.num_rollouts) == (0.5, 64)
    assert loaded.training == {"learning_rate": 1e-5, "max_steps": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rolout: {}\n", "recipe.yaml:11: rolout: unknown key; did you mean rollout?"),
        ("rollout:\n  teacher_mx: 0.2\n", "recipe.yaml:12: rollout.teacher_mx: unknown key; did you mean teacher_mix?"),
        ("rollout:\n  teacher_mix: 1.5\n", "recipe.yaml:12: rollout.teacher_mix: Input should be less than 1 (given: 1.5)"),
        ("rollout:\n  num_rollouts: many\n", "recipe.yaml:12: rollout.num_rollouts: Input should be a valid integer"),
        ("stages: [teacher, sleep]\n", "recipe.yaml:11: stages.1: Input should be 'teacher', 'finetune'"),
        ("warmup: {training: {learnign_rate: 1}}\n", "warmup.training.learnign_rate: unknown key; did you mean learning_rate?"),
        ("warmup:\n  training:\n    max_steps: lots\n", "recipe.yaml:13: warmup.training.max_steps: Input should be a valid integer"),
        ("warmup:\n  training:\n    learning_rate: -1\n", "must be at least 0.0 (given: -1)"),
        ("warmup:\n  training:\n    output_dir: here\n", "not set here: it follows from run_dir"),
        ("objective:\n  weight_in_clip: true\n  clip: null\n", "recipe.yaml:11: objective: weight_in_clip needs clip"),
        ("data:\n  train: x\n", "recipe.yaml:11: data: said twice"),
        ("rollout: {teacher_mix: 0.2\n", "not YAML"),
    ],
)  # fmt: skip
def test_faults_name_file_line_key_and_what_is_allowed(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(BASE + text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert message in str(caught.value)


def test_sections_that_may_be_left_out_name_their_keys_too(recipe: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["student.lora.rnk=4", "data.validation.splt=x", "data.template=alpca", "teacher.shard=true"])
    assert "student.lora.rnk: unknown key; did you mean rank?" in str(caught.value)
    assert "data.validation.splt: unknown key; did you mean split?" in str(caught.value)
    assert "data.template: chat, alpaca, plain, a .jinja file or a Jinja text is needed (given: 'alpca')" in str(caught.value)
    with pytest.raises(RecipeError, match=r"teacher\.shard: .*: set rollout\.teacher_mix: 0"):
        load_recipe(recipe, ["teacher.shard=true"])
    with pytest.raises(RecipeError, match=r"training\.save_strategy: .*given: False; YAML reads a bare no as false: write \"no\""):
        load_recipe(recipe, ["training.save_strategy=no"])
    load_recipe(recipe, ['training.save_strategy="no"'])
    with pytest.raises(RecipeError, match=r"engine_options: block_size, dtype follows from the recipe"):
        load_recipe(recipe, ["rollout.engine_options={dtype: float16, block_size: 8, enforce_eager: true}"])
    with pytest.raises(RecipeError, match=r"engine_options are of vLLM in the training process, not of engine: transformers"):
        load_recipe(recipe, ["rollout.engine=transformers", "rollout.engine_options={enforce_eager: true}"])
    with pytest.raises(RecipeError, match=r"data\.train: no such file: nowhere\.jsonl"):
        load_recipe(recipe, ["data.train={file: nowhere.jsonl}"])


def test_every_fault_is_listed_at_once(recipe: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["rollout.num_rollouts=0", "student.keep=3"])
    assert "command line: rollout.num_rollouts" in str(caught.value)
    assert "command line: student.keep: unknown key; allowed: keep_layers, lora, probe_prompts, source" in str(caught.value)


def test_missing_files_are_named(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"command line: data\.train: no such file: nowhere\.jsonl"):
        load_recipe(recipe, ["data.train=nowhere.jsonl"])
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(recipe.parent / "absent.yaml")
    with pytest.raises(RecipeError, match=r"'steps': an override is section\.key=value"):
        load_recipe(recipe, ["steps"])


def test_sizes_that_do_not_divide_are_refused_before_any_stage(recipe: Path) -> None:
    from minillm import stages

    with pytest.raises(ValueError, match=r"rollout.num_rollouts \(30\) must be a multiple .* \(8 × 2 × 1\)"):
        stages.run(load_recipe(recipe, ["rollout.num_rollouts=30", "training.gradient_accumulation_steps=2"]))


def test_a_preset_can_be_changed_piece_by_piece() -> None:
    changed = Objective.paper(clip=0.3)
    assert (changed.reward, changed.clip, changed.single_step_weight) == ("sampled", 0.3, "token")
    assert Objective.reference().weight_in_clip
    assert Objective() == Objective.recommended()
    with pytest.raises(ValueError, match="teacher_mix"):
        RolloutConfig(teacher_mix=1.0)


def test_rollouts_that_cannot_be_weighed_are_refused() -> None:
    for bad, message in (
        ({"top_p": 0.9}, "top_p: importance weights need every token"),
        ({"engine": "server"}, "engine: server needs servers"),
        ({"servers": ["http://127.0.0.1:8000"]}, "servers need engine: server"),
        ({"num_rollouts": 8, "samples_per_prompt": 3}, r"num_rollouts \(8\) must be a multiple of samples_per_prompt \(3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutConfig.model_validate(bad)


def test_what_a_served_teacher_cannot_do_is_refused_before_anything_runs(recipe: Path) -> None:
    served = ["teacher.servers=[http://127.0.0.1:8000]"]
    for changes, message in (
        ([], "rollout.teacher_mix with a served teacher: mixing draws from the teacher's whole rows; set 0"),
        (["rollout.teacher_mix=0", "rollout.temperature=0.7"], "rollout.temperature: 0.7 with a served teacher"),
        (["rollout.teacher_mix=0", "objective.language_model_distill=0.5"], "language_model_distill with a served teacher"),
        (["rollout.teacher_mix=0", "teacher.top_k=20"], "teacher.top_k"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, [*served, *changes])
        assert message in str(caught.value)
    assert load_recipe(recipe, [*served, "rollout.teacher_mix=0"]).teacher.top_k == 16


def test_the_best_needs_a_checkpoint_of_its_own(recipe: Path) -> None:
    """Else transformers leaves the best that was saved when it was the best: an early one, or none."""
    best = [f"training.{text}" for text in ("load_best_model_at_end=true", "eval_strategy=steps", "eval_steps=10")]
    best.append("data.validation=" + str(recipe.parent / "prompts.jsonl"))
    assert load_recipe(recipe, [*best, "training.save_steps=10"]).training["save_steps"] == 10
    for saved, given in ((["training.save_steps=50"], 50), ([], 500)):
        with pytest.raises(RecipeError, match=rf"training\.save_steps: .*it has to be eval_steps \(10\).*\(given: {given}\)"):
            load_recipe(recipe, [*best, *saved])
