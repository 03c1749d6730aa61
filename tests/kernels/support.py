"""What the kernel tests share: the library, guarded buffers, the bound that follows the dtype."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from ringexport.kernels.library import DType, KernelLibrary
from ringexport.settings import load_settings

ROOT = Path(__file__).parents[2]
DTYPES = {
    torch.float32: DType.FLOAT32,
    torch.float16: DType.FLOAT16,
    torch.bfloat16: DType.BFLOAT16,
    torch.float8_e4m3fn: DType.FP8_E4M3,
    torch.int8: DType.INT8,
}
GUARD_BYTES = 256
GUARD_VALUE = 0xA5


@functools.cache
def library() -> KernelLibrary:
    """The library of RINGEXPORT_KERNEL_LIBRARY, or the one that CMake builds."""
    path = load_settings().kernel_library or ROOT / "build" / "plugins" / "libringkernels.so"
    return KernelLibrary.open(path)


class Guarded:
    """A buffer filled with NaN (or 0x7F bytes) between guards that nobody may touch."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self._bytes = torch.full(
            (size + 2 * GUARD_BYTES,), GUARD_VALUE, dtype=torch.uint8, device="cuda"
        )
        inside = self._bytes[GUARD_BYTES : GUARD_BYTES + size]
        inside.fill_(0x7F)
        self.tensor = inside.view(dtype).view(shape)
        if dtype.is_floating_point and dtype.itemsize > 1:
            self.tensor.fill_(float("nan"))

    def check(self) -> Tensor:
        """Return the content after a look at the guards."""
        torch.cuda.synchronize()
        guards = torch.cat((self._bytes[:GUARD_BYTES], self._bytes[-GUARD_BYTES:]))
        assert bool((guards == GUARD_VALUE).all()), "the kernel wrote outside its buffer"
        return self.tensor


def workspace(op: str, **fields: object) -> dict[str, object]:
    """Return the workspace fields of an op: zeroed, guarded by its own size."""
    size = library().workspace_bytes(op, **fields)
    if size == 0:
        return {}
    return {
        "workspace": torch.zeros(size, dtype=torch.uint8, device="cuda"),
        "workspace_bytes": size,
    }


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return `x @ y`; of 16-bit numbers in fp32, rounded once, which is what cuBLAS computes.

    Its own 16-bit kernels end with an illegal access under compute-sanitizer's racecheck, in
    programs too that launch nothing else.
    """
    return (x.float() @ y.float()).to(x.dtype) if x.dtype.itemsize == 2 else x @ y


def assert_within_torch(got: Tensor, torch_same_dtype: Tensor, truth: Tensor) -> None:
    """Level L2: the kernel errs at most twice as much as torch in the same dtype, plus one ulp.

    Args:
        got: from the kernel.
        torch_same_dtype: the same computation by torch in the kernel's dtype.
        truth: in fp64.
    """
    assert torch.equal(torch.isfinite(got.double()), torch.isfinite(truth)), "NaN or infinity"
    error = (got.double() - truth).abs().max().item()
    error_torch = (torch_same_dtype.double() - truth).abs().max().item()
    ulp = truth.abs().max().item() * torch.finfo(got.dtype).eps
    assert error <= 2 * error_torch + ulp, (
        f"error {error:.3e}, torch's {error_torch:.3e}, ulp {ulp:.3e}"
    )
