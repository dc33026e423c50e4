"""Sources: what they load, and what they refuse. Files are written byte by byte or by other libraries."""

from __future__ import annotations

import gzip
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from atoll.core.errors import DataError
from atoll.data.idx import read_idx
from atoll.data.source import fitted
from atoll.data.sources.digits import Digits
from atoll.data.sources.fashion_mnist import FashionMnist
from atoll.data.sources.hugging_face import HuggingFace
from atoll.data.sources.idx import Idx
from atoll.data.sources.image_folder import ImageFolder
from atoll.data.sources.sklearn_table import SklearnTable
from atoll.data.sources.table import Table
from atoll.data.sources.text_files import TextFiles

# --------------------------------------------------------------------------------------------------- IDX


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
LABELS = np.array([0, 2, 1, 2], dtype=np.uint8)


@pytest.fixture
def idx_files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "images").write_bytes(idx_bytes(IMAGES))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx_bytes(LABELS)))
    return str(tmp_path / "images"), str(tmp_path / "labels.gz")


def test_idx_pair_is_read_as_written(idx_files: tuple[str, str]) -> None:
    train = Idx(*idx_files).load().train
    assert np.array_equal(train.column("x").numpy()[:, 0], IMAGES)
    assert train.column("x").dtype == torch.uint8
    assert train.column("y").tolist() == [0, 2, 1, 2]
    assert (train.info.shape, train.info.num_classes) == ((1, 2, 3), 3)
    ready = train.ready()["x"]
    assert abs(float(ready.mean())) < 1e-5
    assert abs(float(ready.std(correction=0)) - 1) < 1e-4


def test_idx_numbers_are_big_endian(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx_bytes(np.array([1, -2, 70000], dtype=">i4"), 0x0C))
    assert read_idx(tmp_path / "a").tolist() == [1, -2, 70000]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (idx_bytes(IMAGES)[:-1], "truncated"),
        (idx_bytes(IMAGES) + b"x", "longer than its header says"),
        (idx_bytes(IMAGES)[:9], "ends within its header"),
        (b"\1" + idx_bytes(IMAGES)[1:], "not an IDX file: it starts with 01 00 08 03"),
        (b"\0\0\7\3" + idx_bytes(IMAGES)[4:], "not an IDX file"),
        (b"", "not an IDX file"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:-9], "damaged or truncated gzip"),
    ],
)
def test_idx_is_read_strictly(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(DataError, match=words):
        read_idx(tmp_path / "f")


def test_idx_pairs_must_fit(tmp_path: Path, idx_files: tuple[str, str]) -> None:
    (tmp_path / "short").write_bytes(idx_bytes(LABELS[:3]))
    with pytest.raises(DataError, match=r"4 images but .* 3 labels"):
        Idx(idx_files[0], str(tmp_path / "short")).load()
    with pytest.raises(DataError, match="labels are integers"):
        Idx(idx_files[0], idx_files[0]).load()
    with pytest.raises(DataError, match="labels from 0 to 2; expected 0 to 1"):
        Idx(*idx_files, class_names=("a", "b")).load()


def test_fashion_mnist_is_found_by_path_and_its_absence_explained(tmp_path: Path) -> None:
    for part, name in (("images", "images-idx3"), ("labels", "labels-idx1")):
        array = np.zeros((10, 28, 28), np.uint8) if part == "images" else np.arange(10, dtype=np.uint8)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(idx_bytes(array))
    loaded = FashionMnist(str(tmp_path)).load()
    assert loaded.test is not None
    assert (len(loaded.train), len(loaded.test)) == (10, 10)
    assert loaded.train.info.class_names[9] == "Ankle boot"
    assert float(loaded.train.ready()["x"][0, 0, 0, 0]) == pytest.approx(-0.2860 / 0.3530)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        FashionMnist(str(tmp_path)).load()


# -------------------------------------------------------------------------------------------- bundled


def test_digits_are_bytes_with_unit_variance() -> None:
    train = Digits().load().train
    assert train.column("x").dtype == torch.uint8
    x = train.ready()["x"]
    assert x.shape == (1797, 1, 8, 8)
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "iris", "wine"])
def test_bundled_tables_are_standardised(name: str) -> None:
    train = SklearnTable(name).load().train  # type: ignore[arg-type]
    batch = train.ready()
    np.testing.assert_allclose(batch["x"].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(batch["x"].std(0, correction=0), 1, atol=1e-4)
    assert batch["y"].dtype == (torch.float32 if name == "diabetes" else torch.int64)
    if name == "diabetes":
        assert train.info.num_classes is None
        assert train.info.target_mean == pytest.approx(float(batch["y"].mean()), rel=1e-5)
        assert train.info.target_scale == pytest.approx(float(batch["y"].std(correction=0)), rel=1e-5)


def test_unknown_bundled_table_gets_a_suggestion() -> None:
    with pytest.raises(DataError, match="Did you mean `wine`"):
        SklearnTable("wines").load()  # type: ignore[arg-type]


def test_constant_and_far_off_features_are_standardised() -> None:
    x = torch.tensor([[5.0, 16_000_000.0], [5.0, 16_000_002.0], [5.0, 16_000_004.0]])
    data = SklearnTable("iris").load().train.about(SklearnTable("iris").load().train.info)
    data = type(data)({"x": x, "y": torch.tensor([0, 1, 0])}, data.info)
    info = fitted(data.info, [data.select([0, 1]), data.select([2])])
    assert isinstance(info.scale, torch.Tensor)
    assert info.scale.tolist() == pytest.approx([1.0, (8 / 3) ** 0.5])


# --------------------------------------------------------------------------------------------- tables

ROWS = [
    {"age": 30, "mass": 60.5, "town": "Oslo", "outcome": "well"},
    {"age": 41, "mass": None, "town": "Lyon", "outcome": "ill"},
    {"age": 52, "mass": 80.0, "town": "Lyon", "outcome": "ill"},
    {"age": 28, "mass": 71.5, "town": "Oslo", "outcome": "well"},
]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    if path.suffix == ".csv":
        lines = [",".join(rows[0])]
        lines += [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_is_the_same_in_every_format(tmp_path: Path, suffix: str) -> None:
    train = Table(write(tmp_path / f"t{suffix}", ROWS), target="outcome", site="town").load().train
    assert train.info.feature_names == ("age", "mass")
    assert train.column("x").tolist() == [[30, 60.5], [52, 80], [28, 71.5]]
    assert train.info.class_names == ("ill", "well")
    assert train.column("y").tolist() == [1, 0, 1]
    assert train.info.names == {"site": ("Lyon", "Oslo")}
    assert train.column("site").tolist() == [1, 0, 1]
    assert train.info.skipped == {"missing value": 1}
    np.testing.assert_allclose(train.ready()["x"].mean(0), 0, atol=1e-6)


def test_regression_and_one_hot(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ROWS)
    data = Table(path, target="age", features=("town",), task="regression", categorical="one_hot").load().train
    assert data.info.feature_names == ("town=Lyon", "town=Oslo")
    assert data.column("x").tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert data.column("y").dtype == torch.float32
    assert data.column("y").tolist() == [30, 41, 52, 28]
    assert data.info.num_classes is None


def test_a_test_file_is_read_with_the_training_schema(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ROWS)
    other = [{"outcome": "ill", "mass": 100, "age": 90, "town": "Bonn"}]
    loaded = Table(path, target="outcome", site="town", test_path=write(tmp_path / "u.csv", other)).load()
    assert loaded.test is not None
    assert loaded.test.column("x").tolist() == [[90, 100]]
    assert loaded.test.column("y").tolist() == [0]
    assert loaded.test.info.names["site"][int(loaded.test.column("site"))] == "Bonn"
    mean = loaded.train.column("x").mean(0)
    np.testing.assert_allclose(loaded.test.info.mean, mean)  # not moved by the test row
    strange = write(tmp_path / "v.csv", [{**other[0], "outcome": "dead"}])
    with pytest.raises(DataError, match="'dead', which the training rows do not have"):
        Table(path, target="outcome", test_path=strange).load()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "outcom"}, "no column `outcom`. Did you mean `outcome`"),
        ({"target": "outcome", "site": "city"}, "no column `city`"),
        ({"target": "outcome", "features": ("ages",)}, "no column `ages`. Did you mean `age`"),
        (
            {"target": "outcome", "features": ("town",)},
            "Column `town` of `t` holds text \\('Oslo' in row 1\\)",
        ),
        (
            {"target": "town", "task": "regression"},
            "Column `town` of t.csv should hold numbers but has 'Oslo'",
        ),
        ({"target": "outcome", "missing": "refuse"}, "Column `mass` of t.csv has no value in row 2"),
        ({"target": "age", "features": ("age",)}, "cannot be a feature too"),
    ],
)
def test_bad_columns_are_refused(tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Table(write(tmp_path / "t.csv", ROWS), **options).load()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "a,y\n1,2\n3\n", "Line 3 of .* has 1 cells; the header has 2"),
        ("t.csv", "a,a\n1,2\n", "more than one column named 'a'"),
        ("t.csv", "a,y\n", "holds no rows"),
        ("t.csv", "a,y\n" + "".join(f"{i},{i}.5\n" for i in range(20)), "task: regression"),
        ("t.jsonl", '{"a": 1, "y": 0}\n{"a": 1,\n', "Line 2 of .* is not JSON"),
        ("t.jsonl", "[1]\n", "Line 1 of .* is not a JSON object"),
        ("t.parquet", "no", "is not a Parquet file"),
        ("t.xls", "no", "suffix that is not known"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        Table(str(tmp_path / name), target="y").load()


# --------------------------------------------------------------------------------------------- images


def png(colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "png")
    return out.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 51, 0))):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(png(colour))
    return tmp_path


def test_image_folder(pictures: Path) -> None:
    (pictures / "dog" / "notes.txt").write_text("not a picture")
    train = ImageFolder(str(pictures)).load().train
    assert train.info.class_names == ("cat", "dog")
    assert train.column("x").shape == (6, 3, 4, 6)  # channels, height, width
    assert train.column("x").dtype == torch.uint8
    assert train.column("x")[3, :, 0, 0].tolist() == [0, 51, 0]
    assert train.column("y").tolist() == [0, 0, 0, 1, 1, 1]
    grey = ImageFolder(str(pictures), size=(2, 2), grayscale=True).load().train
    assert grey.column("x").shape == (6, 1, 2, 2)


def test_corrupt_images_are_counted(pictures: Path) -> None:
    whole = png((9, 9, 9), (40, 40))
    (pictures / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "dog" / "text.jpg").write_text("hello")
    (pictures / "dog" / "empty.png").write_bytes(b"")
    train = ImageFolder(str(pictures)).load().train
    assert len(train) == 6
    assert train.info.skipped == {"unreadable image": 3}
    for f in pictures.rglob("*.png"):
        f.write_bytes(b"")
    with pytest.raises(DataError, match="no picture that can be read"):
        ImageFolder(str(pictures)).load()


def test_image_folder_refusals(pictures: Path) -> None:
    (pictures / "dog" / "large.png").write_bytes(png((0, 0, 0), (9, 9)))
    with pytest.raises(DataError, match=r"differ in size .* set `size"):
        ImageFolder(str(pictures)).load()
    with pytest.raises(DataError, match="There is no folder"):
        ImageFolder(str(pictures / "nothing")).load()
    with pytest.raises(DataError, match="no class folders"):
        ImageFolder(str(pictures / "cat")).load()


# ------------------------------------------------------------------------------------------------ text


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_bytes("Ein süßer Text. ".encode() * 4)
    (tmp_path / "a" / "two.txt").write_bytes(b"abcdefg")
    (tmp_path / "b.txt").write_bytes(b"0123456789")
    return tmp_path


def test_byte_windows_by_file(texts: Path) -> None:
    loaded = TextFiles(str(texts), length=4).load()
    train = loaded.train
    assert train.info.names["site"] == ("a/one.txt", "a/two.txt", "b.txt")
    last = train.column("x")[train.column("site") == 2]
    assert bytes(last.flatten().tolist()) == b"01234567"
    assert (train.info.num_classes, train.info.shape, train.info.kind) == (256, (4,), "text")
    assert train.ready()["x"].dtype == torch.int64
    assert "y" not in train.columns
    by_folder = TextFiles(str(texts), length=4, site="folder").load().train
    assert by_folder.info.names["site"] == ("a", "b.txt")
    whole = TextFiles(str(texts / "b.txt"), length=5, site="none").load().train
    assert whole.column("x").tolist() == [list(b"01234"), list(b"56789")]
    assert set(whole.columns) == {"x"}


def test_bpe_windows_decode_to_the_text(texts: Path) -> None:
    loaded = TextFiles(str(texts / "a" / "one.txt"), length=2, tokenizer="bpe", vocab_size=280).load()
    assert loaded.tokenizer is not None
    assert 256 < loaded.tokenizer.size <= 280
    assert loaded.train.column("x").dtype == torch.int32
    text = loaded.tokenizer.decode(loaded.train.column("x").flatten().tolist()).decode()
    assert ("Ein süßer Text. " * 4).startswith(text)
    assert len(text) > 40


def test_text_refusals(texts: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        TextFiles(str(texts / "c")).load()
    with pytest.raises(DataError, match=r"no file that matches \*\.md"):
        TextFiles(str(texts), pattern="*.md").load()
    with pytest.raises(DataError, match=r"no usable row \(left out: 3 file shorter than a window\)"):
        TextFiles(str(texts), length=1000).load()
    with pytest.raises(DataError, match="no tokenizer at"):
        TextFiles(str(texts), tokenizer="elsewhere.json").load()


# ---------------------------------------------------------------------------------------- Hugging Face


def saved(tmp_path: Path, columns: dict[str, list[object]], classes: dict[str, list[str]] = {}) -> str:  # noqa: B006
    import datasets

    data = datasets.Dataset.from_dict(columns)
    for column, names in classes.items():
        data = data.cast_column(column, datasets.ClassLabel(names=names))
    data.save_to_disk(str(tmp_path / "hf"))
    return str(tmp_path / "hf")


def test_hugging_face_images(tmp_path: Path) -> None:
    import datasets

    raw = {
        "picture": [{"bytes": png((i, 0, 0)), "path": None} for i in range(3)],
        "label": [1, 0, 1],
        "who": ["b", "a", "b"],
    }
    data = datasets.Dataset.from_dict(raw).cast_column("picture", datasets.Image())
    data = data.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "hf"))
    loaded = HuggingFace(str(tmp_path / "hf"), site="who").load()
    assert loaded.test is not None
    assert len(loaded.test) == 3
    assert loaded.train.column("x")[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert loaded.train.info.shape == (3, 4, 6)
    assert loaded.train.info.class_names == ("no", "yes")
    assert loaded.train.column("y").tolist() == [1, 0, 1]
    assert loaded.train.column("site").tolist() == [1, 0, 1]


def test_hugging_face_text_with_and_without_target(tmp_path: Path) -> None:
    path = saved(tmp_path, {"text": ["abcd", "ef", "gh"], "label": [1, 0, 1]}, {"label": ["x", "y"]})
    plain = HuggingFace(path, target=None, length=4).load().train
    assert [bytes(row.tolist()) for row in plain.column("x")] == [b"abcd", b"efgh"]
    labelled = HuggingFace(path, length=3).load().train
    assert [bytes(row.tolist()) for row in labelled.column("x")] == [b"abc", b"ef\0", b"gh\0"]
    assert labelled.column("y").tolist() == [1, 0, 1]
    assert labelled.info.class_names == ("x", "y")


def test_hugging_face_table(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": [1.0, 2.0, 3.0], "b": [0, 5, 0], "label": [10, 20, 10]})
    train = HuggingFace(path).load().train
    assert train.info.feature_names == ("a", "b")
    assert train.column("x").tolist() == [[1, 0], [2, 5], [3, 0]]
    assert train.info.class_names == ("10", "20")
    with pytest.raises(DataError, match=r"no column `labels`\. Did you mean `label`"):
        HuggingFace(path, target="labels").load()


def test_hugging_face_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(DataError, match=r"`nobody/nothing` could not be loaded .*no route to host.*save_to_disk"):
        HuggingFace("nobody/nothing").load()
