"""How a module is given a graph: by its parameter ``edges`` or ``edge_index``."""

from __future__ import annotations

import inspect

from torch import nn


def reads_edges(model: nn.Module) -> bool:
    """Whether ``model(x, edges)`` is how to call it: its ``forward`` names its second argument ``edges`` (int64
    ``[2, E]``, positions of both ends of each edge, in both directions), or ``edge_index`` as in PyTorch Geometric.
    Any other module sees the nodes one by one."""
    return next(iter([*inspect.signature(model.forward).parameters][1:]), "") in ("edges", "edge_index")
