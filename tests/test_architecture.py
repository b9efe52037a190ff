"""The rules of the source: who may import whom, how large a file may grow, and what no module may reach into."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import minillm
from minillm.evaluation.config import Suite
from minillm.run.experiments.config import Comparison
from minillm.run.recipe import Recipe

ROOT = Path(__file__).parents[1]
# Each floor may import from those below it (to its left), and from itself.
FLOORS = [
    "errors config redaction distribution noise terminal capture",
    "data",
    "models",
    "loss",
    "teacher",
    "rollout",
    "evaluation",
    "train",
    "run",
    "commands",
    "cli",
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
# Read by everything, so that a typing error in a recipe costs no import of torch.
LIGHT = [
    "minillm.capture",
    "minillm.cli",
    "minillm.commands.app",
    "minillm.commands.check",
    "minillm.commands.init",
    "minillm.commands.recipes",
    "minillm.commands.run",
    "minillm.commands.schema",
    "minillm.commands.show",
    "minillm.commands.verify",
    "minillm.config",
    "minillm.distribution",
    "minillm.errors",
    "minillm.noise",
    "minillm.redaction",
    "minillm.run.experiments.config",
    "minillm.run.recipe",
    "minillm.run.recipe_file",
    "minillm.run.resolved",
    "minillm.run.schema",
    "minillm.run.shipped",
    "minillm.run.stages",
    "minillm.terminal",
]
# What engines need is told without torch. `minillm plan` itself imports torch once its recipe is read: it asks torch for
# the GPUs of this machine, and counts what autograd keeps on fake tensors.
WITHOUT_TORCH = ["minillm.rollout.engines.base", "minillm.rollout.engines.vllm_memory", "minillm.run.watch"]
# Packages that are optional.
OPTIONAL = {
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "jinja2",
    "matplotlib",
    "peft",
    "rouge_score",
    "triton",
    "trl",
    "vllm",
}
# What else a function imports, and why.
LATE = {
    ("minillm.run.training_arguments", "minillm.train.arguments"): "a light module, which leaves torch for later",
    ("minillm.run.training_arguments", "transformers"): "a light module, which leaves torch for later",
    ("minillm.loss.elementwise", "minillm.loss.triton_kernels"): "the module needs triton, which is optional",
    ("minillm.rollout.engines.vllm", "minillm.rollout.engines.vllm_pair"): "the module needs vLLM, which is optional",
}
# Private names of other libraries that have no public counterpart.
PRIVATE = {
    ("minillm.loss.sparse", "_replace"): "of a named tuple, where it is public",
    ("minillm.loss.teacher_spans", "_replace"): "of a named tuple, where it is public",
    ("minillm.rollout.engines.vllm_pair_samplers", "_replace"): "of a named tuple, where it is public",
    ("minillm.models.device", "_is_mkldnn_bf16_supported"): "PyTorch has no public question",
    ("minillm.models.load", "_DropoutNd"): "the base class of all dropouts",
    ("minillm.models.load", "_hf_deepspeed_config_weak_ref"): "there is a function that sets it, and none that asks",
    ("minillm.models.attention", "_attn_implementation"): "transformers has no public question",
    ("minillm.models.pruning.apply", "_attn_implementation"): "transformers has no public question",
    ("minillm.models.quantization", "_parameters"): "`named_parameters` gives no dictionary to write to",
    ("minillm.models.shape", "_cdata"): "the identity of a storage without memory",
    ("minillm.train.resume", "_load_from_checkpoint"): "of a Trainer, without training",
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
Modules = dict[str, ast.Module]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> Modules:
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


def functions(tree: ast.AST) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Every function of a module, with the class that it is a method of."""
    for node in ast.walk(tree):
        owner = node if isinstance(node, ast.ClassDef) else None
        yield from ((child, owner) for child in ast.iter_child_nodes(node) if isinstance(child, Function))


def public_classes(sources: Modules) -> set[str]:
    """Names of the classes that users construct, and of the classes that these inherit from."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for tree in sources.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found: set[str] = set()
    new = set(minillm.__all__)
    while new:
        found |= new
        new = {base for name in new for base in bases.get(name, ())} - found
    return found


def size_faults(sources: Modules) -> list[str]:
    """Functions that are too long or take too many parameters.

    Triton kernels take every number by itself. Keywords of a public constructor are what users of the library write,
    and parameters of a command are what they type.
    """
    faults, public = [], public_classes(sources)
    for name, tree in sources.items():
        for function, owner in functions(tree):
            lines = (function.end_lineno or 0) - function.lineno + 1
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = len([one for one in given if one.arg not in ("self", "cls")])
            decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
            constructor = function.name == "__init__" and owner is not None and owner.name in public
            typed = any("triton" in one or "app.command" in one for one in decorators)
            if lines > LONGEST_FUNCTION:
                faults.append(f"{name}.{function.name}: {lines} lines")
            if count > MOST_PARAMETERS and not constructor and not typed:
                faults.append(f"{name}.{function.name}: {count} parameters")
    return faults


def test_no_function_is_too_long_or_takes_too_much() -> None:
    assert not size_faults(modules())


def names_defined_in(tree: ast.AST) -> set[str]:
    """Names that a module gives to functions, classes, variables, and attributes of its own objects."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
    return found


def is_own(value: ast.expr) -> bool:
    """Whether an attribute belongs to the object or class whose method reads it."""
    return ast.unparse(value) in ("self", "cls", "super()")


def private_faults(sources: Modules) -> list[tuple[str, str]]:
    """Private names of another module, or of another module's objects: (module, name) of each."""
    reached = []
    for name, tree in sources.items():
        defined = names_defined_in(tree)
        for found, node in imports(tree):
            if found.startswith("minillm") and isinstance(node, ast.ImportFrom):
                reached += [(name, alias.name) for alias in node.names if is_private(alias.name)]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not is_private(node.attr) or is_own(node.value):
                continue
            if node.attr not in defined:
                reached.append((name, node.attr))
    return reached


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_is_reached_from_another_module() -> None:
    reached = set(private_faults(modules()))
    assert reached - PRIVATE.keys() == set()
    assert PRIVATE.keys() - reached == set(), "exemptions that nothing needs"


def late_imports(sources: Modules) -> list[tuple[str, str]]:
    """Imports inside functions of packages that are not optional: (module, what it imports) of each.

    Stages and the command line are imported whenever a recipe is read, so they import late what loads torch.
    """
    late = []
    for name, tree in sources.items():
        if name.startswith("minillm.run.stages") or name in LIGHT or name in WITHOUT_TORCH:
            continue
        early = {id(node) for _, node in imports(tree, top=True)}
        late += [
            (name, found)
            for found, node in imports(tree)
            if id(node) not in early and found.split(".")[0] not in OPTIONAL
        ]
    return late


def test_what_is_imported_late_is_optional_or_argued() -> None:
    late = set(late_imports(modules()))
    assert late - LATE.keys() == set()
    assert LATE.keys() - late == set(), "exemptions that nothing needs"


def orphans(sources: Modules) -> set[str]:
    """Modules that nothing imports."""
    imported = {found for name, tree in sources.items() for found, _ in imports(tree) if found != name}
    packages = {name for name in sources if any(other.startswith(f"{name}.") for other in sources)}
    by_name = set(import_paths(sources.get("minillm")))  # the public names load on first use
    return sources.keys() - imported - packages - by_name - {"minillm.__main__"}


def import_paths(package: ast.Module | None) -> Iterator[str]:
    """Texts of a module that read like dotted names."""
    for node in ast.walk(package) if package else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("minillm."):
            yield node.value


def test_every_module_is_used() -> None:
    assert orphans(modules()) == set()


TWELVE = ", ".join("abcdefghijkl")
BROKEN: list[tuple[Callable[[Modules], Collection[object]], str]] = [
    (size_faults, f"class Hidden:\n    def __init__(self, {TWELVE}): ..."),
    (size_faults, f"async def many({TWELVE}): ..."),
    (size_faults, "def plan():\n" + "    pass\n" * LONGEST_FUNCTION),
    (private_faults, "def reach(thing): return thing._secret"),
    (private_faults, "from minillm.models import load\nload._check_loaded"),
    (private_faults, "from minillm.models.load import _check_loaded"),
    (private_faults, "def reach(thing): thing._secret = 1"),
    (late_imports, "def late():\n    from transformers import AutoConfig"),
    (late_imports, "async def late():\n    import rich"),
    (orphans, "alone = True"),
]


@pytest.mark.parametrize(("rule", "text"), BROKEN, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(BROKEN)])
def test_a_rule_notices(rule: Callable[[Modules], Collection[object]], text: str) -> None:
    assert rule({"minillm.models.broken": ast.parse(text)})


def test_a_recipe_is_read_without_torch() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *LIGHT, *WITHOUT_TORCH], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False", done.stderr[-2000:]


def test_files_that_texts_name_are_there() -> None:
    texts = [*ROOT.glob("*.md"), ROOT / "recipes" / "README.md", ROOT / "eval" / "README.md"]
    texts += list((ROOT / "docs").rglob("*.md"))
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
