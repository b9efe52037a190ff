"""The wheel: its name and metadata, what it holds, and that it works outside the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import minillm
from minillm.distribution import DISTRIBUTION, install_command, versions

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TREES = ("minillm", "recipes", "eval")


def texts() -> list[Path]:
    """Files whose text a user reads."""
    found = [path for tree in TREES for kind in ("*.py", "*.md", "*.yaml") for path in (ROOT / tree).rglob(kind)]
    return [*found, *ROOT.glob("*.toml"), ROOT / "Makefile"]


def test_the_name_on_the_index_is_said_once() -> None:
    assert SETTINGS["project"]["name"] == DISTRIBUTION
    assert install_command("vllm") == f"pip install '{DISTRIBUTION}[vllm]'"
    wrong = [
        f"{path.relative_to(ROOT)}: {found}"
        for path in texts()
        for found in re.findall(r"(?:pip install |')minillm\b(?!-)[^\s]*", path.read_text(encoding="utf-8"))
        if "[" in found or "pip install" in found
    ]
    assert not wrong, "another author's distribution"


def test_extras_that_messages_name_are_there() -> None:
    named = {
        extra
        for path in (ROOT / "minillm").rglob("*.py")
        for extra in re.findall(r"""install_command\(['"]([\w-]+)""", path.read_text(encoding="utf-8"))
    }
    assert {"vllm", "quantized", "deepspeed"} <= named
    assert named <= SETTINGS["project"]["optional-dependencies"].keys()


def test_versions_come_without_imports() -> None:
    code = (
        "import sys\nfrom minillm.cli import main\nsys.argv = ['minillm', '--version']\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).splitlines()
    assert said[0] == f"minillm {minillm.__version__}"
    assert re.fullmatch(r"torch \d+\..+", said[1])
    assert re.fullmatch(r"transformers \d+\..+", said[2])
    assert re.fullmatch(r"vllm (\d+\..+|not installed)", said[3])
    assert said[-1] == "False False"


def test_a_missing_library_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("minillm.distribution.version", nothing)
    assert versions()["vllm"] == "not installed"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the working tree gets no build folder."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], text=True, cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file() and not name.startswith(("tests/", ".venv")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(root), str(source)], check=True, capture_output=True, text=True, cwd=root)
    [built] = root.glob("*.whl")
    return built


@pytest.mark.full
def test_the_wheel_holds_what_is_used_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"{DISTRIBUTION.replace('-', '_')}-{minillm.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith("METADATA")]
        facts = message_from_string(archive.read(metadata).decode())
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    shipped |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "eval").glob("*.yaml")}
    assert {f"minillm/{name}" for name in shipped} <= names
    assert "minillm/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"minillm", metadata.split("/")[0]}
    assert not [name for name in names if name.startswith(("minillm/eval/speed", "minillm/eval/results", "tests"))]
    assert facts["Version"] == minillm.__version__
    assert facts.get_all("Project-URL")
    assert "Typing :: Typed" in facts.get_all("Classifier", [])


@pytest.mark.full
def test_an_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which sees the libraries of this one but not its checkout."""
    target, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, text=True, cwd=work)
    script = target / "bin" / "minillm"
    assert script.is_file()

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        """The installed command; -P keeps the working directory from the import path."""
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(target), "HOME": str(tmp_path), "COLUMNS": "100"}
        return subprocess.run(
            [sys.executable, "-P", str(script), *words], capture_output=True, text=True, cwd=work, env=env
        )

    where = subprocess.check_output(
        [sys.executable, "-P", "-c", "import minillm; print(minillm.__file__)"],
        text=True, cwd=work, env={"PYTHONPATH": str(target)},
    )  # fmt: skip
    assert Path(where.strip()).is_relative_to(target)
    assert command("--version").stdout.startswith(f"minillm {minillm.__version__}\n")
    listed = command("recipes")
    assert "gpt2/120m" in listed.stdout, listed.stderr
    shown = command("show", "quickstart")
    assert f"file: {target}/minillm/recipes/quickstart/train.jsonl" in shown.stdout, shown.stderr
    assert command("schema", "suite").stdout == (ROOT / "recipes" / "schemas" / "suite.json").read_text()
    assert not list(work.iterdir())
    (work / "mine.yaml").write_text("extends: gpt2/120m\nrun_dir: mine\n")
    assert "source: openai-community/gpt2-xl" in command("show", "mine.yaml").stdout
    misspelt = command("run", "quickstrat")
    assert (misspelt.returncode, "did you mean quickstart?" in misspelt.stderr) == (2, True)
    checked = command("evaluate", "eval/paper", "data_dir=nowhere", "model=a:nowhere")  # a suite that is shipped
    assert "no such recipe" not in checked.stderr
