"""Sampling on the GPU against the definition in ringexport/runtime/sampling.py."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.kernels.support import Guarded, library, workspace

pytestmark = pytest.mark.gpu
DRAWS = 4096
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0}
FLOATS = npt.NDArray[np.float64]
INTEGERS = npt.NDArray[np.uint64]


def greedy(logits: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = Guarded((rows,), torch.int64)
    fields = {
        "logits": logits,
        "tokens": out.tensor,
        "row_stride": logits.stride(0),
        "rows": rows,
        "vocab_size": vocab,
    }
    space = workspace("sample", **fields)
    for _ in range(2):  # the workspace is left as it was found
        library().call("sample", **fields, **space).launch(torch.cuda.current_stream().cuda_stream)
    return out.check()


def fields_of(
    table: Tensor, vocab: int, settings: list[dict[str, float]], seeds: list[int]
) -> dict[str, Any]:
    """Return the fields of a draw from each row of `table` [rows, stride], row i at position i."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([(NEUTRAL | one)[name] for one in settings], dtype=dtype, device="cuda")

    rows = len(settings)
    return {
        "logits": table,
        "temperature": column("temperature"),
        "top_k": column("top_k", torch.int32),
        "top_p": column("top_p"),
        "min_p": column("min_p"),
        "penalty": column("penalty"),
        "seen": torch.zeros((rows, -(-vocab // 32)), dtype=torch.int32, device="cuda"),
        "seen_slot": torch.arange(rows, device="cuda").flip(0),
        "seed": torch.tensor(seeds, device="cuda"),
        "position": torch.arange(rows, dtype=torch.int32, device="cuda"),
        "row_stride": table.stride(0),
        "rows": rows,
        "vocab_size": vocab,
    }


def launch(fields: dict[str, Any], space: dict[str, object] | None = None) -> Tensor:
    """Launch twice with one workspace, and return the tokens [rows] of both."""
    found = []
    space = workspace("sample", **fields) if space is None else space
    for _ in range(2):
        out = Guarded((fields["rows"],), torch.int64)
        call = library().call("sample", **fields, **space, tokens=out.tensor)
        call.launch(torch.cuda.current_stream().cuda_stream)
        found.append(out.check())
    if "penalty" not in fields:  # which remembers
        assert torch.equal(*found)
    return found[0]


def draw(logits: Tensor, *, positions: Tensor, seed: int = 7, **options: float) -> Tensor:
    """Draw one token for each position from the same logits [vocab]."""
    rows, vocab = len(positions), len(logits)
    table = torch.nn.functional.pad(logits, (0, -vocab % 4)).expand(rows, -1).contiguous()
    fields = fields_of(table, vocab, [options] * rows, [seed] * rows)
    for name in ("penalty", "seen", "seen_slot"):
        del fields[name]
    return launch(fields | {"position": positions.to("cuda", torch.int32)})


def many(logits: Tensor, **options: float) -> Tensor:
    parts = torch.arange(DRAWS).split(512)
    return torch.cat([draw(logits, positions=part, **options) for part in parts])


@pytest.mark.parametrize("shape", [(1, 157184), (3, 1001), (256, 3072), (2, 4)])
def test_greedy_takes_the_lowest_id_of_the_largest(shape: tuple[int, int]) -> None:
    rows, vocab = shape
    stride = -(-vocab // 4) * 4
    logits = torch.randn((rows, stride), device="cuda")[:, :vocab]
    if vocab > 1000:
        logits[0, [900, 17, 600]] = 50.0
    expected = np.array([int(np.argmax(row)) for row in logits.cpu().numpy()])
    assert np.array_equal(greedy(logits).cpu().numpy(), expected)
    logits.fill_(-float("inf"))
    logits[:, vocab - 1] = -1e30
    assert (greedy(logits) == vocab - 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(options: dict[str, float]) -> None:
    logits = torch.randn(64, device="cuda") * 1.5
    logits[[3, 40, 41]] = 2.0  # ties
    found = many(logits, **options).cpu().numpy()
    expected = filtered(logits.double().cpu().numpy(), **options)
    assert set(found) <= set(np.flatnonzero(expected))
    counts = np.bincount(found, minlength=64)
    mean = DRAWS * expected
    likely = mean > 5
    statistic = float(((counts - mean)[likely] ** 2 / mean[likely]).sum())
    degrees = max(int(likely.sum()) - 1, 1)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5, (statistic, degrees)


def filtered(
    logits: FLOATS,
    temperature: float = 1.0,
    top_k: float = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> FLOATS:
    """Return the distribution that the definition draws from."""
    order = np.argsort(-logits, kind="stable")
    order = order[: int(top_k) or None]
    chances = np.exp((logits[order] - logits.max()) / temperature)
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    chances[before >= top_p] = 0
    chances[chances < min_p * chances.max()] = 0
    result = np.zeros_like(logits)
    result[order] = chances / chances.sum()
    return result


def uniform(seed: int, position: int, vocab: int) -> FLOATS:
    """Return the numbers of a row: Philox-4x32-10, four tokens a call."""
    word, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    groups = np.arange(-(-vocab // 4), dtype=np.uint64)
    zero = np.zeros_like(groups)
    counter: list[INTEGERS] = [groups, zero + np.uint64(position), zero, zero]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (second >> word) ^ counter[1] ^ key[0],
            second & mask,
            (first >> word) ^ counter[3] ^ key[1],
            first & mask,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & mask, (key[1] + np.uint64(0xBB67AE85)) & mask]
    bits = np.stack(counter, axis=1).reshape(-1)[:vocab]
    return (bits.astype(np.float64) + 0.5) / 2.0**32


def assert_drawn(
    token: int, logits: npt.NDArray[np.float32], seed: int, position: int, options: dict[str, float]
) -> None:
    """The token wins the race of those that are left: the least -log(1 - u) / weight.

    Rounding may move the thresholds of top-p and min-p a little; which tokens are among the top k
    it does not change.
    """
    options = {name: (NEUTRAL | options)[name] for name in NEUTRAL if name != "penalty"}
    values = logits.astype(np.float64)
    if options["temperature"] == 0:
        assert token == values.argmax()
        return
    top_p, min_p = options.pop("top_p"), options.pop("min_p")
    wide, narrow = (
        filtered(
            values,
            top_p=min(1, top_p * (1 + part)) if top_p < 1 else 1,
            min_p=min(1, min_p * (1 - part)),
            **options,
        )
        > 0
        for part in (2e-4, -2e-4)
    )
    assert wide[token], f"token {token} is not left"
    weights = np.exp((values - values.max()) / options["temperature"])
    with np.errstate(divide="ignore", over="ignore"):
        times = -np.log1p(-uniform(seed, position, len(logits))) / weights
    assert times[token] <= times[narrow].min() * (1 + 1e-4), f"token {token} is not the first"


def test_ties_at_the_edge_go_to_the_lower_ids() -> None:
    logits = torch.zeros(300, device="cuda")
    assert set(many(logits, top_k=7).tolist()) == set(range(7))
    assert set(many(logits, top_p=0.049).tolist()) == set(range(15))


def test_a_row_depends_on_nothing_but_itself() -> None:
    logits = torch.randn(157184, device="cuda") * 3
    positions = torch.arange(40)
    together = draw(logits, temperature=0.9, top_p=0.95, positions=positions)
    alone = [
        draw(logits, temperature=0.9, top_p=0.95, positions=positions[i : i + 1]).item()
        for i in range(8)
    ]
    assert together[:8].tolist() == alone
    other = draw(logits, temperature=0.9, top_p=0.95, positions=positions, seed=8)
    assert not torch.equal(together, other)


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(1000, device="cuda")
    logits[[5, 900]] = 9.0
    assert (draw(logits, temperature=0.0, positions=torch.arange(4)) == 5).all()


SETTINGS: list[dict[str, float]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.01},
    {"temperature": 50.0},
    {"top_k": 1},
    {"top_k": 2, "temperature": 2.0},
    {"top_k": 50, "temperature": 0.8},
    {"top_k": 5000, "temperature": 3.0},
    {"top_k": 10**9},
    {"top_p": 0.95, "temperature": 0.8},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"top_p": 0.9999, "temperature": 1.5},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 900, "top_p": 0.9, "temperature": 5.0},
    {"top_k": 30000, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.2e-38, "top_p": 0.9},
    {"temperature": 3e38, "top_k": 40},
    {"penalty": 1.1, "temperature": 0.8},
    {"penalty": 1.3, "temperature": 0.0},
    {"penalty": 0.5, "top_k": 7, "top_p": 0.9},
]


def logits_of(kind: str, rows: int, vocab: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng()
    values = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    if kind == "equal":
        values[:] = -1.25
    elif kind == "ties":
        values = np.round(values)
    elif kind == "masked":
        values[rng.random(values.shape) < 0.7] = -np.inf
        values[rng.random(values.shape) < 0.1] = -1e9
        values[:, vocab // 2] = 1.0
    elif kind == "zeros":
        values = np.where(rng.random(values.shape) < 0.5, np.float32(-0.0), np.float32(0.0))
    elif kind == "peaked":
        values[:, vocab // 3] = 40.0
    return values


@pytest.mark.parametrize("kind", ["normal", "equal", "ties", "masked", "zeros", "peaked"])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 5003, 157184])
def test_mixed_rows_draw_what_the_definition_says(vocab: int, kind: str) -> None:
    rows = len(SETTINGS)
    values = logits_of(kind, rows, vocab)
    rng = np.random.default_rng()
    seeds = [int(seed) for seed in rng.integers(0, 2**63, rows)]
    table = torch.full((rows, vocab + (-vocab % 4)), float("nan"), device="cuda")
    table[:, :vocab] = torch.from_numpy(values)
    fields = fields_of(table, vocab, SETTINGS, seeds)
    seen = rng.random((rows, vocab)) < 0.3
    packed = np.zeros((rows, -(-vocab // 32) * 4), dtype=np.uint8)
    bits = np.packbits(seen, axis=1, bitorder="little")
    packed[:, : bits.shape[1]] = bits
    fields["seen"].copy_(torch.from_numpy(packed.view(np.int32)).flip(0))
    tokens = launch(fields).tolist()
    for row, options in enumerate(SETTINGS):
        penalty = np.float32(options.get("penalty", 1.0))
        old, logits = seen[row].copy(), values[row]
        if penalty != 1:
            changed = np.where(logits > 0, logits / penalty, logits * penalty)
            logits = np.where(seen[row], changed, logits)
            old[tokens[row]] = True
        assert_drawn(tokens[row], logits, seeds[row], row, options)
        # The second launch has marked the token that it chose, too.
        words = fields["seen"][rows - 1 - row].cpu().numpy()
        marked = np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab].astype(bool)
        assert (marked >= old).all()
        assert marked.sum() <= old.sum() + (penalty != 1)


def test_one_workspace_and_any_number_of_rows() -> None:
    vocab, count = 157184, 128
    values = torch.randn((count, vocab), device="cuda") * 4
    plain = [one for one in SETTINGS if "penalty" not in one]
    settings = [plain[row % len(plain)] for row in range(count)]
    fields = fields_of(values, vocab, settings, list(range(count)))
    for name in ("penalty", "seen", "seen_slot"):
        del fields[name]
    space = workspace("sample", **fields)
    expected = launch(fields, space)
    for rows in (1, 8, 128, 3, 40):
        first = {
            name: value[:rows] if isinstance(value, Tensor) else value
            for name, value in fields.items()
        }
        assert torch.equal(launch(first | {"rows": rows}, space), expected[:rows])
        rest = {name: first[name] for name in ("logits", "row_stride", "vocab_size")}
        found = launch(rest | {"rows": rows}, space)
        assert torch.equal(found, values[:rows].argmax(-1))


@pytest.mark.parametrize("damage", [float("nan"), -float("nan"), float("inf")])
def test_a_damaged_row_chooses_what_is_damaged(damage: float) -> None:
    vocab, rows = 5000, len(SETTINGS)
    values = logits_of("normal", rows, vocab)
    table = torch.from_numpy(values).cuda()
    table[::2, 4321] = damage
    fields = fields_of(table, vocab, SETTINGS, [3] * rows)
    tokens = launch(fields).tolist()
    for row, options in enumerate(SETTINGS):
        if row % 2 == 0:
            assert tokens[row] == 4321
        else:
            assert_drawn(tokens[row], values[row], 3, row, options)
    table.fill_(-float("inf"))
    assert (launch(fields) == 0).all()
    found = greedy(torch.full((1, 8), -damage, device="cuda"))
    assert found.tolist() == [0]


def test_an_unlikely_token_is_not_drawn() -> None:
    logits = torch.zeros(157184, device="cuda")
    logits[70000] = 60.0
    assert (many(logits) == 70000).all()


def test_a_graph_counts_the_draws() -> None:
    vocab = 3000
    table = torch.randn((2, vocab), device="cuda") * 2
    fields = fields_of(table, vocab, [{"top_p": 0.9}, {"top_k": 40}], [5, 6])
    for name in ("penalty", "seen", "seen_slot"):
        del fields[name]
    expected = [launch(fields | {"position": fields["position"] + step}) for step in range(3)]
    position, tokens = fields["position"].clone(), torch.zeros(2, dtype=torch.int64, device="cuda")
    more = {"position": position, "next_position": position, "tokens": tokens}
    call = library().call("sample", **(fields | more), **workspace("sample", **fields))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.launch(torch.cuda.current_stream().cuda_stream)
    for step in range(3):
        graph.replay()
        assert torch.equal(tokens, expected[step])
    assert position.tolist() == [3, 4]
