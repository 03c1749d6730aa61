"""With an asynchronous chooser: a step runs while the tokens of the one before are taken over."""

import pytest

from ringexport.batching.options import BatchingOptions
from ringexport.errors import RingExportError
from ringexport.runtime.session import Engine
from ringexport.runtime.tokenizer import ModelTokenizer
from tests.batching.driver import ERRORS, Driver, Fault, params, prompt_of, same
from tests.device_runner import DeviceRunner


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_tokens_that_never_arrive_cost_nothing_but_time(
    tokenizer: ModelTokenizer, error: Exception
) -> None:
    runner = DeviceRunner()
    fake = Engine(runner, tokenizer)
    choices = [params(20), params(20, temperature=1.0, seed=3, logprobs=1)]
    prompts = [prompt_of(9, seed) for seed in range(6)]
    expected = [fake.generate(prompt, choices[n % 2]) for n, prompt in enumerate(prompts)]
    driver = Driver(fake)
    requests = [driver.add(prompt, choices[n % 2]) for n, prompt in enumerate(prompts)]
    driver.run(7)
    assert runner.outstanding == 1
    left = [2]

    def fail_twice(kind: str, _tokens: list[int]) -> None:
        if kind == "result" and left[0]:
            left[0] -= 1
            raise error

    runner.fault = fail_twice
    driver.run()
    assert left == [0]
    for request, result in zip(requests, expected, strict=True):
        driver.check(request)
        assert same(request.ticket.result(0), result)


def test_a_step_runs_while_the_tokens_of_the_last_one_are_taken_over(
    tokenizer: ModelTokenizer,
) -> None:
    runner = DeviceRunner()
    driver = Driver(Engine(runner, tokenizer), BatchingOptions(prefix_cache_bytes=0))
    outstanding: list[int] = []
    runner.fault = lambda kind, _: (
        outstanding.append(runner.outstanding) if kind == "result" else None
    )
    requests = [driver.add(prompt_of(5, seed), params(10)) for seed in range(3)]
    driver.run(6)
    assert outstanding == [1] * 6  # after each result one more step runs
    requests[1].ticket.cancel()
    driver.run()
    assert requests[1].ticket.result(0).new_tokens == 6
    assert runner.outstanding == 0
    decoded = [rows for kind, rows in runner.calls if kind == "decode"]
    assert decoded == [3] * 6 + [2] * 3


def test_prompts_are_read_together_where_no_cache_follows(tokenizer: ModelTokenizer) -> None:
    runner = DeviceRunner()
    fake = Engine(runner, tokenizer)
    sizes = [40, 3, 700, 9, 64, 1, 30]
    expected = [fake.generate(prompt_of(size, size), params(6)) for size in sizes]
    runner.calls.clear()
    options = BatchingOptions(prefix_cache_bytes=0, token_budget=256)
    driver = Driver(fake, options)
    requests = [driver.add(prompt_of(size, size), params(6)) for size in sizes]
    driver.loop.step()
    assert runner.calls[0] == ("prefill", 256)
    assert driver.loop.stats().running == 7
    driver.run()
    for request, result in zip(requests, expected, strict=True):
        driver.check(request)
        assert same(request.ticket.result(0), result)
    reads = [size for kind, size in runner.calls if kind == "prefill"]
    assert sum(reads) == sum(sizes)
    assert len(reads) == 4


@pytest.mark.parametrize(
    ("running", "reads"), [(0, [2048, 952]), (4, [2048, 952]), (5, [512] * 5 + [440])]
)
def test_more_of_a_prompt_is_read_at_once_where_few_have_to_wait(
    tokenizer: ModelTokenizer, running: int, reads: list[int]
) -> None:
    runner = DeviceRunner()
    fake = Engine(runner, tokenizer)
    assert runner.spec.token_budget == 512
    cases = [(prompt_of(5, seed), params(40)) for seed in range(running)]
    cases.append((prompt_of(3000), params(9)))
    expected = [fake.generate(*case) for case in cases]
    driver = Driver(fake, BatchingOptions(prefix_cache_bytes=0))
    requests = [driver.add(*case) for case in cases[:-1]]
    driver.run(3)
    requests.append(driver.add(*cases[-1]))
    runner.calls.clear()
    while requests[-1].phase in {"waiting", "reading"}:
        driver.loop.step()
    assert [tokens for kind, tokens in runner.calls if kind == "prefill"] == reads
    driver.run()
    for request, result in zip(requests, expected, strict=True):
        driver.check(request)
        assert same(request.ticket.result(0), result)


@pytest.mark.parametrize("times", [1, 99])
def test_a_prompt_that_fails_among_others_fails_alone(
    tokenizer: ModelTokenizer, times: int
) -> None:
    runner = DeviceRunner()
    fake = Engine(runner, tokenizer)
    prompts = [prompt_of(30, seed) for seed in range(4)]
    prompts[1][7] = 299
    expected = [fake.generate(prompt, params(6)) for prompt in prompts]
    runner.fault = Fault("prefill", 299, times, RuntimeError("poison"))
    driver = Driver(fake, BatchingOptions(prefix_cache_bytes=0))
    requests = [driver.add(prompt, params(6)) for prompt in prompts]
    driver.run()
    for index, request in enumerate(requests):
        if index == 1 and times > 1:
            with pytest.raises(RingExportError, match="poison"):
                request.ticket.result(0)
        else:
            assert same(request.ticket.result(0), expected[index])
