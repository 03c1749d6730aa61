"""onnxruntime:cuda at Ring-mini's size on the same random weights as the fast engine, in bf16.

The graph is the one that a build writes; its weights are those of the engine, on the GPU, so that
neither a checkpoint nor a bundle of that size has to be written. The residual stream behind the
first layers is compared with the fp32 layers of the project.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch_model import TorchModel
from torch_reference import Truth

from ringexport.checkpoint import RingConfig
from ringexport.checkpoint.names import expected_tensors
from ringexport.graph.export import GRAPH_FILE, PROBE_FILE, WEIGHTS_FILE
from ringexport.graph.initializers import ComputeDtype, LazyInitializer
from ringexport.graph.lower_cuda import lower_cuda
from ringexport.graph.lower_ort import lower_ort
from ringexport.graph.network import build_network
from ringexport.graph.save import INLINE_BYTES
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.runtime.backends.ort_cuda import OrtCudaRunner
from ringexport.runtime.backends.ort_session import (
    OrtOptions,
    onnxruntime,
    preload_libraries,
    run_bound,
)

CHECKED_LAYERS = 4
"""Behind so few layers a changed expert has not yet spread to most tokens."""
LARGEST_ERROR = 0.05


class Shapes:
    """The shapes of a checkpoint that does not exist, as the graph asks for them."""

    def __init__(self, config: RingConfig) -> None:
        self.config = config
        self.schemes: dict[str, object] = {}
        self.info = expected_tensors(config).__getitem__


VECTORS = {
    "embedding": "embedding",
    "head.norm.weight": "final_norm",
    "input_norm.weight": "input_norm",
    "mlp_norm.weight": "mlp_norm",
    "attention.query_norm.weight": "attention.query_norm",
    "attention.key_norm.weight": "attention.key_norm",
    "attention.group_norm.weight": "attention.output_norm",
    "mlp.router.expert_bias": "router_bias",
    "mlp.experts.gate_up_proj": "experts.gate_up",
    "mlp.experts.down_proj": "experts.down",
}
"""Initializers of the graph, below a layer's prefix, that are as the engine has them."""
MATRICES = {
    "lm_head": "lm_head",
    "mlp.router.weight": "router",
    "attention.out_proj": "attention.output",
}
"""Those that are transposed."""


def graph_tensor(weights: DeviceWeights, name: str) -> Tensor:
    """Return the tensor of a graph's initializer, in the graph's layout."""
    prefix, rest, layer = "", name, -1
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        prefix, layer = f"layers.{number}.", int(number)
    if rest in VECTORS:
        return weights[prefix + VECTORS[rest]]
    if rest in MATRICES:
        return weights[prefix + MATRICES[rest]].t()
    part = rest.rpartition(".")[2]
    if rest.startswith("attention."):
        config = weights.config
        kv = config.linear_dim if config.is_linear_layer(layer) else config.kv_dim
        parts = ("query_proj", "key_proj", "value_proj", "output_gate_proj")
        sizes = (config.linear_dim, kv, kv, config.linear_dim)
        index = parts.index(part)
        start = sum(sizes[:index])
        return weights[prefix + "attention.input"][start : start + sizes[index]].t()
    unit = "shared" if "shared_experts" in rest else "experts"
    matrix = weights[f"{prefix}{unit}.{'down' if part == 'down_proj' else 'gate_up'}"]
    matrix = matrix[0] if matrix.dim() == 3 else matrix  # a dense MLP is a layer of one expert
    if part != "down_proj":
        matrix = matrix[("gate_proj", "up_proj").index(part) :: 2]
    return matrix.t()


def described(
    weights: DeviceWeights, one: LazyInitializer, values: dict[str, Any]
) -> onnx.TensorProto:
    """Describe an initializer; a large one goes to `values`, in the memory where it is."""
    if one.name.startswith(("constants.", "rotary.")):
        return onnx.numpy_helper.from_array(one.to_array(), one.name)
    wide = one.dtype == np.float32
    source = graph_tensor(weights, one.name).to(torch.float32 if wide else torch.bfloat16)
    if tuple(source.shape) != one.shape:
        raise ValueError(f"{one.name} is {tuple(source.shape)}, expected {one.shape}")
    if one.nbytes <= INLINE_BYTES:
        return onnx.numpy_helper.from_array(
            source.float().cpu().numpy().astype(one.dtype), one.name
        )
    values[one.name] = onnxruntime.OrtValue.from_dlpack(source.contiguous())
    tensor = onnx.TensorProto(
        name=one.name,
        dims=one.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(one.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, entry in {"location": WEIGHTS_FILE, "offset": 0, "length": one.nbytes}.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def open_random(weights: DeviceWeights, directory: Path, *, cuda_graph: bool) -> OrtCudaRunner:
    """Open the runner over the graph of a build, with weights that are on the GPU already."""
    preload_libraries()
    shapes: Any = Shapes(weights.config)
    network = build_network(weights.config, shapes, dtype=ComputeDtype.BF16)
    values: dict[str, Any] = {}
    tensors = [described(weights, one, values) for one in network.builder.weights]
    with (directory / WEIGHTS_FILE).open("wb") as file:  # a hole, which is never read
        file.truncate(max(one.nbytes for one in network.builder.weights))
    for name, with_probes in ((GRAPH_FILE, False), (PROBE_FILE, True)):
        model = lower_cuda(lower_ort(network, tensors, with_probes=with_probes))
        (directory / name).write_bytes(model.SerializeToString())
    return OrtCudaRunner(
        directory,
        context_length=weights.config.context_length,
        model_digest=str,
        options=OrtOptions(provider="cuda", cuda_graph=cuda_graph),
        initializers=values,
    )


def check(runner: OrtCudaRunner, weights: DeviceWeights) -> None:
    """Stop unless the first layers agree with the fp32 layers of the project."""
    batch, length = 1, 50
    model = TorchModel(weights, capacity=64)
    ids = torch.randint(0, weights.config.vocab_size, (batch * length,), device="cuda")
    found = runner.probe(ids.view(batch, length).cpu().numpy(), None, runner.new_state(batch))
    exact, hidden = Truth(model, batch), weights["embedding"][ids].float()
    errors = []
    for layer in range(CHECKED_LAYERS):
        after = exact.layer(layer, hidden, length)
        got = torch.from_numpy(found[f"hidden.{layer}"]).cuda().view_as(after)
        error = (got - after).norm(dim=-1) / (after - hidden).norm(dim=-1)
        errors.append(round(error.median().item(), 4))
        hidden = after
    print(f"relative errors of the first layers: {errors}", flush=True)
    if not max(errors) < LARGEST_ERROR:
        sys.exit(f"no speed is reported: relative errors {errors}")


def time_decode(runner: OrtCudaRunner, batch: int, context: int) -> float:
    """Return seconds a step; ids and logits stay on the GPU, as those of the others do.

    The caches are empty: what they hold does not change how long it takes to read them.
    """
    state = runner.new_state(batch)
    state.reserve(context + 64)
    state.position[:] = context
    tokens = np.random.default_rng(0).integers(0, runner.spec.vocab_size, batch)
    runner.decode(tokens, state)
    call = runner._decode_call(state, slice(0, batch))  # noqa: SLF001 - without the copies
    times = []
    for _ in range(24):
        begin = time.perf_counter()
        run_bound(call.session, call.binding, call.graph_id)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[4:])
