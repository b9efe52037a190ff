"""Commands and code in the README and in the documents are run, or parsed as the command line parses them.

A block that is not says why, in the line before it: `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from minillm.cli import app
from minillm.run.recipe_file import (
    is_comparison,
    is_suite,
    load_comparison,
    load_recipe,
    load_suite,
)
from tests.documents import ROOT, Block, all_blocks

BLOCKS = all_blocks()
LANGUAGES = {"bash", "json", "python", "text", "yaml"}
OWN = ("mine.yaml", "text.yaml")  # recipes that the documents have the reader write
RECIPE_COMMANDS = ("check", "plan", "run", "show")


def of(language: str) -> list[Any]:
    """The blocks of a language that are run, each with its place as its name."""
    return [pytest.param(b, id=b.place) for b in BLOCKS if b.language == language and b.not_run is None]


def test_blocks_are_of_known_languages() -> None:
    assert len(BLOCKS) > 80
    assert [block.place for block in BLOCKS if block.language not in LANGUAGES] == []
    marked = [block for block in BLOCKS if block.not_run is not None]
    assert len(marked) < 12, "most blocks are run"
    assert all(len(str(block.not_run)) > 8 for block in marked)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: files of prompts, a checkout's recipes, and recipes of their own."""
    for name in ("prompts", "heldout", "validation", "corpus", "questions"):
        (tmp_path / f"{name}.jsonl").write_text(
            '{"instruction": "Name three fruits.", "question": "Why?", "answer": "So.", "text": "An apple."}\n'
        )
    for block in BLOCKS:
        for name in OWN:
            if block.language == "yaml" and block.text.startswith(f"# {name}\n"):
                (tmp_path / name).write_text(block.text)
    for name in ("recipes", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(text: str) -> list[list[str]]:
    """The commands of a block, as a shell takes them apart, without variables before them."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [
        line[next((i for i, word in enumerate(line) if not re.match(r"[A-Z_]+=", word)), 0) :] for line in lines if line
    ]


def parse_minillm(words: list[str]) -> None:
    """Parse a command line as `minillm` does, and read the recipe or suite that it names."""
    if words in (["--version"], ["--install-completion"]):
        return
    group: Any = typer.main.get_command(app)
    name, *rest = words
    command = group.commands[name]
    given = command.make_context(name, list(rest)).params
    overrides = list(given.get("overrides") or [])
    if name == "evaluate" and is_suite(Path(given["file"])):
        load_suite(Path(given["file"]), [text for text in overrides if not text.startswith("model=")])
    elif name in RECIPE_COMMANDS and given["recipe"] is not None and not Path(given["recipe"]).is_dir():
        file = Path(given["recipe"])
        load_comparison(file, overrides) if is_comparison(file) else load_recipe(file, overrides)


def check_command(words: list[str]) -> None:
    """Parse a command of a block.

    Raises:
        AssertionError: It is none that can be checked, or what it names is not there.
    """
    program, *rest = words
    if program == "minillm":
        parse_minillm(rest)
    elif program == "accelerate":
        at = rest.index("-m")
        assert rest[at + 1] == "minillm"
        parse_minillm(rest[at + 2 :])
        if "--config_file" in rest:
            assert (ROOT / rest[rest.index("--config_file") + 1]).is_file()
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, equals, _ = word.partition("=")
            assert re.search(rf"^{name} \?=" if equals else rf"^{name}:", makefile, re.M), word
    elif words[:2] == ["pip", "install"]:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        assert re.fullmatch(r"\.\[([\w,-]+)\]", words[2])[1] in known  # pyright: ignore[reportOptionalSubscript]
    else:
        raise AssertionError(f"{' '.join(words)}: run it, or mark the block as not run")


@pytest.mark.parametrize("block", of("bash"))
def test_commands_are_what_the_command_line_takes(block: Block, reader: Path) -> None:
    for words in words_of(block.text):
        check_command(words)


@pytest.mark.parametrize(
    "line", ["minillm run nosuch", "minillm chat --colour red x", "minillm rnu x", "make nothing", "frob x",
             "minillm run quickstart training.lerning_rate=1", "pip install '.[nothing]'"],
)  # fmt: skip
def test_a_wrong_command_is_noticed(line: str, reader: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 (each of another library's kind)
        check_command(shlex.split(line))


def recipe_overrides(tree: dict[str, Any]) -> list[str]:
    """What a part of a recipe lacks to be a whole one."""
    if "extends" in tree:
        return []
    data = tree.get("data", {})
    lacks = [f"data.{name}=prompts.jsonl" for name in ("train", "heldout") if name not in data]
    return [
        *lacks,
        *([] if "run_dir" in tree else ["run_dir=runs/x"]),
        *([] if "teacher" in tree else ["teacher.source=org/teacher"]),
        *([] if "source" in tree.get("student", {}) else ["student.source=org/student"]),
    ]


@pytest.mark.parametrize("block", of("yaml"))
def test_recipes_are_read(block: Block, reader: Path) -> None:
    tree, file = yaml.safe_load(block.text), reader / "recipe.yaml"
    file.write_text(block.text)
    load_recipe(file, recipe_overrides(tree))


@pytest.mark.parametrize("block", of("json"))
def test_rows_are_json(block: Block) -> None:
    for line in block.text.splitlines():
        assert isinstance(json.loads(line), dict)


STUDENTS = ("runs/quickstart/warmed", "Qwen/Qwen2.5-0.5B-Instruct")
TEACHERS = ("runs/quickstart/teacher", "Qwen/Qwen2.5-1.5B-Instruct")


@pytest.mark.parametrize("block", of("python"))
def test_code_runs_on_tiny_models(
    block: Block, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"max_steps=\d+", "max_steps=1", block.text)
    text = text.replace('report_to="none"', 'report_to="none", use_cpu=True')
    text = text.replace("RolloutConfig(", 'RolloutConfig(engine="transformers", max_prompt_tokens=64, ')
    for names, folder in ((STUDENTS, pair[0]), (TEACHERS, pair[1])):
        for name in names:
            text = text.replace(f'"{name}"', repr(folder))
    found: dict[str, Any] = {}
    exec(compile(text, block.place, "exec"), found)
    if "trainer" in found:
        assert found["trainer"].state.global_step == 1
