"""Passes: each rewrites the whole model towards the next room of `onnxgen.pipeline`."""
