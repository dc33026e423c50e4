"""A network that sees noisy samples and says what is under the noise: teacher, student, fake score and expert alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.schedules import NoiseSchedule, convert, shaped

Predicts = Literal["edm", "x0", "eps", "v", "flow"]


class Denoiser(nn.Module):
    """A noise schedule and a network ``net(x, time, cond) -> [B, ...]``, seen as a function to clean samples.

    Must   float32   what goes in and comes out is float32, whatever the network computes in
           own time  ``t`` is a time of ``schedule``; to ask in another one's, use :func:`viewed`

    Args:
        net: the network. It takes ``(x, time, cond)``, and ``numbers=`` too when it was built for some.
        schedule: that the network was trained under.
        predicts: what the network says. ``"edm"`` is the preconditioned form of Karras et al. (2022), in which the
            network takes ``ln(sigma) / 4`` as its time and neither input nor output depends on the noise level in
            scale.
        classes: how many classes ``cond`` names; the number ``classes`` itself is the null condition. None: ``cond``
            holds embeddings, and ``null`` is theirs.
        sigma_data: standard deviation of the data.
        time_scale: the network's time is ``t * time_scale`` (1000 for most published flow models).
        null: the null condition's embedding, of the shape of one row of ``cond``.
    """

    null_embedding: Tensor | None

    def __init__(
        self, net: nn.Module, schedule: NoiseSchedule, predicts: Predicts = "edm", *, classes: int | None = None,
        sigma_data: float = 0.5, time_scale: float = 1.0, null: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.net, self.schedule, self.predicts = net, schedule, predicts
        self.classes, self.sigma_data, self.time_scale = classes, sigma_data, time_scale
        self.register_buffer("null_embedding", null)

    @property
    def has_null(self) -> bool:
        """There is a null condition: the model can be guided."""
        return self.classes is not None or self.null_embedding is not None

    def null(self, cond: Tensor) -> Tensor:
        """The null condition for as many rows as ``cond`` has."""
        if self.classes is not None:
            return torch.full_like(cond, self.classes)
        if self.null_embedding is None:
            raise AtollError("Guidance needs a null condition, and this model has none; give the denoiser a `null`.")
        return self.null_embedding.to(cond).expand_as(cond)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        """The clean sample, float32.

        Args:
            x_t: noisy samples ``[B, ...]``.
            t: times ``[B]`` or ``[]`` of ``schedule``.
            cond: conditions ``[B]`` or ``[B, ...]``.
            more: further inputs of the network, such as ``numbers=``.
        """
        t = t.expand(len(x_t))
        if self.predicts != "edm":
            return convert(self.schedule, self._raw(x_t, t, cond, more), self.predicts, "x0", x_t, t)
        ratio = self.schedule.ratio(t)
        scale, sd = shaped(self.schedule.alpha(t), x_t), self.sigma_data
        s = shaped(ratio, x_t)
        total = s**2 + sd**2
        inner = self.net(x_t / scale * total.rsqrt(), ratio.clamp(min=1e-6).log() / 4, cond, **more).float()
        out: Tensor = x_t / scale * (sd**2 / total) + inner * (s * sd * total.rsqrt())
        return out

    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor, want: str, **more: Any) -> Tensor:
        """What :meth:`forward` says, as ``"eps"``, ``"v"`` or ``"flow"``; exact when the network predicts just that."""
        t = t.expand(len(x_t))
        if want == self.predicts:
            return self._raw(x_t, t, cond, more)
        if self.predicts == "edm":
            return convert(self.schedule, self(x_t, t, cond, **more), "x0", want, x_t, t)
        return convert(self.schedule, self._raw(x_t, t, cond, more), self.predicts, want, x_t, t)

    def _raw(self, x_t: Tensor, t: Tensor, cond: Tensor, more: dict[str, Any]) -> Tensor:
        out: Tensor = self.net(x_t, t * self.time_scale, cond, **more).float()
        return out


class Viewed(nn.Module):
    """A denoiser asked in another schedule's times: the point with the same ratio is looked up in its own."""

    def __init__(self, inner: Denoiser, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.inner, self.schedule = inner, schedule

    def null(self, cond: Tensor) -> Tensor:
        return self.inner.null(cond)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        t = t.expand(len(x_t))
        own = self.inner.schedule
        there = own.time(self.schedule.ratio(t))
        factor = own.alpha(there) / self.schedule.alpha(t)
        out: Tensor = self.inner(x_t * shaped(factor, x_t), there, cond, **more)
        return out


def viewed(denoiser: Denoiser, schedule: NoiseSchedule) -> Denoiser:
    """``denoiser`` under another schedule; itself when it is that one already. Training one trains the other."""
    if denoiser.schedule == schedule:
        return denoiser
    return Viewed(denoiser, schedule)  # type: ignore[return-value]  # has what a Denoiser is used for


@contextmanager
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, every call of ``model`` leaves what its submodules ``names`` return in the mapping that is given.
    Compiled networks, which do not see hooks that come later, run uncompiled meanwhile.

    Raises:
        AtollError: when there is no such submodule.
    """
    modules = dict(model.named_modules())
    missing = [n for n in names if n not in modules]
    if missing:
        raise AtollError(f"The network has no module `{missing[0]}`; its blocks are: {', '.join(list(modules)[1:12])}.")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            found[name] = out[0] if isinstance(out, tuple) else out

        return hook

    compiled = names and any(m._compiled_call_impl is not None for m in modules.values())
    hooks = [modules[n].register_forward_hook(keep(n)) for n in names]
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield found
    finally:
        for hook in hooks:
            hook.remove()
