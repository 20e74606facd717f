"""A deep graph network of grouped reversible layers, RevGNN, that learns from a tenth of the nodes.

python -m examples.revgnn

RevGNN (Li et al., arXiv 2106.07476): a node's features are parted into groups, and a layer updates one group after the
other, each from the one before (``revcore.grouped``). Here scikit-learn's digits are the nodes, each tied to its
nearest neighbours in pixel space; a tenth of them are labelled, and the labels of the others are held out.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import torch_training
from examples.tasks import Task, nodes
from examples.torch_training import Example
from revcore import grouped
from revcore_torch import ReversibleSequential

GROUPS = 2
NEIGHBOURS = 8


class GraphConv(nn.Module):
    """Each node's new features, of its own and of the mean of its neighbours': (nodes, width) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = nn.Linear(width, width)
        self.others = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        x = F.relu(self.norm(x)) * mask
        to, source = edges
        total = torch.zeros_like(x).index_add(0, to, x[source])
        degree = to.bincount(minlength=len(x)).unsqueeze(-1)
        return self.own(x) + self.others(total / degree)


class RevGNN(nn.Module):
    """Features (nodes, 64) → logits (nodes, 10), over ``edges``, (2, edges): to which node, and from which."""

    edges: Tensor

    def __init__(self, edges: Tensor, depth: int, width: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.register_buffer("edges", edges)
        self.dropout = nn.Dropout(dropout)
        self.stem = nn.Linear(64, width)
        blocks = [GraphConv(width // GROUPS) for _ in range(GROUPS * depth)]
        self.body = ReversibleSequential(*blocks, program=grouped(GROUPS, depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, features: Tensor) -> Tensor:
        x = self.stem(features)
        # Edges go to every block. So does a mask for dropout, one for each group and not for each layer, as in the
        # paper: it is kept once, and nothing is drawn in the second run.
        masks = self.dropout(torch.ones_like(x)).chunk(GROUPS, -1)
        each = [((), {"mask": masks[i % GROUPS]}) for i in range(len(self.body))]
        x = self.body(x, self.edges, layerwise_args_kwargs=each)
        return self.head(self.dropout(F.relu(self.norm(x))))


def neighbours(features: np.ndarray) -> np.ndarray:
    """Return the edges between each node and its nearest neighbours, both ways, (2, edges)."""
    from sklearn.neighbors import kneighbors_graph

    near = kneighbors_graph(features, NEIGHBOURS)
    return np.stack(near.maximum(near.T).nonzero()).astype(np.int64)


def make(task: Task, depth: int) -> nn.Module:
    features, _ = task.batch(0)
    return RevGNN(torch.from_numpy(neighbours(features)), depth)


def compare(model: nn.Module, task: Task) -> str:
    """Say how well two methods do that are no networks, with the same labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.semi_supervised import LabelSpreading

    (features, given), ((_, hidden),) = task.batch(0), task.held_out
    known = given >= 0
    regression = LogisticRegression(max_iter=1000).fit(features[known], given[known])
    spreading = LabelSpreading("knn", n_neighbors=NEIGHBOURS).fit(features, np.where(known, given, -1))
    right = [(found == hidden)[~known].mean() for found in (regression.predict(features), spreading.transduction_)]
    return f"Of the same labels: logistic regression {right[0]:.4f}, label spreading to neighbours {right[1]:.4f}."


example = Example(
    name="revgnn",
    paper="[RevGNN](https://arxiv.org/abs/2106.07476)",
    make=make,
    depth=14,
    counts=f"layers, each of {GROUPS} blocks",
    steps=100,
    task=nodes,
    epilogue=compare,
)
app = torch_training.app(example)

if __name__ == "__main__":
    torch_training.main(app)
