"""``ringexport serve``: an HTTP server in OpenAI's form, with a chat page."""

import importlib.util
import ipaddress
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import App, backend_option, command_options, pass_app
from ringexport.errors import BackendUnavailableError

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal

__all__ = ["SERVE_DEFAULTS", "command"]

SERVE_DEFAULTS = {"max_batch": 32, "max_queue": 256, "drain": 30.0, "prefix_cache": 256}
"""As in `BatchingOptions` and `ServeOptions`, which import numpy; a test compares them."""

_MAX_COUNT = 2**31 - 1
_MEGABYTE = 1 << 20
_PACKAGES = ("starlette", "uvicorn", "prometheus_client")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    """Where to listen."""

    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    help="What clients must send; default: RINGEXPORT_API_KEY, which others cannot see, else none.",
)
@click.option("--model-name", metavar="NAME", help="Default: the name of the directory.")
@click.option(
    "--max-batch",
    type=click.IntRange(1, 128),
    metavar="N",
    default=SERVE_DEFAULTS["max_batch"],
    show_default=True,
    help="Requests that run at once.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0, _MAX_COUNT),
    metavar="N",
    default=SERVE_DEFAULTS["max_queue"],
    show_default=True,
    help="Requests that may wait besides; more get status 429.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, _MAX_COUNT),
    metavar="N",
    help="Most new tokens per request; default: what the context holds.",
)
@click.option(
    "--max-prompt",
    type=click.IntRange(1, _MAX_COUNT),
    metavar="N",
    help="Longest prompt in tokens; default: what the context holds."
    " With --max-tokens, a GPU has memory for both and no more.",
)
@click.option(
    "--prefix-cache",
    type=click.IntRange(0, _MAX_COUNT),
    metavar="MB",
    default=SERVE_DEFAULTS["prefix_cache"],
    show_default=True,
    help="Memory for states of prompts that come again.",
)
@click.option(
    "--thinking/--no-thinking",
    default=True,
    show_default=True,
    help="Let the model think where a chat does not say.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0, 3600),
    metavar="SECONDS",
    default=SERVE_DEFAULTS["drain"],
    show_default=True,
    help="Time for open requests to end after Ctrl-C or SIGTERM.",
)
@backend_option
@command_options
@pass_app
def command(
    app: App,
    /,
    *,
    bundle: Path,
    host: str,
    port: int,
    api_key: str | None,
    model_name: str | None,
    max_batch: int,
    max_queue: int,
    max_tokens: int | None,
    max_prompt: int | None,
    prefix_cache: int,
    thinking: bool,
    drain: float,
    backend: str | None,
) -> None:
    """Serve the model of a BUNDLE over HTTP, in OpenAI's form, with a chat page at /.

    Programs use it with the base URL http://HOST:PORT/v1. It ends in order after Ctrl-C or SIGTERM.
    """
    _check_packages()
    from ringexport.batching import BatchingEngine, BatchingOptions
    from ringexport.cli.opening import open_engine
    from ringexport.serve import (
        ServeOptions,
        Server,
        allow_many_files,
        bind,
        create_app,
        url_of,
    )

    terminal, address = app.terminal, _Address(host=host, port=port)
    key = app.settings.api_key if api_key is None else api_key
    options = ServeOptions(
        model_name=(bundle.resolve().name or "model") if model_name is None else model_name,
        api_key=key,
        local_only=address.is_local and key is None,
        thinking=thinking,
        max_new_tokens=max_tokens,
        max_prompt_tokens=max_prompt,
        drain_seconds=drain,
    )
    batching_options = BatchingOptions(
        max_batch=max_batch, max_queue=max_queue, prefix_cache_bytes=prefix_cache * _MEGABYTE
    )
    allow_many_files()
    with bind(host, port) as listener:
        with terminal.progress(keep_lines=False) as progress:
            engine = open_engine(
                app,
                bundle,
                progress,
                backend=app.backend(backend),
                max_batch=max_batch,
                max_context=_context(max_prompt, max_tokens),
            )
        with engine, BatchingEngine(engine, batching_options) as batching:
            server = Server(
                create_app(engine, batching, options),
                batching,
                options,
                on_start=lambda: _announce(terminal, url_of(listener), options.model_name),
            )
            if options.api_key is None and not address.is_local:
                terminal.say(
                    "note: anybody who reaches this machine can use it; set RINGEXPORT_API_KEY"
                )
            undo = _log_requests(quiet=app.quiet)
            try:
                server.run(sockets=[listener])
            finally:
                undo()
    terminal.say("stopped")


def _context(max_prompt: int | None, max_tokens: int | None) -> int | None:
    """Return the tokens that a request has at most, None if only the model's context says."""
    return None if max_prompt is None or max_tokens is None else max_prompt + max_tokens


def _announce(terminal: "Terminal", url: str, name: str) -> None:
    terminal.result(f"serving {name} at {url}")
    sys.stdout.flush()
    terminal.say(f"chat page: {url}/   base URL: {url}/v1   Ctrl-C ends it", style="dim")


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"the server needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'ringexport[serve]'",
        )


def _log_requests(*, quiet: bool) -> Callable[[], None]:
    """Write a line per request, and what went wrong inside, to stderr; returns what ends that."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    levels = {
        "ringexport.serve.access": logging.WARNING if quiet else logging.INFO,
        "uvicorn.error": logging.ERROR,
    }
    logs = [logging.getLogger(name) for name in levels]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(levels[log.name])
        log.propagate = False

    def undo() -> None:
        for log in logs:
            log.removeHandler(handler)
            log.propagate = True

    return undo
