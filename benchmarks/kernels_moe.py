"""Router and experts at the shape of Ring-mini: time and fraction of the limit, checked first."""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import median_us, print_rows, rotating
from ringexport.kernels.library import DType, KernelCall
from tests.kernels.moe_cases import EPS, Experts, normed, symmetric_difference
from tests.kernels.support import library, workspace

__all__ = ["rows"]

HIDDEN, EXPERTS, WIDTH, TOP_K = 2048, 256, 512, 8
READ_TB_S = 4.59
FP32_TFLOP_S = 60.0
ROUTING: dict[str, Any] = {
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "n_group": 8,
    "topk_group": 4,
    "normalize": 1,
    "routed_scaling_factor": 2.5,
}
EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUTER_TOKENS = (1, 8, 16, 64, 256, 1024, 4096)
FORMATS = ("fp8-channel", "fp8-block", "int8-channel", "bf16-none")


def _router_activations(tokens: int, *, norm: bool) -> dict[str, Any]:
    fields = ROUTING | {
        "hidden": torch.randn(
            tokens, HIDDEN, device="cuda", dtype=torch.float32 if norm else torch.bfloat16
        ),
        "hidden_dtype": DType.FLOAT32 if norm else DType.BFLOAT16,
        "tokens": tokens,
        "hidden_size": HIDDEN,
        "expert_ids": torch.empty(tokens, TOP_K, dtype=torch.int32, device="cuda"),
        "norm_eps": EPS,
        "routing_weights": torch.empty(tokens, TOP_K, device="cuda"),
        "programmatic_launch": 1,
    }
    return fields | workspace("router", **fields)


def _router_calls(tokens: int, *, norm: bool, cold: bool = False) -> list[KernelCall]:
    """Return a call for each of many layers, whose weights no cache holds.

    As in an engine the hidden state is in the L2 and the workspace serves all layers; `cold`: they
    are in no cache either.
    """
    activations = _router_activations(tokens, norm=norm)
    calls = []
    for _ in range(rotating(EXPERTS * HIDDEN * 4) if tokens < 1024 else 4):
        fields = activations | {
            "router_weight": torch.randn(EXPERTS, HIDDEN, device="cuda") * HIDDEN**-0.5,
            "expert_bias": torch.randn(EXPERTS, device="cuda") * 0.1,
        }
        if norm:
            fields["norm_weight"] = torch.rand(HIDDEN, device="cuda") + 0.5
        calls.append(library().call("router", **fields))
        if cold:
            activations = _router_activations(tokens, norm=norm)
    return calls


def _launch_all(calls: list[KernelCall]) -> list[Any]:
    return [
        lambda call=call: call.launch(torch.cuda.current_stream().cuda_stream) for call in calls
    ]


def _router_rows(tokens_timed: Iterable[int]) -> Iterator[dict[str, Any]]:
    for tokens in tokens_timed:
        norm = tokens <= 8
        yield _router_row(f"{tokens:,} tokens", tokens, _router_calls(tokens, norm=norm))
        if tokens == 1:
            calls = _router_calls(tokens, norm=norm, cold=True)
            yield _router_row("1 tokens, hidden state in no cache", tokens, calls)


def _router_row(shape: str, tokens: int, calls: list[KernelCall]) -> dict[str, Any]:
    us = median_us(_launch_all(calls))
    flop, nbytes = 2 * tokens * EXPERTS * HIDDEN, 4 * EXPERTS * HIDDEN
    rate, products = nbytes / us / 1e6, flop / us / 1e6
    by_bytes = rate / READ_TB_S > products / FP32_TFLOP_S
    return {
        "op": "router",
        "shape": shape,
        "us": us,
        **({"TB/s": rate} if by_bytes else {"TFLOP/s": products}),
        "fraction": max(rate / READ_TB_S, products / FP32_TFLOP_S),
    }


class _ExpertsBench:
    """One layer in memory, and calls on it with rotating experts."""

    def __init__(self, weight_format: str, kind: str) -> None:
        self.layer = Experts.make(
            experts=EXPERTS,
            hidden=HIDDEN,
            width=WIDTH,
            shared=WIDTH,
            weight_format=weight_format,
            kind=kind,
        )
        self.kind, self.dtype = kind, torch.float16 if weight_format == "fp16" else torch.bfloat16
        self.copies = [self._shared_copy() for _ in range(16)]

    def _shared_copy(self) -> dict[str, Tensor]:
        names = ("shared_gate_up", "shared_down")
        return {
            name: value.clone()
            for name, value in self.layer.fields().items()
            if name in names and isinstance(value, Tensor)
        }

    def call(
        self, tokens: int, step: int, order: Tensor, *, shared: bool
    ) -> tuple[KernelCall, dict[str, Any]]:
        """Return the call of one step; small batches take their experts off a rotating order."""
        generator = torch.Generator("cuda").manual_seed(step)
        if tokens == 1:
            ids = order.roll(-step * TOP_K)[None, :TOP_K]
        else:
            ids = torch.rand(tokens, EXPERTS, device="cuda", generator=generator).argsort(-1)[
                :, :TOP_K
            ]
        residual = torch.randn(tokens, HIDDEN, device="cuda", generator=generator)
        fields: dict[str, Any] = (
            self.layer.fields()
            | self.copies[step % len(self.copies)]
            | {
                "hidden": residual,
                "norm_weight": torch.ones(HIDDEN, device="cuda"),
                "norm_eps": EPS,
                "expert_ids": ids.int().contiguous(),
                "routing_weights": torch.rand(tokens, TOP_K, device="cuda", generator=generator),
                "output": torch.empty(tokens, HIDDEN, device="cuda"),
                "tokens": tokens,
                "top_k": TOP_K,
                "dtype": DType.FLOAT16 if self.dtype == torch.float16 else DType.BFLOAT16,
                "output_dtype": DType.FLOAT32,
                "programmatic_launch": 1,
            }
        )
        if not shared:
            for name in (
                "shared_gate_up",
                "shared_down",
                "shared_gate_up_scale",
                "shared_down_scale",
                "shared_intermediate_size",
            ):
                fields.pop(name, None)
        return library().call("experts", **fields, **workspace("experts", **fields)), fields

    def check(self, tokens: int) -> float:
        """Return the symmetric difference from the fp64 result."""
        call, fields = self.call(tokens, 0, torch.arange(EXPERTS, device="cuda"), shared=True)
        call.launch(torch.cuda.current_stream().cuda_stream)
        inputs = normed(fields["hidden"], fields["norm_weight"])
        inputs = inputs.to(self.dtype) if self.kind == "none" else inputs
        truth = self.layer.expected(inputs, fields["expert_ids"], fields["routing_weights"])
        return symmetric_difference(fields["output"], truth)

    def row(self, tokens: int, *, shared: bool) -> dict[str, Any]:
        """Time one batch size."""
        order = torch.randperm(EXPERTS, device="cuda")
        steps = EXPERTS // TOP_K if tokens == 1 else 8 if tokens <= 8 else 3
        calls = [self.call(tokens, step, order, shared=shared) for step in range(steps)]
        us = median_us(_launch_all([call for call, _ in calls]), replays=5)
        distinct = sum(len(fields["expert_ids"].unique()) for _, fields in calls) / steps
        nbytes = (distinct + shared) * 3 * HIDDEN * WIDTH * self.layer.gate_up.codes.element_size()
        rate = nbytes / us / 1e6
        return {
            "op": f"experts {self.layer.weight_format} {self.kind}",
            "shape": f"{tokens:,} tokens{'' if shared else ', no shared expert'}",
            "us": us,
            "MB": nbytes / 1e6,
            "TB/s": rate,
            "fraction": rate / READ_TB_S,
        }


def _experts_rows(formats: Iterable[str], tokens: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for name in formats:
        weight_format, kind = name.split("-")
        bench = _ExpertsBench(weight_format, kind)
        for count in {1, 8, 64, 256} & set(tokens):
            difference = bench.check(count)
            if not difference <= (1e-5 if kind == "none" else 1e-6):
                raise AssertionError(f"experts {name}, {count} tokens: wrong by {difference}")
        for count in tokens:
            yield bench.row(count, shared=True)
        del bench
        torch.cuda.empty_cache()


def rows(
    formats: Iterable[str] = FORMATS,
    tokens: tuple[int, ...] = EXPERT_TOKENS,
    router_tokens: Iterable[int] = ROUTER_TOKENS,
) -> Iterator[dict[str, Any]]:
    """Yield op, shape, us, and rates; AssertionError for a result that is wrong."""
    yield from _router_rows(router_tokens)
    yield from _experts_rows(formats, tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--tokens", nargs="*", type=int, default=EXPERT_TOKENS)
    arguments = parser.parse_args()
    print_rows(rows(arguments.formats, tuple(arguments.tokens)))
