"""What a person can mend is one line; everything else, a bug of ours too, keeps its traceback."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import minillm
from minillm import cli, errors
from minillm.errors import MinillmError, one_line

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_have_one_root(kind: type[Exception]) -> None:
    assert issubclass(kind, MinillmError)


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, RuntimeError, AssertionError, OSError])
def test_a_bug_is_never_shown_as_an_error_of_the_user(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise kind("ours")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(kind, match="ours"):
        cli.main()
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not errors.Interrupted], ids=lambda k: k.__name__)
def test_an_error_for_people_is_one_line_without_secrets(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise kind("http://me:secret@host is not there")

    monkeypatch.setattr(cli, "app", refused)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: http://(hidden)@host is not there\n"


def test_the_command_line_catches_by_type() -> None:
    """Its handlers name the root and Ctrl-C, and nothing wider."""
    tree = ast.parse(Path(cli.__file__).read_text(encoding="utf-8"))
    [main] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "main"]
    caught = [ast.unparse(node.type) for node in ast.walk(main) if isinstance(node, ast.ExceptHandler) and node.type]
    assert caught == ["Interrupted", "MinillmError"]


def test_nothing_is_caught_without_a_type() -> None:
    bare = [
        f"{path.name}:{node.lineno}"
        for path in Path(minillm.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_errors_of_other_libraries_are_cut_to_a_line() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) < 310
