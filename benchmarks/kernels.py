"""Time every kernel of plugins/ beside torch or flash-linear-attention: one table.

    export RINGEXPORT_KERNEL_LIBRARY=build/plugins/libringkernels.so
    PYTHONPATH=. python benchmarks/kernels.py [--docs] [--seconds 60] [--only NAME ...]

Each family has a module of its own (kernels_*.py), which checks results before it times them and
measures more shapes when it is called itself. With --docs the table of docs/performance.md is
written anew after every family, so that it is always of one run. FLA is imported meanwhile, in a
process of its own, and measured last; `python benchmarks/kernels_fla.py`, once before, fills
the cache for which its tuner else needs a minute.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import kernels_attention
import kernels_grouped
import kernels_linear_attention
import kernels_moe
import kernels_norm
import kernels_prefill
import kernels_projection
import kernels_sample
from gpu_timing import conditions
from kernels_fla import Reference
from tables import markdown, replace

from ringexport.errors import RingExportError

Row = Mapping[str, Any]
HEADER = ("op", "shape", "us", "rate", "of the limit", "torch or FLA, us")
LINEAR = (
    *kernels_linear_attention.DECODES, (1, 4096, 9), (8, 4096, 9),
    (1, 32768, 0), (1, 32768, 9), (1, 32768, 18),
)  # fmt: skip
FEW = (1, 8, 64, 256)
GROUPED = {
    "fp8 channel": (512, 1024, 2048, 4096, 8192, 16384), "int8 channel": (1024, 4096, 16384),
    "fp8 block128": (1024, 4096, 16384), "bf16": (1024, 4096, 16384),
}  # fmt: skip
CACHES = ((1, 4096), (1, 131072), (8, 4096), (64, 4096), (64, 16384))
FAMILIES: dict[str, Callable[[], Iterable[Row]]] = {
    "router": lambda: kernels_moe.rows((), router_tokens=(1, 8, 64, 256, 4096)),
    "experts fp8": lambda: kernels_moe.rows(
        ("fp8-channel",), (1, 2, 4, 8, 16, 32, 64, 128, 256), ()
    ),
    "experts": lambda: kernels_moe.rows(("int8-channel", "bf16-none", "fp8-block"), FEW, ()),
    "grouped experts": lambda: kernels_grouped.rows(GROUPED),
    "projection": lambda: kernels_projection.rows(
        ("fp8", "int8", "bf16"), ((8192, 2048), (2048, 2048)), (1, 8, 64), ("none",)
    ),
    "lm_head": lambda: kernels_projection.rows(
        ("bf16",), (kernels_projection.HEAD,), (1, 64), ("none",)
    ),
    "decode attention": lambda: kernels_attention.rows(CACHES),
    "prefill": kernels_prefill.rows,
    "norm": lambda: kernels_norm.rows((1, 64, 4096)),
    "sample": lambda: kernels_sample.rows((1, 128)),
}
"""Name to what measures it; linear attention comes last: its reference is imported meanwhile."""
FLA_FAMILY = "linear attention"


def cells(row: Row) -> list[str]:
    """Return a row of the table; `reference us` may be missing."""
    unit = "TB/s" if "TB/s" in row else "TFLOP/s"
    theirs = row.get("reference us")
    return [
        str(row["op"]),
        str(row["shape"]),
        f"{row['us']:.1f}",
        f"{row[unit]:.{2 if unit == 'TB/s' else 0}f} {unit}",
        f"{row['fraction']:.0%}",
        "" if theirs is None else f"{theirs:.1f}",
    ]


class Table:
    """Rows of one run, and what was left out of it."""

    def __init__(self, *, docs: bool, seconds: float) -> None:
        self._docs, self._seconds = docs, seconds
        self._start = time.monotonic()
        self._rows: list[list[str]] = []
        self._left_out: list[str] = []

    def left(self) -> float:
        """Return the seconds left."""
        return self._seconds - (time.monotonic() - self._start)

    def measure(self, name: str, rows: Callable[[], Iterable[Row]]) -> None:
        """Add a family; one that is wrong or comes too late is named."""
        if self.left() < 0:
            self._left_out.append(f"{name} (no time)")
            return
        start, mine = time.monotonic(), []
        try:
            for row in rows():
                mine.append(cells(row))
                print("  ".join(mine[-1]), flush=True)
        except (AssertionError, RingExportError, RuntimeError) as error:
            self._left_out.append(f"{name} ({error})")
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        print(f"[{name}: {time.monotonic() - start:.1f} s]", flush=True)
        self._rows += mine
        if self._docs:
            replace("performance.md", "gpu-kernels", self.text())

    def text(self) -> str:
        """Return conditions and table."""
        taken = time.monotonic() - self._start
        where = conditions(["flash-linear-attention"])
        lead = f"Measured in one run of {taken:.0f} s: {where}."
        if self._left_out:
            lead += f" Left out: {', '.join(self._left_out)}."
        return f"{lead}\n\n{markdown(HEADER, self._rows)}"

    @property
    def complete(self) -> bool:
        """Whether all families were measured."""
        return not self._left_out


def main() -> int:
    """Measure; 1 if a family is missing."""
    names = [*FAMILIES, FLA_FAMILY]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md")
    parser.add_argument(
        "--seconds", type=float, default=60, help="families that begin later are left out"
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    options = parser.parse_args()
    reference = Reference() if FLA_FAMILY in options.only else None
    table = Table(docs=options.docs, seconds=options.seconds)
    for name, rows in FAMILIES.items():
        if name in options.only:
            table.measure(name, rows)
    if reference is not None:
        table.measure(
            FLA_FAMILY,
            lambda: kernels_linear_attention.rows(LINEAR, reference, max(5.0, table.left())),
        )
        reference.close()
    print(table.text())
    return int(not table.complete)


if __name__ == "__main__":
    sys.exit(main())
