"""Labels' tokens as a trie, so that labels which begin alike share the work, and all are scored in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class LabelTrie:
    """The trie of C labels' token sequences.

    Its inner nodes (a prefix that some label goes on from) are the only tokens a model must read. An edge is a token that
    follows a node; a label's log-probability is the sum over the edges on its path.

    Attributes:
        tokens: int64 [N], the inner nodes' tokens, parents before children. The root (the prompt's end) is not among them.
        depths: int64 [N], 0 for a label's first token.
        ancestors: bool [N, N], [i, j] true where j is i or above it: whom a node may attend to.
        edge_nodes: int64 [E], the node an edge leaves, counted from 1; 0 is the root.
        edge_tokens: int64 [E].
        paths: bool [C, E], true where the edge is on the label's path.
    """

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        """Raises ValueError for a label without tokens, or two labels with the same ones."""
        nodes: dict[tuple[int, ...], int] = {(): 0}
        edges: dict[tuple[int, ...], int] = {}
        for tokens in labels:
            if not tokens:
                raise ValueError("a label has no tokens")
            for length in range(1, len(tokens) + 1):
                edges.setdefault(tuple(tokens[:length]), len(edges))
                if length < len(tokens):
                    nodes.setdefault(tuple(tokens[:length]), len(nodes))
        if len({tuple(tokens) for tokens in labels}) < len(labels):
            raise ValueError("two labels have the same tokens")
        inner = list(nodes)[1:]
        self.tokens: NDArray[np.int64] = np.array([prefix[-1] for prefix in inner], np.int64)
        self.depths: NDArray[np.int64] = np.array([len(prefix) - 1 for prefix in inner], np.int64)
        self.ancestors: NDArray[np.bool_] = np.zeros((len(inner), len(inner)), bool)
        for row, prefix in enumerate(inner):
            for length in range(1, len(prefix) + 1):
                self.ancestors[row, nodes[prefix[:length]] - 1] = True
        self.edge_nodes: NDArray[np.int64] = np.array([nodes[edge[:-1]] for edge in edges], np.int64)
        self.edge_tokens: NDArray[np.int64] = np.array([edge[-1] for edge in edges], np.int64)
        self.paths: NDArray[np.bool_] = np.zeros((len(labels), len(edges)), bool)
        for row, tokens in enumerate(labels):
            for length in range(1, len(tokens) + 1):
                self.paths[row, edges[tuple(tokens[:length])]] = True
