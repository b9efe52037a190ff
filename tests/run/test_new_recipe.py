"""`minillm init` and `minillm check`: a recipe for one's own pair, and everything that a run would refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minillm.cli import app
from minillm.errors import InputError, MinillmError, MissingError, SourceError
from minillm.rollout.engines.vllm_memory import GIB
from minillm.run import new_recipe as written
from minillm.run.dry_run import dry_run, is_here
from minillm.run.new_recipe import Wanted, new_recipe
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import plan
from minillm.run.plan.work import why_refused
from minillm.run.recipe_file import load_recipe
from tests.run.tiny_recipe import RECIPE


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}"}) + "\n" for i in range(10)))
    return file


def wanted(pair: tuple[str, str], rows: Path, student: str | None = None) -> Wanted:
    return Wanted(rows.parent / "mine.yaml", pair[1], student or pair[0], rows, rows)


def test_the_recipe_is_one_that_can_be_read_from_anywhere(
    pair: tuple[str, str], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = wanted(pair, rows)
    text, size = new_recipe(given, Machine(1, 24 * GIB))
    given.target.write_text(text)
    monkeypatch.chdir("/")
    recipe = load_recipe(given.target)
    assert (recipe.teacher.first.source, recipe.student.source) == (pair[1], pair[0])
    assert recipe.data.train.file == rows
    assert recipe.run_dir == Path("runs/mine")
    assert recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens <= 256  # the context of the tiny models
    assert size.startswith("Sized for 1 GPU(s) of 24 GiB: ")
    assert f"# {size}" in text
    assert sum("  # " in line for line in text.splitlines()) >= 15
    assert max(map(len, text.splitlines()[1:])) <= 160
    schema = re.match(r"# yaml-language-server: \$schema=(\S+)", text)
    assert schema is not None
    assert (given.target.parent / schema[1]).resolve().name == "recipe.json"


@pytest.mark.parametrize(("processes", "size"), [(1, 32), (2, 32), (8, 32), (6, 30)])
def test_an_update_has_one_size_on_every_machine(pair: tuple[str, str], rows: Path, processes: int, size: int) -> None:
    given = wanted(pair, rows)
    given.target.write_text(new_recipe(given, Machine(processes, 80 * GIB))[0])
    recipe = load_recipe(given.target)
    assert recipe.training["responses_per_update"] == recipe.warmup.training["responses_per_update"] == size
    assert why_refused(recipe, Machine(processes)) is None
    assert recipe.rollout.num_rollouts % size == 0


def test_a_small_machine_gets_a_recipe_that_fits(pair: tuple[str, str], rows: Path) -> None:
    given = wanted(pair, rows)
    given.target.write_text(new_recipe(given, Machine(1, 80 * GIB))[0])
    large = load_recipe(given.target)
    text, said = new_recipe(given, Machine(1, 1))  # where nothing fits, everything that helps is changed
    assert "It does not fit" in said
    given.target.write_text(text)
    small = load_recipe(given.target)
    assert plan(small, Machine(1, 1)).peak < plan(large, Machine(1, 1)).peak


def test_a_card_without_bfloat16_gets_no_bfloat16(pair: tuple[str, str], rows: Path) -> None:
    given = wanted(pair, rows)
    given.target.write_text(new_recipe(given, Machine(1, 16 * GIB, bf16=False))[0])
    recipe = load_recipe(given.target)
    assert (recipe.training["bf16"], recipe.warmup.training["bf16"]) == (False, False)


def test_a_pruned_student(pair: tuple[str, str], rows: Path) -> None:
    given = wanted(pair, rows, "prune")
    given.target.write_text(new_recipe(given, Machine(1, 24 * GIB))[0])
    assert load_recipe(given.target).student.keep_layers == 2  # five of six of three


def test_what_is_not_there_is_refused(pair: tuple[str, str], rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--train .*nowhere\.jsonl: no such file"):
        new_recipe(Wanted(rows.parent / "x.yaml", pair[1], pair[0], rows.parent / "nowhere.jsonl", rows), Machine())
    with pytest.raises(MissingError):
        new_recipe(wanted(pair, rows, "./nowhere/at/all"), Machine())

    def unreachable(source: str, needs: object) -> None:
        raise SourceError(f"{source}: the hub cannot be reached")

    monkeypatch.setattr(written, "check_source", unreachable)
    given = Wanted(rows.parent / "x.yaml", "org/teacher", "org/student", rows, rows)
    text, size = new_recipe(given, Machine())
    assert size == "Not sized to a machine: org/teacher: the hub cannot be reached"
    given.target.write_text(text)
    assert load_recipe(given.target).student.source == "org/student"


def test_the_command_writes_and_keeps(pair: tuple[str, str], rows: Path) -> None:
    target = rows.parent / "new" / "mine.yaml"
    words = ["init", str(target), "--teacher", pair[1], "--student", pair[0], "--train", str(rows), "--gpus", "1"]
    bare = CliRunner().invoke(app, words)
    assert isinstance(bare.exception, InputError)
    assert str(bare.exception) == "--heldout: needed, and not given (there is no terminal to ask on)"
    done = CliRunner().invoke(app, [*words, "--heldout", str(rows), "--memory", "24"], catch_exceptions=False)
    assert f"wrote {target}. Sized for 1 GPU(s) of 24 GiB" in done.output
    assert f"minillm check {target}" in done.output
    load_recipe(target)
    again = CliRunner().invoke(app, [*words, "--heldout", str(rows)])
    assert "is there already; name another file, or --force" in str(again.exception)


@pytest.fixture
def recipe(pair: tuple[str, str], rows: Path) -> Path:
    file = rows.parent / "recipe.yaml"
    file.write_text(RECIPE.format(run=rows.parent / "run", data=rows, teacher=pair[1]))
    return file


def test_a_check_shows_a_prompt_and_an_answer_and_writes_nothing(recipe: Path, pair: tuple[str, str]) -> None:
    before = sorted(recipe.parent.rglob("*"))
    done = CliRunner().invoke(app, ["check", str(recipe)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "training: 10 prompts\nheld-out: 10 prompts\n" in done.output
    assert re.search(r"memory, estimated: [\d.]+ of the [\d.]+ GiB of ", done.output)
    assert "first prompt, 4 tokens:\n  <user> w0 w3 <bot>\n" in done.output
    assert f"answer of {pair[1]}, before training:\n" in done.output
    assert "Nothing that a run would refuse was found.\n" in done.output
    assert sorted(recipe.parent.rglob("*")) == before
    assert dry_run(load_recipe(recipe)).answer == dry_run(load_recipe(recipe)).answer  # by the recipe's seed
    assert dry_run(load_recipe(recipe), sample=False).answer is None


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("rollout.num_rollouts=6", r"rollout.num_rollouts \(6\) must be a multiple of the 4 responses"),
        ("data.max_prompt_tokens=255", r"exceed the teacher's context of 256 tokens"),
        ("student={source: ./nowhere/at/all}", r"nowhere/at/all: no such folder"),
        ("data.max_prompt_tokens=1", r"no prompt is within data.max_prompt_tokens \(1\)"),
        ("training.max_steps=0", r"command line: training.max_steps: must be at least 1"),
        ("stages=[minillm, responses, warmup]", r"stage minillm needs stage warmup, which is not finished"),
    ],
)
def test_a_check_refuses_what_a_run_would(recipe: Path, override: str, fault: str) -> None:
    with pytest.raises(MinillmError, match=fault):
        dry_run(load_recipe(recipe, [override]), sample=False)


def test_a_recipe_that_does_not_fit_is_said_to(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.run.dry_run.machine_for", lambda gpus, flops: (Machine(1, 1, gpu=False), ""))
    done = CliRunner().invoke(app, ["check", str(recipe), "--no-sample"], catch_exceptions=False)
    assert done.exit_code == 1
    assert "does not fit" in done.output


def test_a_model_of_the_hub_is_not_here(pair: tuple[str, str]) -> None:
    assert is_here(pair[0])
    assert not is_here("nobody/nothing")
