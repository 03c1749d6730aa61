"""Random weights of any published config, made on the GPU: benchmarks without a checkpoint.

Matrices are normal with variance 1 / columns, so that activations keep their size; those that write
to the residual stream are smaller by the root of the number of writes, as in a trained model, so
that what one layer rounds is not what all layers above compute with. Norms are 1 and expert biases
0. The router then sees inputs as diverse as the tokens and chooses all experts about equally
often; a benchmark must still measure that, since a collapsed router makes any engine fast.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ringexport.checkpoint import RingConfig
from ringexport.errors import RingExportError
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.ops.quantization import NumberFormat
from ringexport.packing.layout import MatrixFormat, PackedTensor, matrices, packed_tensors
from ringexport.runtime.backends.cuda.weights import DeviceWeights

__all__ = ["random_weights"]

_SLAB_ELEMENTS = 1 << 25
_SLAB_COPIES = 4
"""In fp32: the values, their magnitudes, the scaled ones, and those before rounding."""
_BLOCK = 128


def random_weights(
    config: RingConfig,
    formats: Mapping[str, MatrixFormat],
    device: torch.device,
    *,
    fp8_cache: bool = False,
    seed: int = 0,
) -> DeviceWeights:
    """Return weights of the given formats, made where they stay.

    Args:
        config: of the model.
        formats: matrix name -> format; what is not named is bf16.
        device: where to.
        fp8_cache: the KV cache is meant to be FP8-E4M3.
        seed: of the values.

    Raises:
        RingExportError: they do not fit into the free memory of the GPU.
    """
    _check_room(config, formats, device)
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    known = {matrix.name: matrix for matrix in matrices(config)}
    for tensor in packed_tensors(config, formats):
        if tensor.name in known:
            fmt = formats.get(tensor.name, MatrixFormat())
            writes = tensor.name.endswith(("attention.output", ".down"))
            size = (2 * config.num_hidden_layers) ** -0.5 if writes else 1.0
            values, scale = _matrix(tensor.shape, fmt, generator, device, size)
            tensors[tensor.name] = values
            if scale is not None:
                tensors[tensor.name + ".scale"] = scale
        elif tensor.name not in tensors:
            tensors[tensor.name] = _vector(config, tensor, generator, device)
    for tensor in packed_tensors(config, formats):  # interleaved block scales have their own shape
        tensors[tensor.name] = tensors[tensor.name].reshape(tensor.shape)
    return DeviceWeights(config, tensors, source="random weights", fp8_cache=fp8_cache)


def _check_room(
    config: RingConfig, formats: Mapping[str, MatrixFormat], device: torch.device
) -> None:
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    needed = sum(tensor.nbytes for tensor in packed_tensors(config, formats))
    needed += _SLAB_COPIES * _SLAB_ELEMENTS * 4
    free = torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise RingExportError(
            f"random weights of this config need {needed / 1e9:.2f} GB of GPU memory, "
            f"{free / 1e9:.2f} GB are free",
            hint="use a recipe of 8 bits, such as fp8-all",
        )


def _vector(
    config: RingConfig, tensor: PackedTensor, generator: torch.Generator, device: torch.device
) -> Tensor:
    name, shape = tensor.name, tensor.shape
    if name == "embedding":
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    if name.endswith(".router"):
        return torch.randn(shape, generator=generator, device=device).mul_(shape[-1] ** -0.5)
    if name.endswith("router_bias"):
        return torch.zeros(shape, device=device)
    if name.endswith("log_decay"):
        layer, layers = int(name.split(".")[1]), config.num_hidden_layers
        table = log_decay(config.num_attention_heads, layer, layers, DecayIndex.SERVING)
        return torch.from_numpy(table).to(device)
    return torch.ones(shape, device=device)


def _matrix(
    shape: tuple[int, ...],
    fmt: MatrixFormat,
    generator: torch.Generator,
    device: torch.device,
    size: float,
) -> tuple[Tensor, Tensor | None]:
    """Return random values and scales, made in slabs of rows to bound the fp32 copies.

    Args:
        shape: of the values.
        fmt: their format.
        generator: on the device.
        device: where to.
        size: standard deviation of the product with an input of 1.
    """
    columns = shape[-1]
    rows = torch.Size(shape).numel() // columns
    fmt_dtype = {NumberFormat.FP8_E4M3: torch.float8_e4m3fn, NumberFormat.INT8: torch.int8}
    dtype = torch.bfloat16 if fmt.number_format is None else fmt_dtype[fmt.number_format]
    values = torch.empty((rows, columns), dtype=dtype, device=device)
    scales = []
    slab_rows = max(_BLOCK, _SLAB_ELEMENTS // columns // _BLOCK * _BLOCK)
    for start in range(0, rows, slab_rows):
        part = values[start : start + slab_rows]
        slab = torch.randn(part.shape, generator=generator, device=device)
        slab *= size * columns**-0.5
        if fmt.number_format is None:
            part.copy_(slab)
            continue
        codes, scale = _quantized(slab, fmt)
        part.copy_(codes)
        scales.append(scale)
    return values.view(shape), torch.cat(scales) if scales else None


def _quantized(slab: Tensor, fmt: MatrixFormat) -> tuple[Tensor, Tensor]:
    rows, columns = slab.shape
    assert fmt.number_format is not None
    tiles = slab.view(rows, 1, 1, columns)
    if fmt.block:
        tiles = slab.view(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
        tiles = tiles.permute(0, 2, 1, 3)
    scale = tiles.abs().amax((-1, -2), keepdim=True) / fmt.number_format.half_range
    codes = tiles / scale
    if fmt.block:
        codes = codes.permute(0, 2, 1, 3)
    codes = codes.reshape(rows, columns)
    if fmt.number_format is NumberFormat.INT8:
        return codes.round().clamp(-128, 127).to(torch.int8), scale.flatten()
    return codes.clamp(-448, 448).to(torch.float8_e4m3fn), scale.flatten()
