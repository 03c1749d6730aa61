"""The kernels of plugins/ as functions of torch tensors, launched on the current stream.

Shapes as in plugins/include/ringkernels; N tokens or rows, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringexport.kernels.library import DType, KernelCall, KernelLibrary
from ringexport.runtime.backends.cuda.weights import DeviceMatrix

__all__ = ["Activations", "Kernels", "Rotary"]

_DTYPES = {
    torch.float32: DType.FLOAT32,
    torch.float16: DType.FLOAT16,
    torch.bfloat16: DType.BFLOAT16,
    torch.float8_e4m3fn: DType.FP8_E4M3,
    torch.int8: DType.INT8,
}
_BLOCK = 128
_WORKSPACE_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class Activations:
    """The input of a product: bf16, or 8-bit codes with the scales of their tokens, or both."""

    values: Tensor | None
    codes: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """Tables [positions, rotary_dim / 2] fp32 of the whole context."""

    cos: Tensor
    sin: Tensor

    @property
    def dim(self) -> int:
        """Rotated dimensions of a head."""
        return 2 * self.cos.shape[1]


class Kernels:
    """Launches kernels; owns the workspaces, which kernels leave zeroed.

    Args:
        library: the loaded kernel library.
        device: of all tensors.
        norm_eps: of all norms.
        chained: kernels may start before the one before them has ended, and wait inside.

    Attributes:
        launches: so far.
        before_launch: told op and fields of each launch, to see which layer it belongs to.
    """

    def __init__(
        self, library: KernelLibrary, device: torch.device, norm_eps: float, *, chained: bool = True
    ) -> None:
        self._library = library
        self._device = device
        self._common = {"programmatic_launch": int(chained)}
        self._eps = norm_eps
        self._workspaces: dict[str, Tensor] = {}
        self._retired: list[Tensor] = []
        self.launches = 0
        self.before_launch: Callable[[str, dict[str, Any]], None] | None = None

    def launch(self, op: str, **fields: Any) -> None:
        """Launch an op with its workspace, if it needs one."""
        if self.before_launch is not None:
            self.before_launch(op, fields)
        fields |= self._common
        if op in _WITH_WORKSPACE:
            self._add_workspace(op, fields)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        KernelCall(self._library, op, fields).launch(stream)
        self.launches += 1

    def _add_workspace(self, op: str, fields: dict[str, Any]) -> None:
        size = self._library.workspace_bytes(op, **fields)
        if not size:
            return
        held = self._workspaces.get(op)
        if held is None or held.nbytes < size:
            size = -(-size // _WORKSPACE_STEP) * _WORKSPACE_STEP
            held = torch.zeros(size, dtype=torch.uint8, device=self._device)
            # A captured graph may still use the smaller one.
            self._retired += [self._workspaces[op]] if op in self._workspaces else []
            self._workspaces[op] = held
        fields |= {"workspace": held, "workspace_bytes": held.nbytes}

    def reserve(self, op: str, **fields: Any) -> None:
        """Make the workspace of an op now: memory must not move once a graph has captured it."""
        self._add_workspace(op, fields)

    def rms_norm(
        self,
        residual: Tensor,
        weight: Tensor,
        *,
        matrix: DeviceMatrix | None,
        delta: Tensor | None = None,
        keep_values: bool = False,
    ) -> Activations:
        """Add `delta` [N, D] to `residual` [N, D] fp32 in place, and norm it for `matrix`.

        Args:
            residual: fp32.
            weight: [D] fp32.
            matrix: what will read it: decides the format; None for bf16 alone.
            delta: bf16, or None.
            keep_values: return bf16 values too, where codes are made.
        """
        rows, columns = residual.shape
        out = self._activations(rows, columns, matrix, keep_values=keep_values)
        self.launch(
            "rms_norm",
            delta=delta if delta is not None else 0,
            residual=residual,
            weight=weight,
            rows=rows,
            columns=columns,
            eps=self._eps,
            dtype=DType.BFLOAT16,
            residual_dtype=DType.FLOAT32,
            **_outputs(out, matrix),
        )
        return out

    def group_norm_gate(
        self, values: Tensor, gate: Tensor, weight: Tensor, groups: int, matrix: DeviceMatrix
    ) -> Activations:
        """Norm the attention output [N, C] in groups, times sigmoid(gate [N, C])."""
        rows, columns = values.shape
        out = self._activations(rows, columns, matrix)
        self.launch(
            "group_norm_gate",
            input=values,
            gate=gate,
            weight=weight,
            input_row_stride=values.stride(0),
            gate_row_stride=gate.stride(0),
            rows=rows,
            columns=columns,
            num_norm_groups=groups,
            eps=self._eps,
            dtype=DType.BFLOAT16,
            **_outputs(out, matrix),
        )
        return out

    def quantize(self, values: Tensor, matrix: DeviceMatrix) -> Activations:
        """Return values [N, C] bf16 in the format of `matrix`."""
        if matrix.format.number_format is None:
            return Activations(values)
        rows, columns = values.shape
        out = self._activations(rows, columns, matrix)
        fields = _outputs(out, matrix)
        fields.pop("output", None)
        self.launch(
            "quantize",
            input=values,
            input_row_stride=values.stride(0),
            rows=rows,
            columns=columns,
            dtype=DType.BFLOAT16,
            **fields,
        )
        return out

    def project(
        self,
        source: Activations,
        matrix: DeviceMatrix,
        out: Tensor,
        *,
        accumulate: bool = False,
        **prologue: Any,
    ) -> None:
        """Write (or add) source x matrix^T to `out` [M <= 64, N]; the small-M kernel.

        Args:
            source: codes of the matrix's format, or bf16 (or the fp32 residual for a prologue).
            matrix: [N, K].
            out: fp32 or bf16.
            accumulate: add to `out`.
            prologue: `prologue`, `norm_weight`, `gate`, ... of a fused norm.
        """
        values = source.codes if source.codes is not None else source.values
        assert values is not None
        n, k = matrix.values.shape
        self.launch(
            "projection",
            input=values,
            input_scale=source.scale if source.codes is not None else 0,
            weight=matrix.values,
            weight_scale=matrix.scale if matrix.scale is not None else 0,
            output=out,
            input_row_stride=values.stride(0),
            output_row_stride=out.stride(0),
            m=values.shape[0],
            n=n,
            k=k,
            norm_eps=self._eps,
            input_dtype=_DTYPES[values.dtype],
            weight_dtype=matrix.dtype,
            output_dtype=_DTYPES[out.dtype],
            weight_scale_kind=matrix.scale_kind,
            accumulate=int(accumulate),
            **prologue,
        )

    def _activations(
        self, rows: int, columns: int, matrix: DeviceMatrix | None, *, keep_values: bool = False
    ) -> Activations:
        """Allocate what a norm writes for `matrix`."""
        device, values = self._device, None
        quantized = matrix is not None and matrix.format.number_format is not None
        if keep_values or not quantized:
            values = torch.empty((rows, columns), dtype=torch.bfloat16, device=device)
        if matrix is None or not quantized:
            return Activations(values)
        codes = torch.empty((rows, columns), dtype=matrix.torch_dtype, device=device)
        shape = (rows, -(-columns // _BLOCK)) if matrix.format.block else (rows,)
        return Activations(values, codes, torch.empty(shape, dtype=torch.float32, device=device))


_WITH_WORKSPACE = {
    "attention_decode",
    "experts",
    "linear_attention_prefill",
    "projection",
    "router",
    "sample",
}


def _outputs(out: Activations, matrix: DeviceMatrix | None) -> dict[str, Any]:
    """Return the output fields of a norm."""
    fields: dict[str, Any] = {} if out.values is None else {"output": out.values}
    if out.codes is not None and matrix is not None:
        fields |= {
            "quantized": out.codes,
            "scale": out.scale,
            "quantized_dtype": matrix.dtype,
            "scale_kind": matrix.scale_kind,
        }
    return fields
