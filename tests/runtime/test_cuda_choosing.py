"""The cuda runner chooses tokens on the GPU: which ones, and for which rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ringexport.batching import BatchingEngine, BatchingOptions
from ringexport.errors import RingExportError
from ringexport.runtime.choosing import Chooser, ChosenTokens, TokenChoice, chooser_of
from ringexport.runtime.sampling import Sampler, SamplingParams
from ringexport.runtime.session import Engine
from ringexport.runtime.tokenizer import ModelTokenizer

pytestmark = pytest.mark.gpu
RING_NANO = Path(__file__).parents[2] / "models" / "ring-nano"
WAIT = 60.0
SLOTS = 32


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    import torch

    from ringexport.checkpoint import CheckpointWeights
    from ringexport.packing.writer import WEIGHTS_FILE, write_packed
    from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
    from ringexport.runtime.backends.cuda.weights import load_weights
    from tests.kernels.support import library

    folder = tmp_path_factory.mktemp("packed")
    with CheckpointWeights.open(RING_NANO) as weights:
        config = weights.config
        write_packed(weights, folder)
    packed = load_weights(folder / WEIGHTS_FILE, config, torch.device("cuda"))
    options = CudaOptions(max_batch=SLOTS, max_context=2048)
    runner = CudaRunner(packed, library(), model_digest=lambda: "d" * 64, options=options)
    with runner:
        yield Engine(runner, ModelTokenizer.open(RING_NANO, vocab_size=config.vocab_size))


def prompts_of(engine: Engine, count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    vocabulary = engine.runner.spec.vocab_size
    sizes = rng.integers(1, 60, count)
    return [[int(token) for token in rng.integers(0, vocabulary, size)] for size in sizes]


class Rows:
    """Rows of one state, continued by the chooser."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> None:
        vocabulary = engine.runner.spec.vocab_size
        self.chooser: Chooser = chooser_of(engine.runner)
        assert self.chooser.asynchronous
        self.choices = [
            TokenChoice(one, vocabulary, prompt)
            for one, prompt in zip(params, prompts, strict=True)
        ]
        self.state = engine.runner.new_state(len(prompts))
        self.steps: list[ChosenTokens] = []
        width = max(map(len, prompts))
        tokens = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        sizes = [len(prompt) for prompt in prompts]
        self.first = self.chooser.choose_prefill(tokens, sizes, self.state, self.choices).result()

    def go_on(self, steps: int, rows: Sequence[int] | None = None) -> list[ChosenTokens]:
        """Start all steps, each before the tokens of the one before it are read."""
        rows = range(len(self.choices)) if rows is None else rows
        choices = [self.choices[row] for row in rows]
        started = [self.chooser.choose_decode(self.state, rows, choices) for _ in range(steps)]
        return [one.result() for one in started]


def columns(steps: Sequence[ChosenTokens], row: int) -> list[int]:
    return [step.ids[row] for step in steps]


def test_greedy_tokens_are_those_of_the_logits(engine: Engine) -> None:
    prompts, runner = prompts_of(engine, 5), engine.runner
    rows = Rows(engine, prompts, [SamplingParams()] * 5)
    found = [rows.first, *rows.go_on(40)]
    state = runner.new_state(5)
    width = max(map(len, prompts))
    tokens = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    logits = runner.prefill(tokens, [len(prompt) for prompt in prompts], state)
    for step in found:
        assert step.ids == logits.argmax(-1).tolist()
        assert np.array_equal(step.largest, logits.max(-1))
        logits = runner.decode(step.ids, state)


def test_rows_come_and_go_between_steps(engine: Engine) -> None:
    prompts, runner = prompts_of(engine, 4, seed=1), engine.runner
    rows = Rows(engine, prompts, [SamplingParams()] * 4)
    chosen = {row: [rows.first.ids[row]] for row in range(4)}
    for group in ([0, 1, 2, 3], [3, 1], [2], [1, 3, 0, 2], [3, 1]):
        for step in rows.go_on(3, group):
            for index, row in enumerate(group):
                chosen[row].append(step.ids[index])
    assert rows.state.position.tolist() == [
        len(prompt) + len(chosen[row]) - 1 for row, prompt in enumerate(prompts)
    ]
    for row, prompt in enumerate(prompts):
        state = runner.new_state(1)
        logits = runner.prefill([prompt], None, state)[0]
        for token in chosen[row]:  # other batches round differently: nearly the largest will do
            assert logits[token] >= logits.max() - 0.1
            logits = runner.decode([token], state)[0]


SAMPLED = [
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02, seed=4),
    SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=5),
    SamplingParams(),
]


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(engine: Engine) -> None:
    prompts = prompts_of(engine, 4, seed=2)
    whole = Rows(engine, prompts, SAMPLED)
    expected = [whole.first, *whole.go_on(30)]
    again = Rows(engine, prompts, SAMPLED)
    assert [again.first, *again.go_on(30)] == expected
    others = [*prompts_of(engine, 3, seed=9), prompts[2]]
    beside = Rows(engine, others, [SamplingParams(temperature=2.0)] * 3 + [SAMPLED[2]])
    found = [beside.first, *beside.go_on(30)]
    assert columns(found, 3) == columns(expected, 2)
    other_seed = Rows(engine, prompts, [SamplingParams(temperature=0.9, seed=8)] * 4)
    steps = [other_seed.first, *other_seed.go_on(30)]
    assert columns(steps, 0) != columns(expected, 0)


def test_penalty_and_filters_are_those_of_the_host(engine: Engine) -> None:
    prompts = prompts_of(engine, 3, seed=3)
    params = [
        SamplingParams(repetition_penalty=1.4, logprobs=0),
        SamplingParams(temperature=5.0, top_k=3, seed=1, logprobs=0),
        SamplingParams(temperature=3.0, top_p=0.3, repetition_penalty=1.2, seed=1, logprobs=0),
    ]
    rows = Rows(engine, prompts, params)
    vocabulary = engine.runner.spec.vocab_size
    seen = [set(prompt) for prompt in prompts]
    greedy = Sampler(params[0], vocabulary, prompts[0])
    for step in [rows.first, *rows.go_on(50)]:
        logits = [step.logits[row].astype(np.float64) for row in range(3)]
        assert step.ids[0] == greedy.sample(step.logits[0])
        assert logits[1][step.ids[1]] >= np.sort(logits[1])[-3]
        known = np.array(sorted(seen[2]))
        values = logits[2]
        values[known] = np.where(values[known] > 0, values[known] / 1.2, values[known] * 1.2)
        chances = np.exp((values - values.max()) / 3.0)
        chances /= chances.sum()
        better = chances[chances > chances[step.ids[2]] * (1 + 1e-4)].sum()
        assert better < 0.3 + 1e-4
        seen[2].add(step.ids[2])


def test_draws_follow_the_distribution(engine: Engine) -> None:
    prompt, count = prompts_of(engine, 1, seed=4)[0], 12
    found: list[int] = []
    chances = np.zeros(0)
    for start in range(0, 1200, count):
        params = [
            SamplingParams(temperature=1.0, top_k=4, seed=start + row, logprobs=0)
            for row in range(count)
        ]
        first = Rows(engine, [prompt] * count, params).first
        found += first.ids
        best = np.sort(first.logits[0].astype(np.float64))[::-1][:4]
        chances = np.exp(best - best[0])
        order = np.argsort(-first.logits[0], kind="stable")[:4]
    expected = 1200 * chances / chances.sum()
    counts = np.array([found.count(int(token)) for token in order])
    assert counts.sum() == 1200
    assert ((counts - expected) ** 2 / np.maximum(expected, 1)).sum() < 25


def test_damage_of_a_row_is_noticed_and_touches_no_other(engine: Engine) -> None:
    prompts = prompts_of(engine, 3, seed=5)
    rows = Rows(engine, prompts, [SamplingParams(temperature=0.5, seed=1)] * 3)
    good = Rows(engine, prompts, [SamplingParams(temperature=0.5, seed=1)] * 3)
    runner = engine.runner
    layer = next(iter(runner.pool.recurrent_state))  # type: ignore[attr-defined]
    slot = rows.state.slots[1]  # type: ignore[attr-defined]
    runner.pool.recurrent_state[layer][slot].fill_(float("nan"))  # type: ignore[attr-defined]
    (step,), (expected,) = rows.go_on(1), good.go_on(1)
    with pytest.raises(RingExportError, match="expected a finite number"):
        step.check(1)
    for row in (0, 2):
        step.check(row)
        assert step.ids[row] == expected.ids[row]


def test_slots_are_taken_late_moved_and_given_back(engine: Engine) -> None:
    pool = engine.runner.pool  # type: ignore[attr-defined]
    assert pool.free == SLOTS
    prompt = prompts_of(engine, 1, seed=6)[0]
    state, choice = engine.runner.new_state(12), TokenChoice(SamplingParams(), 1 << 20)
    one = engine.runner.new_state(1)
    assert pool.free == SLOTS
    chooser = chooser_of(engine.runner)
    chooser.choose_prefill([prompt], None, one, [choice])
    expected = Rows(engine, [prompt], [SamplingParams()]).go_on(3)
    state.move_rows([7], one, [0])
    del one
    assert pool.free == SLOTS - 1
    found = [chooser.choose_decode(state, [7], [choice]).result() for _ in range(3)]
    assert found == expected
    other = state.fork([7])
    assert pool.free == SLOTS - 2
    step = chooser.choose_decode(other, [0], [choice]).result()
    assert step == chooser.choose_decode(state, [7], [choice]).result()
    state.reset([7])
    del other
    assert pool.free == SLOTS


def test_the_batching_loop_gives_the_texts_of_the_engine(engine: Engine) -> None:
    words = ["the", "river", "config", "return", "value", "while", "open", "north", "light"]
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(words, int(size))) for size in rng.integers(2, 90, 40)]
    params = [
        SamplingParams(
            max_new_tokens=int(rng.integers(1, 50)),
            ignore_eos=bool(index % 2),
            logprobs=2 if index % 5 == 0 else None,
            stop=["e "] if index % 7 == 0 else [],
        )
        for index in range(len(texts))
    ]
    expected = [engine.generate(text, one) for text, one in zip(texts, params, strict=True)]
    for cache in (0, 64 << 20):
        options = BatchingOptions(max_batch=12, prefix_cache_bytes=cache)
        with BatchingEngine(engine, options) as batching:
            tickets = [
                batching.submit(engine.encode(text), one)
                for text, one in zip(texts, params, strict=True)
            ]
            cancelled = batching.submit([5, 6, 7], SamplingParams(max_new_tokens=1500))
            cancelled.cancel()
            found = [ticket.result(WAIT) for ticket in tickets]
            assert cancelled.result(WAIT).stop_reason == "cancelled"
            assert batching.stats().failed == 0
        equal = [one.text == other.text for one, other in zip(found, expected, strict=True)]
        assert sum(equal) >= 0.9 * len(equal)  # batches round differently where two are close
        for one, wanted in zip(found, params, strict=True):
            assert one.new_tokens <= wanted.max_new_tokens
            assert (one.logprobs is None) == (wanted.logprobs is None)
    assert engine.runner.pool.free == SLOTS  # type: ignore[attr-defined]


def test_a_full_context_ends_a_request(engine: Engine) -> None:
    with BatchingEngine(engine, BatchingOptions(max_batch=4)) as batching:
        params = SamplingParams(max_new_tokens=50, ignore_eos=True)
        long = batching.submit([7] * 2040, params)
        short = batching.submit([7] * 30, params)
        assert long.result(WAIT).stop_reason == "context"
        assert long.result(WAIT).new_tokens == 9
        assert short.result(WAIT).new_tokens == 50
