"""Graphs written to be hostile: huge results of small inputs, odd types, functions, bodies, ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from tests.proof.fuzz_damage import NAMES, SIZES
from tests.proof.fuzz_seeds import Draw

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
_KNOWN = TensorProto.DataType.items()
NARROW = tuple(
    number
    for name, number in _KNOWN
    if name.startswith(
        ("INT4", "UINT4", "INT2", "UINT2", "FLOAT4", "FLOAT8", "BFLOAT16", "COMPLEX")
    )
    or name in ("FLOAT16", "STRING", "BOOL", "INT8", "UINT16", "UINT64", "DOUBLE")
)
"""Types that few models hold."""
Dims = Sequence[int | str] | None


def info(name: str, kind: int = FLOAT, dims: Dims = ("b", "s", 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def node(op: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> NodeProto:
    """A node over names that are parted by blanks; "_" is an input left out."""
    given = [each.replace("_", "") if each == "_" else each for each in inputs.split()]
    return helper.make_node(op, given, outputs.split(), domain=domain, **attributes)


def integers(name: str, *values: int, scalar: bool = False) -> TensorProto:
    return helper.make_tensor(name, INT64, () if scalar else (len(values),), values)


def model(
    nodes: Sequence[NodeProto],
    tensors: Sequence[TensorProto] = (),
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    opset: int = 20,
) -> ModelProto:
    """A model from x [b,s,4] to y, of unknown shape, unless told otherwise."""
    ins = [info("x")] if inputs is None else inputs
    outs = [info("y", dims=None)] if outputs is None else outputs
    graph = helper.make_graph(nodes, "g", ins, outs, tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def huge(draw: Draw) -> ModelProto:
    """Results beyond any memory from a few bytes: fills, ranges, tiles, pads, axes of inputs."""
    big = draw.choice((10**5, 2**24, 2**31 - 1, 2**31, 10**12, 2**62, 2**63 - 1))
    other = draw.choice((1, 3, big))
    dims = integers("n", big, other)
    one = helper.make_tensor("one", FLOAT, (1,), [1.0])
    scalars = [integers("from", 0, scalar=True), integers("to", big, scalar=True)]
    scalars += [integers("by", draw.choice((1, 0, -1)), scalar=True)]
    bodies = {
        "fill": [node("ConstantOfShape", "n", "h")],
        "expand": [node("Expand", "one n", "h")],
        "range": [node("Range", "from to by", "r"), node("Cast", "r", "h", to=FLOAT)],
        "tile": [node("Unsqueeze", "one zero", "u"), node("Tile", "u n", "h")],
        "pad": [node("Pad", "one n", "h")],
        "onehot": [node("OneHot", "zero to two", "o"), node("Cast", "o", "h", to=FLOAT)],
        "reshape": [node("Reshape", "x n", "h")],
        "expand-x": [node("Expand", "x n", "h")],
        "eye": [node("ConstantOfShape", "n", "e"), node("EyeLike", "e", "h")],
        "random": [node("RandomNormal", "", "h", shape=[min(big, 2**62), other])],
        "resize": [node("Resize", "x _ _ four", "h")],
        "square": [
            node("ConstantOfShape", "to1", "c"),
            node("Unsqueeze", "c zero", "r"),
            node("Transpose", "r", "t", perm=[1, 0]),
            node("MatMul", "t r", "h"),
        ],
        "scatter": [
            node("ConstantOfShape", "n", "c"),
            node("ScatterND", "c index one", "h"),
        ],
        "einsum": [
            node("ConstantOfShape", "to1", "c"),
            node("Einsum", "c,c", "h", equation="i,j->ij"),
        ],
        "loop": [node("Loop", "to _ one", "h", body=_counting())],
        "cumsum": [node("ConstantOfShape", "n", "c"), node("CumSum", "c from", "h")],
        "window": [node("HannWindow", "to", "h")],
        "split": [
            node("SplitToSequence", "x to", "q", axis=2),
            node("ConcatFromSequence", "q", "h", axis=2),
        ],
    }
    chosen = draw.choice(list(bodies))
    tensors = [
        dims,
        one,
        *scalars,
        integers("zero", 0),
        integers("two", 0, 1),
        integers("to1", big),
    ]
    tensors += [integers("four", big, 1, 1), integers("index", 0, 0)]
    nodes = bodies[chosen]
    if draw.random() < 0.25:  # the size is computed, and known all the same
        nodes = [node("Identity", "n", "m"), *_renamed(nodes, "n", "m")]
    end = draw.choice(("Add", "Shape", "Gather", "ReduceSum"))
    if end == "Add":
        nodes = [*nodes, node("Add", "x h", "y")]
    elif end == "Shape":
        nodes = [*nodes, node("Shape", "h", "s"), node("Cast", "s", "y", to=FLOAT)]
    elif end == "Gather":
        nodes = [*nodes, node("Gather", "h zero", "g"), node("Add", "x g", "y")]
    else:
        nodes = [*nodes, node("ReduceSum", "h", "g"), node("Add", "x g", "y")]
    shape: Dims = ("b", "s", 4)
    if draw.random() < 0.4:
        shape = draw.choice(((big, 4), (1, big), (big, big), ("b", other, big), (2, 3, 2**16)))
    used = {name for each in nodes for name in each.input}
    return model(nodes, [each for each in tensors if each.name in used], [info("x", dims=shape)])


def _renamed(nodes: Sequence[NodeProto], old: str, new: str) -> list[NodeProto]:
    for each in nodes:
        for at, name in enumerate(each.input):
            each.input[at] = new if name == old else name
    return list(nodes)


def _counting() -> GraphProto:
    body = [node("Identity", "c", "d"), node("Add", "v v", "w")]
    ins = [info("i", INT64, ()), info("c", BOOL, ()), info("v", FLOAT, (1,))]
    return helper.make_graph(body, "body", ins, [info("d", BOOL, ()), info("w", FLOAT, (1,))])


def zeros(draw: Draw) -> ModelProto:
    """Dims of zero: inputs, weights, heads, lists of axes, and reductions over nothing."""
    found = draw.model()
    for tensor in draw.few(found.graph.initializer or [TensorProto(data_type=1)], 2):
        if draw.random() < 0.7 and tensor.dims:
            tensor.dims[draw.randrange(len(tensor.dims))] = 0
        else:
            tensor.dims.append(0)
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "external_data"):
            tensor.ClearField(field)
    for each in draw.few([*found.graph.input, *found.graph.output], 2):
        dims = each.type.tensor_type.shape.dim
        if dims:
            draw.choice(dims).dim_value = 0
    return found


def narrow(draw: Draw) -> ModelProto:
    """Tensors of int4, float8, bfloat16, complex numbers, strings, with and without data."""
    found = draw.model() if draw.random() < 0.5 else _few_ops(draw)
    kind = draw.choice(NARROW)
    for tensor in draw.few(found.graph.initializer or [TensorProto()], 4):
        tensor.data_type = kind
        width = max(1, helper.tensor_dtype_to_np_dtype(kind).itemsize)
        count = 1
        for dim in tensor.dims:
            count *= dim
        bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
        size = -(-count * bits.get(TensorProto.DataType.Name(kind), 8 * width) // 8)
        for field in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
        if kind == TensorProto.STRING:
            tensor.string_data.extend([draw.choice((b"", b"a", b"\xff\n"))] * min(count, 10**5))
        else:
            tensor.raw_data = draw.randbytes(size - draw.choice((0, 0, 0, 1)) if size else 0)
    if draw.random() < 0.5:
        for each in draw.few([*found.graph.input, *found.graph.output]):
            each.type.tensor_type.elem_type = kind
    return found


def _few_ops(draw: Draw) -> ModelProto:
    kind = draw.choice(NARROW)
    weight = TensorProto(name="w", dims=[4], data_type=kind)
    ops = ("Identity", "Add", "Mul", "Concat", "Equal", "Where", "Cast", "QuantizeLinear", "Gather")
    op = draw.choice((*ops, "DequantizeLinear", "Reshape", "MatMul", "Softmax"))
    given = "x" if op in ("Identity", "Softmax") else "w x x" if op == "Where" else "x w"
    extra: dict[str, Any] = {"axis": 0} if op == "Concat" else {}
    extra |= {"to": kind} if op == "Cast" else {}
    nodes = [node(op, given, "v", **extra), node("Identity", "v", "y")]
    return model(
        nodes, [weight], [info("x", kind)], [info("y", kind, None)], draw.choice((17, 21, 24))
    )


def functions(draw: Draw) -> ModelProto:
    """Local functions: that call themselves or each other, a tower of calls, overloads, ours."""
    way = draw.randrange(9)
    depth = draw.choice((1, 3, 12, 33, 34, 60, 400, 2000))
    calls = [node("F0", "x", "y", domain="my")]
    made: list[onnx.FunctionProto] = []
    if way in (0, 1):  # a ring of calls
        ring = draw.choice((1, 2, 5, depth))
        made = [_function(f"F{at}", [f"F{(at + 1) % ring}"]) for at in range(ring)]
    elif way == 2:  # each calls the next, once
        made = [
            _function(f"F{at}", [f"F{at + 1}"] if at + 1 < depth else []) for at in range(depth)
        ]
    elif way in (3, 4):  # each calls the next twice or more: as many nodes as grains on a board
        times = draw.choice((2, 2, 3, 10))
        depth = draw.choice((2, 5, 16, 28, 31, 40, 100))
        made = [
            _function(f"F{at}", [f"F{at + 1}"] * times if at + 1 < depth else [])
            for at in range(depth)
        ]
    elif way == 5:  # wrong numbers, missing, twice
        made = [_function("F0", ["F1"]), _function("F1", [])]
        draw.choice(made).input.extend(draw.choice((["b"], ["a"], ["", ""])))
        del draw.choice(made).output[draw.randrange(2) :]
        made.append(draw.choice(made))
    elif way == 6:  # overloads
        made = [_function("F0", []), _function("F0", ["F1"])]
        made[1].overload = draw.choice(("other", "", NAMES[6]))
        calls[0].overload = draw.choice(("other", "", "third"))
    elif way == 7:  # in the domains of others
        domain = draw.choice(("", "ai.onnx", "onnxgen", "com.microsoft"))
        name = draw.choice(("PagedAttention", "MoE", "GroupedMatMul", "Gelu", "Relu", "Attention"))
        made = [_function(name, [], domain), _function("F0", [])]
        calls = [node(name, "x", "y", domain=domain)]
    else:  # attributes
        made = [_function("F0", [])]
        made[0].attribute.extend(draw.choice((["alpha"], ["alpha", "alpha"], [""])))
        inner = made[0].node[0].attribute.add(name="alpha", type=AttributeProto.FLOAT)
        inner.ref_attr_name = draw.choice(("alpha", "beta", ""))
        made[0].node[0].op_type = "LeakyRelu"
        if draw.random() < 0.5:
            calls[0].attribute.append(
                helper.make_attribute("alpha", draw.choice((0.5, 3, "a", [1.0])))
            )
    if draw.random() < 0.3:
        body = helper.make_graph(calls, "t", [], [info("y", dims=None)])
        calls = [node("If", "c", "y", then_branch=body, else_branch=body)]
    found = model(calls, [helper.make_tensor("c", BOOL, (), [True])])
    found.opset_import.add(domain="my", version=1)
    found.functions.extend(made)
    if draw.random() < 0.1:
        draw.choice(found.functions).opset_import[0].version = draw.choice((1, 9, 18))
    return found


def _function(name: str, calls: Sequence[str], domain: str = "my") -> onnx.FunctionProto:
    names = ["a", *(f"v{at}" for at in range(len(calls))), "z"]
    nodes = [node(op, names[at], names[at + 1], domain="my") for at, op in enumerate(calls)]
    nodes.append(node("Relu", names[-2], "z"))
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("my", 1)]
    return helper.make_function(domain, name, ["a"], ["z"], nodes, imports)


def ends(draw: Draw) -> ModelProto:
    """Graphs without nodes or inputs or outputs; outputs that are inputs, initializers, or twice."""
    weight = helper.make_tensor("w", FLOAT, (4,), [1.0, 2.0, 3.0, 4.0])
    whole = info("w", FLOAT, (4,))
    x, y = info("x"), info("y", dims=None)
    relu = node("Relu", "x", "y")
    found = draw.choice(
        (
            lambda: model([], (), [x], [x]),
            lambda: model([], [weight], [], [whole]),
            lambda: model([relu], [weight], None, [y, whole, x]),
            lambda: model([relu], [weight], [x, whole], [y, whole]),
            lambda: model([], [weight], [whole], [whole]),
            lambda: model([relu], (), [x], [y, y]),
            lambda: model([relu], (), [x], []),
            lambda: model([relu], (), [], [y]),
            lambda: model([node("Add", "w w", "y")], [weight], [], [y]),
            lambda: model([node("Relu", "x", "")], (), [x], [y]),
            lambda: model([node("Relu", "", "y")], (), [x], [y]),
            lambda: model(
                [node("Identity", "x", "y"), node("Identity", "y", "z")], (), [x], [info("z")]
            ),
            lambda: model([relu, node("Relu", "x", "unread")], (), [x, info("spare", 7, ())], [y]),
            lambda: ModelProto(ir_version=10, graph=GraphProto()),
            lambda: model([node("Constant", "", "y", value_floats=[1.0])], (), [], [y]),
            lambda: model(
                [node("Constant", "", "y", value_string=b"\xff")], (), [], [info("y", 8, ())]
            ),
        )
    )()
    if draw.random() < 0.25:
        found.graph.output.append(info(draw.choice(NAMES)))
    if draw.random() < 0.15:
        found.graph.input.append(
            info(draw.choice(NAMES), draw.choice((0, 1, 7, 99)), (draw.choice(SIZES),))
        )
    return found
