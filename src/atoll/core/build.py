"""From configuration to objects and back. A builder's signature is the only schema.

A *builder* is a frozen dataclass or a function with annotated parameters. A protocol names the package in which its
builders live (``package``); ``{name: top_k, fraction: 0.1}`` means the builder in that package's module ``top_k``.
So a new part is a new file, and there is no registry to edit. Names in a recipe can reach these packages and
nothing else: reading a recipe never imports foreign code.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from atoll.core.errors import RecipeError, did_you_mean

Builder = Callable[..., Any]


@dataclass(frozen=True)
class Deferred:
    """A builder whose remaining arguments come later (a task needs to know the data first)."""

    builder: Builder
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, **rest: Any) -> Any:
        return self.builder(**self.arguments, **rest)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def names_in(package: str, protocol: Any = None) -> list[str]:
    """The builders of a package, by module name; of a plain module, by snake-case class name.

    Args:
        protocol: leave out classes that do not implement it (a package may hold helpers too).
    """
    found = importlib.import_module(package)
    if not hasattr(found, "__path__"):
        return [_snake(n) for n, v in vars(found).items() if _own(found, v) and _implements(v, protocol)]
    names = [m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_")]
    return [n for n in names if _in_module(f"{package}.{n}", n, protocol) is not None]


def find(package: str, name: str, protocol: Any = None) -> Builder:
    """The builder ``name`` of ``package``; raises :class:`RecipeError` with a suggestion."""
    names = names_in(package, protocol)
    if name not in names:
        kind = package.rsplit(".", 1)[-1]
        raise RecipeError([f"there is no `{name}` in {kind}.{did_you_mean(name, names)}"])
    whole = not hasattr(importlib.import_module(package), "__path__")
    builder = _in_module(package if whole else f"{package}.{name}", name, protocol)
    assert builder is not None
    return builder


def _in_module(module_name: str, name: str, protocol: Any) -> Builder | None:
    """The class, else the function, that a module defines under its own name (its mathematics may share the name)."""
    module = importlib.import_module(module_name)
    found = [
        value for attribute, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module_name and _plain(attribute) == _plain(name)
        and not getattr(value, "_is_protocol", False) and _implements(value, protocol)
    ]  # fmt: skip
    return typing.cast(Builder, max(found, key=inspect.isclass)) if found else None


def _own(module: types.ModuleType, value: Any) -> bool:
    """A configuration dataclass that the module itself defines."""
    here = inspect.isclass(value) and value.__module__ == module.__name__
    return here and dataclasses.is_dataclass(value)


def _implements(builder: Any, protocol: Any) -> bool:
    return protocol is None or not inspect.isclass(builder) or protocol in builder.__mro__


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a builder."""

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty
    help: str = ""

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def parameters(builder: Builder) -> dict[str, Parameter]:
    """The arguments of a builder with their full annotations and the line that its docstring gives them."""
    # A dataclass's own hints are read where each field was written; those of its __init__ know its own module alone.
    plain_class = inspect.isclass(builder) and not dataclasses.is_dataclass(builder)
    hints = typing.get_type_hints(builder.__init__ if plain_class else builder, include_extras=True)
    helps = _argument_help(inspect.getdoc(builder) or "")
    defaults = {}
    if dataclasses.is_dataclass(builder):
        for f in dataclasses.fields(builder):
            if f.default_factory is not dataclasses.MISSING:
                defaults[f.name] = f.default_factory()
    out = {}
    for name, p in inspect.signature(builder).parameters.items():
        default = defaults.get(name, p.default)
        out[name] = Parameter(name, hints.get(name, Any), default, helps.get(name, ""))
    return out


def _argument_help(doc: str) -> dict[str, str]:
    _, _, section = doc.partition("Args:")
    out: dict[str, str] = {}
    last = ""
    for line in section.splitlines():
        if line.strip() and not line.startswith("    "):
            break
        if match := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            for last in match[1].split(", "):
                out[last] = match[2].strip()
        elif last and line.startswith("        "):
            out[last] += " " + line.strip()
    return out


# ------------------------------------------------------------------------------------------- values -> objects


class Reader:
    """Turns configuration into objects and collects every problem with its place."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def problem(self, where: str, text: str) -> None:
        self.problems.append(f"`{where}`: {text}" if where else text)

    def call(self, builder: Builder, value: Mapping[str, Any], where: str, later: frozenset[str] = frozenset()) -> Any:
        """Call ``builder`` with the mapping's entries; ``later`` names arguments that somebody else will give."""
        known = {n: p for n, p in parameters(builder).items() if n not in later}
        arguments, before = {}, len(self.problems)
        for name, entry in value.items():
            if name not in known:
                self.problem(_at(where, name), f"is not an argument of {builder.__name__}.{did_you_mean(name, known)}")
            else:
                arguments[name] = self.read(known[name].annotation, entry, _at(where, name))
        for name, p in known.items():
            if p.required and name not in value:
                self.problem(_at(where, name), f"is missing; {builder.__name__} needs it")
        if len(self.problems) > before:
            return None
        if later:
            return Deferred(builder, arguments)
        try:
            return builder(**arguments)
        except ValueError as e:
            self.problem(where, str(e))
            return None

    def read(self, annotation: Any, value: Any, where: str) -> Any:
        """``value`` as the annotation wants it; problems are collected, not raised."""
        plain = _bare(annotation)
        if isinstance(plain, types.UnionType) or typing.get_origin(plain) is typing.Union:
            return self._union(annotation, plain, value, where)
        if _several(plain):
            if not isinstance(value, list | tuple):
                value = [value]
            item = typing.get_args(plain)[0]
            return tuple(self.read(item, v, f"{where}.{i}") for i, v in enumerate(value))
        if not _buildable(plain) or _is_instance(value, plain):
            return self._scalar(annotation, value, where)
        package = getattr(plain, "package", None)
        if package is None:
            if not isinstance(value, Mapping):
                self.problem(where, f"must be a mapping of {plain.__name__}'s fields, not {value!r}")
                return None
            return self.call(plain, value, where)
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            self.problem(where, f"must be a name or a mapping with a `name`, not {value!r}")
            return None
        try:
            builder = find(package, value["name"], plain)
        except RecipeError as e:
            self.problem(where, e.problems[0])
            return None
        rest = {k: v for k, v in value.items() if k != "name"}
        return self.call(builder, rest, where, getattr(plain, "later", frozenset()))

    def _union(self, annotation: Any, plain: Any, value: Any, where: str) -> Any:
        choices = typing.get_args(plain)
        if value is None and type(None) in choices:
            return None
        for choice in choices:
            if _buildable(_bare(choice)) or _several(_bare(choice)):
                return self.read(choice, value, where)
        return self._scalar(annotation, value, where)

    def _scalar(self, annotation: Any, value: Any, where: str) -> Any:
        from pydantic import ConfigDict, TypeAdapter, ValidationError

        if _buildable(_bare(annotation)):
            return value
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
            if isinstance(value, bool) and bool not in (
                _bare(annotation),
                *typing.get_args(_bare(annotation)),
            ):
                self.problem(where, f"must not be {str(value).lower()}")
                return None
            return adapter.validate_python(value)
        except ValidationError as e:
            for error in e.errors():
                place = ".".join([where, *(str(x) for x in error["loc"] if isinstance(x, int))])
                message = error["msg"][0].lower() + error["msg"][1:]
                self.problem(place, f"{message}, got {error['input']!r}")
            return None


def _at(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _bare(annotation: Any) -> Any:
    """The type without ``Annotated``."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _buildable(annotation: Any) -> bool:
    """True for protocols that name a package, and for configuration dataclasses."""
    return inspect.isclass(annotation) and (hasattr(annotation, "package") or dataclasses.is_dataclass(annotation))


def _several(annotation: Any) -> bool:
    """True for a tuple of parts."""
    return typing.get_origin(annotation) is tuple and _buildable(typing.get_args(annotation)[0])


def _conforms(value: Any, annotation: Any) -> bool:
    """Some user class that says which protocol it implements."""
    return annotation in type(value).__mro__


def _is_instance(value: Any, annotation: Any) -> bool:
    """True for a finished object (a Python recipe gave it), which is taken as it is."""
    return dataclasses.is_dataclass(value) or isinstance(value, Deferred) or _conforms(value, annotation)


# ------------------------------------------------------------------------------------------- objects -> values


def describe(value: Any) -> Any:
    """The configuration that builds ``value`` again: plain mappings, lists and scalars, every default spelled out."""
    if isinstance(value, Deferred):
        return {"name": _name(value.builder), **{k: describe(v) for k, v in value.arguments.items()}}
    if hasattr(value, "arguments") and hasattr(value, "card"):  # a federated method remembers its builder's arguments
        return {"name": value.card.name, **{k: describe(v) for k, v in value.arguments.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"name": _name(type(value)), **fields} if hasattr(value, "package") else fields
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _name(builder: Any) -> str:
    """The name under which :func:`find` finds the builder."""
    last = str(builder.__module__.rsplit(".", 1)[-1])
    if _plain(last) == _plain(builder.__name__):
        return last
    return _snake(builder.__name__)


# ------------------------------------------------------------------------------------------- schema


def schema(annotation: Any) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of what :meth:`Reader.read` accepts for an annotation. What a part may be stands
    once, under ``$defs``, however often and however deep it is used."""
    defs: dict[str, Any] = {}
    plain = _bare(annotation)
    whole = _buildable(plain) and not hasattr(plain, "package")
    out = _object(plain, frozenset(), defs) if whole else _schema(annotation, defs)
    return {**out, "$defs": defs} if defs else out


def _schema(annotation: Any, defs: dict[str, Any]) -> dict[str, Any]:
    plain = _bare(annotation)
    if isinstance(plain, types.UnionType) or typing.get_origin(plain) is typing.Union:
        if any(_buildable(_bare(c)) or _several(_bare(c)) for c in typing.get_args(plain)):
            return {"anyOf": [_schema(c, defs) for c in typing.get_args(plain)]}
    elif _several(plain):
        return {"type": "array", "items": _schema(typing.get_args(plain)[0], defs)}
    elif _buildable(plain):
        name = f"{plain.__module__}.{plain.__qualname__}"
        if name not in defs:
            defs[name] = {}  # parts hold parts of their own kind: whoever asks again gets the reference
            defs[name] = _choices(plain, defs) if hasattr(plain, "package") else _object(plain, frozenset(), defs)
        return {"$ref": f"#/$defs/{name}"}
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
    from pydantic_core import SchemaError

    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).json_schema()
    except (PydanticUserError, PydanticSchemaGenerationError, SchemaError):
        return {}  # a Python object: only a recipe function can give it


def _choices(protocol: Any, defs: dict[str, Any]) -> dict[str, Any]:
    """A bare name, or a mapping with the name and fields of one of the protocol's builders."""
    names = names_in(protocol.package, protocol)
    later: frozenset[str] = getattr(protocol, "later", frozenset())
    builders = (_object(find(protocol.package, n, protocol), later, defs, n) for n in names)
    return {"anyOf": [{"enum": names}, *builders]}


def _object(builder: Builder, later: frozenset[str], defs: dict[str, Any], name: str = "") -> dict[str, Any]:
    properties: dict[str, Any] = {"name": {"const": name}} if name else {}
    required = ["name"] if name else []
    for p in parameters(builder).values():
        if p.name in later:
            continue
        entry = _schema(p.annotation, defs)
        if p.help:
            entry = {**entry, "description": p.help}
        if not p.required:
            entry["default"] = describe(p.default)
        else:
            required.append(p.name)
        properties[p.name] = entry
    doc = (inspect.getdoc(builder) or "").split("\n\n")[0].replace("\n", " ")
    return {
        "type": "object", "title": builder.__name__, "description": doc, "properties": properties,
        "required": required, "additionalProperties": False,
    }  # fmt: skip
