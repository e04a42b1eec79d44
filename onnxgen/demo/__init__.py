"""A small exported decoder, packaged with the program for `onnxgen demo`."""
