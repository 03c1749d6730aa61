"""The reference over packed weights equals the reference over the checkpoint they came from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ringexport.checkpoint import CheckpointWeights
from ringexport.compare.gpu.reference import PackedReference
from ringexport.model.network import ReferenceModel
from ringexport.packing.writer import WEIGHTS_FILE, write_packed
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.runtime.backends.torch_quantized import QuantizedModel
from tests.numerics import assert_close

RING_NANO = Path(__file__).parents[2] / "models" / "ring-nano"


def packed(checkpoint: Path, directory: Path) -> DeviceWeights:
    directory.mkdir()
    with CheckpointWeights.open(checkpoint) as weights:
        write_packed(weights, directory)
        tensors = load_file(directory / WEIGHTS_FILE)
        return DeviceWeights(weights.config, tensors, source="packed weights")


def logits(model: ReferenceModel) -> torch.Tensor:
    tokens = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.manual_seed(3))
    state = model.new_state(2)
    first = model.forward(tokens[:, :38], None, state, every_position=True)
    steps = [model.forward(tokens[:, at : at + 1], None, state) for at in (38, 39)]
    return torch.cat((first, torch.stack(steps, dim=1)), dim=1)


def test_plain_weights_give_the_same_logits(tmp_path: Path) -> None:
    with CheckpointWeights.open(RING_NANO) as weights:
        expected = logits(ReferenceModel(weights.config, weights))
    found = logits(PackedReference(packed(RING_NANO, tmp_path / "packed")))
    assert_close(found.numpy(), expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("recipe", ["fp8", "fp8-block"])
def test_quantized_weights_and_inputs_give_the_same_logits(recipe: str, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    quantize_checkpoint(RING_NANO, quantized, load_recipe(recipe))
    with CheckpointWeights.open(quantized) as weights:
        expected = logits(QuantizedModel(weights))
    weights_of_engine = packed(quantized, tmp_path / "packed")
    # A value between two codes may become the other one where sums have another order, and moves
    # that position and a little what follows it: so the median of the positions is bounded.
    found = logits(PackedReference(weights_of_engine))
    assert median_error(found, expected) < 1e-5
    # The test can fail: inputs that are not rounded give other logits.
    other = logits(PackedReference(weights_of_engine, round_inputs=False))
    assert median_error(other, expected) > 1e-2


def median_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of the logits of a position, the median of all."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def test_experts_can_be_forced(tmp_path: Path) -> None:
    model = PackedReference(packed(RING_NANO, tmp_path / "packed"))
    tokens = torch.randint(0, 384, (2, 9), generator=torch.manual_seed(3))
    expected = model.forward(tokens, None, model.new_state(2), every_position=True)
    own = {layer: ids.flip(-1).to(torch.int32) for layer, ids in model.own_choices.items()}
    assert own.keys() == set(model.config.moe_layers)
    found = model.forward(tokens, None, model.new_state(2), every_position=True, experts=own)
    assert_close(found.numpy(), expected.numpy(), rtol=1e-5)
    first = model.config.moe_layers[0]
    others = own | {first: own[first].roll(1, 0)}  # those of another token
    taps: dict[str, torch.Tensor] = {}
    state = model.new_state(2)
    found = model.forward(tokens, None, state, every_position=True, taps=taps, experts=others)
    used = taps[f"expert_ids.{first}"].flatten(0, 1)
    assert used.sort().values.tolist() == others[first].sort().values.tolist()
    assert torch.equal(model.own_choices[first], own[first].flip(-1).long())
    assert float((found - expected).abs().max()) > 1e-2
