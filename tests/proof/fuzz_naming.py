"""Damage to names, domains, opsets, metadata and what else stands around the nodes."""

from __future__ import annotations

import json

import onnx
from onnx import AttributeProto, ModelProto, TensorProto, helper

from tests.proof.fuzz_damage import NAMES, SIZES, nodes_of
from tests.proof.fuzz_seeds import Draw


def names(draw: Draw) -> ModelProto:
    """Values, nodes, axes and graphs with slashes, quotes, newlines, NUL, 70,000 letters or none."""
    model = draw.model()
    graph = model.graph
    every = {name for node in graph.node for name in (*node.input, *node.output) if name}
    old = draw.few(sorted(every), 8)
    known = [each.name for each in (*graph.input, *graph.output)]
    old += draw.few(known, 3) if draw.random() < 0.6 else []
    renamed = {
        name: draw.choice(NAMES) + draw.choice(("", "", str(at))) for at, name in enumerate(old)
    }
    for node in nodes_of(model):
        for side in (node.input, node.output):
            for at, name in enumerate(side):
                side[at] = renamed.get(name, name)
        if draw.random() < 0.2:
            node.name = draw.choice(NAMES)
    for each in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        each.name = renamed.get(each.name, each.name)
    if draw.random() < 0.3:
        graph.name = draw.choice(NAMES)
    return model


def duplicates(draw: Draw) -> ModelProto:
    """Two of a name: values, nodes, inputs, initializers, outputs, an input that a node makes."""
    model = draw.model()
    graph = model.graph
    for _ in range(draw.choice((1, 1, 3))):
        one, two = draw.choice(graph.node), draw.choice(graph.node)
        match draw.randrange(9):
            case 0 if one.output and two.output:
                two.output[0] = one.output[0]
            case 1:
                two.name = one.name
            case 2:
                graph.input.append(draw.choice(graph.input or [onnx.ValueInfoProto(name="a")]))
            case 3 if graph.initializer:
                graph.initializer.append(draw.choice(graph.initializer))
            case 4 if graph.initializer:
                kind = draw.choice(graph.initializer)
                info = helper.make_tensor_value_info(kind.name, kind.data_type, list(kind.dims))
                graph.input.append(info)
            case 5:
                graph.output.append(draw.choice(graph.output))
            case 6 if graph.input and one.output:
                one.output[0] = draw.choice(graph.input).name
            case 7 if graph.initializer and one.output:
                one.output[0] = draw.choice(graph.initializer).name
            case _:
                graph.node.append(one)
    return model


def domains(draw: Draw) -> ModelProto:
    """Operators and domains nobody knows, and known ones under another's name."""
    model = draw.model()
    for node in draw.few(nodes_of(model), 4):
        match draw.randrange(3):
            case 0:
                node.domain = draw.choice((*NAMES, *_DOMAINS))
            case 1:
                node.op_type = draw.choice((*NAMES, "Attention", "RotaryEmbedding", "QMoE", "If"))
            case _:
                node.domain, node.op_type = draw.choice(_OPS)
    if draw.random() < 0.7:
        for domain in draw.few(_DOMAINS):
            model.opset_import.add(domain=domain, version=draw.choice((1, 1, 0, 2**40)))
    return model


_DOMAINS = ("ai.onnx", "ai.onnx.ml", "com.microsoft", "onnxgen", "my.domain", "pkg.onnxscript", "")
_OPS = (
    ("com.microsoft", "GroupQueryAttention"),
    ("com.microsoft", "MultiHeadAttention"),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"),
    ("com.microsoft", "FusedMatMul"),
    ("com.microsoft", "MatMulNBits"),
    ("com.microsoft", "BiasGelu"),
    ("com.microsoft", "PagedAttention"),
    ("com.microsoft", "Attention"),
    ("", "Attention"),
    ("", "TensorScatter"),
    ("", "Einsum"),
    ("", "Constant"),
    ("", "Loop"),
    ("onnxgen", "PagedAttention"),
    ("onnxgen", "MoE"),
    ("ai.onnx.ml", "TreeEnsemble"),
)


def opsets(draw: Draw) -> ModelProto:
    """Opsets and IR versions: too old, too new, twice, none, not those of the nodes."""
    model = draw.model()
    versions = (*SIZES, *range(1, 28))
    for _ in range(draw.choice((1, 1, 2))):
        match draw.randrange(5):
            case 0 | 1 if model.opset_import:
                draw.choice(model.opset_import).version = draw.choice(versions)
            case 2:
                model.opset_import.add(domain=draw.choice(_DOMAINS), version=draw.choice(versions))
            case 3:
                model.ir_version = draw.choice(versions)
            case _:
                del model.opset_import[draw.randrange(2) :]
    return model


def metadata(draw: Draw) -> ModelProto:
    """Metadata and documentation, our own among them: damaged, huge, twice, of other models."""
    model = draw.ours() if draw.random() < 0.8 else draw.model()
    own = {each.key: each.value for each in model.metadata_props}
    for _ in range(draw.choice((1, 2, 4))):
        key = draw.choice(
            [*own, *own, "onnxgen.roles", "onnxgen.contract", "onnxgen.paged", *NAMES[:6]]
        )
        value = own.get(key, "{}")
        match draw.randrange(5):
            case 0:
                value = draw.choice((*NAMES, *_DOCUMENTS))
            case 1:
                value = value[: draw.randrange(len(value) + 1)]
            case _:
                value = _changed_json(draw, value)
        kept = [each for each in model.metadata_props if each.key != key or draw.random() < 0.1]
        model.ClearField("metadata_props")
        model.metadata_props.extend(kept)
        if draw.random() < 0.9:
            model.metadata_props.add(key=key, value=value)
    if draw.random() < 0.2:
        draw.choice(model.graph.node).doc_string = draw.choice(NAMES)
        draw.choice(model.graph.node).metadata_props.add(key=draw.choice(NAMES), value="\n")
    return model


_DOCUMENTS = (
    "null",
    "[]",
    "[1",
    '{"a": ' * 5000,
    "[" * 100_000,
    '{"input_ids": 3}',
    '{"input_ids": "past"}',
    '{"input_ids": ["ids"]}',
    "1e999999",
    "9" * 5000,
    '{"max_length": -1}',
    '{"padding": "sideways"}',
)


def _changed_json(draw: Draw, text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return text + draw.choice(NAMES)
    for _ in range(draw.randint(1, 3)):
        found = _changed(draw, found)
    return json.dumps(found)


def _changed(draw: Draw, value: object) -> object:
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        return {**value, key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], _changed(draw, value[at]), *value[at + 1 :]]
    return draw.choice(
        (None, True, -1, 0, 3, 2**63, 1e300, "", "past", "mask", [], {}, [[1]], {"a": 1})
    )


def surroundings(draw: Draw) -> ModelProto:
    """Training information, sparse and quantized tensors, devices: what onnxgen does not rewrite."""
    model = draw.model()
    graph = model.graph
    match draw.randrange(6):
        case 0:
            info = model.training_info.add()
            info.algorithm.CopyFrom(draw.model().graph)
            info.update_binding.add(key=draw.choice(NAMES), value=draw.choice(NAMES))
        case 1:
            info = model.training_info.add()
            info.initialization.node.add(op_type="Identity", input=["x"], output=["x"])
        case 2:
            _sparse(draw, graph.sparse_initializer.add())
        case 3:
            node = graph.node.add(op_type="Constant", output=[draw.choice(("sp", "x"))])
            attribute = node.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
            _sparse(draw, attribute.sparse_tensor)
        case 4:
            note = graph.quantization_annotation.add(tensor_name=draw.choice(NAMES))
            note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=draw.choice(NAMES))
        case _:
            device = model.configuration.add(name=draw.choice(NAMES))
            device.num_devices = draw.choice((0, 1, 2**31 - 1, -1))
            draw.choice(graph.node).device_configurations.add(configuration_id=draw.choice(NAMES))
    return model


def _sparse(draw: Draw, tensor: onnx.SparseTensorProto) -> None:
    count = draw.choice((0, 1, 3))
    values = helper.make_tensor("w", TensorProto.FLOAT, [count], [1.0] * count)
    indices = [draw.choice(SIZES) for _ in range(count)]
    tensor.values.CopyFrom(values)
    tensor.indices.CopyFrom(helper.make_tensor("at", TensorProto.INT64, [count], indices))
    tensor.dims.extend(draw.choice(((4,), (), (2**40, 2**40), (-1, 3), (3, 3))))


def external(draw: Draw) -> ModelProto:
    """External data whose entries are odd: no location, no numbers, ranges that do not fit."""
    model = draw.model()
    tensors = draw.few(model.graph.initializer or [TensorProto(data_type=1, dims=[2])], 4)
    data = b"".join(tensor.raw_data for tensor in tensors)
    draw.files["w.bin"] = data[: draw.choice((len(data), len(data), len(data) // 2, 0))]
    offset = 0
    for tensor in tensors:
        entries = {"location": "w.bin", "offset": str(offset), "length": str(len(tensor.raw_data))}
        offset += len(tensor.raw_data)
        if draw.random() < 0.8:
            tensor.ClearField("raw_data")
        tensor.data_location = draw.choice((1, 1, 1, 1, 0))
        if draw.random() < 0.6:
            key = draw.choice(("location", "offset", "length", "checksum", "basepath", ""))
            odd = (
                *map(str, SIZES),
                "",
                "1e3",
                "0x10",
                " 4 ",
                "٣",
                "nan",
                "4_0",
                "w.bin",
                ".",
                "in.onnx",
            )
            entries[key] = draw.choice((*odd, "W.BIN", "./w.bin", "a\x00b", "x" * 5000))
        if draw.random() < 0.15:
            entries.pop(draw.choice(list(entries)))
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    return model
