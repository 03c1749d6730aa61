"""The entry point: commands are imported when they are used, errors become one sentence."""

import difflib
import importlib
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ringexport.cli.app import App
from ringexport.cli.streams import drop_stdout, prepare_streams, stdout_problem
from ringexport.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    OutputError,
    RingExportError,
)
from ringexport.settings import load_settings, rest_torch_threads
from ringexport.version import __version__

__all__ = ["cli", "main", "run_cli"]

COMMANDS = {
    "build": "Build an engine bundle from a checkpoint.",
    "run": "Continue a prompt with a bundle, or chat.",
    "serve": "Serve a bundle over HTTP, in OpenAI's form, with a chat page.",
    "triton": "Write a model repository for Triton Inference Server.",
    "quantize": "Quantize a checkpoint to FP8 or INT8.",
    "eval": "Measure perplexity and bits per byte on text files.",
    "bench": "Measure first-token time and decode speed per backend.",
    "compare": "Compare a bundle with torch or another bundle, per layer.",
    "inspect": "Show what a checkpoint, bundle or model file is.",
    "doctor": "Show which targets work on this machine, and why not.",
}
"""The commands in the order in which people meet them; the list is shown without importing them."""

EXIT_USAGE = 2
EXIT_MEMORY = 7
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
    EXIT_MEMORY: "out of memory",
    EXIT_BUG: "a bug in ringexport",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
    EXIT_BROKEN_PIPE: "the program that reads the output closed it",
    EXIT_TERMINATED: "terminated",
}
"""Every exit code; docs/cli.md shows this table."""

MEMORY_HINT = "use fewer rows or tokens, end other programs, or take a machine with more memory"
ISSUES_HINT = "run the command again with -v and report what it prints, with the command itself"


class _TerminatedError(BaseException):
    """SIGTERM arrived; unwinds like an interrupt, so that temporary files go away."""


class _ClosedPipeError(BaseException):
    """Who reads stdout has gone; click would make exit code 1 of a BrokenPipeError."""


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are named; they import their own needs."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse the command line, which may write the help, and let a closed pipe through click."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except BrokenPipeError as error:
            raise _ClosedPipeError from error

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
    prepare_streams()
    rest_torch_threads()
    code = run_cli(sys.argv[1:])
    sys.exit(code)


def run_cli(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code; everything there is to say has been written.
    """
    app = App()
    try:
        code = _run_reporting(arguments, app)
        return _flush(app) or code
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted", EXIT_INTERRUPTED)
    except _TerminatedError:
        return _say("terminated", EXIT_TERMINATED)
    except (_ClosedPipeError, BrokenPipeError):
        drop_stdout()
        return EXIT_BROKEN_PIPE
    except OSError:  # not even the sentence about an error could be written to stderr
        drop_stdout()
        return OutputError.exit_code


def _flush(app: App) -> int:
    """Write what is still buffered; return an exit code if that fails, else 0."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        return _report_system(error, app)
    return 0


def _run_reporting(arguments: Sequence[str], app: App) -> int:
    """Run one command line and report the errors that a sentence explains."""
    try:
        app.settings = load_settings()
        code = cli.main(list(arguments), prog_name="ringexport", standalone_mode=False, obj=app)
    except RingExportError as error:
        return _report(error, app)
    except click.ClickException as error:
        return _report_usage(error, app, _path(arguments))
    except (click.Abort, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001 (the one place where every bug ends)
        if _is_out_of_memory(error):
            message = f"out of memory while running {_path(arguments)}"
            return _complain(app, message, MEMORY_HINT, EXIT_MEMORY)
        if isinstance(error, OSError):
            return _report_system(error, app)
        return _report_bug(error, app)
    return code if isinstance(code, int) else 0


def _on_terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _TerminatedError


def _path(arguments: Sequence[str]) -> str:
    """Return the command that a command line names, as it is called."""
    named = arguments[:1] if arguments and arguments[0] in COMMANDS else ()
    return " ".join(["ringexport", *named])


def _report(error: RingExportError, app: App) -> int:
    if app.verbose:
        traceback.print_exc()
    return _complain(app, error.message, error.hint or _hint(error), error.exit_code)


def _hint(error: RingExportError) -> str | None:
    """Return what helps against errors that bring no hint of their own, if anything does."""
    if isinstance(error.__cause__, PermissionError):
        return "check the permissions of the file"
    if isinstance(error, ConfigError) and "config.json" in error.message:
        return "use the config.json published with the weights"
    if isinstance(error, CheckpointError):
        return "compare the files with the published ones, or download them again"
    if isinstance(error, ContextLengthError):
        return "give a shorter text"
    if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return "check the path"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; the runtimes report that as a RuntimeError of their own."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    marks = ("can't allocate memory", "bad_alloc", "bad allocation", "Failed to allocate memory")
    return isinstance(error, RuntimeError) and any(mark in text for mark in marks)


def _report_system(error: OSError, app: App) -> int:
    """Explain an error of the operating system that no command has explained."""
    problem = stdout_problem(error)
    if problem is not None:
        drop_stdout()
        hint = "send the output elsewhere"
        message = f"cannot write the result to stdout: {problem}"
        return _complain(app, message, hint, OutputError.exit_code)
    if error.filename is not None and error.strerror:
        message = f"cannot use {str(error.filename)[:200]}: {error.strerror.lower()}"
        hint = "check the path and its permissions"
        return _complain(app, message, hint, ConfigError.exit_code)
    if isinstance(error, FileNotFoundError) and not _has_directory():
        message, hint = "the current directory is gone", "change to another one: cd"
        return _complain(app, message, hint, ConfigError.exit_code)
    return _report_bug(error, app)


def _has_directory() -> bool:
    """Tell whether there still is a current directory."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _complain(app: App, message: str, hint: str | None, code: int) -> int:
    """Write one sentence and, on its own line, the hint if there is one; return the exit code."""
    color = None if app.settings.color else False  # None lets click look at the terminal
    click.secho("error: ", fg="red", bold=True, err=True, nl=False, color=color)
    click.echo(message, err=True)
    if hint is None:
        return code
    click.secho("hint: ", fg="cyan", err=True, nl=False, color=color)
    click.echo(hint, err=True)
    return code


def _report_usage(error: click.ClickException, app: App, path: str) -> int:
    context = getattr(error, "ctx", None)
    path = path if context is None else context.command_path
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
