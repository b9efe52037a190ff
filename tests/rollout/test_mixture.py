"""The draw from the mixture by itself: frequencies, numbers, edges."""

from __future__ import annotations

import pytest
import torch

from minillm.data.sampling import Sampling
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.mixture import sample_mixture, uniform_numbers
from minillm.teacher.local import LocalTeacher
from tests.rollout.common import chi_square_holds, enumerate_mixture
