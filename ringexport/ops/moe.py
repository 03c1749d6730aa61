"""Contracts of the mixture of experts: the grouped sigmoid router and the routed experts."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ringexport.ops.spec import Attributes, OpSpec, TensorArg
from ringexport.tensors import match

__all__ = [
    "EXPERTS",
    "INT8_EXPERTS",
    "ROUTED_EXPERTS",
    "ROUTED_INT8_EXPERTS",
    "ROUTER",
    "Routing",
    "experts",
    "router",
]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

GROUP_SCORE_EXPERTS = 2
"""A group is scored by the sum of its two best experts."""


def _largest(scores: FloatArray, count: int) -> IntArray:
    """Return the indices of the `count` largest along the last axis, ties to the lower index."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the router chooses and weighs.

    Attributes:
        num_experts: E.
        top_k: experts per token, k.
        n_group, topk_group: the experts form n_group groups of which topk_group are open.
        normalize: divide the weights of a token by their sum.
        routed_scaling_factor: factor on the weights.
    """

    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    normalize: bool
    routed_scaling_factor: float

    def attributes(self) -> dict[str, int | float]:
        """Return the attributes of the ONNX op."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"normalize": int(self.normalize)}


def router(
    hidden: FloatArray, router_weight: FloatArray, expert_bias: FloatArray, routing: Routing
) -> tuple[IntArray, FloatArray]:
    """Choose experts by biased sigmoid scores inside the best groups; weigh them without the bias.

    Args:
        hidden: [N, D].
        router_weight: [D, E] fp32.
        expert_bias: [E] fp32, used for the choice only.
        routing: how to choose and weigh.

    Returns:
        expert_ids [N, k] int64 by falling biased score, and routing_weights [N, k] fp32. Ties go to
        the lower expert id. The ids of a token differ whatever its logits are: a NaN comes last.

    Source: inclusionAI/Ring-V2.5@c7facea `modeling_bailing_moe_v2_5.py` (the gate).
    """
    dims = match("router_weight", router_weight, "D E", match("hidden", hidden, "N D"))
    match("expert_bias", expert_bias, "E", dims)
    scores = 1.0 / (1.0 + np.exp(-(hidden.astype(np.float32) @ router_weight)))
    biased = (scores + expert_bias).reshape(dims["N"], routing.n_group, -1)
    best = np.take_along_axis(biased, _largest(biased, GROUP_SCORE_EXPERTS), axis=-1)
    groups = _largest(best.sum(axis=-1), routing.topk_group)
    open_groups = np.full((dims["N"], routing.n_group, 1), -np.inf, dtype=np.float32)
    np.put_along_axis(open_groups[..., 0], groups, 0.0, axis=-1)
    expert_ids = _largest((biased + open_groups).reshape(dims["N"], -1), routing.top_k)
    weights = np.take_along_axis(scores, expert_ids, axis=-1)
    if routing.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return expert_ids, (weights * routing.routed_scaling_factor).astype(np.float32)


def experts(
    hidden: FloatArray,
    expert_ids: IntArray,
    routing_weights: FloatArray,
    gate_up_proj: FloatArray,
    down_proj: FloatArray,
) -> FloatArray:
    """Sum the routed SwiGLU experts of each token.

    Args:
        hidden: [N, D].
        expert_ids, routing_weights: [N, k].
        gate_up_proj: [E, 2*I, D]; row 2*i is row i of gate_proj, row 2*i+1 row i of up_proj.
        down_proj: [E, D, I].

    Returns:
        output [N, D] fp32.
    """
    dims = match("routing_weights", routing_weights, "N k", match("hidden", hidden, "N D"))
    match("down_proj", down_proj, "E D I", match("expert_ids", expert_ids, "N k", dims))
    output = np.zeros(hidden.shape, dtype=np.float32)
    for token in range(dims["N"]):
        for expert, weight in zip(expert_ids[token], routing_weights[token], strict=True):
            both = gate_up_proj[expert] @ hidden[token]
            gate, up = both[0::2], both[1::2]
            output[token] += weight * (down_proj[expert] @ (gate / (1.0 + np.exp(-gate)) * up))
    return output


def _choice_body(attributes: Attributes, hidden: str) -> str:
    """Return the body that computes scores [N, E], expert_ids and their scores, chosen [N, k]."""
    per_group = int(attributes["num_experts"]) // int(attributes["n_group"])
    in_groups = _open_groups_body(attributes, per_group) if attributes["n_group"] > 1 else ""
    candidates = "open_scores" if in_groups else "biased"
    return f"""
    last_axis = Constant <value_ints = [-1]> ()
    hidden_float = Cast <to = 1> ({hidden})
    logits = MatMul (hidden_float, router_weight)
    scores = Sigmoid (logits)
    biased = Add (scores, expert_bias)
    {in_groups}
    top_k = Constant <value_ints = [{attributes["top_k"]}]> ()
    top_scores, expert_ids = TopK (\
{candidates}, top_k)
    chosen = GatherElements <axis = -1> (scores, expert_ids)
    """


def _router_body(attributes: Attributes) -> str:
    normalized = """
    total = ReduceSum <keepdims = 1> (chosen, last_axis)
    tiny = Constant <value = float {1e-20}> ()
    safe_total = Add (total, tiny)
    shares = Div (chosen, safe_total)
    """
    return f"""
    {_choice_body(attributes, "hidden")}
    {normalized if attributes["normalize"] else "shares = Identity (chosen)"}
    factor = Constant <value = float {{{attributes["routed_scaling_factor"]}}}> ()
    routing_weights = Mul (shares, factor)
    """


def _open_groups_body(attributes: Attributes, per_group: int) -> str:
    n_group, closed = attributes["n_group"], "-3.4028235e38"
    best = min(GROUP_SCORE_EXPERTS, per_group)
    return f"""
    grouped_shape = Constant <value_ints = [-1, {n_group}, {per_group}]> ()
    flat_shape = Constant <value_ints = [-1, {attributes["num_experts"]}]> ()
    grouped = Reshape (biased, grouped_shape)
    best_count = Constant <value_ints = [{best}]> ()
    best_scores, best_ids = TopK (grouped, best_count)
    group_scores = ReduceSum <keepdims = 1> (best_scores, last_axis)
    group_count = Constant <value_ints = [{attributes["topk_group"]}]> ()
    open_group_scores, open_groups = TopK <axis = 1> (group_scores, group_count)
    num_groups = Constant <value_ints = [{n_group}]> ()
    closed_open = Constant <value_floats = [{closed}, 0.0]> ()
    one_open_group = OneHot <axis = 1> (open_groups, num_groups, closed_open)
    open_groups_axis = Constant <value_ints = [2]> ()
    group_mask = ReduceMax <keepdims = 0> (one_open_group, open_groups_axis)
    masked = Add (grouped, group_mask)
    open_scores = Reshape (masked, flat_shape)
    """


_SWIGLU = (
    'activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0, activation_beta = 0.0,'
    " normalize_routing_weights = 1"
)


def _routed_body(attributes: Attributes, op: str, inputs: str, extra: str = "") -> str:
    # The expert ops of ONNX Runtime route by themselves: top-k of a softmax over their router
    # input. Logarithms of our weights at our experts, and a value that underflows elsewhere, make
    # them select exactly these experts with exactly these weights, up to their sum.
    unrouted_row = ", ".join(["-1e4"] * int(attributes["num_experts"]))
    return f"""
    last_axis = Constant <value_ints = [-1]> ()
    total = ReduceSum <keepdims = 1> (routing_weights, last_axis)
    log_weights = Log (routing_weights)
    unrouted = Constant <value = float {{-1e4}}> ()
    floored = Max (log_weights, unrouted)
    unrouted_row = Constant <value = float[1,{attributes["num_experts"]}] {{{unrouted_row}}}> ()
    num_tokens_by_one = Shape (total)
    blank = Expand (unrouted_row, num_tokens_by_one)
    router_logits_float = ScatterElements <axis = -1> (blank, expert_ids, floored)
    router_logits = CastLike (router_logits_float, hidden)
    mixed = com.microsoft.{op} <k = {attributes["top_k"]}, {_SWIGLU}{extra}>
        (hidden, router_logits, {inputs})
    total_like = CastLike (total, hidden)
    output = Mul (mixed, total_like)
    """


def _chosen_body(attributes: Attributes, mixed: str) -> str:
    """Return the body of a router and its experts in one, around the expert op `mixed`.

    Normalizing the weights is left to the op, which knows nothing of the scaling factor.
    """
    return f"""
    tokens = Flatten <axis = -1> (hidden)
    {_choice_body(attributes, "tokens")}
    {mixed}
    factor = Constant <value = float {{{attributes["routed_scaling_factor"]}}}> ()
    factor_like = CastLike (factor, hidden)
    output = Mul (mixed, factor_like)
    """


def _experts_body(attributes: Attributes) -> str:
    return _routed_body(attributes, "MoE", "gate_up_proj, , down_proj")


def _int8_inputs_body(attributes: Attributes) -> str:
    # The op wants a scale per block. A session spreads those of rows once, when it starts.
    return f"""
    block_shape = Constant <value_ints = [1, 1, {attributes["block_size"]}]> ()
    gate_up_shape = Shape (gate_up_proj)
    gate_up_blocks = Div (gate_up_shape, block_shape)
    gate_up_block_scale = Expand (gate_up_scale, gate_up_blocks)
    down_shape = Shape (down_proj)
    down_blocks = Div (down_shape, block_shape)
    down_block_scale = Expand (down_scale, down_blocks)
    """


_INT8_INPUTS = "gate_up_proj, gate_up_block_scale, , down_proj, down_block_scale"


def _int8_attributes(attributes: Attributes) -> str:
    return f", expert_weight_bits = 8, block_size = {attributes['block_size']}"


def _int8_experts_body(attributes: Attributes) -> str:
    extra = _int8_attributes(attributes)
    routed = _routed_body(attributes, "QMoE", _INT8_INPUTS, extra)
    return f"{_int8_inputs_body(attributes)}\n{routed}"


def _routed_experts_body(attributes: Attributes) -> str:
    # As in _routed_body: logarithms at our experts, far below them elsewhere.
    mixed = f"""
    smallest = Constant <value = float {{1e-37}}> ()
    floored = Max (chosen, smallest)
    log_chosen = Log (floored)
    far = Constant <value = float {{1e4}}> ()
    below = Sub (scores, far)
    router_logits_float = ScatterElements <axis = -1> (below, expert_ids, log_chosen)
    router_logits = CastLike (router_logits_float, hidden)
    mixed = com.microsoft.MoE <k = {attributes["top_k"]}, {_SWIGLU}>
        (hidden, router_logits, gate_up_proj, , down_proj)
    """
    return _chosen_body(attributes, mixed)


def _routed_int8_experts_body(attributes: Attributes) -> str:
    # This op takes weights as they are. Below zero elsewhere, they also tell it what to choose.
    mixed = f"""
    {_int8_inputs_body(attributes)}
    two = Constant <value = float {{2.0}}> ()
    below = Sub (scores, two)
    weights_float = ScatterElements <axis = -1> (below, expert_ids, chosen)
    weights = CastLike (weights_float, hidden)
    mixed = com.microsoft.QMoE <
        k = {attributes["top_k"]}, {_SWIGLU}{_int8_attributes(attributes)}
    > (hidden, weights, {_INT8_INPUTS}, , , , , , , , weights)
    """
    return _chosen_body(attributes, mixed)


_NUM_EXPERTS = {"num_experts": "E", "top_k": "experts per token, k"}
_EXPERT_SIZES = {"E": "num_experts", "k": "top_k"}

ROUTER = OpSpec(
    name="RingRouter",
    summary="Grouped sigmoid router in fp32; ties go to the lower expert id.",
    inputs=(
        TensorArg(name="hidden", shape="N D", dtype="float", text="normed hidden state"),
        TensorArg(name="router_weight", shape="D E", dtype="fp32", text="router, transposed"),
        TensorArg(name="expert_bias", shape="E", dtype="fp32", text="added for the choice only"),
    ),
    outputs=(
        TensorArg(name="expert_ids", shape="N k", dtype="int64", text="by falling biased score"),
        TensorArg(name="routing_weights", shape="N k", dtype="fp32", text="scaled weights"),
    ),
    attributes={
        **_NUM_EXPERTS,
        "n_group": "groups of experts",
        "topk_group": "groups that stay open",
        "normalize": "1: divide by the sum of the chosen scores",
        "routed_scaling_factor": "factor on the weights",
    },
    function_body=_router_body,
    sizes=_EXPERT_SIZES,
    reals=frozenset({"routed_scaling_factor"}),
)

EXPERTS = OpSpec(
    name="RingExperts",
    summary="Weighted sum of the routed SwiGLU experts of each token.",
    inputs=(
        TensorArg(name="hidden", shape="N D", dtype="float", text="normed hidden state"),
        TensorArg(name="expert_ids", shape="N k", dtype="int64", text="from RingRouter"),
        TensorArg(name="routing_weights", shape="N k", dtype="fp32", text="from RingRouter"),
        TensorArg(
            name="gate_up_proj", shape="E 2*I D", dtype="float", text="rows alternate gate, up"
        ),
        TensorArg(name="down_proj", shape="E D I", dtype="float", text="down projections"),
    ),
    outputs=(TensorArg(name="output", shape="N D", dtype="float", text="sum of the experts"),),
    attributes=_NUM_EXPERTS,
    function_body=_experts_body,
    sizes=_EXPERT_SIZES,
)

INT8_EXPERTS = OpSpec(
    name="RingInt8Experts",
    summary="RingExperts with int8 weights; inputs are quantized to int8 per block, dynamically.",
    inputs=(
        *EXPERTS.inputs[:3],
        TensorArg(name="gate_up_proj", shape="E 2*I D", dtype="uint8", text="codes, 128 is zero"),
        TensorArg(name="gate_up_scale", shape="E 2*I D/S", dtype="fp32", text="E 2*I 1: per row"),
        TensorArg(name="down_proj", shape="E D I", dtype="uint8", text="codes, 128 is zero"),
        TensorArg(name="down_scale", shape="E D I/S", dtype="fp32", text="E D 1: per row"),
    ),
    outputs=EXPERTS.outputs,
    attributes={**_NUM_EXPERTS, "block_size": "S, divides D and I"},
    function_body=_int8_experts_body,
)

ROUTED_EXPERTS = OpSpec(
    name="RingRoutedExperts",
    summary="RingRouter with normalized weights and its RingExperts, for ONNX Runtime.",
    inputs=(
        TensorArg(name="hidden", shape="... D", dtype="float", text="normed hidden state"),
        *ROUTER.inputs[1:],
        *EXPERTS.inputs[3:],
    ),
    outputs=(
        TensorArg(name="output", shape="... D", dtype="float", text="sum of the experts"),
        ROUTER.outputs[0],
    ),
    attributes={name: text for name, text in ROUTER.attributes.items() if name != "normalize"},
    function_body=_routed_experts_body,
)

ROUTED_INT8_EXPERTS = OpSpec(
    name="RingRoutedInt8Experts",
    summary="RingRouter with normalized weights and its RingInt8Experts, for ONNX Runtime.",
    inputs=(*ROUTED_EXPERTS.inputs[:3], *INT8_EXPERTS.inputs[3:]),
    outputs=ROUTED_EXPERTS.outputs,
    attributes={**ROUTED_EXPERTS.attributes, "block_size": "S, divides D and I"},
    function_body=_routed_int8_experts_body,
)
