"""Files of a repository that come from templates: model.py, client.py and README.md."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

from ringexport.bundle import EngineBundle
from ringexport.triton.options import TritonOptions
from ringexport.triton.plan_config import STATES, PlanModel
from ringexport.triton.tensors import INPUTS, OUTPUTS, TensorSpec

__all__ = ["client_source", "model_source", "readme"]

_PLACE = re.compile(r"@([a-z_]+)@")
_EXTRAS = {"torch": "torch", "auto": "ort", "onnxruntime:cpu": "ort"}


def model_source() -> str:
    """Return the text of model.py, the same for every bundle."""
    return _template("model.py.in")


def client_source(name: str) -> str:
    """Return the text of client.py for a model."""
    return _fill("client.py.in", {"name": name})


def readme(
    bundle: EngineBundle,
    name: str,
    options: TritonOptions,
    *,
    plan: PlanModel | str,
    command: Sequence[str],
) -> str:
    """Return the text of README.md.

    Args:
        bundle: what is served.
        name: of the streaming model.
        options: how it is served.
        plan: the TensorRT variant, or why there is none.
        command: what starts the server.
    """
    manifest = bundle.manifest
    here = "The bundle is in this repository, which can be moved as a whole."
    there = f"The bundle stays at `{bundle.directory.resolve()}`."
    alone = "" if options.sticky else "Requests without a correlation id stand alone. "
    return _fill(
        "README.md.in",
        {
            "name": name,
            "architecture": manifest.model.architecture,
            "recipe": manifest.build.recipe,
            "decay": manifest.build.decay_index,
            "location": there if options.reference else here,
            "command": " \\\n  ".join(shlex.quote(word) for word in command),
            "container": _container(bundle, options, command),
            "backend": options.backend,
            "curl": _curl(name, options),
            "max_batch": str(options.max_batch),
            "inputs": _table("input", INPUTS),
            "outputs": "\n\n" + _table("output", OUTPUTS),
            "sessions": alone + _sessions(options),
            "idle": str(options.session_idle_seconds),
            "scale": _scale(name, options),
            "plan": _plan(bundle, name, plan),
        },
    )


def _template(name: str) -> str:
    return (files("ringexport.triton") / "templates" / name).read_text(encoding="utf-8")


def _fill(name: str, values: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda found: values[found[1]], _template(name))


def _table(kind: str, specs: Iterable[TensorSpec]) -> str:
    rows = [
        f"| `{spec.name}` | {spec.data_type} | {list(spec.dims)} | {spec.meaning} |"
        for spec in specs
    ]
    return "\n".join([f"| {kind} | dtype | shape | meaning |", "|---|---|---|---|", *rows])


def _container(bundle: EngineBundle, options: TritonOptions, command: Sequence[str]) -> str:
    extra = _EXTRAS.get(options.backend, "gpu")
    gpus = "--gpus all " if options.gpus else ""
    repository = command[1].partition("=")[2]
    folders = [repository, *([str(bundle.directory.resolve())] if options.reference else [])]
    mounts = [f"{folder}:{folder}" for folder in folders] + ["/path/to/ringexport:/ringexport"]
    volumes = " ".join(f"-v {shlex.quote(mount)}" for mount in mounts)
    inner = f"pip install '/ringexport[{extra}]' && {shlex.join(command)}"
    image = "nvcr.io/nvidia/tritonserver:YY.MM-py3"
    return (
        f"docker run {gpus}--rm --net=host --shm-size=1g {volumes} {image} \\\n"
        f"  bash -c {shlex.quote(inner)}"
    )


def _curl(name: str, options: TritonOptions) -> str:
    if options.sticky:
        return "Triton's HTTP endpoint `generate` has no correlation ids, which this model needs."
    return _fill("curl.md.in", {"name": name}).rstrip()


def _sessions(options: TritonOptions) -> str:
    if options.max_sessions == 0:
        return "This repository was written without sessions (`max_sessions` is 0)."
    text = (
        f"A request with a correlation id belongs to a session; an instance keeps up to"
        f" {options.max_sessions}."
    )
    if options.sticky:
        text += (
            " There are several instances, so Triton brings all requests of a session to the same"
            " one (`sequence_batching`), and every request needs a correlation id: one that stands"
            " alone takes a new id, with both flags."
        )
    return text


def _scale(name: str, options: TritonOptions) -> str:
    count = options.instances * max(len(options.gpus), 1)
    place = f"on GPU {', '.join(map(str, options.gpus))}" if options.gpus else "on the CPU"
    return _fill(
        "scale.md.in",
        {
            "name": name,
            "now": "one instance" if count == 1 else f"{count} instances",
            "place": place,
        },
    ).rstrip()


def _plan(bundle: EngineBundle, name: str, plan: PlanModel | str) -> str:
    if isinstance(plan, str):
        return f"## No TensorRT step model\n\nIt was left out: {plan}."
    states = [f"`{past}.{{i}}` -> `{present}.{{i}}`" for past, present in STATES.items()]
    preload = ":".join(f"{name}_step/plugins/{file}" for file in plan.plugins)
    wiring = "The engine uses no plugin library."
    if plan.plugins:
        wiring = (
            "`--backend-config=tensorrt,plugins=...` in the command above loads the plugin library"
            f" for all engines of the server; `LD_PRELOAD={preload}` does the same."
        )
    return _fill(
        "step.md.in",
        {
            "name": name,
            "names": ", ".join(states),
            "context": str(plan.context),
            "max_batch": str(plan.max_batch),
            "wiring": wiring,
            "version": bundle.manifest.versions.get("tensorrt", "of the version that built it"),
        },
    ).rstrip()
