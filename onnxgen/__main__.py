"""`python -m onnxgen` is the `onnxgen` command."""

from onnxgen.cli import main

if __name__ == "__main__":
    main()
