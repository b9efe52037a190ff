"""What libraries print that means nothing to the user of a command, line by line and with the reason.

A line that matches goes to the log only. Everything else is shown, so that a new warning of a new version is seen, and
either says something or gets an entry here. To add one, give the words that no other message has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

NOISE: tuple[tuple[str, str], ...] = (
    (r"^» ", "what the command itself has shown already"),
    (r"\d+%( Completed)? ?\|", "progress bars, in whose place there is one line a stage"),
    (r"Failed to load CPU gemm_4bit_forward", "bitsandbytes looks for a kernel of 4-bit products on a CPU at import"),
    (r"Triton is installed, but doesn't include CPU backend", "vLLM needs no Triton on a CPU"),
    (r"\d+ .*: (Future|Deprecation|PendingDeprecation)Warning: ", "written for the developers of a library"),
    (r": (Future|Deprecation|PendingDeprecation)Warning: ", "written for the developers of a library"),
    (r"NUMA binding: Using MEMBIND policy", "vLLM binds its memory to the node that it runs on, as it should"),
    (r"\[Gloo\] Rank \d+ is connected to", "that processes found each other is no news"),
    (r"huggingface/tokenizers: The current process just got forked", "tokenizers work on in a single thread"),
    (r"To disable this warning, you can either:", "of the message about tokenizers and forks"),
    (r"\t- (Avoid using `tokenizers`|Explicitly set the environment)", "of the message about tokenizers and forks"),
    (
        r"arguments do not match the ones in the `trainer_state",
        "a run compares settings itself, and takes the new ones",
    ),
    (r"`use_cache=True` is incompatible with gradient checkpointing", "transformers switches the cache off itself"),
    (r"Setting `pad_token_id` to `eos_token_id`", "padding is masked, whatever token it is"),
    (r"The tokenizer has new PAD/BOS/EOS tokens that differ", "the run settles end tokens for all models at its start"),
    (
        r"longer than the specified maximum sequence length",
        "data.max_prompt_tokens leaves long prompts out, and says so",
    ),
    (
        r"'pin_memory' argument is set as true but no accelerator",
        "nothing is pinned on a CPU, which is as it should be",
    ),
    (r"resource_tracker: There appear to be \d+ leaked", "freed when the process ends"),
    (r"destroy_process_group\(\) was not called", "the process ends, and its groups with it"),
    (r"^(\S+ ){0,3}(INFO|DEBUG|TRACE)\b|^\[?(INFO|DEBUG)\b|\[(INFO|DEBUG)\]", "information, no warning"),
    (r"^\s*[\[\]A]?$", "nothing"),
)
"""Regular expressions of what is found in a line without control codes, and why the line is not shown."""

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PATTERNS = [re.compile(pattern) for pattern, _ in NOISE]
_DOWNLOAD = re.compile(r"^(?P<what>.+?):\s+(?P<share>\d+%)\|.*\|\s*[\d.]+[kMGT]B?\s*/\s*(?P<size>[\d.]+[kMGT]B?)")
_REPEATED = re.compile(r"warning", re.IGNORECASE)


def download_in(lines: Iterable[str]) -> str | None:
    """The last state of a download in some lines, in words; None if there is none.

    Of all bars those of downloads are told of: they may take longer than everything else.
    """
    found = [match for match in map(_DOWNLOAD.match, lines) if match]
    return f"downloading {found[-1]['what'].strip()}: {found[-1]['share']} of {found[-1]['size']}" if found else None


def is_noise(text: str) -> bool:
    """Whether a line means nothing to the user."""
    return any(pattern.search(text) for pattern in _PATTERNS)


class Sieve:
    """Lets through what a user should see of the lines that a process prints.

    Lines that are indented belong to the line before them. A warning is shown once.
    """

    def __init__(self) -> None:
        self._hides, self._shown = False, set[str]()

    def pick(self, lines: Iterable[str]) -> list[str]:
        """The lines to show, of those that were printed since the last call.

        Args:
            lines: whole lines, without their ends. Of one that was written over, each state is a line.
        """
        return [line for line in map(self._clean, lines) if self._is_shown(line)]

    @staticmethod
    def _clean(line: str) -> str:
        return _CONTROL.sub("", line).rstrip()

    def _is_shown(self, line: str) -> bool:
        if not (line[:1].isspace() and line.strip()):  # an indented line shares the fate of the message it belongs to
            self._hides = is_noise(line) or line in self._shown
            if _REPEATED.search(line):
                self._shown.add(line)
        elif _PATTERNS[1].search(line):
            return False
        return not self._hides
