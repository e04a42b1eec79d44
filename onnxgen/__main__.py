"""`python -m onnxgen` is the `onnxgen` command."""

import os
import sys
from pathlib import Path

# For -m Python looks for modules in the current folder first, which may be a model's.
if not sys.flags.safe_path and sys.path[0] == os.getcwd() != str(Path(__file__).parents[1]):
    del sys.path[0]

from onnxgen.cli import main

if __name__ == "__main__":
    main()
