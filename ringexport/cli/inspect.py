"""``ringexport inspect``: what a checkpoint, a bundle or a file is."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import App, command_options, json_option, pass_app

if TYPE_CHECKING:
    from ringexport.pipeline.inspect import Table

__all__ = ["command"]

_MAX_ROWS = 40
_SHORT_DIGEST = 16


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare the SHA-256 of every file of a bundle.",
)
@click.option("--all", "show_all", is_flag=True, help="Show all rows of long tables.")
@json_option
@command_options
@pass_app
def command(app: App, path: Path, *, verify: bool, show_all: bool, as_json: bool) -> None:
    """Show what PATH is: a checkpoint, a bundle, or a .safetensors, .onnx or .plan file.

    Reads headers, configs and manifests, no weights; a bundle is verified unless told otherwise.
    """
    from ringexport.pipeline.inspect import describe

    terminal = app.terminal
    with terminal.progress(keep_lines=False) as progress:
        found = describe(path, verify=verify, progress=progress)
    if as_json:
        app.write_json(found.to_dict())
        return
    facts = {"what": found.kind, "path": found.path}
    facts |= {name: _cell(name, value) for name, value in found.facts.items()}
    terminal.facts(facts)
    for table in found.tables:
        shown = table.rows if show_all else table.rows[:_MAX_ROWS]
        rows = [
            [_cell(name, value) for name, value in zip(table.columns, row, strict=True)]
            for row in shown
        ]
        terminal.table(table.columns, rows, title=table.title, right=_numeric(table))
        if len(shown) < len(table.rows):
            terminal.result(f"… and {len(table.rows) - len(shown):,} more; --all shows them")


def _cell(name: str, value: object) -> str:
    """Return the text of a value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, int) and name != "layer":
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if name == "sha256":
        return f"{value}"[:_SHORT_DIGEST] + "…"
    return "-" if value is None else str(value)


def _numeric(table: "Table") -> tuple[int, ...]:
    """Return the columns that hold numbers."""
    if not table.rows:
        return ()
    return tuple(
        index
        for index, value in enumerate(table.rows[0])
        if isinstance(value, int | float) and index > 0
    )
