"""Checkpoints of diffusers as denoisers: the same numbers as the library gives, there and back, LoRA too."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

from atoll.core.errors import AtollError, DataError
from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion.as_denoiser import AsDenoiser, usual_law
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.diffusers_model import adapted, from_diffusers, load_denoiser, save_denoiser, with_adapter
from atoll.diffusion.discrete_vp import UniformSteps
from atoll.diffusion.distiller import Conditions, Work
from atoll.diffusion.losses import training_loss
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.schedules import EDM, RF, LogitNormal, add_noise
from atoll.diffusion.teacher import make_denoiser
from atoll.diffusion.trainer import Trainer
from atoll.models.diffusers_net import FAMILIES
from atoll.models.dit import DiT
from atoll.models.export import about_model, save_model

with warnings.catch_warnings():  # of the library's imports
    warnings.simplefilter("ignore")
    import diffusers

    KINDS = {name: getattr(diffusers, name) for name in FAMILIES}
    DDPM, DDIM, FLOW = diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler
    EDM_EULER, KARRAS = diffusers.EDMEulerScheduler, diffusers.KarrasVeScheduler

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 8}
BLOCKS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
TEXT_UNET = {
    **BLOCKS, "cross_attention_dim": 12, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
PLAIN_UNET = {
    **BLOCKS, "in_channels": 4, "out_channels": 4, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
TINY = {
    "dit": ("DiTTransformer2DModel", {**SMALL, "out_channels": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 2}),
    "pixart": ("PixArtTransformer2DModel", {**SMALL, "cross_attention_dim": 16, "caption_channels": 12}),
    "sd3": ("SD3Transformer2DModel", {
        **SMALL, "out_channels": 4, "joint_attention_dim": 12, "caption_projection_dim": 16,
        "pooled_projection_dim": 20, "pos_embed_max_size": 16,
    }),
    "unet": ("UNet2DModel", PLAIN_UNET),
    "unet of classes": ("UNet2DModel", {**PLAIN_UNET, "num_class_embeds": 11}),
    "text unet": ("UNet2DConditionModel", TEXT_UNET),
    "xl unet": ("UNet2DConditionModel", {
        **TEXT_UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 20 + 6 * 4,
    }),
    "sana": ("SanaTransformer2DModel", {
        **SMALL, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
        "cross_attention_dim": 16, "caption_channels": 12,
    }),
    "aura": ("AuraFlowTransformer2DModel", {
        "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 64,
    }),
    "wan": ("WanTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 12,
        "freq_dim": 16, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 32,
    }),
    "flux": ("FluxTransformer2DModel", {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 12, "pooled_projection_dim": 20, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
    }),
}  # fmt: skip
FLOWS = ("sd3", "sana", "aura", "wan", "flux")
MAIN = ("dit", "pixart", "sd3", "unet", "unet of classes")
STEPS = torch.tensor([0, 300, 999])


def tiny(name: str):
    kind, config = TINY[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KINDS[kind](**config).eval()


def scheduler(name: str):
    return FLOW() if name in FLOWS else DDPM()


def wrapped(name: str, **more) -> Denoiser:
    return from_diffusers(tiny(name), scheduler(name), classes=10, **more)


def shape(name: str) -> tuple[int, ...]:
    return (4, 2, 8, 8) if name == "wan" else (4, 8, 8)


def told(name: str, denoiser: Denoiser, n: int = 3):
    """Parts of the conditions, and the same as one tensor."""
    layout, g = denoiser.net.layout, torch.Generator().manual_seed(1)
    if layout is None:
        label = torch.arange(n) + 2
        return {"label": label}, label
    parts = {"tokens": torch.randn(n, 5, layout.width, generator=g)}
    if layout.pooled:
        parts["pooled"] = torch.randn(n, layout.pooled, generator=g)
    if layout.numbers:
        parts["numbers"] = torch.rand(n, layout.numbers, generator=g)
    if name in ("pixart", "sana", "text unet"):
        parts["mask"] = (torch.arange(5) < torch.tensor([[5], [3], [1]]).repeat(-(-n // 3), 1)[:n]).float()
    return parts, layout.pack(**parts)


def asked(name: str, model, x, t, p):
    """The library's model, called as its own pipeline does; ``t`` as its scheduler counts."""
    if name == "dit":
        return model(x, t, class_labels=p["label"]).sample[:, :4]
    if name == "pixart":
        added = {"resolution": None, "aspect_ratio": None}
        out = model(
            x, encoder_hidden_states=p["tokens"], encoder_attention_mask=p["mask"], timestep=t, added_cond_kwargs=added
        )
        return out.sample.chunk(2, 1)[0]
    if name == "sd3":
        return model(
            hidden_states=x, timestep=t, encoder_hidden_states=p["tokens"], pooled_projections=p["pooled"]
        ).sample
    if name == "unet":
        return model(x, t).sample
    if name == "unet of classes":
        return model(x, t, class_labels=p["label"]).sample
    if name == "text unet":
        return model(x, t, encoder_hidden_states=p["tokens"], encoder_attention_mask=p["mask"]).sample
    if name == "xl unet":
        added = {"text_embeds": p["pooled"], "time_ids": p["numbers"]}
        return model(x, t, encoder_hidden_states=p["tokens"], added_cond_kwargs=added).sample
    if name == "sana":
        return model(x, encoder_hidden_states=p["tokens"], encoder_attention_mask=p["mask"], timestep=t).sample
    if name == "aura":
        return model(x, encoder_hidden_states=p["tokens"], timestep=t / 1000).sample
    if name == "wan":
        return model(hidden_states=x, timestep=t, encoder_hidden_states=p["tokens"]).sample
    pipe = diffusers.FluxPipeline
    ids = pipe._prepare_latent_image_ids(len(x), 4, 4, x.device, x.dtype)
    out = model(
        hidden_states=pipe._pack_latents(x, len(x), 4, 8, 8), timestep=t / 1000, guidance=p["numbers"][:, 0],
        pooled_projections=p["pooled"], encoder_hidden_states=p["tokens"], txt_ids=torch.zeros(5, 3), img_ids=ids,
    ).sample  # fmt: skip
    return pipe._unpack_latents(out, 64, 64, 8)


# ------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", TINY)
def test_a_wrapped_model_says_what_the_library_says(name):
    denoiser, model, x = wrapped(name), tiny(name), torch.randn(3, *shape(name))
    parts, cond = told(name, denoiser)
    with torch.no_grad():
        if name in FLOWS:
            sigma = torch.tensor([0.1, 0.5, 0.9])
            said = asked(name, model, x, sigma * 1000, parts)
            found = denoiser.predict(x, sigma, cond, "flow")
            clean = x - sigma.view(-1, *[1] * (x.dim() - 1)) * said
            t = sigma
        else:
            said = asked(name, model, x, STEPS, parts)
            t = (STEPS + 1) / 1000
            found = denoiser.predict(x, t, cond, "eps")
            left = DDPM().alphas_cumprod[STEPS].view(-1, 1, 1, 1)
            clean = (x - (1 - left).sqrt() * said) / left.sqrt()
        assert torch.allclose(found, said, atol=1e-4)
        got = denoiser(x, t, cond)
    assert got.shape == x.shape
    assert torch.allclose(got, clean, rtol=1e-3, atol=1e-3 * float(clean.abs().max()))
    assert float(said.std()) > 1e-3, "a network of zeros would say the same of anything"


@pytest.mark.parametrize("said", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_predictions_and_tables_mean_what_the_scheduler_takes_them_for(said, betas):
    theirs = DDIM(prediction_type=said, beta_schedule=betas, clip_sample=False, num_train_timesteps=200)
    theirs.set_timesteps(200)
    model = tiny("unet")
    denoiser = from_diffusers(model, theirs)
    x, k = torch.randn(1, 4, 8, 8), 120
    with torch.no_grad():
        want = theirs.step(model(x, k).sample, k, x).pred_original_sample
        got = denoiser(x, torch.tensor([(k + 1) / 200]), torch.zeros(1).long())
    assert torch.allclose(got, want, atol=1e-3)


def test_a_flow_moves_as_its_scheduler_steps():
    theirs, model, denoiser = FLOW(shift=3.0), tiny("sd3"), wrapped("sd3")
    theirs.set_timesteps(4)
    parts, cond = told("sd3", denoiser)
    x, k, end = torch.randn(3, 4, 8, 8), theirs.timesteps[1], float(theirs.sigmas[2])
    with torch.no_grad():
        said = asked("sd3", model, x, k.expand(3), parts)
        want = theirs.step(said, k, x).prev_sample
        t = float(k) / 1000
        clean = denoiser(x, torch.tensor(t), cond)
    assert torch.allclose(clean + (x - clean) * end / t, want, atol=1e-4)


def test_a_preconditioned_model_is_seen_through_its_scheduler():
    theirs, model = EDM_EULER(sigma_data=0.7), tiny("unet")
    denoiser = from_diffusers(model, theirs, sigma_data=0.5)
    assert denoiser.schedule == EDM()
    assert denoiser.sigma_data == 0.7
    x, sigma = 3 * torch.randn(2, 4, 8, 8), torch.tensor(2.5)
    with torch.no_grad():
        inner = model(theirs.precondition_inputs(x, sigma), theirs.precondition_noise(sigma)).sample
        want = theirs.precondition_outputs(x, inner, sigma)
        got = denoiser(x, sigma, torch.zeros(2).long())
    assert torch.allclose(got, want, atol=1e-4)


def test_pixart_is_told_the_size_where_it_asks_for_it():
    config = {**SMALL, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 12}
    torch.manual_seed(0)
    model = KINDS["PixArtTransformer2DModel"](**config, use_additional_conditions=True).eval()
    denoiser = from_diffusers(model, DDPM())
    x, tokens = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 12)
    added = {  # as the pipeline says it: pixels, and height over width
        "resolution": torch.tensor([[64.0, 96.0]]).repeat(2, 1), "aspect_ratio": torch.tensor([[8 / 12]]).repeat(2, 1),
    }  # fmt: skip
    with torch.no_grad():
        want = model(x, tokens, torch.tensor([7, 7]), added_cond_kwargs=added).sample[:, :4]
        got = denoiser.predict(x, torch.tensor(8 / 1000), tokens, "eps")
    assert torch.allclose(got, want, atol=1e-5)


def test_a_dit_hides_no_class_of_its_own_accord():
    denoiser, x = wrapped("dit").train(), torch.randn(64, 4, 8, 8)
    label, t = torch.zeros(64).long(), torch.tensor(0.5)
    with torch.no_grad():
        assert torch.equal(denoiser(x, t, label), denoiser(x, t, label))
        assert not torch.allclose(denoiser(x, t, label), denoiser(x, t, denoiser.null(label)), atol=1e-5)
    assert int(denoiser.null(label)[0]) == 10


def test_null_conditions():
    assert wrapped("unet of classes").has_null, "a table of one more than the classes ends in it"
    full = from_diffusers(tiny("unet of classes"), DDPM())
    assert not full.has_null
    with pytest.raises(AtollError, match="has none"):
        full.null(torch.zeros(2).long())
    with pytest.raises(DataError, match="tells 11 classes apart, and there are 12"):
        from_diffusers(tiny("unet of classes"), DDPM(), classes=12)
    empty = torch.randn(5, 12)
    text = wrapped("pixart", null=empty)
    assert torch.equal(text.null(torch.randn(2, 5, 12)), empty.expand(2, 5, 12))
    assert not wrapped("pixart").has_null


def test_conditions_are_packed_and_unpacked():
    for name in TINY:
        layout = wrapped(name).net.layout
        if layout is None:
            continue
        parts, cond = told(name, wrapped(name))
        assert cond.shape == (3, 5 + layout.rows, layout.width + ("mask" in parts))
        tokens, pooled, numbers, mask = layout.unpack(cond)
        assert torch.equal(tokens, parts["tokens"])
        assert torch.equal(pooled, parts.get("pooled", pooled[:, :0]))
        assert torch.equal(numbers, parts.get("numbers", numbers[:, :0]))
        assert (mask is None) == ("mask" not in parts)
        assert mask is None or torch.equal(mask, parts["mask"])
        for wrong in (cond[:, : layout.rows], cond[..., :-2], cond[:, 0]):
            with pytest.raises(DataError, match="told embeddings"):
                layout.unpack(wrong)
    with pytest.raises(DataError, match=r"told 12 \+ 20 numbers .* not 12"):
        wrapped("sd3").net.layout.pack(torch.randn(3, 5, 12))


# ------------------------------------------------------------------------------------------- training


def work(name: str, denoiser: Denoiser, **more) -> Work:
    _, rows = told(name, denoiser, 6)
    return Work(shape(name), Conditions(rows), seed=1, batch=3, **more)


@pytest.mark.parametrize("name", MAIN)
def test_it_can_be_distilled(name):
    teacher = wrapped(name)
    before = clone(named_tensors(teacher))
    trainer = Trainer(DMD(lr=1e-3, critic_lr=1e-3), teacher, work(name, teacher), 2)
    trainer.go()
    assert equal(before, named_tensors(teacher))
    student = named_tensors(trainer.nets["student"])
    assert all(bool(torch.isfinite(t).all()) for t in student.values())
    moved = [n for n in student if not torch.equal(student[n], before[n])]
    assert len(moved) > len(list(teacher.parameters())) / 2
    z, cond = torch.randn(2, *shape(name)), work(name, teacher).conditions.rows[:2]
    assert trainer.method.generate(trainer.nets, z, cond, 1).shape == z.shape


def test_a_student_may_be_the_teacher_with_adapters():
    teacher = wrapped("dit")
    setting = work("dit", teacher, build=lambda: adapted(teacher, rank=2))
    trainer = Trainer(DMD(lr=1e-2, critic_lr=1e-2), teacher, setting, 2)
    before = clone(named_tensors(trainer.nets["student"]))
    trainer.go()
    after = named_tensors(trainer.nets["student"])
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved
    assert all("lora" in n for n in moved)


def test_usual_noise_levels_and_losses():
    assert usual_law(wrapped("dit")) == UniformSteps(wrapped("dit").schedule)
    assert usual_law(wrapped("sd3")) == LogitNormal()
    denoiser, x, eps = wrapped("dit"), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    k, label = torch.tensor([5, 400, 900]), torch.tensor([1, 2, 3])
    ratio = denoiser.schedule.ratio((k + 1) / 1000)
    with torch.no_grad():
        loss = training_loss(denoiser, x, label, ratio, eps)
        said = tiny("dit")(DDPM().add_noise(x, eps, k), k, class_labels=label).sample[:, :4]
    assert torch.allclose(loss, (said - eps).square().flatten(1).mean(1), rtol=1e-3)


def test_checkpointing_changes_memory_and_no_gradient(tmp_path):
    save_denoiser(wrapped("dit"), tmp_path)
    grads = []
    for checkpointing in (False, True):
        denoiser = load_denoiser(tmp_path, checkpointing=checkpointing).train()
        assert denoiser.net.model.is_gradient_checkpointing is checkpointing
        x = torch.ones(2, 4, 8, 8)
        denoiser(x, torch.tensor(0.4), torch.tensor([1, 2])).square().sum().backward()
        grads.append([p.grad for p in denoiser.parameters()])
    assert all(a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_half_precision_inside_float32_outside(tmp_path):
    save_denoiser(wrapped("sd3"), tmp_path)
    full, half = load_denoiser(tmp_path), load_denoiser(tmp_path, dtype="bfloat16")
    _, cond = told("sd3", full)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    assert next(half.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        a, b = full(x, t, cond), half(x, t, cond)
    assert b.dtype == torch.float32
    assert torch.allclose(a, b, atol=0.1)
    assert not torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MAIN)
def test_on_a_gpu(name):
    teacher = wrapped(name)
    trainer = Trainer(DMD(lr=1e-3), teacher, work(name, teacher, device="cuda"), 2, precision="bf16")
    trainer.go()
    x, cond = torch.randn(3, *shape(name)), told(name, teacher)[1]
    with torch.no_grad():
        there = teacher(x.cuda(), torch.tensor(0.5).cuda(), cond.cuda()).cpu()
        assert torch.allclose(there, wrapped(name)(x, torch.tensor(0.5), cond), atol=1e-2)


# ------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", TINY)
def test_what_is_saved_is_loaded_by_the_library_and_by_us(name, tmp_path):
    denoiser = wrapped(name)
    with torch.no_grad():
        for p in denoiser.parameters():  # as after training
            p.add_(0.01)
    save_denoiser(denoiser, tmp_path)
    part = "unet" if "unet" in name else "transformer"
    theirs = KINDS[TINY[name][0]].from_pretrained(tmp_path, subfolder=part, use_safetensors=True).eval()
    steps = type(scheduler(name)).from_pretrained(tmp_path, subfolder="scheduler")
    known = {k: v for k, v in scheduler(name).config.items() if not k.startswith("_")}
    assert known == {k: steps.config[k] for k in known}
    parts, cond = told(name, denoiser)
    x, t = torch.randn(3, *shape(name)), (STEPS + 1) / 1001
    with torch.no_grad():
        mine = denoiser(x, t, cond)
        assert torch.equal(load_denoiser(tmp_path, classes=10)(x, t, cond), mine)
        assert torch.equal(load_denoiser(tmp_path / part, classes=10)(x, t, cond), mine), "the model's own folder"
        at = STEPS if name not in FLOWS else t * 1000
        want = asked(name, theirs, x, at, parts)
        got = denoiser.predict(x, t if name in FLOWS else (STEPS + 1) / 1000, cond, denoiser.predicts)
    assert torch.allclose(want, got, atol=1e-4)
    assert not list(tmp_path.rglob("*.bin"))


def test_checkpoints_of_old_are_what_they_became(tmp_path):
    save_denoiser(wrapped("dit"), tmp_path)
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}))
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor(0.3), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(load_denoiser(tmp_path)(x, t, label), wrapped("dit")(x, t, label))


@pytest.mark.parametrize("name", ["dit", "sd3", "unet", "text unet"])
def test_an_adapter_goes_to_peft_and_back(name, tmp_path):
    from peft import PeftModel

    denoiser = wrapped(name)
    start = clone(named_tensors(denoiser))
    student = adapted(denoiser, rank=2, targets=("to_q", "to_v"), alpha=6.0)
    x, t = torch.randn(3, *shape(name)), (STEPS + 1) / 1001
    _, cond = told(name, denoiser)
    trainable = [n for n, p in student.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in n and (".to_q." in n or ".to_v." in n) for n in trainable)
    with torch.no_grad():
        assert torch.equal(student(x, t, cond), denoiser(x, t, cond)), "it starts as the same function"
        again = adapted(denoiser, rank=2, targets=("to_q", "to_v"), alpha=6.0)
        assert equal(named_tensors(again), named_tensors(student)), "equal seeds give equal bits"
        for p in student.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
        moved = student(x, t, cond)
        assert not torch.allclose(moved, denoiser(x, t, cond), atol=1e-3)
        save_denoiser(student, tmp_path)
        assert {p.name for p in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
        assert torch.allclose(with_adapter(denoiser, tmp_path)(x, t, cond), moved, atol=1e-5)
        theirs = PeftModel.from_pretrained(tiny(name), tmp_path)
        again = copy.deepcopy(denoiser)
        again.net.model = theirs
        assert torch.allclose(again(x, t, cond), moved, atol=1e-5)
    assert equal(start, named_tensors(denoiser)), "the denoiser itself is left alone"
    assert any(p.requires_grad for p in with_adapter(denoiser, tmp_path, trainable=True).parameters())


def test_an_adapter_on_our_own_network(tmp_path, digit_teacher):
    student = adapted(digit_teacher, rank=3)
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor(0.7), torch.tensor([3, 4])
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * p.requires_grad)
        save_denoiser(student, tmp_path)
        assert torch.allclose(with_adapter(digit_teacher, tmp_path)(x, t, label), student(x, t, label), atol=1e-5)
    with pytest.raises(DataError, match="does not fit this model"):
        with_adapter(wrapped("dit"), tmp_path)
    with pytest.raises(DataError, match="holds no adapter"):
        with_adapter(digit_teacher, tmp_path / "nowhere")


def test_our_own_networks_are_saved_with_what_built_them(tmp_path, digit_images):
    info, network = digit_images.data.info, DiT(dim=16, layers=1, heads=2)
    denoiser = make_denoiser(network, info, 3, "flow", sigma_data=0.8)
    save_model(denoiser, tmp_path, about_model(network, info, 10, 3, AsDenoiser("flow", 0.8)))
    back = load_denoiser(tmp_path)
    assert (back.schedule, back.predicts, back.sigma_data, back.classes) == (RF(), "flow", 0.8, 10)
    assert equal(named_tensors(back), named_tensors(denoiser))
    with pytest.raises(AtollError, match="has no format of diffusers"):
        save_denoiser(denoiser, tmp_path)


# ------------------------------------------------------------------------------------------- refusals


def edit(folder, file, **changes):
    path = folder / file
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def test_what_is_not_supported_is_said(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        load_denoiser(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no diffusers model"):
        load_denoiser(tmp_path)

    def folder(name, **more):
        made = tmp_path / name
        save_denoiser(wrapped(more.pop("of", "dit")), made)
        for file, changes in more.items():
            edit(made, {"model": "transformer/config.json", "unet": "unet/config.json",
                        "scheduler": "scheduler/scheduler_config.json"}[file], **changes)  # fmt: skip
        return made

    with pytest.raises(DataError, match="class Kandinsky are not supported; these are: UNet2DModel"):
        load_denoiser(folder("a", model={"_class_name": "Kandinsky"}))
    with pytest.raises(DataError, match="holds no diffusers model"):
        load_denoiser(folder("b", model={"_class_name": ...}))
    with pytest.raises(DataError, match="`class_embed_type: identity` is not supported"):
        load_denoiser(folder("c", of="text unet", unet={"class_embed_type": "identity"}))
    with pytest.raises(DataError, match="`prediction_type: score` is not supported"):
        load_denoiser(folder("d", scheduler={"prediction_type": "score"}))
    with pytest.raises(DataError, match="has no scheduler `DDPMPlan`"):
        load_denoiser(folder("e", scheduler={"_class_name": "DDPMPlan"}))
    with pytest.raises(DataError, match="has no scheduler `DiTPipeline`"):
        load_denoiser(folder("f", scheduler={"_class_name": "DiTPipeline"}))
    with pytest.raises(DataError, match="KarrasVeScheduler has no table"):
        load_denoiser(folder("g", scheduler={"_class_name": "KarrasVeScheduler"}))
    with pytest.raises(DataError, match="cannot be read as DDPMScheduler"):
        load_denoiser(folder("h", scheduler={"beta_schedule": "steep"}))
    with pytest.raises(DataError, match="`timestep_type: continuous` is not supported"):
        load_denoiser(folder("i", scheduler={"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}))
    with pytest.raises(DataError, match="preconditioned model with `prediction_type: v_prediction`"):
        load_denoiser(folder("j", scheduler={"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}))
    made = folder("k")
    (made / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(DataError, match="at which noise levels"):
        load_denoiser(made)
    made = folder("l")
    (made / "scheduler" / "scheduler_config.json").write_text("[1]")
    with pytest.raises(DataError, match="a mapping is expected"):
        load_denoiser(made)
    made = folder("m")
    (made / "transformer" / "config.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        load_denoiser(made)


def test_weights_come_from_safetensors_and_all_of_them(tmp_path):
    import safetensors.torch

    save_denoiser(wrapped("dit"), tmp_path)
    (weights,) = (tmp_path / "transformer").glob("*.safetensors")
    tree = safetensors.torch.load_file(weights)
    gone = "transformer_blocks.0.attn1.to_q.weight"
    safetensors.torch.save_file({n: t for n, t in tree.items() if n != gone}, weights)
    with pytest.raises(DataError, match=f"lacks 1 tensors of its DiTTransformer2DModel, such as `{gone}`"):
        load_denoiser(tmp_path)
    safetensors.torch.save_file({**tree, gone: torch.zeros(3, 3)}, weights)
    with pytest.raises(DataError, match="cannot be loaded as DiTTransformer2DModel"):
        load_denoiser(tmp_path)
    weights.unlink()
    torch.save(tree, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match=r"holds no \.safetensors file"):
        load_denoiser(tmp_path)


def test_noise_is_that_of_the_schedule():
    """``x_t`` of our schedules is the library's, so that a model sees what it was trained with."""
    x, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    ours = add_noise(wrapped("sd3").schedule, x, eps, torch.tensor([0.2, 0.5, 0.8]))
    theirs = FLOW()
    k = torch.stack([theirs.timesteps[(theirs.sigmas - s).abs().argmin()] for s in (0.2, 0.5, 0.8)])
    assert torch.allclose(ours, theirs.scale_noise(x, k, eps), atol=1e-3)
