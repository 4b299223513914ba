# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Holds a reply to what the OpenAPI document says of it."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema_rs

from api.openapi import PROBLEM_TYPE

Json = dict[str, Any]

_VALIDATORS: dict[tuple[int, str], jsonschema_rs.Draft202012Validator] = {}


def check_reply(document: Json, method: str, path: str, reply: httpx.Response) -> None:
    """Fail unless status, headers, media type and body are as documented."""
    assert reply.headers["x-request-id"]
    if reply.status_code >= 400:
        _check_problem(document, reply)
    operation = find_operation(document, method, path)
    if operation is None:
        assert reply.status_code in {400, 401, 403, 404, 405, 500} or not path.startswith("/v1/")
        return
    documented = operation["responses"]
    assert str(reply.status_code) in documented, (
        f"{method} {path}: {reply.status_code} undocumented"
    )
    described = documented[str(reply.status_code)]
    assert set(map(str.lower, described.get("headers", {}))) <= set(reply.headers)
    content = described.get("content")
    if content is None:
        assert reply.content == b""
        return
    media = reply.headers["content-type"].partition(";")[0]
    assert media in content
    if media in {"application/json", PROBLEM_TYPE}:
        validate(document, content[media]["schema"], reply.json())


def find_operation(document: Json, method: str, path: str) -> Json | None:
    """Return the documented operation of a concrete path; fixed paths go before templates."""
    path = path.partition("?")[0]
    for template in sorted(document["paths"], key=lambda text: text.count("{")):
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            found: Json | None = document["paths"][template].get(method.lower())
            if found is not None:
                return found
    return None


def validate(document: Json, schema: Json, value: object) -> None:
    """Fail unless ``value`` fits ``schema``, whose references lead into ``document``."""
    key = (id(document), json.dumps(schema, sort_keys=True))
    if key not in _VALIDATORS:
        whole = {**schema, "components": document["components"]}
        _VALIDATORS[key] = jsonschema_rs.Draft202012Validator(whole)
    _VALIDATORS[key].validate(value)


def _check_problem(document: Json, reply: httpx.Response) -> None:
    assert reply.headers["content-type"] == PROBLEM_TYPE
    body = reply.json()
    validate(document, {"$ref": "#/components/schemas/Problem"}, body)
    assert body["status"] == reply.status_code
    assert body["instance"].endswith(reply.headers["x-request-id"])
    assert body["detail"]
