"""Torch with flash-linear-attention under CUDA graphs: checked layer by layer, and timed.

Torch gets every advantage: positions are constants of its graph, which reads just the cache it
needs; four steps are one graph; and the fastest of several ways is what counts.
"""

import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from engine_setup import runner_of
from torch import Tensor
from torch_model import (
    ATTENTION_WAYS,
    EXPERT_WAYS,
    TorchModel,
    TorchState,
    forget_tuning,
)

from ringexport.compare.gpu.opening import Gpu
from ringexport.compare.gpu.traffic import expected_experts
from ringexport.model.layers import Step, block, routed_experts
from ringexport.model.linear_attention import plain
from ringexport.model.state import ReferenceState, TokenLayout
from ringexport.runtime.backends.cuda.network import PackedRows
from ringexport.runtime.backends.cuda.weights import DeviceWeights

LARGEST_ERROR = {"bf16": 0.05, "int8": 0.2, "fp8": 0.3, "fp8-all": 0.3}
"""Of what a layer adds, relative; a layer that is wrong is beyond 1. FP8 inputs round by 0.026, and
products of few tokens amplify that."""
WITHOUT_TORCH = frozenset({"int8"})
"""Recipes for which torch has no grouped product."""
LONG_CONTEXT = 16384
"""Beyond it torch's FlashAttention, which does not split a row's cache, loses to two products."""
LEAST_DIVERSE = 0.9
"""Of the experts that even routing would choose; a collapsed one makes any network look fast."""
STEPS = 4
"""Decode steps of one graph: the states come back to where they began once, not in each step."""


def wide_layer(model: TorchModel, layer: int) -> dict[str, Tensor]:
    """Return a layer's tensors in fp32 under the names of ringexport/model/layers.py."""
    config, weights, prefix = model.config, model.weights, f"layers.{layer}."

    def matrix(name: str, *, apart: bool = False) -> Tensor:
        found = model.apart(prefix + name) if apart else weights.matrix(prefix + name)
        wide = found.values.float()
        return wide if found.scale is None else wide * found.scale[..., None]

    source = matrix("attention.input")
    names = {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "mlp_norm",
        "attention.query_layernorm": "attention.query_norm",
        "attention.key_layernorm": "attention.key_norm",
    }
    found = {f"{name}.weight": weights[prefix + mine] for name, mine in names.items()}
    if config.is_linear_layer(layer):
        source, gate = source.split((3 * config.linear_dim, config.linear_dim))
        found["attention.g_proj.weight"] = gate
        found["attention.g_norm.weight"] = weights[prefix + "attention.output_norm"]
        found["log_decay"] = weights[prefix + "attention.log_decay"]
    found["attention.query_key_value.weight"] = source
    found["attention.dense.weight"] = matrix("attention.output")
    experts = "mlp.experts." if config.is_moe_layer(layer) else "mlp."
    parts = {experts: "experts."}
    if config.is_moe_layer(layer):
        parts["mlp.shared_experts."] = "shared."
        found["mlp.gate.weight"] = weights[prefix + "router"]
        found["mlp.gate.expert_bias"] = weights[prefix + "router_bias"]
    for name, mine in parts.items():
        for part, apart in (("gate_up", True), ("down", False)):
            values = matrix(mine + part, apart=apart)
            found[name + part] = values if values.dim() == 3 else values[None]
    return found


class Truth:
    """The project's own torch layers in fp32, from the exact values of the weights."""

    def __init__(self, model: TorchModel, batch: int) -> None:
        config, device = model.config, model.weights["embedding"].device
        heads, size = config.num_attention_heads, config.head_dim
        cache = torch.empty((batch, config.num_key_value_heads, 0, size), device=device)
        zeros = torch.zeros((batch, heads, size, size), device=device)
        self.model = model
        self.state = ReferenceState(
            position=torch.zeros(batch, dtype=torch.int64),
            recurrent_state=dict.fromkeys(config.linear_layers, zeros),
            kv_cache=dict.fromkeys(config.softmax_layers, (cache, cache)),
            context_length=model.capacity,
        )

    def layer(self, layer: int, hidden: Tensor, width: int) -> Tensor:
        """Return the residual stream [B * T, D] behind a layer."""
        model, state = self.model, self.state
        layout = TokenLayout.build(width, None, state.position, "right", hidden.device)
        cos, sin = (table[layout.position] for table in (model.cos, model.sin))
        step = Step(
            config=model.config,
            layout=layout,
            cos=cos,
            sin=sin,
            state=state,
            kernel=plain,
            experts=routed_experts,
        )
        return block(layer, wide_layer(model, layer), hidden, step)[0]


def check(
    place: Gpu,
    weights: DeviceWeights,
    recipe: str,
    *,
    prompt: bool = False,
    split: str = "copies",
) -> None:
    """Stop unless every layer of both is as close to fp32 as its rounding allows.

    Each layer gets the residual stream of the fp32 layers: over all layers the logits of a random
    network would tell nothing, since a rounding changes an expert and that changes all that
    follows. The median over tokens is compared, which a changed expert here and there leaves alone.
    FLA tunes its kernels for prompts for seconds, so they are checked only if asked for.
    """
    batch, model = 8, TorchModel(weights, capacity=128, split=split)
    if prompt:
        forget_tuning()
    runner = runner_of(place, weights, batch, 128)
    errors: dict[str, float] = {}

    def compare(name: str, got: Tensor, true: Tensor, hidden: Tensor) -> None:
        error = (got - true).norm(dim=-1) / (true - hidden).norm(dim=-1)
        errors[name] = max(errors.get(name, 0.0), error.median().item())

    for widths in ((70,), (1, 1, 1)) if prompt else ((1, 1, 1),):
        theirs, exact = model.new_state(batch), Truth(model, batch)
        slots = torch.arange(batch, dtype=torch.int32, device="cuda")
        for step, width in enumerate(widths):
            model.attention = ATTENTION_WAYS[step % len(ATTENTION_WAYS)]
            model.experts = EXPERT_WAYS[step % len(EXPERT_WAYS)]
            ids = torch.randint(0, weights.config.vocab_size, (batch * width,), device="cuda")
            rows = PackedRows(slots=slots, position=torch.full_like(slots, step), max_context=128)
            hidden = weights["embedding"][ids].float()
            for layer in range(weights.config.num_hidden_layers):
                after = exact.layer(layer, hidden, width)
                if recipe not in WITHOUT_TORCH:
                    found = model.layer(layer, hidden.bfloat16(), theirs, (batch, width))
                    compare(f"torch, {width} tokens", found.float(), after, hidden)
                if width == 1:
                    found = hidden.clone()
                    runner.network._layer(layer, found, rows)  # noqa: SLF001 - one layer
                    compare("engine, 1 token", found, after, hidden)
                hidden = after.bfloat16().float()
            theirs.position += width
            exact.state.position += width
    runner.close()
    print("largest relative error of a layer:", errors, flush=True)
    if not max(errors.values()) < LARGEST_ERROR[recipe]:
        sys.exit(f"no speed is reported: relative errors of layers {errors}")


def fill(state: TorchState) -> None:
    """Replace empty caches and zero states by random numbers."""
    for tensor in (*state.recurrent.values(), *state.keys.values(), *state.values.values()):
        tensor.normal_()


def ways(weights: DeviceWeights, batch: int, context: int) -> list[tuple[str, str]]:
    """Return the ways of attention and experts that were the fastest somewhere near this size."""
    long = context > LONG_CONTEXT
    found = [("products" if long else "sdpa", "grouped")]
    if batch == 1 and weights.matrix("layers.1.experts.down").scale is None:
        found.append(("products" if long else "flash", "gathered"))
    return found


def captured(model: TorchModel, tokens: Tensor, state: TorchState) -> torch.cuda.CUDAGraph:
    """Return a graph of STEPS steps from the state's position on; each feeds its greedy choice."""
    position, starting = state.position, dict(state.recurrent)

    def run(steps: int) -> None:
        state.position = position
        following = tokens
        for _ in range(steps):
            following = model.forward(following, state).argmax(-1, keepdim=True)
        for layer, old in starting.items():
            old.copy_(state.recurrent[layer])
            state.recurrent[layer] = old
        tokens.copy_(following)
        state.position = position

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # tokens and states come from there
    with torch.cuda.stream(stream):
        run(1)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run(STEPS)
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Return seconds a step, the median of several timings."""
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / (4 * STEPS))
    return statistics.median(times[1:])


def kernels_of(graph: torch.cuda.CUDAGraph) -> int:
    """Return the kernels of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        graph.replay()
        torch.cuda.synchronize()
    return sum(1 for event in found.events() if "mem" not in event.name.lower()) // STEPS


@dataclass(frozen=True)
class TorchTime:
    """What torch takes for a decode step.

    Attributes:
        seconds: of a step.
        way: the fastest one, in words.
        kernels: of a step.
        experts_hit: different ones, mean of the layers.
    """

    seconds: float
    way: str
    kernels: int
    experts_hit: float


def time_torch(
    weights: DeviceWeights, batch: int, context: int, *, split: str = "copies"
) -> TorchTime:
    """Time decode steps, in the fastest of the ways that are worth trying.

    Args:
        weights: of the engine.
        batch: rows.
        context: tokens that each has seen.
        split: see `TorchModel`.
    """
    model = TorchModel(weights, capacity=context + STEPS, split=split)
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(
        0, weights.config.vocab_size, (batch, 1), generator=generator, device="cuda"
    )
    state = model.new_state(batch)
    fill(state)
    found: list[tuple[float, str, int]] = []
    for attention, experts in ways(weights, batch, context):
        model.attention, model.experts, state.position = attention, experts, context
        name = f"{experts} experts, attention: {attention}"
        try:
            graph = captured(model, tokens, state)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"  b{batch} {name}: {str(error).splitlines()[0]:.200}", flush=True)
            continue
        seconds = replay_seconds(graph)
        found.append((seconds, name, kernels_of(graph)))
        print(f"  b{batch} {name}: {seconds * 1e6:,.0f} us", flush=True)
        del graph
    if not found:
        sys.exit("torch has no way that runs")
    hit = statistics.mean(len(torch.unique(ids)) for ids in model.expert_ids.values())
    expected = expected_experts(weights.config, batch)
    if hit < LEAST_DIVERSE * expected:
        sys.exit(f"no speed is reported: {hit:.1f} experts a layer, {expected:.1f} are expected")
    return TorchTime(*min(found), experts_hit=hit)


def time_torch_prefill(weights: DeviceWeights, batch: int, length: int) -> float:
    """Return torch's seconds for the same as `measure_prefill`, without a graph."""
    tokens = np.random.default_rng(0).integers(0, weights.config.vocab_size, (batch, length))
    model = TorchModel(weights, capacity=length)
    forget_tuning()
    times = []
    for _ in range(4 if length <= LONG_CONTEXT else 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.forward(torch.from_numpy(tokens).cuda(), model.new_state(batch)).cpu()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
