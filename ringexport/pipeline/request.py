"""What a user asks for, and how "auto" becomes a decision."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringexport.engine.target import EngineTarget
from ringexport.errors import ConfigError
from ringexport.ops.decay_index import DecayIndex

if TYPE_CHECKING:
    from ringexport.bundle import ResolvedBuild

__all__ = [
    "AS_STORED",
    "AUTO",
    "DECAY_INDICES",
    "RECIPES",
    "RUNNABLE",
    "TARGET_FORMS",
    "UNQUANTIZED",
    "BuildRequest",
    "resolve",
    "target_directory",
    "unquantized_recipe",
]

AUTO = "auto"
AS_STORED = "as-stored"
"""What the recipe of a checkpoint that came quantized is called."""

UNQUANTIZED = ("fp32", "bf16")
DEFAULT_TARGET = "onnxruntime:cpu"

_FILE_SUFFIX = ".toml"

DECAY_INDICES = tuple(form.value for form in DecayIndex)

RECIPES = {
    "fp32": "no quantization, computed in fp32",
    "bf16": "no quantization; CPU targets compute it in fp32",
    "fp8": "FP8-E4M3 experts, dense MLP and linear-layer projections",
    "fp8-static": "fp8 with static activations per tensor",
    "fp8-block": "fp8 in blocks of 128 x 128",
    "fp8-all": "fp8 with lm_head, softmax projections and KV cache",
    "int8": "W8A8 with SmoothQuant",
    "int8-weight-only": "8-bit weights; inputs as the target takes them",
}
"""Every recipe of the design and what it means."""

_TENSORRT_DTYPES = dict.fromkeys(
    (name for name in RECIPES if name not in {"fp32", "fp8-block", "fp8-all"}), "bf16"
)

_CUDA_DTYPES = dict.fromkeys(
    (name for name in RECIPES if name not in {"fp32", "fp8-static", "int8-weight-only"}), "bf16"
)

_ORT_CUDA_TARGET = "onnxruntime:cuda"

RUNNABLE = {
    DEFAULT_TARGET: dict.fromkeys((name for name in RECIPES if name != "fp8-all"), "fp32"),
    _ORT_CUDA_TARGET: {"fp32": "fp32", "bf16": "bf16"},
    "tensorrt": _TENSORRT_DTYPES,
    "tensorrt-rtx": _TENSORRT_DTYPES,
    "cuda": _CUDA_DTYPES,
}
"""Target or family of targets to recipe to compute dtype, for all that this version builds."""

_REASONS = {
    DEFAULT_TARGET: {"fp8-all": "its KV cache is fp32"},
    _ORT_CUDA_TARGET: {
        name: "its graph is not quantized" for name in RECIPES if name not in UNQUANTIZED
    },
    "tensorrt": {
        "fp32": "its plugins compute in bf16",
        "fp8-block": "its plugins take scales per row, not per block",
        "fp8-all": "its KV cache is bf16",
    },
    "cuda": {
        "fp32": "its kernels compute in bf16",
        "fp8-static": "its kernels quantize inputs per token",
        "int8-weight-only": "its kernels multiply int8 by int8",
    },
}
_REASONS["tensorrt-rtx"] = _REASONS["tensorrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _TargetForm:
    """A family of targets: how its names look and what it takes to build one.

    Attributes:
        name: for people.
        pattern: of the names.
        family: key in `RUNNABLE`.
    """

    name: str
    pattern: str
    family: str


TARGET_FORMS = (
    _TargetForm(name="onnxruntime:cpu", pattern=r"onnxruntime:cpu", family=DEFAULT_TARGET),
    _TargetForm(name=_ORT_CUDA_TARGET, pattern=_ORT_CUDA_TARGET, family=_ORT_CUDA_TARGET),
    _TargetForm(
        name="cuda:sm_{80,86,89,90,100,120}",
        pattern=r"cuda:sm_(80|86|89|90|100|120)",
        family="cuda",
    ),
    _TargetForm(name="tensorrt:sm_..", pattern=r"tensorrt:.*", family="tensorrt"),
    _TargetForm(
        name="tensorrt-rtx:sm_{80,86,89,120}",
        pattern=r"tensorrt-rtx:.*",
        family="tensorrt-rtx",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A build as asked for; "auto" is allowed.

    Attributes:
        checkpoint: directory with config.json and weights.
        output: where the bundle is to be.
        recipe: one of `RECIPES`, a .toml file, or "auto": as the checkpoint is.
        targets: names of targets, or "auto".
        decay_index: which form of the decay; see `DECAY_INDICES`.
        calibration: prompts for recipes that need them: a shipped set or a .jsonl file.
        calibration_samples: prompts at most; None for the default.
        stats: file of an earlier calibration, instead of prompts.
        threads: for quantizing; they do not change the result.
        gate: limits such as "ppl=0.5%,kl=0.005,top1=97%"; None for none.
        gate_fallback: leave the worst modules unquantized until the gate is passed.
        profile: shape ranges of TensorRT engines: the name of a shipped profile or a .toml file;
            None for the default.
        plugin_library: plugins for TensorRT engines, None for the default place.
        kernel_library: kernels that a cuda target is tried with, None for the default place.
    """

    checkpoint: Path
    output: Path
    recipe: str = AUTO
    targets: tuple[str, ...] = (AUTO,)
    decay_index: str = "serving"
    calibration: str | None = None
    calibration_samples: int | None = None
    stats: Path | None = None
    threads: int = 1
    gate: str | None = None
    gate_fallback: bool = False
    profile: str | None = None
    plugin_library: Path | None = None
    kernel_library: Path | None = None


def resolve(request: BuildRequest) -> "ResolvedBuild":
    """Turn a request into decisions, all but what only the checkpoint can tell.

    Raises:
        ConfigError: an unknown name, or a recipe that a target does not run.
    """
    from ringexport.bundle import ResolvedBuild  # noqa: PLC0415 (help imports this module)

    if request.decay_index not in DECAY_INDICES:
        raise _unknown("decay index", request.decay_index, DECAY_INDICES)
    names = {_canonical(name) for name in request.targets}
    if not names:
        raise ConfigError("no target was asked for", hint=f"choices: {_target_names()}")
    targets = tuple(sorted(names))
    for target in targets:
        _target_form(target)
    recipe = unquantized_recipe(targets) if request.recipe == AUTO else request.recipe
    dtypes = {_compute_dtype(recipe, target) for target in targets}
    return ResolvedBuild(
        recipe=Path(recipe).stem if recipe.endswith(_FILE_SUFFIX) else recipe,
        compute_dtype="+".join(sorted(dtypes)),
        decay_index=request.decay_index,
        targets=targets,
    )


def target_directory(target: str) -> str:
    """Return the directory of a target inside a bundle."""
    return "targets/" + target.replace(":", "-")


def unquantized_recipe(targets: tuple[str, ...]) -> str:
    """Return the recipe that changes nothing: fp32 for CPUs, bf16 where all targets are GPUs."""
    fp32, bf16 = UNQUANTIZED
    if all(name == _ORT_CUDA_TARGET for name in targets):
        return bf16
    return fp32 if all(fp32 in RUNNABLE[_target_form(name).family] for name in targets) else bf16


def _canonical(name: str) -> str:
    if name == AUTO:
        return DEFAULT_TARGET
    target = EngineTarget.parse(name)
    return name if target is None else target.name


def _target_form(target: str) -> _TargetForm:
    form = next((form for form in TARGET_FORMS if re.fullmatch(form.pattern, target)), None)
    if form is None:
        raise _unknown("target", target, tuple(form.name for form in TARGET_FORMS))
    return form


def _compute_dtype(recipe: str, target: str) -> str:
    family = _target_form(target).family
    runnable = RUNNABLE[family]
    if recipe.endswith(_FILE_SUFFIX):
        return runnable[UNQUANTIZED[1]]
    if recipe not in RECIPES:
        raise _unknown("recipe", recipe, tuple(RECIPES))
    dtype = runnable.get(recipe)
    if dtype is None:
        raise ConfigError(
            f"the target {target} does not run the recipe {recipe} ({RECIPES[recipe]}): "
            f"{_REASONS[family][recipe]}",
            hint=f"recipes that it runs: {', '.join(runnable)}, or a file of your own",
        )
    return dtype


def _unknown(what: str, name: str, choices: tuple[str, ...]) -> ConfigError:
    near = difflib.get_close_matches(name, choices, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"unknown {what} {name!r}", hint=f"{guess}choices: {', '.join(choices)}")


def _target_names() -> str:
    return ", ".join(form.name for form in TARGET_FORMS)
