"""The command line: parse, call, print."""

from __future__ import annotations

import logging
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from minillm.errors import InputError, Interrupted, MinillmError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Distil a large language model into a small one on the student's own samples (MiniLLM).",
)

RecipePath = Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/quickstart.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value]...", help="Settings that replace the recipe's, e.g. training.learning_rate=1e-5."
    ),
]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Do this stage alone, e.g. evaluate.", show_default=False)] = None,
    redo: Annotated[
        bool, typer.Option(help="Make it again, and what builds on it, even if finished or made with other settings.")
    ] = False,
) -> None:
    """Run a recipe's stages; finished ones are skipped, an interrupted one continues.

    Several processes: accelerate launch -m minillm run RECIPE
    """
    from minillm.run.recipe_file import is_comparison, load_recipe
    from minillm.run.stages import NAMES

    if is_comparison(recipe):
        _compare(recipe, overrides or [])
        return
    if stage is not None and stage not in NAMES:
        raise InputError(f"--stage {stage}: no such stage; allowed: {', '.join(NAMES)}")
    loaded = load_recipe(recipe, overrides or [])
    from minillm.run.runner import run_recipe  # after the recipe, which is read without torch
    from minillm.run.stages.report import describe

    done = run_recipe(loaded, stage, redo)
    if int(os.environ.get("RANK", 0)) == 0:
        if stage == "evaluate":
            describe(done)  # the report and the cards that are there describe other answers
        _show_results(done.dir)


@app.command()
def evaluate(
    file: Annotated[
        Path, typer.Argument(help="A suite of test sets, e.g. eval/local.yaml, or a recipe.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[model=FOLDER]... [key=value]...",
            help="A suite's models (model=NAME:FOLDER names one; the others are compared with the first), and settings.",
        ),
    ] = None,
) -> None:
    """Answer prompts with several models and score the answers: a suite's sets, or a recipe's held-out prompts."""
    from minillm.run.recipe_file import is_suite, load_suite

    if not is_suite(file):
        run(file, overrides, stage="evaluate")
        return
    from minillm.evaluation.report.suite import write_suite_report
    from minillm.evaluation.suite import run_suite

    given = overrides or []
    models = _models([text.removeprefix("model=") for text in given if text.startswith("model=")])
    suite = load_suite(file, [text for text in given if not text.startswith("model=")])
    results = run_suite(suite, models)
    _show_suite(results)
    _console().print(f"Results: {write_suite_report(suite.out)}, {suite.out / 'results.json'}", soft_wrap=True)


def _compare(file: Path, overrides: list[str]) -> None:
    from minillm.evaluation.report.suite import write_suite_report
    from minillm.run.experiments.compare import compare
    from minillm.run.recipe_file import load_comparison

    comparison = load_comparison(file, overrides)
    results = compare(comparison)
    _show_suite(results["tests"])
    _show_pairs(results["differences"])
    out = comparison.recipe["run_dir"]
    files = [Path(out) / "compare.json", Path(out) / "report.html", write_suite_report(Path(out) / "tests")]
    _console().print(f"Results: {', '.join(map(str, files))}", soft_wrap=True)


def _models(given: list[str]) -> dict[str, str]:
    """Folders of models by name, from texts NAME:FOLDER or FOLDER, which is named after its last part."""
    models: dict[str, str] = {}
    for text in given:
        name, colon, folder = text.partition(":")
        if not colon:
            name, folder = Path(text).name, text
        if not name or not folder or "/" in name:
            raise InputError(f"model={text}: model=FOLDER or model=NAME:FOLDER is needed")
        if name in models:
            raise InputError(f"model={text}: {name} is the name of two models; say model=NAME:FOLDER")
        models[name] = folder
    if not models:
        raise InputError("no model to evaluate: add model=FOLDER, several times if you like")
    return models


def _console() -> Any:
    from rich.console import Console

    return Console()


def _show_suite(results: dict[str, Any]) -> None:
    """Rouge-L of every model on every set, mean ± standard deviation over seeds, and how it compares."""
    from rich.table import Table

    from minillm.evaluation.results import number

    names = [*results["prompts"], "average"]
    spread = "mean ± standard deviation" if len(results["seeds"]) > 1 else "mean"
    table = Table(
        title=f"Rouge-L, {len(results['seeds'])} seeds: {spread}; difference to {results['compared_with']} [95 % interval]"
    )
    for column in ("model", *names):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model, sets in results["models"].items():
        cells = []
        for name in names:
            score, change = sets.get(name, {}).get("rouge_l"), results["differences"].get(model, {}).get(name)
            text = "" if score is None else number(score["mean"])
            if score is not None and score["spread"] is not None:
                text += f" ± {number(score['spread'])}"
            cells.append(text if change is None else f"{text}\n{_difference(change)}")
        table.add_row(model, *cells)
    _console().print(table)


def _difference(change: dict[str, float]) -> str:
    return f"{change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"


def _show_pairs(differences: dict[str, Any]) -> None:
    """Of every method, all its training seeds together, to each other one."""
    from rich.table import Table

    table = Table(title="Rouge-L on the average of the sets, row − column, over all training seeds [95 % interval]")
    for column in ("method", *differences):
        table.add_column(column, justify="left" if column == "method" else "right")
    for one, found in differences.items():
        cells = [found.get(other) for other in differences]
        table.add_row(one, *("" if x is None else _difference(x).replace(" [", "\n[") for x in cells))
    _console().print(table)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A model folder, e.g. runs/quickstart/student.")],
    prompt: Annotated[str, typer.Argument(help="The instruction.")],
    template: Annotated[str, typer.Option(help="chat, alpaca or plain.")] = "chat",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    seed: int = 0,
) -> None:
    """Sample one answer."""
    from minillm.data.examples import Example
    from minillm.data.templates import render
    from minillm.models.conventions import settle
    from minillm.models.device import device, working_dtype
    from minillm.models.load import load_model, load_tokenizer
    from minillm.rollout.engines.transformers import TransformersEngine

    if template not in ("chat", "alpaca", "plain"):
        raise InputError(f"--template {template}: allowed: chat, alpaca, plain")
    tokenizer = load_tokenizer(model)
    loaded: Any = load_model(model, working_dtype()).to(device())  # pyright: ignore[reportArgumentType]
    sampling = settle(tokenizer, loaded, template=template == "chat").sampling(max_new_tokens, temperature)
    ids = render(Example(0, prompt), template, tokenizer)
    [rollout] = TransformersEngine(loaded).generate([ids], sampling, [seed])
    typer.echo(tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip())


@app.command()
def plan(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe; or a folder, for a table of all recipes below it.", show_default=False)
    ],
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes, a GPU each; 0 is this machine's CPU. Those that are here, else 8.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Of a GPU, or of the machine; that of what is here, else 80GiB.", show_default=False),
    ] = None,
    shard: Annotated[bool, typer.Option(help="With the student in shards (FSDP2, ZeRO-3).")] = False,
    flops: Annotated[
        float | None,
        typer.Option(
            help="Operations a second of a GPU in bfloat16: by its name, else an H100's; of a CPU measured.",
            show_default=False,
        ),
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of them that is reached (MFU): 0.35, of a CPU 0.6.", show_default=False)
    ] = None,
    fit: Annotated[
        Path | None, typer.Option(help="Write a recipe that extends this one and fits.", show_default=False)
    ] = None,
) -> None:
    """Estimate memory and time of a recipe before it is launched; no weights are read."""
    from minillm.run.recipe_file import load_recipe

    def overridden(file: Path, changes: list[str]) -> Any:
        return load_recipe(file, [*(overrides or []), *changes])

    loaded = None if recipe.is_dir() else overridden(recipe, [])
    from minillm.run.plan import fit_report, machine_for, plan_report, table_report  # they import torch

    size = None if memory is None else _bytes(memory)
    machine, source = machine_for(gpus, size, flops, utilisation, shard)
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
    from minillm.run.recipe_file import extending_recipe

    fit.write_text(extending_recipe(recipe, fit, [*(overrides or []), *found.overrides]), encoding="utf-8")
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
    from minillm.evaluation.report.run import write_report

    typer.echo(f"wrote {write_report(run_dir)}")


def _show_results(run_dir: Path) -> None:
    """The table and the verdict, where they still hold, and the files that do."""
    from rich.markup import escape
    from rich.table import Table

    from minillm.evaluation.results import current_files, current_results, with_interval
    from minillm.evaluation.verdict import COLOURS, check_of

    console = _console()
    if results := current_results(run_dir):
        table = Table(
            title=f"{results['prompts']} held-out prompts, {len(results['seeds'])} seeds: mean [95 % interval]"
        )
        for column in ("model", "Rouge-L", "KL(q‖p), nats/token", "finished %", "length, tokens"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for name, scores in results["models"].items():
            table.add_row(
                name, *(with_interval(scores.get(key)) for key in ("rouge_l", "reverse_kl", "finished", "length"))
            )
        console.print(table)
        if found := check_of(results):
            console.print(
                f"[{COLOURS[found['verdict']]}]{escape(found['sentence'])}[/]", soft_wrap=True, highlight=False
            )
    console.print("Results: " + (", ".join(map(str, current_files(run_dir))) or str(run_dir)), soft_wrap=True)


def main() -> None:
    """Run the command line; a `MinillmError` is printed as one line, every other error keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except MinillmError as error:
        if os.environ.get("MINILLM_TRACEBACK"):
            raise
        print(f"error: {str(error).strip()}", file=sys.stderr)
        sys.exit(2)
