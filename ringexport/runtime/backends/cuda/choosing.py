"""Tokens chosen on the GPU: what a step feeds and chooses stays there, the host reads ids later.

B rows of a step, V ids. Each slot of the state pool has a last token, and the ids that its row has
seen if its repetition penalty asks for them. A step without changes is a graph and a few launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ringexport.runtime.backends.cuda.graphs import DecodeGraphs, DecodeStep
from ringexport.runtime.backends.cuda.network import Network
from ringexport.runtime.backends.cuda.transfers import sent, uploaded
from ringexport.runtime.choosing import ChosenTokens, TokenChoice
from ringexport.runtime.runner import Logits

__all__ = ["DeviceChooser", "DeviceTokens"]

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class DeviceTokens:
    """The tokens of a step, on their way to the host.

    Attributes:
        ids: [B] int64 in pinned memory.
        largest: [B] fp32 in pinned memory.
        logits: [V] of some rows in pinned memory.
        arrived: recorded behind the copies.
    """

    ids: Tensor
    largest: Tensor
    logits: dict[int, Tensor]
    arrived: torch.cuda.Event

    def result(self) -> ChosenTokens:
        """Wait for the tokens."""
        self.arrived.synchronize()
        logits: dict[int, Logits] = {row: values.numpy() for row, values in self.logits.items()}
        return ChosenTokens(ids=self.ids.tolist(), largest=self.largest.tolist(), logits=logits)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a step and how their tokens are chosen; made anew only when they change.

    Attributes:
        slots: of each row.
        choices: of each row; None for one that chooses nothing.
        slot_index: [B] int64 on the GPU.
        parameters: fields of the sample kernel; None if all rows are greedy.
        penalized: [P] int64, rows with a repetition penalty; None without any.
        penalties: [P, 1] fp32.
        reported: rows whose logits the host wants.
    """

    slots: tuple[int, ...]
    choices: tuple[TokenChoice | None, ...]
    slot_index: Tensor
    parameters: dict[str, Tensor] | None
    penalized: Tensor | None
    penalties: Tensor | None
    reported: tuple[int, ...]


class DeviceChooser:
    """Chooses tokens of slots.

    Args:
        network: launches kernels.
        graphs: captured decode steps.
        slots: of the state pool.
        device: of everything.
    """

    def __init__(
        self, network: Network, graphs: DecodeGraphs, slots: int, device: torch.device
    ) -> None:
        self._network = network
        self._graphs = graphs
        self._device = device
        self._slots = slots
        self._last = torch.zeros(slots, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None
        self._rows: _Rows | None = None
        self._step: DecodeStep | None = None
        self._next_position: npt.NDArray[np.int64] | None = None

    def forget(self) -> None:
        """Note that somebody else has used the buffers of the graphs."""
        self._step = None

    def copy(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copy what slots remember to other slots."""
        source, target = (uploaded(one, self._device) for one in (old, new))
        self._last[target] = self._last[source]
        if self._seen is not None:
            self._seen[target] = self._seen[source]

    def first(
        self,
        logits: Tensor,
        slots: Sequence[int],
        position: npt.NDArray[np.int64],
        choices: Sequence[TokenChoice | None],
    ) -> DeviceTokens:
        """Choose the first tokens of rows.

        Args:
            logits: [B, V].
            slots: of the rows; what they remembered is forgotten.
            position: [B] tokens that the rows have seen.
            choices: one for each row; None chooses nothing of use.
        """
        rows = self._take_rows(tuple(slots), tuple(choices))
        self._mark_history(rows)
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        self._network.choose(logits, tokens)
        where = uploaded(position, self._device, np.int32)
        return self._finish(logits, tokens, where, rows)

    def step(
        self,
        slots: Sequence[int],
        position: npt.NDArray[np.int64],
        choices: Sequence[TokenChoice],
    ) -> DeviceTokens:
        """Feed the last token of each slot and choose the next ones.

        Args:
            slots: of the rows.
            position: [B] tokens that the rows have seen.
            choices: one for each row.
        """
        count = len(slots)
        step = self._graphs.step(count)
        rows, wanted = self._rows, (tuple(slots), tuple(choices))
        same = rows is not None and (rows.slots, rows.choices) == wanted
        if rows is None or not same:
            rows = self._take_rows(*wanted)
        expected = self._next_position if same and step is self._step else None
        if expected is None or not np.array_equal(expected, position):
            self._fill(step, rows, position)
        step.graph.replay()
        self._rows, self._step, self._next_position = rows, step, position + 1
        return self._finish(step.logits[:count], step.tokens[:count], step.position[:count], rows)

    def _fill(self, step: DecodeStep, rows: _Rows, position: npt.NDArray[np.int64]) -> None:
        """Write the inputs of a step that does not just follow the one before it."""
        count, batch = len(rows.slots), len(step.slots)
        fill = np.zeros((2, batch), dtype=np.int32)
        fill[0], fill[0, :count], fill[1, :count] = -1, rows.slots, position
        both = uploaded(fill, self._device, np.int32)
        step.slots.copy_(both[0])
        step.position.copy_(both[1])
        step.tokens.zero_()
        torch.index_select(self._last, 0, rows.slot_index, out=step.tokens[:count])

    def _take_rows(self, slots: tuple[int, ...], choices: tuple[TokenChoice | None, ...]) -> _Rows:
        """Upload what the rows of a step need besides their logits."""
        device, chosen = self._device, [choice for choice in choices if choice is not None]
        slot_index = uploaded(slots, device)
        parameters, penalized, penalties = None, None, None
        if not all(choice.is_greedy for choice in chosen):
            parameters = self._parameters(choices)
        found = [
            row
            for row, choice in enumerate(choices)
            if choice is not None and choice.params.repetition_penalty != 1
        ]
        if found:
            values = [
                one.params.repetition_penalty for row in found if (one := choices[row]) is not None
            ]
            penalized = uploaded(found, device)
            penalties = uploaded(values, device, np.float32)[:, None]
        reported = tuple(
            row for row, choice in enumerate(choices) if choice is not None and choice.wants_logits
        )
        return _Rows(slots, choices, slot_index, parameters, penalized, penalties, reported)

    def _parameters(self, choices: Sequence[TokenChoice | None]) -> dict[str, Tensor]:
        """Return the fields of the sample kernel; a row without a choice is greedy."""
        vocabulary = self._network.config.vocab_size
        floats = np.zeros((3, len(choices)), dtype=np.float32)
        top_k = np.zeros(len(choices), dtype=np.int32)
        seed = np.zeros(len(choices), dtype=np.int64)
        floats[1] = 1.0
        for row, choice in enumerate(choices):
            if choice is None:
                continue
            params = choice.params
            if params.temperature > 0:
                floats[0, row] = min(max(params.temperature, _SMALLEST), _LARGEST)
            floats[1, row], floats[2, row] = params.top_p, params.min_p
            top_k[row] = min(params.top_k, vocabulary)
            seed[row] = choice.seed
        on_device = uploaded(floats, self._device, np.float32)
        return {
            "temperature": on_device[0],
            "top_p": on_device[1],
            "min_p": on_device[2],
            "top_k": uploaded(top_k, self._device, np.int32),
            "seed": uploaded(seed, self._device),
        }

    def _mark_history(self, rows: _Rows) -> None:
        """Remember which ids penalized rows have seen before their first token."""
        for slot, choice in zip(rows.slots, rows.choices, strict=True):
            if choice is None or choice.params.repetition_penalty == 1:
                continue
            if self._seen is None:
                shape = (self._slots, self._network.config.vocab_size)
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            seen = uploaded(sorted({*choice.seen}), self._device)
            self._seen[slot].zero_().index_fill_(0, seen, True)

    def _finish(
        self, logits: Tensor, tokens: Tensor, position: Tensor, rows: _Rows
    ) -> DeviceTokens:
        """Replace the greedy choices in `tokens` where others are wanted, and send all to the host.

        Args:
            logits: [B, V], left as they are.
            tokens: [B] int64 greedy choices.
            position: [B] int32 tokens that the rows have seen: counts the draws of a row.
            rows: whose they are.
        """
        largest = torch.gather(logits, 1, tokens[:, None])[:, 0]
        if rows.parameters is not None:
            values = self._penalized(logits, rows)
            self._network.choose(values, tokens, **rows.parameters, position=position)
        self._last.index_copy_(0, rows.slot_index, tokens)
        if rows.penalized is not None and self._seen is not None:
            self._seen[rows.slot_index[rows.penalized], tokens[rows.penalized]] = True
        reported = {row: sent(logits[row]) for row in rows.reported}
        ids, values = sent(tokens), sent(largest)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))
        return DeviceTokens(ids, values, reported, arrived)

    def _penalized(self, logits: Tensor, rows: _Rows) -> Tensor:
        """Return logits [B, V] with the repetition penalty of the rows that have one."""
        if rows.penalized is None or rows.penalties is None or self._seen is None:
            return logits
        values = logits.clone()
        part = logits[rows.penalized]
        changed = torch.where(part > 0, part / rows.penalties, part * rows.penalties)
        seen = self._seen[rows.slot_index[rows.penalized]]
        values[rows.penalized] = torch.where(seen, changed, part)
        return values
