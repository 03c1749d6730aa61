"""Answers as the official client sees them, with a script instead of a model."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from ringexport.batching import BatchingStats
from ringexport.runtime.generation import GenerationResult, Timings
from ringexport.runtime.sampling import TokenLogprobs
from ringexport.runtime.session import Engine
from ringexport.serve.replies import ChatReply, CompletionReply
from tests.serve.conftest import NAME, Script, Scripted

USER = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture
def client(scripted: Scripted) -> Iterator[Any]:
    with OpenAI(base_url=scripted.base_url, api_key="none", max_retries=0) as client:
        yield client.with_options(timeout=20)


def deltas(stream: Any) -> list[Any]:
    return [chunk.choices[0].delta for chunk in stream if chunk.choices]


def joined(found: list[Any], name: str) -> str:
    return "".join([getattr(delta, name, None) or "" for delta in found])


def test_chat(scripted: Scripted, client: Any) -> None:
    scripted.batching.script = Script("Grüß dich, Welt! 🌍")
    answer = client.chat.completions.create(
        model=NAME, messages=USER, temperature=0, extra_body=OFF
    )
    choice = answer.choices[0]
    assert choice.message.content == "Grüß dich, Welt! 🌍"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.object == "chat.completion"
    assert answer.model == NAME
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert scripted.batching.prompts[0].endswith(
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>"
    )
    assert scripted.batching.params[0].temperature == 0


def test_stream(scripted: Scripted, client: Any) -> None:
    scripted.batching.script = Script("Grüß dich, Welt! 🌍", stop_reason="length")
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=USER,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=OFF,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        joined([chunk.choices[0].delta for chunk in chunks[:-1]], "content")
        == "Grüß dich, Welt! 🌍"
    )
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_no_usage_chunk_unless_it_is_asked_for(client: Any) -> None:
    for more in ({}, {"stream_options": {"include_usage": False}}):
        stream = client.chat.completions.create(model=NAME, messages=USER, stream=True, **more)
        assert all(len(chunk.choices) == 1 for chunk in stream)


def test_thinking_has_two_names(scripted: Scripted, client: Any) -> None:
    for option in ("on", "off"):
        client.chat.completions.create(
            model=NAME,
            messages=USER,
            extra_body={"chat_template_kwargs": {"thinking_option": option}},
        )
        assert f"detailed thinking {option}" in scripted.batching.prompts[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_separate(scripted: Scripted, client: Any, stream: bool) -> None:
    scripted.batching.script = Script("Well, they said hi.\n\n</think>\n\nHi you < 3!")
    answer = client.chat.completions.create(model=NAME, messages=USER, stream=stream)
    if stream:
        found = deltas(answer)
        reasoning, content = joined(found, "reasoning_content"), joined(found, "content")
    else:
        message = answer.choices[0].message
        reasoning, content = message.reasoning_content, message.content
        details = answer.usage.completion_tokens_details
        assert 0 < details.reasoning_tokens < answer.usage.completion_tokens
    assert (reasoning, content) == ("Well, they said hi.", "Hi you < 3!")
    assert "detailed thinking on" in scripted.batching.prompts[0]
    assert scripted.batching.prompts[0].endswith("<think>\n")


def _result(text: str, ids: list[int]) -> GenerationResult:
    timings = Timings(
        time_to_first_token_ms=1.0,
        total_ms=1.0,
        prefill_tokens_per_second=1.0,
        tokens_per_second=1.0,
    )
    return GenerationResult(
        text=text,
        token_ids=tuple(ids),
        stop_reason="length",
        stop_text=None,
        prompt_tokens=1,
        new_tokens=len(ids),
        timings=timings,
    )


def test_reasoning_is_counted_where_its_end_is_several_tokens(nano: Engine) -> None:
    ids = [token for letter in "ab</think>c" for token in nano.encode(letter)]
    assert len(ids) == 11
    reply = ChatReply(
        nano.tokenizer, NAME, thinking=True, tools=False, stream=False, include_usage=False
    )
    usage = reply.whole(_result("ab</think>c", ids))["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 10}


def test_thinking_that_never_ends(scripted: Scripted, client: Any) -> None:
    scripted.batching.script = Script("Hm, I wonder", stop_reason="length")
    answer = client.chat.completions.create(model=NAME, messages=USER)
    assert answer.choices[0].message.content == ""
    assert answer.choices[0].message.reasoning_content == "Hm, I wonder"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(scripted: Scripted, client: Any, stream: bool) -> None:
    scripted.batching.script = Script(f"Let me look.\n{CALL}\n{CALL}\n")
    answer = client.chat.completions.create(
        model=NAME, messages=USER, tools=[TOOL], stream=stream, extra_body=OFF
    )
    if stream:
        chunks = list(answer)
        found = [chunk.choices[0].delta for chunk in chunks]
        content, finish = joined(found, "content"), chunks[-1].choices[0].finish_reason
        calls = [call for delta in found for call in delta.tool_calls or []]
        assert [call.index for call in calls] == [0, 1]
    else:
        message, finish = answer.choices[0].message, answer.choices[0].finish_reason
        content, calls = message.content, message.tool_calls
    assert content == "Let me look."
    assert finish == "tool_calls"
    assert [call.function.name for call in calls] == ["get_weather"] * 2
    assert json.loads(calls[0].function.arguments) == {"city": "Köln"}
    assert calls[0].id != calls[1].id
    assert '"name": "get_weather"' in scripted.batching.prompts[0]


def test_the_result_of_a_tool_goes_back(scripted: Scripted, client: Any) -> None:
    scripted.batching.script = Script(f"I have to look.\n</think>\n\n{CALL}")
    first = client.chat.completions.create(model=NAME, messages=USER, tools=[TOOL]).choices[0]
    scripted.batching.script = Script("Sunny.")
    call = first.message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    second = client.chat.completions.create(
        model=NAME, messages=[*USER, first.message, result], tools=[TOOL], extra_body=OFF
    )
    assert second.choices[0].message.content == "Sunny."
    assert second.choices[0].finish_reason == "stop"
    assert f"<think>\nI have to look.\n</think>\n\n{CALL}" in scripted.batching.prompts[1]
    assert "<tool_response>\nsun\n</tool_response>" in scripted.batching.prompts[1]


def test_calls_are_text_without_tools(scripted: Scripted, client: Any) -> None:
    scripted.batching.script = Script(CALL)
    answer = client.chat.completions.create(model=NAME, messages=USER, extra_body=OFF)
    assert answer.choices[0].message.content == CALL
    answer = client.chat.completions.create(
        model=NAME, messages=USER, tools=[TOOL], tool_choice="none", extra_body=OFF
    )
    assert answer.choices[0].message.content == CALL
    assert "get_weather" not in scripted.batching.prompts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(scripted: Scripted, client: Any, stream: bool) -> None:
    scripted.batching.script = Script("One two three.")
    answer = client.chat.completions.create(
        model=NAME, messages=USER, logprobs=True, top_logprobs=1, stream=stream, extra_body=OFF
    )
    if stream:
        logs = [chunk.choices[0].logprobs for chunk in answer]
        content = [entry for log in logs if log for entry in log.content]
    else:
        content = answer.choices[0].logprobs.content
    assert "".join([entry.token for entry in content]) == "One two three."
    assert bytes(byte for entry in content for byte in entry.bytes) == b"One two three."
    assert {entry.logprob for entry in content} == {-0.25}
    assert [len(entry.top_logprobs) for entry in content] == [1] * len(content)
    assert content[0].top_logprobs[0].token == content[0].token


def test_completions(scripted: Scripted, client: Any) -> None:
    scripted.batching.script = Script("and more", stop_reason="length")
    answer = client.completions.create(model=NAME, prompt="Once", logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "and more"
    assert choice.finish_reason == "length"
    assert "".join(choice.logprobs.tokens) == "and more"
    assert choice.logprobs.text_offset[0] == 0
    assert scripted.batching.prompts == ["Once"]
    assert scripted.batching.params[0].max_new_tokens == 16
    stream = client.completions.create(model=NAME, prompt=[1, 2, 3], stream=True, max_tokens=5)
    assert "".join([chunk.choices[0].text for chunk in stream]) == "and more"
    assert scripted.batching.params[1].max_new_tokens == 5


def test_every_sampling_field_arrives(scripted: Scripted, client: Any) -> None:
    client.chat.completions.create(
        model=NAME,
        messages=USER,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["a", "b"],
        max_completion_tokens=12,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    params = scripted.batching.params[0]
    assert (params.temperature, params.top_p, params.seed) == (0.5, 0.9, 7)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.1)
    assert params.ignore_eos
    assert list(params.stop) == ["a", "b"]
    assert params.max_new_tokens == 12
    client.chat.completions.create(model=NAME, messages=USER, stop="x")
    params = scripted.batching.params[1]
    assert params.temperature == 1
    assert list(params.stop) == ["x"]


def test_what_openai_allows_at_the_edges(scripted: Scripted, client: Any) -> None:
    client.chat.completions.create(model=NAME, messages=USER, seed=-1, top_p=0)
    params = scripted.batching.params[0]
    assert params.seed == 2**64 - 1
    assert 0 < params.top_p < 1e-6


def test_offsets_count_characters_of_the_text(scripted: Scripted, client: Any) -> None:
    scripted.batching.script.text = "a🎉b"
    choice = client.completions.create(model=NAME, prompt="x", logprobs=0).choices[0]
    assert choice.text == "a🎉b"
    assert len(choice.logprobs.tokens) > 3  # the character comes in several tokens
    assert choice.logprobs.text_offset[0] == 0
    assert set(choice.logprobs.text_offset) == {0, 1, 2}


def test_alternatives_that_split_a_character_are_told_apart(nano: Engine) -> None:
    ids = nano.encode("🎉")
    assert len(ids) == len(set(ids)) > 2
    top = tuple((token, -1.0 - place) for place, token in enumerate(ids))
    logs = tuple(
        TokenLogprobs(token_id=token, logprob=value, top=top)
        for token, value in zip(ids, (value for _, value in top), strict=True)
    )
    result = dataclasses.replace(_result("🎉", ids), logprobs=logs)
    found = CompletionReply(nano.tokenizer, NAME, include_usage=False).whole(result)
    entries = found["choices"][0]["logprobs"]
    assert [len(each) for each in entries["top_logprobs"]] == [len(ids)] * len(ids)
    for token, value, each in zip(
        entries["tokens"], entries["token_logprobs"], entries["top_logprobs"], strict=True
    ):
        assert each[token] == value
    assert "".join(token.removeprefix("bytes:") for token in entries["tokens"]) == (
        "".join(f"\\x{byte:02x}" for byte in "🎉".encode())
    )


def test_the_stop_token_has_no_entry_for_it_is_no_text(nano: Engine) -> None:
    ids = [*nano.encode("ok"), min(nano.tokenizer.stop_ids)]
    logs = tuple(TokenLogprobs(token_id=token, logprob=-1.0, top=()) for token in ids)
    result = dataclasses.replace(_result("ok", ids), logprobs=logs)
    chat = ChatReply(
        nano.tokenizer, NAME, thinking=False, tools=False, stream=False, include_usage=False
    ).whole(result)["choices"][0]
    assert "".join(entry["token"] for entry in chat["logprobs"]["content"]) == "ok"
    text = CompletionReply(nano.tokenizer, NAME, include_usage=False).whole(result)["choices"][0]
    assert "".join(text["logprobs"]["tokens"]) == "ok"


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_content_in_parts(scripted: Scripted, client: Any) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    client.chat.completions.create(
        model=NAME,
        messages=[{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}],
    )
    assert "<role>SYSTEM</role>Be kind\n" in scripted.batching.prompts[0]
    assert "<role>HUMAN</role>One\nTwo<|role_end|>" in scripted.batching.prompts[0]


def test_health_and_metrics(scripted: Scripted, client: Any) -> None:
    assert scripted.http.get(f"{scripted.url}/health").json() == {"status": "ok"}
    client.chat.completions.create(model=NAME, messages=USER)
    text = scripted.http.get(f"{scripted.url}/metrics").text
    assert 'ringexport_http_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "ringexport_running 0.0" in text
    assert "# TYPE ringexport_generated_tokens_total counter" in text
    assert "ringexport_time_to_first_token_seconds_count" in text


def test_every_count_says_what_it_counts(scripted: Scripted) -> None:
    text = scripted.http.get(f"{scripted.url}/metrics").text
    told = dict(re.findall(r"# HELP ringexport_(\w+?)(?:_total)? (.*)", text))
    for field in dataclasses.fields(BatchingStats):
        words = field.name.replace("_", " ")
        assert not told[field.name].lower().startswith(f"{words} since"), field.name
    assert "ringexport_cache_evictions_total 0.0" in text
    assert "ringexport_cache_bytes 0.0" in text


def test_a_silent_stream_shows_signs_of_life(serve_script: Any) -> None:
    server = serve_script(heartbeat_seconds=0.05)
    server.batching.script = Script("late", delay=0.3)
    body = {"messages": USER, "stream": True}
    text = server.http.post(f"{server.base_url}/chat/completions", json=body).text
    assert ": waiting\n\n" in text
    assert text.endswith("data: [DONE]\n\n")
