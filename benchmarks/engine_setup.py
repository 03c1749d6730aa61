"""What the benchmarks of the fast engine share: this GPU, weights for it, and tables of docs/."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tables import merged, read, replace

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.compare.gpu.opening import Gpu, find_gpu, load_engine, random_engine
from ringexport.errors import ConfigError
from ringexport.packing.writer import write_packed
from ringexport.pipeline.packed import packed_recipe
from ringexport.progress import NoProgress
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.settings import load_settings

__all__ = [
    "FLASH",
    "MINI",
    "NANO",
    "ROOT",
    "Table",
    "check_names",
    "conditions",
    "gpu",
    "nano_weights",
    "numbers",
    "runner_of",
    "weights_of",
]

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "tests" / "checkpoint" / "data"
MINI = CONFIGS / "ring-mini-linear-2.0.json"
FLASH = CONFIGS / "ring-flash-linear-2.0.json"
NANO = ROOT / "models" / "ring-nano"
_BEGIN = time.perf_counter()


def gpu() -> Gpu:
    """Return the current GPU with the kernels that were built last."""
    library = load_settings().kernel_library or ROOT / "build" / "plugins" / "libringkernels.so"
    return find_gpu(library)


def weights_of(place: Gpu, recipe: str, config: RingConfig | None = None) -> DeviceWeights:
    """Return random weights of a config, Ring-mini's if None, in the formats of a recipe."""
    config = config or RingConfig.from_file(MINI)
    chosen = packed_recipe(recipe, config)
    return random_engine(place, config, chosen.formats, fp8_cache=chosen.fp8_cache)


def nano_weights(place: Gpu, folder: Path) -> DeviceWeights:
    """Return ring-nano's weights in bf16, packed into `folder` on the way."""
    with CheckpointWeights.open(NANO) as checkpoint:
        write_packed(checkpoint, folder)
    return load_engine(place, folder, NANO / "config.json", NoProgress())


def runner_of(place: Gpu, weights: DeviceWeights, rows: int, context: int) -> CudaRunner:
    """Return the engine with room for so many rows of so many tokens."""
    options = CudaOptions(max_batch=rows, max_context=context)
    return CudaRunner(weights, place.library, model_digest=str, options=options)


def conditions(place: Gpu) -> str:
    """Return what was measured with, and when."""
    known = place.conditions
    today = time.strftime("%Y-%m-%d", time.gmtime())
    return f"{known['gpu']}, CUDA {known['cuda']}, torch {torch.__version__}, {today}"


def check_names(given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names without points to measure.

    Raises:
        ConfigError: names that are not known.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(
            f"this benchmark has no points of {', '.join(unknown)}",
            hint=f"it has points of {', '.join(known)}",
        )


def numbers(text: str, separator: str = ",") -> tuple[int, ...]:
    """Return the numbers of a list.

    Raises:
        ConfigError: something else than whole numbers above 0.
    """
    parts = text.split(separator)
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ConfigError(
            f"'{text}' is no whole number above 0, nor several with {separator} between"
        )
    return tuple(int(part) for part in parts)


class Table:
    """A table between two markers of a page of docs/, written and printed row by row.

    Args:
        page: of docs/.
        name: of the markers.
        header: of the table.
        key: rows that are there already stay unless a new one has the same first `key` cells; 0
            if all are measured in one run.
    """

    def __init__(self, page: str, name: str, header: Sequence[str], *, key: int = 0) -> None:
        self._page = page
        self._name = name
        self._header = header
        self._key = key
        self._before = ""
        self._rows: list[Sequence[object]] = []
        self.lead = ""

    def add(self, *rows: Sequence[object]) -> None:
        """Add rows, and write the table into the page below the text `lead`."""
        if not self._rows:
            print(f"{self._name}: {self.lead}", *self._header, sep=" | ")
            self._before = read(self._page, self._name)
        for row in rows:
            print(f"[{time.perf_counter() - _BEGIN:5.1f} s]", *row, sep=" | ", flush=True)
        self._rows += rows
        table = merged(self._before, self.lead, self._header, self._rows, key=self._key)
        replace(self._page, self._name, table)
