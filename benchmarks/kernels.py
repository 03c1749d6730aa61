"""Time every kernel of plugins/ beside torch or flash-linear-attention: one table.

    export RINGEXPORT_KERNEL_LIBRARY=build/plugins/libringkernels.so
    PYTHONPATH=. python benchmarks/kernels.py [--docs]

Each family has a module of its own (kernels_*.py), which checks results before it times them.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import kernels_attention
import kernels_grouped
import kernels_linear_attention
import kernels_moe
import kernels_norm
import kernels_prefill
import kernels_projection
from tables import markdown, replace

FAMILIES = (
    kernels_linear_attention,
    kernels_moe,
    kernels_grouped,
    kernels_projection,
    kernels_attention,
    kernels_norm,
    kernels_prefill,
)
HEADER = ("op", "shape", "us", "of the limit", "torch or FLA, us")


def table(families: Iterable[Any] = FAMILIES) -> Iterator[list[str]]:
    """Measure and yield the rows; a family calls its fraction and its reference what it likes."""
    for family in families:
        for row in family.rows():
            yield [
                str(row["op"]),
                str(row["shape"]),
                f"{row['us']:.1f}",
                _first(row, ("fraction", "of "), "{:.0%}"),
                _first(row, ("torch", "FLA"), "{:.1f}"),
            ]


def _first(row: Mapping[str, Any], prefixes: tuple[str, ...], form: str) -> str:
    values = (value for key, value in row.items() if key.startswith(prefixes))
    found = next((value for value in values if isinstance(value, float)), None)
    return "" if found is None or found != found else form.format(found)  # noqa: PLR0124 - NaN


if __name__ == "__main__":
    rows = list(table())
    print(markdown(HEADER, rows))
    if "--docs" in sys.argv:
        replace("performance.md", "gpu-kernels", markdown(HEADER, rows))
