"""Labels from a bottom model: an attack by the party of a vertical federation that has features and no labels.

Fu et al., "Label Inference Attacks Against Vertical Federated Learning", USENIX Security 2022: the party completes its
own trained bottom model with a head, fitted to the few labels that it knows from elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def infer_labels(
    known: Tensor, labels: Tensor, wanted: Tensor, classes: int, generator: torch.Generator, steps: int = 300
) -> Tensor:
    """Guessed classes ``[N]``.

    Args:
        known: outputs of the bottom model for rows whose label the attacker knows, ``[K, D]``.
        labels: of these, ``[K]``.
        wanted: outputs for the rows to be guessed, ``[N, D]``.
    """
    with torch.no_grad():
        mean, scale = known.mean(0), known.std(0).clamp(min=1e-6)
        a, b = (known - mean) / scale, (wanted - mean) / scale
    head = nn.Linear(a.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    optimiser = torch.optim.Adam(head.parameters(), lr=0.05, weight_decay=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(head(a), labels).backward()
        optimiser.step()
    out: Tensor = head(b).argmax(1)
    return out
