"""What goes wrong, as one clear sentence with a documented exit code.

Exit codes: 0 done, 1 the result differs, 2 usage, 3 refused or unverifiable,
4 a file cannot be read or written, 5 an expectation was not met.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxgen.report.values import Report


class OnnxgenError(Exception):
    """A failure the user can read: the message names the file, the node and the cause.

    Attributes:
        exit_code: what the command exits with.
        report: what had been done until then, where there is a report.
    """

    exit_code = 1
    report: Report | None = None

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


LONGEST = 1500  # characters of a sentence; names of a model can be of any length, and hold anything


def one_line(message: str) -> str:
    """A message on one line that any terminal can show, shortened where it is very long."""
    message = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in message)
    half = LONGEST // 2
    return message if len(message) <= LONGEST else f"{message[:half]} … {message[-half:]}"


class ModelDiffersError(OnnxgenError):
    """The rewritten model does not compute what the original computes."""

    exit_code = 1


class UsageError(OnnxgenError):
    """The command's words do not fit together."""

    exit_code = 2


class RefusedError(OnnxgenError):
    """The model cannot be handled, or its result cannot be verified."""

    exit_code = 3


class FileError(OnnxgenError):
    """A file cannot be read or written."""

    exit_code = 4


class ExpectationError(OnnxgenError):
    """The result is right, but not what the caller said it must be."""

    exit_code = 5
