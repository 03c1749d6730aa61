import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringexport.batching.chunks import FIRST_CHUNK, ChunkRule
from ringexport.batching.options import BatchingOptions
from ringexport.batching.prefix_cache import PrefixCache, PrefixNode
from ringexport.runtime.runner import Logits, Runner
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine
from tests.batching.driver import Driver, prompt_of
from tests.numerics import assert_same
from tests.runners import BACKENDS, FakeRunner, export_tiny_graph, open_test_runner, skip_if_missing

MARKER = 999
ONE = SamplingParams(max_new_tokens=1, ignore_eos=True)


def cuts(rule: ChunkRule, tokens: list[int]) -> list[int]:
    found = [0]
    while found[-1] < len(tokens):
        found.append(rule.stop(tokens, found[-1]))
    return found[1:]


TOKENS = st.lists(st.sampled_from([1, 2, 3, 4, 5, MARKER]), min_size=1, max_size=900)


@settings(max_examples=100, deadline=None)
@given(head=TOKENS, one=TOKENS, two=TOKENS, longest=st.integers(1, 600))
def test_prompts_that_begin_alike_are_cut_alike(
    head: list[int], one: list[int], two: list[int], longest: int
) -> None:
    rule = ChunkRule({MARKER}, longest)
    first, second = cuts(rule, head + one), cuts(rule, head + two)
    assert [c for c in first if c <= len(head)] == [c for c in second if c <= len(head)]
    for tokens, found in ((head + one, first), (head + two, second)):
        sizes = np.diff([0, *found])
        assert sizes.min() >= 1
        assert sizes.max() <= longest
        for start, stop in zip([0, *found], found, strict=False):
            longer = [rule.stop(tokens[:stop] + more, start) == stop for more in ([1], [MARKER])]
            assert all(longer) == rule.is_cut(tokens, start, stop)


def test_chunks_end_with_turns_and_grow() -> None:
    rule = ChunkRule({MARKER}, 2048)
    assert cuts(rule, [1] * 600) == [256, 512, 600]
    turn = [*[1] * 29, MARKER]
    assert cuts(rule, turn * 4) == [30, 60, 90, 120]
    assert cuts(rule, [1] * 3 + [MARKER] + [1] * 20 + [MARKER] + [1] * 9) == [25, 34]
    plain = cuts(rule, [1] * 100_000)
    assert len(plain) < 90
    assert max(np.diff(plain)) == 2048
    turns = cuts(rule, turn * 3000)
    assert len(turns) < 150
    for size in range(1000, 100_000, 777):
        last = [cut for cut in cuts(rule, [1] * size) if cut < size][-1]
        assert size - last <= max(FIRST_CHUNK, size / 8)


def read(runner: Runner, cache: PrefixCache, rule: ChunkRule, tokens: list[int]) -> Logits:
    """Read a prompt as the loop does; return the logits behind each of its chunks."""
    state, node = runner.new_state(1), cache.find(tokens)
    if node.end:
        state.restore(node.snapshot())
    place, found = node.end, []
    follow: PrefixNode | None = node
    while place < len(tokens):
        stop = rule.stop(tokens, place)
        found.append(runner.prefill([tokens[place:stop]], None, state)[0])
        if follow is not None:
            follow = cache.add(follow, tokens, stop, state)
        place = stop
    return np.array(found)


@pytest.fixture(scope="module", params=BACKENDS)
def real_runner(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Runner]:
    skip_if_missing(request.param)
    graph = export_tiny_graph(tiny_checkpoint, tmp_path_factory.mktemp("graph") / "target")
    with open_test_runner(request.param, tiny_checkpoint, graph) as opened:
        yield opened


@pytest.mark.parametrize("sizes", [(300, 40), (1000, 1), (256, 256), (700, 300)])
def test_a_hit_gives_the_same_bits(real_runner: Runner, sizes: tuple[int, int]) -> None:
    rule = ChunkRule({MARKER}, 512)
    shared, rest = sizes
    head = prompt_of(shared)
    cache = PrefixCache(rule, 1 << 30)
    read(real_runner, cache, rule, head + prompt_of(9, 1))
    for seed in range(2, 4):
        tokens = head + prompt_of(rest, seed)
        expected = read(real_runner, PrefixCache(rule, 0), rule, tokens)
        assert 0 < cache.find(tokens).end <= len(tokens)
        found = read(real_runner, cache, rule, tokens)
        assert len(found) < len(expected)
        assert_same(found, expected[-len(found) :])


def test_a_prompt_that_was_read_before_reads_its_last_chunk_again(fake: Engine) -> None:
    driver = Driver(fake)
    for expected in (0, 512, 512):
        request = driver.add(prompt_of(600), ONE)
        driver.run()
        assert request.ticket.result(0).cached_tokens == expected
    request = driver.add(prompt_of(512), ONE)
    driver.run()
    assert request.ticket.result(0).cached_tokens == 256
    stats = driver.loop.stats()
    assert (stats.cache_hits, stats.cache_misses, stats.cache_entries) == (3, 1, 2)
    assert stats.cached_tokens == 512 + 512 + 256


def test_prompts_that_are_read_together_share_what_they_can(
    fake: Engine, runner: FakeRunner
) -> None:
    driver = Driver(fake)
    head = prompt_of(2000)
    requests = [driver.add(head + prompt_of(20, seed), ONE) for seed in range(5)]
    driver.run()
    assert sum(size for kind, size in runner.calls if kind == "prefill") < 2 * 2020
    for seed, request in enumerate(requests):
        expected = fake.generate(head + prompt_of(20, seed), ONE)
        assert request.ticket.result(0).token_ids == expected.token_ids


def test_the_second_turn_of_a_chat_is_a_hit(engine: Engine) -> None:
    messages = [{"role": "user", "content": "What is the weather like in the mountains today?"}]
    driver, last = Driver(engine), 0
    for turn in range(4):
        tokens = engine.encode(engine.chat_prompt(messages))
        request = driver.add(tokens, SamplingParams(max_new_tokens=12))
        driver.run()
        result = request.ticket.result(0)
        assert result.token_ids == engine.generate(tokens, request.row.params).token_ids
        assert turn == 0 or result.cached_tokens > 0.75 * last
        last = result.prompt_tokens
        messages += [
            {"role": "assistant", "content": result.text},
            {"role": "user", "content": "And what about tomorrow, would you think?"},
        ]


def test_the_least_recently_used_leave_first(runner: FakeRunner) -> None:
    rule = ChunkRule({MARKER}, 4)
    cache = PrefixCache(rule, 1 << 20)
    read(runner, cache, rule, [1] * 12 + [9])
    each = cache.nbytes // 3
    cache = PrefixCache(rule, 4 * each)
    read(runner, cache, rule, [1] * 8 + [9])
    read(runner, cache, rule, [2] * 8 + [9])
    assert (len(cache), cache.evictions) == (4, 0)
    assert cache.find([1] * 9).end == 8
    read(runner, cache, rule, [3] * 4 + [9])
    assert [cache.find([token] * 9).end for token in (1, 2, 3)] == [8, 4, 4]
    read(runner, cache, rule, [4] * 16 + [9])
    assert [cache.find([token] * 17).end for token in (1, 2, 3, 4)] == [0, 0, 0, 16]
    read(runner, cache, rule, [4] * 40 + [9])
    assert cache.find([4] * 41).end == 16
    assert cache.nbytes <= 4 * each


def test_nothing_is_kept_below_a_prefix_that_had_to_leave(runner: FakeRunner) -> None:
    rule = ChunkRule({MARKER}, 4)
    cache = PrefixCache(rule, 1 << 20)
    read(runner, cache, rule, [1] * 4 + [9])
    cache = PrefixCache(rule, 2 * cache.nbytes)
    tokens = [1] * 8 + [9]
    state = runner.new_state(1)
    runner.prefill([tokens[:4]], None, state)
    node = cache.add(cache.root, tokens, 4, state)
    assert node is not None
    read(runner, cache, rule, [2] * 8 + [9])
    runner.prefill([tokens[4:8]], None, state)
    assert cache.add(node, tokens, 8, state) is None
    assert [cache.find([token] * 9).end for token in (1, 2)] == [0, 8]


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), max_size=30),
    limit=st.integers(0, 3000),
)
def test_the_cache_stays_within_its_budget_and_a_tree(prompts: list[list[int]], limit: int) -> None:
    runner, rule = FakeRunner(), ChunkRule({2}, 4)
    cache = PrefixCache(rule, limit)
    for tokens in prompts:
        expected = read(runner, PrefixCache(rule, 0), rule, tokens)
        found = read(runner, cache, rule, tokens)
        assert_same(found, expected[-len(found) :])
        nodes, pending = [], list(cache.root.children.values())
        while pending:
            nodes.append(pending.pop())
            pending += nodes[-1].children.values()
        assert set(nodes) == set(cache._used)
        assert cache.nbytes == sum(node.nbytes for node in nodes) <= limit


def test_concurrent_readers_survive_evictions(fake: Engine) -> None:
    options = BatchingOptions(max_batch=8, token_budget=64, prefix_cache_bytes=6_000)
    driver = Driver(fake, options)
    sizes = [random.Random(n).randint(1, 99) for n in range(40)]
    prompts = [prompt_of(100, n % 7) + prompt_of(size, n) for n, size in enumerate(sizes)]
    requests = [driver.add(prompt, ONE) for prompt in prompts]
    driver.run()
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.ticket.result(0).token_ids == fake.generate(prompt, ONE).token_ids
    assert driver.loop.stats().cache_evictions > 0


def test_without_a_budget_nothing_is_kept(fake: Engine) -> None:
    driver = Driver(fake, BatchingOptions(prefix_cache_bytes=0))
    for _ in range(2):
        request = driver.add(prompt_of(600), ONE)
        driver.run()
        assert request.ticket.result(0).cached_tokens == 0
    stats = dataclasses.asdict(driver.loop.stats())
    assert [stats[f"cache_{name}"] for name in ("hits", "misses", "entries", "bytes")] == [
        *(0, 2),
        *(0, 0),
    ]
