"""Regions and contexts as JSON, the same in both forms; what is read is checked, field by field."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from onnxgen.backends.interface import Identity
from onnxgen.contexts.spans import as_spans, parsed_spans
from onnxgen.contexts.types import parsed as parsed_type
from onnxgen.contexts.values import Blob, Context, Region

LONGEST = 1 << 24  # characters of a table; a region takes about a thousand


class FormatError(Exception):
    """What a file holds for backends cannot be read; the message is a clause."""


def dumped(value: Any) -> str:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def parsed(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: it is none, or too long.
    """
    if len(text) > LONGEST:
        raise FormatError(f"its table has {len(text)} characters, more than {LONGEST}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its table is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError("its table is no JSON object")
    return found


def write_region(region: Region, *, names: bool) -> dict[str, Any]:
    """A region; with the names of its values where nothing else says them."""
    values = {
        "inputs": list(region.inputs),
        "weights": list(region.weights),
        "outputs": list(region.outputs),
    }
    return {
        "region": region.name,
        **(values if names else {"inputs": len(region.inputs)}),
        "input_types": list(region.input_types),
        "output_types": list(region.output_types),
        "subgraph_sha256": region.subgraph,
        "weights_sha256": region.weights_sha256,
        "contexts": [_write_context(each) for each in region.contexts],
    }


def _write_context(context: Context) -> dict[str, Any]:
    identity = context.identity
    return {
        "backend": context.backend,
        "source": identity.source,
        "version": identity.version,
        "device": identity.device,
        "driver": identity.driver,
        "compatibility": identity.compatibility,
        "form": context.form,
        "parameters": as_spans(context.parameters),
        "blob": {"sha256": context.blob.sha256, "bytes": context.blob.size},
    }


def read_region(
    record: object, called: Sequence[str] | None = None, outputs: Sequence[str] = ()
) -> Region:
    """A region, its nodes not yet known.

    Args:
        called: what a call passes in, inputs and then weights, and `outputs` what it gives; None
            where the record itself has the names.

    Raises:
        FormatError: a field is missing, of another type, or says what cannot be.
    """
    name = _told(record, "region")
    if called is None:
        inputs = _strings(record, "inputs")
        weights = _strings(record, "weights")
        outputs = _strings(record, "outputs")
    else:
        count = _field(record, "inputs", int)
        if not 0 <= count <= len(called):
            raise FormatError(
                f"region '{name}' says {count} inputs, and its call has {len(called)}"
            )
        inputs, weights = list(called[:count]), list(called[count:])
    input_types, output_types = _types(record, "input_types"), _types(record, "output_types")
    if len(input_types) != len(inputs) or len(output_types) != len(outputs):
        raise FormatError(f"region '{name}' has not one type for each input and output")
    contexts = [
        _read_context(each, name, len(weights)) for each in _field(record, "contexts", list)
    ]
    return Region(
        name,
        (),
        tuple(inputs),
        tuple(weights),
        tuple(outputs),
        input_types,
        output_types,
        _sha256(record, "subgraph_sha256"),
        _sha256(record, "weights_sha256"),
        tuple(contexts),
    )


def _read_context(record: object, region: str, weights: int) -> Context:
    fields = ("source", "version", "device", "driver", "compatibility")
    identity = Identity(*(_told(record, each) for each in fields))
    blob = _field(record, "blob", dict)
    size = _field(blob, "bytes", int)
    parameters = parsed_spans(_field(record, "parameters", str), weights)
    if parameters is None or not 0 <= size < 1 << 63:
        raise FormatError(f"a context of region '{region}' says impossible numbers")
    return Context(
        _told(record, "backend"),
        identity,
        Blob(_sha256(blob, "sha256"), size),
        _told(record, "form"),
        tuple(parameters),
    )


def _field(record: object, name: str, kind: type) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"a record has no {kind.__name__} '{name}'")
    return value


def _told(record: object, name: str) -> str:
    """A text that is shown to people: none that a terminal obeys."""
    found = str(_field(record, name, str))
    if any(unicodedata.category(each) in ("Cc", "Cs") for each in found):
        raise FormatError(f"'{name}' of a record is no text to be shown")
    return found


def _strings(record: object, name: str) -> list[str]:
    found = _field(record, name, list)
    if not all(isinstance(each, str) for each in found):
        raise FormatError(f"'{name}' of a record are not all names")
    _check_names(found)
    return list(found)


def _check_names(names: Iterable[str]) -> None:
    """JSON can spell what is no text, and what no model file can hold."""
    if any("\ud800" <= each <= "\udfff" for name in names for each in name):
        raise FormatError("a name in its table is no text")


def read_types(record: object) -> dict[str, str]:
    """Types of values by their names; raises FormatError where one is none."""
    if not isinstance(record, dict):
        raise FormatError("its table has types that are no JSON object")
    _check_names(record)
    return {str(name): _type(each) for name, each in record.items()}


def _types(record: object, name: str) -> tuple[str, ...]:
    return tuple(map(_type, _strings(record, name)))


def _type(text: object) -> str:
    try:
        parsed_type(str(text))
    except ValueError as error:
        raise FormatError(str(error)) from error
    return str(text)


def _sha256(record: object, name: str) -> str:
    found = str(_field(record, name, str))
    if not re.fullmatch(r"[0-9a-f]{64}", found):
        raise FormatError(f"'{name}' of a record is no sha256")
    return found
