"""The plugin library: where it is, what it says about itself, and loading it into a registry."""

import ctypes
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ringexport.engine.flavor import TensorRt
from ringexport.engine.plugin_log import listen
from ringexport.errors import BackendUnavailableError, VersionError
from ringexport.files import is_truncated_library
from ringexport.version import __version__

__all__ = [
    "ABI_VERSION",
    "BUILD_HINT",
    "DEFAULT_LIBRARY",
    "NO_KERNELS",
    "PLUGIN_LIBRARY_FILE",
    "PluginLibrary",
    "find_library",
]

PLUGIN_LIBRARY_FILE = "libringplugins.so"
DEFAULT_LIBRARY = Path("build/plugins") / PLUGIN_LIBRARY_FILE
BUILD_HINT = (
    "build it with: make plugins, in a clone of the repository, or name it in"
    " RINGEXPORT_PLUGIN_LIBRARY"
)
ABI_VERSION = 2
"""RINGPLUGINS_ABI of plugins/hosts/tensorrt/fields.h: the serialized form of the plugins."""

NO_KERNELS = "none"
"""What a library that was compiled without kernels says; it builds engines that nothing runs."""

_IDENTITY = re.compile(
    rb"@\(#\)ringplugins;version=([^;\0]{1,32});abi=(\d{1,6});kernels=([^;\0]{1,128});"
    rb"tensorrt_headers=([^;\0]{1,32});"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginLibrary:
    """A plugin library on disk.

    Attributes:
        path: of the file.
        version: of ringexport that it was compiled from.
        abi: of the serialized plugins.
        kernels: architectures that it has kernels for, such as "80+90a", or NO_KERNELS.
        tensorrt_headers: version of the headers that it was compiled with.
    """

    path: Path
    version: str
    abi: int
    kernels: str
    tensorrt_headers: str

    @classmethod
    def read(cls, path: Path) -> "PluginLibrary":
        """Read what a library says about itself, without loading it.

        Raises:
            BackendUnavailableError: there is no plugin library at `path`, or a part of one.
        """
        try:
            found = _IDENTITY.search(path.read_bytes())
            truncated = is_truncated_library(path)
        except OSError as error:
            raise BackendUnavailableError(
                f"the plugin library {path} cannot be read: {error.strerror}", hint=BUILD_HINT
            ) from error
        if found is None:
            raise BackendUnavailableError(
                f"{path} is no plugin library of ringexport", hint=BUILD_HINT
            )
        if truncated:
            raise BackendUnavailableError(
                f"the plugin library {path} is truncated", hint=f"copy it again, or {BUILD_HINT}"
            )
        version, abi, kernels, headers = (
            part.decode("ascii", "replace") for part in found.groups()
        )
        return cls(
            path=path, version=version, abi=int(abi), kernels=kernels, tensorrt_headers=headers
        )

    def check(self) -> None:
        """Refuse a library of another version.

        Raises:
            VersionError: engines and this version of ringexport do not fit it.
        """
        if (self.version, self.abi) != (__version__, ABI_VERSION):
            raise VersionError(
                f"the plugin library {self.path} is of ringexport {self.version} with ABI"
                f" {self.abi}, expected {__version__} with ABI {ABI_VERSION}",
                hint=BUILD_HINT,
            )

    def lacks(self, architectures: Iterable[int]) -> tuple[int, ...]:
        """Return the architectures, compute capabilities times ten, that it has no kernels for.

        Code for one architecture runs on later ones of the same major version.
        """
        built = [divmod(int(number), 10) for number in re.findall(r"\d+", self.kernels)]
        found = []
        for number in architectures:
            major, minor = divmod(number, 10)
            if not any(one == major and first <= minor for one, first in built):
                found.append(number)
        return tuple(found)

    def versions(self) -> dict[str, str]:
        """Return what the manifest of a bundle says about the library."""
        return {
            "ringplugins": self.version,
            "ringplugins_abi": str(self.abi),
            "ringplugins_kernels": self.kernels,
        }

    def load(self, tensorrt: TensorRt) -> None:
        """Register the plugins; loading the same file again changes nothing.

        Raises:
            BackendUnavailableError: the file cannot be loaded, or lacks what plugins export.
        """
        registry = tensorrt.module.get_plugin_registry()
        registry.parent_search_enabled = True
        known = {creator.name for creator in registry.all_creators}
        if "RingLinearAttention" in known:
            return
        try:
            # This says why; the registry only says that it has not loaded it.
            library = ctypes.CDLL(str(self.path.resolve()))
            for symbol in ("getCreators", "setLoggerFinder"):
                getattr(library, symbol)
        except (OSError, AttributeError) as error:
            raise BackendUnavailableError(
                f"the plugin library cannot be loaded: {error}", hint=BUILD_HINT
            ) from error
        registry.load_library(os.fsencode(self.path.resolve()))
        listen(self.path.resolve())


def find_library(explicit: Path | None = None) -> PluginLibrary:
    """Return the plugin library, checked for its version.

    Args:
        explicit: the file, None for `DEFAULT_LIBRARY` below the current directory.

    Raises:
        BackendUnavailableError: there is none.
        VersionError: it is of another version.
    """
    path = explicit or DEFAULT_LIBRARY
    if not path.is_file():
        raise BackendUnavailableError(f"there is no plugin library at {path}", hint=BUILD_HINT)
    library = PluginLibrary.read(path)
    library.check()
    return library
