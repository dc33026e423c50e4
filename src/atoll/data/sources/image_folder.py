"""Pictures in folders, one folder a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from atoll.core.errors import DataError
from atoll.core.progress import progress
from atoll.data.columns import ordered
from atoll.data.dataset import Dataset, Info
from atoll.data.images import open_pixels, stack
from atoll.data.source import Loaded, Source, standardised, stored

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


@dataclass(frozen=True)
class ImageFolder(Source):
    """``path/<class>/<anything>.png``; or ``path/train/<class>/...`` and ``path/test/<class>/...``.

    Pictures are kept as bytes and normalised by mean and deviation of each channel. A picture that cannot be
    read is left out and counted.

    Args:
        path: the folder.
        size: (height, width) to scale and centre-cut to; needed when pictures differ in size.
        grayscale: one channel instead of three.
    """

    path: str
    size: tuple[int, int] | None = None
    grayscale: bool = False

    def load(self) -> Loaded:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataError(f"There is no folder {root}.")
        split = (root / "train").is_dir() and (root / "test").is_dir()
        classes = _folders(root / "train" if split else root)
        if not classes:
            raise DataError(f"{root} holds no class folders; expected one folder of pictures per class.")
        train = self._read(root / "train" if split else root, classes, root.name)
        test = self._read(root / "test", classes, root.name) if split else None
        if test is not None and test.info.shape != train.info.shape:
            raise DataError(f"Test pictures of {root} differ in size from training pictures; set `size`.")
        return standardised(train, test)

    def _read(self, root: Path, classes: tuple[str, ...], name: str) -> Dataset:
        unknown = set(_folders(root)) - set(classes)
        if unknown:
            raise DataError(f"{root} holds class `{min(unknown)}`, which the training pictures do not have.")
        files = [
            (f, y)
            for y, folder in enumerate(classes)
            for f in sorted((root / folder).rglob("*"))
            if f.suffix.lower() in SUFFIXES and f.is_file()
        ]
        images, labels = [], []
        with progress(len(files), f"reading {root.name}") as bar:
            for done, (file, y) in enumerate(files, 1):
                image = open_pixels(file, self.size, self.grayscale)
                if image is not None:
                    images.append(image)
                    labels.append(y)
                bar.update(done)
        lost = len(files) - len(images)
        if not images:
            raise DataError(f"{root} holds no picture that can be read ({lost:,} damaged files).")
        x = stack(images, str(root))
        info = Info(
            name=name, kind="image", shape=tuple(x.shape[1:]), num_classes=len(classes), class_names=classes,
            unit=1 / 255, skipped={"unreadable image": lost} if lost else {},
        )  # fmt: skip
        return stored(name, {"x": x, "y": torch.tensor(labels)}, info)


def _folders(root: Path) -> tuple[str, ...]:
    return ordered(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
