"""FLA kernels and the reference on a GPU, against fp64; run where flash-linear-attention is."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ringexport.model.linear_attention import CHUNK, LinearInputs, fla, plain
from tests.golden import generate
from tests.model.support import (
    VALUE_RTOL,
    fp64_linear,
    golden,
    linear_inputs,
    load_model,
    row_tokens,
    write_checkpoint,
)
from tests.numerics import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
Arrays = list[np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def _needs_fla() -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")


def on_gpu(inputs: LinearInputs) -> LinearInputs:
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return replace(
        inputs, **{name: v.cuda() for name, v in values.items() if isinstance(v, torch.Tensor)}
    )


def bf16_chunks(inputs: LinearInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunked form with bf16 operands in every matrix product, summed in fp32.

    What a kernel of this dtype cannot avoid: the scores, the decayed values and the carried state
    are rounded to bf16 where they enter a product; the state itself is carried in fp32.
    """
    x = inputs.prepared()

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().float()

    valid = x.query.new_ones(x.query.shape[:2]) if x.valid is None else x.valid.float()
    decay, state, outputs = x.log_decay[:, None, None], x.past_state, []
    for start in range(0, x.query.shape[1], CHUNK):
        tokens = slice(start, start + CHUNK)
        query, key, value = (t[:, tokens].transpose(1, 2) for t in (x.query, x.key, x.value))
        count = valid[:, None, tokens, None].cumsum(2)
        between = ((count - count.mT) * decay).masked_fill(count < count.mT, -torch.inf).exp()
        output = rounded(query @ key.mT * between.tril()) @ value
        output = output + (count * decay).exp() * (query @ rounded(state))
        outputs.append(output.transpose(1, 2) * x.query_scale)
        kept_value = rounded(value * ((count[:, :, -1:] - count) * decay).exp())
        state = (count[:, :, -1:] * decay).exp() * state + key.mT @ kept_value
    return torch.cat(outputs, dim=1).bfloat16(), state


def worst(actual: list[torch.Tensor], expected: Arrays) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(
        float(np.abs(a.double().cpu().numpy() - e).max()) if e.size else 0.0 for a, e in pairs
    )


def ulp(arrays: Arrays, mantissa_bits: int) -> float:
    """One unit in the last place of the largest magnitude."""
    top = max(float(np.abs(array).max()) for array in arrays if array.size)
    return 2.0 ** (np.floor(np.log2(top)) - mantissa_bits)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 4097])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_fla_is_as_exact_as_torch_in_bf16(length: int, batch: int, *, ragged: bool) -> None:
    inputs = linear_inputs(batch, length, heads=3, key_dim=128, value_dim=128)
    lengths = [length] * batch
    if ragged:
        lengths = [max(length - 1, 0), length // 2, length][:batch]
        valid = torch.arange(length) < torch.tensor(lengths)[:, None]
        inputs = replace(inputs, valid=valid)
    expected, expected_state = fp64_linear(inputs, lengths)
    errors = {}
    for kernel in (fla, bf16_chunks):
        output, state = kernel(on_gpu(inputs))
        assert output.isfinite().all()
        assert state.dtype == torch.float32
        rows = [output[row, :stop] for row, stop in enumerate(lengths)]
        errors[kernel] = worst(rows, expected), worst([state], [expected_state])
    if any(array.size for array in expected):
        assert errors[fla][0] <= 2 * errors[bf16_chunks][0] + ulp(expected, 7)
    # 4 ulp: the kernels' exp is ex2.approx, 2^-22, where torch's is right to 1 ulp.
    assert errors[fla][1] <= 2 * errors[bf16_chunks][1] + 4 * ulp([expected_state], 23)


@pytest.mark.parametrize("side", ["left", "right"])
def test_fla_ignores_padding(side: str) -> None:
    inputs = linear_inputs(2, 200, heads=3, key_dim=128, value_dim=128)
    place = slice(0, 90) if side == "right" else slice(110, 200)
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[1] = False
    valid[1, place] = True
    short = replace(
        inputs,
        **{name: getattr(inputs, name)[1:, place] for name in ("query", "key", "value")},
        past_state=inputs.past_state[1:],
    )
    output, state = fla(on_gpu(replace(inputs, valid=valid)))
    alone, alone_state = fla(on_gpu(short))
    # bf16 operands; padding moves the chunks' borders.
    assert_close(output[1:, place].float().cpu(), alone.float().cpu(), rtol=2**-6)
    assert_close(state[1:].cpu(), alone_state.cpu(), rtol=2**-7)


@pytest.mark.parametrize("length", [1, 65, 4097])
def test_torch_on_the_gpu_is_fp32(length: int) -> None:
    inputs = linear_inputs(2, length)
    expected, expected_state = fp64_linear(inputs)
    output, state = plain(on_gpu(inputs))
    assert_close(output.cpu(), np.stack(expected), rtol=VALUE_RTOL)
    assert_close(state.cpu(), expected_state, rtol=VALUE_RTOL * length**0.5)


@pytest.mark.parametrize("name", generate.CONFIGS)
def test_network_on_the_gpu_matches_the_golden(tmp_path: Path, name: str) -> None:
    model = load_model(write_checkpoint(tmp_path / name, generate.CONFIGS[name]), device="cuda")
    state, tokens, stored = model.new_state(1), row_tokens(name, 0), golden(f"network_{name}")
    cut = generate.ROW_LENGTHS[0]
    logits = [model.forward(tokens[None, :cut], None, state)]
    logits += [model.forward(token[None, None], None, state) for token in tokens[cut:]]
    expected = stored["serving.0.logits"][cut - 1 :]
    assert_close(torch.cat(logits).cpu(), expected, rtol=VALUE_RTOL)
    layer = max(state.recurrent_state)
    expected = stored[f"serving.0.recurrent_state.{layer}"]
    assert_close(
        state.recurrent_state[layer][0].cpu(), expected, rtol=VALUE_RTOL * len(tokens) ** 0.5
    )


def test_network_with_fla_agrees_with_torch(tmp_path: Path) -> None:
    """bf16, up to the first router: later layers may choose other experts."""
    path = write_checkpoint(tmp_path / "base", generate.BASE)
    tokens = torch.randint(0, 64, (3, 150))
    lengths, taps = torch.tensor([150, 70, 1]), {}
    for kernels in ("torch", "fla"):
        model = load_model(path, device="cuda", dtype=torch.bfloat16, kernels=kernels)
        taps[kernels] = dict[str, torch.Tensor]()
        state = model.new_state(3)
        model.forward(tokens, lengths, state, taps=taps[kernels])
        taps[kernels]["state"] = state.recurrent_state[0]
    for name in ("hidden.0", "state"):
        actual, expected = (taps[kernels][name].float().cpu() for kernels in ("fla", "torch"))
        assert_close(actual, expected, rtol=2**-6)
