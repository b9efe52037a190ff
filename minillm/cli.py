"""The command line: parse, call, print."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from minillm.capture import WithoutNoise
from minillm.commands import check, init, recipes, schema, show, verify
from minillm.commands.app import Overrides, app
from minillm.commands.run import evaluate, run
from minillm.errors import InputError, Interrupted, MinillmError
from minillm.redaction import Redacting, redacted_text

__all__ = [
    "app",
    "check",
    "evaluate",
    "init",
    "main",
    "recipes",
    "run",
    "schema",
    "show",
    "verify",
]  # commands register themselves when they are imported

# Options of `minillm plan`.
Gpus = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Number of GPUs, with one process on each; 0 plans for this machine's CPU. Default: the GPUs of this "
        "machine, or 8 if it has none.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory of one GPU (with --gpus 0, of the machine), such as 80GiB. Default: detected, or 80GiB if this "
        "machine has no GPU.",
        show_default=False,
    ),
]
Flops = Annotated[
    float | None,
    typer.Option(
        help="Operations per second of one GPU in bfloat16. Default: the maker's number for the GPU of this machine, "
        "or that of an H100. The speed of a CPU is measured.",
        show_default=False,
    ),
]
Utilisation = Annotated[
    float | None,
    typer.Option(
        help="Share of --flops that is reached (model FLOPs utilisation). Default: 0.35, or 0.6 of a CPU.",
        show_default=False,
    ),
]
Nodes = Annotated[
    int,
    typer.Option(min=1, help="Number of machines that the GPUs are on, as many on each; --gpus counts all of them."),
]
Link = Annotated[
    float | None,
    typer.Option(
        help="What one machine sends to the others in a second, in GB (100 Gbit/s are 12.5), and receives at once. "
        "Default: 12.5.",
        show_default=False,
    ),
]

Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


CardName = Annotated[
    str | None,
    typer.Option(
        help="Plan for a GPU of this name, such as RTX 4090, by its maker's numbers, and not for those of this "
        "machine. One, unless --gpus says another number.",
        show_default=False,
    ),
]


def _show_versions(wanted: bool) -> None:
    if wanted:
        from minillm.distribution import versions

        typer.echo("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_versions, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Distil a large language model into a small one on the student's own samples (MiniLLM)."""


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A model folder, e.g. runs/quickstart/student.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="Instructions, one or several.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts: JSON lines, or .txt, one a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here instead of printing.")] = None,
    template: Annotated[str, typer.Option(help="chat, alpaca or plain.")] = "chat",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.01, help="Temperature of the sampling.")] = 1.0,
    seed: Seed = 0,
) -> None:
    """Sample an answer to each prompt."""
    _check_template(template)
    from minillm.data.files import write_jsonl  # after the arguments, which are read without torch
    from minillm.run.answering import examples_of, generate_answers

    examples = examples_of(prompt or [], prompts)
    answers = generate_answers(model, examples, template, max_new_tokens, temperature, seed)
    if out is not None:
        write_jsonl(out, answers)
        typer.echo(f"wrote {out}")
        return
    for found in answers:
        typer.echo(f"> {found['prompt']}\n{found['answer']}\n" if len(answers) > 1 else found["answer"])


@app.command()
def chat(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub ids; several are shown side by side.")],
    system: Annotated[str | None, typer.Option(help="A system message.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to one model, or to several at once; their tokenizers need a chat template."""
    from minillm.run.talk import chat, talkers

    chat(talkers(models, max_new_tokens=max_new_tokens, temperature=temperature, system=system), seed=seed)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    second: Annotated[str, typer.Argument(help="The model that is compared with it.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines, with the rows that recipes read.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of answers and results.")] = Path("runs/compare"),
    template: Annotated[str, typer.Option(help="chat, alpaca or plain.")] = "chat",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seeds: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.", show_default=False)] = None,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
) -> None:
    """Have two models answer the same prompts: their answers, and the paired difference with a 95 % interval."""
    _check_template(template)
    if engine not in ("auto", "vllm", "transformers"):
        raise InputError(f"--engine {engine}: allowed: auto, vllm, transformers")
    from minillm.evaluation.config import named_models
    from minillm.evaluation.report.console import show_files, show_two_models
    from minillm.evaluation.report.suite import write_suite_report
    from minillm.evaluation.two_models import compare_models, suite_of

    models = named_models([first, second] if Path(first).name != Path(second).name else [f"A:{first}", f"B:{second}"])
    given = {
        "template": template,
        "max_new_tokens": max_new_tokens,
        "seeds": list(range(1, seeds + 1)),
        "engine": engine,
    }
    suite = suite_of(prompts, out, limit, **given)
    show_two_models(compare_models(models, suite))
    show_files(write_suite_report(out), out / "compared.json")


def _check_template(template: str) -> None:
    if template not in ("chat", "alpaca", "plain"):
        raise InputError(f"--template {template}: allowed: chat, alpaca, plain")


@app.command()
def plan(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A recipe; or a folder, for a table of all recipes below it.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    gpus: Gpus = None,
    memory: Memory = None,
    shard: Annotated[bool, typer.Option(help="Shard the student over the processes (FSDP2, ZeRO-3).")] = False,
    flops: Flops = None,
    utilisation: Utilisation = None,
    nodes: Nodes = 1,
    link: Link = None,
    card: CardName = None,
    fit: Annotated[
        Path | None, typer.Option(help="Write a recipe here that extends this one and fits.", show_default=False)
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            help="First measure this machine (the GPU, or with --gpus 0 or without a GPU the CPU), in less than two "
            "minutes, for this plan and later ones. The recipe may be left out."
        ),
    ] = False,
) -> None:
    """Estimate memory and time of a recipe before it is launched; no weights are read."""
    size = None if memory is None else _bytes(memory)
    if link is not None and not 0 < link < math.inf:
        raise InputError(f"--link {link:g}: a number of GB in a second above 0 is needed")
    if calibrate:
        _calibrate(gpus)
    if recipe is None:
        if not calibrate:
            raise InputError("a recipe is needed, or a folder of recipes (without one, plan only takes --calibrate)")
        return
    from minillm.run.recipe_file import load_recipe

    def overridden(file: Path, changes: list[str]) -> Any:
        return load_recipe(file, [*(overrides or []), *changes])

    loaded = None if recipe.is_dir() else overridden(recipe, [])
    from minillm.run.plan import fit_report, machine_for, plan_report, table_report  # they import torch

    machine, source = machine_for(gpus, size, flops, utilisation, shard, nodes, link and link * 1e9, card)
    if loaded is None:
        typer.echo(table_report(recipe, machine, lambda file: overridden(file, [])), nl=False)
        return
    change = partial(overridden, recipe)
    if fit is None:
        typer.echo(plan_report(loaded, machine, source, change))
        return
    text, found = fit_report(loaded, machine, source, change)
    typer.echo(text)
    if not found.fits:
        typer.echo(f"no settings make it fit: {fit} is not written")
        raise typer.Exit(1)
    _write_fit(fit, recipe, [*(overrides or []), *found.overrides])


def _calibrate(gpus: int | None) -> None:
    """Measure the GPU of this machine, or its CPU if there is none or if the plan is for it."""
    import torch

    from minillm.run.plan.calibrate import calibrate

    typer.echo(calibrate(gpu=gpus != 0 and torch.cuda.is_available()))


def _write_fit(fit: Path, recipe: Path, overrides: list[str]) -> None:
    """Write a recipe that extends another one with some overrides."""
    from minillm.run.recipe_file import extending_recipe

    try:
        fit.write_text(extending_recipe(recipe, fit, overrides), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--fit {fit}: cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {fit}")


def _bytes(text: str) -> int:
    """80GiB, 80GB, or a number of GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|)", text.strip())
    if match is None:
        raise InputError(f"--memory {text}: a size such as 80GiB is needed")
    return int(float(match[1]) * (10**9 if match[2] == "GB" else 1 << 30))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run's directory, e.g. runs/quickstart.")]) -> None:
    """Write a run's report.html again from what its directory holds."""
    from minillm.run.report import write_run_report

    typer.echo(f"wrote {write_run_report(run_dir)}")


@app.command()
def watch(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory, e.g. runs/quickstart.")],
    once: Annotated[bool, typer.Option(help="Show the run once, and end.")] = False,
) -> None:
    """Watch a run while it trains, from its directory: progress, curves, alarms, samples. Ctrl-C ends the view only."""
    from minillm.run.watch import watch

    watch(run_dir, once=once)


def main() -> None:
    """Run the command line; a `MinillmError` is printed as one line, every other error keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(WithoutNoise())
        handler.addFilter(Redacting())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except MinillmError as error:
        if os.environ.get("MINILLM_TRACEBACK"):
            raise
        print(f"error: {redacted_text(str(error).strip())}", file=sys.stderr)
        sys.exit(2)
