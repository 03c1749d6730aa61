"""Golden files, the checkpoints that they belong to, and models on them."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.model import ReferenceModel, ReferenceState
from ringexport.model.linear_attention import LinearInputs
from tests.checkpoints import tiny_config
from tests.golden import generate

VALUE_RTOL = 1e-5  # L1: fp32 against fp64, relative to the tensor's largest magnitude

torch.set_num_threads(1)


@cache
def golden(stem: str) -> dict[str, npt.NDArray[Any]]:
    return load_file(generate.DIRECTORY / f"{stem}.safetensors")


def config_json(config: generate.Config) -> dict[str, Any]:
    return tiny_config(**asdict(config), eos_token_id=1, pad_token_id=1)


def ring_config(config: generate.Config) -> RingConfig:
    return RingConfig.from_dict(config_json(config), source="golden")


def write_checkpoint(directory: Path, config: generate.Config) -> Path:
    """Write the generator's weights, which are exact in bf16, as a published checkpoint."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(config)))
    tensors = {}
    for name, weight in generate.weights_of(config).items():
        dtype = np.float32 if name.endswith("expert_bias") else ml_dtypes.bfloat16
        tensors[name] = weight.astype(dtype)
        np.testing.assert_array_equal(tensors[name].astype(np.float64), weight)
    save_file(tensors, directory / "model.safetensors")
    return directory


def load_model(path: Path, **options: Any) -> ReferenceModel:
    with CheckpointWeights.open(path) as weights:
        return ReferenceModel(weights.config, weights, **options)


def row_tokens(name: str, row: int) -> torch.Tensor:
    return torch.from_numpy(golden(f"network_{name}")[f"serving.{row}.tokens"])


def assert_states_equal(first: ReferenceState, second: ReferenceState) -> None:
    """Check position, recurrent states and the used part of the caches bit by bit."""
    left, right = first.snapshot(), second.snapshot()
    assert left.position.tolist() == right.position.tolist()
    for layer, state in left.recurrent_state.items():
        assert torch.equal(state, right.recurrent_state[layer]), f"layer {layer}"
    for layer, pair in left.kv_cache.items():
        for mine, other in zip(pair, right.kv_cache[layer], strict=True):
            for row, length in enumerate(left.position.tolist()):
                assert torch.equal(mine[row, :, :length], other[row, :, :length]), f"layer {layer}"


def linear_inputs(
    batch: int, length: int, *, heads: int = 6, key_dim: int = 16, value_dim: int = 16
) -> LinearInputs:
    """Random inputs in fp32 with the decays of a real layer and a state that is not zero."""
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16().float()

    decay = generate.log_decay(heads, 1, 20, "serving")
    return LinearInputs(
        query=normal(batch, length, heads, key_dim),
        key=normal(batch, length, heads, key_dim),
        value=normal(batch, length, heads, value_dim),
        log_decay=torch.from_numpy(decay).float(),
        past_state=4 * normal(batch, heads, key_dim, value_dim),
        query_scale=key_dim**-0.5,
    )


def fp64_linear(
    inputs: LinearInputs, lengths: list[int] | None = None
) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """Run the generator row by row on the first `lengths` tokens: outputs per row, states."""
    outputs, states = [], []
    for row in range(inputs.query.shape[0]):
        stop = inputs.query.shape[1] if lengths is None else lengths[row]
        tensors = (inputs.query, inputs.key, inputs.value)
        q, k, v = (t[row, :stop].double().cpu().numpy() for t in tensors)
        decay, past = inputs.log_decay.double().cpu().numpy(), inputs.past_state[row]
        output, state = generate.linear_attention(q, k, v, decay, past.double().cpu().numpy())
        outputs.append(output)
        states.append(state)
    return outputs, np.stack(states)
