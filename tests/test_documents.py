"""The documents are complete: every symbol, key, metric and command has its place, and every link leads somewhere."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import minillm
from minillm import errors
from minillm.distribution import RECIPES
from minillm.evaluation.config import Suite
from minillm.evaluation.metrics import METRICS
from minillm.loss.config import DIVERGENCE_PARAMETERS
from minillm.loss.presets import PRESETS
from minillm.run.experiments.config import Comparison
from minillm.run.recipe import Recipe
from minillm.run.shipped import names
from minillm.run.stages import STAGES
from minillm.train.logged import LOGGED, PHASES
from tests.documents import ROOT, WRITTEN, page
from tests.test_architecture import sections

SCHEMAS = {"recipe": Recipe, "suite": Suite, "comparison": Comparison}


def schema_keys(schema: dict[str, object]) -> Iterator[str]:
    """The names of all keys in a shipped JSON schema, whatever section they are in."""
    for name, value in schema.items():
        if name == "properties" and isinstance(value, dict):
            yield from value
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from schema_keys(part)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_key_is_on_a_page(kind: str) -> None:
    text = page(f"reference/{kind}.md")
    for section in {*sections(SCHEMAS[kind])}:
        for name, field in section.model_fields.items():
            about = " ".join((field.description or "").split())
            assert about in text, f"{section.__name__}.{name}: {about}"
            assert re.search(rf"`(?:[\w.]+\.)?{name}`", text), f"{section.__name__}.{name}"


def test_the_schemas_keys_are_on_the_page_of_recipes() -> None:
    """The shipped schema is made in another way: it also names the training arguments."""
    text = page("reference/recipe.md")
    shipped = json.loads((RECIPES / "schemas" / "recipe.json").read_text(encoding="utf-8"))
    lost = {key for key in schema_keys(shipped) if not re.search(rf"`(?:[\w.]+\.)?{key}`", text)} - {"extends"}
    assert not lost


def test_every_preset_has_a_page_that_shows_its_settings() -> None:
    from generate.presets import with_tables

    pages = {file: file.read_text(encoding="utf-8") for file in (ROOT / "docs/concepts/methods").glob("*.md")}
    for name, settings in PRESETS.items():
        (text,) = [with_tables(text) for text in pages.values() if f"<!-- preset: {name} -->" in text] or [""]
        named = [other for other in pages.values() if f"`{name}`" in other]
        assert text or named, name
        assert all(f"objective.{key}" in text for key in settings), name


def test_every_method_page_says_what_readers_ask() -> None:
    for file in (ROOT / "docs/concepts/methods").glob("*.md"):
        text = file.read_text(encoding="utf-8")
        if file.name != "index.md":
            assert "```text\n" in text, f"{file.name}: no equation"
            assert "## When" in text, file.name
            assert "## Evidence" in text, file.name
            assert f"]({file.name})" in (file.parent / "index.md").read_text(encoding="utf-8"), file.name


def test_every_metric_divergence_and_stage_is_on_a_page() -> None:
    metrics, divergences, stages = (page(f"reference/{name}.md") for name in ("metrics", "divergences", "stages"))
    for metric in METRICS:
        assert f"## {metric.key} " in metrics
        assert metric.about in metrics
    for name in DIVERGENCE_PARAMETERS:
        about = divergences.partition(f"## {name} {{")[2].partition("Parameters: ")[0]
        assert re.search("[=Σ‖]", about), f"{name}: no equation"
    for stage in STAGES:
        assert f"| `{stage.name}` |" in stages


def test_every_command_is_on_the_page_as_its_help_says() -> None:
    """The help that a terminal prints is made by typer, and the page by ours."""
    text = page("reference/commands.md")
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    listed = re.findall(r"^│ ([a-z]+)\s{2,}", done.stdout.partition("Commands")[2], re.M)
    assert len(listed) >= 13
    assert re.findall(r"^## minillm (\w+)", text, re.M) == sorted(listed)


def test_a_commands_options_are_those_of_its_help() -> None:
    from generate.commands import commands, parameters

    text = page("reference/commands.md")
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "plan", "--help"],
        capture_output=True, text=True, cwd=ROOT, check=True, env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    flags = set(re.findall(r"--[a-z-]+", done.stdout)) - {"--help"}
    written = {flag for one in parameters(commands()["plan"]) for flag in one.flags}
    assert {flag for flag in flags if f"--{flag.removeprefix('--no-')}" in written} | {"--gpus"} <= written
    assert {flag for flag in written if not flag.startswith("--no-")} <= flags
    assert all(f"`{flag}" in text for flag in written if not flag.startswith("--no-"))


def test_every_argument_and_option_is_described() -> None:
    from generate.commands import commands, parameters

    bare = {
        f"{name} {one.written}" for name, command in commands().items() for one in parameters(command) if not one.about
    }
    assert bare == set()


def test_every_public_symbol_is_on_a_page_and_documented() -> None:
    text = page("reference/python.md")
    for name in minillm.__all__:
        assert f".{name}\n" in text
        assert (getattr(minillm, name).__doc__ or "").strip()
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.MinillmError):
            assert f"::: minillm.errors.{name}\n" in text


def test_every_shipped_recipe_is_on_a_page() -> None:
    text = page("reference/recipes.md")
    assert [name for name in names() if f"\n## {name} {{" not in text] == []


def metrics_in_the_source() -> tuple[set[str], set[str]]:
    """Names that are logged, and phases that are timed, as literals in the source."""
    logged, phases = set(), set()
    for path in (ROOT / "minillm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if node.func.attr == "add" and ast.unparse(node.func.value).endswith("tally"):
                logged |= {keyword.arg for keyword in node.keywords if keyword.arg}
            elif node.func.attr == "add_mean" and isinstance(first, str):
                logged.add(first)
            elif node.func.attr in ("phase", "add_seconds") and isinstance(first, str):
                phases.add(first)
    return logged, phases


def test_every_logged_number_is_explained() -> None:
    logged, phases = metrics_in_the_source()
    sums = {"tokens", "text_tokens", "advantage_squared", "log_ratio"}  # which other numbers are made of
    assert len(logged) > 15
    assert logged - sums <= LOGGED.keys()
    assert phases == PHASES.keys()
    plotted = {key for stage in STAGES for _, labels in stage.curves for key in labels}
    assert plotted <= LOGGED.keys()
    text = page("reference/training-log.md")
    for name, one in LOGGED.items():
        assert f"## {name} {{" in text
        assert one.unit, name
        assert min(len(part) for part in (one.meaning, one.expected, one.otherwise)) > 3, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    text = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "recipes/README.md", "eval/README.md"])
def test_links_of_files_outside_the_site_lead_somewhere(name: str) -> None:
    """The site's own links are checked when it is built."""
    file = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (file.parent / path).resolve() if path else file
        assert found.exists(), target
        if anchor:
            text = found.read_text(encoding="utf-8")
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}, target


def test_every_page_is_in_the_navigation() -> None:
    from generate.include import INCLUDED
    from generate.pages import generated_pages

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"])))
    written = {str(file.relative_to(ROOT / "docs")) for file in WRITTEN if file.is_relative_to(ROOT / "docs")}
    assert listed == written | generated_pages().keys() | set(INCLUDED.values())


class Loads(HTMLParser):
    """Addresses that a page loads, as opposed to those that it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe") or (tag == "link" and given.get("rel") != "canonical"):
            self.found += [value for key in ("src", "href") if (value := given.get(key))]


@pytest.mark.full
def test_the_site_is_built_without_a_warning_and_loads_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    for file in pages:
        loads = Loads()
        loads.feed(file.read_text(encoding="utf-8"))
        assert [address for address in loads.found if "://" in address or address.startswith("//")] == [], file
    keys = (tmp_path / "reference" / "recipe.html").read_text(encoding="utf-8")
    assert 'id="objective.discount"' in keys
    python = (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
    assert 'id="minillm.train.on_policy.MiniLLMTrainer"' in python
