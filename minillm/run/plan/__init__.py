"""An estimate of the memory and time that a recipe takes, before it is launched. No weights are read.

- `machine`: the hardware that a recipe is planned for, and its speed.
- `work`: rows, tokens and weight updates of the stages.
- `memory`: bytes by purpose.
- `phase`: what a plan consists of.
- `phases`: the plan; each stage takes its phases from there, and those of the minillm stage take `rollouts`.
- `network`: bytes from machine to machine; `growth`: the time of an update as machines are added.
- `fit`: settings that make a recipe fit.
- `text`, with `network_text`: the text that the command prints.
"""

from minillm.run.plan.fit import advice, fewest_gpus, fit_recipe
from minillm.run.plan.machine import Machine, machine_for
from minillm.run.plan.phase import Phase, Plan
from minillm.run.plan.phases import plan
from minillm.run.plan.text import fit_report, plan_report, summary, table, table_report
from minillm.run.plan.work import Lengths, StageTraining, why_refused

__all__ = [
    "Lengths",
    "Machine",
    "Phase",
    "Plan",
    "StageTraining",
    "advice",
    "fewest_gpus",
    "fit_recipe",
    "fit_report",
    "machine_for",
    "plan",
    "plan_report",
    "summary",
    "table",
    "table_report",
    "why_refused",
]
