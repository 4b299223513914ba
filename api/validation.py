# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Says what is wrong with a request, in words that its sender can act on.

pydantic finds the errors; this module turns each into one sentence with the value, the limit and,
for a name that does not exist, the nearest one that does: ``memory_mib=12: must be 16..1048576``.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .errors import ApiError, BadRequest, Invalid
from .models.common import FieldError

M = TypeVar("M", bound=BaseModel)

# A message repeats the value that was sent: enough to recognise it, too little to flood a log.
MAX_VALUE_CHARS: Final = 64
# One body can hold thousands of wrong values; nobody reads more than this.
MAX_ERRORS: Final = 20

_JSON_TYPES: Final[Mapping[str, str]] = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer of a usual size",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def parse_body(model: type[M], body: bytes) -> M:
    """Return the ``model`` that a JSON body holds.

    Args:
        model: the shape; strict, so no type is guessed.
        body: client-controlled, already bounded.

    Raises:
        BadRequest: the body is not JSON.
        Invalid: it is JSON, but not this shape.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as err:
        raise _body_error(model, body, err) from None


def _body_error(model: type[BaseModel], body: bytes, err: ValidationError) -> ApiError:
    errors = err.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        if not body:
            return BadRequest("malformed_json", "the body is empty: send a JSON object")
        reason = errors[0]["ctx"]["error"]
        return BadRequest("malformed_json", f"the body is not JSON: {reason}")
    return invalid([explain(error, model) for error in errors[:MAX_ERRORS]])


def invalid(errors: Sequence[FieldError]) -> Invalid:
    """Return the 422 for ``errors``, of which there is at least one."""
    first = errors[0]
    return Invalid("invalid_value", first.detail, field=first.field, errors=errors)


def explain(error: Mapping[str, Any], model: type[BaseModel] | None = None) -> FieldError:
    """Return one pydantic error as a sentence.

    Args:
        error: one element of ``ValidationError.errors()``; its input is client-controlled.
        model: the root of ``error["loc"]``, for limits and descriptions; None when unknown.
    """
    path = [str(part) for part in error["loc"]]
    if path and path[-1] == "[key]":
        path = path[:-1]
    field = ".".join(path) or None
    kind = error["type"]
    label = field or "the body"
    if kind == "missing":
        return FieldError(field=field, detail=f"{label}: required and missing")
    if kind == "extra_forbidden":
        known = _field_names(model, error["loc"])
        return FieldError(field=field, detail=f"{label}: unknown field{suggest(path[-1], known)}")
    if kind == "value_error":
        reason = str(error["msg"]).removeprefix("Value error, ")
        return FieldError(field=field, detail=f"{label}: {reason}" if field else reason)
    if kind == "too_long":
        count, limit = error["ctx"]["actual_length"], error["ctx"]["max_length"]
        detail = f"{label}: holds {count or 'too many'} items, at most {limit} are allowed"
        return FieldError(field=field, detail=detail)
    wanted = _wanted(error, _find_field(model, error["loc"]))
    return FieldError(field=field, detail=f"{label}={_shown(error['input'])}: {wanted}")


def suggest(name: str, known: Sequence[str]) -> str:
    """Return what follows "unknown X": the nearest known name, or all of them."""
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean `{near[0]}`?"
    return f"; known: {', '.join(known)}" if known else ""


def _wanted(error: Mapping[str, Any], field: FieldInfo | None) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _JSON_TYPES:
        is_parsed = kind.endswith(("_parsing", "_parsing_size", "_number"))
        other = "" if is_parsed else f", not {_json_type(error['input'])}"
        return f"must be {_JSON_TYPES[kind]}{other}"
    if kind in {"greater_than_equal", "less_than_equal"}:
        return _range_text(context, field)
    if kind in {"literal_error", "enum"}:
        return f"must be {context['expected']}"
    if kind == "string_pattern_mismatch":
        described = f" ({field.description})" if field is not None and field.description else ""
        return f"must match {context['pattern']}{described}"
    if kind == "string_too_long":
        return f"must be at most {context['max_length']} characters"
    if kind == "string_too_short":
        return f"must be at least {context['min_length']} characters"
    message = str(error["msg"])
    return message[:1].lower() + message[1:]


def _range_text(context: Mapping[str, Any], field: FieldInfo | None) -> str:
    low, high = context.get("ge"), context.get("le")
    for limit in field.metadata if field is not None else ():
        low = limit.ge if isinstance(limit, annotated_types.Ge) else low
        high = limit.le if isinstance(limit, annotated_types.Le) else high
    low, high = (int(n) if isinstance(n, float) and n.is_integer() else n for n in (low, high))
    if low is None:
        return f"must be at most {high}"
    return f"must be at least {low}" if high is None else f"must be {low}..{high}"


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "an array")


def _field_names(model: type[BaseModel] | None, location: Sequence[int | str]) -> list[str]:
    parent = _descend(model, location[:-1])
    return list(parent.model_fields) if _is_model(parent) else []


def _find_field(model: type[BaseModel] | None, location: Sequence[int | str]) -> FieldInfo | None:
    """Return the field at ``location``, or for a map's key what its annotation says."""
    if not location:
        return None
    parent = _descend(model, location[:-1])
    name = location[-1]
    if _is_model(parent) and isinstance(name, str):
        return parent.model_fields.get(name)
    return None


def _descend(annotation: Any, location: Sequence[int | str]) -> Any:  # noqa: ANN401  any annotation
    """Return the type at ``location`` under ``annotation``; None where the way is lost."""
    for part in location:
        annotation = _unwrap(annotation)
        if _is_model(annotation):
            field = annotation.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
        else:
            arguments = typing.get_args(annotation)
            annotation = arguments[-1] if arguments else None
    return _unwrap(annotation)


def _unwrap(annotation: Any) -> Any:  # noqa: ANN401  any annotation
    while True:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif origin in (typing.Union, types.UnionType):
            options = [a for a in typing.get_args(annotation) if a is not type(None)]
            annotation = options[0]
        else:
            return annotation


def _is_model(annotation: object) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
