"""The process that `onnxgen.cli_many` starts for one of several models."""

from __future__ import annotations

import sys

from onnxgen.cli_many import serve
from onnxgen.cli_words import prepare_streams
from onnxgen.mapped import cut_off_in_words

if __name__ == "__main__":
    prepare_streams()
    with cut_off_in_words():
        serve(int(sys.argv[1]), int(sys.argv[2]))
