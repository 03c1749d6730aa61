"""Run by test_full_tensorrt.py in a process of its own: full TensorRT and TensorRT-RTX do not mix.

Prints one JSON object: what the package's code gets from the real module of full TensorRT.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ringexport.engine.callbacks import make_log, make_monitor, make_writer
from ringexport.engine.flavor import FLAVORS, TensorRt, open_tensorrt
from ringexport.engine.plugin_log import collected_messages
from ringexport.engine.plugins import PluginLibrary
from ringexport.ops.plugin_ops import PLUGIN_CONTRACTS
from ringexport.progress import NoProgress

NAMESPACE = "ringexport"


def create(trt: Any, name: str, values: dict[str, int | float]) -> Any:
    """Return a plugin made by the registered creator, or None if it refuses the fields."""
    creator = trt.get_plugin_registry().get_creator(name, "1", NAMESPACE)
    fields = []
    for key, value in values.items():
        real = isinstance(value, float)
        array = np.array([value], np.float32 if real else np.int32)
        kind = trt.PluginFieldType.FLOAT32 if real else trt.PluginFieldType.INT32
        fields.append(trt.PluginField(key, array, kind))
    collection = trt.PluginFieldCollection(fields)
    return creator.create_plugin("a layer", collection, trt.TensorRTPhase.BUILD)


def plugins(tensorrt: TensorRt) -> dict[str, Any]:
    """Create every plugin, and each once more without its first attribute."""
    trt, found = tensorrt.module, {}
    for spec in PLUGIN_CONTRACTS:
        values = {name: 0.5 if name in spec.reals else 1 for name in spec.attributes}
        plugin = create(trt, spec.name, values)
        core, build = (
            plugin.get_capability_interface(kind)
            for kind in (trt.PluginCapabilityType.CORE, trt.PluginCapabilityType.BUILD)
        )
        with collected_messages() as said:
            refused = not values or create(trt, spec.name, dict(list(values.items())[1:])) is None
        found[spec.name] = {
            "name": core.plugin_name,
            "namespace": core.plugin_namespace,
            "outputs": build.num_outputs,
            "refused": refused,
            "said": said,
        }
    return found


def names(trt: Any) -> dict[str, list[str]]:
    """Return what every class and enumeration of the module has."""
    classes = {name: dir(value) for name, value in vars(trt).items() if isinstance(value, type)}
    return classes | {"": dir(trt), "ILogger.Severity": dir(trt.ILogger.Severity)}


def main(library: Path) -> None:
    tensorrt = open_tensorrt(FLAVORS["tensorrt"])
    loaded = PluginLibrary.read(library)
    loaded.load(tensorrt)
    with Path("/dev/null").open("wb") as file:
        ours = [
            make_log(tensorrt),
            make_monitor(tensorrt, "a stage", NoProgress(), threading.Event()),
            make_writer(tensorrt, file),
        ]
    json.dump(
        {
            "version": tensorrt.version,
            "plugins": plugins(tensorrt),
            "made": [type(one).__mro__[1].__name__ for one in ours],
            "names": names(tensorrt.module),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
