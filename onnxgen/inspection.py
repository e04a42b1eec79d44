"""What a model is: `onnxgen inspect`.

read -> what the file says (weights, opset, writer)
     -> normalize, raise without checks -> attentions, caches, experts
     -> what each target would make of it
Nothing is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, producer
from onnxgen.analysis.masks import MaskFamily
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.errors import OnnxgenError, RefusedError
from onnxgen.functions import moe
from onnxgen.model_io import DROPPED, data_files, read_model
from onnxgen.passes.normalize import normalize
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.pipeline_paged import PageOptions, to_paged
from onnxgen.report.inspection import Attending, Inspection, Port, Takes
from onnxgen.report.values import Report
from onnxgen.runtime import Runtime
from onnxgen.stages import Progress, Work, continuing, count_ops, raise_part
from onnxgen.targets import onnx as onnx_target
from onnxgen.targets.contract import Contract, read_contract
from onnxgen.targets.genai import hidden_size
from onnxgen.targets.paged import KEY as PAGED
from onnxgen.tensor_slots import tensor_slots
from onnxgen.twin import unrunnable_types

_QUANTISED = frozenset(
    {"MatMulNBits", "DequantizeLinear", "QMoE", "MatMulInteger", "QLinearMatMul", "QGemm"}
    | {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "GatherBlockQuantized", "QAttention"}
)


def inspect(path: Path, roles: Mapping[str, str], progress: Progress) -> Inspection:
    """Say what a model is and which targets it could take.

    Args:
        path: the model.
        roles: what inputs are for, by name, where structure does not tell.

    Raises:
        FileError: the model cannot be read.
        UsageError: a role does not fit.
        RefusedError: the model cannot be brought to the standard's opset.
    """
    progress(f"reading {path.name}")
    model = read_model(path)
    found = Inspection(str(path), bytes=_size(path, model), written_by=_writer(model))
    found.ops = count_ops(model)
    found.nodes = sum(found.ops.values())
    found.domains = {each: v for each, v in model.graph.opset_imports.items() if each}
    found.opset = model.graph.opset_imports.get("", 0)
    found.quantised = {op: count for op, count in found.ops.items() if op in _QUANTISED}
    contract = read_contract(model)
    found.contract = str(contract) if contract != Contract() else ""
    found.backends = list(model.meta.get(DROPPED, ()))
    _weights(found, model)
    paged = PAGED in model.metadata_props  # whose inputs are no decoder's
    with Runtime(twins=unrunnable_types(model)) as runtime:
        part, known = continuing(model, roles)
        found.inputs = [
            Port(each.name, str(each.dtype).lower(), _dims(each.shape), "" if paged else each.role)
            for each in known.inputs.values()
        ]
        found.outputs = [
            Port(
                each.name,
                str(each.dtype).lower(),
                _dims(each.shape or ()),
                "" if paged else each.role,
            )
            for each in known.outputs.values()
        ]
        _caches(found, known)
        if paged:
            _paged(found, model)
            return found
        progress("raising")
        opset = onnx_target.opset_for(found.opset, None)
        report = Report(input=str(path), output="", target="onnx")
        found.warnings += normalize(part.model, opset, runtime, known)
        sampler = Sampler(part.model.graph, known, runtime)
        families = raise_part(report, Work(part, known, sampler, ()), runtime)
        _raised(found, Facts(part.model.graph, known), known, families)
    kept = Counter(site.kind for site in report.sites if site.status != "fused")
    found.kept = dict(kept)
    fused = sum(site.status == "fused" for site in report.sites)
    said = f"{fused} sites are fused, {sum(kept.values())} are not"
    found.targets.append(Takes("onnx", True, said if report.sites else "nothing is left to fuse"))
    progress("asking the targets")
    found.targets += [_ort(path, roles, progress), _pages(path, roles, progress)]
    return found


def _size(path: Path, model: ir.Model) -> int:
    return sum(file.stat().st_size for file in (path, *data_files(model)))


def _writer(model: ir.Model) -> str:
    names = [model.producer_name or "", model.producer_version or ""]
    return " ".join(filter(None, names))


def _dims(shape: tuple[object, ...]) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


def _weights(found: Inspection, model: ir.Model) -> None:
    """Parameters, by element type; what is shared counts once."""
    sizes: Counter[str] = Counter()
    for tensor in {id(slot.tensor): slot.tensor for slot in tensor_slots(model)}.values():
        if tensor.size > 1 and tensor.dtype != ir.DataType.STRING:
            found.parameters += tensor.size
            sizes[str(tensor.dtype).lower()] += tensor.nbytes
    found.weights = dict(sizes.most_common())
    found.precision = next(iter(found.weights), "")


def _caches(found: Inspection, roles: Roles) -> None:
    """How keys and values are kept, and what a token takes; what the model is for."""
    pairs = roles.pairs
    if not pairs:
        tokens = roles.named("ids") or roles.named("embeds")
        found.kind = "model of tokens, without caches" if tokens else "other"
        return
    found.kind = "decoder with caches"
    first = pairs[0]
    if first.static:
        found.cache = f"static, {roles.static_length} places"
    elif first.cap is not None:
        found.cache = f"cropped to {first.cap} tokens"
    else:
        found.cache = "counted" if first.counted else "growing"
    kinds = {str(roles.inputs[pair.past].dtype).lower() for pair in pairs}
    found.cache_dtype = ", ".join(sorted(kinds))
    rows = [_row(roles, pair.past, pair.axis) for pair in pairs]
    found.kv_bytes_per_token = 0 if None in rows else sum(row or 0 for row in rows)


def _row(roles: Roles, name: str, axis: int) -> int | None:
    """Bytes of one token's row of one cache, of one sequence."""
    role = roles.inputs[name]
    count = 1
    for index, (size, letter) in enumerate(zip(role.shape, role.axes, strict=True)):
        if index == axis or letter == "B":
            continue
        if not isinstance(size, int):
            return None
        count *= size
    return count * role.dtype.bitwidth // 8


def _paged(found: Inspection, model: ir.Model) -> None:
    """What a paged model says of itself."""
    told = json.loads(model.metadata_props[PAGED])
    found.kind, found.cache = "paged decoder", f"paged, blocks of {told['block_size']} tokens"
    found.contract = "; ".join(told["contract"])
    pools = [each for each in model.graph.inputs if each.shape is not None and len(each.shape) == 4]
    found.kv_bytes_per_token = sum(
        int(pool.shape[2]) * int(pool.shape[3]) * pool.dtype.bitwidth // 8
        for pool in pools
        if pool.shape is not None
        and pool.dtype is not None
        and isinstance(pool.shape[2], int)
        and isinstance(pool.shape[3], int)
    )
    found.cache_dtype = ", ".join(sorted({str(pool.dtype).lower() for pool in pools}))
    layers: Counter[Attending] = Counter()
    for node in model.graph:
        if node.op_type == "PagedAttention":
            heads = int(attribute(node, "num_heads", 0))
            kv_heads = int(attribute(node, "kv_num_heads", heads))
            size = next((p.shape[3] for p in pools if p in node.inputs and p.shape is not None), 0)
            width = size if isinstance(size, int) else 0
            layers[Attending(0, heads, kv_heads, width, "", "")] += 1
    found.attentions = [_counted(each, count) for each, count in layers.items()]
    found.targets = [Takes("paged", False, "it is paged already")]


def _counted(each: Attending, layers: int) -> Attending:
    return Attending(layers, *(getattr(each, name) for name in each.__match_args__[1:]))


def _raised(
    found: Inspection, facts: Facts, roles: Roles, families: Mapping[str, MaskFamily]
) -> None:
    """What the standard's operators show."""
    attentions = Counter(_attentions(facts, families))
    found.attentions = [_counted(each, count) for each, count in attentions.items()]
    tokens = {each.name for each in roles.named("ids")}
    found.hidden_size = hidden_size(facts.graph, tokens, facts.shapes) or 0
    rows = [each for each in roles.outputs.values() if each.role == "rows" and each.shape]
    last = rows[0].shape[-1] if rows and rows[0].shape else 0
    found.vocabulary = last if isinstance(last, int) and last != found.hidden_size else 0
    for node in facts.graph:
        if node.domain == functions.DOMAIN and node.op_type == moe.NAME:
            stack = facts.shapes.of(node.inputs[moe.FC1]) or (0,)
            chosen = facts.shapes.of(node.inputs[1]) or (0,)
            found.experts = stack[0] if isinstance(stack[0], int) else 0
            slots = chosen[-1] if isinstance(chosen[-1], int) else 0
            found.experts_per_token = slots if slots < found.experts else 0


def _attentions(facts: Facts, families: Mapping[str, MaskFamily]) -> Iterator[Attending]:
    for node in facts.graph:
        if node.op_type not in ("Attention", "SinkAttention") or node.domain == "com.microsoft":
            continue
        q, k = (facts.shapes.of(node.inputs[index]) or () for index in range(2))
        if len(q) == 4 and len(k) == 4:
            sizes = (q[1], k[1], q[3])
        else:
            heads = int(attribute(node, "q_num_heads", 0))
            width = q[-1] if q else 0
            size = width // heads if heads and isinstance(width, int) else 0
            sizes = (heads, int(attribute(node, "kv_num_heads", 0)), size)
        heads, kv_heads, size = (each if isinstance(each, int) else 0 for each in sizes)
        family = families.get(node.name or "")
        mask = "none" if family is None else str(family)
        if family is None and attribute(node, "is_causal", 0):
            mask = "causal"
        if family is not None and family.reason:
            mask = f"{mask}: {family.reason}"
        cap, sinks = float(attribute(node, "softcap", 0.0)), node.op_type == "SinkAttention"
        yield Attending(0, heads, kv_heads, size, mask, _rotary(facts, node, size), cap, sinks)


def _rotary(facts: Facts, node: ir.Node, size: int) -> str:
    """How the queries are rotated, looked for through views and parts that are joined."""
    pending, seen = [node.inputs[0]], set[ir.Value]()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        maker = producer(value)
        if maker is None:
            continue
        if maker.op_type == "RotaryEmbedding":
            turned = int(attribute(maker, "rotary_embedding_dim", 0))
            shape = facts.shapes.of(maker.inputs[0]) or ()
            whole = shape[-1] if len(shape) == 4 and isinstance(shape[-1], int) else size
            how = "neighbours" if attribute(maker, "interleaved", 0) else "halves"
            return f"{turned or whole} of {size}, {how}"
        if maker.op_type in (
            "Reshape",
            "Transpose",
            "Concat",
            "Mul",
            "Cast",
            "Unsqueeze",
            "Gather",
        ):
            pending += maker.inputs
    return "none"


def _ort(path: Path, roles: Mapping[str, str], progress: Progress) -> Takes:
    """What `--target ort` would make of it."""
    try:
        options = FuseOptions(target="ort", verify=False, roles=roles, check=True)
        report = fuse(path, options, progress)
    except OnnxgenError as error:
        return Takes("ort", False, str(error))
    done = Counter(site.kind for site in report.lowered if site.status == "fused")
    kept = Counter(
        site.decline.reason for site in report.lowered if site.status != "fused" and site.decline
    )
    said = ", ".join(f"{count} {kind}" for kind, count in done.items()) or "no operator of its own"
    why = "".join(f"; {count} not: {reason}" for reason, count in kept.items())
    return Takes("ort", True, said + why)


def _pages(path: Path, roles: Mapping[str, str], progress: Progress) -> Takes:
    """Whether `to-paged` could page it."""
    options = PageOptions(path.with_name("unused"), check=True, verify=False, roles=roles)
    try:
        report = to_paged(path, options, progress)
    except RefusedError as error:
        paging = None if error.report is None else error.report.paging
        if paging is None or not paging.obstacles:
            return Takes("paged", False, str(error))
        first = paging.obstacles[0]
        return Takes("paged", False, f"{first.code}: {first.reason}")
    paging = report.paging
    assert paging is not None
    said = f"{paging.layers} layers, {paging.token_bytes:,} bytes a token"
    return Takes("paged", True, said)
