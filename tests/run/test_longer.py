"""What a run may be continued with: other logging, saving and trackers, and a longer training."""

from __future__ import annotations

import dataclasses
import json
import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from minillm.errors import RunError
from minillm.models.load import load_model
from minillm.run import runner
from minillm.run.directory import RunState
from minillm.run.operational import ARGUMENTS, VALIDATING, decides_nothing
from minillm.run.recipe_file import load_recipe
from minillm.train.lengthened import check_lengthened, rates, updates_of
from tests.run.test_run_state import STAGES, finished_run, stale
from tests.run.tiny_recipe import run_tiny_recipe
from tests.train.common import arguments

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}


def test_every_entry_of_the_list_is_of_transformers_and_has_its_reason() -> None:
    for names, reason in (*ARGUMENTS, (VALIDATING, "what is measured")):
        assert len(reason) > 10
        for pattern in names.split():
            assert any(fnmatchcase(field, pattern) for field in FIELDS), pattern


@pytest.mark.parametrize(
    ("name", "given", "nothing"),
    [
        ("logging_steps", {}, True),
        ("report_to", {}, True),
        ("save_steps", {}, True),
        ("save_steps", {"load_best_model_at_end": True}, False),
        ("save_total_limit", {"load_best_model_at_end": True}, True),
        ("eval_steps", {}, True),
        ("eval_steps", {"load_best_model_at_end": True}, False),
        ("gradient_checkpointing_kwargs.use_reentrant", {}, True),
        ("learning_rate", {}, False),
        ("max_steps", {}, False),
        ("num_train_epochs", {}, False),
        ("num_train_epochs", {"max_steps": 5}, True),
        ("per_device_train_batch_size", {}, False),
        ("responses_per_update", {}, False),
    ],
)
def test_what_decides(name: str, given: dict[str, Any], nothing: bool) -> None:
    assert decides_nothing(name, given) is nothing


def with_checkpoint(file: Path, stage: str) -> None:
    (file.parent / "run" / "work" / stage / "checkpoint-10").mkdir(parents=True)


def test_a_finished_stage_may_go_on_if_its_checkpoint_is_there(tmp_path: Path) -> None:
    file = finished_run(tmp_path, STAGES)
    with pytest.raises(
        RunError, match=r"minillm there is finished \(max_steps 10\).* go on to max_steps 20, is not there"
    ):
        RunState(load_recipe(file, ["training.max_steps=20"])).check("minillm")
    with_checkpoint(file, "minillm")
    assert stale(file, "training.max_steps=20") == []
    assert stale(file, "training.max_steps=20", "training.learning_rate=1e-3")[0] == "minillm"
    assert stale(file, "training.max_steps=5")[0] == "minillm"
    assert stale(file, "training.max_steps=-1", "training.num_train_epochs=9")[0] == "minillm"
    state = RunState(load_recipe(file, ["training.max_steps=20"]))
    for stage in STAGES:
        state.check(stage)
    assert [stage for stage in STAGES if not state.finished(stage)] == ["minillm", "evaluate"]
    untouched = json.loads((tmp_path / "run" / "state.json").read_text())["stages"]
    assert all(entry["finished"] for entry in untouched.values())  # nothing is written before a stage begins
    state.begin("minillm")
    written = json.loads((tmp_path / "run" / "state.json").read_text())["stages"]
    assert written["minillm"]["lengthened"] == [["max_steps 10", "max_steps 20"]]
    assert not written["evaluate"]["finished"]  # what was measured is of the shorter training
    assert written["sft"]["finished"]
    again = RunState(load_recipe(file, ["training.max_steps=30"]))
    again.check("minillm")
    again.begin("minillm")
    written = json.loads((tmp_path / "run" / "state.json").read_text())["stages"]
    assert len(written["minillm"]["lengthened"]) == 2


def test_a_stage_that_others_build_on_is_not_lengthened_under_them(tmp_path: Path) -> None:
    file = finished_run(tmp_path, STAGES, "warmup.training.max_steps=5")
    with_checkpoint(file, "warmup")
    longer = RunState(load_recipe(file, ["warmup.training.max_steps=9"]))
    longer.check("warmup")
    with pytest.raises(RunError, match=r"stage minillm there .*: warmup\.training\.max_steps \(there 5, now 9\)"):
        longer.check("minillm")


def test_more_epochs_are_longer_too(tmp_path: Path) -> None:
    file = finished_run(tmp_path, ["teacher", "student", "sft"], "sft.num_train_epochs=2")
    with_checkpoint(file, "sft")
    assert stale(file, "sft.num_train_epochs=4") == []
    assert stale(file, "sft.num_train_epochs=1") == ["sft"]
    assert stale(file, "sft.num_train_epochs=2", "sft.max_steps=100") == ["sft"]  # which cannot be compared


def test_the_size_of_an_update_may_be_said_in_another_way(tmp_path: Path) -> None:
    sizes = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
    file = finished_run(tmp_path, STAGES, *sizes)
    assert stale(file, sizes[0], "training.responses_per_update=8") == []
    assert stale(file, sizes[0], "training.responses_per_update=16")[0] == "minillm"


def test_a_refused_length_leaves_the_stage_as_it_was(tmp_path: Path) -> None:
    file = finished_run(tmp_path, STAGES, "training.warmup_steps=0.1")
    with_checkpoint(file, "minillm")
    before = json.loads((tmp_path / "run" / "state.json").read_text())
    state = RunState(load_recipe(file, ["training.warmup_steps=0.1", "training.max_steps=200"]))
    state.check("minillm")
    state.begin("minillm")
    state.take_back()
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == before
    assert stale(file, "training.warmup_steps=1", "training.max_steps=200") == []  # what it was in updates
    assert stale(file, "training.warmup_steps=2", "training.max_steps=200")[0] == "minillm"


class Trained:
    """What is asked of a trainer."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.args = arguments(folder, **changes)


def test_a_schedule_that_does_not_know_the_length_goes_on_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, options in (("constant", {}), ("constant_with_warmup", {"warmup_steps": 3}), ("inverse_sqrt", {})):
        check_lengthened(Trained(tmp_path, max_steps=20, lr_scheduler_type=name, **options), "minillm", 10, 10)
    assert not caplog.records


def test_what_a_schedule_does_is_said_and_a_second_warm_up_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    linear = Trained(tmp_path, max_steps=20, lr_scheduler_type="linear", learning_rate=1.0)
    assert updates_of(linear) == 20
    check_lengthened(linear, "minillm", 10, 10)
    assert "goes on from update 10 to 20" in caplog.text
    assert "learning rate (linear)" in caplog.text
    assert "from 0.1 to 0.5" in caplog.text
    caplog.clear()
    check_lengthened(linear, "minillm", 5, 20)  # not longer
    assert not caplog.records
    assert rates(linear.args, 4, 5) == [1.0, 0.75, 0.5, 0.25, 0.0]
    share = Trained(tmp_path, max_steps=200, lr_scheduler_type="linear", warmup_steps=0.1)
    with pytest.raises(RunError, match=r"would begin again at update 10, .*: set warmup_steps to the 1 updates"):
        check_lengthened(share, "minillm", 10, 10)
    check_lengthened(Trained(tmp_path, max_steps=200, warmup_steps=1), "minillm", 10, 10)


CONSTANT = "training.lr_scheduler_type=constant"


def logged(run: Path) -> list[int]:
    history = json.loads((run / "student" / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if "loss" in entry]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_model(folder, torch.float32).state_dict().values()])


def test_a_finished_run_goes_on_as_one_that_was_longer_from_the_start(pair: tuple[str, str], tmp_path: Path) -> None:
    """With other logging, and its answers are made again."""
    file = run_tiny_recipe(tmp_path, pair[1], CONSTANT)
    run, before = tmp_path / "run", weights(tmp_path / "run" / "student")
    answers = (run / "evaluate" / "minillm.jsonl").read_text()
    teachers = (run / "evaluate" / "teacher.jsonl").stat().st_mtime_ns
    assert logged(run) == [1, 2, 3]
    longer = [CONSTANT, "training.max_steps=7", "training.logging_steps=2", "training.report_to=none", "log_samples=3"]
    runner.run_recipe(load_recipe(file, longer))
    assert logged(run) == [1, 2, 3, 4, 6]
    assert (run / "evaluate" / "minillm.jsonl").read_text() != answers
    assert (run / "evaluate" / "teacher.jsonl").stat().st_mtime_ns == teachers
    assert "max_steps 3" in (run / "student" / "README.md").read_text()
    (tmp_path / "other").mkdir()
    runner.run_recipe(
        load_recipe(
            file, [*longer, f"run_dir={tmp_path / 'other'}", "stages=[teacher,student,responses,warmup,minillm]"]
        )
    )
    # The teacher scores restored rollouts in groups of other sizes, which rounds otherwise.
    torch.testing.assert_close(weights(run / "student"), weights(tmp_path / "other" / "student"), rtol=0, atol=1e-6)
    assert not torch.equal(weights(run / "student"), before)
    assert [path.name for path in (run / "work" / "minillm").iterdir()] == ["checkpoint-7"]
