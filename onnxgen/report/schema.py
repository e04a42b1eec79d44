"""The schema of JSON reports, written from the classes that they hold.

    python -m onnxgen.report.schema > onnxgen/report/report.schema.json

A test fails where the file is not what this writes, and where a report does not follow it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from typing import Any

from onnxgen.report.values import SCHEMA_VERSION, Case, Proof, Report

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
# What JSON has no number for is a text.
_NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["Infinity", "-Infinity", "NaN"]}]}
_COUNTS = ("found", "fused", "kept", "undone")


def build(*, strict: bool = False) -> dict[str, Any]:
    """The schema; a strict one allows no key that it does not name."""
    schema = _Schema(strict)
    report = schema.of(Report)
    proof = schema.of(Proof)
    schema.definitions["Report"]["properties"]["summary"] = {
        "description": "By kind of site: how many were found, fused, kept and undone.",
        "type": "object",
        "additionalProperties": schema.object({key: {"type": "integer"} for key in _COUNTS}),
    }
    schema.definitions["Proof"]["properties"]["worst"] = {
        "description": "The case with the largest difference.",
        "anyOf": [schema.of(Case), {"type": "null"}],
    }
    for name, key in (("Report", "summary"), ("Proof", "worst")):
        schema.definitions[name]["required"].append(key)
    text, optional = {"type": "string"}, {"type": ["string", "null"]}
    header = {
        "schema": {"const": SCHEMA_VERSION, "description": "Grows when a key changes its meaning."},
        "onnxgen": {**text, "description": "The version that wrote it."},
        "exit_code": {"type": "integer", "description": "What the command ended with."},
        "error": {**optional, "description": "The sentence that it ended with."},
    }
    raised = {"command": {"enum": ["fuse", "to-paged"]}}
    compared = {"command": {"const": "verify"}, "original": text, "rewritten": text}
    return {
        "$schema": _DIALECT,
        "title": "Report of onnxgen",
        "description": "What a command of onnxgen did to a model, or found of two.",
        "oneOf": [
            schema.object({**header, **raised, "report": {"anyOf": [report, {"type": "null"}]}}),
            schema.object({**header, **compared, "proof": {"anyOf": [proof, {"type": "null"}]}}),
        ],
        "$defs": dict(sorted(schema.definitions.items())),
    }


class _Schema:
    """Classes as definitions, each once."""

    def __init__(self, strict: bool) -> None:
        self.definitions: dict[str, dict[str, Any]] = {}
        self._strict = strict

    def object(self, properties: dict[str, Any]) -> dict[str, Any]:
        made = {"type": "object", "properties": properties, "required": list(properties)}
        return {**made, "additionalProperties": False} if self._strict else made

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of a type as the classes use it.

        Raises:
            TypeError: no report holds such a type.
        """
        origin, inside = typing.get_origin(kind), typing.get_args(kind)
        simple = {str: "string", int: "integer", bool: "boolean", type(None): "null"}
        if kind in simple:
            return {"type": simple[kind]}
        if kind is float:
            return _NUMBER
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return self._class(kind)
        if origin is typing.Literal:
            return {"enum": list(inside)}
        if origin in (list, tuple):
            return {"type": "array", "items": self.of(inside[0])}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.of(inside[1])}
        if origin in (types.UnionType, typing.Union):
            return {"anyOf": [self.of(each) for each in inside]}
        raise TypeError(f"a report holds no {kind}")

    def _class(self, kind: type) -> dict[str, Any]:
        name = kind.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # it may hold itself
            hints, said = typing.get_type_hints(kind), _attributes(kind.__doc__ or "")
            properties = {}
            for each in dataclasses.fields(kind):
                told = {"description": said[each.name]} if each.name in said else {}
                properties[each.name] = {**told, **self.of(hints[each.name])}
            summary = (kind.__doc__ or "").strip().split("\n")[0]
            self.definitions[name] = {"description": summary, **self.object(properties)}
        return {"$ref": f"#/$defs/{name}"}


def _attributes(doc: str) -> dict[str, str]:
    """What a docstring says of each attribute."""
    _, _, listed = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {8}\w)", f"\n{listed}"):
        names, colon, said = entry.strip().partition(": ")
        if colon:
            found.update(dict.fromkeys(re.split(r",\s*", names), " ".join(said.split())))
    return found


def dumps() -> str:
    return json.dumps(build(), indent=1) + "\n"


if __name__ == "__main__":
    print(dumps(), end="")
