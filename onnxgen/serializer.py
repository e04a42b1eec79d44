"""Writing a model whose weights are serialised one at a time: gigabytes of them cost no memory."""

from __future__ import annotations

from typing import BinaryIO

import onnx
import onnx_ir as ir

from onnxgen.derived import bytes_of
from onnxgen.wire import GRAPH, INITIALIZER, RAW_DATA, WireError, delimited


class Serializer:
    """A model whose initializers are serialised one at a time.

    Args:
        proto: the model; its main graph's initializers are taken out of it.
        embedded: by position in the main graph's initializers, the tensor whose bytes are to
            be embedded there (the initializer itself holds no data); the others are complete.
    """

    def __init__(self, proto: onnx.ModelProto, embedded: dict[int, ir.TensorProtocol]) -> None:
        self._initializers: list[tuple[bytes, bytes, ir.TensorProtocol | None]] = []
        for index, initializer in enumerate(proto.graph.initializer):
            head, tensor = initializer.SerializeToString(), embedded.get(index)
            if tensor is None:
                prefix = delimited(INITIALIZER, len(head)) + head
                self._initializers.append((prefix, b"", None))
                continue
            raw = delimited(RAW_DATA, tensor.nbytes)
            prefix = delimited(INITIALIZER, len(head) + len(raw) + tensor.nbytes) + head
            self._initializers.append((prefix, raw, tensor))
        del proto.graph.initializer[:]
        self._graph = proto.graph.SerializeToString()
        proto.ClearField("graph")
        self._model = proto.SerializeToString()
        graph_size = len(self._graph) + sum(map(_size, self._initializers))
        self._graph_tag = delimited(GRAPH, graph_size)
        self.size = len(self._model) + len(self._graph_tag) + graph_size

    def write(self, file: BinaryIO) -> None:
        """Write the model; `size` says how many bytes it takes.

        Raises:
            WireError: a tensor's bytes are not as many as its type and shape say.
        """
        for part in (self._model, self._graph_tag, self._graph):
            file.write(part)
        for prefix, raw, tensor in self._initializers:
            file.write(prefix + raw)
            if tensor is not None:
                size = sum(map(file.write, bytes_of(tensor)))
                if size != tensor.nbytes:
                    raise WireError(
                        f"tensor '{tensor.name}' holds {size} bytes, not {tensor.nbytes}"
                    )


def _size(entry: tuple[bytes, bytes, ir.TensorProtocol | None]) -> int:
    prefix, raw, tensor = entry
    return len(prefix) + len(raw) + (tensor.nbytes if tensor is not None else 0)
