"""Help with writing rules of one's own: what a rule sees, and tests that read as before and after.

    print(seen("model.onnx"))                        # python -m onnxgen.rule_writing model.onnx
    assert_rewritten(before, after, "my_rules.py")
    assert_kept(before, "my_rules.py", "a bound is computed")

Graphs are given as `onnxgen.graph_text` reads them. Only the user's rules are applied, every one of
onnxgen's own left out; what they make is run beside what it replaces, and the whole model, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir

from onnxgen.analysis.graph import constant
from onnxgen.analysis.roles import find_roles
from onnxgen.api import fuse
from onnxgen.errors import OnnxgenError, UsageError
from onnxgen.graph_text import assert_same_graph, parse
from onnxgen.model_forms import Model, Result, as_file
from onnxgen.model_io import read_model
from onnxgen.passes.merged import split_branches
from onnxgen.passes.normalize import normalize
from onnxgen.patterns import RULES
from onnxgen.patterns.foreign import Stage
from onnxgen.report.values import Site
from onnxgen.runtime import Runtime
from onnxgen.targets import onnx as onnx_target
from onnxgen.targets import ort as ort_target
from onnxgen.twin import unrunnable_types

OURS = [*(rule.code for rule in RULES), *ort_target.CODES]
SHOWN = 8  # elements of a constant


def assert_rewritten(
    before: str | onnx.ModelProto, after: str | onnx.ModelProto, *rules: Any
) -> Result:
    """The rules, files or rules themselves, make `after` of `before`, and nothing was undone.

    Args:
        before: opset 20 where the text does not say.
        after: opset 24 where the text does not say; normalized as `before` is.
    """
    result = rewritten(before, *rules)
    wrong = [_reason(site) for site in result.report.sites if site.status != "fused"]
    assert not wrong, "; ".join(wrong)
    assert result.report.sites, f"no rule fits: {'; '.join(_near(result)) or 'not in part'}"
    wanted = parse(after, opset=24) if isinstance(after, str) else after
    assert_same_graph(result.model, _normalized(wanted))
    return result


def assert_kept(before: str | onnx.ModelProto, *rules: Any, reason: str) -> Result:
    """The rules leave the graph as it is, and one says why: `reason` is part of what it says."""
    result = rewritten(before, *rules)
    done = [site.rule for site in result.report.sites if site.status != "kept"]
    assert not done, f"fused or undone: {', '.join(done)}"
    reasons = [*(_reason(site) for site in result.report.sites), *_near(result)]
    assert any(reason in each for each in reasons), f"{reason!r} is not said: {reasons}"
    assert_same_graph(result.model, _normalized(before))
    return result


def rewritten(model: str | onnx.ModelProto, *rules: Any) -> Result:
    """The model normalized and rewritten by these rules alone, proven.

    Raises:
        ModelDiffersError, RefusedError: as `onnxgen.fuse` does.
    """
    proto = parse(model) if isinstance(model, str) else model
    return fuse(proto, rules=rules, disable=OURS)


def _normalized(model: str | onnx.ModelProto) -> onnx.ModelProto:
    proto = parse(model) if isinstance(model, str) else model
    return fuse(proto, disable=OURS, no_verify=True).model


def seen(model: Model, stage: Stage = "before") -> str:
    """The graph that rules of a stage are shown, a node a line: normalized, or the canonical form.

    Of a merged model, its branches one after the other.
    """
    if stage == "after":
        return _text(fuse(model, no_verify=True).load().graph)
    with as_file(model) as (path, _):
        read = read_model(path)
        opset = onnx_target.opset_for(read.graph.opset_imports.get("", 0), None)
        texts = []
        with Runtime(twins=unrunnable_types(read)) as runtime:
            for part in split_branches(read):
                normalize(part.model, opset, runtime, find_roles(part.model, {}))
                texts.append(_text(part.model.graph))
        return "\n\n".join(texts)


def _text(graph: ir.Graph) -> str:
    return "\n".join(_lines(graph))


def _lines(graph: ir.Graph) -> Iterator[str]:
    yield from (f"input {_named(value)}" for value in graph.inputs)
    for node in graph:
        made = ", ".join(_named(value) for value in node.outputs)
        read = ", ".join(_argument(value) for value in node.inputs)
        given = ", ".join(
            f"{each.name}={'{..}' if isinstance(each.value, ir.Graph) else each.value}"
            for each in node.attributes.values()
        )
        domain = f"{node.domain}." if node.domain else ""
        yield f"{made} = {domain}{node.op_type}({read}){f' <{given}>' if given else ''}"
    yield from (f"output {value.name}" for value in graph.outputs)


def _named(value: ir.Value) -> str:
    kind = "" if value.dtype is None else value.dtype.short_name()
    sizes = "" if value.shape is None else f"[{','.join(map(str, value.shape))}]"
    return f"{value.name}:{kind}{sizes}" if kind or sizes else str(value.name)


def _argument(value: ir.Value | None) -> str:
    """A name; the elements of a small constant, whose form a pattern must fit: `2.0`, `[2.0]`."""
    if value is None:
        return "_"
    found = constant(value, SHOWN)
    if found is None:
        return _named(value) if value.const_value is not None else str(value.name)
    return f"{value.name}={found.tolist()}"


def _reason(site: Site) -> str:
    reason = "" if site.decline is None else site.decline.reason
    return f"{site.rule} at {site.node}, {site.status}: {reason}"


def _near(result: Result) -> list[str]:
    return [_reason(site) for site in result.report.near_misses]


def main(words: list[str]) -> None:
    """`python -m onnxgen.rule_writing MODEL [before|after]`; ends with a sentence and its code."""
    if len(words) not in (1, 2) or words[1:] not in ([], ["before"], ["after"]):
        print("Usage: python -m onnxgen.rule_writing MODEL [before|after]", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    try:
        print(seen(words[0], "after" if words[1:] == ["after"] else "before"))
    except OnnxgenError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
