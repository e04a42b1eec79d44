"""MOE003 and ORT004: experts that a quantiser packed, raised to MoE and lowered to QMoE."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxgen import functions
from onnxgen.derived import DerivedTensor, Rows, stacked
from onnxgen.functions import moe
from onnxgen.passes.lower import lower_model
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.tidy import tidy
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.report.values import Site
from onnxgen.targets.ort import RAISING
from onnxgen.targets.ort.experts import Experts
from onnxgen.testing import corpus
from onnxgen.verify.precision import without_leave
from onnxgen.verify.rewrites import RewriteChecker
from tests.graphs import normalized, run, runtime
from tests.quantising import INNER, Codes, E, H, Model, drawn, packed

Array = np.ndarray[Any, Any]


# --- codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8", "UINT8"])
def test_codes_are_packed_without_a_sign(kind: str, size: int) -> None:
    dtype = ir.DataType[kind]
    bits = dtype.bitwidth
    low = -(2 ** (bits - 1)) if dtype.is_signed() else 0
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 4, size))
    given = [ir.tensor((each + low).astype(dtype.numpy()), dtype=dtype) for each in codes]

    def held(rows: Rows) -> Array:
        return np.asarray(DerivedTensor(rows, "w").numpy())

    assert (held(stacked(given).packed(bits)) == packed(codes, bits)).all()
    turned = stacked(given).transposed().packed(bits)
    assert (held(turned) == packed(codes.swapaxes(1, 2), bits)).all()
    assert (held(turned.reversed()) == packed(codes.swapaxes(1, 2), bits)[::-1]).all()


LAYOUTS = list(
    itertools.product(("swiglu", "silu", "swiglu_bias1_bias2_separate"), (4, 8), (0, 16), (0, 1))
)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize(("name", "bits", "block", "zeros"), LAYOUTS)
def test_the_body_unpacks(name: str, bits: int, block: int, zeros: int, kind: Any) -> None:
    """Beside the same experts in numbers."""
    rng = np.random.default_rng(1)
    separate, gated = "separate" in name, name.startswith("swiglu")
    rows = 2 * INNER if gated and not separate else INNER
    sizes = {moe.FC1: (rows, H), moe.FC2: (H, INNER)} | ({moe.FC3: (rows, H)} if separate else {})
    x = rng.standard_normal((7, H)).astype(kind)
    shared = {
        moe.INPUT: x,
        moe.WEIGHTS: rng.random((7, 2)).astype(kind),
        moe.INDICES: np.argsort(rng.random((7, E)), 1)[:, :2],
    }
    if "bias" in name:
        biases = {moe.BIAS1: rows, moe.BIAS2: H, moe.BIAS3: rows}
        shared |= {at: rng.standard_normal((E, n)).astype(kind) for at, n in biases.items()}
    numbers, codes = dict(shared), dict(shared)
    for at, size in sizes.items():
        each = [drawn(rng, *size, bits, block, zeros=bool(zeros)) for _ in range(E)]
        for one in each:
            one.scales = one.scales.astype(kind)
        numbers[at] = np.stack([one.numbers() for one in each]).astype(kind)
        codes[at] = np.stack([packed(one.codes, bits) for one in each])
        codes[moe.SCALES[at]] = np.stack([one.scales for one in each])
        if zeros:
            codes[moe.ZEROS[at]] = np.stack([packed(one.zeros, bits) for one in each])
    wanted = called(name, numbers)
    found = called("_".join([name, f"q{bits}", *(["zeros"] if zeros else [])]), codes)
    assert found.dtype == wanted.dtype == kind
    limit = (1e-5 if kind == np.float32 else 5e-3) * np.abs(wanted).max()
    assert np.abs(found.astype(np.float64) - wanted).max() < limit


def called(overload: str, given: dict[int, Array]) -> Array:
    """A model of one call, run."""
    names = [f"i{at}" if at in given else "" for at in range(max(given) + 1)]
    node = helper.make_node("MoE", names, ["y"], domain="onnxgen", overload=overload)
    info = helper.make_tensor_value_info
    infos = [info("i0", helper.np_dtype_to_tensor_dtype(given[0].dtype), ["t", H])]
    kind = infos[0].type.tensor_type.elem_type
    tensors = [numpy_helper.from_array(each, f"i{at}") for at, each in given.items() if at]
    graph = helper.make_graph([node], "g", infos, [info("y", kind, ["t", H])], tensors)
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("onnxgen", 1)]
    own = [ir.node(moe.NAME, [], domain=functions.DOMAIN, overload=overload)]
    body = functions.called(own, 24)
    model = helper.make_model(graph, opset_imports=imports, ir_version=11, functions=body)
    return run(model, {"i0": given[0]})["y"]


@pytest.mark.parametrize(
    "overload", ["swiglu_q2", "swiglu_q4_q8", "swiglu_fc1t_q4", "swiglu_zeros", "swiglu_coarse"]
)
def test_there_is_no_such_overload(overload: str) -> None:
    with pytest.raises((KeyError, ValueError)):
        moe.parts_of(overload)


# --- raise and lower ----------------------------------------------------------------------------


def sites_of(proto: onnx.ModelProto) -> tuple[list[Site], list[Site], onnx.ModelProto]:
    """What was raised, what was lowered, and the result; every rewrite checked."""
    model, roles = normalized(proto)
    checker = RewriteChecker(runtime(), roles)
    sites = raise_model(model, roles, check=checker, rules=RAISING)
    raised = [each for each in sites if each.kind == "moe"]
    lowered = lower_model(model, [Experts()], roles, check=checker)
    tidy(model)
    functions.declare(model)
    return raised, lowered, ir.to_proto(model)


def agrees(model: Model, result: onnx.ModelProto, tolerance: float = 1e-5) -> None:
    without_leave(result)
    for tokens in (1, 7, 40):
        x = np.random.default_rng(tokens).standard_normal((tokens, model.hidden))
        x = x.astype(model.kind)
        wanted = model.wanted(x)
        found = run(result, {"x": x})["y"].astype(np.float64)
        assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


HITS = {
    "n_bits": {},
    "n_bits without zero points": {"zeros": False},
    "n_bits of 16": {"block": 16},
    "one block in a row": {"hidden": 32},
    "n_bits, coarse": {"level": 4},
    "columns": {"how": "columns"},
    "columns, unsigned": {"how": "columns", "signed": False},
    "columns without zero points": {"how": "columns", "zeros": False},
    "rows": {"how": "rows"},
    "rows, unsigned": {"how": "rows", "signed": False},
    "stack": {"how": "stack"},
    "stack, unsigned": {"how": "stack", "signed": False},
    "8 bits a row": {"how": "columns", "bits": 8, "block": 0},
    "8 bits a row, unsigned": {"how": "rows", "bits": 8, "block": 0, "signed": False},
    "8 bits a row without zero points": {"how": "columns", "bits": 8, "block": 0, "zeros": False},
    "biases inside": {"biases": "inside"},
    "biases inside without zero points": {"biases": "inside", "zeros": False},
    "biases added": {"how": "columns", "biases": "added"},
    "4 bits a row without zero points": {"how": "rows", "block": 0, "zeros": False},
}


@pytest.mark.parametrize("router", ["normalised", "shares", "sigmoid"])
@pytest.mark.parametrize("name", HITS)
def test_what_a_quantiser_wrote_becomes_the_kernel(name: str, router: str) -> None:
    model = Model(router=router, **HITS[name])
    raised, lowered, result = sites_of(model.proto())
    assert [(s.rule, s.status) for s in raised] == [("MOE003", "fused")], raised
    assert [(s.rule, s.status) for s in lowered] == [("ORT004", "fused")], lowered
    assert lowered[0].details["router"] == ("inside" if router == "normalised" else "outside")
    (node,) = [n for n in result.graph.node if n.op_type == "QMoE"]
    said = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    assert said["expert_weight_bits"] == model.bits
    assert said.get("block_size", 0) == model.block
    assert said.get("accuracy_level", 0) == model.level
    assert not {"MatMulNBits", "DequantizeLinear", "MoE"} & {n.op_type for n in result.graph.node}
    agrees(model, result)


def test_a_rewrite_is_checked_without_leave_to_round() -> None:
    """Weights this small are constants of the part that is checked, which kernels pack and round."""
    model = Model(hidden=32, inner=16, block=16, level=4)
    raised, lowered, result = sites_of(model.proto())
    assert [s.status for s in (*raised, *lowered)] == ["fused"] * 2, (raised, lowered)
    agrees(model, result)


def test_codes_stay_the_bytes_they_were() -> None:
    model = Model()
    *_, result = sites_of(model.proto())
    held = {each.name: numpy_helper.to_array(each) for each in result.graph.initializer}
    (node,) = [n for n in result.graph.node if n.op_type == "QMoE"]
    pairs = {2: ("gate", "up", "codes"), 3: ("gate", "up", "scales"), 11: ("gate", "up", "zeros")}
    for at, (first, second, what) in pairs.items():

        def part(codes: Codes, what: str = what) -> Array:
            found: Array = getattr(codes, what)
            return found if what == "scales" else packed(found, 4)

        turns = [
            np.stack([part(a), part(b)], 1).reshape(2 * INNER, -1)
            for a, b in zip(model.weights[first], model.weights[second], strict=True)
        ]
        assert (held[node.input[at]] == np.stack(turns)[::-1]).all(), what


def test_one_expert_whose_input_is_weighed() -> None:
    """Llama 4: only the lowering, from the base operator."""
    rng = np.random.default_rng(0)
    sizes = {moe.FC1: (2 * INNER, H), moe.FC2: (H, INNER)}
    given: dict[int, Array] = {}
    for at, size in sizes.items():
        each = [drawn(rng, *size, 4, 32, zeros=False) for _ in range(E)]
        given[at] = np.stack([packed(one.codes, 4) for one in each])
        given[moe.SCALES[at]] = np.stack([one.scales for one in each])
    names = ["x", "w", "i", *(f"i{at}" if at in given else "" for at in range(3, 11))]
    overload = "swiglu_scaled_q4"
    nodes = [
        helper.make_node("MatMul", ["x", "R"], ["l"]),
        helper.make_node("TopK", ["l", "k"], ["v", "i"]),
        helper.make_node("Tanh", ["v"], ["w"]),
        helper.make_node("MoE", names, ["y"], domain="onnxgen", overload=overload),
    ]
    info = helper.make_tensor_value_info
    infos = [info(name, 1, ["t", H]) for name in "xy"]
    tensors = [numpy_helper.from_array(each, f"i{at}") for at, each in given.items()]
    columns = rng.standard_normal((H, E)).astype(np.float32) / 8
    tensors += [numpy_helper.from_array(columns, "R"), numpy_helper.from_array(np.array([1]), "k")]
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("onnxgen", 1)]
    body = functions.called([ir.node(moe.NAME, [], domain="onnxgen", overload=overload)], 24)
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    proto = helper.make_model(graph, opset_imports=imports, ir_version=11, functions=body)
    _, lowered, result = sites_of(proto)
    assert [each.status for each in lowered] == ["fused"], lowered
    assert "QMoE" in {node.op_type for node in result.graph.node}
    x = rng.standard_normal((40, H)).astype(np.float32)
    wanted = run(proto, {"x": x})["y"]
    assert np.abs(run(result, {"x": x})["y"] - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_float16() -> None:
    model = Model(kind=np.float16)
    raised, lowered, result = sites_of(model.proto())
    assert [s.status for s in (*raised, *lowered)] == ["fused"] * 2, (raised, lowered)
    agrees(model, result, 2e-2)


KEPT: dict[str, tuple[dict[str, Any], str]] = {
    "padded": ({"hidden": 72, "block": 0, "zeros": False}, "packing"),
    "2 bits": ({"bits": 2}, "bits"),
    "bytes cut": ({"how": "columns", "hidden": 63, "block": 0}, "bits"),
    "stack of rows": ({"how": "stack", "block": 0, "bits": 8}, "blocks"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays(name: str) -> None:
    given, code = KEPT[name]
    model = Model(**given)
    proto = model.proto()
    for node in proto.graph.node:
        if name == "padded" and node.op_type == "MatMulNBits":
            _pad(proto, node)
    raised, lowered, result = sites_of(proto)
    assert [(s.rule, s.status) for s in raised] == [("MOE003", "kept")], raised
    assert raised[0].decline is not None
    assert raised[0].decline.code == code, raised[0].decline
    assert not lowered
    assert not [n for n in result.graph.node if n.op_type in ("MoE", "QMoE")]


def _pad(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Rows in blocks of 32, the last one padded."""
    held = {each.name: each for each in proto.graph.initializer}
    said = {each.name: each for each in node.attribute}
    inner, rows = said["K"].i, said["N"].i
    said["block_size"].i = 32
    blocks = -(-inner // 32)
    for at, (shape, kind) in enumerate((((rows, blocks, 16), np.uint8), ((rows * blocks,), "f4"))):
        held[node.input[1 + at]].CopyFrom(
            numpy_helper.from_array(np.ones(shape, kind), node.input[1 + at])
        )


def test_rows_in_another_order_stay() -> None:
    model = Model()
    proto = model.proto()
    order = numpy_helper.from_array(np.arange(H, dtype=np.int32) // 32, "order")
    proto.graph.initializer.append(order)
    first = next(n for n in proto.graph.node if n.op_type == "MatMulNBits")
    first.input.append("order")
    raised, _, _ = sites_of(proto)
    assert raised[0].decline is not None
    assert (raised[0].decline.code, raised[0].rule) == ("packing", "MOE003")
    assert "g_idx" in raised[0].decline.reason


@pytest.mark.parametrize("what", ["float zero points", "some without", "one of numbers"])
def test_experts_that_are_not_alike_stay(what: str) -> None:
    proto = Model().proto()
    first = next(n for n in proto.graph.node if n.op_type == "MatMulNBits")
    code = "layout"
    if what == "float zero points":
        code = "packing"
        points = np.full((INNER, 2), 8, np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(points, "points"))
        first.input[3] = "points"
    elif what == "some without":
        del first.input[3]
    else:
        matrix = numpy_helper.from_array(np.ones((H, INNER), np.float32), "matrix")
        proto.graph.initializer.append(matrix)
        plain = helper.make_node("MatMul", ["x", "matrix"], list(first.output))
        first.CopyFrom(plain)
    raised, _, _ = sites_of(proto)
    assert raised[0].decline is not None
    assert raised[0].decline.code == code, raised[0].decline


NOT_LOWERED: dict[str, tuple[dict[str, Any], str]] = {
    "8 bits in blocks": ({"bits": 8}, "accuracy"),
    "8 bits in blocks of columns": ({"bits": 8, "how": "columns"}, "accuracy"),
    "blocks of 8": ({"block": 8, "how": "columns"}, "blocks"),
    "blocks of 48": ({"block": 48, "how": "columns", "hidden": 96, "inner": 144}, "blocks"),
    "zero points of a row": ({"how": "columns", "block": 0}, "layout"),
    "weights below zero": ({"router": "signed"}, "router"),
    "another activation": ({"activation": "Tanh"}, "activation"),
}


@pytest.mark.parametrize("name", NOT_LOWERED)
def test_what_the_kernel_would_round_stays(name: str) -> None:
    given, code = NOT_LOWERED[name]
    model = Model(**given)
    proto = model.proto()
    raised, lowered, result = sites_of(proto)
    assert [(s.rule, s.status) for s in raised] == [("MOE003", "kept")], raised
    assert raised[0].decline is not None
    assert raised[0].decline.code == code, raised[0].decline
    assert not lowered
    kinds = {node.op_type for node in result.graph.node}
    assert kinds & {"MatMulNBits", "DequantizeLinear"}
    assert not kinds & {"MoE", "QMoE"}
    if name != "another activation":
        agrees(model, result)


def test_blocks_of_different_sizes_stay() -> None:
    model, rng = Model(), np.random.default_rng(0)
    model.weights["down"] = [drawn(rng, H, INNER, 4, 16, zeros=True) for _ in range(E)]
    raised, lowered, _ = sites_of(model.proto())
    assert not lowered
    assert raised[0].decline is not None
    assert raised[0].decline.code == "blocks"
    assert "16 and 32" in raised[0].decline.reason


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["n_bits", "columns"])
def test_a_file_is_written_and_proven(how: str, tmp_path: Path) -> None:
    model = Model(how=how, level=4)
    path, output = tmp_path / "model.onnx", tmp_path / "ort.onnx"
    onnx.save(model.proto(), path)
    report = fuse(path, FuseOptions(output=output, target="ort"), lambda message: None)
    assert report.proof is not None
    assert report.proof.status == "proven"
    written = onnx.load(output)
    assert "QMoE" in {node.op_type for node in written.graph.node}
    agrees(model, written)
    report = fuse(path, FuseOptions(output=tmp_path / "onnx.onnx"), lambda message: None)
    (site,) = [each for each in report.sites if each.kind == "moe"]
    assert site.decline is not None
    assert (site.decline.rule, site.decline.code) == ("MOE001", "quantised")


@pytest.mark.parametrize(
    "form", ["torchscript-looped", "torchscript-bmm", "dynamo20-batched", "transformers"]
)
def test_experts_of_exporters_with_a_scale_a_row(form: str, tmp_path: Path) -> None:
    """Experts alone, and stacks that are gathered, multiplied, or branched over."""
    (entry,) = corpus(f"mixtral/{form}")
    proto = onnx.version_converter.convert_version(entry.load(), 21)
    proto.ir_version = 10
    assert _quantise(proto) == (2 * 3 * E if form == "torchscript-looped" else 4)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    options = FuseOptions(output=tmp_path / "ort.onnx", target="ort")
    report = fuse(path, options, lambda message: None)
    assert report.proof is not None
    assert report.proof.status == "proven"
    found = [(s.rule, s.status) for s in report.lowered if s.kind == "experts"]
    assert found == [("ORT004", "fused")] * 2
    written = onnx.load(tmp_path / "ort.onnx")
    assert sum(n.op_type == "QMoE" for n in written.graph.node) == 2


def _quantise(proto: onnx.ModelProto) -> int:
    """Make int8 of all experts' weights, a scale for each row; how many."""
    hidden, inner = 84, 112
    sizes = ((2 * inner, hidden), (hidden, inner))  # [N, K], contracted along the second axis
    shapes = {**dict.fromkeys(sizes, 1), **{size[::-1]: 0 for size in sizes}}
    made = []
    for tensor in list(proto.graph.initializer):
        *stack, rows, columns = tensor.dims if len(tensor.dims) in (2, 3) else (0, 0)
        users = [n for n in proto.graph.node if tensor.name in n.input]
        alone = not stack and any("experts" in n.name and n.op_type == "MatMul" for n in users)
        if (rows, columns) not in shapes or not (alone or stack == [E]):
            continue
        # Of an expert alone [K, N]; of stacks as their exporter has them.
        axis = 0 if alone else len(stack) + shapes[rows, columns]
        array = numpy_helper.to_array(tensor)
        scales = np.abs(array).max(axis, keepdims=True) / 127
        parts = {"codes": np.round(array / scales).astype(np.int8), "scales": scales}
        for word, each in parts.items():
            held = numpy_helper.from_array(each, f"{tensor.name}_{word}")
            proto.graph.initializer.append(held)
        names = [f"{tensor.name}_{word}" for word in parts]
        block = array.shape[axis]
        node = helper.make_node(
            "DequantizeLinear", names, [tensor.name], axis=axis, block_size=block
        )
        made.append(node)
        proto.graph.initializer.remove(tensor)
    nodes = [*made, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return len(made)
