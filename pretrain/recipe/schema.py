"""Reading a settings schema: one-line errors with suggestions, and the reference of all fields."""

import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from pretrain.recipe.overlay import KeyPath, Layer, to_flow_yaml


@dataclass(frozen=True)
class Field:
    """One line of the reference; `path` has `<name>` where the user chooses the key."""

    path: str
    type: str
    default: str
    doc: str


# ------------------------------------------------------------------------------- walking a schema


def _plain(annotation: Any) -> Any:
    """Strip Annotated and `| None`; a union of several classes is returned as a union."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in get_args(annotation) if a is not type(None)]
        if len(members) == 1:
            return _plain(members[0])
    return annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without None; a single annotation is its own alternative."""
    annotation = _plain(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(_plain(a) for a in get_args(annotation) if a is not type(None))
    return (annotation,)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Values of the field `type` that select this class in a union."""
    field = model.model_fields.get("type")
    return get_args(_plain(field.annotation)) if field is not None else ()


def allows_none(annotation: Any) -> bool:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return annotation in (None, type(None)) or (is_union and type(None) in get_args(annotation))


def entries_of(annotation: Any) -> Any | None:
    """Annotation of the values if this is a mapping with free keys, else None."""
    annotation = _plain(annotation)
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def choose_class(annotation: Any, data: Any) -> type[BaseModel] | None:
    """The settings class that `data` will be read as, if that is known."""
    models = [m for m in _members(annotation) if _is_model(m)]
    if len(models) <= 1:
        return models[0] if models else None
    tag = data.get("type") if isinstance(data, dict) else None
    return next((m for m in models if tag in _tags(m)), None)


def _locate(annotation: Any, location: tuple[int | str, ...]) -> tuple[KeyPath, Any]:
    """pydantic's error location -> (key path as the user writes it, annotation of its parent).

    pydantic puts the tag of a union member, or the name of a type tried, into the location; these
    are no keys and are left out.
    """
    path: list[str] = []
    parent: Any = annotation
    for element in location:
        here = _plain(annotation)
        if isinstance(element, int):
            path.append(f"[{element}]")
            arguments = [a for a in get_args(here) if a is not Ellipsis]
            parent, annotation = (
                here,
                arguments[min(element, len(arguments) - 1)] if arguments else Any,
            )
        elif _is_model(here):
            path.append(element)
            field = here.model_fields.get(element)
            parent, annotation = here, field.annotation if field is not None else Any
        elif (values := entries_of(here)) is not None:
            path.append(element)
            parent, annotation = here, values
        else:
            chosen = [m for m in _members(here) if _is_model(m) and element in _tags(m)]
            annotation = chosen[0] if chosen else annotation
    return tuple(path), parent


# ----------------------------------------------------------------------------------------- errors


def error_lines(error: ValidationError, model: type[BaseModel], layer: Layer) -> list[str]:
    """One line per fault: `file:line: key.path: what is wrong; did you mean ...?`."""
    lines: dict[str, None] = {}  # ordered set: union members repeat the same fault
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":  # only says that there are other faults
            continue
        path, parent = _locate(model, detail["loc"])
        if detail["type"].startswith("union_tag"):
            path = (*path, "type")
        for message in _messages(detail, path, parent, model):
            blamed = _key_in(message) if detail["type"] == "value_error" else ()
            source = layer.source((*path, *blamed))
            key = _written_key(path)
            lines[f"{source}: {key}: {message}" if key else f"{source}: {message}"] = None
    return list(lines)


def located(messages: Iterable[str], layer: Layer) -> list[str]:
    """Messages that begin with a key, behind the file and line where it was written."""
    return [f"{layer.source(_key_in(message))}: {message}" for message in messages]


def _key_in(message: str) -> KeyPath:
    """Checks across fields begin with the key that they blame; the line number follows it."""
    match = re.match(r"\w+(\.\w+)*(?=[=:])", message)
    return tuple(match[0].split(".")) if match else ()


def _written_key(path: KeyPath) -> str:
    """The key path as an override would name it: names with dots in quotes."""
    quoted = [f'"{key}"' if "." in key else key for key in path]
    return ".".join(quoted).replace(".[", "[")


def _messages(detail: ErrorDetails, path: KeyPath, parent: Any, root: type[BaseModel]) -> list[str]:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return [f"unknown key; {_suggest_key(path[-1], parent, root)}"]
    if kind == "missing":
        return ["required, but not given"]
    if kind == "value_error":
        return str(context["error"]).splitlines()
    if kind == "union_tag_not_found":
        return ["required, but not given"]
    if kind == "union_tag_invalid":
        expected = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        return [_unknown_choice(context["tag"], expected)]
    if kind == "literal_error":
        return [_unknown_choice(detail["input"], _choices(parent, path))]
    message = detail["msg"][0].lower() + detail["msg"][1:]
    for theirs, ours in (
        ("valid array", "list"),
        ("an object", "a block"),
        ("dictionary", "block"),
    ):
        message = message.replace(theirs, ours)
    if kind in ("too_short", "too_long"):
        return [message.replace(" after validation", "")]
    value = repr(detail["input"])
    return [f"{message}, not {value if len(value) <= 60 else value[:57] + '...'}"]


def _choices(parent: Any, path: KeyPath) -> list[str]:
    if _is_model(parent):
        annotation = parent.model_fields[path[-1]].annotation
    else:
        annotation = get_args(parent)[-1]
    return [str(c) for m in _members(annotation) if get_origin(m) is Literal for c in get_args(m)]


def _unknown_choice(value: Any, expected: list[str]) -> str:
    near = get_close_matches(str(value), expected, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{value!r} is not one of {', '.join(expected)}{hint}"


def _suggest_key(key: str, parent: Any, root: type[BaseModel]) -> str:
    """A similar key of the same block; else the place of that key elsewhere; else what exists."""
    known = list(parent.model_fields) if _is_model(parent) else []
    near = get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    every = dict.fromkeys(f.path for f in reference(root))
    elsewhere = [path for path in every if path.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"that key belongs to {' or '.join(elsewhere[:3])}"
    return f"known here: {', '.join(known)}"


# -------------------------------------------------------------------------------------- reference


def reference(model: type[BaseModel]) -> list[Field]:
    """Every field of the schema, in declaration order, blocks before their fields.

    Fields that the kinds of a block share are given once.
    """
    return list(dict.fromkeys(_fields(model, "")))


def _fields(model: type[BaseModel], prefix: str) -> Iterator[Field]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        doc = " ".join((info.description or "").split())
        yield Field(path, type_name(info.annotation), _default(info), doc)
        annotation, inner = _plain(info.annotation), path
        if (values := entries_of(annotation)) is not None:
            annotation, inner = _plain(values), f"{path}.<name>"
        elif get_origin(annotation) is list:
            annotation, inner = _plain(get_args(annotation)[0]), f"{path}[]"
        for member in _members(annotation):
            if _is_model(member):
                yield from _fields(member, f"{inner}.")


def type_name(annotation: Any) -> str:
    """A type as a recipe's reader would say it: `int`, `list of text`, `adamw | sgd`."""
    if allows_none(annotation):
        return f"{type_name(_plain(annotation))} | null"
    annotation = _plain(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    if origin is dict:
        return f"name -> {type_name(arguments[1])}"
    if origin in (list, tuple):
        inner = [a for a in arguments if a is not Ellipsis]
        if origin is tuple and Ellipsis not in arguments:
            return f"list of {len(inner)} {type_name(inner[0])}"
        return f"list of {type_name(inner[0])}"
    if _is_model(annotation):
        tags = _tags(annotation)
        return f"block ({' | '.join(map(str, tags))})" if tags else "block"
    return {str: "text", bool: "true | false"}.get(
        annotation, getattr(annotation, "__name__", "any")
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""  # a block: the defaults stand at its fields
    return to_flow_yaml(list(value) if isinstance(value, tuple) else value)
