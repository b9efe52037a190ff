"""Reads what TensorBoard shows of a folder."""

from __future__ import annotations

from pathlib import Path


def read_events(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, str]]]]:
    """The scalars and the texts of the one event file below a folder: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = folder.rglob("events.out.*")
    found = EventAccumulator(str(file), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    tags = found.Tags()
    scalars = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags["scalars"]}
    texts = {
        tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in found.Tensors(tag)]
        for tag in tags["tensors"]
    }
    return scalars, texts
