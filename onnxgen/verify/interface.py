"""Whether two models can stand for one another: the same inputs and outputs."""

from __future__ import annotations

import onnx_ir as ir


def mismatch(original: ir.Model, rewritten: ir.Model) -> str:
    """How the two models' inputs or outputs differ, as one sentence; "" where they agree."""
    for kind in ("input", "output"):
        both = [
            [v for v in getattr(m.graph, f"{kind}s") if v.name not in m.graph.initializers]
            for m in (original, rewritten)
        ]
        names = [[str(v.name) for v in values] for values in both]
        for name in names[0]:
            if name not in names[1]:
                return f"the rewritten model has no {kind} {name!r}"
        for name in names[1]:
            if name not in names[0]:
                return f"the rewritten model has {kind} {name!r}, which the original has not"
        if names[0] != names[1]:
            return f"the {kind}s stand in another order: {', '.join(names[1])}"
        for a, b in zip(*both, strict=True):
            if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
                return f"{kind} {a.name!r} was {a.dtype.name} and is {b.dtype.name}"
            if a.shape is not None and b.shape is not None and len(a.shape) != len(b.shape):
                return f"{kind} {a.name!r} had {len(a.shape)} dims and has {len(b.shape)}"
    return ""
