"""Machines that are not there: network namespaces behind one switch, with links of limited bandwidth (Linux, as root).

The switch is a bridge in a namespace of its own, so no packet reaches a network of the machine. Everything is removed
when the context manager ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class Unavailable(Exception):
    """The system does not allow network namespaces."""


@dataclass(frozen=True)
class Count:
    """Bytes that a machine has sent and received, headers included."""

    sent: int
    received: int

    def __sub__(self, earlier: Count) -> Count:
        return Count(self.sent - earlier.sent, self.received - earlier.received)


class Network:
    """Machines by name, each with the address that `address` tells.

    Args:
        names: what the machines are called.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._prefix = f"minillm-{os.getpid()}"
        self._made: list[str] = []
        self._switch = self._namespace("switch")

    def __enter__(self) -> Network:
        if sys.platform != "linux" or os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
            raise Unavailable("network namespaces need Linux, root, and the commands ip and tc")
        try:
            self._make(self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            for number, name in enumerate(self.names, 1):
                self._add(name, number)
            self.limit(1 << 30)
            self.limit(None)
        except subprocess.CalledProcessError as error:
            self._remove()
            raise Unavailable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def address(self, name: str) -> str:
        """The address of a machine."""
        return f"10.77.0.{self.names.index(name) + 1}"

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """A command line that runs another one on a machine."""
        return ["ip", "netns", "exec", self._namespace(name), *command]

    def limit(self, rate: float | None) -> None:
        """Limit what every machine sends and receives, each to so many bytes per second; None lifts the limit."""
        for number, name in enumerate(self.names, 1):
            for namespace, device in ((self._namespace(name), "eth0"), (self._switch, f"port{number}")):
                if rate is None:
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
                    continue
                burst = f"{max(int(rate / 100), 1 << 18)}b"
                limits = ["rate", f"{int(8 * rate)}bit", "burst", burst, "limit", "8mb"]
                _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *limits)

    def counts(self) -> dict[str, Count]:
        """What each machine has sent and received until now, by the counters of its interface."""
        found = {}
        for name in self.names:
            [link] = json.loads(_ip("-n", self._namespace(name), "-s", "-j", "link", "show", "eth0"))
            stats = link["stats64"]
            found[name] = Count(stats["tx"]["bytes"], stats["rx"]["bytes"])
        return found

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _make(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._made.append(namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")

    def _add(self, name: str, number: int) -> None:
        namespace, port = self._namespace(name), f"port{number}"
        self._make(namespace)
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
        _ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        """Kill what still runs on the machines, and remove them."""
        while self._made:
            namespace = self._made.pop()
            for _ in range(50):
                # Only processes that this script started are in namespaces that it made.
                listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
                if not (pids := listed.stdout.split()):
                    break
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.1)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM end this process as Ctrl-C does, so that context managers clean up."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
