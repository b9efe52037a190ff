"""`minillm init FILE`: a commented recipe for your own pair and files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from minillm.commands.app import app
from minillm.errors import InputError


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub id of the large model.", show_default=False)
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the small one, or prune: some layers of the teacher.", show_default=False
        ),
    ] = None,
    train: Annotated[Path | None, typer.Option(help="Training prompts, a JSONL file.", show_default=False)] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Prompts that no stage trains on, a JSONL file.", show_default=False)
    ] = None,
    keep_layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers that a pruned student keeps. Default: five of six.", show_default=False),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=0, help="GPUs to size it for; 0 for a CPU. Default: those of this machine.", show_default=False
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.5, help="GiB of one GPU, or of the machine. Default: detected.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a commented recipe for your own pair and files, sized to this machine.

    What no option says is asked, where there is a terminal.
    """
    if file.exists() and not force:
        raise InputError(f"{file}: is there already; name another file, or --force")
    teacher = _asked("--teacher", "Teacher (folder or hub id of the large model)", teacher)
    student = _asked("--student", "Student (folder or hub id, or prune: some layers of the teacher)", student)
    train = Path(_asked("--train", "Training prompts (JSONL file)", train))
    heldout = Path(_asked("--heldout", "Prompts that no stage trains on (JSONL file)", heldout))
    import torch  # after the questions

    from minillm.run.new_recipe import Wanted, new_recipe
    from minillm.run.plan.machine import machine_for

    given = 0 if gpus is None and not torch.cuda.is_available() else gpus
    machine, _ = machine_for(given, None if memory is None else int(memory * 2**30))
    text, size = new_recipe(Wanted(file, teacher, student, train, heldout, keep_layers), machine)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {file}. {size}\n\nThen:\n  minillm check {file}\n  {_launch(machine.processes)} run {file}")


def _asked(option: str, question: str, given: str | Path | None) -> str:
    """The value of an option, or the answer to its question."""
    if given is not None:
        return str(given)
    if not sys.stdin.isatty():
        raise InputError(f"{option}: needed, and not given (there is no terminal to ask on)")
    return str(typer.prompt(question))


def _launch(processes: int) -> str:
    return "minillm" if processes == 1 else f"accelerate launch --num_processes {processes} -m minillm"
