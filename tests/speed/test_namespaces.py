"""Network namespaces that stand for machines: what passes a link is counted and limited, and nothing of them is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[2] / "eval" / "speed"
sys.path.append(str(SPEED))

from namespaces import Network, Unavailable  # noqa: E402  # pyright: ignore[reportMissingImports]

RECEIVE = """
import socket, sys
with socket.create_server((sys.argv[1], 9000)) as server:
    print("up", flush=True)
    connection, _ = server.accept()
    while connection.recv(1 << 20):
        pass
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 9000)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
"""
HANG = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for commands in its background
from namespaces import Network, interruptible
with interruptible(), Network(["a", "b"]):
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _allowed() -> None:
    try:
        with Network(["a"]):
            pass
    except Unavailable as reason:
        pytest.skip(str(reason))


def namespaces(process: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if name.startswith(f"minillm-{process}-")]


def send(net: Network, size: int) -> float:
    """Send bytes from a to b; returns the seconds."""
    to = net.address("b")
    receiver = subprocess.Popen(net.inside("b", [sys.executable, "-c", RECEIVE, to]), stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "up\n"
    begun = time.monotonic()
    subprocess.run(net.inside("a", [sys.executable, "-c", SEND, to, str(size)]), check=True, timeout=60)
    taken = time.monotonic() - begun
    assert receiver.wait(timeout=60) == 0
    return taken


def test_what_passes_a_link_is_counted_and_limited() -> None:
    size = 4_000_000
    with Network(["a", "b", "c"]) as net:
        before = net.counts()
        send(net, size)
        passed = {name: count - before[name] for name, count in net.counts().items()}
        assert size < passed["a"].sent < 1.1 * size
        assert size < passed["b"].received < 1.1 * size
        assert passed["c"].sent < 0.01 * size
        net.limit(2e6)
        assert send(net, size) > 0.8 * size / 2e6


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(stop: signal.Signals) -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", HANG], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=SPEED
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "up\n"
    assert len(namespaces(started.pid)) == 3
    started.send_signal(stop)
    assert started.wait(timeout=60) != 0
    assert not namespaces(started.pid)


def test_where_there_are_no_namespaces_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="need Linux, root"), Network(["a"]):
        pass
