"""One process and two processes compute the same update: with DDP, and with FSDP2 and a sharded head."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minillm.data.batches import pad
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.in_forward import Scoring, bind_scoring, score
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, TokenScores
from minillm.models.head import TeacherStates, head_of
from minillm.models.weights import plain_weights
from minillm.teacher.local import LocalTeacher
from minillm.teacher.sharded import shard
from tests.conftest import tiny_llama

PROMPTS = [[3, 1, 4], [5], [6, 7], [8, 9, 10, 11]]
RESPONSES = [[5, 1], [6, 7, 8, 9, 10, 11, 12], [4], [13, 0, 0, 14, 1]]
SETTINGS = ScoringSettings(width=32)
OBJECTIVES = {"exact": Objective.exact(), "paper": Objective.paper(), "recommended": Objective.recommended()}


def update(model: Any, teacher: LocalTeacher, objective: Objective, mine: list[int], scale: float) -> float:
    """Backpropagate the loss of the responses `mine`, which are a part of an update over all responses."""
    prompts, responses = [PROMPTS[i] for i in mine], [RESPONSES[i] for i in mine]
    g = torch.Generator().manual_seed(0)
    drawn = [[-4 * torch.rand(len(r), generator=g) for _ in range(3)] for r in RESPONSES]
    old, behaviour, logp = (torch.cat([drawn[i][k] for i in mine]) for k in range(3))
    sampled = SampledTokens(old, torch.maximum(old, behaviour), logp, torch.tensor([len(r) for r in responses]))
    loss_of = OnPolicyLoss(objective, sampled, baseline=-0.4, count=float(sum(map(len, RESPONSES))))
    hidden = torch.cat(teacher.hidden(prompts, responses))
    loss, _ = score(
        model, Scoring(pad(prompts, responses), SETTINGS, TeacherStates(hidden, head_of(teacher.model)), loss_of)
    )
    (loss * scale).backward()
    return float(loss.detach())


def gradients(model: Any) -> dict[str, Tensor]:
    out = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        out[name.removeprefix("module.")] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return out


def adapter_error() -> float:
    """Return the largest difference of merged weights between a LoRA student with and without shards."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    whole: Any = get_peft_model(tiny_llama(1), config)  # pyright: ignore[reportArgumentType]
    sharded = copy.deepcopy(whole)
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    want, got = (dict(plain_weights(model, torch.float32)) for model in (whole, sharded))
    assert want.keys() == got.keys()
    return max(float((got[name] - value).abs().max()) for name, value in want.items())


def gathered_dtypes() -> list[str]:
    """Return the dtypes in which shards of float32 are gathered for an engine that takes bfloat16."""
    model: Any = tiny_llama(1)
    want = dict(plain_weights(model, torch.bfloat16))
    fully_shard(model)
    seen, gather = set[str](), DTensor.full_tensor

    def watched(shard: DTensor, **given: Any) -> Tensor:
        seen.add(str(shard.dtype))
        return gather(shard, **given)

    DTensor.full_tensor = watched  # pyright: ignore[reportAttributeAccessIssue]
    try:
        got = dict(plain_weights(model, torch.bfloat16))
    finally:
        DTensor.full_tensor = gather
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())
    return sorted(seen)


def rounded(teacher: LocalTeacher) -> list[str]:
    """Return which of loss and scores FSDP2 rounds to bfloat16 with the mixed-precision policy of accelerate."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)
    model: Any = bind_scoring(tiny_llama(1))
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    hidden = torch.cat(teacher.hidden(PROMPTS[1:2], RESPONSES[1:2]))

    def loss_fn(part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        return scores.logq.sum(), ScoreGradients(logq=torch.ones_like(scores.logq))

    known = TeacherStates(hidden, head_of(teacher.model))
    loss, scores = score(model, Scoring(pad(PROMPTS[1:2], RESPONSES[1:2]), SETTINGS, known, loss_fn))
    loss.backward()
    found = {"loss": loss.detach(), "logq": scores.logq, "reverse_kl": scores.reverse_kl}
    return [
        name
        for name, value in found.items()
        if value.dtype != torch.float32 or torch.equal(value, value.bfloat16().float())
    ]


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    report: dict[str, Any] = {"world": dist.get_world_size(), "errors": {}}
    teacher = LocalTeacher(tiny_llama(2, layers=3))
    for tied in (True, False):
        student = tiny_llama(1, tied=tied)
        for name, objective in OBJECTIVES.items():
            alone = copy.deepcopy(student)
            update(bind_scoring(alone), teacher, objective, [0, 1, 2, 3], 1.0)
            want = gradients(alone)
            for kind in ("ddp", "fsdp2", "fsdp2, head apart"):
                model: Any = bind_scoring(copy.deepcopy(student))
                if kind == "ddp":
                    model = DistributedDataParallel(model)
                else:
                    for layer in model.model.layers:
                        fully_shard(layer)
                    if "apart" in kind and tied:  # the groups that accelerate makes
                        fully_shard([model.model.norm, model.lm_head, model.model.embed_tokens])
                    elif "apart" in kind:
                        fully_shard(model.lm_head)
                    fully_shard(model)
                    assert all(isinstance(p, DTensor) for p in model.parameters())
                # Both average gradients over processes; two micro-batches accumulate in each.
                for part in ([rank], [rank + 2]):
                    update(model, teacher, objective, part, float(world))
                if kind == "fsdp2":
                    report["sharded"] = list(model.get_output_embeddings().weight.to_local().shape)
                got = gradients(model)
                assert got.keys() == want.keys()
                error = max(float((got[k] - want[k]).norm() / want[k].norm()) for k in want)
                report["errors"][f"{name} {kind} {'tied' if tied else 'untied'}"] = error
    report["adapter"] = adapter_error()
    report["gathered"] = gathered_dtypes()
    report["rounded"] = rounded(teacher)
    prompts, responses = [[PROMPTS[i] for i in (rank, rank + 2)], [RESPONSES[i] for i in (rank, rank + 2)]]
    whole = teacher.hidden(prompts, responses)  # each process has another batch
    sharded = LocalTeacher(shard(tiny_llama(2, layers=3), torch.device("cpu")), batch_size=1)
    assert sharded.sharded
    kinds = {name: isinstance(p, DTensor) for name, p in sharded.model.named_parameters()}
    assert all(kind == (".layers." in name) for name, kind in kinds.items()), kinds
    for _ in range(2):
        got = sharded.hidden(prompts, responses)
        report.setdefault("teacher", []).append(
            max(float((a - b).abs().max()) for a, b in zip(got, whole, strict=True))
        )
    assert head_of(sharded.model).weight.shape == (32, 64)
    if rank == 0:
        Path(folder, "report.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()
    # The wrapped models still hold the process group, whose threads sometimes call std::terminate at the
    # interpreter's exit.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no distributed package")
def test_two_processes_compute_the_gradient_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # with a GPU the shards would be put there
    torch.multiprocessing.spawn(worker, args=(2, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world"] == 2
    assert report["sharded"] == [16, 64]  # half of the head's 32 rows
    assert len(report["errors"]) == 18
    assert max(report["errors"].values()) < 1e-5, report["errors"]
    assert report["adapter"] < 1e-6
    assert report["gathered"] == ["torch.bfloat16"]
    assert not report["rounded"]
    assert max(report["teacher"]) < 1e-5
