"""Whether a model of flavor `ort` is right: by what its nodes mean, and by the operator's own kernel.

    written file -> its twin in standard operators (`paged_twin`) -> as any paged model, on CPU
    written file -> the kernel, wherever a provider that has one is present

ONNX Runtime's WebGPU plugin provider (the extra `webgpu`) has it, and runs on a software Vulkan
driver where there is no GPU (Mesa's lavapipe 25 or newer):

    ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 VK_DRIVER_FILES=.../lvp_icd.json \\
        onnxgen to-paged model.onnx --flavor ort

Its version 0.4.0 takes no softcap, no norms of queries and keys and no slot mapping, and is wrong
beyond the first tile of keys of a longer prompt: where blocks have less than 32 slots, or there
are sinks, only runs of less than 32 new tokens a sequence count, and windows not at all. What is
outside is not run, and the report says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxgen.analysis.graph import attribute
from onnxgen.analysis.roles import Roles
from onnxgen.model_io import read_model
from onnxgen.report.values import Budget, Proof
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.targets.paged import PagedModel
from onnxgen.targets.paged_schema import DOMAIN, NAME, live_schema
from onnxgen.verify.paged import prove_paged
from onnxgen.verify.paged_program import program
from onnxgen.verify.paged_steps import compare_steps
from onnxgen.verify.paged_twin import staged_twins
from onnxgen.verify.precision import rounds_activations
from onnxgen.verify.side import Side
from onnxgen.verify.tolerances import TOLERANCES

PACKAGE = "onnxruntime_ep_webgpu"
SAFE_BLOCK, FEW = 32, 12
"""Slots of a block from which prompts of any length are right; elsewhere the program is one for
blocks of so many slots, whose longest prompt has twice as many tokens."""

ROUNDING = 5.0
"""So many times the tolerance of fp16 is allowed: there the whole model is computed in half precision,
its sums too (8e-3 was seen of float32 exports of two layers, 2.5e-2 of a float16 one), and what the
provider's faults do is above 0.1."""

_REFUSED = {
    "slot_mapping": "a slot mapping",
    "q_norm_weight": "norms of queries and keys inside",
    "k_norm_weight": "norms of queries and keys inside",
}


def prove_operator(
    original: Path,
    written: Sequence[Path],
    results: Sequence[PagedModel],
    roles: Roles,
    runtime: Runtime,
    progress: Callable[[str], None] = lambda message: None,
    budget: Budget = "full",
) -> tuple[Proof, str]:
    """The proof as `prove_paged` makes it, and what is to be said of the kernel."""
    with staged_twins(written) as twins:
        proof = prove_paged(original, twins, results, roles, runtime, progress, budget)
    said = (
        f"ONNX Runtime's CPU has no kernel of {NAME}: what each says in the written file was run "
        "as standard operators"
    )
    proof.note = "; ".join(filter(None, [proof.note, said]))
    if proof.status != "proven":
        return proof, "not run: the model was not proven"
    return proof, run_kernel(original, written, results, roles, runtime, proof, progress)


def run_kernel(
    original: Path,
    written: Sequence[Path],
    results: Sequence[PagedModel],
    roles: Roles,
    runtime: Runtime,
    proof: Proof,
    progress: Callable[[str], None] = lambda message: None,
) -> str:
    """Compare the original with what the operator's kernel computes; a sentence for the report.

    Args:
        written: where each of `results` lies; the one with the largest blocks is run.
        runtime: where the original runs.
        proof: what differs makes it one that differs.
    """
    why = missing()
    if why:
        return f"not run: {why}"
    path, result = max(
        zip(written, results, strict=True), key=lambda pair: pair[1].options.block_size
    )
    model = read_model(path)
    why = _outside(model, result)
    if why:
        return f"not run: {why}"
    sinks = any("head_sink" in said for said in _given(model))
    safe = result.options.block_size >= SAFE_BLOCK and not sinks
    events = program(SAFE_BLOCK if safe else FEW, (), sharing=safe, far=False)
    with Runtime(webgpu=True) as device:
        device.aliases = {pool.name: pool.output for pool in result.pools}
        own = Proof("unverifiable", ROUNDING * TOLERANCES[ir.DataType.FLOAT16])
        full = rounds_activations(model)
        first = Side(runtime, original, as_written=True, full=full)
        second = Side(device, path, as_written=False, full=full)
        try:
            progress("loading the kernel")
            second.load()
            first.load()
        except RuntimeFailure as error:
            return f"not run: {error}"
        compare_steps(first, second, roles, result, events, own, free=0.0, progress=progress)
        first.unload()
    if own.reason:
        proof.status, proof.reason = "differs", f"on the WebGPU kernel, {own.reason}"
        return f"differs: {own.reason}"
    steps = sum(case.compared for case in own.cases)
    worst = own.worst
    if worst is None:
        return f"not run: {own.cases[0].skipped}"
    return (
        f"run on WebGPU: {steps} steps, blocks of {result.options.block_size}, largest difference "
        f"{worst.difference:.1e} standard deviations of {own.tolerance:.0e} allowed"
    )


def missing() -> str:
    """Why no provider here has the kernel; "" where one has, and a device."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "no provider that has it is installed here (extra webgpu)"
    kind = onnx.TensorProto.FLOAT
    x, y = (onnx.helper.make_tensor_value_info(name, kind, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    imports = [onnx.helper.make_opsetid("", 24)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=11)
    try:
        with Runtime(webgpu=True) as device:
            device.load(model.SerializeToString())
    except RuntimeFailure as error:
        return f"WebGPU's provider cannot be used here: {error}"
    return ""


def _given(model: ir.Model) -> list[dict[str, ir.Value]]:
    """The inputs of each PagedAttention by name, and its attributes as None."""
    schema = live_schema()
    names = () if schema is None else schema.inputs
    return [
        {name: value for name, value in zip(names, node.inputs, strict=False) if value is not None}
        for node in model.graph
        if node.domain == DOMAIN and node.op_type == NAME
    ]


def _outside(model: ir.Model, result: PagedModel) -> str:
    """Why this provider cannot run a model, or not rightly; "" where it can."""
    if any(pool.dtype != ir.DataType.FLOAT16 for pool in result.pools):
        return "WebGPU has it for fp16 only"
    for given in _given(model):
        for name, words in _REFUSED.items():
            if name in given:
                return f"WebGPU's takes no {words}"
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == NAME:
            if attribute(node, "softcap", 0.0):
                return "WebGPU's takes no softcap"
            if attribute(node, "local_window_size", -1) > 0:
                return "WebGPU's is not right for local windows in its version 0.4.0"
    return ""
