"""How good generated samples are: Frechet distance and its relatives on a small classifier's features.

Numbers compare models of one data set that were judged with one classifier; they are not the FID of an Inception
network.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.build import describe
from atoll.core.errors import DataError, MessageError
from atoll.core.files import user_cache, write_atomic
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode, seal, unseal
from atoll.core.progress import progress
from atoll.core.streams import stream
from atoll.core.tree import clone, copy_, named_tensors
from atoll.diffusion.distiller import Images
from atoll.models.model import seeded

EDITION = 1
"""Of the judge's training: another one gives other features, and so another name in the cache."""

Generate = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""``(z [B, ...], cond [B], generator) -> samples [B, ...]``."""


class Judge(nn.Module):
    """A small classifier of images ``[B, C, H, W]`` whose last hidden layer, ``[B, 64]``, is what distances are
    measured in."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 32) -> None:
        super().__init__()
        channels, height, wide = shape[0], shape[1], shape[2]
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        rest = math.ceil(height / 4) * math.ceil(wide / 4)
        self.dense = nn.Linear(2 * width * rest, 64)
        self.out = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.dense(h.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.features(x))
        return out


def make_judge(images: Images, epochs: int = 3, seed: int = 0) -> Judge:
    """A judge trained on real rows; kept in the user's cache under a hash of all that it depends on."""
    info = images.data.info
    if info.num_classes is None or len(info.shape) != 3:
        raise DataError(
            f"Samples are judged by a classifier of images; `{info.name}` has no classes or is no image set."
        )
    with seeded(seed, "judge"):
        judge = Judge(info.shape, info.num_classes)
    said = json.dumps([EDITION, describe_rows(images), epochs, seed], sort_keys=True)
    path = user_cache() / "judges" / f"{hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}.safetensors"
    try:
        copy_(named_tensors(judge), detach(unseal(decode(path.read_bytes(), NO_LIMITS))).parts["weights"])
        return judge.eval().requires_grad_(False)
    except FileNotFoundError:
        pass
    except MessageError:
        path.unlink(missing_ok=True)  # damaged: train again
    epochs = max(epochs, -(-600 * 128 // len(images)))  # at least 600 steps, on small sets too
    optimiser, order = torch.optim.Adam(judge.parameters(), lr=2e-3), stream(seed, "judge", "rows")
    with progress(epochs, "training the judge") as bar:
        for epoch in range(epochs):
            for rows in torch.randperm(len(images), generator=order).split(128):
                x, y = images.take(rows)
                optimiser.zero_grad()
                F.cross_entropy(judge(x), y).backward()
                optimiser.step()
            bar.update(epoch + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encode(seal(Message("judge", {"weights": clone(named_tensors(judge))}))))
    return judge.eval().requires_grad_(False)


def describe_rows(images: Images) -> list[Any]:
    """What tells one set of rows from another: its name, size, scale and a sum over some of them."""
    x, y = images.take(torch.arange(0, len(images), max(1, len(images) // 512)))
    info = images.data.info
    return [
        info.name,
        len(images),
        list(info.shape),
        describe(images.sigma_data),
        float(x.double().sum()),
        int(y.sum()),
    ]


@dataclass(frozen=True)
class Reference:
    """Real rows as the judge sees them, once for many comparisons.

    Attributes:
        judge: the classifier.
        mean, cov: of all features, float64.
        some: features of a few thousand rows, for distances between points.
        spread: mean variance of features within a class.
    """

    judge: Judge
    mean: Tensor
    cov: Tensor
    some: Tensor
    spread: float

    @classmethod
    def of(cls, images: Images, judge: Judge, most: int = 5000) -> Reference:
        features, labels = [], []
        for rows in torch.arange(len(images)).split(2000):
            x, y = images.take(rows)
            with torch.no_grad():
                features.append(judge.features(x).double())
            labels.append(y)
        f, y = torch.cat(features), torch.cat(labels)
        keep = torch.randperm(len(f), generator=stream(0, "reference"))[:most]
        return cls(judge, f.mean(0), f.T.cov(), f[keep], within_class_variance(f, y))


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2), float64 (Heusel et al., 2017, arXiv 1706.08500)."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID: the unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al., 2018, arXiv
    1801.01401)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    aa, bb = kernel(a, a), kernel(b, b)
    n, m = len(a), len(b)
    own = (aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
    return float(own - 2 * kernel(a, b).mean())


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of generated points within the k-nearest-neighbour balls of real ones, and the reverse (Kynkaanniemi et
    al., 2019, arXiv 1904.06991)."""

    def inside(points: Tensor, centres: Tensor) -> float:
        radius = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values
        return float((torch.cdist(points, centres) <= radius).any(1).float().mean())

    return inside(made, real), inside(real, made)


def within_class_variance(features: Tensor, labels: Tensor) -> float:
    """Variance of features within a class, averaged over classes and summed over features."""
    parts = [features[labels == c].var(0).sum() for c in labels.unique() if (labels == c).sum() > 1]
    return float(torch.stack(parts).mean()) if parts else 0.0


def evaluate_samples(reference: Reference, x: Tensor, cond: Tensor) -> dict[str, float]:
    """What a set of samples is worth.

    Returns:
        ``fid`` (lower is better), ``kid``, ``precision``, ``recall``, ``agreement`` (share that the judge takes for the
        class that was asked for) and ``diversity`` (variance within a class, as a share of the real rows').
    """
    x = torch.nan_to_num(x.detach().float().cpu(), 0.0, 1e3, -1e3).clamp(-1e3, 1e3)
    features, right = [], 0
    with torch.no_grad():
        for part, asked in zip(x.split(2000), cond.cpu().split(2000), strict=True):
            f = reference.judge.features(part)
            right += int((reference.judge.out(f).argmax(1) == asked).sum())
            features.append(f.double())
    f = torch.cat(features)
    most = min(len(f), len(reference.some))
    precision, recall = precision_recall(reference.some[:most], f[:most])
    return {
        "fid": frechet(reference.mean, reference.cov, f.mean(0), f.T.cov()),
        "kid": kernel_distance(reference.some[:most], f[:most]),
        "precision": precision, "recall": recall, "agreement": right / len(x),
        "diversity": within_class_variance(f, cond.cpu()) / max(reference.spread, 1e-12),
    }  # fmt: skip


def judge_generator(
    reference: Reference | None, generate: Generate, shape: tuple[int, ...], conditions: Tensor, *, samples: int = 5000,
    batch: int = 500, seed: int = 0, device: str = "cpu",
) -> tuple[dict[str, float], Tensor]:  # fmt: skip
    """Draw samples from fixed noise, conditions in turn, and measure them and the time they take.

    Returns:
        metrics of :func:`evaluate_samples` with ``cpu_seconds_per_1000`` (without a reference this alone), and the
        samples.
    """
    cond = conditions[torch.arange(samples) % len(conditions)]
    noise = stream(seed, "judge", "noise")
    number = stream(seed, "judge", "sampler").initial_seed()
    own = torch.Generator(device).manual_seed(number)
    made, used = [], 0.0
    for part in cond.split(batch):
        z = torch.randn(len(part), *shape, generator=noise).to(device)
        started = time.process_time()
        made.append(generate(z, part.to(device), own).cpu())
        used += time.process_time() - started
    x = torch.cat(made)
    found = evaluate_samples(reference, x, cond) if reference is not None else {}
    return {**found, "cpu_seconds_per_1000": 1000 * used / samples}, x


def as_pixels(x: Tensor, mean: Any, scale: Any, sigma_data: float) -> np.ndarray:
    """Samples as greys or colours from 0 to 255, uint8 ``[B, H, W, C]``."""
    raw = x.detach().cpu().float() / sigma_data * torch.as_tensor(scale) + torch.as_tensor(mean)
    pixels = (raw.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
