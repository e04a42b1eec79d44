"""The paged functions against numpy: what is read, what is written, what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxgen import functions
from onnxgen.functions import paged_attention, paged_plan
from onnxgen.runtime import RuntimeFailure
from tests.graphs import runtime

H, K, D, V, BS, NB = 4, 2, 8, 6, 4, 40
NEW, PAST = (5, 1, 9, 0, 3), (0, 13, 6, 5, 0)


def model(
    parts: dict[str, bool], plan: str, *, mapped: bool = False, pool: int = 1
) -> onnx.ModelProto:
    """A graph of one attention on the inputs that a paged model has."""
    info, made = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    overload = paged_attention.overload_of(**parts)
    slopes = ["slopes"] if "slopes" in plan else []
    size: dict[str, Any] = {"domain": "onnxgen"}
    keys = {name: 3 for name in ("window", "chunk") if name in plan}
    tokens = ["cumulative", "past", "table", "q", *(["mapping"] if mapped else [])]
    given = ["q", "k", "v", "kc", "vc", "places", "slots", "mask", "spread", "collect"]
    if parts.get("shared"):
        given[1] = given[2] = given[5] = ""
    outputs = ["y"] if parts.get("shared") else ["y", "kc_out", "vc_out"]
    scores = {
        "num_heads": H,
        "kv_num_heads": K,
        "scale": 0.3,
        **({"softcap": 2.0} if parts.get("cap") else {}),
    }
    nodes = [
        made(
            "PagedTokens",
            tokens,
            ["positions", "totals", "places", "spread", "collect"],
            block_size=BS,
            overload="mapped" if mapped else "",
            **size,
        ),
        made(
            "PagedKeys",
            ["cumulative", "past", "table", *slopes],
            ["slots", "mask"],
            block_size=BS,
            overload=plan,
            **keys,
            **size,
        ),
        made(
            "PagedAttention",
            [*given, *(["sinks"] if parts.get("sinks") else [])],
            outputs,
            overload=overload,
            **scores,
            **size,
        ),
    ]
    inputs = [
        info("q", 1, ["N", H * D]),
        info("cumulative", 6, ["B1"]),
        info("past", 6, ["B"]),
        info("table", 6, ["B", "M"]),
        info("kc", pool, [NB, BS, K, D]),
        info("vc", pool, [NB, BS, K, V]),
    ]
    if not parts.get("shared"):
        inputs += [info("k", 1, ["N", K * D]), info("v", 1, ["N", K * V])]
    if mapped:
        inputs.append(info("mapping", 6, ["N"]))
    if slopes:
        inputs.append(info("slopes", 1, [H]))
    if parts.get("sinks"):
        inputs.append(info("sinks", 1, [H]))
    kinds = {"y": 1, "kc_out": pool, "vc_out": pool}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        inputs,
        [info(name, kinds[name], None) for name in outputs] + [info("positions", 7, None)],
    )
    found = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("onnxgen", 1)],
    )
    found.ir_version = 11
    with_bodies = ir.from_proto(found)
    functions.declare(with_bodies)
    return ir.to_proto(with_bodies)


def feeds(seed: int = 0, pool: Any = np.float32) -> dict[str, Any]:
    """A run of five sequences, blocks shuffled, NaN wherever nothing was written yet."""
    rng = np.random.default_rng(seed)
    order = iter(rng.permutation(NB))
    table = np.full((len(NEW), 6), -1, np.int32)
    kc, vc = np.full((NB, BS, K, D), np.nan, pool), np.full((NB, BS, K, V), np.nan, pool)
    for row, (new, past) in enumerate(zip(NEW, PAST, strict=True)):
        for place in range(-(-(new + past) // BS)):
            table[row, place] = next(order)
        for j in range(past):
            kc[table[row, j // BS], j % BS] = rng.standard_normal((K, D))
            vc[table[row, j // BS], j % BS] = rng.standard_normal((K, V))
    n = sum(NEW)
    return {
        "q": rng.standard_normal((n, H * D), np.float32),
        "k": rng.standard_normal((n, K * D), np.float32),
        "v": rng.standard_normal((n, K * V), np.float32),
        "cumulative": np.array([0, *itertools.accumulate(NEW)], np.int32),
        "past": np.array(PAST, np.int32),
        "table": table,
        "kc": kc,
        "vc": vc,
        "slopes": np.array([-0.5, -0.25, 0.1, 0.0], np.float32),
        "sinks": rng.standard_normal(H).astype(np.float32),
    }


def wanted(
    given: dict[str, Any], parts: dict[str, bool], plan: str, skipped: tuple[int, ...] = ()
) -> Any:
    """The outputs in numpy, token by token."""
    kc, vc = given["kc"].copy(), given["vc"].copy()
    y, positions = np.zeros((len(given["q"]), H, V)), []
    tokens = [
        (row, past + i)
        for row, (new, past) in enumerate(zip(NEW, PAST, strict=True))
        for i in range(new)
    ]
    if not parts.get("shared"):
        for token, (row, at) in enumerate(tokens):
            if token not in skipped:
                kc[given["table"][row, at // BS], at % BS] = given["k"][token].reshape(K, D)
                vc[given["table"][row, at // BS], at % BS] = given["v"][token].reshape(K, V)
    for token, (row, at) in enumerate(tokens):
        positions.append(at)
        first = max(at - 2, 0) if "window" in plan else at // 3 * 3 if "chunk" in plan else 0
        places = np.arange(first, at + 1)
        block = given["table"][row, places // BS]
        for head in range(H):
            k, v = (
                pool[block, places % BS, head // (H // K)].astype(np.float64) for pool in (kc, vc)
            )
            scores = 0.3 * k @ given["q"][token].reshape(H, D)[head]
            if parts.get("cap"):
                scores = np.tanh(scores / 2) * 2
            if "slopes" in plan:
                scores = scores + given["slopes"][head] * (places - at)
            if parts.get("sinks"):
                scores, v = np.append(scores, given["sinks"][head]), np.vstack([v, np.zeros(V)])
            p = np.exp(scores - scores.max())
            y[token, head] = p / p.sum() @ v
    return y.reshape(len(y), -1), kc, vc, positions


def run(proto: onnx.ModelProto, given: dict[str, Any]) -> dict[str, Any]:
    session = runtime().load(proto.SerializeToString())
    try:
        return runtime().run(session, {each.name: given[each.name] for each in proto.graph.input})
    finally:
        runtime().unload(session)


CASES = [
    ({}, ""),
    ({}, "window"),
    ({}, "chunk"),
    ({"bias": True}, "slopes"),
    ({"bias": True}, "window_slopes"),
    ({"cap": True}, ""),
    ({"sinks": True}, "window"),
    ({"sinks": True, "bias": True, "cap": True, "float": True}, "slopes"),
    ({"cast": True}, ""),
]


@pytest.mark.parametrize(("parts", "plan"), CASES, ids=repr)
def test_a_ragged_run_is_what_numpy_computes(parts: dict[str, bool], plan: str) -> None:
    cast = parts.get("cast", False)
    given = feeds(pool=np.float16 if cast else np.float32)
    found = run(model(parts, plan, pool=10 if cast else 1), given)
    y, kc, vc, positions = wanted(given, parts, plan)
    assert np.abs(found["y"] - y).max() < (5e-3 if cast else 2e-6)
    assert found["kc_out"].tobytes() == kc.tobytes()
    assert found["vc_out"].tobytes() == vc.tobytes()
    assert found["positions"].tolist() == positions


def test_a_layer_that_shares_reads_what_another_wrote() -> None:
    given = feeds()
    _, given["kc"], given["vc"], _ = wanted(given, {}, "")
    found = run(model({"shared": True}, ""), given)
    assert np.abs(found["y"] - wanted(given, {"shared": True}, "")[0]).max() < 2e-6


@pytest.mark.parametrize("skipped", [(), (0, 1, 2, 3, 4), (7, 5)], ids=repr)
def test_a_slot_mapping_of_minus_one_writes_nothing(skipped: tuple[int, ...]) -> None:
    given = feeds()
    full = wanted(given, {}, "")
    for pool, old in (("kc", full[1]), ("vc", full[2])):  # what is skipped is there already
        given[pool] = old
    rows = [
        (row, past + i)
        for row, (new, past) in enumerate(zip(NEW, PAST, strict=True))
        for i in range(new)
    ]
    slots = [given["table"][row, at // BS] * BS + at % BS for row, at in rows]
    given["mapping"] = np.array([-1 if i in skipped else s for i, s in enumerate(slots)], np.int32)
    given["k"][list(skipped)] = np.nan
    found = run(model({"mapped": True}, "", mapped=True), given)
    assert np.abs(found["y"] - full[0]).max() < 2e-6
    assert found["kc_out"].tobytes() == full[1].tobytes()


def test_nothing_is_written_where_no_slot_is_mapped() -> None:
    given = feeds()
    _, given["kc"], given["vc"], _ = wanted(given, {}, "")
    given["mapping"] = np.full(sum(NEW), -1, np.int32)
    found = run(model({"mapped": True}, "", mapped=True), given)
    assert found["kc_out"].tobytes() == given["kc"].tobytes()


@pytest.mark.parametrize(
    "broken", ["no block for a new token", "no block for a past one", "too few tokens", "too many"]
)
def test_what_cannot_be_meant_fails(broken: str) -> None:
    given = feeds()
    match broken:
        case "no block for a new token":
            given["table"][0, 1] = -1
        case "no block for a past one":
            given["table"][1, 0] = -1
        case "too few tokens":
            given["cumulative"][-1] += 1
        case "too many":
            given["cumulative"][-1] -= 1
    with pytest.raises(RuntimeFailure):
        run(model({}, ""), given)


@pytest.mark.parametrize("name", [paged_plan.TOKENS, paged_plan.KEYS, paged_attention.NAME])
def test_other_overloads_are_none(name: str) -> None:
    with pytest.raises(KeyError):
        functions.DEFINITIONS[name]("cap_window_shared", 24)
