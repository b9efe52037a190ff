"""What makes a finished stage stale, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.errors import RunError
from minillm.run.directory import RunState
from minillm.run.recipe_file import load_recipe
from minillm.train.resume import check_checkpoint

STAGES = ["teacher", "finetune", "student", "responses", "warmup", "sft", "minillm", "evaluate"]
BEST = ["load_best_model_at_end=true", "eval_strategy=steps", "eval_steps=2", "save_steps=2"]


def finished_run(folder: Path, stages: list[str], *settings: str) -> Path:
    """A run directory whose stages are all finished; returns the file of its recipe."""
    for name in ("train", "heldout", "validation"):
        (folder / f"{name}.jsonl").write_text('{"instruction": "w1", "output": "w2"}\n')
    file = folder / "recipe.yaml"
    file.write_text(
        "run_dir: ./run\n"
        "data: {train: ./train.jsonl, heldout: ./heldout.jsonl, validation: ./validation.jsonl}\n"
        "teacher: {source: t}\n"
        "student: {keep_layers: 2}\n"
        f"stages: [{', '.join(stages)}]\n"
        "training: {max_steps: 10}\n"
    )
    state = RunState(load_recipe(file, settings))
    for stage in stages:
        state.begin(stage)
        state.finish(stage, 1.0)
    return file


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return finished_run(tmp_path, STAGES)


def stale(recipe: Path, *overrides: str) -> list[str]:
    """Stages of the run that other settings would not have made."""
    settings = load_recipe(recipe, overrides)
    state, found = RunState(settings), []
    for stage in settings.stages:
        try:
            state.check(stage)
        except RunError:
            found.append(stage)
    return found


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        (
            ["training.logging_steps=5", "training.save_steps=5", "training.report_to=none", "training.hub_token=x"],
            None,
        ),
        (["teacher.top_k=3"], None),
        (["objective.signal_every=4"], None),
        (["rollout.engine_memory=3", "training.eval_strategy=epoch", "data.validation_limit=1"], None),
        (["training.max_steps=20"], "minillm"),
        (["training.learning_rate=1e-3"], "minillm"),
        (["responses.max_new_tokens=9"], "finetune"),
        (["rollout.stop=[w3]"], "responses"),
        (["rollout.max_new_tokens=9"], "minillm"),
        (["evaluate.max_new_tokens=9"], "evaluate"),
        (["student.lora.rank=3"], "warmup"),
        (["student.keep_layers=3"], "student"),
    ],
)
def test_what_a_stage_was_made_from(recipe: Path, overrides: list[str], first: str | None) -> None:
    assert stale(recipe, *overrides)[:1] == ([first] if first else [])


def test_a_teacher_may_be_sharded_in_a_run_that_is_continued(tmp_path: Path) -> None:
    file = finished_run(tmp_path, STAGES, "rollout.teacher_mix=0")
    assert stale(file, "rollout.teacher_mix=0", "teacher.shard=true") == []


def test_the_length_of_references_decides_a_student_that_is_fine_tuned_on_them(tmp_path: Path) -> None:
    file = finished_run(tmp_path, ["teacher", "student", "sft"])
    assert stale(file, "responses.max_new_tokens=9") == ["sft"]
    assert stale(file, "responses.temperature=0.5") == []


@pytest.mark.parametrize("setting", ["max_new_tokens=9", "temperature=0.5", "stop=[w3]"])
def test_how_responses_are_sampled_for_validation_counts_where_it_chooses(tmp_path: Path, setting: str) -> None:
    stages, best = ["teacher", "student", "sft"], [f"sft.{given}" for given in BEST]
    file = finished_run(tmp_path, stages, *best)
    assert stale(file, *best) == []
    assert stale(file, *best, f"rollout.{setting}") == ["sft"]
    (tmp_path / "other").mkdir()
    last = finished_run(tmp_path / "other", stages)  # the last checkpoint is kept, whatever validation measures
    assert stale(last, f"rollout.{setting}") == []


def test_the_engine_and_the_teacher_of_validation_count_where_they_choose(tmp_path: Path) -> None:
    by_divergence = [f"sft.{given}" for given in (*BEST, "metric_for_best_model=eval_reverse_kl")]
    by_overlap = [f"sft.{given}" for given in (*BEST, "metric_for_best_model=rouge_l")]
    file = finished_run(tmp_path, ["teacher", "student", "sft"], *by_divergence)
    assert stale(file, *by_divergence) == []
    for other in ("teacher.quantization=4bit", "rollout.engine=transformers"):
        assert stale(file, *by_divergence, other) == ["sft"]
    (tmp_path / "other").mkdir()
    file = finished_run(tmp_path / "other", ["teacher", "student", "sft"], *by_overlap)
    assert stale(file, *by_overlap, "teacher.quantization=4bit") == []
    state = json.loads((tmp_path / "other" / "run" / "state.json").read_text())
    del state["stages"]["sft"]["settings"]["rollout.engine"]  # as it was recorded before the engine counted
    (tmp_path / "other" / "run" / "state.json").write_text(json.dumps(state))
    assert stale(file, *by_overlap, "rollout.engine=transformers") == []


def test_settings_of_a_warm_up_that_another_run_has_done_are_compared(tmp_path: Path) -> None:
    file = finished_run(tmp_path, ["teacher", "minillm", "evaluate"])
    assert stale(file, "warmup.cross_entropy=0.3")[0] == "minillm"
    assert stale(file, "finetune.max_steps=3") == []  # a stage that only some recipes have


def test_a_corrected_heldout_file_is_evaluated_again_without_training(recipe: Path) -> None:
    (recipe.parent / "heldout.jsonl").write_text('{"instruction": "w5"}\n')
    assert stale(recipe) == ["evaluate"]
    with pytest.raises(RunError, match=r"or make evaluate again: --stage evaluate --redo$"):
        RunState(load_recipe(recipe)).check("evaluate")
    (recipe.parent / "train.jsonl").write_text('{"instruction": "w5", "output": "w2"}\n')
    assert stale(recipe)[0] == "finetune"


def test_validation_counts_where_it_chooses(recipe: Path) -> None:
    best = [f"training.{given}" for given in (*BEST, "metric_for_best_model=rouge_l")]
    state = RunState(load_recipe(recipe, best))
    state.begin("minillm")
    (recipe.parent / "run" / "work" / "minillm" / "checkpoint-1").mkdir(parents=True)
    assert "minillm" not in stale(recipe, *best)
    assert "minillm" in stale(recipe, *best[:2], "training.eval_steps=1", "training.save_steps=1", best[-1])
    (recipe.parent / "validation.jsonl").write_text('{"instruction": "w5", "output": "w2"}\n')
    assert "minillm" in stale(recipe, *best)
    assert "warmup" not in stale(recipe, *best)


def test_a_stage_that_has_not_ended_may_go_on_for_longer(recipe: Path) -> None:
    state = RunState(load_recipe(recipe))
    state.forget("minillm")
    state.begin("minillm")
    (recipe.parent / "run" / "work" / "minillm" / "checkpoint-1").mkdir(parents=True)
    assert stale(recipe, "training.max_steps=20") == []
    assert "minillm" in stale(recipe, "training.max_steps=5")


def test_one_place_however_it_is_written(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(recipe.parent))
    monkeypatch.chdir(recipe.parent)
    assert load_recipe(recipe, ["run_dir=~/run"]).run_dir == recipe.parent / "run"
    assert stale(recipe, "run_dir=~/run", "data.train=~/train.jsonl", "data.heldout=heldout.jsonl") == []
    (recipe.parent / "prune").mkdir()  # not the student
    assert stale(recipe) == []
    assert load_recipe(recipe, ["teacher.source=~/t"]).teacher.first.source == str(recipe.parent / "t")


def test_a_state_of_an_earlier_version_is_read(recipe: Path) -> None:
    file = recipe.parent / "run" / "state.json"
    state = json.loads(file.read_text())
    for entry in state["stages"].values():
        del entry["format"]
        entry["settings"] |= {"training.logging_steps": 3, "data.validation": "x", "teacher.shard": False}
        entry["settings"].pop("student.dtype", None)
    file.write_text(json.dumps(state))
    assert stale(recipe) == []
    assert "minillm" in stale(recipe, "objective.clip=0.3")
    file.write_text("{")
    with pytest.raises(RunError, match=r"state\.json: cannot be read"):
        RunState(load_recipe(recipe))


def test_a_setting_that_a_later_version_adds_leaves_runs_as_they_are(recipe: Path) -> None:
    file = recipe.parent / "run" / "state.json"
    state = json.loads(file.read_text())
    for entry in state["stages"].values():
        for name in ("objective.dual_clip", "rollout.inner_epochs", "responses.max_new_tokens"):
            entry["settings"].pop(name, None)
    file.write_text(json.dumps(state))
    # Of `responses:`, the finetune stage had recorded nothing else; the stages after it had.
    assert stale(recipe)[0] == "finetune"
    for entry in state["stages"].values():
        entry["settings"]["responses.max_new_tokens"] = 128
    file.write_text(json.dumps(state))
    assert stale(recipe) == []
    assert stale(recipe, "objective.dual_clip=4") == ["minillm", "evaluate"]
    assert stale(recipe, "rollout.inner_epochs=3") == ["minillm", "evaluate"]
    assert stale(recipe, "student.lora={}")[0] == "warmup"  # a section that was null is not one that was not there
    served = ["teacher.servers=[http://127.0.0.1:1]", "rollout.teacher_mix=0", "rollout.temperature=1"]
    with pytest.raises(RunError, match=r"teacher\.top_k \(there None, now 16\)"):
        RunState(load_recipe(recipe, served)).check("minillm")


def test_a_stage_that_the_recipe_does_not_list_has_its_own_settings(recipe: Path) -> None:
    unlisted = "stages=[teacher, student, responses, warmup, minillm, evaluate]"
    for other in ("sft", "evaluate"):
        RunState(load_recipe(recipe)).forget(other)
    state = RunState(load_recipe(recipe, [unlisted]))
    state.begin("evaluate")
    state.finish("evaluate", 1.0)
    state.begin("sft")
    state.finish("sft", 1.0)
    assert stale(recipe, unlisted) == []
    state.check("sft")
    assert stale(recipe, unlisted, "sft.max_steps=3") == []  # nothing is evaluated that the recipe does not list
    changed = RunState(load_recipe(recipe, [unlisted, "sft.max_steps=3"]))
    with pytest.raises(RunError, match="stage sft there was made with other settings"):
        changed.check("sft")
    file = recipe.parent / "run" / "state.json"
    written = json.loads(file.read_text())
    written["stages"]["sft"]["settings"] = {}  # by an earlier version
    file.write_text(json.dumps(written))
    RunState(load_recipe(recipe, [unlisted, "sft.max_steps=3"])).check("sft")


def test_a_checkpoint_without_all_of_its_state_is_refused(tmp_path: Path) -> None:
    names = [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    ]
    for name in names:
        (tmp_path / name).write_text("x")
    check_checkpoint(tmp_path, "minillm")
    for name, what in zip(
        names, ("its weights", "its optimiser", "its learning-rate schedule", "its random states"), strict=False
    ):
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(RunError, match=f"without {what}, which the checkpoint lacks"):
            check_checkpoint(tmp_path, "minillm")
        (tmp_path / "away").rename(tmp_path / name)
    (tmp_path / "optimizer.pt").write_text("")
    with pytest.raises(RunError, match="without its optimiser"):
        check_checkpoint(tmp_path, "minillm")


@pytest.mark.parametrize(
    ("stage", "setting", "output"),
    [
        ("minillm", "rollout.teacher_mix=0", "work/minillm/checkpoint-1"),
        ("warmup", "warmup.training.max_steps=7", "work/warmup/checkpoint-1"),
        ("responses", "responses.temperature=0.5", "responses.jsonl"),
    ],
)
def test_a_stage_counts_as_made_from_its_first_output_on(recipe: Path, stage: str, setting: str, output: str) -> None:
    state = RunState(load_recipe(recipe))
    state.forget(stage)
    state.begin(stage)
    assert stale(recipe, setting) == []
    made = recipe.parent / "run" / output
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text("{}") if made.suffix else made.mkdir()
    assert stale(recipe, setting)[0] == stage


def test_what_a_stale_stage_offers_names_all_that_it_would_throw_away(recipe: Path) -> None:
    with pytest.raises(RunError, match=r"or make warmup and minillm again: --stage warmup,minillm --redo$"):
        RunState(load_recipe(recipe, ["warmup.cross_entropy=0.7"])).check("warmup")
    with pytest.raises(RunError, match=r"or make minillm again: --stage minillm --redo$"):
        RunState(load_recipe(recipe, ["training.max_steps=5"])).check("minillm")
    state = RunState(load_recipe(recipe))
    state.forget("minillm")
    assert state.lost_with(["warmup"]) == []
    state.begin("minillm")
    assert state.lost_with(["warmup"]) == []  # it has made nothing
    (recipe.parent / "run" / "work" / "minillm" / "checkpoint-1").mkdir(parents=True)
    assert state.lost_with(["warmup"]) == ["minillm"]
