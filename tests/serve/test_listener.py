"""A listening socket in a process that may open no more files."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from ringexport.serve import bind

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of files there")
LEFT = 8  # files that may still be opened


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let this process open few more files than it has open."""
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(os.devnull, os.O_RDONLY)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + LEFT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def fill(stack: contextlib.ExitStack) -> None:
    """Open files until no more can be."""
    with contextlib.suppress(OSError):
        while True:
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))


@pytest.mark.usefixtures("few_files")
def test_clients_are_turned_away_while_no_file_can_be_opened() -> None:
    with bind("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
        listener.listen()
        clients = [stack.enter_context(socket.socket()) for _ in range(3)]
        for client in clients:
            client.settimeout(5)
            client.connect(listener.getsockname())
        with contextlib.ExitStack() as files:
            fill(files)
            for client in clients[:2]:
                with pytest.raises(BlockingIOError):
                    listener.accept()
                assert client.recv(1000).startswith(b"HTTP/1.1 503 ")
        with listener.accept()[0] as accepted:
            accepted.sendall(b"hello")
            assert clients[2].recv(5) == b"hello"


@pytest.mark.usefixtures("few_files")
def test_a_reserve_that_was_lost_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
        listener.listen()
        clients = [stack.enter_context(socket.socket()) for _ in range(3)]
        for client in clients:
            client.settimeout(5)
            client.connect(listener.getsockname())
        with contextlib.ExitStack() as files:
            fill(files)
            with monkeypatch.context() as patch:

                def taken(*_: object) -> int:
                    raise OSError(24, "Too many open files")

                patch.setattr("ringexport.serve.listener.os.open", taken)
                with pytest.raises(BlockingIOError):
                    listener.accept()
        listener.accept()[0].close()
        with contextlib.ExitStack() as files:
            fill(files)
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert clients[2].recv(1000).startswith(b"HTTP/1.1 503 ")
