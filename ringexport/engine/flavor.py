"""TensorRT and TensorRT-RTX as one explicit value: the module, and what the flavour can do."""

import atexit
import ctypes
import functools
import importlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ringexport.errors import BackendUnavailableError

__all__ = ["FLAVORS", "TensorRt", "TrtFlavor", "find_module", "open_tensorrt"]

Trt = Any  # the module of a flavour, which has no type information


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtFlavor:
    """One of the two TensorRTs.

    Attributes:
        name: as targets spell it.
        modules: Python modules that may hold it, the preferred first.
        cross_builds: an engine can be built for GPUs that are not in this machine.
        hint: how to get it.
        lacks: build options that it does not have, whatever its module says.
        on_gpu: build options that work only where a GPU is.
    """

    name: str
    modules: tuple[str, ...]
    cross_builds: bool
    hint: str
    lacks: frozenset[str] = frozenset()
    on_gpu: frozenset[str] = frozenset()


FLAVORS = {
    "tensorrt": TrtFlavor(
        name="tensorrt",
        modules=("tensorrt", "tensorrt_bindings"),
        cross_builds=False,
        hint="pip install 'ringexport[tensorrt]', on a machine with the GPU of the target",
    ),
    "tensorrt-rtx": TrtFlavor(
        name="tensorrt-rtx",
        modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
        cross_builds=True,
        hint="pip install 'ringexport[tensorrt-rtx]'",
        lacks=frozenset({"timing_cache", "version_compatible"}),
        on_gpu=frozenset({"refit", "strip_plan"}),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRt:
    """A flavour that is loaded.

    Attributes:
        flavor: which one.
        module: its Python module; everything below takes it from here.
    """

    flavor: TrtFlavor
    module: Trt

    @property
    def version(self) -> str:
        """Version of the library."""
        return str(self.module.__version__)


def find_module(flavor: TrtFlavor) -> str | None:
    """Return the name of the flavour's module that is installed, without importing it."""
    return next((name for name in flavor.modules if importlib.util.find_spec(name)), None)


def open_tensorrt(flavor: TrtFlavor) -> TensorRt:
    """Import the module of a flavour.

    Raises:
        BackendUnavailableError: it is not installed, or cannot be loaded.
    """
    name = find_module(flavor)
    if name is None:
        raise BackendUnavailableError(f"{flavor.name} is not installed", hint=flavor.hint)
    try:
        if name == "tensorrt_rtx_bindings":
            _name_rtx_library()
        module: ModuleType = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"{flavor.name} cannot be loaded: {error}", hint=flavor.hint
        ) from error
    return TensorRt(flavor=flavor, module=module)


@functools.cache
def _name_rtx_library() -> None:
    """Make ``libtensorrt_rtx.so`` a name that the ONNX parser of the wheel finds.

    The parser opens the library under this name when it meets a plugin, and ends the process if it
    cannot. The wheel only has ``libtensorrt_rtx.so.1``. The parser looks beside itself, so it is
    loaded through a folder of links, which has to stay until the process ends.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    libraries = [path for place in places for path in Path(place).glob("libtensorrt_*rtx.so.*")]
    if not libraries or any((path.parent / "libtensorrt_rtx.so").exists() for path in libraries):
        return
    if any(_is_loaded(path) for path in libraries):
        raise BackendUnavailableError(
            "tensorrt_rtx_libs was imported before ringexport opened it: its parser would end the"
            " process at the first plugin",
            hint=f"import it later, or link libtensorrt_rtx.so in {places[0]} to the library there",
        )
    folder = tempfile.TemporaryDirectory(prefix="ringexport-")
    atexit.register(folder.cleanup)
    for path in libraries:
        (Path(folder.name) / path.name).symlink_to(path)
        if path.name.startswith("libtensorrt_rtx.so."):
            (Path(folder.name) / "libtensorrt_rtx.so").symlink_to(path)
    for path in sorted(libraries, reverse=True):  # the parser needs the other one
        ctypes.CDLL(str(Path(folder.name) / path.name))


def _is_loaded(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return False
    return True
