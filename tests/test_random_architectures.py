"""Attention blocks that no exporter wrote: each is fused, and none differs.

A block is drawn from what decoders differ in: how many heads, what normalizes and rotates them,
what masks the scores, where the scale stands, how heads are repeated and how a cache lies.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from onnxgen.pipeline import FuseOptions, fuse
from tests.graphs import assert_same_numbers, outline, parse

HIDDEN, VOCABULARY = 26, 37


@dataclass(frozen=True)
class Block:
    """One attention block. K key heads of size D, each shared by G query heads."""

    kv_heads: int
    groups: int
    size: int
    value_size: int
    norm: str
    head_norm: bool
    rotary: str
    turned: int
    tables: str
    mask: str
    scale: str
    repeat: str
    cache: str
    bias: bool
    softcap: float
    guard: bool

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    size = draw(st.sampled_from([4, 8, 10, 14]))
    cache = draw(st.sampled_from(["none", "BKPD", "BPKD"]))
    rotary = draw(st.sampled_from(["none", "halves", "pairs"]))
    mask = draw(st.sampled_from(["none", "causal", "window", "padding", "causal-padding", "alibi"]))
    return Block(
        kv_heads=draw(st.sampled_from([1, 2, 3, 5])),
        groups=draw(st.sampled_from([1, 2, 3])),
        size=size,
        value_size=draw(st.sampled_from([size, size, size, 6])),
        norm=draw(st.sampled_from(["rms", "rms-pow", "layer", "none"])),
        head_norm=draw(st.booleans()),
        rotary=rotary,
        turned=draw(st.sampled_from([size, size, size // 2 // 2 * 2])),
        tables=draw(st.sampled_from(["computed", "gathered"])),
        mask=mask,
        scale=draw(st.sampled_from(["mul", "div", "on-q", "on-k", "roots", "none"])),
        repeat=draw(st.sampled_from(["expand", "tile", "gather", "five-axes", "other-way"])),
        cache=cache,
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.0, 15.0])),
        guard=draw(st.booleans()),
    )


def text_of(block: Block) -> str:
    """The block as a graph: ids in, hidden states and presents out."""
    h, k, g, d, dv = block.heads, block.kv_heads, block.groups, block.size, block.value_size
    inputs, outputs = ["int64[b,s] input_ids"], [f"float[b,s,{HIDDEN}] y"]
    weights = [
        f"float[{VOCABULARY},{HIDDEN}] table",
        f"float[{HIDDEN},{h * d}] wq",
        f"float[{HIDDEN},{k * d}] wk",
        f"float[{HIDDEN},{k * dv}] wv",
        f"float[{h * dv},{HIDDEN}] wo",
    ]
    body = ["x = Gather(table, input_ids)", *_norm(block, weights)]
    for name, count, size in (("q", h, d), ("k", k, d), ("v", k, dv)):
        body.append(f"{name}0 = MatMul(n, w{name})")
        if block.bias:
            weights.append(f"float[{count * size}] b{name}")
            body.append(f"{name}1 = Add({name}0, b{name})")
        body.append(f"{name}2 = Reshape({name}{int(block.bias)}, [0, 0, {count}, {size}])")
    for name in "qk":
        body += _head_norm(block, name, weights)
        body.append(f"{name}4 = Transpose<perm = [0, 2, 1, 3]>({name}3)")
    body.append("v4 = Transpose<perm = [0, 2, 1, 3]>(v2)")
    if block.rotary != "none":
        inputs.append("int64[b,s] position_ids")
        body += _tables(block, weights)
    for name in "qk":
        body += _rotated(block, name)
    if block.mask in ("padding", "causal-padding"):
        inputs.append("int64[b,t] attention_mask")
    total = "t" if block.cache != "none" or "padding" in block.mask else "s"
    for name, size in (("k", d), ("v", dv)):
        new = "k5" if name == "k" else "v4"
        if block.cache == "none":
            body.append(f"{name}c = Add({new}, 0.0)")
            continue
        lie = f"b,{k},p,{size}" if block.cache == "BKPD" else f"b,p,{k},{size}"
        inputs.append(f"float[{lie}] past_{name}")
        outputs.append(f"float[{lie.replace('p', total)}] present_{name}")
        if block.cache == "BKPD":
            body += [
                f"present_{name} = Concat<axis = 2>(past_{name}, {new})",
                f"{name}c = Identity(present_{name})",
            ]
        else:
            body += [
                f"{name}b = Transpose<perm = [0, 2, 1, 3]>({new})",
                f"present_{name} = Concat<axis = 1>(past_{name}, {name}b)",
                f"{name}c = Transpose<perm = [0, 2, 1, 3]>(present_{name})",
            ]
    body += _scores(block)
    body += _mask(block)
    body.append("p0 = Softmax<axis = -1>(s9)")
    body += ["na = IsNaN(p0)", "p = Where(na, 0.0, p0)"] if block.guard else ["p = Identity(p0)"]
    body.append("o0 = MatMul(p, vr)")
    if block.repeat == "five-axes" and g > 1:
        body += ["bs = Shape<end = 1>(x)", "ns = Shape<start = 1, end = 2>(x)"]
        body += [f"to = Concat<axis = 0>(bs, [{h}], ns, [{dv}])", "o1 = Reshape(o0, to)"]
    else:
        body.append("o1 = Identity(o0)")
    body += [
        "o2 = Transpose<perm = [0, 2, 1, 3]>(o1)",
        f"o3 = Reshape(o2, [0, 0, {h * dv}])",
        "o4 = MatMul(o3, wo)",
        "y = Add(x, o4)",
    ]
    signature = f"({', '.join(inputs)}) => ({', '.join(outputs)}) <{', '.join(weights)}>"
    return f"{signature} {{ {'  '.join(body)} }}"


def _norm(block: Block, weights: list[str]) -> list[str]:
    if block.norm == "none":
        return ["n = Add(x, 0.1)"]
    weights.append(f"float[{HIDDEN}] nw")
    if block.norm == "layer":
        weights.append(f"float[{HIDDEN}] nb")
        return [
            "me = ReduceMean(x, [-1])  de = Sub(x, me)  sq = Mul(de, de)  va = ReduceMean(sq, [-1])",
            "ep = Add(va, 1e-5)  ro = Sqrt(ep)  no = Div(de, ro)  nm = Mul(no, nw)  n = Add(nm, nb)",
        ]
    square = "sq = Mul(x, x)" if block.norm == "rms" else "sq = Pow(x, 2.0)"
    inverse = "ir = Pow(ep, -0.5)" if block.norm == "rms" else "ro = Sqrt(ep)  ir = Reciprocal(ro)"
    return [
        f"{square}  va = ReduceMean(sq, [-1])  ep = Add(va, 1e-5)  {inverse}  no = Mul(x, ir)",
        "n = Mul(no, nw)",
    ]


def _head_norm(block: Block, name: str, weights: list[str]) -> list[str]:
    if not block.head_norm:
        return [f"{name}3 = Identity({name}2)"]
    weights.append(f"float[{block.size}] hn{name}")
    a = f"{name}2"
    return [
        f"{name}sq = Mul({a}, {a})  {name}va = ReduceMean({name}sq, [-1])",
        f"{name}ep = Add({name}va, 1e-5)  {name}ro = Sqrt({name}ep)  {name}no = Div({a}, {name}ro)",
        f"{name}3 = Mul({name}no, hn{name})",
    ]


def _tables(block: Block, weights: list[str]) -> list[str]:
    """cos and sin, [B, 1, S, R/2]."""
    half = block.turned // 2
    if block.tables == "gathered":
        weights += [f"float[64,{half}] ct", f"float[64,{half}] st"]
        return [
            "c0 = Gather(ct, position_ids)  s00 = Gather(st, position_ids)",
            "cos = Unsqueeze(c0, [1])  sin = Unsqueeze(s00, [1])",
        ]
    frequencies = ", ".join(f"{0.7**i:.5f}" for i in range(half))
    return [
        "pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [1, 3])",
        f"an = Mul(pu, [{frequencies}])  cos = Cos(an)  sin = Sin(an)",
    ]


def _rotated(block: Block, name: str) -> list[str]:
    if block.rotary == "none":
        return [f"{name}5 = Identity({name}4)"]
    r, x = block.turned, f"{name}4"
    parts = []
    if r < block.size:
        parts.append(f"{name}pa = Slice({x}, [{r}], [1000], [-1])")
        parts.append(f"{name}tu = Slice({x}, [0], [{r}], [-1])")
        x = f"{name}tu"
    whole = f"{name}5" if r == block.size else f"{name}ro5"
    if block.rotary == "halves":
        parts += [
            f"{name}lo, {name}hi = Split<axis = -1, num_outputs = 2>({x})",
            f"{name}ng = Neg({name}hi)  {name}tt = Concat<axis = -1>({name}ng, {name}lo)",
            f"{name}cc = Concat<axis = -1>(cos, cos)  {name}ss = Concat<axis = -1>(sin, sin)",
            f"{name}xc = Mul({x}, {name}cc)  {name}ts = Mul({name}tt, {name}ss)",
            f"{whole} = Add({name}xc, {name}ts)",
        ]
    else:
        parts += [
            f"{name}ev = Slice({x}, [0], [1000], [-1], [2])",
            f"{name}od = Slice({x}, [1], [1000], [-1], [2])",
            f"{name}ec = Mul({name}ev, cos)  {name}os = Mul({name}od, sin)",
            f"{name}ra = Sub({name}ec, {name}os)  {name}oc = Mul({name}od, cos)",
            f"{name}es = Mul({name}ev, sin)  {name}rb = Add({name}oc, {name}es)",
            f"{name}r1 = Unsqueeze({name}ra, [-1])  {name}r2 = Unsqueeze({name}rb, [-1])",
            f"{name}r3 = Concat<axis = -1>({name}r1, {name}r2)",
            f"{whole} = Reshape({name}r3, [0, 0, 0, {r}])",
        ]
    if r < block.size:
        parts.append(f"{name}5 = Concat<axis = -1>({whole}, {name}pa)")
    return parts


def _scores(block: Block) -> list[str]:
    h, k, g, d, dv = block.heads, block.kv_heads, block.groups, block.size, block.value_size
    root = 1 / math.sqrt(d)
    lines = ["qr = Identity(q5)"]
    if g == 1:
        lines += ["kr = Identity(kc)", "vr = Identity(vc)"]
    elif block.repeat == "five-axes":
        lines = ["rn = Shape<start = 1, end = 2>(x)  rb0 = Shape<end = 1>(x)"]
        lines += [f"fq = Concat<axis = 0>(rb0, [{k}, {g}], rn, [{d}])  qr = Reshape(q5, fq)"]
        lines += ["kr = Unsqueeze(kc, [2])", "vr = Unsqueeze(vc, [2])"]
    elif block.repeat == "gather":
        order = ", ".join(str(i // g) for i in range(h))
        lines += [f"{n}r = Gather<axis = 1>({n}c, [{order}])" for n in "kv"]
    elif block.repeat == "other-way":
        lines += [f"{n}r = Tile({n}c, [1, {g}, 1, 1])" for n in "kv"]
    else:
        op = "Expand" if block.repeat == "expand" else "Tile"
        for n, size in (("k", d), ("v", dv)):
            lines.append(f"{n}u = Unsqueeze({n}c, [2])  {n}e = {op}({n}u, [1, 1, {g}, 1, 1])")
            lines.append(f"{n}r = Reshape({n}e, [0, {h}, -1, {size}])")
    five = block.repeat == "five-axes" and g > 1
    order = "[0, 1, 2, 4, 3]" if five else "[0, 1, 3, 2]"
    lines.append(f"kt = Transpose<perm = {order}>(kr)")
    match block.scale:
        case "mul":
            lines.append(f"s0 = MatMul(qr, kt)  s1 = Mul(s0, {root:.6f})")
        case "div":
            lines.append(f"s0 = MatMul(qr, kt)  s1 = Div(s0, {1 / root:.6f})")
        case "on-q":
            lines.append(f"qs = Mul(qr, {root:.6f})  s1 = MatMul(qs, kt)")
        case "on-k":
            lines.append(f"ks = Mul(kt, {root:.6f})  s1 = MatMul(qr, ks)")
        case "roots":
            half = math.sqrt(root)
            lines.append(f"qs = Mul(qr, {half:.6f})  ks = Mul(kt, {half:.6f})  s1 = MatMul(qs, ks)")
        case _:
            lines.append("s1 = MatMul(qr, kt)")
    if block.softcap:
        lines.append(f"ca = Div(s1, {block.softcap})  cb = Tanh(ca)  s2 = Mul(cb, {block.softcap})")
    else:
        lines.append("s2 = Identity(s1)")
    return lines


def _mask(block: Block) -> list[str]:
    if block.mask == "none":
        return ["s9 = Identity(s2)"]
    past = (
        f"pl = Shape<start = {2 if block.cache == 'BKPD' else 1}, "
        f"end = {3 if block.cache == 'BKPD' else 2}>(past_k)  pp = Squeeze(pl, [0])"
        if block.cache != "none"
        else "sp = Shape<start = 1, end = 2>(input_ids)  sq0 = Squeeze(sp, [0])  pp = Sub(sq0, sq0)"
    )
    lines = [
        f"{past}  sl = Shape<start = 1, end = 2>(input_ids)  sn = Squeeze(sl, [0])",
        "tt = Add(pp, sn)  cols = Range(0, tt, 1)  rows = Range(pp, tt, 1)",
        "ru = Unsqueeze(rows, [1])  ca0 = LessOrEqual(cols, ru)  ds = Sub(ru, cols)",
        "wi = Less(ds, 4)",
    ]
    if "padding" in block.mask:
        lines.append("am = Cast<to = 9>(attention_mask)  au = Unsqueeze(am, [1, 2])")
    keep = {
        "causal": "mk = Identity(ca0)",
        "window": "mk = And(ca0, wi)",
        "padding": "mk = Identity(au)",
        "causal-padding": "mk = And(ca0, au)",
        "alibi": "mk = Identity(ca0)",
    }[block.mask]
    lines.append(keep)
    five = block.repeat == "five-axes" and block.groups > 1
    lines.append(
        "keep = Unsqueeze(mk, [1])" if five and "padding" in block.mask else "keep = Identity(mk)"
    )
    if block.mask == "alibi":
        slopes = ", ".join(f"{0.5 / (i + 1):.4f}" for i in range(block.heads))
        shape = f"[{block.kv_heads}, {block.groups}, 1, 1]" if five else f"[{block.heads}, 1, 1]"
        lines.append(f"sf = Reshape([{slopes}], {shape})  df = Cast<to = 1>(ds)  al = Mul(df, sf)")
        lines.append("ng0 = Neg(al)  s3 = Add(s2, ng0)  s9 = Where(keep, s3, -inf)")
    elif block.mask == "padding":
        lines.append("bi = Where(keep, 0.0, -3.4028235e38)  s9 = Add(s2, bi)")
    elif block.mask == "window":
        lines.append("bi = Where(keep, 0.0, -inf)  s9 = Add(s2, bi)")
    else:
        lines.append("s9 = Where(keep, s2, -inf)")
    return lines


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(blocks())
def test_a_block_is_fused_and_never_differs(block: Block) -> None:
    proto = parse(text_of(block))
    lengths = [{"b": 2, "s": 5, "p": 7, "t": 12}, {"b": 3, "s": 1, "p": 4, "t": 5}]
    if block.cache == "none":
        lengths = [{**each, "t": each["s"]} for each in lengths]
    assert_same_numbers(proto, proto, lengths)  # the block itself runs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.onnx"
        path.write_bytes(proto.SerializeToString())
        report = fuse(path, FuseOptions(), lambda message: None)
        note("\n".join(outline(proto)))
    assert report.proof is not None
    assert report.proof.status == "proven"
    attention = [site for site in report.sites if site.kind == "attention"]
    assert len(attention) == 1, "one Softmax, one answer"
    for site in report.sites:
        assert site.status == "fused", site
    (site,) = attention
    assert "Softmax" not in report.ops_after
    # Heads that are repeated in turns are shared by no neighbours: they stay as they are.
    turns = block.repeat == "other-way" and block.groups > 1 and block.kv_heads > 1
    assert site.details["heads"] == str(block.heads)
    assert site.details["kv_heads"] == str(block.heads if turns else block.kv_heads)
    assert site.details["head_size"] == str(block.size)
    wanted = 1.0 if block.scale == "none" else 1 / math.sqrt(block.size)
    assert np.isclose(float(site.details["scale"]), wanted, rtol=1e-4)
    concatenated = block.cache != "none" and not turns
    assert (site.details["cache"] == "concatenated") == concatenated
    norms = (block.norm != "none") + 2 * block.head_norm
    found = report.ops_after.get("RMSNormalization", 0) + report.ops_after.get(
        "LayerNormalization", 0
    )
    assert found == norms
    assert report.ops_after.get("RotaryEmbedding", 0) == 2 * (block.rotary != "none")
