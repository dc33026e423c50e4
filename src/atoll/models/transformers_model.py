"""Any model of the Hugging Face ``transformers`` library, from local files or a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from atoll.core.errors import AtollError, DataError, first_line
from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder

AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}


@dataclass(frozen=True, kw_only=True)
class TransformersModel(ModelBuilder):
    """A ``transformers`` model. Weights come from safetensors only, and code from the installed library only.

    Nothing is downloaded. Fetch a public model once with ``hf download NAME``; its name is then enough here.

    Args:
        path: a folder made by ``save_pretrained``, or the name of a model in the local cache; None draws
            random weights for ``config``.
        config: fields of the model's configuration, e.g. ``{model_type: gpt2, n_layer: 2}``; with ``path``
            they replace what its own configuration says.
        head: what it is used for.
        revision: commit or tag of a model in the cache.
        dtype: type of the parameters.
    """

    path: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    head: Literal["causal_lm", "sequence_classification", "image_classification"] = "causal_lm"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def build(self, info: Info, outputs: int) -> nn.Module:
        try:
            import transformers
        except ImportError as e:
            raise AtollError("transformers_model needs the transformers library: `pip install atoll[language]`.") from e
        auto = getattr(transformers, AUTO[self.head])
        fields = dict(self.config)
        if self.head != "causal_lm":
            fields.setdefault("num_labels", outputs)
        with quiet(transformers):
            model = self._random(auto, fields, info, outputs) if self.path is None else self._load(auto, fields)
        vocabulary = getattr(model.config, "vocab_size", None)
        if info.kind == "text" and vocabulary is not None and vocabulary < (info.num_classes or 0):
            raise DataError(
                f"The model knows {vocabulary:,} tokens, but `{info.name}` uses {info.num_classes:,}. "
                "Read the text with this model's own tokenizer, or raise `vocab_size`."
            )
        return model.to(getattr(torch, self.dtype))

    def _random(self, auto: Any, fields: dict[str, Any], info: Info, outputs: int) -> nn.Module:
        from transformers import AutoConfig

        kind = fields.pop("model_type", None)
        if kind is None:
            raise DataError("transformers_model needs a `path`, or a `config` with a `model_type` such as gpt2.")
        try:
            known = AutoConfig.for_model(kind)
            if info.kind == "text" and self.head == "causal_lm":
                fields.setdefault("vocab_size", outputs)
            if info.kind == "image" and len(info.shape) == 3:
                sizes = {"num_channels": info.shape[0], "image_size": info.shape[1]}
                fields = {k: v for k, v in sizes.items() if hasattr(known, k)} | fields
            model: nn.Module = auto.from_config(AutoConfig.for_model(kind, **fields), trust_remote_code=False)
        except Exception as e:  # the library raises a dozen types for a bad configuration
            raise DataError(f"A `{kind}` model cannot be made from this `config`: {first_line(e)}") from e
        return model

    def _load(self, auto: Any, fields: dict[str, Any]) -> nn.Module:
        from transformers import AutoConfig

        folder, safe = local_folder(str(self.path), self.revision), {"trust_remote_code": False}
        if (folder / "adapter_config.json").exists():
            raise DataError(f"`{self.path}` is an adapter, not a model. Give the path of the model that it adapts.")
        if not any(folder.glob("*.safetensors")):
            raise DataError(
                f"`{self.path}` holds no .safetensors file, and pickled weights are not read because they "
                "can run code. If you trust its origin, load it and call `save_pretrained` to convert it."
            )
        try:
            config = AutoConfig.from_pretrained(folder, **fields, **safe)
            model, report = auto.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                **safe,
            )
        except Exception as e:
            raise DataError(f"`{self.path}` cannot be loaded as {self.head}: {first_line(e)}") from e
        body = f"{model.base_model_prefix}."
        new_head = self.head != "causal_lm"
        lost = [k for k in report["missing_keys"] if not new_head or (k.startswith(body) and "pooler" not in k)]
        if lost:  # the library would go on with random numbers in these places
            raise DataError(f"`{self.path}` lacks {len(lost)} tensors of a {self.head} model, such as `{min(lost)}`.")
        result: nn.Module = model
        return result


def local_folder(path: str, revision: str | None = None) -> Path:
    """The folder at ``path``, or that of the cached model with this name. Never touches the network."""
    if Path(path).is_dir():
        return Path(path)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except Exception as e:
        raise DataError(
            f"There is no folder `{path}` and no model of this name in the local cache. Fetch it once with "
            f"`hf download {path}`, or give the folder of a saved model."
        ) from e


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No bars and reports while loading: what matters in them is checked by the caller."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
