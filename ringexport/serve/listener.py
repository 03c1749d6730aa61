"""Open files: a server needs one for every connection."""

import contextlib
import errno
import logging
import os
import socket
import time
from typing import Any

from ringexport.serve.errors import ApiError, encode_json

__all__ = ["Listener", "allow_many_files"]

log = logging.getLogger("ringexport.serve.access")

_LOG_SECONDS = 10.0
_NO_FILES = (errno.EMFILE, errno.ENFILE)


class Listener(socket.socket):
    """A listening socket that turns clients away while the process may open no more files.

    They would wait unanswered, and asyncio would try to accept them a thousand times a second and
    log each try with a traceback. A file that is kept open for nothing else makes room for one
    connection at a time, which gets status 503.

    Args:
        family, kind, protocol: as of `socket.socket`.
    """

    def __init__(self, family: int, kind: int, protocol: int) -> None:
        super().__init__(family, kind, protocol)
        self._spare: int | None = None
        self._logged = -_LOG_SECONDS
        self._keep_spare()

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: none waits, or the one that did was turned away.
            OSError: the same as of `socket.socket`.
        """
        if self._spare is None:  # another thread took it while a client was turned away
            self._keep_spare()
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in _NO_FILES or self._spare is None:
                raise
            self._turn_away()
            raise BlockingIOError(errno.EAGAIN, "turned away") from error

    def close(self) -> None:
        """Close the socket and the file in reserve."""
        super().close()
        self._drop_spare()

    def _turn_away(self) -> None:
        self._drop_spare()
        with contextlib.suppress(OSError):
            connection, _ = super().accept()
            with connection:
                connection.setblocking(False)
                connection.send(_refusal())
            self._log()
        self._keep_spare()

    def _log(self) -> None:
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            log.warning(
                "too many open files: connections are turned away; raise the limit with ulimit -n"
            )

    def _keep_spare(self) -> None:
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def _drop_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None


def allow_many_files() -> None:
    """Let this process open as many files as its hard limit allows; the soft one is often 1024."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _refusal() -> bytes:
    body = encode_json(
        ApiError("too many connections; try again later", status=503, code="too_many_files").body
    )
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 2\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
