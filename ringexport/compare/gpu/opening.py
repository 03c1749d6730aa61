"""Put an engine's weights on the GPU: those of a bundle, or random ones of a published config."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ringexport.checkpoint import RingConfig
from ringexport.errors import BackendUnavailableError
from ringexport.kernels.library import DEFAULT_LIBRARY, KernelLibrary
from ringexport.packing.layout import MatrixFormat
from ringexport.packing.writer import WEIGHTS_FILE
from ringexport.progress import Progress

try:
    import torch

    from ringexport.compare.gpu.memory import used_bytes
    from ringexport.runtime.backends.cuda.open import why_not_here
    from ringexport.runtime.backends.cuda.random_weights import random_weights
    from ringexport.runtime.backends.cuda.weights import DeviceWeights, load_weights
except ImportError as error:  # pragma: no cover - the tests' environment has it
    raise BackendUnavailableError(
        f"benchmarks of a GPU need the package torch: {error}",
        hint="pip install 'ringexport[gpu]'",
    ) from error

__all__ = ["Gpu", "find_gpu", "load_engine", "random_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU and the kernels for it.

    Attributes:
        device: where tensors live.
        library: the kernel library.
        conditions: name and versions, for reports.
        used_before: bytes of its memory that were taken before any weights came.
    """

    device: torch.device
    library: KernelLibrary
    conditions: dict[str, str]
    used_before: int


def find_gpu(library: Path | None, target: str = "cuda") -> Gpu:
    """Return the current GPU.

    Args:
        library: the kernel library, None for `DEFAULT_LIBRARY`.
        target: such as "cuda:sm_90", or "cuda" for whichever GPU there is.

    Raises:
        BackendUnavailableError: no GPU, another one, or no kernel library.
    """
    missing = why_not_here(target, library)
    if missing is not None:
        reason, hint = missing
        raise BackendUnavailableError(f"the fast engine cannot run here: {reason}", hint=hint)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)  # what CUDA itself takes is not the engine's
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        device=device,
        library=KernelLibrary.open(library or DEFAULT_LIBRARY),
        conditions={
            "gpu": properties.name,
            "gpu memory": f"{properties.total_memory / 1e9:.1f} GB",
            "multiprocessors": str(properties.multi_processor_count),
            "cuda": str(torch.version.cuda),
        },
        used_before=used_bytes(device),
    )


def random_engine(
    gpu: Gpu, config: RingConfig, formats: Mapping[str, MatrixFormat], *, fp8_cache: bool
) -> DeviceWeights:
    """Make random weights on a GPU, in place.

    Args:
        gpu: where to.
        config: of the model.
        formats: of its matrices; what is not named is bf16.
        fp8_cache: keep the KV cache in FP8-E4M3.

    Raises:
        RingExportError: the memory of the GPU does not suffice.
    """
    weights = random_weights(config, formats, gpu.device, fp8_cache=fp8_cache)
    torch.cuda.empty_cache()
    return weights


def load_engine(gpu: Gpu, directory: Path, config: Path, progress: Progress) -> DeviceWeights:
    """Load the packed weights of a target of a bundle.

    Args:
        gpu: where to.
        directory: of the target.
        config: the model's config.json.
        progress: told of the bytes that have arrived.

    Raises:
        BundleError: the weights cannot be read.
    """
    path = directory / WEIGHTS_FILE
    return load_weights(path, RingConfig.from_file(config), gpu.device, progress)
