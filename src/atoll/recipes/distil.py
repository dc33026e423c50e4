"""A stage that makes a fast generator: a teacher, a method, a judge; nothing of it needs a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from atoll.core.build import Reader, describe
from atoll.core.errors import AtollError, RecipeError
from atoll.data.source import Source
from atoll.data.sources.digits import Digits
from atoll.diffusion.distiller import Distiller
from atoll.diffusion.methods.sim import SIM
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Make a few-step generator from a many-step one.

    Args:
        name: of the run and its directory.
        seed: root of all random streams.
        data: real rows: for the judge, for a teacher that is trained here, and for methods that need images.
        limit: use at most so many of them.
        teacher: the many-step model; trained here, once per machine.
        start: folder of a saved denoiser that is the teacher instead: of a run, or a checkpoint of diffusers.
        texts: for a checkpoint that is told texts: safetensors file with what its text encoder says of prompts
            (``recipes/texts.py``). Then no row of ``data`` is read, and nobody judges the samples.
        shape: of such a checkpoint's samples, channels first; None takes the size that it was made for.
        method: how the student is made.
        lora: rank of the adapters that alone are trained, on the teacher; None trains all weights.
        steps: of training; None takes what ``budget`` pays for.
        budget: floating-point operations of training, in units of 10^12: equal work for different methods.
        cooldown: share of training, at its end, over which all step sizes fall to nothing.
        batch: samples per loss.
        calls: calls per sample at which the student is judged; None: those that its method is made for.
        samples: that the judge looks at.
        compare: the teacher's own sampling, judged beside the student's.
        precision: ``bf16`` computes the networks in bfloat16.
        compiled: fuse the networks with ``torch.compile``.
        device: where tensors live.
        threads: for one operator.
    """

    name: str = "distil"
    seed: int = 0
    data: Source = field(default_factory=Digits)
    limit: Annotated[int, Ge(1)] | None = None
    teacher: Teacher = field(default_factory=Teacher)
    start: str | None = None
    texts: str | None = None
    shape: tuple[Annotated[int, Ge(1)], ...] | None = None
    method: Distiller = field(default_factory=SIM)
    lora: Annotated[int, Ge(1)] | None = None
    steps: Annotated[int, Ge(0)] | None = None
    budget: Annotated[float, Gt(0)] | None = None
    cooldown: Annotated[float, Ge(0), Le(1)] = 0.0
    batch: Annotated[int, Ge(1)] = 128
    calls: tuple[Annotated[int, Ge(1)], ...] | None = None
    samples: Annotated[int, Ge(20)] = 2000
    compare: tuple[Sampler, ...] = ()
    precision: Literal["float32", "bf16"] = "float32"
    compiled: bool = False
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: Annotated[int, Ge(1), Le(256)] = 1

    def __post_init__(self) -> None:
        if self.steps is None and self.budget is None:
            raise AtollError("Say how long to train: `steps`, or a `budget` of 10^12 floating-point operations.")
        if self.texts is None and self.shape is not None:
            raise AtollError("`shape` goes with `texts`; otherwise the rows of `data` say it.")
        if self.texts is not None and self.start is None:
            raise AtollError("`texts` are told to a checkpoint; name its folder in `start`.")
        if self.texts is not None and self.method.needs == "images":
            raise AtollError("This method trains on real images, which a stage with `texts` has none of; see `needs`.")


def read_distil(value: Any, where: str = "recipe") -> Distil:
    """A stage from plain mappings; raises :class:`RecipeError` with all problems at once."""
    if not isinstance(value, Mapping):
        raise RecipeError(["a stage is a mapping such as `method: sim`"], where)
    reader = Reader()
    recipe = reader.call(Distil, {k: v for k, v in value.items() if k != "stage"}, "")
    if reader.problems:
        raise RecipeError(reader.problems, where)
    assert isinstance(recipe, Distil)
    return recipe


def described(method: Distiller) -> str:
    """Its name in recipes."""
    return str(describe(method)["name"])
