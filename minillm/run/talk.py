"""Conversations with models in the terminal: several models side by side, token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import GenerationConfig, TextIteratorStreamer

from minillm.data.sampling import Sampling
from minillm.data.templates import chat_ids
from minillm.errors import InputError
from minillm.models.conventions import settle
from minillm.models.device import device, working_dtype
from minillm.models.load import load_model, load_tokenizer

HELP = "/new begins again, /undo takes the last turn back, /quit (or Ctrl-D) ends."


class Talker:
    """A model with its side of a conversation.

    Args:
        source: Folder or hub id.
        name: What it is called on the screen.
        max_new_tokens: Longest answer.
        temperature: Sampling temperature; 0 takes the most likely token.
        system: System message.

    Attributes:
        messages: The conversation, with `role` and `content`.
    """

    def __init__(
        self, source: str, name: str, *, max_new_tokens: int = 256, temperature: float = 1.0, system: str | None = None
    ) -> None:
        self.name, self._temperature, self._system = name, temperature, system
        self._tokenizer = load_tokenizer(source)
        self._model: Any = load_model(source, working_dtype()).to(device())  # pyright: ignore[reportArgumentType]
        self._conventions = settle(self._tokenizer, self._model)
        self._sampling: Sampling = self._conventions.sampling(max_new_tokens, max(temperature, 1e-6))
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Begin again, with the system message alone."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def undo(self) -> None:
        """Take the last question and its answer back, if there are any."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            del self.messages[-2:]

    def reply(self, text: str, seed: int) -> Iterator[str]:
        """Sample an answer, and yield it piece by piece; question and answer join the conversation when it has ended.

        An answer that is abandoned, or fails, leaves the conversation as it was.

        Args:
            text: What the user says.
            seed: Seed of the sampling.

        Raises:
            InputError: the conversation and the longest answer do not fit into the model's context.
            DataError: the model's tokenizer has no chat template.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids, limit = chat_ids(asked, self._tokenizer), self._conventions.context
        longest = self._sampling.max_new_tokens
        if limit is not None and len(ids) + longest > limit:
            raise InputError(
                f"{self.name}: {len(ids)} tokens of conversation and {longest} of an answer exceed its context of "
                f"{limit}: /new begins again"
            )
        said = ""
        for piece in self._stream(ids, seed):
            said += piece
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": said.strip()}]

    def _stream(self, ids: Sequence[int], seed: int) -> Iterator[str]:
        streamer: Any = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []
        stop: list[bool] = []

        def generate() -> None:
            try:
                torch.manual_seed(seed)
                given = torch.tensor([list(ids)], device=self._model.device)
                self._model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    generation_config=self._generation(),
                    streamer=streamer,
                    stopping_criteria=[lambda *_: torch.tensor([bool(stop)], device=given.device)],
                )
            except BaseException as error:  # raised where the answer is read
                failed.append(error)
                streamer.end()

        worker = Thread(target=generate, daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            stop.append(True)  # Ctrl-C ends the answer, not the conversation
            worker.join()
        if failed:
            raise failed[0]

    def _generation(self) -> GenerationConfig:
        """Sampling from the whole distribution, as in training; a model's own top_k or top_p plays no part."""
        sampled = {"do_sample": True, "temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=self._sampling.max_new_tokens,
            eos_token_id=list(self._sampling.eos_ids),
            pad_token_id=self._sampling.eos_ids[0],
            suppress_tokens=self._beyond(),
            **(sampled if self._temperature > 0 else {"do_sample": False}),
        )

    def _beyond(self) -> list[int] | None:
        """Rows of the head that stand for no token."""
        rows = self._model.config.get_text_config().vocab_size
        return list(range(self._conventions.vocab_size, rows)) or None


def talkers(models: Sequence[str], **settings: Any) -> list[Talker]:
    """Load the models of a conversation; see `Talker`. Equal names are numbered."""
    names = [Path(model).name or model for model in models]
    return [
        Talker(model, name if names.count(name) == 1 else f"{name} ({number})", **settings)
        for number, (model, name) in enumerate(zip(models, names, strict=True), 1)
    ]


def chat(speakers: Sequence[Talker], *, seed: int = 0, console: Console | None = None) -> None:
    """Talk until /quit or the end of the input. Ctrl-C stops an answer.

    Args:
        speakers: The models. Each has the same questions and its own answers.
        seed: Seed of the first answer; the next ones follow from it.
        console: The terminal. Without one that is interactive, answers are printed one after another.
    """
    console = console or Console()
    console.print(f"{', '.join(speaker.name for speaker in speakers)}. {HELP}", style="dim", markup=False)
    turn = 0
    while True:
        try:
            text = (console.input("[bold cyan]> [/]") if sys.stdin.isatty() else next(sys.stdin)).strip()
        except (EOFError, KeyboardInterrupt, StopIteration):
            return
        if text in ("/quit", "/exit"):
            return
        if text in ("/new", "/undo"):
            for speaker in speakers:
                speaker.clear() if text == "/new" else speaker.undo()
        elif text.startswith("/"):
            console.print(HELP, style="dim", markup=False)
        elif text:
            _turn(speakers, text, seed + turn, console)
            turn += 1


def _turn(speakers: Sequence[Talker], text: str, seed: int, console: Console) -> None:
    try:
        if len(speakers) > 1 and console.is_terminal:
            _side_by_side(speakers, text, seed, console)
            return
        for speaker in speakers:
            if len(speakers) > 1:
                console.print(f"{speaker.name}:", style="bold", markup=False)
            for piece in speaker.reply(text, seed):
                console.file.write(piece)
                console.file.flush()
            console.file.write("\n")
    except KeyboardInterrupt:
        console.print("\nstopped", style="dim")
    except InputError as error:
        console.print(str(error), style="red", markup=False)


def _side_by_side(speakers: Sequence[Talker], text: str, seed: int, console: Console) -> None:
    """Answer one after another, because they share a device and a generator, in panels beside each other."""
    said = ["" for _ in speakers]

    def panels() -> Columns:
        shown = zip(speakers, said, strict=True)
        return Columns([Panel(Text(text), title=speaker.name) for speaker, text in shown], equal=True, expand=True)

    with Live(panels(), console=console, refresh_per_second=8) as live:
        for number, speaker in enumerate(speakers):
            for piece in speaker.reply(text, seed):
                said[number] += piece
                live.update(panels())
