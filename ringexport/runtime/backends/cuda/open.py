"""Open the packed engine of a bundle, or say why it cannot run here."""

from collections.abc import Callable
from pathlib import Path

from ringexport.checkpoint import RingConfig
from ringexport.errors import BackendUnavailableError
from ringexport.kernels.library import BUILD_HINT, DEFAULT_LIBRARY, KernelLibrary
from ringexport.packing.writer import WEIGHTS_FILE
from ringexport.progress import Progress

try:
    import torch

    from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
    from ringexport.runtime.backends.cuda.weights import load_weights
except ImportError as error:  # pragma: no cover - the tests' environment has it
    raise BackendUnavailableError(
        f"the cuda backend needs the package torch: {error}", hint="pip install 'ringexport[gpu]'"
    ) from error

__all__ = ["CudaOptions", "open_packed", "why_not_here"]


def why_not_here(target: str, library: Path | None) -> tuple[str, str] | None:
    """Return (reason, hint) if `target` cannot run here, else None.

    Args:
        target: such as "cuda:sm_90", or "cuda" for whichever GPU there is.
        library: the kernel library, None for `DEFAULT_LIBRARY`.
    """
    wanted = target.partition("sm_")[2]
    if not torch.cuda.is_available():
        return "torch sees no CUDA device", "use a machine with an NVIDIA GPU and its driver"
    major, minor = torch.cuda.get_device_capability()
    if wanted and wanted != f"{major}{minor}":
        reason = f"this GPU is sm_{major}{minor}, the engine was built for sm_{wanted}"
        return reason, f"build it with --target cuda:sm_{major}{minor}"
    path = library or DEFAULT_LIBRARY
    if not path.is_file():
        return f"there is no kernel library at {path}", BUILD_HINT
    return None


def open_packed(
    directory: Path,
    config: Path,
    *,
    library: Path | None,
    model_digest: Callable[[], str],
    options: CudaOptions,
    progress: Progress | None = None,
) -> CudaRunner:
    """Load the packed weights of a target.

    Args:
        directory: of the target in the bundle.
        config: the model's config.json.
        library: the kernel library, None for `DEFAULT_LIBRARY`.
        model_digest: see `BaseRunner`.
        options: sizes and formats.
        progress: told of the bytes that have arrived.

    Raises:
        BackendUnavailableError: the kernel library cannot be used.
        BundleError: the weights cannot be read.
        RingExportError: the memory of the GPU does not suffice.
    """
    kernels = KernelLibrary.open(library or DEFAULT_LIBRARY)
    device = torch.device("cuda", torch.cuda.current_device())
    weights = load_weights(directory / WEIGHTS_FILE, RingConfig.from_file(config), device, progress)
    return CudaRunner(weights, kernels, model_digest=model_digest, options=options)
