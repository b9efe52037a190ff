"""The processes of `network.py`: a training process, and servers that stand in for vLLM.

    python eval/speed/network_parts.py train FOLDER run RECIPE [key=value]...
    python eval/speed/network_parts.py student|teacher MODEL ADDRESS FILES ROOT

A server answers as vLLM does, with as many bytes: the student's samples exactly and takes new weights, which it reads
over the network from the file server at FILES, whose folder is ROOT; the teacher's returns states. A training process
reports each update in a file of FOLDER, and goes on when the file is gone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from minillm.data.sampling import Sampling
from minillm.models.device import working_dtype
from minillm.models.load import load_model
from minillm.rollout.engines.transformers import TransformersEngine

PORT = 8000
STARTED = time.time()


class Reporter(TrainerCallback):
    """Has all processes wait after each update until `network.py` has read the counters."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder
        self._begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait = self._trainer.accelerator.wait_for_everyone
        wait()
        if state.is_world_process_zero:
            mark = self._folder / f"update-{state.global_step}"
            part = mark.with_suffix(".part")
            part.write_text(str(time.monotonic() - self._begun), encoding="utf-8")
            part.replace(mark)
            while mark.exists():
                time.sleep(0.02)
        wait()
        self._begun = time.monotonic()


def train(folder: Path, words: list[str]) -> None:
    """Run a recipe with a `Reporter`."""
    from minillm.cli import main
    from minillm.train import resume
    from tests.train.two_processes import shard_on_cpus

    original = resume.train

    def reporting(trainer: Any, *given: Any, **others: Any) -> None:
        trainer.add_callback(Reporter(trainer, folder))
        original(trainer, *given, **others)

    resume.train = reporting
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpus()
    sys.argv = ["minillm", *words]
    main()


class Student:
    """Samples one response at a time, as exactly as the engine of transformers does."""

    def __init__(self, model: Any, files: str, root: str) -> None:
        self.model, self._files, self._root, self._lock = model, files, root, threading.Lock()
        self._engine = TransformersEngine(model)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            self._load(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path.startswith("/reset_prefix_cache"):
            return {"success": True}
        with self._lock:
            return self._complete(body)

    def _load(self, folder: str) -> None:
        with tempfile.NamedTemporaryFile() as file, self._lock:
            url = f"{self._files}/{Path(folder).relative_to(self._root)}/model.safetensors"
            with httpx.stream("GET", url, timeout=600, trust_env=False) as answer:
                answer.raise_for_status()
                for part in answer.iter_bytes():
                    file.write(part)
            file.flush()
            self.model.load_state_dict(load_file(file.name), strict=False)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, temperature, wanted = body["prompt"], body["temperature"], body.get("logprob_token_ids")
        vocab = self.model.config.vocab_size
        sampling = Sampling(body["max_tokens"], tuple(body.get("stop_token_ids", ())), vocab, temperature)
        [rollout] = self._engine.generate([prompt], sampling, [body.get("seed", 0)])
        ids, logprobs = rollout.response_ids, rollout.student_logprobs.tolist()
        tables: list[dict[str, float]] = [
            {f"token_id:{token}": value} for token, value in zip(ids, logprobs, strict=True)
        ]
        if wanted:
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([prompt])).logits[0, -1].float() / temperature
            scores = torch.log_softmax(logits, 0)
            tables[0] |= {f"token_id:{token}": float(scores[token]) for token in wanted}
        names = [f"token_id:{token}" for token in ids]
        offsets = [sum(map(len, names[:i])) for i in range(len(names))]
        logged = {"text_offset": offsets, "token_logprobs": logprobs, "tokens": names, "top_logprobs": tables}
        choice = {
            "index": 0, "text": "", "logprobs": logged, "finish_reason": "stop" if rollout.finished else "length",
            "stop_reason": None, "token_ids": ids, "prompt_logprobs": None, "prompt_token_ids": prompt,
        }  # fmt: skip
        usage = {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + len(ids), "completion_tokens": len(ids)}
        return {
            "id": f"cmpl-{'0' * 16}", "object": "text_completion", "created": int(time.time()), "model": body["model"],
            "choices": [choice], "service_tier": None, "system_fingerprint": None, "usage": usage,
            "kv_transfer_params": None,
        }  # fmt: skip


class Teacher:
    """Returns the final hidden states of every token."""

    def __init__(self, model: Any) -> None:
        self.model, self._lock = model, threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> bytes:
        with self._lock, torch.no_grad():
            states = self.model.model(input_ids=torch.tensor([body["input"]])).last_hidden_state[0]
        dtype = getattr(torch, body["embed_dtype"])
        return states.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def serve(kind: str, folder: str, address: str, files: str, root: str) -> None:
    """Serve a model until this process is killed."""
    torch.set_num_threads(1)
    served: Any = Teacher(load_model(folder, working_dtype()))
    if kind == "student":
        served = Student(load_model(folder, torch.float32), files, root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._say(200, f"process_start_time_seconds {STARTED:.2f}\n".encode(), "text/plain")
            elif self.path == "/v1/models":
                self._say(200, {"data": [{"id": "tiny", "max_model_len": 1024}]})
            else:
                self._say(405 if (self.path == "/pooling") == (kind == "teacher") else 404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            answer = served.answer(self.path, body)
            self._say(200, answer, "application/octet-stream" if isinstance(answer, bytes) else "application/json")

        def _say(self, status: int, body: Any, kind: str = "application/json") -> None:
            raw = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    ThreadingHTTPServer((address, PORT), Handler).serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), sys.argv[3:])
    else:
        serve(*sys.argv[1:6])
