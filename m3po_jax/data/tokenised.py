"""Prompts that carry their token ids: each is tokenised once, however many systems, epochs and stages ask for it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from m3po_jax.data.schema import Prompt, PromptTokens
from m3po_jax.data.spool import Spool

_HASH_BYTES = 16  # of `PromptTokens.made_from`


class Prompts(Protocol):
    """Prompts that are read one by one: a sequence, or a `sources.PromptSource`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Prompt: ...


class TokenisedPrompts(Sequence[Prompt]):
    """Prompts with their `tokens`, which are made when a prompt is first asked for and lie on disk from then on.

    Args:
        prompts: Read whenever one is asked for.
        tokenise: `models.processor.Processor.tokenise`; gives ids that a prompt brings along back as they are.
    """

    def __init__(self, prompts: Prompts, tokenise: Callable[[Prompt], PromptTokens]):
        self.prompts, self.tokenise = prompts, tokenise
        self._places = np.full((len(prompts), 2), -1, np.int64)  # in the spool; −1: not there
        self._spool: Spool | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        prompt = self.prompts[index]
        tokens = self._kept(index)
        if tokens is None:
            with self._lock:
                tokens = self._kept(index) or self.tokenise(prompt)
                if tokens is not prompt.tokens and self._places[index, 0] < 0:
                    self._keep(index, tokens)
        return dataclasses.replace(prompt, tokens=tokens)

    def _kept(self, index: int) -> PromptTokens | None:
        start, size = self._places[index].tolist()
        if start < 0:
            return None
        assert self._spool is not None
        data = self._spool.get((start, size))
        return PromptTokens(np.frombuffer(data[_HASH_BYTES:], np.int32), data[:_HASH_BYTES].decode().strip())

    def _keep(self, index: int, tokens: PromptTokens) -> None:
        self._spool = self._spool or Spool("the prompts' token ids")
        head = tokens.made_from.encode().ljust(_HASH_BYTES)
        self._places[index] = self._spool.add(head + tokens.ids.tobytes())
