"""onnxgen: raise exported ONNX models to standard ops, lower them, and prove each step."""

# Kept free of heavy imports: the child process that runs ONNX Runtime starts from here.
__version__ = "0.1.0"
