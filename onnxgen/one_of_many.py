"""The process that `onnxgen.cli_many` starts for one of several models."""

from __future__ import annotations

import contextlib
import sys

from onnxgen.cli_many import serve
from onnxgen.cli_words import prepare_streams
from onnxgen.mapped import cut_off_in_words
from onnxgen.staging import termination_raises

if __name__ == "__main__":
    prepare_streams()
    # Who started it may be gone, and the pipe with it: then there is nobody to tell.
    with cut_off_in_words(), termination_raises(), contextlib.suppress(BrokenPipeError):
        serve(int(sys.argv[1]), int(sys.argv[2]))
