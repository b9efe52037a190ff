"""A calibration: what `minillm plan --calibrate` has measured on a machine, kept for later plans on it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from minillm import __version__
from minillm.data.files import read_json, write_json
from minillm.errors import InputError
from minillm.models.device import processor


@dataclass(frozen=True)
class Measured:
    """What a calibration belongs to. It is used for this device with these versions only.

    Attributes:
        device: Name of the GPU or of the processor.
        threads: Threads that PyTorch computes with on a processor; 0 for a GPU.
        torch: Version of PyTorch.
        minillm: Version of this library.
    """

    device: str
    threads: int
    torch: str
    minillm: str

    @classmethod
    def here(cls, gpu: bool) -> Measured:
        """Describe the first GPU of this machine, or its processor."""
        name, threads = (torch.cuda.get_device_properties(0).name, 0) if gpu else (processor(), torch.get_num_threads())
        return cls(name, threads, torch.__version__, __version__)

    @property
    def file(self) -> Path:
        """The file that a calibration of this is kept in."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return folder() / f"calibration-{digest}.json"

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.device}{threads}, torch {self.torch}, minillm {self.minillm}"


@dataclass(frozen=True)
class Calibration:
    """The measured speed of a machine.

    Attributes:
        flops: Operations per second of matrix products in bfloat16, or in float32 if bfloat16 is emulated.
        float32: Operations per second of matrix products in float32.
        bandwidth: Bytes per second that are read from memory.
        utilisation: The share of `flops` that a small weight update reaches.
        date: The day of the measurement.
    """

    flops: float
    float32: float
    bandwidth: float
    utilisation: float
    date: str

    def save(self, of: Measured) -> Path:
        """Write the calibration to its file, which is replaced as a whole.

        Args:
            of: What it belongs to.

        Returns:
            The file.

        Raises:
            InputError: The file cannot be written.
        """
        try:
            write_json(of.file, {"of": asdict(of), "measured": asdict(self)})
        except OSError as error:
            raise InputError(
                f"{of.file}: the calibration cannot be kept ({error.strerror or error}): set XDG_CACHE_HOME to a "
                "folder that can be written"
            ) from error
        return of.file


def folder() -> Path:
    """Return the folder of calibrations: `minillm` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of this variable asks to ignore relative paths.
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "minillm"


def find_calibration(of: Measured) -> tuple[Calibration | None, str]:
    """Find the calibration of this machine.

    Args:
        of: The machine and the versions.

    Returns:
        The calibration, or None; and what is to be said about files that are not used, empty if there are none.
    """
    found, reason = _read(of.file, of)
    if found is not None:
        return found, ""
    others = sorted(file for file in folder().glob("calibration-*.json") if file != of.file)
    again = "; minillm plan --calibrate measures this machine"
    if reason:
        return None, f"the calibration in {of.file} is not used, because {reason}{again}"
    if others:
        return None, f"the calibration in {others[0]} is not used: it is of another machine or version ({of}){again}"
    return None, ""


def _read(file: Path, of: Measured) -> tuple[Calibration | None, str]:
    """The calibration in a file; if it cannot be used, None and the reason, which is empty if there is no file."""
    try:
        content: Any = read_json(file)
        owner, values = content["of"], content["measured"]
        names = [field.name for field in fields(Calibration)]
        found = Calibration(**{name: values[name] for name in names})
        speeds = [found.flops, found.float32, found.bandwidth, found.utilisation]
        if not all(isinstance(speed, float) and 0 < speed < math.inf for speed in speeds):
            return None, "its numbers are not speeds"
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError):
        return None, "it cannot be read"
    return (found, "") if owner == asdict(of) else (None, "it is of another machine or version")
