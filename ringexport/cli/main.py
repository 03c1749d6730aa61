"""The entry point: commands are imported when they are used, errors become one sentence."""

import difflib
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from ringexport.cli.app import App
from ringexport.errors import RingExportError
from ringexport.settings import load_settings
from ringexport.version import __version__

__all__ = ["cli", "main", "run_cli"]

COMMANDS = {
    "build": "Build an engine bundle from a checkpoint.",
    "run": "Continue a prompt with a bundle, or chat.",
    "quantize": "Quantize a checkpoint to FP8 or INT8.",
    "eval": "Measure perplexity and bits per byte on text files.",
    "bench": "Measure first-token time and decode speed per backend.",
    "compare": "Compare a bundle with torch or another bundle, per layer.",
    "inspect": "Show what a checkpoint, bundle or model file is.",
    "doctor": "Show which targets work on this machine, and why not.",
}
"""The commands in the order in which people meet them; the list is shown without importing them."""

EXIT_USAGE = 2
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143

EXIT_CODES = {
    0: "success",
    1: "a comparison is out of its bounds",
    EXIT_USAGE: "wrong command line",
    3: "a config, checkpoint, prompt or bundle that cannot be used",
    4: "a target or backend that cannot run here",
    5: "building the graph or the engine failed",
    6: "the output cannot be written",
    EXIT_BUG: "a bug in ringexport",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
    EXIT_BROKEN_PIPE: "the program that reads the output closed it",
    EXIT_TERMINATED: "terminated",
}
"""Every exit code; docs/cli.md shows this table."""

DEFAULT_HINT = "the command with --help shows what it takes, ringexport inspect what a path holds"
ISSUES_HINT = "run the command again with -v and report what it prints, with the command itself"


class _TerminatedError(BaseException):
    """SIGTERM arrived; unwinds like an interrupt, so that temporary files go away."""


class _ClosedPipeError(BaseException):
    """Who reads stdout has gone; click would make exit code 1 of a BrokenPipeError."""


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are named; they import their own needs."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command, and let a closed pipe through click."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ClosedPipeError from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        del ctx
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command.

        Raises:
            click.UsageError: there is no such command; names the nearest.
        """
        if cmd_name not in COMMANDS:
            near = difflib.get_close_matches(cmd_name, COMMANDS, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"there is no command {cmd_name!r}{guess}", ctx)
        module = importlib.import_module(f"ringexport.cli.{cmd_name}")
        command: click.Command = module.command
        return command


@click.group(
    cls=_LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: ringexport build CHECKPOINT -o BUNDLE, then ringexport run BUNDLE PROMPT",
)
@click.version_option(__version__, prog_name="ringexport", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Turn Ring-linear checkpoints into verified engine bundles and run them."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Run the command line of this process and exit."""
    signal.signal(signal.SIGTERM, _on_terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = run_cli(sys.argv[1:])
    sys.exit(code)


def run_cli(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code; everything there is to say has been written.
    """
    try:
        code = _run_reporting(arguments)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted", EXIT_INTERRUPTED)
    except _TerminatedError:
        return _say("terminated", EXIT_TERMINATED)
    except (_ClosedPipeError, BrokenPipeError):
        return _drop_stdout()
    return code


def _run_reporting(arguments: Sequence[str]) -> int:
    """Run one command line and report the errors that a sentence explains."""
    app = App()
    try:
        app.settings = load_settings()
        code = cli.main(list(arguments), prog_name="ringexport", standalone_mode=False, obj=app)
    except RingExportError as error:
        return _report(error, app)
    except click.ClickException as error:
        return _report_usage(error, app)
    except click.Abort:
        raise
    except Exception as error:  # noqa: BLE001 (the one place where every bug ends)
        return _report_bug(error, app)
    return code if isinstance(code, int) else 0


def _on_terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _TerminatedError


def _report(error: RingExportError, app: App) -> int:
    if app.verbose:
        traceback.print_exc()
    return _complain(app, error.message, error.hint or DEFAULT_HINT, error.exit_code)


def _complain(app: App, message: str, hint: str, code: int) -> int:
    """Write one sentence and, on its own line, the hint; return the exit code."""
    color = None if app.settings.color else False  # None lets click look at the terminal
    click.secho("error: ", fg="red", bold=True, err=True, nl=False, color=color)
    click.echo(message, err=True)
    click.secho("hint: ", fg="cyan", err=True, nl=False, color=color)
    click.echo(hint, err=True)
    return code


def _report_usage(error: click.ClickException, app: App) -> int:
    context = getattr(error, "ctx", None)
    path = "ringexport" if context is None else context.command_path
    hint = f"{path} --help shows what can be given"
    return _complain(app, _sentence(error.format_message()), hint, error.exit_code)


def _sentence(message: str) -> str:
    """Return click's message in the form of ours: no capital letter, no full stop."""
    text = " ".join(message.split())
    return text[:1].lower() + text[1:].removesuffix(".")


def _report_bug(error: Exception, app: App) -> int:
    if app.verbose:
        traceback.print_exc()
    first = (str(error).strip() or "no message").splitlines()[0]
    message = f"this is a bug in ringexport: {type(error).__name__}: {first}"
    return _complain(app, message, ISSUES_HINT, EXIT_BUG)


def _say(text: str, code: int) -> int:
    click.echo(text, err=True)
    return code


def _drop_stdout() -> int:
    """Send what is still buffered nowhere, so that nothing complains at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    return EXIT_BROKEN_PIPE
