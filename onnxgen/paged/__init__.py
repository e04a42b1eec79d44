"""Running paged models: which blocks a sequence owns, and a runner over an ONNX Runtime session.

    runner = PagedRunner("model.paged/model.onnx", num_blocks=256)
    a = runner.add(prompt)
    runner.step()                                # {a: logits [n, V]} of the tokens that ran
    b = runner.add([*prompt, 9], prefix=a)       # shares a's full blocks as far as both are alike
    for _ in range(20):
        for sequence, logits in runner.step().items():
            runner.extend(sequence, [int(logits[-1].argmax())])
    runner.remove(a)                             # b keeps the blocks that it shares

A reference for what `onnxgen to-paged` writes, and what proves it; a server is onnxruntime-genai's
Engine. It runs models of tokens (`input_ids`) written with `--logits all` or `last` and without
`--slot-mapping`, on CPU. Nothing here is made for several threads.
"""

from __future__ import annotations

from onnxgen.paged.runner import PagedRunner
from onnxgen.paged.sequences import BlockAllocator, OutOfBlocksError, Sequences

__all__ = ["BlockAllocator", "OutOfBlocksError", "PagedRunner", "Sequences"]
