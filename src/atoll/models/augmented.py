"""A classifier with what makes further features for its head: a generator, and a transform into one site's own style.

Chen et al., "FRAug: Tackling Federated Learning with Non-IID Features via Representation Augmentation", ICCV 2023,
arXiv 2205.14900. Shapes: B rows, D the feature, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.models.features import linear_head


def generator(dim: int, classes: int) -> nn.Sequential:
    """Noise ``[B, D / 2]`` beside a class ``[B, C]`` -> feature ``[B, D]``, of any sign: the last layer is linear."""
    return nn.Sequential(
        nn.Linear(dim // 2 + classes, dim), nn.BatchNorm1d(dim), nn.ReLU(),
        nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(),
        nn.Linear(dim, dim),
    )  # fmt: skip


def transform(dim: int, classes: int) -> nn.Sequential:
    """A feature ``[B, D]`` beside a class ``[B, C]`` -> what to add to a site's mean of that class ``[B, D]``."""
    return nn.Sequential(
        nn.Linear(dim + classes, max(1, dim // 2)), nn.BatchNorm1d(max(1, dim // 2)), nn.ReLU(),
        nn.Linear(max(1, dim // 2), dim), nn.BatchNorm1d(dim),
    )  # fmt: skip


class AugmentedNet(nn.Module):
    """Predicts what ``body`` predicts; the rest is there to train it.

    Raises:
        RecipeError: for a model without a linear head.
    """

    means: Tensor
    """Running mean of the site's features of each class, ``[C, D]``."""
    met: Tensor
    """1 for classes that the site has met, ``[C]``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.head_name, head = linear_head(body, "fraug")
        self.dim, self.classes = head.in_features, head.out_features
        self.body = body
        self.generator = generator(self.dim, self.classes)
        self.transform = transform(self.dim, self.classes)
        self.register_buffer("means", torch.zeros(self.classes, self.dim))
        self.register_buffer("met", torch.zeros(self.classes, dtype=torch.int64))

    def head(self) -> nn.Linear:
        head = self.body.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.body(*inputs)
        return out

    def common(self, y_B: Tensor, noise: torch.Generator) -> Tensor:
        """Features ``[B, D]`` of these classes that are nobody's in particular; the noise is uniform on (0, 1)."""
        z = torch.rand(len(y_B), self.dim // 2, generator=noise).to(self.means)
        out: Tensor = self.generator(torch.cat([z, self._one_hot(y_B)], 1))
        return out

    def own(self, common_BD: Tensor, y_B: Tensor) -> Tensor:
        """The same as this site would see them: its mean of the class, or what came in for a class that it has not
        met, plus a residual."""
        base = torch.where(self.met[y_B, None] > 0, self.means[y_B], common_BD)
        out: Tensor = base + self.transform(torch.cat([common_BD, self._one_hot(y_B)], 1))
        return out

    @torch.no_grad()
    def meet(self, feature_BD: Tensor, y_B: Tensor, momentum: float) -> None:
        """Move each class's mean by ``momentum`` towards that of the batch; a class's first batch sets it."""
        hot_BC = self._one_hot(y_B)
        count_C = hot_BC.sum(0)
        mean_CD = hot_BC.T @ feature_BD / count_C.clamp(min=1)[:, None]
        step_C = torch.where(self.met > 0, momentum, 1.0) * (count_C > 0)
        self.means += step_C[:, None] * (mean_CD - self.means)
        self.met |= (count_C > 0).long()

    def _one_hot(self, y_B: Tensor) -> Tensor:
        return F.one_hot(y_B, self.classes).to(self.means)
