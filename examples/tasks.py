"""The data of the examples: scikit-learn's digits, as images or as nodes, and the text of Python's own reference.

Which batch a training step gets is a function of its number alone, so a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from revcore.demo.backend import require
from revcore.demo.config import Config
from revcore.demo.text import Corpus, standard_text

TaskName = Literal["digits", "text"]
Batch = tuple[np.ndarray, np.ndarray]  # inputs, integer targets

VOCABULARY = 256  # of the text: a token is a byte
CONTEXT = 64


@dataclass(frozen=True)
class Task:
    """What is trained on, and how a model's logits (…, classes) are judged against integer targets (…).

    Attributes:
        name: which task it is.
        batch: gives the inputs and targets of training step ``i``.
        held_out: batches that are never trained on.
        score: of logits and targets, NumPy arrays.
        unit: what the score is called.
        baseline: the score of knowing nothing but how often each target occurs.
        rate: a learning rate that does, for AdamW.
    """

    name: TaskName | Literal["nodes"]
    batch: Callable[[int], Batch]
    held_out: tuple[Batch, ...]
    score: Callable[[np.ndarray, np.ndarray], float]
    unit: str
    baseline: float
    rate: float


def make_task(name: TaskName, seed: int) -> Task:
    """Return a task; ``seed`` is that of the batches, the held-out data are always the same."""
    return digits(seed) if name == "digits" else text(seed)


def digits(seed: int, size: int = 64, channel_axis: int = -1) -> Task:
    """Images of handwritten digits, pixels in 0…1; 360 of the 1,797 are held out.

    They are (batch, 8, 8, 1), as Flax has them; with ``channel_axis=1`` (batch, 1, 8, 8), as PyTorch has them.
    """
    require("sklearn", "dev", "the digits")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.expand_dims(pixels.reshape(-1, 8, 8) / 16, channel_axis).astype(np.float32)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]

    def batch(step: int) -> Batch:
        epoch, i = divmod(step, len(train) // size)
        shuffled = np.random.default_rng([seed, epoch]).permutation(train)[i * size : (i + 1) * size]
        return images[shuffled], labels[shuffled]

    def accuracy(logits: np.ndarray, targets: np.ndarray) -> float:
        return float((logits.argmax(-1) == targets).mean())

    most_common = np.bincount(labels[train]).argmax()
    baseline = float((labels[test] == most_common).mean())
    return Task("digits", batch, ((images[test], labels[test]),), accuracy, "accuracy", baseline, rate=3e-3)


def nodes(seed: int, labelled: int = 180) -> Task:
    """All 1,797 digits at once, (1797, 64), of which few are labelled: nodes of a graph that a model makes of them.

    A target of −100 does not count: in training those not labelled, which are held out, and the labelled afterwards.
    Every step has the same batch, whatever the ``seed``.
    """
    require("sklearn", "dev", "the digits")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    features, labels = (pixels / 16).astype(np.float32), labels.astype(np.int32)
    known = np.isin(np.arange(len(labels)), np.random.default_rng(0).permutation(len(labels))[:labelled])
    given, hidden = np.where(known, labels, -100), np.where(known, -100, labels)

    def accuracy(logits: np.ndarray, targets: np.ndarray) -> float:
        counts = targets >= 0
        return float((logits.argmax(-1) == targets)[counts].mean())

    baseline = float((labels[~known] == np.bincount(labels[known]).argmax()).mean())
    return Task("nodes", lambda i: (features, given), ((features, hidden),), accuracy, "accuracy", baseline, rate=3e-3)


def text(seed: int, context: int = CONTEXT, size: int = 16) -> Task:
    """Bytes of English, (batch, context), and the byte that follows each; a tenth of the text is held out."""
    corpus = Corpus(standard_text(), Config(seed=seed, context=context, batch=size))

    def parted(tokens: np.ndarray) -> Batch:
        return tokens[:, :-1], tokens[:, 1:]

    def nats(logits: np.ndarray, targets: np.ndarray) -> float:
        logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -float(np.take_along_axis(log_probs, targets[..., None], -1).mean())

    frequencies = np.bincount(np.frombuffer(standard_text(), np.uint8)) / len(standard_text())
    entropy = -float(sum(p * np.log(p) for p in frequencies if p))
    held_out = tuple(map(parted, corpus.held_out()))
    return Task("text", lambda i: parted(corpus.batch(i)), held_out, nats, "nats a byte", entropy, rate=3e-3)
