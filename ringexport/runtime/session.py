"""What most users need: an engine that continues texts, and sessions that remember."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from ringexport.bundle import EngineBundle
from ringexport.errors import BundleError, CheckpointError, ConfigError
from ringexport.runtime.chat import Message
from ringexport.runtime.generation import Generation, GenerationResult, GenerationStream, Row
from ringexport.runtime.prompt import Prompt, split_prompt
from ringexport.runtime.registry import RunnerOptions, open_bundle_runner, open_checkpoint_runner
from ringexport.runtime.runner import Runner
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.state import DecodeState, read_state_file, write_state_file
from ringexport.runtime.tokenizer import ModelTokenizer

__all__ = ["Engine", "GenerationResult", "GenerationStream", "Prompt", "Session"]


class Engine:
    """A loaded model with its tokenizer.

    Attributes:
        runner: the loaded model.
        tokenizer: text to ids and back.
        bundle: what it was opened from, None for a checkpoint.
    """

    def __init__(
        self, runner: Runner, tokenizer: ModelTokenizer, *, bundle: EngineBundle | None = None
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.bundle = bundle

    @classmethod
    def open(
        cls,
        path: Path | str,
        backend: str = "auto",
        *,
        options: RunnerOptions | None = None,
        verify: bool = True,
    ) -> Self:
        """Open a bundle, or a checkpoint with the torch reference.

        Args:
            path: directory of either.
            backend: "auto", or a name that `ringexport doctor` lists.
            options: how to run it.
            verify: compare the SHA-256 of every file of a bundle.

        Raises:
            BundleError, CheckpointError, ConfigError: files that cannot be used.
            BackendUnavailableError: no backend, or not this one, can run it here.
        """
        directory = Path(path)
        is_checkpoint = (directory / "config.json").exists()
        if is_checkpoint and not (directory / "manifest.json").exists():
            runner = open_checkpoint_runner(directory, backend, options)
            return cls(runner, _open_tokenizer(directory, runner))
        bundle = EngineBundle.open(directory, verify=verify)
        runner = open_bundle_runner(bundle, backend, options)
        return cls(runner, _open_tokenizer(directory / "model", runner), bundle=bundle)

    @overload
    def generate(
        self, prompt: list[str], params: SamplingParams | None = None
    ) -> list[GenerationResult]: ...
    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> GenerationResult: ...
    def generate(
        self, prompt: Prompt | list[str], params: SamplingParams | None = None
    ) -> GenerationResult | list[GenerationResult]:
        """Continue a prompt, or each text of a list in one batch.

        Args:
            prompt: text, token ids (a sequence or a numpy array of integers), chat messages, or a
                list of texts.
            params: how to continue; greedy by default.

        Returns:
            One result, or a list of results for a list of texts.

        Raises:
            ConfigError: an empty prompt or list, or a prompt of another type.
            ContextLengthError: a prompt longer than the context.
            ShapeError: token ids out of range.
            CheckpointError: messages, but no usable chat template.
        """
        if isinstance(prompt, list) and prompt and all(isinstance(item, str) for item in prompt):
            return self.generate_batch([str(item) for item in prompt], params)
        return self.generate_batch([prompt], params)[0]  # type: ignore[list-item]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerationResult]:
        """Continue several prompts together; each gives the text that it gives alone.

        Args:
            prompts: texts, token ids or chats, of any lengths.
            params: for all, or one for each.

        Raises:
            ConfigError, ContextLengthError, ShapeError, CheckpointError: as for `generate`.
        """
        if not prompts:
            return []
        each = [params or SamplingParams()] if not isinstance(params, Sequence) else [*params]
        each = each * len(prompts) if not isinstance(params, Sequence) else each
        if len(each) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts were given with {len(each)} params")
        rows = [
            self.row(self.encode(prompt), choice)
            for prompt, choice in zip(prompts, each, strict=True)
        ]
        generation = Generation(self.runner, rows, self.runner.new_state(len(rows)))
        for _ in generation:
            pass
        return [row.result() for row in rows]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> GenerationStream:
        """Continue a prompt piece by piece.

        Raises:
            ConfigError, CheckpointError: at once; the others of `generate` while reading.
        """
        row = self.row(self.encode(prompt), params or SamplingParams())
        generation = Generation(self.runner, [row], self.runner.new_state(1))
        return GenerationStream(generation, (piece for _, piece in generation))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> GenerationResult:
        """Answer the last of `messages`; see `chat_prompt` and `generate`."""
        prompt = self.chat_prompt(messages, thinking=thinking, tools=tools)
        return self.generate(prompt, params)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text that the checkpoint's own template makes of messages.

        Args:
            messages: {"role": "user", "content": "..."} and so on; see `plain_messages`.
            thinking: whether the model should think before it answers.
            tools: functions that the model may call.

        Raises:
            CheckpointError: there is no template, or it cannot be used.
            ConfigError: no messages, one without a text, or with a role that is unknown.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise CheckpointError(
                "the checkpoint has no chat template", hint="give the prompt as plain text"
            )
        return template.render(messages, thinking=thinking, tools=tools)

    def session(self) -> "Session":
        """Return a session without any text yet."""
        return Session(self)

    def fork(self, session: "Session") -> "Session":
        """Return an independent session that continues from where `session` is."""
        return session.fork()

    def save_state(self, session: "Session", path: Path | str) -> None:
        """Write a session to a file: its state, tokens and messages.

        Raises:
            OutputError: it cannot be written; an existing file is untouched.
        """
        session.save_state(path)

    def load_state(self, path: Path | str) -> "Session":
        """Return the session in a file that `save_state` wrote.

        Raises:
            BundleError: the file cannot be read, is damaged, or holds no session.
            VersionError, DigestError: it is of a newer format, or of another model.
        """
        session = self.session()
        session.load_state(path)
        return session

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt; see `generate` for what it can be.

        Raises:
            ConfigError: none of those.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        kind, items = split_prompt(prompt)
        return items if kind == "ids" else self.tokenizer.encode(self.chat_prompt(items))

    def row(
        self, ids: Sequence[int], params: SamplingParams, *, history: Sequence[int] = ()
    ) -> Row:
        """Return a row for `Generation`, which continues `ids` after `history`."""
        return Row(ids, params, self.tokenizer, self.runner.spec.vocab_size, history=history)

    def close(self) -> None:
        """Give everything back."""
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Session:
    """One text that grows turn by turn; the state keeps what was read and written.

    An interrupt or an error in the middle of a step costs only the state, which is computed again
    from `tokens` when it is needed. Read one stream to its end, or close it, before the next: of
    streams that overlap, the session remembers the one that ends last.

    Attributes:
        tokens: ids that the state has seen.
        messages: of `chat`, with the answers.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._state: DecodeState | None = None
        self._pending: list[int] = []
        self.tokens: list[int] = []
        self.messages: list[Message] = []

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> GenerationResult:
        """Continue the session's text after `prompt`; see `Engine.generate`."""
        return _read(self.stream(prompt, params))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> GenerationStream:
        """Continue the session's text after `prompt`, piece by piece; see `Engine.stream`."""
        ids = self._pending + self._engine.encode(prompt)
        return self._start(ids, params)

    def chat(
        self, content: str, params: SamplingParams | None = None, *, thinking: bool = True
    ) -> GenerationResult:
        """Say something as the user and return the answer; see `stream_chat`."""
        return _read(self.stream_chat(content, params, thinking=thinking))

    def stream_chat(
        self, content: str, params: SamplingParams | None = None, *, thinking: bool = True
    ) -> GenerationStream:
        """Say something as the user and return the answer piece by piece.

        The state is used again as far as the template repeats what it has seen; a template that
        takes back earlier reasoning makes the model read the chat anew.

        Raises:
            CheckpointError: no usable chat template.
        """
        question = {"role": "user", "content": content}
        ids = self._engine.tokenizer.encode(
            self._engine.chat_prompt([*self.messages, question], thinking=thinking)
        )
        if ids[: len(self.tokens)] != self.tokens or len(ids) == len(self.tokens):
            self.reset()
        return self._start(ids[len(self.tokens) :], params, question)

    def reset(self) -> None:
        """Forget the text, but not `messages`."""
        self._state = None
        self._pending, self.tokens = [], []

    def fork(self) -> "Session":
        """Return an independent session that continues from here."""
        other = Session(self._engine)
        other._state = None if self._state is None else self._state.fork()
        other._pending, other.tokens = list(self._pending), list(self.tokens)
        other.messages = list(self.messages)
        return other

    def save_state(self, path: Path | str) -> None:
        """Write state, tokens and messages to a file.

        Raises:
            OutputError: it cannot be written; an existing file is untouched.
        """
        note = json.dumps(
            {"tokens": self.tokens, "pending": self._pending, "messages": self.messages}
        )
        digest = self._engine.runner.model_digest
        write_state_file(
            Path(path), self._current_state().snapshot(), model_digest=digest, note=note
        )

    def load_state(self, path: Path | str) -> None:
        """Take over what `save_state` wrote; on an error the session stays as it is.

        Raises:
            BundleError: the file cannot be read, is damaged, or holds no session.
            VersionError, DigestError: it is of a newer format, or of another model.
        """
        file = read_state_file(Path(path), model_digest=self._engine.runner.model_digest)
        note = _parse_note(Path(path), file.note)
        if file.snapshot.position.tolist() != [len(note["tokens"])]:
            raise BundleError(f"{path} is damaged: its state and its tokens disagree")
        state = self._engine.runner.new_state(1)
        state.restore(file.snapshot)
        self._state, self.messages = state, note["messages"]
        self._pending, self.tokens = note["pending"], note["tokens"]

    def _current_state(self) -> DecodeState:
        """Return the state, computed from the tokens if an interrupt has cost it."""
        if self._state is None:
            state = self._engine.runner.new_state(1)
            if self.tokens:
                self._engine.runner.prefill([self.tokens], None, state)
            self._state = state
        return self._state

    def _start(
        self, ids: Sequence[int], params: SamplingParams | None, question: Message | None = None
    ) -> GenerationStream:
        """Feed `ids` and go on; the stream owns the state until it ends in a known one."""
        row = self._engine.row(ids, params or SamplingParams(), history=self.tokens)
        generation = Generation(self._engine.runner, [row], self._current_state())
        self._state = None
        return GenerationStream(generation, self._follow(generation, list(self.tokens), question))

    def _follow(
        self, generation: Generation, before: list[int], question: Message | None
    ) -> Iterator[str]:
        """Run a generation of one row, and remember what it fed even if it is interrupted."""
        row = generation.rows[0]
        try:
            for _, piece in generation:
                yield piece
        finally:
            text, fed = row.prompt + row.token_ids, generation.fed[0]
            if fed:
                self.tokens, self._pending = before + text[:fed], text[fed:]
                self._state = generation.state if generation.consistent else None
            if question is not None and row.stop_reason is not None:
                answer = {"role": "assistant", "content": row.result().text}
                self.messages += [question, answer]


def _read(stream: GenerationStream) -> GenerationResult:
    for _ in stream:
        pass
    return stream.result


def _open_tokenizer(directory: Path, runner: Runner) -> ModelTokenizer:
    try:
        return ModelTokenizer.open(directory, vocab_size=runner.spec.vocab_size)
    except BaseException:
        runner.close()
        raise


def _parse_note(path: Path, note: str) -> dict[str, list[Any]]:
    """Read the note that `Session.save_state` writes."""
    keys = {"tokens": int, "pending": int, "messages": dict}
    try:
        data = json.loads(note)
        usable = isinstance(data, dict) and all(
            isinstance(data.get(key), list) and all(type(item) is kind for item in data[key])
            for key, kind in keys.items()
        )
    except (ValueError, RecursionError):
        usable = False
    if not usable:
        raise BundleError(
            f"{path} holds a decode state but no session", hint="save it with save_state"
        )
    return {key: data[key] for key in keys}
