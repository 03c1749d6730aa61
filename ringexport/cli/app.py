"""What all commands share: verbosity, settings, lazily made consoles, and common options."""

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from ringexport.settings import Settings

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal

__all__ = [
    "App",
    "JsonValue",
    "backend_option",
    "bad_value",
    "command_options",
    "json_option",
    "pass_app",
    "verify_option",
    "worker_threads",
]

JsonValue = Any
_MAX_WORKERS = 8
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True, kw_only=True)
class App:
    """The state of one call of the command line.

    Attributes:
        settings: what the environment asks for.
        quiet: no progress, no summaries, only results and errors.
        verbose: log messages, and tracebacks of bugs.
    """

    settings: Settings = field(default_factory=Settings)
    quiet: bool = False
    verbose: bool = False

    @property
    def terminal(self) -> "Terminal":
        """The terminal; importing it loads rich."""
        from ringexport.cli.console import Terminal

        return Terminal(color=self.settings.color, quiet=self.quiet)

    def backend(self, option: str | None) -> str:
        """Return the backend: the option, else RINGEXPORT_BACKEND, else "auto"."""
        return option or self.settings.backend

    def write_json(self, value: JsonValue) -> None:
        """Write a result as JSON to stdout."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")


def worker_threads(app: App) -> int:
    """Return how many threads quantize; they share one interpreter, so that more do not help."""
    return app.settings.threads or min(os.cpu_count() or 1, _MAX_WORKERS)


def bad_value(option: str, message: str) -> click.BadParameter:
    """Return the error of an option whose value only the model could judge."""
    return click.BadParameter(message, param_hint=f"'{option}'")


pass_app = click.make_pass_decorator(App, ensure=True)


def command_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add --quiet and --verbose to a command and put them into its `App`."""

    @click.option("-q", "--quiet", is_flag=True, help="Show only results and errors.")
    @click.option(
        "-v", "--verbose", is_flag=True, help="Show log messages, and tracebacks of bugs."
    )
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        context = click.get_current_context()
        app = context.ensure_object(App)
        app.quiet, app.verbose = bool(kwargs.pop("quiet")), bool(kwargs.pop("verbose"))
        if app.verbose:
            from ringexport.cli.console import configure_logging

            context.call_on_close(configure_logging())
        return function(*args, **kwargs)

    return wrapper


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Write the result as JSON to stdout."
)

verify_option = click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare the SHA-256 of every file of a bundle, or only the sizes.",
)

backend_option = click.option(
    "--backend",
    metavar="NAME",
    help="auto, torch or a target of the bundle; default: RINGEXPORT_BACKEND, else auto.",
)
