"""The house's own rules: who may import whom, how large a file may grow, and what every registry entry owes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from minillm.evaluation.config import Suite
from minillm.run.experiments.config import Comparison
from minillm.run.recipe import Recipe
from minillm.run.stages import STAGES

ROOT = Path(__file__).parents[1]
# Each floor may import from those below it (to its left), and from itself.
FLOORS = [
    "errors config redaction",
    "data",
    "models",
    "loss",
    "teacher",
    "rollout",
    "evaluation",
    "train",
    "run",
    "cli",
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
# Read by everything, so that a typing error in a recipe costs no import of torch.
LIGHT = [
    "minillm.cli",
    "minillm.config",
    "minillm.errors",
    "minillm.redaction",
    "minillm.run.experiments.config",
    "minillm.run.recipe",
    "minillm.run.recipe_file",
    "minillm.run.stages",
]
# Engines tell what they need, and the plan reckons with it, before torch is imported.
WITHOUT_TORCH = ["minillm.rollout.engines.base", "minillm.rollout.engines.vllm_memory"]
# Packages that are optional, or whose import takes long and is needed in few places.
LAZY = {
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "jinja2",
    "matplotlib",
    "peft",
    "rich",
    "rouge_score",
    "transformers",
    "triton",
    "trl",
    "vllm",
}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 8


def sections(found: object) -> Iterator[type[BaseModel]]:
    """The sections in an annotation, with those in their fields."""
    if isinstance(found, type) and issubclass(found, BaseModel):
        yield found
        for field in found.model_fields.values():
            yield from sections(field.annotation)
    for argument in get_args(found):
        yield from sections(argument)


SECTIONS = sorted({*sections(Recipe), *sections(Comparison), *sections(Suite)}, key=lambda section: section.__name__)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    out = {}
    for path in sorted((ROOT / "minillm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        out[name] = ast.parse(path.read_text(encoding="utf-8"))
    return out


def is_package(name: str) -> bool:
    return (ROOT / Path(*name.split(".")) / "__init__.py").is_file()


def imports(tree: ast.AST, *, top: bool = False, types: bool = True) -> Iterator[tuple[str, ast.stmt]]:
    """Modules that are imported from, with the statement.

    Args:
        top: leave out what functions import.
        types: include what is imported for type checkers only.
    """
    for node in ast.iter_child_nodes(tree):
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
            and not types
        ):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in modules() else node.module), node
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif not (top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top=top, types=types)


def room(name: str) -> str:
    return name.split(".")[1]


def test_nothing_imports_upward() -> None:
    upward = [
        f"{name}:{node.lineno} imports {found}"
        for name, tree in modules().items()
        if name not in ("minillm", "minillm.__main__")
        for found, node in imports(tree)
        if found.startswith("minillm.") and FLOOR_OF[room(found)] > FLOOR_OF[room(name)]
    ]
    assert not upward


def test_no_import_goes_in_a_circle() -> None:
    graph = {
        name: {found for found, _ in imports(tree, top=True, types=False) if found in modules()}
        for name, tree in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "minillm").rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def is_kernel_or_constructor(function: ast.FunctionDef) -> bool:
    """Triton kernels take every number by itself; a public constructor's keywords are what users write."""
    jitted = any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)
    return (
        jitted or function.name == "__init__" or any("app.command" in ast.unparse(d) for d in function.decorator_list)
    )


def test_no_function_is_too_long_or_takes_too_much() -> None:
    faults = []
    for name, tree in modules().items():
        for function in functions(tree):
            lines = (function.end_lineno or 0) - function.lineno + 1
            arguments = function.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - (
                bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
            )
            if lines > LONGEST_FUNCTION and function.name != "plan":
                faults.append(f"{name}.{function.name}: {lines} lines")
            if count > MOST_PARAMETERS and not is_kernel_or_constructor(function):
                faults.append(f"{name}.{function.name}: {count} parameters")
    assert not faults


def test_no_private_name_is_reached_from_another_module() -> None:
    reached = []
    for name, tree in modules().items():
        bound = {}
        for found, node in imports(tree):
            if found.startswith("minillm") and isinstance(node, ast.ImportFrom):
                reached += [f"{name}: {alias.name} of {found}" for alias in node.names if alias.name.startswith("_")]
                bound |= {alias.asname or alias.name: found for alias in node.names if found in modules()}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                owner = bound[node.value.id]
                is_module = owner.endswith(f".{node.value.id}")
                if is_module and node.attr.startswith("_") and not node.attr.startswith("__"):
                    reached.append(f"{name}: {owner}.{node.attr}")
    assert not reached


def test_what_is_imported_late_is_slow_or_optional() -> None:
    """Stages and the command line are imported whenever a recipe is read; elsewhere only such packages wait."""
    late = []
    for name, tree in modules().items():
        if name.startswith("minillm.run.stages") or name in LIGHT or name in WITHOUT_TORCH:
            continue
        early = {id(node) for _, node in imports(tree, top=True)}
        late += [
            f"{name}:{node.lineno} {found}"
            for found, node in imports(tree)
            if id(node) not in early and found.split(".")[0] not in LAZY and not is_light_user(name, found)
        ]
    assert not late


def is_light_user(name: str, found: str) -> bool:
    """Modules that light ones import: they leave what needs torch for later."""
    return (name, found) in {
        ("minillm.run.training_arguments", "minillm.train.arguments"),
        ("minillm.run.processes", "torch.distributed"),
        ("minillm.run.model_card", "huggingface_hub"),
        ("minillm.run.model_card", "minillm.data.examples"),
        ("minillm.run.model_card", "minillm.data.templates"),
        ("minillm.rollout.engines.choose", "minillm.rollout.engines.local_server"),
        ("minillm.rollout.engines.choose", "minillm.rollout.engines.server"),
        ("minillm.loss.elementwise", "minillm.loss.triton_kernels"),
        ("minillm.rollout.engines.vllm", "minillm.rollout.engines.vllm_pair"),  # which imports vLLM
        ("minillm.evaluation.metrics", "rouge_score.tokenizers"),
    }


def test_a_recipe_is_read_without_torch() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *LIGHT, *WITHOUT_TORCH], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False", done.stderr[-2000:]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_of_a_recipe_is_documented(section: type[BaseModel]) -> None:
    bare = [name for name, field in section.model_fields.items() if not (field.description or "").strip()]
    assert not bare


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_documented_and_tested(stage: object) -> None:
    name = stage.name  # pyright: ignore[reportAttributeAccessIssue]
    assert type(stage).__module__ == f"minillm.run.stages.{name}", "a stage is the file of its name"
    assert (sys.modules[type(stage).__module__].__doc__ or "").startswith(f"Stage `{name}`")
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "run").glob("*.py")]
    assert any(re.search(rf"\b{name}\b", text) for text in texts)
    assert re.search(rf"\b{name}\b", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_files_that_texts_name_are_there() -> None:
    texts = [*ROOT.glob("*.md"), ROOT / "recipes" / "README.md", ROOT / "eval" / "README.md"]
    texts += list((ROOT / "minillm").rglob("*.py"))
    lost = []
    for path in texts:
        text = path.read_text(encoding="utf-8")
        if path.name == "CHANGELOG.md":
            continue  # it names what was moved
        for found in re.findall(r"\b(?:minillm|tests|recipes|eval)/[\w./-]+\.(?:py|yaml|md|jsonl)\b", text):
            if "NAME" not in found and "RECIPE" not in found and not (ROOT / found).exists():
                lost.append(f"{path.relative_to(ROOT)}: {found}")
        for found in re.findall(r"`(minillm(?:\.[a-z_]+)+)", text):
            parts = found.split(".")
            there = any(".".join(parts[:n]) in modules() and n > 1 for n in range(len(parts), 1, -1))
            if not there:
                lost.append(f"{path.relative_to(ROOT)}: {found}")
    assert not lost
