"""Recipes: inheritance, overrides, and errors that say what, where and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minillm.errors import RecipeError
from minillm.loss.config import Objective
from minillm.rollout.config import RolloutConfig
from minillm.run.recipe_file import load_recipe

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
        ("stages: [teacher, sleep]\n", "recipe.yaml:11: stages.1: sleep: no such stage; allowed: teacher, finetune"),
        ("warmup: {training: {learnign_rate: 1}}\n", "warmup.training.learnign_rate: unknown key; did you mean learning_rate?"),
        ("warmup:\n  training:\n    max_steps: lots\n", "recipe.yaml:13: warmup.training.max_steps: Input should be a valid integer"),
        ("warmup:\n  training:\n    learning_rate: -1\n", "must be at least 0.0 (given: -1)"),
        ("warmup:\n  training:\n    output_dir: here\n", "not set here: it follows from run_dir"),
        ("objective:\n  weight_in_clip: true\n  clip: null\n", "recipe.yaml:11: objective: weight_in_clip needs clip"),
        ("data:\n  train: x\n", "recipe.yaml:11: data: duplicate key"),
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
        load_recipe(
            recipe, ["student.lora.rnk=4", "data.validation.splt=x", "data.template=alpca", "teacher.shard=true"]
        )
    assert "student.lora.rnk: unknown key; did you mean rank?" in str(caught.value)
    assert "data.validation.splt: unknown key; did you mean split?" in str(caught.value)
    assert "data.template: chat, alpaca, plain, a .jinja file or a Jinja text is needed (given: 'alpca')" in str(
        caught.value
    )
    with pytest.raises(RecipeError, match=r"teacher\.shard: .*: set rollout\.teacher_mix: 0"):
        load_recipe(recipe, ["teacher.shard=true"])
    with pytest.raises(
        RecipeError, match=r"training\.save_strategy: .*given: False; YAML reads a bare no as false: write \"no\""
    ):
        load_recipe(recipe, ["training.save_strategy=no"])
    load_recipe(recipe, ['training.save_strategy="no"'])
    with pytest.raises(RecipeError, match=r"engine_options: block_size, dtype follows from the recipe"):
        load_recipe(recipe, ["rollout.engine_options={dtype: float16, block_size: 8, enforce_eager: true}"])
    with pytest.raises(
        RecipeError, match=r"engine_options are of vLLM in the training process, not of engine: transformers"
    ):
        load_recipe(recipe, ["rollout.engine=transformers", "rollout.engine_options={enforce_eager: true}"])
    with pytest.raises(RecipeError, match=r"data\.train: no such file: nowhere\.jsonl"):
        load_recipe(recipe, ["data.train={file: nowhere.jsonl}"])


def test_every_fault_is_listed_at_once(recipe: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["rollout.num_rollouts=0", "student.keep=3"])
    assert "command line: rollout.num_rollouts" in str(caught.value)
    assert "command line: student.keep: unknown key; allowed: allow_pickle, dtype, keep_layers, like, lora, " in str(
        caught.value
    )


def test_missing_files_are_named(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"command line: data\.train: no such file: nowhere\.jsonl"):
        load_recipe(recipe, ["data.train=nowhere.jsonl"])
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(recipe.parent / "absent.yaml")
    with pytest.raises(RecipeError, match=r"'steps': an override is section\.key=value"):
        load_recipe(recipe, ["steps"])


def test_sizes_that_do_not_divide_are_refused_before_any_stage(recipe: Path) -> None:
    from minillm.run import runner

    with pytest.raises(ValueError, match=r"rollout.num_rollouts \(30\) must be a multiple of the 16 responses"):
        runner.run_recipe(load_recipe(recipe, ["rollout.num_rollouts=30", "training.gradient_accumulation_steps=2"]))


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
        (
            {"num_rollouts": 8, "samples_per_prompt": 3},
            r"num_rollouts \(8\) must be a multiple of samples_per_prompt \(3\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutConfig.model_validate(bad)


def test_what_a_served_teacher_cannot_do_is_refused_before_anything_runs(recipe: Path) -> None:
    served = ["teacher.servers=[http://127.0.0.1:8000]"]
    for changes, message in (
        ([], "rollout.teacher_mix with a served teacher: mixing samples from the teacher's whole distribution: set 0"),
        (["rollout.teacher_mix=0", "teacher.top_k=20"], "teacher.top_k"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, [*served, *changes])
        assert message in str(caught.value)
    assert load_recipe(recipe, [*served, "rollout.teacher_mix=0"]).teacher.first.top_k == 16


def test_the_best_needs_a_checkpoint_of_its_own(recipe: Path) -> None:
    """Else transformers leaves the best that was saved when it was the best: an early one, or none."""
    best = [f"training.{text}" for text in ("load_best_model_at_end=true", "eval_strategy=steps", "eval_steps=10")]
    best.append("data.validation=" + str(recipe.parent / "prompts.jsonl"))
    assert load_recipe(recipe, [*best, "training.save_steps=10"]).training["save_steps"] == 10
    for saved, given in ((["training.save_steps=50"], 50), ([], 500)):
        with pytest.raises(
            RecipeError, match=rf"training\.save_steps: .*it has to be eval_steps \(10\).*\(given: {given}\)"
        ):
            load_recipe(recipe, [*best, *saved])


@pytest.mark.parametrize(
    ("section", "text", "fault"),
    [
        ("training", "neftune_noise_alpha: 5", "neftune_noise_alpha: not honoured here: noise on the student's embeddings"),
        ("warmup.training", "label_smoothing_factor: 0.1", "label_smoothing_factor: not honoured here: the loss is the objective's"),
        ("sft", "per_device_eval_batch_size: 4", "per_device_eval_batch_size: not honoured here: validation samples responses"),
        ("sft", "save_only_model: true", "save_only_model: not set here: a stage continues from its last checkpoint"),
        ("finetune", "push_to_hub: true", "push_to_hub: not set here: set push_to_hub at the top of the recipe"),
        ("training", "enable_jit_checkpoint: true", "enable_jit_checkpoint: not set here: a stage that it stopped would count as finished"),
        ("training", "warmup_ratio: 0.1", "warmup_ratio: unknown key; it is now warmup_steps, where a number below 1 is a share"),
        ("training", "lr_scheduler_type: cosin", "lr_scheduler_type: no such value: did you mean cosine? allowed: constant,"),
        ("training", "optim: adamw_trch", "optim: no such value: did you mean adamw_torch? allowed: adafactor,"),
        ("training", "report_to: wandbb", "report_to: no such tracker; did you mean wandb? allowed: all,"),
        ("training", "log_level: loud", "log_level: no such value: allowed: critical, debug,"),
        ("training", "debug: overflow", "debug: overflow is not a valid DebugOption"),
        ("training", "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: '1e-6'}", "min_lr: a number is needed"),
        ("training", "lr_scheduler_type: polynomial, lr_scheduler_kwargs: {power: two}", "lr_scheduler_kwargs: unsupported operand"),
        ("training", "lr_scheduler_kwargs: {min_lr: 0.1}", "lr_scheduler_kwargs: get_linear_schedule_with_warmup() got an unexpected"),
        ("training", "learning_rate: .nan", "learning_rate: must be a finite number (given: nan)"),
        ("training", "learning_rate: true", "learning_rate: Input should be a number (given: True)"),
        ("training", "warmup_steps: -1", "warmup_steps: must be at least 0.0 (given: -1)"),
        ("training", "warmup_steps: 2.5", "warmup_steps: must be a whole number of updates, or a share of them below 1 (given: 2.5)"),
        ("training", "save_steps: 0", "save_steps: must be more than 0 (given: 0)"),
        ("training", "per_device_train_batch_size: 0", "per_device_train_batch_size: must be at least 1 (given: 0)"),
        ("training", "max_steps: 0", "max_steps: must be at least 1, or -1 for num_train_epochs (given: 0)"),
        ("training", "deepspeed: ./nowhere.json", "deepspeed: no such file: "),
        ("training", "fsdp_config: ./recipe.yaml", "is not JSON"),
        ("training", "fp16: true, bf16: true", "At most one of fp16 and bf16 can be True"),
        ("training", "fp16: true, use_cpu: true", "fp16: float16 is computed on GPUs only"),
        ("training", "eval_strategy: epoch", "eval_strategy: there are no rows to validate on: set data.validation, or leave it out"),
        ("training", "load_best_model_at_end: true", "load_best_model_at_end: must be used with validation"),
        ("training", "load_best_model_at_end: true, eval_strategy: epoch", "save_strategy: with load_best_model_at_end it has"),
        ("training", "metric_for_best_model: rougeL", "metric_for_best_model: validation does not measure it: did you mean rouge_l?"),
        ("training", "metric_for_best_model: loss", "metric_for_best_model: validation does not measure it: allowed: finished,"),
        ("training", "metric_for_best_model: length", "greater_is_better: whether more of length is better is not known: set it"),
    ],
)  # fmt: skip
def test_training_that_would_fail_at_its_stage_is_refused_at_the_start(
    recipe: Path, section: str, text: str, fault: str
) -> None:
    outer, _, inner = section.partition(".")
    given = f"{outer}: {{{inner}: {{{text}}}}}" if inner else f"{outer}: {{{text}}}"
    recipe.write_text(BASE.partition("training:")[0] + f"stages: [finetune, warmup, sft, minillm]\n{given}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert any(f"recipe.yaml:10: {section}." in line and fault in line for line in str(caught.value).splitlines()), str(
        caught.value
    )


def test_what_a_stage_honours_is_not_refused(recipe: Path) -> None:
    """Neither is a value that a stage would have anyway."""
    for section, given in (
        ("sft", "{neftune_noise_alpha: 5, label_smoothing_factor: 0.1, dataloader_num_workers: 2}"),
        ("training", "{dataloader_num_workers: 0, remove_unused_columns: true, push_to_hub: false, local_rank: -1}"),
        ("training", "{optim: sgd, optim_args: 'momentum=0.9', report_to: none, tf32: true, bf16: true}"),
        ("sft", "{eval_strategy: epoch}"),  # sft is no stage of this recipe, so it needs no validation rows
    ):
        loaded = load_recipe(recipe, [f"{section}={given}"])
        assert yaml.safe_load(given).items() <= getattr(loaded, section).items()


def test_the_direction_that_a_recipe_gives_is_kept(recipe: Path) -> None:
    rows = f"data.validation={recipe.parent / 'prompts.jsonl'}"
    best = "eval_strategy: epoch, save_strategy: epoch, load_best_model_at_end: true"
    for said in (
        "",
        ", metric_for_best_model: reverse_kl",
        ", metric_for_best_model: length, greater_is_better: false",
    ):
        loaded = load_recipe(recipe, [rows, f"training={{{best}{said}}}"])
        assert ("greater_is_better" in loaded.training) == ("length" in said)  # the recipe is as it was written
    with pytest.raises(RecipeError, match=r"training\.lr_scheduler_kwargs: .*: set mode to max \(it is min\)"):
        load_recipe(recipe, [rows, "training={eval_strategy: epoch, lr_scheduler_type: reduce_lr_on_plateau}"])
    by_plateau = "eval_strategy: epoch, lr_scheduler_type: reduce_lr_on_plateau, lr_scheduler_kwargs: {mode: max}"
    load_recipe(recipe, [rows, f"training={{{by_plateau}}}"])
    taught = "{metric_for_best_model: reverse_kl, eval_strategy: epoch}"
    load_recipe(recipe, [rows, f"training={taught}"])
    with pytest.raises(
        RecipeError, match=r"metric_for_best_model: reverse_kl needs the teacher's model in this process"
    ):
        load_recipe(recipe, [rows, "stages=[finetune]", f"finetune={taught}"])


def test_a_recipe_without_training_loads_without_torch(recipe: Path) -> None:
    recipe.write_text(BASE.partition("training:")[0])
    code = f"import sys; from minillm.run.recipe_file import load_recipe; load_recipe({str(recipe)!r}); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
