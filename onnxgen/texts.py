"""Text in a model file: protobuf hands out what is no UTF-8 as bytes, and then nothing is a name.

undecodable(proto)      # "the name of its Node is b'\\xe0x'", or None where all text is text
"""

from __future__ import annotations

import functools

from google.protobuf.descriptor import Descriptor, FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]


def undecodable(proto: Message) -> str | None:
    """Which field holds text that is no UTF-8, and the text; None where there is none."""
    pending = [proto]
    while pending:
        message = pending.pop()
        kinds = _fields(message.DESCRIPTOR)
        for field, value in message.ListFields():
            if field.number not in kinds:
                continue
            several = [value] if isinstance(value, (str, bytes, Message)) else value
            if not kinds[field.number]:
                pending.extend(several)
                continue
            for text in several:
                if not isinstance(text, str):
                    owner = message.DESCRIPTOR.name.removesuffix("Proto")
                    return f"the {field.name} of its {owner} is {text!r}"
    return None


@functools.cache
def _fields(kind: Descriptor) -> dict[int, bool]:
    """Numbers of the fields that hold text, or messages, and whether it is text."""
    return {
        field.number: field.type == FieldDescriptor.TYPE_STRING
        for field in kind.fields
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE)
    }
