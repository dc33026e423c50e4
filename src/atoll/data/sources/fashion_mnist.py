"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, arXiv 1708.07747)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atoll.core.errors import DataError
from atoll.core.files import user_cache
from atoll.data.dataset import Info
from atoll.data.idx import labelled, read_pair
from atoll.data.source import Loaded, Source

CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class FashionMnist(Source):
    """60,000 training and 10,000 test images of clothes, 28 x 28 grey bytes, 10 classes.

    Args:
        path: folder with the four IDX files (``.gz`` or not). Default: the places where the Debian package,
            the user's cache and torchvision put them.
    """

    path: str | None = None

    def load(self) -> Loaded:
        info = Info(
            name="fashion_mnist", kind="image", shape=(1, 28, 28), num_classes=10, class_names=CLASSES,
            mean=0.2860, scale=0.3530, unit=1 / 255,
        )  # fmt: skip
        files = self._files()
        x, y = read_pair(files[0], files[1])
        test_x, test_y = read_pair(files[2], files[3])
        return Loaded(train=labelled(x, y, info, files[1]), test=labelled(test_x, test_y, info, files[3]))

    def _files(self) -> list[Path]:
        folders = [Path(self.path).expanduser()] if self.path else list(_usual_places())
        for folder in folders:
            found = [f for name in FILES for f in (folder / name, folder / f"{name}.gz") if f.is_file()]
            if len({f.name.removesuffix(".gz") for f in found}) == len(FILES):
                return [next(f for f in found if f.name.removesuffix(".gz") == name) for name in FILES]
        where = f"in {self.path}" if self.path else "on this machine"
        raise DataError(
            f"Fashion-MNIST was not found {where}. Install the Debian package `dataset-fashion-mnist`, or "
            f"download {FILES[0]}.gz and its three siblings from github.com/zalandoresearch/fashion-mnist "
            "and give their folder as `path`."
        )


def _usual_places() -> Iterator[Path]:
    cache = user_cache()
    yield Path("/usr/share/datasets/fashion-mnist")
    for name in ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"):
        yield from (cache / name, cache.parent / name, Path("data") / name)
