"""What a recipe takes before it is launched: memory of each phase in one process, arithmetic, hours. No weights are read.

`machine`: what it is launched on, and how fast that is. `work`: what its stages read, draw and train on. `memory`: bytes by what they
are for. `phases`: the plan. `fit`: settings that make a recipe fit. `text`: what the command says of it.
"""

from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.plan.fit import advice, fewest, fitted
from minillm.run.plan.machine import Machine, machine_for
from minillm.run.plan.phases import Phase, Plan, plan
from minillm.run.plan.text import summary, table
from minillm.run.plan.work import update_responses, why_refused

__all__ = [
    "GIB", "Machine", "Phase", "Plan", "advice", "fewest", "fitted", "machine_for", "plan", "summary", "table", "update_responses",
    "why_refused",
]  # fmt: skip
