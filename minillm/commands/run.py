"""`minillm run` and `minillm evaluate`: the stages of a recipe, a comparison, a suite of test sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from minillm.capture import keep_log, opened
from minillm.commands.app import AsJson, Overrides, Quiet, RecipePath, Verbose, app, shown_as
from minillm.errors import InputError
from minillm.terminal import Mode, Terminal


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Run only this stage, e.g. evaluate, or several: warmup,minillm.", show_default=False),
    ] = None,
    redo: Annotated[
        bool,
        typer.Option(
            help="Make the stages that --stage names again, even if they are finished or were made with other "
            "settings. It refuses to throw away the work of a stage that is not named."
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe's stages; finished ones are skipped, an interrupted one continues.

    What libraries print is kept in RUN_DIR/logs/run.log. Several processes: accelerate launch -m minillm run RECIPE
    """
    from minillm.run.recipe_file import is_comparison, load_recipe
    from minillm.run.stages import stage_named

    mode = shown_as(quiet, as_json)
    if is_comparison(recipe):
        _compare(recipe, overrides or [], mode, verbose)
        return
    try:
        stages = [stage_named(name.strip()).name for name in stage.split(",")] if stage is not None else None
    except InputError as error:
        raise InputError(f"--stage {error}") from None
    with opened(mode, all_lines=verbose) as terminal:
        loaded = load_recipe(recipe, overrides or [])
        from minillm.run.processes import rank
        from minillm.run.results import show_results  # after the recipe, which is read without torch
        from minillm.run.runner import run_recipe
        from minillm.run.stages.report import describe

        done = run_recipe(loaded, stages, redo)
        if rank() == 0:
            if stages is not None and "evaluate" in stages and "report" not in stages:
                describe(done)  # the report and the cards that are there describe other answers
            if not terminal.part:
                show_results(done.dir)


@app.command()
def evaluate(
    file: Annotated[
        Path, typer.Argument(help="A suite of test sets, e.g. eval/local.yaml, or a recipe.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[model=FOLDER]... [key=value]...",
            help="A suite's models (model=NAME:FOLDER names one; others are compared with the first), and settings.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Answer prompts with several models and score the answers: a suite's sets, or a recipe's held-out prompts."""
    from minillm.run.recipe_file import is_suite, load_suite

    if not is_suite(file):
        run(file, overrides, stage="evaluate", quiet=quiet, as_json=as_json, verbose=verbose)
        return
    from minillm.evaluation.config import named_models

    given, mode = overrides or [], shown_as(quiet, as_json)
    models = named_models([text.removeprefix("model=") for text in given if text.startswith("model=")])
    suite = load_suite(file, [text for text in given if not text.startswith("model=")])
    with opened(mode, all_lines=verbose):
        from minillm.evaluation.report.suite import write_suite_report  # after the arguments, read without torch
        from minillm.evaluation.suite import run_suite

        keep_log(suite.out / "evaluate.log")
        results = run_suite(suite, models)
        files = [write_suite_report(suite.out), suite.out / "results.json"]
    from minillm.evaluation.report.console import show_suite

    _finish(mode, results, files, lambda: show_suite(results))


def _compare(file: Path, overrides: list[str], mode: Mode, verbose: bool) -> None:
    from minillm.run.recipe_file import load_comparison

    comparison = load_comparison(file, overrides)
    out = Path(comparison.recipe["run_dir"])
    with opened(mode, all_lines=verbose):
        from minillm.evaluation.report.suite import write_suite_report  # after the settings, read without torch
        from minillm.run.experiments.compare import compare

        results = compare(comparison)
        files = [out / "compare.json", out / "report.html", write_suite_report(out / "tests")]
    from minillm.evaluation.report.console import show_pairs, show_suite

    def show() -> None:
        show_suite(results["tests"])
        show_pairs(results["differences"])

    _finish(mode, results["tests"], files, show)


def _finish(mode: Mode, results: dict[str, Any], files: list[Path], show: Callable[[], None]) -> None:
    """Show results of a suite or a comparison, and where they are."""
    terminal = Terminal(mode)
    if mode == "plain":
        show()
    terminal.end(f"Results: {', '.join(map(str, files))}")
    terminal.event("run", status="finished", files=files, models=results["models"], differences=results["differences"])
