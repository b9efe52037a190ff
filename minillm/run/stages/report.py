"""Stage `report`: the HTML report, the model cards, and the upload of the student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minillm.run.stages.stage import Stage

if TYPE_CHECKING:
    from minillm.run.context import Run


class Report(Stage):
    name = "report"
    fields = {"push_to_hub": (str | None, None, "A hub id to which the report stage uploads the student.")}
    always_runs = True

    def check_rows(self, run: Run) -> None:
        """The stage reads no rows."""

    def run(self, run: Run) -> None:
        from minillm.run.model_card import push
        from minillm.run.processes import print_progress

        describe(run)
        done = [folder for folder in run.trained().values() if Path(folder).is_dir()]
        if run.recipe.push_to_hub and done:
            address = push(Path(done[-1]), run.recipe.push_to_hub, run.recipe.training.get("hub_token"))
            print_progress(f"  uploaded to {address}")


def describe(run: Run) -> None:
    """Write the report and the model cards from what the run directory holds."""
    from minillm.run.certificate import write_certificate
    from minillm.run.model_card import write_card
    from minillm.run.report import write_run_report

    write_certificate(run)
    write_run_report(run.dir, {example.row: example.text for example in run.heldout_examples})
    for stage, folder in run.trained().items():
        if Path(folder).is_dir():
            write_card(Path(folder), run.recipe, stage)
