"""docs/cli.md, rendered from the commands themselves."""

import click

from ringexport.cli.main import COMMANDS, EXIT_CODES, cli
from ringexport.engine.target import FP8_ARCHITECTURE
from ringexport.pipeline.request import RECIPES, RUNNABLE, TARGET_FORMS
from ringexport.settings import VARIABLES

__all__ = ["render_reference"]

_WIDTH = 100

_HEAD = """\
# Command line

<!-- Written by `make docs` from the commands; a test compares the two. Do not edit. -->

`ringexport COMMAND` and `python -m ringexport COMMAND` are the same. Results go to stdout,
everything else to stderr: progress bars on a terminal, one line per stage elsewhere. An error is
one sentence and, on its own line, a `hint:`.

"""


def render_reference() -> str:
    """Return the whole of docs/cli.md."""
    parts = [_HEAD, "## Exit codes\n\n", _table(("code", "meaning"), EXIT_CODES)]
    parts += ["## Environment variables\n\nNone is needed.\n\n"]
    parts += [_table(("variable", "meaning"), {f"`{k}`": v for k, v in VARIABLES.items()})]
    parts += [_targets(), _recipes(), "## Commands\n\n", _help(cli, "ringexport")]
    group = click.Context(cli, info_name="ringexport")
    for name in COMMANDS:
        command = cli.get_command(group, name)
        assert command is not None
        parts += [f"\n### {name}\n\n", _help(command, f"ringexport {name}")]
    return "".join(parts)


def _targets() -> str:
    """Return the targets and the recipes that each runs."""
    rows = {
        f"`{form.name}`": ", ".join(f"`{name}`" for name in RUNNABLE[form.family])
        for form in TARGET_FORMS
    }
    table = _table(("target", "recipes"), rows)
    note = (
        f"TensorRT has FP8 from sm_{FP8_ARCHITECTURE} on. On older GPUs the plugins decode FP8"
        " themselves: static scales of inputs give way to scales per token, and FP8 modules"
        " other than routed experts whose inputs are not quantized, or that fit no kernel, are"
        " stored in bf16.\n\n"
    )
    return "## Targets of `build`\n\n" + table + note


def _recipes() -> str:
    rows = {f"`{name}`": text for name, text in RECIPES.items()}
    return "## Recipes\n\n" + _table(("recipe", "meaning"), rows)


def _help(command: click.Command, name: str) -> str:
    context = click.Context(
        command,
        info_name=name,
        terminal_width=_WIDTH,
        max_content_width=_WIDTH,
        help_option_names=["-h", "--help"],
    )
    return f"```text\n{command.get_help(context)}\n```\n"


def _table(columns: tuple[str, str], rows: "dict[int, str] | dict[str, str]") -> str:
    lines = [f"| {columns[0]} | {columns[1]} |", "|---|---|"]
    lines += [f"| {name} | {meaning} |" for name, meaning in rows.items()]
    return "\n".join(lines) + "\n\n"
