"""A small network trained in one place first: what serves as a pretrained model in recipes and claims.

The weights are kept in the user's cache under a hash of all that they depend on, so each is trained once per machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from atoll.core.build import describe
from atoll.core.errors import DataError, MessageError
from atoll.core.files import user_cache, write_atomic
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode, seal, unseal
from atoll.core.progress import progress
from atoll.core.streams import stream
from atoll.core.tree import clone, named_tensors
from atoll.data.dataset import Info
from atoll.data.source import Source
from atoll.models.mlp import MLP
from atoll.models.model import ModelBuilder, build_model, seeded
from atoll.models.weights import load_weights

EDITION = 1
"""Of the training below: another one gives other weights, and so another name in the cache."""


@dataclass(frozen=True, kw_only=True)
class Pretrained(ModelBuilder):
    """``model`` with the weights that it learns from ``data`` in one place, before any site is asked.

    The training rows of ``data`` are public: keep them apart from those of the sites (``subset`` names rows and
    classes). AdamW with a cosine schedule. The weights depend on these fields and the data's files alone, not on the
    run's seed.

    Args:
        data: what to train on.
        model: the network.
        epochs: passes over the training rows.
        lr: largest step size.
        batch_size: examples per step.
        seed: of the initial weights and the order of the rows.
        fresh: tensors whose names start with one of these are drawn anew afterwards, e.g. ``["head."]``. Those whose
            shape follows the number of outputs are, wherever this number differs.
    """

    data: Source
    model: ModelBuilder = MLP()
    epochs: Annotated[int, Ge(1)] = 10
    lr: Annotated[float, Gt(0)] = 1e-3
    batch_size: Annotated[int, Ge(1)] = 64
    seed: int = 0
    fresh: tuple[str, ...] = ()

    @property
    def architecture(self) -> ModelBuilder:
        return self.model.architecture

    def build(self, info: Info, outputs: int) -> nn.Module:
        model = self.model.build(info, outputs)
        learned = self.learned()
        if learned.facts["shape"] != list(info.shape):
            theirs, ours = (" x ".join(map(str, s)) for s in (learned.facts["shape"], info.shape))
            raise DataError(
                f"`pretrained` saw rows of {theirs}, and those of `{info.name}` are {ours}; they must agree."
            )
        own, tree = named_tensors(model), learned.parts["weights"]
        follow = [n for n, t in tree.items() if n in own and t.shape != own[n].shape]
        fresh = (*self.fresh, *follow) if learned.facts["outputs"] != outputs else self.fresh
        load_weights(model, tree, "pretrained", fresh)
        return model

    def learned(self) -> Message:
        """The weights, from the cache or trained now; facts: ``shape`` of a row, ``outputs``, last ``loss``."""
        path = user_cache() / "pretrained" / f"{self.key()}.safetensors"
        try:
            return detach(unseal(decode(path.read_bytes(), NO_LIMITS)))
        except FileNotFoundError:
            pass
        except MessageError:
            path.unlink(missing_ok=True)  # damaged: train again
        message = self.train()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, encode(seal(message)))
        return message

    def key(self) -> str:
        """Names the weights: of all fields but ``fresh``, and of size and time of the files that ``data`` reads."""
        fields = {k: v for k, v in describe(self).items() if k != "fresh"}
        said = json.dumps([EDITION, fields, list(_files(fields["data"]))], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def train(self) -> Message:
        """Train from nothing; raises :class:`DataError` when the loss is no number in the end."""
        data = self.data.load().train
        outputs = _outputs(data.info)
        model = build_model(self.model, data.info, outputs, self.seed).train()
        order, each = stream(self.seed, "pretrained", "batches"), math.ceil(len(data) / self.batch_size)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * each)
        loss, done = torch.tensor(math.nan), 0
        with seeded(self.seed, "pretrained"), progress(self.epochs * each, "Pretraining") as bar:
            for _ in range(self.epochs):
                for rows in torch.randperm(len(data), generator=order).split(self.batch_size):
                    loss = _loss(model, data.ready(rows), data.info)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    done += 1
                    bar.update(done)
        last = float(loss.detach())
        if not math.isfinite(last):
            raise DataError(f"Pretraining on `{data.info.name}` diverged; lower `lr` (now {self.lr:g}).")
        facts = {"shape": list(data.info.shape), "outputs": outputs, "loss": last}
        return Message("pretrained", {"weights": clone(named_tensors(model))}, facts)


def _outputs(info: Info) -> int:
    """How many outputs a network for these rows has: classes (of text: tokens), or one number."""
    return info.num_classes or 1


def _loss(model: nn.Module, batch: dict[str, Tensor], info: Info) -> Tensor:
    """Cross-entropy of the class, of the next token for text, or the squared error of a standardised number."""
    text = info.kind == "text"
    x = batch["x"]
    out: Any = model(x[:, :-1] if text else x)
    out = getattr(out, "logits", out)
    if text:
        return F.cross_entropy(out.flatten(0, 1), x[:, 1:].flatten())
    if info.num_classes:
        return F.cross_entropy(out, batch["y"])
    return F.mse_loss(out.squeeze(1), (batch["y"] - info.target_mean) / (info.target_scale or 1.0))


def _files(value: Any) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and time of change of every file that a description names."""
    if isinstance(value, dict | list):
        for item in [v for k, v in value.items() if k != "name"] if isinstance(value, dict) else value:
            yield from _files(item)
    elif isinstance(value, str) and Path(value).exists():
        for file in sorted(p for p in (Path(value), *Path(value).rglob("*")) if p.is_file()):
            yield str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns
