"""What a recipe takes before it is launched: memory of each phase in one process, operations, hours. No weights are read.

- `machine`: what it is launched on, and how fast that is.
- `work`: rows, tokens and updates of its stages.
- `memory`: bytes by what they are for.
- `phases`: the plan, from which each stage takes its phases.
- `fit`: settings that make a recipe fit.
- `text`: what the command prints.
"""

from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.plan.fit import advice, fewest, fitted
from minillm.run.plan.machine import Machine, machine_for
from minillm.run.plan.phases import Phase, Plan, plan
from minillm.run.plan.text import fit_report, plan_report, summary, table, table_report
from minillm.run.plan.work import update_responses, why_refused

__all__ = [
    "GIB",
    "Machine",
    "Phase",
    "Plan",
    "advice",
    "fewest",
    "fit_report",
    "fitted",
    "machine_for",
    "plan",
    "plan_report",
    "summary",
    "table",
    "table_report",
    "update_responses",
    "why_refused",
]
