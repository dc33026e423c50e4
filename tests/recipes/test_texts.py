"""A checkpoint that is told texts, and the answers of its encoder, become a student in the library's own format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from atoll.cli import app
from atoll.core.errors import AtollError, DataError
from atoll.diffusion.diffusers_model import from_diffusers, load_denoiser
from atoll.diffusion.student import load_student
from atoll.models.diffusers_net import DiffusersNet
from atoll.recipes.texts import read_texts

diffusers = pytest.importorskip("diffusers")
SMALL = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "patch_size": 2, "num_layers": 1, "attention_head_dim": 8,
    "num_attention_heads": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "pixart": (
        "PixArtTransformer2DModel", {**SMALL, "cross_attention_dim": 16, "caption_channels": 12},
        diffusers.DDPMScheduler,
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {**SMALL, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 20,
         "pos_embed_max_size": 16},
        diffusers.FlowMatchEulerDiscreteScheduler,
    ),
}  # fmt: skip


def checkpoint(name: str, folder: Path) -> Path:
    kind, config, scheduler = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from_diffusers(getattr(diffusers, kind)(**config), scheduler()).net.save_pretrained(folder)
    return folder


def parts(name: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    out = {"tokens": torch.randn(6, 5, 12, generator=g), "null_tokens": torch.zeros(1, 5, 12)}
    if name == "sd3":
        out |= {"pooled": torch.randn(6, 20, generator=g), "null_pooled": torch.zeros(1, 20)}
    else:
        out |= {"mask": torch.ones(6, 5), "null_mask": torch.ones(1, 5)}
    return out


def recipe(tmp_path: Path, name: str, **fields: Any) -> Path:
    save_file(parts(name), tmp_path / "texts.safetensors")
    value = {
        "stage": "distil", "start": str(checkpoint(name, tmp_path / "teacher")), "steps": 2, "batch": 4,
        "texts": str(tmp_path / "texts.safetensors"), "method": {"name": "dmd", "guidance": {"scale": 3.0}},
        "samples": 20, "compare": [{"solver": "ddim", "steps": 2}], **fields,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(value))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lora", [None, 2])
def test_a_run_distils_it(name: str, lora: int | None, tmp_path: Path) -> None:
    path = recipe(tmp_path, name, **({"lora": lora} if lora else {}))
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    kind, _, _ = MODELS[name]
    model = tmp_path / "run" / "model"
    teacher = getattr(diffusers, kind).from_pretrained(tmp_path / "teacher" / "transformer")
    if lora:
        from peft import PeftModel

        found = PeftModel.from_pretrained(teacher, model)
        assert any("lora" in n and bool(p.abs().sum() > 0) for n, p in found.named_parameters() if "lora_B" in n)
    else:
        student = getattr(diffusers, kind).from_pretrained(model / "transformer")
        pairs = zip(student.parameters(), teacher.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)
    given = load_denoiser(tmp_path / "teacher")
    if lora:
        with pytest.raises(DataError, match="give the teacher"):
            load_student(model)
    drawn = load_student(model, given if lora else None)
    assert isinstance(given.net, DiffusersNet)
    rows = read_texts(tmp_path / "texts.safetensors", given.net).rows
    x = drawn.draw(rows)
    assert drawn.pixels(x).shape == (6, 8, 8, 3)
    assert torch.isfinite(x).all()
    if lora:
        assert "python/object" not in (model / "README.md").read_text()
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    again = CliRunner().invoke(app, ["resume", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before, "what is finished is not done twice"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "load_student" in page
    assert "nobody judges" in page
    assert page.count('class="grid"') + page.count("<figure") >= 2
    assert "dmd: 1 call" in result.output
    assert "nan" not in result.output


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    net = load_denoiser(checkpoint("sd3", tmp_path / "teacher")).net
    path = tmp_path / "texts.safetensors"
    good = parts("sd3")
    for wrong, words in [
        ({k: v for k, v in good.items() if k != "tokens"}, "no `tokens`"),
        ({**good, "prompt": torch.zeros(1)}, "has `prompt`"),
        ({**good, "tokens": good["tokens"][..., :7].contiguous()}, "numbers"),
        ({**good, "tokens": good["tokens"] * float("nan")}, "finite"),
        ({**good, "null_tokens": torch.zeros(1, 4, 12)}, "empty text"),
        ({k: v for k, v in good.items() if k != "pooled"}, "numbers"),
        ({**good, "pooled": good["pooled"][:3].contiguous()}, "fit each other"),
    ]:
        save_file(wrong, path)
        with pytest.raises(DataError, match=words):
            read_texts(path, net)
    path.write_bytes(b"rubbish")
    with pytest.raises(DataError, match="safetensors"):
        read_texts(path, net)
    with pytest.raises(DataError, match="safetensors"):
        read_texts(tmp_path / "nowhere", net)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [3, 9, 9]}, "3 x 9 x 9"),
        ({"method": "cd_ct"}, "real images"),
        ({"start": None}, "start"),
        ({"texts": None, "shape": [3, 8, 8]}, "`shape`"),
        ({"texts": None}, "`texts`"),
    ],
)
def test_a_wrong_recipe_gets_a_sentence(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, "sd3", **change)
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, AtollError)  # which `atoll` prints as a sentence
    assert words in str(result.exception)
