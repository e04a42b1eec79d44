"""An EPContext model: the graph with each region replaced by what one provider compiled of it.

    model = epcontext_model(original, [CompiledRegion(…)])

`EPContext` of com.microsoft is a node around a provider's bytes; only that provider runs it, and
there is no fallback within the model. Seen to work with OpenVINO's provider (onnxruntime 1.32.0,
onnxruntime-ep-openvino 1.8.1), for one region; what it asks for, all models here are given:

- Inputs and outputs of the node keep the names with which it was compiled, since the provider knows
  them by these. A Reshape to the value's own shape leads from the graph's name to the node's, and
  back: no optimiser removes it, as one does an Identity.
- None of the node's inputs is a constant, since constants are not handed to the provider. So the
  shape of that Reshape, zeros, is an input of the graph with a default: what may be given cannot be
  folded. Sessions do not list it among their inputs.
- The types of the node's outputs are declared: its operator says nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from onnxgen.backends.interface import Identity
from onnxgen.contexts import openvino_bin
from onnxgen.contexts.joining import Joined
from onnxgen.errors import RefusedError

DOMAIN = "com.microsoft"
COMPATIBILITY = "ep_compatibility_info."  # before a provider's name, of the model's metadata


@dataclass(frozen=True)
class CompiledRegion:
    """A region, and what a backend compiled of it.

    Attributes:
        nodes: positions of its nodes in the original graph.
        inputs, weights, outputs: names of values of the original graph, in the order of the part.
        model: the part that was compiled, in canonical names: its inputs are `inputs`, `weights`.
        blob: what was compiled. Its inputs are the part's own and then those `parameters` say.
        form: "openvino", what OpenVINO's `export_model` writes; any other, an EPContext model that
            ONNX Runtime's ModelCompiler wrote with its blob inside.
        provider: the execution provider's name.
        identity: who compiled it.
        parameters: positions of the `weights` that are given to it.
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    model: onnx.ModelProto
    blob: bytes
    form: str
    provider: str
    identity: Identity
    parameters: tuple[int, ...]


def epcontext_model(main: onnx.ModelProto, regions: Sequence[CompiledRegion]) -> onnx.ModelProto:
    """The model for one provider.

    Args:
        main: the original model, which is not changed; its weights may be without content.
        regions: of one provider, without nodes in common.

    Returns:
        A model with the original's inputs and outputs; weights that nothing reads any more are left
        out. Its metadata tell, under "ep_compatibility_info.<provider>", what it was compiled for,
        where that is known.

    Raises:
        RefusedError: a blob is no whole EPContext model; or OpenVINO's provider would not take the
            model, as it takes one compiled region only.
    """
    (provider,) = {region.provider for region in regions}
    if provider == openvino_bin.PROVIDER and len(regions) > 1:
        raise RefusedError(
            f"{len(regions)} regions cannot be in one EPContext model for OpenVINO: its execution "
            "provider takes one compiled region a model, and knows values by their names; add the "
            "context with --region all"
        )
    joined = Joined(main, [region.nodes for region in regions])
    facts: dict[str, str] = {}
    for number, region in enumerate(regions):
        part = compiled_part(region, number)
        given = [region.weights[position] for position in region.parameters]
        joined.put(
            number,
            part,
            [*region.inputs, *given],
            region.outputs,
            exact_names=provider == openvino_bin.PROVIDER,
        )
        for each in part.metadata_props:
            said = each.key.startswith(COMPATIBILITY)
            if said and facts.setdefault(each.key, each.value) != each.value:
                raise RefusedError("the regions were compiled for machines of different kinds")
    model = joined.model()
    kept = {each.key: each.value for each in model.metadata_props}
    helper.set_model_props(model, kept | facts)
    return model


def compatibility_of(model: onnx.ModelProto, provider: str) -> str:
    """What an EPContext model says it was compiled for; "" where it says nothing."""
    key = COMPATIBILITY + provider
    return next((each.value for each in model.metadata_props if each.key == key), "")


def compiled_part(region: CompiledRegion, number: int) -> onnx.ModelProto:
    """What was compiled as an EPContext model of its own, in the part's names and with its types.

    Raises:
        RefusedError: see `epcontext_model`.
    """
    part = region.model
    taken = [*part.graph.input[: len(region.inputs)]]
    taken += [part.graph.input[len(region.inputs) + each] for each in region.parameters]
    if region.form == "openvino":
        return _around_openvino(region, taken, number)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(region.blob)
    except Exception as error:  # protobuf's DecodeError, of no fixed module
        raise RefusedError(f"a blob for {region.provider} is no ONNX model: {error}") from error
    if len(model.graph.input) != len(taken) or len(model.graph.output) != len(region.outputs):
        raise RefusedError(
            f"a blob for {region.provider} has other inputs or outputs than its part"
        )
    nodes = [node for node in model.graph.node if _is_context(node)]
    if not nodes:
        raise RefusedError(
            f"what {region.provider} compiled holds no EPContext node: the provider writes none"
        )
    for node in nodes:
        values = {each.name: each for each in node.attribute}
        if "embed_mode" in values and values["embed_mode"].i != 1:
            raise RefusedError(
                f"what {region.provider} compiled lies in another file, not inside of its model"
            )
    # Types are the part's: the graph's own may be named after sizes that are others here.
    for value, known in zip(model.graph.output, part.graph.output, strict=True):
        value.type.CopyFrom(known.type)
    return model


def _around_openvino(
    region: CompiledRegion, taken: Iterable[onnx.ValueInfoProto], number: int
) -> onnx.ModelProto:
    """One EPContext node around a blob that OpenVINO exported."""
    partition = f"region{number}"
    inputs = list(taken)
    node = helper.make_node(
        "EPContext",
        [each.name for each in inputs],
        [each.name for each in region.model.graph.output],
        name=partition,
        domain=DOMAIN,
        main_context=1,
        embed_mode=1,
        ep_cache_context=openvino_bin.contained(partition, region.blob),
        source=region.provider,
        ep_sdk_version=".".join(region.identity.version.split(".")[:2]),
        hardware_architecture=region.identity.device,
        notes=f"compiled by {region.identity.source} {region.identity.version}",
        partition_name=partition,
    )
    graph = helper.make_graph([node], "part", inputs, list(region.model.graph.output))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(DOMAIN, 1)])
    key = COMPATIBILITY + region.provider
    helper.set_model_props(model, {key: openvino_bin.compatibility(region.blob)})
    return model


def _is_context(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == "EPContext"
