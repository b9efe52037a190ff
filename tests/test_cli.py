"""The command line: an unmet condition is one line on standard error, not a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from minillm import cli
from minillm.errors import RunError
from minillm.run.directory import RunState
from minillm.run.model_card import push
from minillm.run.recipe_file import load_recipe


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run the command line in this process, and return its exit status and what it printed on standard error."""
    monkeypatch.setattr("sys.argv", ["minillm", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(str(stopped.value.code)), capsys.readouterr().err


@pytest.fixture
def recipe(pair: tuple[str, str], tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "w1", "output": "w2"}\n' * 4)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "run_dir: ./run\n"
        "data: {train: ./prompts.jsonl, heldout: ./prompts.jsonl, max_prompt_tokens: 16}\n"
        f"teacher: {{source: {pair[1]}}}\n"
        f"student: {{source: {pair[0]}}}\n"
        "rollout: {engine: transformers, num_rollouts: 8, max_new_tokens: 8}\n"
        "responses: {max_new_tokens: 8}\n"
        "evaluate: {max_new_tokens: 8}\n"
    )
    return file


def test_a_run_directory_that_cannot_be_made(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = command(monkeypatch, capsys, "run", str(recipe), f"run_dir={recipe}/run", "--stage", "teacher")
    assert status == 2
    assert f"error: run_dir: {recipe}/run cannot be written (Not a directory): " in said
    assert "Traceback" not in said


def test_a_state_on_a_full_disk(recipe: Path) -> None:
    settings = load_recipe(recipe)
    settings.run_dir.mkdir()
    (settings.run_dir / "state.part").symlink_to("/dev/full")  # every write there fails: no space is left
    with pytest.raises(RunError, match=r"run_dir: .*/run cannot be written \(No space left on device\): make room"):
        RunState(settings).begin("teacher")


def test_a_state_that_cannot_be_opened(recipe: Path) -> None:
    settings = load_recipe(recipe)
    settings.run_dir.mkdir()
    (settings.run_dir / "state.json").symlink_to("/proc/self/mem")  # a file whose first byte cannot be read
    with pytest.raises(RunError, match=r"state\.json: cannot be read .*; choose another run_dir"):
        RunState(settings)


def test_a_fitting_recipe_in_a_folder_that_is_not_there(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = recipe.parent / "nowhere" / "fits.yaml"
    status, said = command(monkeypatch, capsys, "plan", str(recipe), "--gpus", "1", "--fit", str(target))
    assert (status, said) == (2, f"error: --fit {target}: cannot be written: No such file or directory\n")


def test_a_hub_that_cannot_be_reached(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RunError, match=r"push_to_hub: me/student cannot be uploaded to http://127\.0\.0\.1:1 \("):
        push(Path(pair[0]), "me/student", "token")


WITHOUT_TORCH = [
    (["run", "RECIPE", "training.lerning_rate=1"], "training.lerning_rate: unknown key; did you mean learning_rate?"),
    (["plan", "RECIPE", "--memory", "foo"], "--memory foo: a size such as 80GiB is needed"),
    (["generate", "nowhere", "w1", "--template", "z"], "--template z: allowed: chat, alpaca, plain"),
    (["evaluate", "SUITE"], "no model to evaluate: add model=FOLDER"),
    (["run", "RECIPE", "--stage", "slep"], "--stage slep: no such stage; allowed: teacher, finetune"),
]


@pytest.mark.parametrize(("words", "fault"), WITHOUT_TORCH, ids=[fault.split(":")[0] for _, fault in WITHOUT_TORCH])
def test_an_argument_is_refused_without_torch(recipe: Path, words: list[str], fault: str) -> None:
    """Torch is hidden, so that an import of it would be an error."""
    suite = recipe.parent / "suite.yaml"
    suite.write_text("sets: {some: {file: ./prompts.jsonl}}\nout: ./out\n")
    code = (
        "import sys\nsys.modules['torch'] = None\nsys.modules['transformers'] = None\n"
        "from minillm.cli import main\nmain()"
    )
    given = [{"RECIPE": str(recipe), "SUITE": str(suite)}.get(word, word) for word in words]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert fault in done.stderr
    assert "Traceback" not in done.stderr
