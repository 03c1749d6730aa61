"""Tokens chosen on the GPU: what a step feeds and chooses stays there, the host reads ids later.

B rows of a step, V ids. Each slot of the state pool has a last token, and the ids that its row has
seen if its repetition penalty asks for them. A step without changes is a graph and a few launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ringexport.runtime.backends.cuda.graphs import DecodeGraphs, DecodeStep
from ringexport.runtime.backends.cuda.network import Network
from ringexport.runtime.backends.cuda.transfers import sent, uploaded
from ringexport.runtime.choosing import ChosenTokens, TokenChoice
from ringexport.runtime.runner import Logits
from ringexport.runtime.sampling import SamplingParams

__all__ = ["DeviceChooser", "DeviceTokens"]

_WORD = 32  # ids whose marks share an integer
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
        reported: rows whose logits the host wants.
    """

    slots: tuple[int, ...]
    choices: tuple[TokenChoice | None, ...]
    slot_index: Tensor
    parameters: dict[str, Tensor] | None
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
        parameters = None
        if not all(choice.is_greedy for choice in chosen):
            parameters = self._parameters(choices)
        reported = tuple(
            row for row, choice in enumerate(choices) if choice is not None and choice.wants_logits
        )
        return _Rows(slots, choices, slot_index, parameters, reported)

    def _parameters(self, choices: Sequence[TokenChoice | None]) -> dict[str, Tensor]:
        """Return the fields of the sample kernel; a row without a choice is greedy.

        Filters and penalties that no row has are left out, and cost nothing.
        """
        neutral = SamplingParams()
        params = [neutral if choice is None else choice.params for choice in choices]
        heat = [
            min(max(p.temperature, _SMALLEST), _LARGEST) if p.temperature else 0 for p in params
        ]
        fields: dict[str, tuple[Sequence[float], type[Any]]] = {
            "temperature": (heat, np.float32),
            "seed": ([0 if choice is None else choice.seed for choice in choices], np.int64),
        }
        vocabulary = self._network.config.vocab_size
        if any(p.top_k for p in params):
            fields["top_k"] = ([min(p.top_k, vocabulary) for p in params], np.int32)
        if any(p.top_p < 1 for p in params):
            fields["top_p"] = ([p.top_p for p in params], np.float32)
        if any(p.min_p for p in params):
            fields["min_p"] = ([p.min_p for p in params], np.float32)
        if any(p.repetition_penalty != 1 for p in params):
            fields["penalty"] = ([p.repetition_penalty for p in params], np.float32)
        return {name: uploaded(one, self._device, kind) for name, (one, kind) in fields.items()}

    def _mark_history(self, rows: _Rows) -> None:
        """Remember which ids penalized rows have seen before their first token."""
        for slot, choice in zip(rows.slots, rows.choices, strict=True):
            if choice is None or choice.params.repetition_penalty == 1:
                continue
            words = -(-self._network.config.vocab_size // _WORD)
            if self._seen is None:
                shape = (self._slots, words)
                self._seen = torch.zeros(shape, dtype=torch.int32, device=self._device)
            bits = np.zeros(words * _WORD, dtype=np.bool_)
            bits[choice.seen] = True
            packed = np.packbits(bits, bitorder="little").view("<i4")
            self._seen[slot].copy_(uploaded(packed, self._device, np.int32))

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
            parameters = rows.parameters | {"position": position}
            if self._seen is not None and "penalty" in parameters:
                parameters |= {"seen": self._seen, "seen_slot": rows.slot_index}
            self._network.choose(logits, tokens, **parameters)
        self._last.index_copy_(0, rows.slot_index, tokens)
        reported = {row: sent(logits[row]) for row in rows.reported}
        ids, values = sent(tokens), sent(largest)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))
        return DeviceTokens(ids, values, reported, arrived)
