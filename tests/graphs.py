"""Graphs in ONNX text, before and after: what a rewriting test is made of.

    assert_raised(
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
        "{ sq = Pow(x, 2.0)  m = ReduceMean(sq, [-1])  e = Add(m, 0.00001)"
        "  r = Sqrt(e)  n = Div(x, r)  y = Mul(n, w) }",
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
        "{ y = RMSNormalization<axis = -1, epsilon = 0.00001, stash_type = 1>(x, w) }",
        "RMS001",
    )

The text is that of `onnxgen.graph_text`, which compares graphs without their names. Every
comparison is followed by a run of both on ONNX Runtime, at lengths that are different from one
another.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.graph_text import assert_same_graph, outline, parse, weight
from onnxgen.passes.normalize import normalize, set_dtypes
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.tidy import tidy
from onnxgen.report.values import Decline, Site
from onnxgen.runtime import Runtime
from onnxgen.twin import BFLOAT16, unrunnable_types, widen, widened
from onnxgen.verify.rewrites import RewriteChecker

__all__ = ["assert_same_graph", "outline", "parse", "weight"]  # and what is defined here

Array = np.ndarray[Any, Any]

# What the symbols of a text stand for when it is run; any other gets a length of its own.
LENGTHS: tuple[dict[str, int], ...] = (
    {"b": 2, "s": 5, "p": 7, "t": 12, "e": 9},
    {"b": 3, "s": 1, "p": 4, "t": 5, "e": 8},
)
# Largest difference over the standard deviation of what the original computes.
TOLERANCE = {"float32": 1e-5, "float64": 1e-5, "float16": 1e-2}


@functools.cache
def runtime() -> Runtime:
    """One child process for all tests of a worker."""
    shared = Runtime(threads=1)
    atexit.register(shared.close)
    return shared


# --- running ------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name, on ONNX Runtime as the graph is written: nothing optimized.

    Of a model that holds bfloat16 its float32 twin is run.
    """
    model, feeds = runnable(model), {name: widened(array) for name, array in feeds.items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or its float32 twin where it holds bfloat16."""
    as_ir = ir.from_proto(model)
    if not unrunnable_types(as_ir):
        return model
    widen(as_ir, BFLOAT16)
    return ir.to_proto(as_ir)


def feeds_of(model: onnx.ModelProto, lengths: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Random inputs; masks leave the first past place of the second row out, positions count."""
    rng = np.random.default_rng(seed)
    lengths = dict(lengths)
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [
            lengths.setdefault(dim.dim_param, 13 + 4 * len(lengths))
            if dim.dim_param
            else dim.dim_value
            for dim in tensor.shape.dim
        ]
        if "mask" in value.name and dtype.kind in "bi":
            values = np.ones(shape, dtype)
            if len(shape) > 1 and shape[0] > 1 and shape[-1] > 1:
                values[1, ..., 0] = 0
        elif "position" in value.name:
            values = np.broadcast_to(np.arange(shape[-1]) + lengths.get("p", 0), shape)
        elif dtype.kind == "b":
            values = rng.random(shape) < 0.7
            values[..., 0] = True
        elif dtype.kind == "i":
            values = rng.integers(0, 11, shape)
        else:
            values = rng.standard_normal(shape)
        feeds[value.name] = np.ascontiguousarray(values.astype(dtype)).reshape(shape)
    return feeds


def assert_same_numbers(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    lengths: Sequence[Mapping[str, int]] = LENGTHS,
) -> None:
    """Both compute the same, wherever what the first computes is a number."""
    for seed, each in enumerate(lengths):
        feeds = feeds_of(before, each, seed)
        old, new = run(before, feeds), run(after, feeds)
        assert list(old) == list(new)
        for name, a in old.items():
            b = new[name]
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            known = np.isfinite(a.astype(np.float64))
            assert known.any(), f"{name} is no number anywhere: {each}"
            wide, other = a[known].astype(np.float64), b[known].astype(np.float64)
            difference = np.abs(wide - other).max() / (wide.std() or 1.0)
            assert difference <= TOLERANCE.get(str(a.dtype), 0.0), (name, each, difference)


# --- raising ------------------------------------------------------------------------------------


@dataclass
class Raised:
    """A graph before and after raising.

    Attributes:
        before: as it was given.
        normal: normalized and tidied only.
        after: raised and tidied.
        sites: what the rules said.
        checker: what compared every rewrite.
    """

    before: onnx.ModelProto
    normal: onnx.ModelProto
    after: onnx.ModelProto
    sites: list[Site]
    checker: RewriteChecker

    @property
    def fused(self) -> list[Site]:
        return [site for site in self.sites if site.status == "fused"]

    def node(self, op_type: str) -> onnx.NodeProto:
        """The only node of a type that is left."""
        (node,) = [node for node in self.after.graph.node if node.op_type == op_type]
        return node

    def count(self, op_type: str) -> int:
        return sum(node.op_type == op_type for node in self.after.graph.node)


def raised(
    before: str | onnx.ModelProto,
    *,
    opset: int = 20,
    lengths: Sequence[Mapping[str, int]] = LENGTHS,
    disabled: frozenset[str] = frozenset(),
) -> Raised:
    """Normalize, raise with every rewrite checked, tidy; both run and compared."""
    proto = parse(before, opset=opset) if isinstance(before, str) else before
    normal, _ = normalized(proto)
    model, roles = normalized(proto)
    checker = RewriteChecker(runtime(), roles)
    sampler = Sampler(model.graph, roles, runtime())
    sites = raise_model(model, roles, sampler=sampler, check=checker, disabled=disabled)
    tidy(model)
    tidy(normal)
    result = Raised(proto, ir.to_proto(normal), ir.to_proto(model), sites, checker)
    assert_same_numbers(proto, result.after, lengths)
    return result


def normalized(proto: onnx.ModelProto, opset: int = 24) -> tuple[ir.Model, Roles]:
    """A model in the form that the rules meet, and its roles."""
    model = ir.from_proto(proto)
    roles = find_roles(model)
    normalize(model, opset, runtime(), roles)
    return model, roles


def facts_of(before: str | onnx.ModelProto, *, opset: int = 20) -> tuple[Facts, dict[str, Any]]:
    """The analyses of a graph as it is written, and its values by name."""
    proto = parse(before, opset=opset) if isinstance(before, str) else before
    model = ir.from_proto(proto)
    set_dtypes(model)
    values: dict[str, Any] = {value.name or "": value for value in model.graph.inputs}
    values |= dict(model.graph.initializers)
    values |= {out.name or "": out for node in model.graph for out in node.outputs}
    return Facts(model.graph), values


def assert_raised(
    before: str | onnx.ModelProto, after: str | None, *codes: str, opset: int = 20
) -> Raised:
    """The graph becomes `after`, by exactly these rules, once each time they are named."""
    result = raised(before, opset=opset)
    declined = [site.decline for site in result.sites if site.decline is not None]
    assert not declined, declined
    assert sorted(site.rule for site in result.sites) == sorted(codes)
    if after is not None:
        assert_same_graph(result.after, parse(after, opset=24))
    return result


def assert_kept(
    before: str | onnx.ModelProto,
    rule: str,
    code: str,
    *,
    opset: int = 20,
    lengths: Sequence[Mapping[str, int]] = LENGTHS,
    disabled: frozenset[str] = frozenset(),
) -> Decline:
    """The rule's only site is kept, for this reason, and the graph is as it was."""
    result = raised(before, opset=opset, lengths=lengths, disabled=disabled)
    assert {site.status for site in result.sites} == {"kept"}, result.sites
    (decline,) = [site.decline for site in result.sites if site.rule == rule]
    assert decline is not None
    assert (decline.rule, decline.code) == (rule, code), decline
    assert decline.reason
    assert_same_graph(result.after, result.normal)
    return decline


def assert_untouched(before: str | onnx.ModelProto, *, opset: int = 20) -> None:
    """No rule finds anything in the graph."""
    result = raised(before, opset=opset)
    assert result.sites == []
    assert_same_graph(result.after, result.normal)
