"""config.pbtxt of the step model: a TensorRT engine whose state Triton keeps per sequence.

Triton's TensorRT backend copies the state of a sequence into the engine's input and its output back
after every step. `use_same_buffer_for_input_output` saves the second copy in Triton's memory, not
these copies: the engine's own buffers of past_* and present_* are always apart, where the plugins
copy once more before they update the state in place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ringexport.bundle import EngineBundle, TargetInfo
from ringexport.errors import BundleError, ConfigError
from ringexport.triton.options import TritonOptions
from ringexport.triton.pbtxt import EnumName, Message, Value, to_pbtxt

__all__ = ["PlanModel", "find_plan_model", "plan_config"]

TARGET_PREFIX = "tensorrt:"
ENGINE_ROLE = "engine"
PLUGIN_SUFFIX = ".so"
DEFAULT_CONTEXT = 4096
DATA_TYPES = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16", "bf16": "TYPE_BF16"}
HALF_DTYPES = ("bf16", "fp16")
STATES = {"past_state": "present_state", "past_key": "present_key", "past_value": "present_value"}

_HEADER = "# Written by ringexport triton; everything in it follows from the engine.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanModel:
    """The TensorRT engines of a bundle, as one Triton model.

    Attributes:
        targets: name to target, by name; the same graph for different GPUs.
        plans: file of the model's version directory -> path in the bundle.
        capabilities: compute capability -> file of the version directory.
        plugins: file name -> path in the bundle.
        data_type: of the KV cache.
        context: tokens that a sequence can have.
        max_batch: sequences that a step can advance.
    """

    targets: Mapping[str, TargetInfo]
    plans: Mapping[str, str]
    capabilities: Mapping[str, str]
    plugins: Mapping[str, str]
    data_type: str
    context: int
    max_batch: int

    @property
    def first(self) -> TargetInfo:
        """The target that stands for all."""
        return next(iter(self.targets.values()))


def find_plan_model(bundle: EngineBundle, options: TritonOptions) -> PlanModel | str:
    """Return the step model of a bundle, or why it has none.

    Raises:
        BundleError: a TensorRT target that lacks what every such target has.
        ConfigError: `plan_context` is more than the engine has.
    """
    targets = {
        name: target
        for name, target in sorted(bundle.targets.items())
        if name.startswith(TARGET_PREFIX)
    }
    if not targets:
        rtx = any(name.startswith("tensorrt-rtx:") for name in bundle.targets)
        also = "; engines of TensorRT-RTX cannot be loaded by Triton" if rtx else ""
        return f"the bundle has no target tensorrt:..., only {', '.join(bundle.targets)}{also}"
    dtype = _cache_dtype(bundle.manifest.build.compute_dtype)
    if dtype not in DATA_TYPES:
        return f"Triton has no state of type {dtype}"
    if any(target.io != next(iter(targets.values())).io for target in targets.values()):
        raise BundleError(f"the TensorRT targets of {bundle.directory} have different tensors")
    plans, capabilities = {}, {}
    plugins: dict[str, str] = {}
    for name, target in targets.items():
        architecture = name.removeprefix(TARGET_PREFIX)
        file = f"model.{architecture}.plan"
        plans[file] = _engine(bundle, name, target)
        capabilities[_capability(architecture)] = file
        plugins |= _plugins(target)
    context = bundle.manifest.model.context_length
    available = min(_smallest(target, "cache_tokens", context) for target in targets.values())
    rows = min(_smallest(target, "rows", 1) for target in targets.values())
    return PlanModel(
        targets=targets,
        plans=plans,
        capabilities=capabilities,
        plugins=plugins,
        data_type=DATA_TYPES[dtype],
        context=_context(options.plan_context, available),
        max_batch=min(options.max_batch, rows),
    )


def plan_config(name: str, model: PlanModel, options: TritonOptions) -> str:
    """Return the text of config.pbtxt.

    Args:
        name: of the model.
        model: the engines.
        options: how it serves.
    """
    shapes = model.first.io.shapes
    idle = options.session_idle_seconds * 1_000_000
    instances: dict[str, Value] = {"kind": EnumName("KIND_GPU"), "count": options.instances}
    profiles = _profiles(model.first)
    if profiles > 1:
        instances["profile"] = [str(index) for index in range(profiles)]
    message: dict[str, Value] = {
        "name": name,
        "platform": "tensorrt_plan",
        "max_batch_size": model.max_batch,
        "default_model_filename": next(iter(model.plans)),
        "cc_model_filenames": [
            {"key": key, "value": value} for key, value in model.capabilities.items()
        ],
        "input": [
            _tensor("tokens", "TYPE_INT64", [-1]),
            _per_row("lengths"),
            _per_row("position"),
            _tensor("logits_index", "TYPE_INT64", [-1]),
        ],
        "output": [_tensor("logits", "TYPE_FP32", _dims(shapes["logits"], model.context))],
        "sequence_batching": {
            "max_sequence_idle_microseconds": idle,
            "oldest": {
                "max_candidate_sequences": max(options.max_sessions, 1),
                "preferred_batch_size": [model.max_batch],
            },
            "state": _states(model),
        },
        "instance_group": [instances | ({"gpus": options.gpus} if options.gpus else {})],
    }
    return _HEADER + to_pbtxt(message)


def _cache_dtype(compute_dtype: str) -> str:
    """Return what the engines compute in; bundles with other targets name their dtypes too."""
    dtypes = compute_dtype.split("+")
    halves = [dtype for dtype in dtypes if dtype in HALF_DTYPES]
    return halves[0] if len(halves) == 1 else compute_dtype


def _profiles(target: TargetInfo) -> int:
    """Return the number of optimization profiles: each has a limit such as "decode_rows"."""
    return max(1, sum(name.endswith("_rows") for name in target.limits))


def _smallest(target: TargetInfo, size: str, otherwise: int) -> int:
    """Return the largest extent that every profile of an engine takes."""
    found = [limit for name, limit in target.limits.items() if name.endswith(f"_{size}")]
    return min(found, default=target.limits.get(size, otherwise))


def _engine(bundle: EngineBundle, name: str, target: TargetInfo) -> str:
    if ENGINE_ROLE not in target.files:
        raise BundleError(
            f"target {name} of {bundle.directory} names no file as its {ENGINE_ROLE}",
            hint="build the bundle again with this version: ringexport build",
        )
    return target.files[ENGINE_ROLE]


def _plugins(target: TargetInfo) -> dict[str, str]:
    return {
        path.rpartition("/")[2]: path
        for path in target.files.values()
        if path.endswith(PLUGIN_SUFFIX)
    }


def _capability(architecture: str) -> str:
    """Return "9.0" for "sm_90", as Triton writes it."""
    digits = "".join(filter(str.isdigit, architecture))
    return f"{digits[:-1]}.{digits[-1:]}"


def _context(wanted: int | None, available: int) -> int:
    if wanted is not None and wanted > available:
        raise ConfigError(
            f"plan_context is {wanted:,}, the TensorRT engine has {available:,} tokens",
            hint="choose less, or build the engine for more",
        )
    return wanted or min(available, DEFAULT_CONTEXT)


def _states(model: PlanModel) -> list[Value]:
    io = model.first.io
    states: list[Value] = [
        _state(model, "past_state", layer, "TYPE_FP32") for layer in io.linear_layers
    ]
    for layer in io.softmax_layers:
        states += [
            _state(model, name, layer, model.data_type) for name in ("past_key", "past_value")
        ]
    return states


def _state(model: PlanModel, kind: str, layer: int, data_type: str) -> Message:
    shapes = model.first.io.shapes
    dims = _dims(shapes.get(kind, shapes["past_key"]), model.context)
    initial: dict[str, Value] = {
        "name": f"empty.{kind}.{layer}",
        "data_type": EnumName(data_type),
        "dims": dims,
        "zero_data": True,
    }
    return {
        "input_name": f"{kind}.{layer}",
        "output_name": f"{STATES[kind]}.{layer}",
        "data_type": EnumName(data_type),
        "dims": dims,
        "use_same_buffer_for_input_output": True,
        "initial_state": initial,
    }


def _dims(shape: Sequence[int | str], context: int) -> list[int]:
    """Return a shape without its batch: S is the context, other letters are any length."""
    named = {"S": context}
    return [named.get(size, -1) if isinstance(size, str) else size for size in shape[1:]]


def _tensor(name: str, data_type: str, dims: Sequence[int]) -> Message:
    return {"name": name, "data_type": EnumName(data_type), "dims": list(dims)}


def _per_row(name: str) -> Message:
    """Return an input of shape [B], which Triton can only describe as [B, 1] made flat."""
    return {**_tensor(name, "TYPE_INT32", [1]), "reshape": {"shape": []}}
