"""The whole reference network: against the fp64 golden, and what must not change its results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ringexport.errors import CheckpointError, ConfigError, ContextLengthError, ShapeError
from ringexport.model import ReferenceModel
from ringexport.model.layers import route
from ringexport.ops.decay import DecayIndex
from tests.checkpoints import make_checkpoint
from tests.golden import generate
from tests.model.support import (
    VALUE_RTOL,
    assert_states_equal,
    golden,
    load_model,
    row_tokens,
    write_checkpoint,
)
from tests.numerics import assert_close

NAMES = tuple(generate.CONFIGS)
# Between two orders of fp32 sums through the whole network.
ORDER_RTOL = 1e-5
every_config = pytest.mark.parametrize("model", NAMES, indirect=True)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("golden")
    return {name: write_checkpoint(root / name, c) for name, c in generate.CONFIGS.items()}


@pytest.fixture(scope="session")
def models(checkpoints: dict[str, Path]) -> dict[str, ReferenceModel]:
    return {name: load_model(path) for name, path in checkpoints.items()}


@pytest.fixture
def model(request: pytest.FixtureRequest, models: dict[str, ReferenceModel]) -> ReferenceModel:
    return models[getattr(request, "param", "base")]


def batch_of(
    rows: list[torch.Tensor], *, side: str = "right", filler: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of tokens to one [B, T]; return it and the lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), filler)
    for row, ids in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(tokens.shape[1] - len(ids), None)
        tokens[row, place] = ids
    return tokens, lengths


def random_rows(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, 64, (length,)) for length in lengths]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", list(DecayIndex))
def test_prefill_matches_the_golden(
    checkpoints: dict[str, Path], name: str, form: DecayIndex
) -> None:
    model, stored = load_model(checkpoints[name], decay_index=form), golden(f"network_{name}")
    for row in range(2):
        state = model.new_state(1)
        tokens = row_tokens(name, row)[None]
        logits = model.forward(tokens, None, state, every_position=True)
        expected = stored[f"{form}.{row}.logits"]
        assert logits.dtype == torch.float32
        assert_close(logits[0, -len(expected) :], expected, rtol=VALUE_RTOL)
        for layer, recurrent in state.recurrent_state.items():
            key = f"{form}.{row}.recurrent_state.{layer}"
            if key in stored:
                assert_close(recurrent[0], stored[key], rtol=VALUE_RTOL * tokens.shape[1] ** 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_of_a_ragged_batch_match_the_golden(
    models: dict[str, ReferenceModel], name: str
) -> None:
    model, stored = models[name], golden(f"network_{name}")
    rows = [row_tokens(name, row) for row in range(2)]
    state = model.new_state(2)
    prompts = [row[:length] for row, length in zip(rows, generate.ROW_LENGTHS, strict=True)]
    logits = [model.forward(*batch_of(prompts), state)]
    for step in range(generate.NEW_TOKENS):
        new = [row[n + step] for row, n in zip(rows, generate.ROW_LENGTHS, strict=True)]
        logits.append(model.forward(torch.stack(new)[:, None], None, state))
    assert state.position.tolist() == [len(row) for row in rows]
    for row in range(2):
        expected = stored[f"serving.{row}.logits"][-len(logits) :]
        assert_close(torch.stack(logits)[:, row], expected, rtol=VALUE_RTOL)
    layer = max(state.recurrent_state)
    expected = stored[f"serving.0.recurrent_state.{layer}"]
    assert_close(state.recurrent_state[layer][0], expected, rtol=VALUE_RTOL * len(rows[0]) ** 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_taps_match_the_golden(models: dict[str, ReferenceModel], name: str) -> None:
    model, stored = models[name], golden(f"network_{name}")
    rows, taps = [row_tokens(name, row) for row in range(2)], dict[str, torch.Tensor]()
    tokens, lengths = batch_of(rows)
    with_taps = model.forward(tokens, lengths, model.new_state(2), taps=taps)
    prefix, names = "serving.0.", set()
    for name_in_file, expected in stored.items():
        tap = name_in_file.removeprefix(prefix)
        if not tap.startswith(("hidden.", "expert_ids.")):
            continue
        names.add(tap)
        if tap.startswith("expert_ids."):
            np.testing.assert_array_equal(taps[tap][0], expected)
            assert (taps[tap][1, len(rows[1]) :] == -1).all()
        else:
            assert_close(taps[tap][0], expected, rtol=VALUE_RTOL)
            assert (taps[tap][1, len(rows[1]) :] == 0).all()
    assert names == taps.keys()
    assert torch.equal(with_taps, model.forward(tokens, lengths, model.new_state(2)))


def test_decay_forms_differ(checkpoints: dict[str, Path]) -> None:
    tokens, logits = row_tokens("base", 0)[None], []
    for form in DecayIndex:
        model = load_model(checkpoints["base"], decay_index=form)
        logits.append(model.forward(tokens, None, model.new_state(1)))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (logits[first] - logits[second]).abs().max() > 0.01 * logits[0].abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_fp64_is_limited_by_its_fp32_tables_only(checkpoints: dict[str, Path], name: str) -> None:
    model = load_model(checkpoints[name], dtype=torch.float64)
    state = model.new_state(1)
    logits = model.forward(row_tokens(name, 0)[None], None, state)
    assert_close(logits[0], golden(f"network_{name}")["serving.0.logits"][-1], rtol=5e-7)
    tensors = [logits, *state.recurrent_state.values(), state.kv_cache[max(state.kv_cache)][0]]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


@pytest.mark.parametrize("name", NAMES)
def test_bf16_keeps_state_router_and_logits_wide(
    checkpoints: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    router_logits: list[torch.Tensor] = []

    def spy(logits: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        router_logits.append(logits)
        return route(logits, *rest)

    monkeypatch.setattr("ringexport.model.layers.route", spy)
    model = load_model(checkpoints[name], dtype=torch.bfloat16)
    state, taps = model.new_state(1), dict[str, torch.Tensor]()
    tokens = row_tokens(name, 0)[None]
    logits = model.forward(tokens, None, state, taps=taps)
    assert {tensor.dtype for tensor in state.recurrent_state.values()} == {torch.float32}
    assert state.kv_cache[max(state.kv_cache)][0].dtype == torch.bfloat16
    assert len(router_logits) == len(model.config.moe_layers)
    for values in (*router_logits, logits):
        assert values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float())
    # Before the first router; after it bf16 may choose other experts. A few roundings of 2^-9.
    assert taps["hidden.0"].dtype == torch.bfloat16
    expected = golden(f"network_{name}")["serving.0.hidden.0"]
    assert_close(taps["hidden.0"][0].float(), expected, rtol=2**-6)


@every_config
@pytest.mark.parametrize(
    "cuts",
    [pytest.param((1,) * 70, id="tokens"), (64, 6), (63, 7), (65, 1, 4), (10, 60)],
    ids=lambda cuts: "-".join(map(str, cuts)),
)
def test_split_prefill_is_whole_prefill(model: ReferenceModel, cuts: tuple[int, ...]) -> None:
    (tokens,) = random_rows(70)
    whole, state = model.new_state(1), model.new_state(1)
    expected = model.forward(tokens[None], None, whole, every_position=True)
    parts = [
        model.forward(part[None], None, state, every_position=True) for part in tokens.split(cuts)
    ]
    assert_close(torch.cat(parts, 1), expected, rtol=ORDER_RTOL)
    assert state.position.tolist() == whole.position.tolist() == [70]
    for layer, recurrent in whole.recurrent_state.items():
        assert_close(state.recurrent_state[layer], recurrent, rtol=ORDER_RTOL)


@every_config
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(model: ReferenceModel, side: str) -> None:
    """Two calls, so that the second starts from states and caches of different lengths."""
    first, second = random_rows(66, 9, 1, 30), random_rows(1, 70, 3, 20)
    state = model.new_state(4)
    for rows in (first, second):
        padded = model.forward(*batch_of(rows, side=side), state, padding=side, every_position=True)
    for row in range(4):
        alone = model.new_state(1)
        model.forward(first[row][None], None, alone)
        expected = model.forward(second[row][None], None, alone, every_position=True)[0]
        length, width = len(second[row]), padded.shape[1]
        place = slice(0, length) if side == "right" else slice(width - length, width)
        assert_close(padded[row, place], expected, rtol=ORDER_RTOL)
        padded[row, place] = 0
        assert (padded[row] == 0).all()
        for layer, recurrent in alone.recurrent_state.items():
            assert_close(state.recurrent_state[layer][row], recurrent[0], rtol=ORDER_RTOL)


def test_values_at_padding_do_not_matter(model: ReferenceModel) -> None:
    rows, results, states = random_rows(20, 7), [], []
    for filler in (0, 63, -1, 1 << 40):
        states.append(model.new_state(2))
        results.append(model.forward(*batch_of(rows, filler=filler), states[-1]))
    assert all(torch.equal(results[0], result) for result in results)
    assert_states_equal(states[0], states[3])


def test_last_position_is_the_last_real_one(model: ReferenceModel) -> None:
    tokens, lengths = batch_of(random_rows(9, 20, 1))
    last = model.forward(tokens, lengths, model.new_state(3))
    every = model.forward(tokens, lengths, model.new_state(3), every_position=True)
    assert_close(last, every[torch.arange(3), lengths - 1], rtol=1e-6)


def test_rows_may_be_permuted(model: ReferenceModel) -> None:
    rows, order = random_rows(20, 7, 33, 1), [2, 0, 3, 1]
    state, permuted = model.new_state(4), model.new_state(4)
    expected = model.forward(*batch_of(rows), state)[order]
    actual = model.forward(*batch_of([rows[row] for row in order]), permuted)
    assert_close(actual, expected, rtol=ORDER_RTOL)
    follow = torch.randint(0, 64, (4, 1))
    expected = model.forward(follow, None, state)[order]
    assert_close(model.forward(follow[order], None, permuted), expected, rtol=ORDER_RTOL)


def test_rows_without_tokens_are_left_alone(model: ReferenceModel) -> None:
    state = model.new_state(3)
    model.forward(*batch_of(random_rows(12, 5, 8)), state)
    before = state.snapshot()
    tokens = torch.randint(0, 64, (3, 4))
    logits = model.forward(tokens, torch.tensor([0, 4, 0]), state)
    assert state.position.tolist() == [12, 9, 8]
    assert (logits[[0, 2]] == 0).all()
    assert_states_equal(state.snapshot([0, 2]), before.snapshot([0, 2]))
    alone = before.snapshot([1])
    assert_close(logits[1:2], model.forward(tokens[1:2], None, alone), rtol=ORDER_RTOL)
    for lengths, width in ((torch.zeros(3), 4), (None, 0)):
        after = state.snapshot()
        logits = model.forward(tokens[:, :width], lengths, state)
        assert torch.equal(logits, torch.zeros(3, 64))
        assert_states_equal(state, after)


def test_snapshot_and_restore_are_bitwise(model: ReferenceModel) -> None:
    state = model.new_state(2)
    model.forward(*batch_of(random_rows(40, 13)), state)
    snapshot, follow = state.snapshot(), torch.randint(0, 64, (2, 70))
    first = model.forward(follow, None, state, every_position=True)
    after = state.snapshot()
    for _ in range(2):  # a snapshot survives being restored
        state.restore(snapshot)
        assert state.position.tolist() == [40, 13]
        assert_states_equal(state, snapshot)
        assert torch.equal(model.forward(follow, None, state, every_position=True), first)
        assert_states_equal(state, after)
    assert snapshot.nbytes < after.nbytes


def test_cache_grows_by_doubling(model: ReferenceModel) -> None:
    state, capacities = model.new_state(1), []
    for tokens in random_rows(1, 63, 1, 63, 1, 200):
        model.forward(tokens[None], None, state)
        capacities.append(state.kv_cache[max(state.kv_cache)][0].shape[2])
    assert capacities == [64, 64, 128, 128, 256, 512]
    assert state.snapshot().nbytes < state.nbytes


def test_snapshots_of_rows_continue_on_their_own(model: ReferenceModel) -> None:
    state = model.new_state(3)
    model.forward(*batch_of(random_rows(40, 13, 7)), state)
    follow = torch.randint(0, 64, (3, 2))
    fork = state.snapshot([2, 0, 2])
    expected = model.forward(follow, None, state.snapshot())
    assert fork.position.tolist() == [7, 40, 7]
    actual = model.forward(follow[[2, 0, 2]], None, fork)
    assert_close(actual, expected[[2, 0, 2]], rtol=ORDER_RTOL)
    assert state.position.tolist() == [40, 13, 7]


def test_interleaved_states_are_independent(model: ReferenceModel) -> None:
    first, second = random_rows(30, 30)
    expected = model.forward(first[None], None, model.new_state(1), every_position=True)
    a, b, parts = model.new_state(1), model.new_state(1), []
    for step in range(3):
        tokens = slice(step * 10, step * 10 + 10)
        parts.append(model.forward(first[None, tokens], None, a, every_position=True))
        model.forward(second[None, tokens], None, b)
    assert_close(torch.cat(parts, 1), expected, rtol=ORDER_RTOL)


def test_layers_of_a_new_state_share_no_memory(model: ReferenceModel) -> None:
    state = model.new_state(1)
    state.recurrent_state[0].fill_(1.0)
    assert all(
        (state.recurrent_state[layer] == 0).all() for layer in model.config.linear_layers[1:]
    )


def test_restore_refuses_other_batches_and_models(models: dict[str, ReferenceModel]) -> None:
    state = models["base"].new_state(2)
    for other in (models["base"].new_state(3), models["switched"].new_state(2)):
        with pytest.raises(ShapeError, match="rows and layers"):
            state.restore(other)


def test_context_is_a_limit(model: ReferenceModel) -> None:
    state, limit = model.new_state(2), model.config.context_length
    model.forward(torch.zeros(2, limit - 1).long(), torch.tensor([limit - 1, 4]), state)
    before = state.snapshot()
    with pytest.raises(ContextLengthError, match=f"row 0 would hold {limit + 1} tokens"):
        model.forward(torch.zeros(2, 2).long(), None, state)
    assert_states_equal(state, before)
    model.forward(torch.zeros(2, 2).long(), torch.tensor([1, 2]), state)
    assert state.position.tolist() == [limit, 6]
    assert state.kv_cache[max(state.kv_cache)][0].shape[2] == limit


def test_yarn_extends_the_context(models: dict[str, ReferenceModel]) -> None:
    model = models["switched"]
    assert model.config.context_length == 256
    state = model.new_state(1)
    model.forward(torch.randint(0, 64, (1, 256)), None, state)
    with pytest.raises(ContextLengthError):
        model.forward(torch.zeros(1, 1).long(), None, state)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.zeros(3, 4).long(), {}, r"tokens is \[3, 4\], expected \[B=2, T\]"),
        (torch.zeros(2).long(), {}, r"tokens is \[2\]"),
        (torch.full((2, 4), 64), {}, r"outside 0\.\.63"),
        (torch.full((2, 4), -1), {}, r"outside 0\.\.63"),
        (torch.zeros(2, 4).long(), {"lengths": torch.tensor([5, 1])}, r"of 0\.\.4"),
        (torch.zeros(2, 4).long(), {"lengths": torch.tensor([-1, 1])}, r"of 0\.\.4"),
        (torch.zeros(2, 4).long(), {"lengths": torch.tensor([1])}, r"expected \[B=2\]"),
    ],
)
def test_bad_arguments_are_refused(
    model: ReferenceModel, tokens: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    state = model.new_state(2)
    with pytest.raises(ShapeError, match=message):
        model.forward(tokens, options.get("lengths"), state)
    assert state.position.tolist() == [0, 0]


def test_unknown_padding_side_is_refused(model: ReferenceModel) -> None:
    with pytest.raises(ConfigError, match="padding is 'both'"):
        model.forward(torch.zeros(1, 1).long(), None, model.new_state(1), padding="both")


def test_nan_in_a_weight_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["base"] / "model.safetensors")
    name = "model.layers.3.mlp.experts.2.up_proj.weight"
    tensors[name][1, 2] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoints["base"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="up_proj"):
        load_model(tmp_path)


def test_checkpoint_without_expert_bias_and_dense_layers(tmp_path: Path) -> None:
    path = make_checkpoint(
        tmp_path / "plain", moe_router_enable_expert_bias=False, first_k_dense_replace=0
    )
    model = load_model(path)
    taps: dict[str, torch.Tensor] = {}
    logits = model.forward(torch.arange(10)[None], None, model.new_state(1), taps=taps)
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    assert "expert_ids.0" in taps


def test_published_layout_loads_and_runs(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    vocab = json.loads((tiny_checkpoint / "config.json").read_text())["vocab_size"]
    logits = model.forward(torch.arange(66)[None], None, model.new_state(1))
    assert logits.shape == (1, vocab)
    assert logits.std() > 0.1
