"""The page of commands, from the functions that typer makes them of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from generate.keys import type_text
from generate.presets import shown
from minillm.cli import app


@dataclass(frozen=True)
class Parameter:
    """An argument or an option of a command.

    Attributes:
        name: The parameter of the function.
        written: How it is written: `RECIPE`, or `--stage text`.
        flags: The option's names; empty for an argument.
        takes_value: Whether an option is followed by a value.
        about: What it is for.
        default: Its default, as text.
        required: Whether it must be given.
    """

    name: str
    written: str
    flags: tuple[str, ...]
    takes_value: bool
    about: str
    default: str
    required: bool


def commands() -> dict[str, Callable[..., Any]]:
    """The function of every command, by its name."""
    functions = ((command.name, command.callback) for command in app.registered_commands)
    found = {name or function.__name__: function for name, function in functions if function is not None}
    return dict(sorted(found.items()))


def parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    """The arguments and options of a command, in their order."""
    hints = get_type_hints(function, include_extras=True)
    for name, one in inspect.signature(function).parameters.items():
        metadata = getattr(hints[name], "__metadata__", ())
        info = next((part for part in metadata if isinstance(part, ArgumentInfo | OptionInfo)), None)
        required = one.default is inspect.Parameter.empty
        empty = required or one.default is None or one.default is False
        default = "" if empty else shown(one.default)
        about = " ".join((getattr(info, "help", None) or "").split())
        if isinstance(info, ArgumentInfo):
            written = info.metavar or name.upper()
            written = written if required or written.startswith("[") else f"[{written}]"
            yield Parameter(name, written, (), False, about, default, required)
            continue
        kind = type_text(hints[name]).removesuffix(" or `null`")
        switch = kind == "true or false"
        dashed = f"--{name.replace('_', '-')}"
        given = tuple(getattr(info, "param_decls", None) or ())
        flags = given or ((dashed, f"--no-{name.replace('_', '-')}") if switch else (dashed,))
        flags = tuple(flag for part in flags for flag in part.split("/"))
        yield Parameter(name, flags[0] if switch else f"{flags[0]} {kind}", flags, not switch, about, default, required)


def commands_page() -> str:
    """What `--help` says of every command, as a page."""
    parts = [
        "# Commands\n\nEvery command with its arguments and options, as `minillm COMMAND --help` prints them. "
        "`minillm --version` prints the versions of the library and of those that results depend on, and `minillm "
        "--install-completion` makes the shell complete commands, options and recipe names. A message that begins with "
        "`error:` says what to mend; `MINILLM_TRACEBACK=1` in the environment shows where it came from.\n"
    ]
    parts += [_entry(name, function) for name, function in commands().items()]
    return "\n".join(parts)


def _entry(name: str, function: Callable[..., Any]) -> str:
    found = list(parameters(function))
    arguments, options = [one for one in found if not one.flags], [one for one in found if one.flags]
    usage = " ".join(["minillm", name, *(["[OPTIONS]"] if options else []), *(one.written for one in arguments)])
    about = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n"))
    text = f"## minillm {name} {{ #{name} }}\n\n```text\n{usage}\n```\n\n{about}\n"
    for title, some in (("argument", arguments), ("option", options)):
        if some:
            rows = [f"| `{_cell(one.written)}` | {_cell(one.about)} | {_code(one.default)} |" for one in some]
            text += f"\n| {title} | meaning | default |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
