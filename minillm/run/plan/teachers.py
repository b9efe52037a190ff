"""The teacher of a recipe in its plan, or several: their memory, and their operations per response."""

from __future__ import annotations

from minillm.models.shape import Shape, shape_of
from minillm.run.plan.machine import Machine
from minillm.run.plan.memory import Parts, frozen_weights
from minillm.run.recipe import Recipe
from minillm.teacher.config import TeacherConfig, teacher_label


def scoring_flops(model: Shape, prompt: float, response: float) -> float:
    """Operations of one forward over a prompt and a response of so many tokens, with logits for the response only."""
    return model.dimensions.forward([prompt + response]) + model.dimensions.head(response)


class Teachers:
    """The teachers of a recipe. Several are taken to answer and score equally many responses.

    Args:
        recipe: the recipe.

    Attributes:
        by_label: the settings and the sizes of each teacher, by what phases call it: `teacher`, or `teacher NAME`.
        first: the sizes of the first teacher, from which a student is pruned.
        widest: the sizes of the one with the widest hidden states.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.by_label: dict[str, tuple[TeacherConfig, Shape]] = {
            teacher_label(name): (each, shape_of(each.source)) for name, each in recipe.teacher.by_name.items()
        }
        shapes = [shape for _, shape in self.by_label.values()]
        self.first, self.widest = shapes[0], max(shapes, key=lambda shape: shape.hidden)

    def __len__(self) -> int:
        """How many teachers there are."""
        return len(self.by_label)

    @property
    def hidden(self) -> float:
        """Size of the hidden states, the mean over the teachers."""
        return sum(shape.hidden for _, shape in self.by_label.values()) / len(self)

    def head_flops(self, tokens: float) -> float:
        """Operations of one product of an output head, the mean over the teachers."""
        return sum(shape.dimensions.head(tokens) for _, shape in self.by_label.values()) / len(self)

    def states_flops(self, prompt: float, response: float) -> float:
        """Operations of this run for the hidden states of a response: none of a teacher that is served."""
        local = [shape for each, shape in self.by_label.values() if not each.servers]
        return sum(shape.dimensions.forward([prompt + response]) for shape in local) / len(self)

    def forward_flops(self, prompt: float, response: float) -> float:
        """Operations for the scores of a response where the teachers are in a process, the mean over the teachers."""
        return sum(scoring_flops(shape, prompt, response) for _, shape in self.by_label.values()) / len(self)

    def scoring_flops(self, prompt: float, response: float) -> float:
        """Operations of this run for the scores of a response: the head's of a teacher that is served."""
        return self.states_flops(prompt, response) + self.head_flops(response)

    def whole_weights(self, itemsize: int) -> float:
        """Bytes of all teachers where they are loaded whole, wherever they are served."""
        return sum(frozen_weights(shape, itemsize, each.quantization) for each, shape in self.by_label.values())

    def memory(self, machine: Machine, itemsize: int) -> Parts:
        """Memory of all teachers in the warmup and minillm stages, which shard a teacher where the recipe says so.

        Of one that is served, the head alone is held here. Servers that return log-probabilities leave even that away;
        which kind they are is not known before a run.

        Args:
            machine: the machine that the recipe is planned for.
            itemsize: bytes of a weight that is not quantised.

        Returns:
            Bytes in one process.
        """
        parts: Parts = {}
        for each, shape in self.by_label.values():
            if each.servers:
                name, size = "teacher's head", shape.head * itemsize
            else:
                whole = frozen_weights(shape, itemsize, each.quantization)
                name, size = "teacher", whole / machine.processes if each.shard else whole
            parts[name] = parts.get(name, 0) + size
        return parts
