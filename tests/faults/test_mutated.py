"""Whatever is in a file: a one-line error for people, or a valid result; never a traceback, and never a hang."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from minillm.data import time_limit
from minillm.data.config import Source
from minillm.data.examples import Example, Prompt, open_texts, read_examples
from minillm.data.files import read_json, write_json, write_jsonl
from minillm.data.templates import render, render_answer
from minillm.errors import MinillmError
from minillm.run import report
from minillm.run.certificate import FILE
from minillm.run.directory import RunState
from minillm.run.progress import JOURNAL
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe
from minillm.run.responses_file import ResponseCheck, open_responses
from minillm.run.results import show_results
from minillm.run.verification import verify
from minillm.run.watch import view
from minillm.train.journal import Journal
from tests.conftest import tiny_tokenizer
from tests.evaluation.test_report import hostile_run
from tests.run.test_run_state import STAGES, finished_run

SECONDS = 30.0
FULL, MOST, RUNS = pytest.mark.full, 10_000, 1_000

PIECES = [
    *("{", "}", "[", "]", ":", ",", '"', "'", "\n", " ", "  ", "\t", "#", "&a ", "*a", "<<: *a", "|", ">", "-", "- "),
    *("!!python/name:os.system", "!!int ", "!!binary ", "null", "~", "true", "1e999", ".nan", ".inf", "-0", "0x1F"),
    *(
        "1" * 400,
        "9" * 5000,
        "NaN",
        "Infinity",
        "\\ud83d",
        "\\u0000",
        "\x00",
        "\ufeff",
        "é",
        "\ud7ff",
        "😀",
        "../",
        "/",
    ),
    *("2001-01-01", "1:2:3", "=", "?", "@", "`", "%", "$(x)", "{{ x }}", "{% for x in y %}", "[" * 300, "{" * 300),
    *("extends: ", "seed: ", "training: ", "teacher: ", "<|im_end|>", "messages", "x" * 300, "--", "..."),
]


@st.composite
def mutated(draw: Callable[..., Any], text: str) -> bytes:
    """A text with a few edits: cut, doubled, replaced, cut short, with pieces and bytes put in."""
    raw = text.encode("utf-8")
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        end = min(start + draw(st.integers(0, 40)), len(raw))
        kind = draw(st.sampled_from(["cut", "double", "piece", "byte", "short", "move"]))
        if kind == "cut":
            raw = raw[:start] + raw[end:]
        elif kind == "double":
            raw = raw[:end] + raw[start:end] + raw[end:]
        elif kind == "piece":
            raw = raw[:start] + draw(st.sampled_from(PIECES)).encode("utf-8", "surrogatepass") + raw[end:]
        elif kind == "byte":
            raw = raw[:start] + bytes([draw(st.integers(0, 255))]) + raw[start + 1 :]
        elif kind == "short":
            raw = raw[:start]
        else:
            raw = raw[:start] + raw[end:] + raw[start:end]
    return raw


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([10**400, "x" * 300, "nan", -1, 0, "", [], {}]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=5), st.sampled_from(["mean", "text", "row", "step"])), inner, max_size=3
        ),
    ),
    max_leaves=4,
)


@st.composite
def changed(draw: Callable[..., Any], value: Any) -> Any:
    """A JSON value in which one part, anywhere, is another value, or is left out."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 9)):
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(changed(value[at])), *value[at + 1 :]]
    return draw(VALUES)


@contextmanager
def for_people() -> Iterator[None]:
    """What comes out of the body is a result, or an error that a person reads."""
    started, said = time.monotonic(), ["a result"]
    try:
        yield
    except MinillmError as error:
        said = str(error).splitlines()
    assert said
    assert all(line.strip() and len(line) < 4000 for line in said), said
    assert time.monotonic() - started < SECONDS, "it hangs"


def many(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], object]) -> None:
    """Try a check with so many values, always the same."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)
    @given(strategy)
    def tried(value: Any) -> None:
        check(value)

    tried()


RECIPE = """\
# yaml-language-server: $schema=x
run_dir: ./run
seed: 3
stages: [student, warmup, minillm]
data: &data {train: ./data.jsonl, heldout: {file: ./data.jsonl, columns: {instruction: prompt}}, max_prompt_tokens: 16}
teacher: {source: t}
student:
  keep_layers: 2
  lora: {rank: 4, targets: [q_proj]}
objective: {preset: recommended, discount: 0.9, divergence: {name: skew_reverse_kl, skew: 0.1}, long_term: 0}
rollout: {engine: transformers, num_rollouts: 4, max_new_tokens: 8, stop: ["w1"], temperature: 1e-1}
evaluate: {seeds: [1, 2], max_new_tokens: 8}
"""


@pytest.mark.parametrize("count", [500, pytest.param(MOST, marks=FULL)])
def test_recipes(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"instruction": "w1"}\n')
    file = tmp_path / "recipe.yaml"

    def check(raw: bytes) -> None:
        file.write_bytes(raw)
        with for_people():
            assert isinstance(load_recipe(file), Recipe)

    check(RECIPE.encode())
    load_recipe(file)
    many(count, mutated(RECIPE), check)


@pytest.mark.parametrize("count", [500, pytest.param(MOST, marks=FULL)])
def test_overrides(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"instruction": "w1"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    names = [
        "seed",
        "data.train",
        "teacher",
        "teacher.source",
        "stages",
        "student.lora",
        "rollout.stop",
        "evaluate",
        "x.y",
    ]

    def check(text: str) -> None:
        with for_people():
            load_recipe(tmp_path / "recipe.yaml", [text])

    values = st.one_of(st.text(max_size=12), st.sampled_from(PIECES), VALUES.map(str), VALUES.map(json.dumps))
    many(count, st.builds("{}={}".format, st.one_of(st.sampled_from(names), st.text(max_size=6)), values), check)


ROWS = """\
{"instruction": "w1 w2", "input": "w3", "output": ["w4", "w5"], "category": "x"}
{"prompt": "w1", "completion": "w2", "history": [["w3", "w4"]], "system": "w5", "teacher": "t"}
{"messages": [{"role": "system", "content": "w0"}, {"role": "user", "content": "w1"}, {"from": "gpt", "value": "w2"}]}
{"text": "w1 w2 w3", "prompt_ids": [2, 3], "response_ids": [4, 1], "row": 0}
"""


@pytest.mark.parametrize("count", [500, pytest.param(MOST, marks=FULL)])
def test_data_files(count: int, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "data.jsonl", tiny_tokenizer()

    def check(raw: bytes) -> None:
        file.write_bytes(raw)
        source = Source(file=file)
        with for_people():
            for example in read_examples(source):
                prompt = Prompt(example, render(example, "chat", tokenizer))
                render_answer(prompt, "chat", tokenizer)
        with for_people():
            assert all(isinstance(row["text"], str) for row in open_texts(source, 0))
        with for_people():
            list(open_responses(file, check=ResponseCheck(32, "teacher", [])))

    for rows in (ROWS, *ROWS.splitlines(keepends=True)):
        check(rows.encode())
        many(count // 5, mutated(rows), check)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}{% if system %}{{ system }}{% endif %}"
    "{{ bos_token }}{{ instruction ~ input }}{% set x = 3 * 4 %}{{ '%d' % x }}"
)
PARTS = [
    *(
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "for x in range(9)",
        "endfor",
        "if",
        "endif",
        "macro f()",
        "| upper",
        "|",
        "~",
    ),
    *(
        "messages",
        "messages[0]",
        ".content",
        "['role']",
        "''.__class__",
        "self",
        "loop",
        "range(99999999)",
        "9**9",
        "*",
    ),
    *("'x' * 9999999", "include 'x'", "import 'x' as y", "raise", "namespace(a=1)", "lipsum()", "cycler()", "1/0", "%"),
]


@pytest.mark.parametrize("count", [500, pytest.param(MOST, marks=FULL)])
def test_templates(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "SECONDS", 2.0)
    tokenizer = tiny_tokenizer()
    example = Example(0, "w1 w2", "w3", ("w4",), (("user", "w1"), ("assistant", "w2"), ("user", "w3")))

    def check(text: str) -> None:
        for template in (text + "{{ x }}", "chat"):
            tokenizer.chat_template = text or "x"
            with for_people():
                assert isinstance(render(example, template, tokenizer), list)

    mixed = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=4)), max_size=8).map(" ".join)
    check(TEMPLATE)
    many(count // 2, st.one_of(mixed, mutated(TEMPLATE).map(lambda raw: raw.decode("utf-8", "replace"))), check)


def whole_run(root: Path) -> Path:
    """The recipe of a run directory that holds every kind of file that is read again."""
    run = hostile_run(root / "run")
    recipe = finished_run(root, STAGES)
    write_jsonl(run / "logs" / "warmup.jsonl", [{"step": 1, "loss": 1.0, "time": 1.0, "max_steps": 3}])
    log = Journal(run / JOURNAL, "minillm")
    log.write("begin", update=0)
    log.write("push", version=0, sent="ab", held="ab", same=True, why="")
    log.write("inputs", models={"teacher": "ab"})
    log.write("skip", update=2, what=["the loss is nan"], batch="x")
    digest = "0" * 64
    certificate = {
        "recipe": {"sha256": digest, "settings": {"seed": 0}},
        "hardware": {"threads": 1, "gpus": [], "processor": "x"},
        "seeds": {"seed": 0, "evaluate": [1]},
        "stages": {"warmup": {"settings": digest, "finished": True}},
        "data": {"train": {"file": str(root / "train.jsonl"), "sha256": digest}},
        "made_files": {"results.json": digest},
        "models": {"teacher": {"source": "t", "why": "not on this machine"}},
        "changed": [],
        "pushes": {"all": 1, "same_on_both_sides": 1, "different": 0, "not_compared": {}},
        "engine_mismatch": {"minillm": 0.1},
        "events": {"skip": 1},
        "versions": {"torch": "1"},
        "code": digest,
        "hashed": {},
    }
    write_json(run / FILE, certificate)
    return recipe


def read_everything(recipe: Path, run: Path) -> None:
    """Read a run directory in all ways that there are."""
    out = io.StringIO()
    with for_people():
        loaded = load_recipe(recipe)
        state = RunState(loaded)
        for stage in STAGES:
            with for_people():
                state.check(stage)
            state.needs(stage, [])
            state.lost_with([stage])
    with for_people():
        Console(file=out).print(view(run))
    with for_people():
        report.write_run_report(run)
    with for_people(), redirect_stdout(out):
        show_results(run)
    with for_people():
        list(verify(run, again=False))


FILES = [
    *("state.json", "results.json", FILE, JOURNAL, "samples.jsonl", "logs/warmup.jsonl", "student/trainer_state.json"),
    *("evaluate/prompts.json", "evaluate/minillm.jsonl"),
]


@st.composite
def broken_file(draw: Callable[..., Any], texts: dict[str, str]) -> tuple[str, bytes]:
    """A file of a run directory, with edits in its text or with another value somewhere in its JSON."""
    name = draw(st.sampled_from(FILES))
    text = texts[name]
    if draw(st.booleans()):
        return name, draw(mutated(text))
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = json.dumps(draw(changed(json.loads(lines[at]))))
        return name, "\n".join(lines).encode()
    return name, json.dumps(draw(changed(json.loads(text)))).encode()


@pytest.mark.parametrize("count", [120, pytest.param(RUNS, marks=FULL)])
def test_run_directories(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(title: str, panels: Any, **_: Any) -> str:
        """Drawing takes most of the time of a report, so the points are only looked at."""
        assert all(isinstance(v, int | float) for _, curves in panels for c in curves.values() for p in c for v in p)
        return title

    monkeypatch.setattr(report, "draw_curves", points)
    recipe = whole_run(tmp_path)
    run = tmp_path / "run"
    texts = {name: (run / name).read_text() for name in FILES}
    read_everything(recipe, run)
    assert view(run)
    assert read_json(run / "results.json")

    def check(broken: tuple[str, bytes]) -> None:
        name, raw = broken
        (run / name).write_bytes(raw)
        try:
            read_everything(recipe, run)
        finally:
            (run / name).write_text(texts[name])

    many(count, broken_file(texts), check)


def test_a_run_directory_without_some_of_its_files(tmp_path: Path) -> None:
    recipe = whole_run(tmp_path)
    run = tmp_path / "run"
    for name in FILES:
        kept = (run / name).read_bytes()
        (run / name).unlink()
        read_everything(recipe, run)
        (run / name).mkdir()
        read_everything(recipe, run)
        shutil.rmtree(run / name)
        (run / name).write_bytes(kept)
