"""How fast a mixture of experts runs: as an exporter batches it, and as each target says it.

    python tests/bench/bench_moe.py

16 experts, hidden and inner size 512, two for each token, gated by silu, routed by softmax and
top-k, renormalised. Three models with the same weights:

    export   torch.export's batched form: the chosen weights of every token are gathered
    onnx     `--target onnx`: onnxgen::MoE, its body a Scan over experts
    ort      `--target ort`: com.microsoft MoE with the router inside

Runs take turns; the fastest of several counts. Aim: `ort` at least 3 times the export at 1 and at
128 tokens, neither target ever slower. Nothing is asserted but that all three compute the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from common import fused, print_table
from onnx import numpy_helper

from onnxgen import functions
from onnxgen.functions import moe

TOKENS = (1, 16, 128, 1024)
LONG = 3.0  # seconds: what takes longer is run once
ROUTER = """
    logits = MatMul(x, R)
    p = Softmax<axis = -1>(logits)
    k = Constant<value_ints = [2]>()
    v, i = TopK<axis = -1>(p, k)
    one = Constant<value_ints = [1]>()
    last = Constant<value_ints = [-1]>()
    s = ReduceSum(v, last)
    w = Div(v, s)
"""
EXPORT = """
    xu = Unsqueeze(x, one)
    twice = Constant<value_ints = [1, 2, 1]>()
    xe = Expand(xu, twice)
    rows = Constant<value_ints = [-1, HIDDEN]>()
    xr = Reshape(xe, rows)
    flat = Reshape(i, last)
    at = Unsqueeze(flat, last)
    g1 = GatherND(W1, at)
    xc = Unsqueeze(xr, last)
    m1 = MatMul(g1, xc)
    h = Squeeze(m1, last)
    a, b = Split<axis = 1, num_outputs = 2>(h)
    sa = Sigmoid(a)
    ga = Mul(a, sa)
    gb = Mul(ga, b)
    g2 = GatherND(W2, at)
    gc = Unsqueeze(gb, last)
    m2 = MatMul(g2, gc)
    o = Squeeze(m2, last)
    wf = Reshape(w, last)
    wu = Unsqueeze(wf, last)
    ow = Mul(o, wu)
    slots = Constant<value_ints = [-1, 2, HIDDEN]>()
    os = Reshape(ow, slots)
    y = ReduceSum<keepdims = 0>(os, one)
"""
OURS = "    y = onnxgen.MoE(x, w, i, W1, , W2)\n"


def model(body: str, sizes: tuple[int, int, int]) -> onnx.ModelProto:
    """Router and experts; weights are the same for the same sizes."""
    experts, hidden, inner = sizes
    made = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24, "onnxgen" : 1]> g '
        f"(float[t,{hidden}] x) => (float[t,{hidden}] y) "
        f"{{ {ROUTER} {body.replace('HIDDEN', str(hidden))} }}"
    )
    rng = np.random.default_rng(0)
    for name, shape in {
        "R": (hidden, experts),
        "W1": (experts, 2 * inner, hidden),
        "W2": (experts, hidden, inner),
    }.items():
        array = rng.standard_normal(shape) / np.sqrt(shape[-1 if len(shape) > 2 else 0])
        made.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    if body is OURS:
        made.graph.node[-1].overload = "swiglu"
        own = ir.node(moe.NAME, [], domain=functions.DOMAIN, overload="swiglu")
        made.functions.extend(functions.called([own], 24))
    else:
        del made.opset_import[1]
    return made


def files(folder: Path, sizes: tuple[int, int, int]) -> dict[str, Path]:
    """The three models, written."""
    paths = {}
    for name, body in (("export", EXPORT), ("ours", OURS)):
        paths[name] = folder / f"{name}.onnx"
        onnx.save(model(body, sizes), paths[name])
    ours = paths.pop("ours")
    return {**paths, **{target: fused(ours, target) for target in ("onnx", "ort")}}


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def fastest(sessions: dict[str, Any], x: Any, seconds: float) -> dict[str, float]:
    """Milliseconds of each, the least of as many turns as fit into some seconds, two at least."""
    best = dict.fromkeys(sessions, np.inf)
    wanted: Any = None
    end, turn = time.perf_counter() + seconds, 0
    while turn < 2 or time.perf_counter() < end:
        for name, each in sessions.items():
            if turn and best[name] > LONG * 1e3:
                continue
            began = time.perf_counter()
            (y,) = each.run(None, {"x": x})
            best[name] = min(best[name], (time.perf_counter() - began) * 1e3)
            wanted = y if wanted is None else wanted
            if not np.allclose(y, wanted, atol=1e-5 * np.abs(wanted).max()):
                sys.exit(f"{name} differs by {np.abs(y - wanted).max():.1e}")
        turn += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        paths = files(Path(folder), (options.experts, options.hidden, options.inner))
        for threads in (2, 1):
            sessions = {name: session(path, threads) for name, path in paths.items()}
            for tokens in options.tokens:
                x = np.random.default_rng(tokens).standard_normal((tokens, options.hidden))
                best = fastest(sessions, x.astype(np.float32), options.seconds)
                row = [f"{best[name]:.2f}" for name in paths]
                row += [f"{best['export'] / best[name]:.1f}" for name in ("onnx", "ort")]
                rows.append([str(threads), str(tokens), *row])
                print(*rows[-1], file=sys.stderr, flush=True)
    header = ["threads", "tokens", *(f"{name} ms" for name in paths)]
    print_table([*header, "onnx: times as fast", "ort: times as fast"], rows)


if __name__ == "__main__":
    main()
