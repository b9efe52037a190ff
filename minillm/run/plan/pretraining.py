"""What the stages `logits` and `pretrain` cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minillm.run.plan import memory, work
from minillm.run.plan.phase import Phase
from minillm.run.plan.teachers import scoring_flops
from minillm.run.plan.work import StageTraining

if TYPE_CHECKING:
    from minillm.run.plan.phases import Planner
    from minillm.run.recipe import Recipe

_DRAWING_ROWS, _DRAWING_COPIES = 128, 8  # positions drawn at once, and what the sampler keeps of each in float64


def bytes_per_token(recipe: Recipe) -> float:
    """Bytes on disk of one position of the store: ids, entropy and counts, and weights for about half of the tokens."""
    sampler, vocabulary = recipe.logits.sampler, work.vocabulary(recipe)
    each = 2 if vocabulary <= 1 << 16 else 3
    own = sampler.tokens / 2 + 1 if sampler.method == "threshold" else sampler.tokens
    return 4 + sampler.tokens * each + 2 * own


def logits_phases(planner: Planner) -> list[Phase]:
    """The phase in which the teacher reads the text, in every process a part; its name says the size of the store."""
    recipe, machine, block = planner.recipe, planner.machine, planner.recipe.pretrain.block
    training = StageTraining(recipe, machine, "pretrain")
    blocks = work.text_blocks(recipe)
    if recipe.pretrain.training.get("max_steps", -1) > 0 and recipe.data.text and recipe.data.text.file is None:
        blocks = training.updates * training.responses_per_update
    tokens, itemsize = blocks * block * recipe.logits.draws, machine.itemsize
    drawing = _DRAWING_ROWS * _DRAWING_COPIES * work.vocabulary(recipe) * 8
    parts = {
        "process": memory.PROCESS,
        "teacher": planner.teachers.whole_weights(itemsize),
        "samples": drawing + 64 * block * recipe.logits.sampler.tokens * 16,
    }
    flops = tokens / block * planner.teachers.forward_flops(1, block - 1)
    size = tokens * bytes_per_token(recipe)
    name = f"logits ({size / 1e9:.1f} GB on disk)" if size > 1e9 else f"logits ({size / 1e6:.0f} MB on disk)"
    return [Phase(name, parts, flops, machine.seconds(flops, itemsize))]


def pretrain_phases(planner: Planner) -> list[Phase]:
    """The phase of the pretrain stage: with a store, or without a share of the teacher, no teacher is in it."""
    recipe, machine, block = planner.recipe, planner.machine, planner.recipe.pretrain.block
    training = StageTraining(recipe, machine, "pretrain")
    model, micro = planner.student, training.micro_batch_size * block
    live = recipe.pretrain.alpha.value > 0 and "logits" not in recipe.stages
    parts = {
        "process": memory.PROCESS,
        **memory.trained_weights(training, model),
        "activations": memory.activations(training, model, block),
        "head": memory.scoring_head(model, micro, training.itemsize, with_teacher=live, gpu=machine.gpu),
    }
    flops = planner.text_flops(training, model, block, planner.teachers.hidden if live else None)
    if live:
        parts |= planner.teachers.memory(machine, training.itemsize)
        parts["teacher's hidden states"] = micro * planner.teachers.widest.hidden * training.itemsize
        flops += planner.teachers.states_flops(1, block - 1)
    flops *= training.responses_per_update * training.updates
    if recipe.data.heldout_text is not None:
        scored = scoring_flops(model, 1, block - 1) + (planner.teachers.forward_flops(1, block - 1) if live else 0)
        flops += training.validations * recipe.data.heldout_blocks * scored
    scoring = planner.teachers.widest if live else None
    layers = training.updates * work.layers_per_update(training, model, scoring)
    return [Phase("pretrain", parts, flops, machine.training_seconds(flops, training.itemsize, layers))]
