"""A folder with a generator in it, when it is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atoll.core.errors import DataError
from atoll.core.files import write_json
from atoll.data.sources.digits import Digits
from atoll.diffusion.as_denoiser import AsDenoiser
from atoll.diffusion.methods.sim import SIM
from atoll.diffusion.student import NAME, describe_student, load_student
from atoll.diffusion.teacher import make_denoiser
from atoll.models.export import about_model, save_model
from atoll.models.unet import UNet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    info = Digits().load().train.info
    save_model(make_denoiser(UNet(width=8), info, 0), tmp_path, {})
    builder = about_model(UNet(width=8), info, 10, 0, AsDenoiser("edm", 0.5))
    write_json(tmp_path / NAME, describe_student(SIM(), info, 0.5, 10, builder))
    return tmp_path


def change(folder: Path, **facts: object) -> None:
    known = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**known, **facts}))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"shape": "wide"}, "damaged"),
        ({"shape": [1, 8, -8]}, "out of bounds"),
        ({"shape": [1, 8, 10**12]}, "out of bounds"),
        ({"conditions": 10**12}, "out of bounds"),
        ({"sigma_data": "half"}, "damaged"),
        ({"mean": {"a": 1}}, "damaged"),
        ({"method": {"name": "os:system"}}, "method"),
        ({"method": {"name": "sim", "lr": -1}}, "lr"),
        ({"teacher": None}, "give the checkpoint"),
    ],
)
def test_damaged_facts_get_a_sentence(folder: Path, facts: dict[str, object], words: str) -> None:
    change(folder, **facts)
    with pytest.raises(DataError, match=words):
        load_student(folder)


def test_a_folder_without_one_gets_a_sentence(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match="no generator"):
        load_student(tmp_path_factory.mktemp("empty"))
    (folder / NAME).write_text("[]")
    with pytest.raises(DataError, match="incomplete"):
        load_student(folder)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    info = Digits().load().train.info
    save_model(make_denoiser(UNet(width=12), info, 0), folder, {})
    with pytest.raises(DataError):
        load_student(folder)
