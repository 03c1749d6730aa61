"""Stream the weights of a graph to one external data file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from ringexport.errors import GraphError
from ringexport.graph.initializers import LazyInitializer

__all__ = ["INLINE_BYTES", "write_weights"]

INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph: shapes must be visible to shape inference."""

ALIGNMENT = 4096
"""Offsets of external tensors, so that runtimes can map them."""


def write_weights(
    weights: list[LazyInitializer],
    path: Path,
    advance: Callable[[int], None],
) -> list[onnx.TensorProto]:
    """Write all large weights to `path`, one chunk at a time, and describe each of them.

    Args:
        weights: of the graph.
        path: file to create; the graph refers to it by its name, beside the graph.
        advance: called with the number of bytes after each chunk.

    Returns:
        One TensorProto per weight: inline up to INLINE_BYTES, else a reference into the file.

    Raises:
        GraphError: the chunks of a weight do not add up to its shape.
        OSError: the file cannot be written.
    """
    tensors = []
    with path.open("wb") as file:
        for weight in weights:
            if weight.nbytes <= INLINE_BYTES:
                tensors.append(onnx.numpy_helper.from_array(weight.to_array(), weight.name))
                continue
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.truncate(offset)
            file.seek(offset)
            for chunk in weight.chunks():
                if chunk.dtype != weight.dtype:
                    msg = f"weight {weight.name} yields {chunk.dtype}, expected {weight.dtype}"
                    raise GraphError(msg)
                file.write(np.ascontiguousarray(chunk).view(np.uint8).data)
                advance(chunk.nbytes)
            written = file.tell() - offset
            if written != weight.nbytes:
                msg = f"weight {weight.name} has {written} bytes, expected {weight.nbytes}"
                raise GraphError(msg)
            tensors.append(_external(weight, path.name, offset))
    return tensors


def _external(weight: LazyInitializer, location: str, offset: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name=weight.name,
        dims=weight.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(weight.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    values = {"location": location, "offset": offset, "length": weight.nbytes}
    for key, value in values.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
