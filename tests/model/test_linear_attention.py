"""Linear attention against the fp64 golden, and its forms against each other."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ringexport.errors import BackendUnavailableError, ConfigError, ShapeError
from ringexport.model import linear_attention
from ringexport.model.linear_attention import (
    LinearInputs,
    chunked,
    fla,
    plain,
    recurrent,
    resolve_kernel,
)
from tests.model.support import VALUE_RTOL, fp64_linear, golden, linear_inputs
from tests.numerics import assert_close

LENGTHS = (1, 7, 63, 64, 65, 500, 4097)
Form = Callable[[LinearInputs], tuple[torch.Tensor, torch.Tensor]]
both_forms = pytest.mark.parametrize("form", [recurrent, chunked], ids=lambda form: form.__name__)


@both_forms
def test_matches_the_golden_file(form: Form) -> None:
    stored = {name: torch.from_numpy(value)[None] for name, value in golden("ops").items()}
    inputs = LinearInputs(
        query=stored["linear.query"].float(),
        key=stored["linear.key"].float(),
        value=stored["linear.value"].float(),
        log_decay=stored["linear.log_decay"][0].float(),
        past_state=stored["linear.past_state"].float(),
        query_scale=stored["linear.query"].shape[-1] ** -0.5,
    )
    output, state = form(inputs)
    length = output.shape[1]
    assert_close(output, stored["linear.output"], rtol=VALUE_RTOL)
    assert_close(state, stored["linear.present_state"], rtol=VALUE_RTOL * length**0.5)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", [6, 12])
def test_any_length_matches_fp64(length: int, heads: int) -> None:
    inputs = linear_inputs(1, length, heads=heads, value_dim=8)
    kept = inputs.past_state.clone()
    expected, expected_state = fp64_linear(inputs)
    for form in (recurrent, chunked) if length <= 500 else (chunked,):
        output, state = form(inputs)
        assert output.dtype == state.dtype == torch.float32
        assert_close(output[0], expected[0], rtol=VALUE_RTOL)
        assert_close(state, expected_state, rtol=VALUE_RTOL * length**0.5)
    assert torch.equal(inputs.past_state, kept)


@both_forms
def test_slow_heads_do_not_drift(form: Form) -> None:
    """The slowest head of the published 20 layers: fp32 exp() of its decay misses this by 5x."""
    inputs = linear_inputs(1, 4097, heads=1, key_dim=4, value_dim=4)
    shifted = {name: getattr(inputs, name) + 1 for name in ("query", "key", "value")}
    inputs = replace(inputs, **shifted, log_decay=torch.tensor([-0.000205631]))
    output, state = form(inputs)
    expected, expected_state = fp64_linear(inputs)
    assert_close(output[0], expected[0], rtol=VALUE_RTOL)
    assert_close(state, expected_state, rtol=VALUE_RTOL)


@both_forms
@pytest.mark.parametrize("decay", [0.0, -1e-7, -5.0, -80.0])
def test_extreme_decays_stay_finite_and_right(form: Form, decay: float) -> None:
    inputs = replace(linear_inputs(1, 150), log_decay=torch.full((6,), decay))
    output, state = form(inputs)
    expected, expected_state = fp64_linear(inputs)
    assert_close(output[0], expected[0], rtol=VALUE_RTOL)
    assert_close(state, expected_state, rtol=VALUE_RTOL * 150**0.5)


@both_forms
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_decays_nor_adds(form: Form, side: str) -> None:
    lengths = [130, 70, 1, 0]
    inputs = linear_inputs(4, 130)
    expected, expected_state = fp64_linear(inputs, lengths)
    padded: dict[str, torch.Tensor] = {}
    valid = torch.zeros(4, 130, dtype=torch.bool)
    for name in ("query", "key", "value"):
        source = getattr(inputs, name)
        padded[name] = torch.full_like(source, torch.nan)
        for row, length in enumerate(lengths):
            place = slice(0, length) if side == "right" else slice(130 - length, 130)
            padded[name][row, place] = source[row, :length]
            valid[row, place] = True
    output, state = form(replace(inputs, **padded, valid=valid))
    assert_close(state, expected_state, rtol=VALUE_RTOL * 130**0.5)
    assert torch.equal(state[3], inputs.past_state[3])
    for row in range(4):
        assert_close(output[row, valid[row]], expected[row], rtol=VALUE_RTOL)


def test_chunks_cut_anywhere_give_the_same() -> None:
    inputs = linear_inputs(2, 200)
    whole, whole_state = plain(inputs)
    state, pieces, start = inputs.past_state, [], 0
    for size in (1, 62, 64, 1, 72):
        part = {n: getattr(inputs, n)[:, start : start + size] for n in ("query", "key", "value")}
        piece, state = plain(replace(inputs, **part, past_state=state))
        pieces.append(piece)
        start += size
    assert start == 200
    assert_close(torch.cat(pieces, 1), whole, rtol=VALUE_RTOL)
    assert_close(state, whole_state, rtol=VALUE_RTOL)


def test_bf16_operands_are_computed_in_the_dtype_of_the_state() -> None:
    inputs = linear_inputs(1, 100)
    rounded = {n: getattr(inputs, n).bfloat16() for n in ("query", "key", "value")}
    for form in (recurrent, chunked):
        output, state = form(replace(inputs, **rounded))
        reference, reference_state = form(inputs)  # its values are exact in bf16
        assert torch.equal(output, reference)
        assert torch.equal(state, reference_state)


@pytest.mark.parametrize("name", ["query", "key", "value", "log_decay", "past_state", "valid"])
def test_wrong_shapes_are_named(name: str) -> None:
    inputs = replace(linear_inputs(2, 5), valid=torch.ones(2, 5, dtype=torch.bool))
    wrong = torch.zeros(3, 4, 5, 6, 7)
    with pytest.raises(ShapeError, match=f"{name} has shape"):
        chunked(replace(inputs, **{name: wrong}))


@pytest.mark.parametrize("length", [1, 64, 65])
@pytest.mark.parametrize("ragged", [False, True])
def test_fla_is_called_as_its_signature_says(
    monkeypatch: pytest.MonkeyPatch, length: int, *, ragged: bool
) -> None:
    """A stand-in with the semantics of fla 0.6.0 `simple_gla`, run on the CPU."""
    called: list[str] = []

    def stand_in(kind: str) -> Callable[..., Any]:
        def kernel(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            g: torch.Tensor | None = None,
            g_gamma: torch.Tensor | None = None,
            scale: float | None = None,
            initial_state: torch.Tensor | None = None,
            output_final_state: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            called.append(kind)
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16
            assert initial_state is not None
            assert initial_state.dtype == torch.float32
            assert all(t.is_contiguous() for t in (q, k, v, initial_state))
            assert (g is None) != (g_gamma is None)
            assert scale is not None
            state, outputs = initial_state, []
            for t in range(q.shape[1]):
                step = g_gamma[None] if g is None else g[:, t]
                assert step.dtype == torch.float32
                state = step.exp()[..., None, None] * state
                state = state + k[:, t, :, :, None].float() * v[:, t, :, None, :].float()
                outputs.append((q[:, t, :, :, None].float() * state).sum(2) * scale)
            return torch.stack(outputs, 1).bfloat16(), state if output_final_state else None

        return kernel

    module = ModuleType("fla.ops.simple_gla")
    module.fused_recurrent_simple_gla = stand_in("recurrent")
    module.chunk_simple_gla = stand_in("chunked")
    for name in ("fla", "fla.ops", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, module)
    inputs = linear_inputs(2, length)
    if ragged:
        valid = torch.arange(length) < torch.tensor([[length], [length // 2]])
        inputs = replace(inputs, valid=valid)
    output, state = fla(inputs)
    expected, expected_state = plain(inputs)
    assert called == ["recurrent" if length <= 64 else "chunked"]
    assert output.dtype == torch.bfloat16
    assert_close(state, expected_state, rtol=VALUE_RTOL)
    counted = torch.ones(2, length).bool() if inputs.valid is None else inputs.valid
    assert_close(output[counted].float(), expected[counted], rtol=2**-8)


def test_kernel_choice() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_kernel(None, cpu, torch.bfloat16) is plain
    assert resolve_kernel("torch", cuda, torch.bfloat16) is plain
    assert resolve_kernel(None, cuda, torch.float32) is plain
    with pytest.raises(ConfigError, match=r"'fla' for torch\.bfloat16 on cpu"):
        resolve_kernel("fla", cpu, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"'fla' for torch\.float32 on cuda"):
        resolve_kernel("fla", cuda, torch.float32)
    with pytest.raises(ConfigError, match="'triton'"):
        resolve_kernel("triton", cpu, torch.float32)


def test_kernel_choice_depends_on_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cuda, find = torch.device("cuda"), "importlib.util.find_spec"
    monkeypatch.setattr(find, {}.get)
    assert resolve_kernel(None, cuda, torch.bfloat16) is plain
    with pytest.raises(BackendUnavailableError, match="fla is not installed"):
        resolve_kernel("fla", cuda, torch.bfloat16)
    monkeypatch.setattr(find, lambda name: name)
    assert resolve_kernel(None, cuda, torch.bfloat16) is fla
    assert resolve_kernel("fla", cuda, torch.bfloat16) is fla
    assert [record.getMessage().split()[-2] for record in caplog.records] == ["torch", "fla", "fla"]


def test_reported_errors_can_be_seen() -> None:
    """A wrong decay of one head by 1e-4 is caught by the bounds of these tests."""
    inputs = linear_inputs(1, 500)
    expected, expected_state = fp64_linear(inputs)
    factor = torch.ones(6)
    factor[3] += 1e-4
    output, state = chunked(replace(inputs, log_decay=inputs.log_decay * factor))
    with pytest.raises(AssertionError):
        assert_close(output[0], expected[0], rtol=VALUE_RTOL)
    assert np.isfinite(expected_state).all()
    assert state.shape == expected_state.shape


def test_import_makes_the_first_exp_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that make it at once round differently, rarely: byte-equal stats would differ."""
    seen: list[int] = []
    monkeypatch.setattr(torch.Tensor, "exp", lambda tensor: seen.append(tensor.numel()))
    spec = importlib.util.find_spec(linear_attention.__name__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, copy.__name__, copy)  # where dataclasses look
    spec.loader.exec_module(copy)
    assert seen == [1]
