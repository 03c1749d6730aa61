"""The process: a socket, uvicorn, and an orderly end."""

import asyncio
import contextlib
import functools
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from ringexport.errors import ConfigError
from ringexport.serve.listener import Listener
from ringexport.serve.options import ServeOptions
from ringexport.serve.protocol import HttpProtocol
from ringexport.serve.service import Batcher

__all__ = ["Server", "bind", "url_of"]

BACKLOG = 1024
MAX_INCOMPLETE_BYTES = 64 << 10
"""What the parser of HTTP holds of a request's head; `Gate` refuses much smaller ones in JSON."""
SEND_SECONDS = 2.0
"""After the drain: time to send what is left."""
GRACE_SECONDS = 10.0
"""After the drain, before uvicorn cancels what should have ended."""
BIND_HINT = "choose another --host or --port; port 0 takes a free one"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with an address, which does not listen yet.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = Listener(family, kind, protocol)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen on {host!r}: {reason}", hint=BIND_HINT) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"cannot listen on {host!r} port {port}: {reason}", hint=BIND_HINT
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the address of a socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves an application until SIGTERM or SIGINT; a second signal does not wait.

    Args:
        app: made by `create_app`.
        batching: drained at the end; `run` closes it.
        options: times.
        on_start: called when connections are accepted.
    """

    def __init__(
        self,
        app: Starlette,
        batching: Batcher,
        options: ServeOptions,
        *,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=functools.partial(  # type: ignore[arg-type]  # uvicorn only calls it
                HttpProtocol, head_seconds=options.body_seconds
            ),
            loop="asyncio",
            lifespan="off",
            ws="none",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(options.drain_seconds + GRACE_SECONDS),
            h11_max_incomplete_event_size=MAX_INCOMPLETE_BYTES,
        )
        super().__init__(config)
        self._app, self._batching, self._on_start = app, batching, on_start
        self._drain_seconds = options.drain_seconds

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end; with the process to itself, without pauses for garbage.

        A full collection looks through everything that an engine and its libraries have made, which
        holds all streams up for 0.1 seconds and finds nothing.
        """
        if not _owns_process():
            super().run(sockets)
            return
        gc.collect()
        gc.freeze()
        try:
            super().run(sockets)
        finally:
            gc.unfreeze()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections.

        Raises:
            ConfigError: another process has begun to listen on the port meanwhile.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConfigError(f"cannot listen: {reason}", hint=BIND_HINT) from error
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, and let those in work end or fail in time."""
        self._app.state.service.draining = True
        drain = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        await drain

    async def _drain(self) -> None:
        """Close the batching engine and then the connections; a second signal does not wait."""
        closing = asyncio.create_task(
            asyncio.to_thread(self._batching.close, drain_seconds=self._drain_seconds)
        )
        while not closing.done() and not self.force_exit:
            await asyncio.wait([closing], timeout=0.1)
        if not closing.done():
            await asyncio.to_thread(self._batching.close)
        await closing
        end = time.monotonic() + SEND_SECONDS
        while self.server_state.connections and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # its reader takes nothing

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Turn signals into an orderly end, after which the process goes on."""
        if not _owns_process():
            yield
            return
        handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        del number, frame
        self.force_exit = self.should_exit
        self.should_exit = True


def _owns_process() -> bool:
    """Tell whether the server runs where a process begins, and so may change what is global."""
    return threading.current_thread() is threading.main_thread()
