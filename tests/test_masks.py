"""What a mask may be called, and where too little is known of it to call it anything."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxgen.analysis.masks import MaskFamily, read_mask
from onnxgen.analysis.roles import find_roles
from onnxgen.analysis.sampling import Sampler
from tests.graphs import parse, runtime

LENGTHS = (
    "sh = Shape(mask)  tt = Gather(sh, 1)  si = Shape(ids)  ns = Gather(si, 1)  np = Sub(tt, ns)"
    "  rk = Range(0, tt, 1)  r0 = Range(0, ns, 1)  rq = Add(r0, np)  ru = Unsqueeze(rq, [1])"
    "  ca = LessOrEqual(rk, ru)  mb = Cast<to = 9>(mask)  mu = Unsqueeze(mb, [1, 2])  "
)
PADDED = "keep = And(ok, mu)  m = Where(keep, 0.0, -3.4028235e38)"


def family(mask: str, inputs: str = "", past: bool = True) -> MaskFamily:
    """What the value `m` means in a graph over ids, mask, positions and a cache."""
    cache = "float[b,2,p,8] pk" if past else ""
    lines = "k = Concat<axis = 2>(pk, xt)" if past else "k = Identity(xt)"
    model = parse(
        f"(int64[b,s] ids, int64[b,t] mask, int64[b,s] position_ids{inputs}, {cache})"
        f" => (float[b,2,t,8] k, float[b,1,s,t] y) <float[50,16] table> {{"
        " x = Gather(table, ids)  x4 = Reshape(x, [0, 0, 2, 8])"
        f" xt = Transpose<perm = [0, 2, 1, 3]>(x4)  {lines}  {LENGTHS} {mask}  y = Identity(m) }}".replace(
            ", )", ")"
        )
    )
    made = ir.from_proto(model)
    roles = find_roles(made, {"mask": "mask", "position_ids": "positions"})
    sampler = Sampler(made.graph, roles, runtime())
    (value,) = [out for node in made.graph for out in node.outputs if out.name == "m"]
    value.dtype = value.dtype or ir.DataType.FLOAT
    return read_mask(value, sampler)


def test_a_plain_mask_is_named() -> None:
    assert family(f"ok = Identity(ca)  {PADDED}") == MaskFamily("causal", padding=True)


@pytest.mark.parametrize(
    ("ok", "inputs", "named"),
    [
        (
            "nz = Equal(ids, 7)  nn = Not(nz)  nu = Unsqueeze(nn, [1, 3])  ok = And(ca, nu)",
            "",
            "ids",
        ),
        ("pf = Less(rk, prefix)  ok = Or(ca, pf)", ", int64 prefix", "prefix"),
        ("fo = Not(flag)  ok = Or(ca, fo)", ", bool flag", "flag"),
        (
            "se = Unsqueeze(lens, [1, 2, 3])  le = Less(rk, se)  ok = And(ca, le)",
            ", int64[b] lens",
            "lens",
        ),
        # As long as a number that an input holds: its size is read, and is not the input's own.
        (
            "fr = Range(0, prefix, 1)  fs = Shape(fr)  pf = Less(rk, fs)  ok = Or(ca, pf)",
            ", int64 prefix",
            "prefix",
        ),
    ],
)
def test_what_another_input_holds_may_be_anything(ok: str, inputs: str, named: str) -> None:
    found = family(f"{ok}  {PADDED}", inputs)
    assert found.kind == "general"
    assert repr(named) in found.reason


def test_a_size_is_no_value() -> None:
    """The cache's length is read off what is joined from it; nothing that it holds is."""
    found = family(
        "ks = Shape(k)  kt = Gather(ks, 2)  rt = Range(0, kt, 1)  ok = LessOrEqual(rt, ru)"
        f"  {PADDED}"
    )
    assert str(found) == "causal, key padding"


def test_positions_that_a_mask_follows_from_are_told() -> None:
    found = family(
        "pu = Unsqueeze(position_ids, [1, 3])  ok = LessOrEqual(rk, pu)"
        "  m = Where(ok, 0.0, -3.4028235e38)"
    )
    # Left padding shifts them: then fewer keys are seen than a causal mask shows.
    assert found.kind == "general"
    found = family(
        "pu = ReduceMax(position_ids)  ok = LessOrEqual(rk, ru)  p0 = Mul(pu, 0)"
        "  z = Equal(p0, 0)  oz = And(ok, z)  kp = And(oz, mu)  m = Where(kp, 0.0, -3.4028235e38)"
    )
    assert (str(found), found.counted) == ("causal, key padding", ("position_ids",))


@pytest.mark.parametrize("size", [9000, 20000])
def test_a_window_longer_than_the_longest_probe(size: int) -> None:
    found = family(f"di = Sub(ru, rk)  nw = Less(di, {size})  ok = And(ca, nw)  {PADDED}")
    assert str(found) == f"window {size}, key padding"


def test_a_chunk_longer_than_the_longest_probe() -> None:
    found = family(
        "fq = Cast<to = 1>(ru)  fk = Cast<to = 1>(rk)  dq = Div(fq, 9000.0)  dk = Div(fk, 9000.0)"
        f"  iq = Floor(dq)  ik = Floor(dk)  eq = Equal(iq, ik)  ok = And(ca, eq)  {PADDED}"
    )
    assert str(found) == "chunked 9000, key padding"


@pytest.mark.parametrize(
    "ok",
    [
        # Beyond what is run, and a place where one token sees all.
        "di = Sub(ru, rk)  nw = Less(di, 900000)  ok = And(ca, nw)",
        "at = Equal(ru, 6000)  ok = Or(ca, at)",
    ],
)
def test_lengths_that_no_family_covers(ok: str) -> None:
    assert family(f"{ok}  {PADDED}").kind == "general"


def test_a_window_of_a_model_without_a_cache() -> None:
    found = family(f"di = Sub(ru, rk)  nw = Less(di, 400)  ok = And(ca, nw)  {PADDED}", past=False)
    assert str(found) == "window 400, key padding"


def test_a_mask_from_a_rows_first_token_to_its_last() -> None:
    """What stands between them is shown, whatever the attention mask says of it."""
    found = family(
        "no = Sub(1, mask)  pl = Mul(no, 99999)  rs = Add(rk, pl)"
        "  fi = ReduceMin(rs, [1])  ml = Mul(rk, mask)  la = ReduceMax(ml, [1])"
        "  fu = Unsqueeze(fi, [1, 2])  lu = Unsqueeze(la, [1, 2])"
        "  af = GreaterOrEqual(rk, fu)  be = LessOrEqual(rk, lu)  in = And(af, be)"
        "  kp = And(ca, in)  m = Where(kp, 0.0, -3.4028235e38)"
    )
    assert found.kind == "general"


def test_a_mask_that_hides_what_others_show() -> None:
    """Where it is 1 a key is hidden: no row of the longest probe sees anything."""
    found = family("mn = Not(mu)  ok = And(ca, mn)  m = Where(ok, 0.0, -3.4028235e38)")
    assert found.kind == "general"


@pytest.mark.parametrize(("fill", "faint"), [("-10000.0", True), ("-3.4028235e38", False)])
def test_a_number_that_a_large_score_outweighs(fill: str, faint: bool) -> None:
    found = family(f"keep = And(ca, mu)  m = Where(keep, 0.0, {fill})")
    assert (str(found), found.faint) == ("causal, key padding", faint)
