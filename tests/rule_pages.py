"""The examples on the rules' pages, and the graphs at which each rule declines.

    python -m tests.rule_pages --write     # what each example becomes, anew

An example is in the docstring of the rule's file, below "Example": a graph as `tests.graphs` reads
it, "becomes", and the nodes that the rule makes of it. `tests/rules/CODE.txt` has a graph for each
reason that the rule declines for.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.roles import find_roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.tidy import tidy
from onnxgen.patterns.pages import page_of
from onnxgen.patterns.rule import Rule
from onnxgen.report.values import Site
from onnxgen.rules import all_rules
from onnxgen.targets import ort
from onnxgen.verify.rewrites import RewriteChecker
from tests.graphs import normalized, parse, runtime

MISSES = Path(__file__).parent / "rules"
WIDTH = 92


LOWERING = ort.Lowering(ort.Settings("any", 0), {})


def rule_of(code: str) -> Rule:
    """The rule of a code, ready to be applied."""
    return next(rule for rule in (*ort.RAISING, *LOWERING.rules) if rule.code == code)


def misses() -> Iterator[tuple[str, str, str, int]]:
    """(rule, code of the decline, graph, opset) of every stored graph."""
    for path in sorted(MISSES.glob("*.txt")):
        for part in path.read_text().split("== ")[1:]:
            head, _, text = part.partition("\n")
            code, opset = head.split(", opset ")
            yield path.stem, code, text, int(opset)


def applied(
    code: str, text: str, opset: int = 20, *, check: bool = False
) -> tuple[list[Site], Any]:
    """What a rule alone says of a graph, and the graph that it leaves."""
    model, roles = normalized(parse(text, opset=opset))
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    sampler = Sampler(model.graph, roles, runtime())
    checker = RewriteChecker(runtime(), roles) if check else None
    if checker is not None and code.startswith("ORT"):
        checker.within(LOWERING.assumed)
    sites = raise_model(model, roles, sampler=sampler, check=checker, rules=[rule_of(code)])
    tidy(model)
    return sites, model


def example(rule: type[Rule]) -> tuple[str, int, str] | None:
    """The graph before, its opset, and the nodes after, as the page has them."""
    text = page_of(rule, rule.code).sections.get("Example", "")
    if not text:
        return None
    before, _, after = text.partition("\nbecomes\n")
    head, _, graph = before.partition("\n") if before.startswith("opset ") else ("", "", before)
    return graph, int(head.removeprefix("opset ") or 20), textwrap.dedent(after).strip("\n")


def printed(model: ir.Model, before: set[str]) -> str:
    """The new nodes of a graph that carry activations, a line each; "..." for what is left out.

    Args:
        before: nodes that are no news, as they are printed.
    """
    facts = Facts(model.graph, find_roles(model))
    lines: list[str] = []
    for node in model.graph:
        line = _node(node)
        shown = line not in before and any(map(facts.is_activation, node.outputs))
        if shown or lines[-1:] != ["..."]:
            lines.append(line if shown else "...")
    return "\n".join(lines)


def _node(node: ir.Node) -> str:
    used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    last = max((node.outputs.index(value) for value in used), default=0)
    outputs = [_name(value) if value in used else "" for value in node.outputs[: last + 1]]
    given = ", ".join(f"{name} = {_attribute(each)}" for name, each in node.attributes.items())
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    said = f"<{given}>" if given else ""
    overload = f":{node.overload}" if node.overload else ""
    return textwrap.fill(
        f"{', '.join(outputs)} = {domain}{node.op_type}{overload}{said}"
        f"({', '.join(_argument(value) for value in node.inputs)})",
        WIDTH,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _name(value: ir.Value) -> str:
    """Names as users would write them: those that we made hold slashes and colons."""
    name = (value.name or "").removeprefix("onnxgen/").removesuffix(":out")
    return re.sub(r"\W", "_", name).lower() if name != value.name else name


def _argument(value: ir.Value | None) -> str:
    if value is None:
        return ""
    if value.const_value is not None and value.const_value.size <= 4 and value.dtype is not None:
        numbers = value.const_value.numpy()
        return np.array2string(numbers, separator=", ", precision=6)
    return _name(value)


def _attribute(each: Any) -> str:
    return f"{each.value:.6g}" if isinstance(each.value, float) else f"{each.value}"


def shown(code: str, graph: str, opset: int) -> str:
    """What an example becomes, every rewrite checked."""
    sites, model = applied(code, graph, opset, check=True)
    assert {site.status for site in sites} == {"fused"}, (code, sites)
    normal, _ = normalized(parse(graph, opset=opset))
    return printed(model, {_node(node) for node in normal.graph})


def write() -> None:
    """Put what each example becomes in its docstring."""
    for rule in all_rules():
        found = example(rule)
        if found is None:
            continue
        graph, opset, _ = found
        path = Path(str(sys.modules[rule.__module__].__file__))
        text = path.read_text()
        new = textwrap.indent(shown(rule.code, graph, opset), "        ")
        old = re.search(r"\n    becomes\n(?:(?:        .*)?\n)*?(?=\n\w|\"\"\")", text)
        assert old is not None, path
        path.write_text(text.replace(old[0], f"\n    becomes\n{new}\n"))


if __name__ == "__main__" and "--write" in sys.argv:
    write()
