"""The OpenAPI document, made from the one table of endpoints: it cannot say anything that the router does not do."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from fieldlab_common.protocol import COMMON_ERRORS, ENDPOINTS, PROBLEM, Caller, Endpoint, Problem

__all__ = ["openapi"]

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def openapi(version: str) -> dict[str, Any]:
    """The document (OpenAPI 3.1) of every row of ``ENDPOINTS``."""
    kinds = [kind for row in ENDPOINTS.values() for kind in (row.request, row.response)]
    ordered = sorted({Problem, *(kind for kind in kinds if kind is not None)} - {bytes}, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    references = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for row in ENDPOINTS.values():
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row, references)
    security = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fieldlab director", "version": version},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": security},
    }


def _operation(row: Endpoint, references: dict[type, Any]) -> dict[str, Any]:
    in_path = [_parameter(name, str, "path") for name in re.findall(r"{(\w+)}", row.path)]
    operation: dict[str, Any] = {
        "operationId": row.name,
        "x-callers": [caller.value for caller in row.callers],
        "parameters": in_path + [_parameter(name, kind, "query") for name, kind in row.query.items()],
        "security": [] if Caller.ANYONE in row.callers else [{"token": []}],
        "responses": {str(row.status): {"description": "OK", "content": _content(row.response, references)}},
    }
    if row.streams:
        operation["parameters"].append(_parameter("Last-Event-ID", int, "header"))
        operation["responses"][str(row.status)]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        operation["responses"]["204"] = {"description": "The stream has ended for good."}
    if row.request is not None:
        operation["requestBody"] = {"required": True, "content": _content(row.request, references)}
    for status in sorted({error.status for error in (*row.errors, *COMMON_ERRORS)}):
        codes = sorted({error.code for error in (*row.errors, *COMMON_ERRORS) if error.status == status})
        content = {PROBLEM: {"schema": references[Problem]}}
        operation["responses"][str(status)] = {"description": f"Problem: {', '.join(codes)}", "content": content}
    return operation


def _parameter(name: str, kind: type, where: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": {"type": _TYPES[kind]}}


def _content(kind: type, references: dict[type, Any]) -> dict[str, Any]:
    if kind is bytes:
        return {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"application/json": {"schema": references[kind]}}
