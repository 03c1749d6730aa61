"""Experts of one Ring-mini layer for many tokens: TFLOP/s, all launches included."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from benchmarks.gpu_timing import median_us, print_rows
from ringexport.kernels.library import KernelCall, ScaleKind
from tests.kernels.support import DTYPES, library, workspace

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 512, 256, 8
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
READ_RATE = 4.59e12
FORMATS = {
    "fp8 channel": (torch.float8_e4m3fn, ScaleKind.CHANNEL),
    "int8 channel": (torch.int8, ScaleKind.CHANNEL),
    "fp8 block128": (torch.float8_e4m3fn, ScaleKind.BLOCK128),
    "bf16": (torch.bfloat16, ScaleKind.NONE),
}
DENSE_PEAK = {torch.float8_e4m3fn: 1500e12, torch.int8: 1500e12, torch.bfloat16: 790e12}


def codes(rows: int, columns: int, dtype: torch.dtype, groups: int) -> torch.Tensor:
    """Random weights [groups, rows, columns] of about unit gain after their scales."""
    shape = (groups, rows, columns)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
    values = torch.empty(shape, device="cuda", dtype=dtype)
    for group in values:
        noise = torch.randn(rows, columns, device="cuda")
        group.copy_(
            (noise * columns**-0.5).to(dtype)
            if dtype == torch.bfloat16
            else (noise * 100).clamp(-448, 448).to(dtype)
        )
    return values


def scales(
    rows: int, columns: int, dtype: torch.dtype, kind: int, parts: int, groups: int
) -> torch.Tensor | int:
    """Return scales that undo the size of `codes`."""
    if kind == ScaleKind.NONE:
        return 0
    gain = columns**-0.5 / (73 if dtype == torch.int8 else 100)
    shape = (groups, rows)
    if kind == ScaleKind.BLOCK128:
        shape = (groups, parts, -(-rows // parts // 128), -(-columns // 128))
    return torch.full(shape, gain, device="cuda")


class Layer:
    """Weights of one layer; `call` makes a launch for N tokens."""

    def __init__(self, name: str) -> None:
        self.dtype, self.kind = FORMATS[name]
        sizes = {
            "gate_up_proj": (2 * WIDTH, HIDDEN, 2, EXPERTS),
            "down_proj": (HIDDEN, WIDTH, 1, EXPERTS),
            "shared_gate_up": (2 * WIDTH, HIDDEN, 2, 1), "shared_down": (HIDDEN, WIDTH, 1, 1),
        }  # fmt: skip
        names = {"gate_up_proj": "gate_up_scale", "down_proj": "down_scale"}
        self.fields: dict[str, object] = {}
        for field, (rows, columns, parts, groups) in sizes.items():
            self.fields[field] = codes(rows, columns, self.dtype, groups)
            scale = scales(rows, columns, self.dtype, self.kind, parts, groups)
            self.fields[names.get(field, f"{field}_scale")] = scale

    def call(self, tokens: int) -> tuple[KernelCall, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a launch and its hidden, ids and output."""
        hidden = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices.int()
        output = torch.empty(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        fields = self.fields | {
            "hidden": hidden, "expert_ids": ids, "output": output,
            "routing_weights": torch.full((tokens, TOP_K), 1 / TOP_K, device="cuda"),
            "tokens": tokens, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
            "shared_intermediate_size": WIDTH, "num_experts": EXPERTS, "top_k": TOP_K,
            "norm_eps": 1e-6,
            "dtype": DTYPES[torch.bfloat16], "output_dtype": DTYPES[torch.bfloat16],
            "weight_dtype": DTYPES[self.dtype], "scale_kind": self.kind, "programmatic_launch": 1,
        }  # fmt: skip
        fields |= workspace("experts", **fields)
        return library().call("experts", **fields), hidden, ids, output

    def expected(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """One token [D] in fp32 from unrounded inputs."""
        output = torch.zeros(HIDDEN, device="cuda")
        pairs = [(expert, "gate_up_proj", "down_proj", 1 / TOP_K) for expert in ids.tolist()]
        for group, gate_up, down, weight in [*pairs, (0, "shared_gate_up", "shared_down", 1.0)]:
            both = self._real(gate_up, group) @ hidden.float()
            inner = torch.nn.functional.silu(both[0::2]) * both[1::2]
            output += weight * (self._real(down, group) @ inner)
        return output

    def _real(self, field: str, group: int) -> torch.Tensor:
        real = self.fields[field][group].float()  # type: ignore[index]
        if self.kind == ScaleKind.NONE:
            return real
        return real * codes_gain(real.shape[1], self.dtype)


def codes_gain(columns: int, dtype: torch.dtype) -> float:
    """Return the scale of all weights of a width."""
    return columns**-0.5 / (73 if dtype == torch.int8 else 100)


def rows(
    shapes: Mapping[str, Iterable[int]] | None = None,
) -> Iterator[dict[str, object]]:
    """Measure formats and numbers of tokens; AssertionError for a result that is wrong."""
    for name, counts in (shapes or dict.fromkeys(FORMATS, TOKENS)).items():
        layer = Layer(name)
        for tokens in counts:
            call, hidden, ids, output = layer.call(tokens)

            def launch(call: KernelCall = call) -> None:
                call.launch(torch.cuda.current_stream().cuda_stream)

            launch()
            torch.cuda.synchronize()
            wanted = layer.expected(hidden[tokens // 3], ids[tokens // 3])
            error = (output[tokens // 3].float() - wanted).norm().item() / wanted.norm().item()
            if not error < 0.08:
                raise AssertionError(f"{name} N={tokens}: relative error {error}")
            us = median_us([launch], replays=3)
            flop = 6 * tokens * (TOP_K + 1) * HIDDEN * WIDTH
            nbytes = (EXPERTS + 1) * 3 * HIDDEN * WIDTH * layer.dtype.itemsize
            limit = max(flop / DENSE_PEAK[layer.dtype], nbytes / READ_RATE) * 1e6
            rate = flop / us / 1e6
            yield {
                "op": f"experts {name}, prompt",
                "shape": f"{tokens:,} tokens",
                "us": us,
                "TFLOP/s": rate,
                "routed TFLOP/s": rate * TOP_K / (TOP_K + 1),
                "fraction": limit / us,
            }
            del call, hidden, ids, output
        del layer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    print_rows(rows())
