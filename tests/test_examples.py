"""The examples run from end to end, on tiny models."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minillm.models.load import load_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def pair(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The pair with a context of 1,024 tokens, which the defaults of the library ask for."""
    folders = []
    for source in pair:
        folder = tmp_path_factory.mktemp("examples") / Path(source).name
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
        folders.append(str(folder))
    return folders[0], folders[1]


def run(name: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_pair(pair: tuple[str, str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [{"instruction": f"w{n} w4"} for n in range(8)]
    rows.append({"messages": [{"role": "user", "content": "w5"}]})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("--updates", "3", "--responses", "4", "--tokens", "6")
    printed = run(
        "own_pair.py", "--student", pair[0], "--teacher", pair[1], "--prompts", str(prompts), *sizes, folder=tmp_path
    )
    assert re.search(r"^KL\(q‖p\) a token: \d+\.\d+ in the first update, \d+\.\d+ in the last$", printed, re.MULTILINE)
    assert load_model(tmp_path / "runs" / "own-pair" / "student").config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["from_trl.py", "lora.py"])
def test_scripts_for_a_pair(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    assert run(name, *pair, folder=tmp_path).splitlines()[-1] == f"Student: runs/{name[:-3].replace('_', '-')}/student"
    student = tmp_path / "runs" / name[:-3].replace("_", "-") / "student"
    assert load_model(student).config.num_hidden_layers == 2
