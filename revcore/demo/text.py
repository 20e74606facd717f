"""The text that every machine has: the English of Python's own reference, ``pydoc_data.topics``, as bytes."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from revcore.demo.config import Config
from revcore.errors import SpecError

_PIECES, _EVERY = 100, 10  # the text in a hundred pieces; every tenth is held out


class Corpus:
    """Batches of the text. Which one a step gets is a function of its number alone, so a resumed run goes on exactly.

    Args:
        text: bytes, of which a tenth is held out, in pieces from all over it.
        config: says how long and how many sequences are, and the seed that they are drawn with.

    Raises:
        SpecError: the text is too short.

    >>> corpus = Corpus(b"abcdefgh" * 100, Config(context=4, batch=2))
    >>> corpus.batch(7).shape, bool((corpus.batch(7) == corpus.batch(7)).all())
    ((2, 5), True)
    """

    def __init__(self, text: bytes, config: Config) -> None:
        pieces = np.array_split(np.frombuffer(text, np.uint8), _PIECES)
        self._config = config
        self._train = np.concatenate([piece for i, piece in enumerate(pieces) if (i + 1) % _EVERY])
        self._held_out = np.concatenate(pieces[_EVERY - 1 :: _EVERY])
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]
        longest = len(self._held_out) - 1
        if config.context > longest:
            raise SpecError(
                f"context came as {config.context}, but the held-out text has {longest + 1} bytes: write --context "
                f"{max(2, min(64, longest))}"
            )

    def batch(self, step: int) -> np.ndarray:
        """Return the sequences of training step ``step``, shape (batch, context + 1): inputs and, shifted, targets."""
        random = np.random.default_rng([self._config.seed, step])
        return self._windows(
            self._train, random.integers(0, len(self._train) - self._config.context, self._config.batch)
        )

    def held_out(self, batches: int = 4) -> list[np.ndarray]:
        """Return ``batches`` of sequences, spread over the text that is never trained on: the same at every call."""
        last = len(self._held_out) - self._config.context - 1
        starts = np.linspace(0, last, batches * self._config.batch).astype(np.int64)
        return [self._windows(self._held_out, part) for part in np.split(starts, batches)]

    def _windows(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return tokens[starts[:, None] + np.arange(self._config.context + 1)].astype(np.int32)


@lru_cache(maxsize=1)
def standard_text() -> bytes:
    """Return the text, some 460,000 bytes; it differs a little between versions of Python.

    >>> b"assert" in standard_text()
    True
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SpecError(
            "this Python lacks its own reference (pydoc_data.topics), which the demo trains on: install the standard "
            "library in full (Debian: apt install libpython3-stdlib)"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()
