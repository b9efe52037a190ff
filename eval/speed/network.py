"""What leaves a machine in each weight update, and how long that takes: measured, beside the prediction of the plan.

    python eval/speed/network.py [--processes 2,4] [--rate 25] [--json]

Each training process, each server and the file server with `run_dir` has a network namespace of its own, and a link of
`--rate` MB/s to the others (Linux, as root; elsewhere this says so and ends). The processes are started as
recipes/accelerate/two-nodes.yaml and fsdp2-two-nodes.yaml say. Models are random and small; the servers stand in for
vLLM (`network_parts.py`). Bytes are those of the interfaces' counters, headers included. Seconds are those of updates
with limited links, less those of updates without a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from namespaces import Count, Network, Unavailable, interruptible
from network_parts import PORT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minillm.models.device import cpu_multiplies_bfloat16, fast_bfloat16, machine
from minillm.run.plan.machine import Machine
from minillm.run.plan.network import Flow, seconds, traffic
from minillm.run.plan.phases import Planner
from minillm.run.plan.work import Lengths, StageTraining
from minillm.run.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SERVERS, TEACHERS = ["server0", "server1"], ["teacher0"]
TOKENS = 32  # of a prompt and of a response, neither of which ends earlier
# A batch of rollouts lasts two updates. The first batch is not measured; three are without limits, and three with them.
WARM, FREE, LIMITED = 2, 6, 6
KINDS = {
    "training": ("gradients", "weights in shards, all-gather"),
    "beginning of a batch": ("weights to the engines", "weights in shards to score", "weights of the teacher's shards"),
    "weights to the servers": ("weights to the servers",),
    "rollouts of the servers": ("requests for rollouts",),
    "states of the served teacher": ("states of",),
}


@dataclass(frozen=True)
class Row:
    """Bytes of one kind in a weight update, over all machines."""

    name: str
    predicted: float
    measured: float


def make_models(folder: Path) -> None:
    """A random student and teacher with a vocabulary of words of three letters, so that ids have five digits."""
    words = ["".join(letters) for letters in product(string.ascii_lowercase, repeat=3)]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="aaa"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    for name, width, layers in (("student", 256, 4), ("teacher", 512, 4)):
        torch.manual_seed(width)
        config = LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=1024,
            tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    rows = [{"instruction": " ".join(draw.choices(words, k=TOKENS))} for _ in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_recipe(folder: Path, processes: int, net: Network | None, served: bool) -> Path:
    """The recipe of a run: with servers, or with everything in the training processes."""
    url = (lambda name: f"http://{net.address(name)}:{PORT}") if net else (lambda name: f"http://{name}:{PORT}")
    servers = {"engine": "server", "servers": [url(name) for name in SERVERS]} if served else {"engine": "transformers"}
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "stages": ["minillm"],
        "data": {
            "train": str(folder / "prompts.jsonl"),
            "heldout": str(folder / "prompts.jsonl"),
            "template": "plain",
            "max_prompt_tokens": TOKENS,
        },
        "teacher": {"source": str(folder / "teacher"), "servers": [url(name) for name in TEACHERS] if served else []},
        "student": {"source": str(folder / "student")},
        "rollout": {"num_rollouts": 8 * processes, "teacher_mix": 0, "max_new_tokens": TOKENS, **servers},
        "training": {
            "max_steps": WARM + FREE + LIMITED,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
            "bf16": fast_bfloat16(),
            "save_steps": 1000,
            "disable_tqdm": True,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


class Measurement:
    """One run in `processes` namespaces."""

    def __init__(self, folder: Path, processes: int, sharded: bool, rate: float) -> None:
        self.folder, self.processes, self.sharded, self.rate = folder, processes, sharded, rate
        self.served = not sharded
        self.nodes = [f"node{number}" for number in range(processes)]
        others = [*SERVERS, *TEACHERS, "files"] if self.served else []
        self.names = [*self.nodes, *others]
        self.counts: list[dict[str, Count]] = []
        self.taken: list[float] = []

    @property
    def name(self) -> str:
        return f"{'FSDP2' if self.sharded else 'DDP, two servers, a served teacher'}, {self.processes} processes"

    def run(self) -> None:
        """Start everything, and read counters and clock after each update."""
        make_models(self.folder)
        with Network(self.names) as net:
            recipe = make_recipe(self.folder, self.processes, net, self.served)
            started = self._start_servers(net) if self.served else []
            launched = [self._launch(net, rank, recipe) for rank in range(self.processes)]
            try:
                for update in range(1, WARM + FREE + LIMITED + 1):
                    self._wait_for(update, launched, net)
                for process in launched:
                    if process.wait(timeout=600):
                        raise self._failure()
            finally:
                for process in (*launched, *started):
                    process.kill()

    def _start(self, net: Network, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        """Start a process on a machine, with its output in a file of its own."""
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "eth0", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                net.inside(name, [sys.executable, *words]), env=environment, stdout=log, stderr=log, cwd=ROOT
            )

    def _start_servers(self, net: Network) -> list[subprocess.Popen[bytes]]:
        files = f"http://{net.address('files')}:{PORT}"
        served = ["-m", "http.server", str(PORT), "--bind", net.address("files"), "--directory", str(self.folder)]
        started = [self._start(net, "files", served)]
        for name in (*SERVERS, *TEACHERS):
            kind = "student" if name in SERVERS else "teacher"
            words = [kind, str(self.folder / kind), net.address(name), files, str(self.folder)]
            started.append(self._start(net, name, [str(HERE / "network_parts.py"), *words]))
        return started

    def _launch(self, net: Network, rank: int, recipe: Path) -> subprocess.Popen[bytes]:
        count = str(self.processes)
        words = [
            "-m", "accelerate.commands.launch",
            "--config_file", f"recipes/accelerate/{'fsdp2-' if self.sharded else ''}two-nodes.yaml",
            "--num_machines", count, "--num_processes", count, "--machine_rank", str(rank),
            "--main_process_ip", net.address("node0"), "--mixed_precision", "bf16" if fast_bfloat16() else "no",
            "--dynamo_backend", "no", str(HERE / "network_parts.py"), "train", str(self.folder), "run", str(recipe),
        ]  # fmt: skip
        return self._start(net, f"node{rank}", words)

    def _wait_for(self, update: int, launched: list[subprocess.Popen[bytes]], net: Network) -> None:
        mark = self.folder / f"update-{update}"
        while not mark.is_file():
            if any(process.poll() is not None for process in launched):
                raise self._failure()
            time.sleep(0.02)
        self.counts.append(net.counts())
        self.taken.append(float(mark.read_text(encoding="utf-8")))
        if update == WARM + FREE:
            net.limit(self.rate)
        mark.unlink()

    def _failure(self) -> RuntimeError:
        ends = [f"{file.name}:\n{file.read_text(errors='replace')[-2500:]}" for file in self.folder.glob("node*.log")]
        return RuntimeError(f"{self.name}: a training process ended\n" + "\n".join(ends))

    def rows(self) -> tuple[list[Row], tuple[float, float]]:
        """Bytes of an update by kind, and the seconds that the network took: predicted and measured."""
        flows, limited = self.predicted()
        sent = [self._by_kind(after, before) for before, after in zip(self.counts, self.counts[1:], strict=False)]
        measured = sent[WARM - 1 :]  # an odd entry belongs to the second update of a batch
        mean = {kind: sum(each[kind] for each in measured) / len(measured) for kind in measured[0]}
        alone = statistics.mean(each["training"] for each in measured[1::2])
        found = {**mean, "training": alone, "beginning of a batch": mean["training"] - alone}
        rows = [Row(kind, _sum(flows, starts), found[kind]) for kind, starts in KINDS.items()]
        rows = [row for row in rows if row.predicted or row.measured > 1e5]
        # Of whole batches, whose two updates are not alike; and their medians, because other work may disturb one.
        pairs = list(zip(self.taken[WARM::2], self.taken[WARM + 1 :: 2], strict=True))
        free, slow = (statistics.median(map(sum, part)) for part in (pairs[: FREE // 2], pairs[FREE // 2 :]))
        return rows, (seconds(flows, limited), (slow - free) / 2)

    def _by_kind(self, after: dict[str, Count], before: dict[str, Count]) -> dict[str, float]:
        """Bytes between two counts. What servers receive comes from training processes, or from the file server."""
        passed = {name: after[name] - before[name] for name in self.names}

        def total(names: list[str]) -> Count:
            return Count(sum(passed[name].sent for name in names), sum(passed[name].received for name in names))

        if not self.served:
            return dict.fromkeys(KINDS, 0.0) | {"training": float(total(self.nodes).sent)}
        servers, teachers, nodes, files = total(SERVERS), total(TEACHERS), total(self.nodes), passed["files"]
        asked = servers.received - files.sent
        return dict.fromkeys(KINDS, 0.0) | {
            "training": float(nodes.sent - asked - teachers.received),
            "weights to the servers": float(files.sent),
            "rollouts of the servers": float(asked + servers.sent - files.received),
            "states of the served teacher": float(teachers.sent + teachers.received),
        }

    def predicted(self) -> tuple[list[Flow], Machine]:
        """The flows of the plan, which is told that every prompt and every response is as long as it may be."""
        recipe = load_recipe(self.folder / "recipe.yaml")
        planned = Machine(
            processes=self.processes, nodes=self.processes, gpu=False, bf16=cpu_multiplies_bfloat16(),
            shard=self.sharded, link=self.rate, vllm=False,
        )  # fmt: skip
        return traffic(
            Planner(recipe, planned, Lengths(TOKENS, TOKENS)), StageTraining(recipe, planned, "minillm")
        ), planned


def _sum(flows: list[Flow], starts: tuple[str, ...]) -> float:
    return sum(flow.total for flow in flows if flow.name.startswith(starts))


def table(found: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""
    lines = ["| run | per weight update | predicted | measured | measured / predicted |", "|---|---|---|---|---|"]
    for each in found:
        for row in each["rows"]:
            ratio = f"{row['measured'] / row['predicted']:.2f}" if row["predicted"] else ""
            sizes = f"{row['predicted'] / 1e6:.2f} MB | {row['measured'] / 1e6:.2f} MB"
            lines.append(f"| {each['name']} | {row['name']} | {sizes} | {ratio} |")
        predicted, measured = each["seconds"]
        ratio = f"{measured / predicted:.2f}"
        lines.append(f"| {each['name']} | seconds on the network | {predicted:.2f} | {measured:.2f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4", help="numbers of training processes")
    parser.add_argument("--rate", type=float, default=25.0, help="MB/s of each link, in each direction")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = []
    for processes, sharded in product(map(int, options.processes.split(",")), (False, True)):
        with tempfile.TemporaryDirectory(prefix="minillm-network-") as folder, interruptible():
            measurement = Measurement(Path(folder), processes, sharded, options.rate * 1e6)
            try:
                measurement.run()
            except Unavailable as reason:
                print(f"nothing is measured: {reason}")
                return
            rows, taken = measurement.rows()
            found.append({"name": measurement.name, "rows": [vars(row) for row in rows], "seconds": taken})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"machine": machine(), "rate": options.rate, "runs": found}) if options.json else table(found))


if __name__ == "__main__":
    main()
