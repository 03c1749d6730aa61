"""How the engine's logits are compared: with any runner on the CPU, right ones and wrong ones."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from ringexport.compare.gpu.agreement import (
    LogitsError,
    References,
    check_decode,
    check_prefill,
)
from ringexport.errors import ToleranceExceededError
from ringexport.runtime.backends.torch_ref import TorchRunner
from tests.compare.test_gpu_reference import RING_NANO, packed


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(packed(RING_NANO, tmp_path_factory.mktemp("engine") / "packed"))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runner(request: pytest.FixtureRequest) -> Iterator[TorchRunner]:
    with TorchRunner(RING_NANO, model_digest=str, dtype=request.param) as opened:
        yield opened


def test_a_right_engine_agrees(runner: TorchRunner, references: References) -> None:
    prompt = check_prefill(runner, references, tokens=20)
    decode = check_decode(runner, references, batch=12, prompt=5, steps=3)
    assert (prompt.positions, decode.positions) == (20, 4 * 4)
    for found in (prompt, decode):
        found.check()
        assert found.rounding.median_relative > 1e-4
        assert found.engine.mean_cosine > 0.999
        assert found.engine.top1 > 0.8


def test_a_wrong_engine_does_not(references: References) -> None:
    with TorchRunner(RING_NANO, model_digest=str) as runner:
        runner._model._norm = runner._model._norm * 1.1
        found = check_prefill(runner, references, tokens=20)
    with pytest.raises(
        ToleranceExceededError, match=r"prompt of 20 tokens: .* no speed is reported"
    ):
        found.check()


def test_infinities_are_refused() -> None:
    logits = torch.zeros(2, 3)
    logits[0, 0] = torch.inf
    with pytest.raises(ToleranceExceededError, match="infinities"):
        LogitsError.of(logits, torch.zeros(2, 3))


def test_wrong_experts_are_refused(references: References) -> None:
    with TorchRunner(RING_NANO, model_digest=str) as runner:
        found = check_prefill(runner, references, tokens=20)
    found.check()
    wrong = replace(found, experts=0.9, experts_rounding=0.98)
    with pytest.raises(ToleranceExceededError, match=r"10.00% of the engine's experts are others"):
        wrong.check()
    replace(found, experts=0.96, experts_rounding=0.98).check()


def test_experts_of_an_engine_are_used_and_counted(references: References) -> None:
    ids = np.arange(24).reshape(2, 12)
    _, own = references._run(references._models[0], ids, 5, None)
    logits, _ = references._run(references._models[0], ids, 5, own)
    shape = (2, 5, logits.shape[-1])
    first = min(own)
    assert own[first].shape[:2] == (2, 12)
    same = references.compare("same", logits.view(shape).numpy(), ids, own)
    assert same.experts == 1.0
    assert same.engine.max_error < 1e-4
    assert 0.9 < same.experts_rounding <= 1.0
    own[first] = (own[first] + 1) % 32
    other = references.compare("other", logits.view(shape).numpy(), ids, own)
    assert other.experts < 0.9
    assert other.engine.max_error > 1e-2
