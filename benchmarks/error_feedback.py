"""What rounding with error feedback (GPTQ) would give FP8 on ring-nano: an experiment.

    python benchmarks/error_feedback.py

takes about ten minutes on two cores and writes a table to docs/numerics.md. The columns of a matrix
are rounded one after the other, and the columns that are left make up for the error, weighed by the
products of the inputs that calibration prompts give (Frantar et al., 2023, arXiv:2210.17323).
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quantization import HEADER, LOOSE, MODEL, STRICT, Bench, row
from tables import markdown, replace
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ringexport.calibrate import CalibrationSettings, calibrate, load_prompts
from ringexport.calibrate.prompts import tokenize
from ringexport.checkpoint import CheckpointWeights
from ringexport.model.network import ReferenceModel
from ringexport.ops.quantization import NumberFormat
from ringexport.ops.schemes import WeightObserver, WeightScheme
from ringexport.quantize.scales import absmax_tiles, find_scale
from ringexport.quantize.scheme import PRESETS
from ringexport.quantize.shipped import load_recipe

RECIPES = {"fp8": STRICT, "fp8-static": LOOSE, "fp8-all": LOOSE}
DAMPING = 0.01
SAMPLES, MAX_TOKENS = 128, 512
LARGEST = 448.0
Key = tuple[int, str, int]
"""Layer, name of its tensor, expert; the output projection is (-1, "", 0)."""


class Moments(TorchFunctionMode):
    """While entered, sums x x^T over the inputs x of known matrices."""

    def __init__(self, known: Mapping[int, Key]) -> None:
        super().__init__()
        self._known = known
        self.found: dict[Key, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        key = self._known.get(args[1].data_ptr()) if func is F.linear else None
        if key is not None:
            wide = args[0].double()
            self.found[key] = self.found.get(key, 0) + wide.T @ wide
        return func(*args, **(kwargs or {}))


def matrices(model: ReferenceModel) -> dict[Key, Tensor]:
    """Return the matrices that a recipe may quantize, as views of the model's tensors."""
    found: dict[Key, Tensor] = {(-1, "", 0): model._head}  # noqa: SLF001
    for layer, weights in enumerate(model._layers):  # noqa: SLF001
        for name, tensor in weights.items():
            if name.startswith("attention.") and tensor.ndim == 2:
                found[layer, name, 0] = tensor
            elif name.endswith((".gate_up", ".down")):
                found |= {(layer, name, expert): tensor[expert] for expert in range(len(tensor))}
    return found


def module_of(key: Key) -> str:
    """Return the name of a module whose scheme is that of the matrix."""
    layer, name, expert = key
    if layer < 0:
        return "lm_head"
    unit, _, fused = name.rpartition(".")
    if fused not in {"gate_up", "down"}:
        return f"model.layers.{layer}.{name.removesuffix('.weight')}"
    unit += f".{expert}" if unit == "mlp.experts" else ""
    return f"model.layers.{layer}.{unit}.{'down' if fused == 'down' else 'gate'}_proj"


def with_feedback(weight: Tensor, moments: Tensor) -> Tensor:
    """Return an FP8-E4M3 matrix [out, in] whose rows have scales of least squared error.

    Args:
        weight: [out, in] fp32.
        moments: [in, in] fp64, sum of x x^T over the inputs.
    """
    array = weight.numpy()
    per_row = PRESETS["fp8_e4m3_dynamic"].weights.granularity
    scheme = WeightScheme(
        format=NumberFormat.FP8_E4M3, granularity=per_row, observer=WeightObserver.MSE
    )
    scale = torch.from_numpy(find_scale(array, scheme, absmax_tiles(array, per_row)))
    moments = moments.clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    order = diagonal.argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(moments[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, rounded = weight.double()[:, order], torch.empty_like(weight)
    for column in range(weight.shape[1]):
        value = left[:, column, None]
        codes = (value / scale).clamp(-LARGEST, LARGEST).float().to(torch.float8_e4m3fn)
        real = codes.float() * scale
        error = (value - real) / upper[column, column]
        left[:, column:] -= error * upper[column, column:]
        rounded[:, order[column]] = real[:, 0]
    return rounded


def moments_of(model: ReferenceModel) -> dict[Key, Tensor]:
    """Return the moments of every matrix's inputs over the calibration prompts."""
    samples = tokenize(
        load_prompts("all"),
        MODEL / "tokenizer.json",
        num_samples=SAMPLES,
        max_tokens=MAX_TOKENS,
        vocab_size=model.config.vocab_size,
    )
    known = {tensor.data_ptr(): key for key, tensor in matrices(model).items()}
    with Moments(known) as moments:
        for sample in samples:
            tokens = torch.tensor([list(sample.ids)])
            model.forward(tokens, None, model.new_state(1), every_position=True)
    return moments.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with CheckpointWeights.open(MODEL) as weights:
        stats = calibrate(weights, load_prompts("all"), CalibrationSettings())
        plain = ReferenceModel(weights.config, weights)
    found = moments_of(plain)
    sources = matrices(plain)
    rounded: dict[Key, Tensor] = {}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments.max_tokens, Path(scratch))
        for name, bar in RECIPES.items():
            with bench.quantized(load_recipe(name), stats) as runner:
                with CheckpointWeights.open(Path(scratch) / name) as weights:
                    schemes = {name for name, one in weights.schemes.items() if one.weights}
                for key, target in matrices(runner._model).items():  # noqa: SLF001
                    if module_of(key) not in schemes:
                        continue
                    if key not in rounded:
                        rounded[key] = with_feedback(sources[key], found[key])
                    target.copy_(rounded[key])
                for text in bench.texts:
                    score = bench._pair(runner, text)  # noqa: SLF001
                    rows.append(row(f"`{name}`", Path(text.name).name, score, bar))
                    print(*rows[-1], flush=True)
    replace("numerics.md", "error-feedback", markdown(HEADER, rows))


if __name__ == "__main__":
    main()
