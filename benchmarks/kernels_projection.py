"""Time the small-M projection at Ring-mini's shapes beside torch, as parts of the read rate.

    python benchmarks/kernels_projection.py

Every result is compared with the product of the dequantized operands before it is timed.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import median_us, print_rows, rotating
from ringexport.kernels.library import DType, KernelCall, KernelLibrary, Prologue, ScaleKind
from ringexport.settings import load_settings

READ_TBPS = 4.59  # pure reads, measured on the H200
SHAPES = ((8192, 2048), (2048, 2048), (3072, 2048), (5120, 2048), (2048, 5120))
HEAD = (157184, 2048)
TOKENS = (1, 2, 4, 8, 16, 32, 64)
STEPS_TIMED = 200
LONG_BYTES = 64 << 20  # weights that take longer than a graph's launch
PROLOGUES = {"none": Prologue.NONE, "norm": Prologue.RMS_NORM}
FORMATS = {
    "fp8": (torch.float8_e4m3fn, DType.FP8_E4M3),
    "int8": (torch.int8, DType.INT8),
    "bf16": (torch.bfloat16, DType.BFLOAT16),
}


class Problem:
    """One shape in one format; as many weights as it takes to leave the L2 cache."""

    def __init__(self, library: KernelLibrary, name: str, n: int, k: int) -> None:
        """Make weights [n, k]."""
        self._library = library
        self.name, self.n, self.k = name, n, k
        self.torch_dtype, self._dtype = FORMATS[name]
        self.nbytes = n * k * self.torch_dtype.itemsize
        self.weights = [self._weight() for _ in range(rotating(self.nbytes))]
        self.scale = torch.rand(n, device="cuda") * 0.01 + 0.001

    def _weight(self) -> Tensor:
        if self.name == "int8":
            return torch.randint(-127, 128, (self.n, self.k), device="cuda", dtype=torch.int8)
        return torch.randn(self.n, self.k, device="cuda", dtype=torch.bfloat16).to(self.torch_dtype)

    def calls(self, m: int, prologue: str, programmatic: int) -> tuple[list[KernelCall], Tensor]:
        """Return one call per weight, and the output of all."""
        quantized = self.name != "bf16"
        output = torch.empty(m, self.n, device="cuda", dtype=torch.bfloat16)
        fields: dict[str, Any] = {
            "weight_scale": self.scale,
            "output": output,
            "input_row_stride": self.k,
            "output_row_stride": self.n,
            "m": m,
            "n": self.n,
            "k": self.k,
            "weight_dtype": self._dtype,
            "output_dtype": DType.BFLOAT16,
            "weight_scale_kind": ScaleKind.CHANNEL if quantized else ScaleKind.NONE,
            "prologue": PROLOGUES[prologue],
            "norm_eps": 1e-6,
            "programmatic_launch": programmatic,
        }
        self.token_scale = torch.full((m, 1), 0.01, device="cuda")
        if prologue == "norm":
            self.input = torch.randn(m, self.k, device="cuda")
            fields |= {"input_dtype": DType.FLOAT32}
            fields |= {"norm_weight": torch.ones(self.k, device="cuda")}
        else:
            self.input = torch.randn(m, self.k, device="cuda") * (30 if quantized else 1)
            self.input = self.input.to(self.torch_dtype)
            fields |= {"input_dtype": self._dtype, "input_scale": self.token_scale}
        fields["input"] = self.input
        calls = [self._library.call("projection", weight=w, **fields) for w in self.weights]
        return calls, output

    def check(self, call: KernelCall, output: Tensor, prologue: str) -> None:
        """Compare with torch; the norm's quantization is followed to its rounding."""
        x = self.input.float()
        if prologue == "norm":
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        elif self.name != "bf16":
            x = x * self.token_scale
        weight = self.weights[0].float()
        if self.name != "bf16":
            weight = weight * self.scale[:, None]
        output.fill_(float("nan"))
        call.launch(torch.cuda.current_stream().cuda_stream)
        truth = x @ weight.T
        error = ((output.float() - truth).norm() / truth.norm()).item()
        if not error < (0.04 if prologue == "norm" else 0.004):
            sys.exit(f"{self.name} {self.n} x {self.k}: the result is wrong by {error}")

    def torch_steps(self, m: int) -> list[Callable[[], object]]:
        """Return torch's product with each weight: what an engine without this kernel calls."""
        if self.name == "bf16":
            x = torch.randn(m, self.k, device="cuda", dtype=torch.bfloat16)
            return [functools.partial(torch.mm, x, w.T) for w in self.weights]
        if self.name == "int8":
            return []
        x = torch.randn(m, self.k, device="cuda").to(self.torch_dtype)
        scales = torch.ones(m, 1, device="cuda"), self.scale[None]
        return [
            functools.partial(
                torch._scaled_mm,  # noqa: SLF001
                x,
                w.T,
                *scales,
                out_dtype=torch.bfloat16,
            )
            for w in self.weights
        ]


def step_us(steps: list[Callable[[], object]], nbytes: int) -> float:
    """Return microseconds of a step in a graph so long that its launch does not count."""
    count = 8 if nbytes > LONG_BYTES else STEPS_TIMED
    return median_us(steps * -(-count // len(steps)), replays=2)


def measure(problem: Problem, m: int, prologues: Iterable[str]) -> dict[str, Any]:
    """Return one row of the table; `prologues` has "none"."""
    row: dict[str, Any] = {
        "op": ("lm_head " if problem.n == HEAD[0] else "projection ") + problem.name,
        "shape": f"{m} x {problem.k} to {problem.n}",
    }

    def launches(calls: list[KernelCall]) -> Callable[[int], Callable[[], None]]:
        return lambda i: lambda: calls[i].launch(torch.cuda.current_stream().cuda_stream)

    for prologue in prologues:
        for programmatic in (0, 1):
            calls, output = problem.calls(m, prologue, programmatic)
            problem.check(calls[0], output, prologue)
            step = launches(calls)
            us = step_us([step(i) for i in range(len(calls))], problem.nbytes)
            row[f"{prologue}{' pdl' if programmatic else ''}"] = us
    row["us"] = best = row["none pdl"]
    row["TB/s"] = problem.nbytes / best / 1e6
    row["fraction"] = row["TB/s"] / READ_TBPS
    steps = problem.torch_steps(m)
    if steps:
        row["reference us"] = step_us(steps, problem.nbytes)
    return row


def rows(
    formats: tuple[str, ...] = ("fp8", "int8", "bf16"),
    shapes: tuple[tuple[int, int], ...] = (*SHAPES, HEAD),
    tokens: tuple[int, ...] = TOKENS,
    prologues: Iterable[str] = tuple(PROLOGUES),
) -> Iterator[dict[str, Any]]:
    """Measure all of it."""
    settings = load_settings()
    if settings.kernel_library is None:
        sys.exit("set RINGEXPORT_KERNEL_LIBRARY to the library to measure")
    library = KernelLibrary.open(settings.kernel_library)
    for name in formats:
        for n, k in shapes:
            if name == "int8" and (n, k) == HEAD:
                continue
            problem = Problem(library, name, n, k)
            yield from (measure(problem, m, prologues) for m in tokens)
            del problem


if __name__ == "__main__":
    print_rows(rows())
