import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringexport
from ringexport import Engine, SamplingParams
from ringexport.bundle import EngineBundle
from ringexport.errors import (
    BackendUnavailableError,
    BundleError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    DigestError,
    RingExportError,
    ShapeError,
)
from ringexport.runtime.registry import open_bundle_runner
from ringexport.runtime.runner import Logits
from ringexport.runtime.session import GenerationResult
from ringexport.runtime.state import write_state_file
from tests.runtime.conftest import OPTIONS

SHORT = SamplingParams(max_new_tokens=12, ignore_eos=True)
RANDOM = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
PROMPTS = ["the rain", "a", "日本 and then some more text", "x y"]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine.open(tiny_checkpoint, options=OPTIONS) as opened:
        yield opened


def test_public_names() -> None:
    assert ringexport.__version__
    assert ringexport.errors.RingExportError is ringexport.RingExportError
    assert set(ringexport.__all__) <= set(dir(ringexport))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ringexport.nothing  # noqa: B018


def test_greedy_text_equals_the_reference(engine: Engine, reference: Engine) -> None:
    assert reference.runner.spec.name == "torch"
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)
    found = engine.generate(PROMPTS, params)
    expected = reference.generate(PROMPTS, params)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_result_counts_and_times(engine: Engine) -> None:
    result = engine.generate("the rain", SHORT)
    assert result.stop_reason == "length"
    assert result.new_tokens == len(result.token_ids) == 12
    assert result.prompt_tokens == len(engine.tokenizer.encode("the rain"))
    assert result.text == engine.tokenizer.decode(result.token_ids)
    assert 0 < result.timings.time_to_first_token_ms <= result.timings.total_ms
    assert result.timings.tokens_per_second > 0
    assert result.logprobs is None


def test_batch_gives_what_each_prompt_gives_alone(engine: Engine) -> None:
    together = engine.generate(PROMPTS, RANDOM)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert engine.generate(prompt, RANDOM).text == found.text


def test_rows_end_on_their_own(engine: Engine) -> None:
    lengths = [1, 7, 3, 0]
    each = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in lengths]
    found = engine.generate_batch([*PROMPTS], each)
    assert [one.new_tokens for one in found] == lengths
    assert found[1].token_ids == engine.generate(PROMPTS[1], each[1]).token_ids
    with pytest.raises(ConfigError, match="4 prompts were given with 1 params"):
        engine.generate_batch([*PROMPTS], each[:1])
    assert engine.generate_batch([]) == []


def test_stream_is_the_text_in_pieces(engine: Engine) -> None:
    whole = engine.generate("the rain", RANDOM)
    with engine.stream("the rain", RANDOM) as stream:
        with pytest.raises(RingExportError, match="still being generated"):
            _ = stream.result
        pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert stream.result.token_ids == whole.token_ids
    assert "\ufffd" not in "".join(pieces[:-1]) or "\ufffd" in whole.text


def test_closed_stream_has_a_result(engine: Engine) -> None:
    with engine.stream("the rain", RANDOM) as stream:
        next(stream)
    assert stream.result.stop_reason == "cancelled"
    assert 0 < stream.result.new_tokens < 12


def test_both_stop_tokens_end_the_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = engine.generate("the rain", SHORT)
    for place in (0, 5):
        token = free.token_ids[place]
        first = free.token_ids.index(token)
        monkeypatch.setattr(engine.tokenizer, "stop_ids", frozenset({1, token}))
        found = engine.generate("the rain", SamplingParams(max_new_tokens=12))
        assert found.stop_reason == "stop_token"
        assert found.token_ids == free.token_ids[: first + 1]
        assert found.text == engine.tokenizer.decode(free.token_ids[:first])
        again = engine.generate("the rain", SHORT)
        assert again.token_ids == free.token_ids


def test_stop_text_ends_the_text_and_is_not_part_of_it(engine: Engine) -> None:
    free = engine.generate("the rain", RANDOM)
    stop = free.text[4:6]
    params = SamplingParams(
        max_new_tokens=12, temperature=1.0, seed=5, ignore_eos=True, stop=("never", stop)
    )
    stream = engine.stream("the rain", params)
    text = "".join(stream)
    assert text == free.text[: free.text.index(stop)] == stream.result.text
    assert (stream.result.stop_reason, stream.result.stop_text) == ("stop_text", stop)
    assert stream.result.new_tokens < 12


def test_full_context_ends_the_text(engine: Engine) -> None:
    limit = engine.runner.spec.context_length
    result = engine.generate([5] * (limit - 2), SHORT)
    assert (result.stop_reason, result.new_tokens) == ("context", 3)
    with pytest.raises(ContextLengthError, match=r"4,097 tokens, .* holds 4,096") as caught:
        engine.generate([5] * (limit + 1), SHORT)
    assert caught.value.hint == "shorten the prompt"


def test_logprobs(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=3, logprobs=2, ignore_eos=True)
    result = engine.generate("the rain", params)
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in result.logprobs)


def test_bad_prompts_are_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="empty"):
        engine.generate("")
    with pytest.raises(ShapeError, match="token id 384"):
        engine.generate([384])
    with pytest.raises(ConfigError, match="mixes"):
        engine.generate([1, {"role": "user"}])  # type: ignore[list-item]


def test_prompts_of_numpy_are_ids(engine: Engine) -> None:
    expected = engine.generate([3, 4, 5], SHORT).token_ids
    prompts: list[Any] = [np.array([3, 4, 5], np.int32), [np.int64(3), 4, 5], (3, 4, 5)]
    for prompt in prompts:
        assert engine.generate(prompt, SHORT).token_ids == expected
        ids = engine.encode(prompt)
        assert [type(one) for one in ids] == [int] * 3


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (np.array([], np.int64), "the prompt is empty"),
        (("a", "b"), "item 0 of the prompt is a str, expected"),
        ([[1, 2], [3]], "item 0 of the prompt is a list, expected"),
        ([1, True], "item 1 of the prompt is a bool, expected"),
        ([1.0], "item 0 of the prompt is a float, expected"),
        ({"role": "user"}, "the prompt is a dict, expected"),
        (b"text", "the prompt is a bytes, expected"),
        (None, "the prompt is a NoneType, expected"),
        (7, "the prompt is a int, expected"),
        (np.zeros((1, 2), np.int64), r"an array of int64 of shape \[1, 2\], expected"),
        (np.zeros(2), r"an array of float64 of shape \[2\], expected"),
    ],
    ids=str,
)
def test_prompts_of_other_types_are_refused(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.generate(prompt)


@pytest.mark.parametrize("call", ["_new_state", "_prefill_chunk"])
def test_missing_memory_is_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine.runner, call, fail)
    with pytest.raises(
        RingExportError, match=r"not enough memory for the .*state.* 1 row"
    ) as caught:
        engine.generate("a")
    assert "memory" in str(caught.value.hint)


def test_missing_memory_while_loading_is_named(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    monkeypatch.setattr("ringexport.runtime.backends.torch_ref.ReferenceModel", fail)
    with pytest.raises(RingExportError, match=r"not enough memory for the weights of .* float32"):
        Engine.open(tiny_checkpoint, options=OPTIONS)


def test_unknown_decay_form_of_a_manifest(bundle_path: Path) -> None:
    bundle = EngineBundle.open(bundle_path, verify=False)
    decay = dataclasses.replace(bundle.manifest.decay, form="odd")
    odd = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, decay=decay))
    with pytest.raises(BundleError, match="decay form 'odd', expected one of"):
        open_bundle_runner(odd, "torch", OPTIONS)


def test_chat_uses_the_template(engine: Engine) -> None:
    message = {"role": "user", "content": "hi"}
    found = engine.chat([message], SHORT, thinking=False)
    prompt = engine.chat_prompt([message], thinking=False)
    assert "thinking off" in prompt
    assert found.token_ids == engine.generate(prompt, SHORT).token_ids
    thinking = engine.generate([message], SHORT)
    assert thinking.prompt_tokens == len(engine.tokenizer.encode(engine.chat_prompt([message])))


def test_no_template(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(CheckpointError, match="no chat template"):
        engine.chat([{"role": "user", "content": "hi"}])


def texts(results: list[GenerationResult]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in results]


def test_session_continues_its_text(engine: Engine) -> None:
    session = engine.session()
    first = session.generate("the rain", SHORT)
    second = session.generate(" and", SHORT)
    ids = [
        *engine.tokenizer.encode("the rain"),
        *first.token_ids,
        *engine.tokenizer.encode(" and"),
    ]
    assert second.token_ids == engine.generate(ids, SHORT).token_ids
    assert session.tokens == [*ids, *second.token_ids[:-1]]


def test_engine_keeps_sessions(engine: Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.generate("the rain", SHORT)
    engine.save_state(session, tmp_path / "state")
    fork, loaded = engine.fork(session), engine.load_state(tmp_path / "state")
    found = [one.generate(" fell", RANDOM).text for one in (session, fork, loaded)]
    assert found[0] == found[1] == found[2]
    assert loaded.tokens == fork.tokens == session.tokens
    with pytest.raises(BundleError, match="cannot be read"):
        engine.load_state(tmp_path / "missing")


def test_session_forks_and_files(engine: Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.generate("the rain", SHORT)
    session.save_state(tmp_path / "session")
    fork = session.fork()
    loaded = engine.session()
    loaded.load_state(tmp_path / "session")
    ends = [one.generate(" and", SHORT) for one in (session, fork, loaded)]
    assert len(set(texts(ends))) == 1
    assert session.tokens == fork.tokens == loaded.tokens


def test_session_files_of_others_are_refused(
    engine: Engine, reference: Engine, tmp_path: Path
) -> None:
    state = engine.runner.new_state(1)
    state.save(tmp_path / "state")
    with pytest.raises(BundleError, match="no session"):
        engine.session().load_state(tmp_path / "state")
    session = engine.session()
    session.generate("a", SHORT)
    session.save_state(tmp_path / "session")
    other = reference.session()  # the same checkpoint and decay: the same model
    other.load_state(tmp_path / "session")
    assert other.generate("b", SHORT).token_ids == session.generate("b", SHORT).token_ids
    content = (tmp_path / "session").read_bytes()
    digest = engine.runner.model_digest.encode()
    (tmp_path / "session").write_bytes(content.replace(digest, b"0" * 64))
    with pytest.raises(DigestError, match="another model"):
        session.load_state(tmp_path / "session")


def test_a_session_saved_amid_its_text_goes_on_elsewhere(
    engine: Engine, bundle_path: Path, tmp_path: Path
) -> None:
    params = SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=3)
    session = engine.session()
    with session.stream("the rain", SHORT) as stream:
        for _ in range(4):
            next(stream)
    engine.save_state(session, tmp_path / "session")
    expected = session.generate("", params)
    with Engine.open(bundle_path, options=OPTIONS) as other:
        found = other.load_state(tmp_path / "session").generate("", params)
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
    whole = engine.generate("the rain", SamplingParams(max_new_tokens=40, ignore_eos=True))
    fed = stream.result.new_tokens
    assert whole.token_ids[fed : fed + 9] == expected.token_ids


def test_a_file_that_contradicts_itself_changes_no_session(engine: Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.generate("a", SHORT)
    note = json.dumps({"tokens": session.tokens[:-1], "pending": [], "messages": []})
    snapshot = session._current_state().snapshot()
    write_state_file(tmp_path / "odd", snapshot, model_digest=engine.runner.model_digest, note=note)
    expected = session.fork().generate("b", SHORT)
    with pytest.raises(BundleError, match="its state and its tokens disagree"):
        session.load_state(tmp_path / "odd")
    with pytest.raises(BundleError, match="cannot be read"):
        session.load_state(tmp_path / "missing")
    assert session.generate("b", SHORT).token_ids == expected.token_ids


def test_states_of_another_recipe_do_not_fit(engine: Engine, bundle_path: Path) -> None:
    bundle = EngineBundle.open(bundle_path, verify=False)
    build = dataclasses.replace(bundle.manifest.build, recipe="int8")
    other = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, build=build))
    with open_bundle_runner(other, "onnxruntime:cpu", OPTIONS) as runner:
        assert runner.model_digest != engine.runner.model_digest


def test_interrupted_session_recovers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.session()
    expected.generate("the rain", SHORT)
    session = engine.session()
    stream = session.stream("the rain", SHORT)
    decode, calls = engine.runner.decode, [0]

    def interrupted(*args: object, **more: object) -> Logits:
        calls[0] += 1
        logits = decode(*args, **more)  # type: ignore[arg-type]
        if calls[0] == 5:
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert stream.result.stop_reason == "cancelled"
    assert stream.result.new_tokens == 5
    ids = [*session.tokens, stream.result.token_ids[-1], *engine.tokenizer.encode("!")]
    assert session.generate("!", SHORT).token_ids == engine.generate(ids, SHORT).token_ids


def test_streams_that_overlap_do_not_mix(engine: Engine) -> None:
    session = engine.session()
    session.generate("the rain", SHORT)
    plain = session.fork().generate("x", SHORT)
    first, second = session.stream("x", SHORT), session.stream("x", SHORT)
    next(first)
    assert "".join(second) == plain.text
    list(first)
    assert first.result.token_ids == second.result.token_ids == plain.token_ids
    ids = [*session.tokens, plain.token_ids[-1], *engine.tokenizer.encode("y")]
    assert session.generate("y", SHORT).token_ids == engine.generate(ids, SHORT).token_ids


def test_session_chat(engine: Engine) -> None:
    session = engine.session()
    answer = session.chat("hi", SHORT)
    session.chat("more", SHORT, thinking=False)
    roles = [message["role"] for message in session.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert session.messages[1]["content"] == answer.text
    session.reset()
    assert session.tokens == []


def test_backends_are_chosen_by_name(bundle_path: Path, tiny_checkpoint: Path) -> None:
    with Engine.open(bundle_path, "torch", options=OPTIONS) as engine:
        assert engine.runner.spec.name == "torch"
    for path, backend, message in (
        (bundle_path, "magic", "no backend 'magic'"),
        (bundle_path, "onnxruntime:cuda", "has no target onnxruntime:cuda"),
        (tiny_checkpoint, "onnxruntime:cpu", "cannot run a checkpoint"),
    ):
        with pytest.raises(BackendUnavailableError, match=message) as caught:
            Engine.open(path, backend)
        assert caught.value.hint
        assert "--target" not in caught.value.hint
        assert backend == "magic" or "cuda" not in caught.value.hint
    with pytest.raises(BundleError):
        Engine.open(bundle_path / "nothing")
