"""The table of modules and schemes that `build` and `quantize` show, and the options of both."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from ringexport.cli.app import JsonValue

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal
    from ringexport.quantize.resolve import SchemeRow

__all__ = ["calibration_options", "scheme_json", "show_schemes"]

P = ParamSpec("P")
R = TypeVar("R")


def calibration_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add --calibration, --calibration-samples and --stats to a command."""
    options = (
        click.option(
            "--calibration",
            metavar="NAME|FILE.jsonl",
            help="Prompts for recipes with static scales or SmoothQuant: english, code, chat, "
            "several joined with +, or a file. Default: all three.",
        ),
        click.option(
            "--calibration-samples",
            type=click.IntRange(1),
            metavar="N",
            help="Calibrate with so many prompts at most.",
        ),
        click.option(
            "--stats",
            "stats_path",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Stats of an earlier calibration of this checkpoint, instead of prompts.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def show_schemes(terminal: "Terminal", rows: "Iterable[SchemeRow]") -> None:
    """Write the table to stdout."""
    terminal.table(
        ("modules", "kind", "parameters", "weights", "activations", "first"),
        [
            (
                str(row["modules"]),
                row["kind"],
                f"{row['parameters']:,}",
                row["weights"],
                row["activations"],
                row["first"],
            )
            for row in scheme_json(rows)
        ],
        right=(0, 2),
    )


def scheme_json(rows: "Iterable[SchemeRow]") -> list[dict[str, JsonValue]]:
    """Return the table as JSON."""
    return [
        {
            "modules": row.modules,
            "kind": row.kind,
            "parameters": row.parameters,
            "weights": _describe(row.scheme.weights),
            "activations": _describe(row.scheme.activations),
            "first": row.example,
        }
        for row in rows
    ]


def _describe(scheme: object) -> str:
    return "as they are" if scheme is None else str(scheme)
