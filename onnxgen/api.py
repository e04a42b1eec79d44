"""onnxgen from Python, in the words of the command line.

    import onnxgen

    result = onnxgen.fuse("model.onnx", output="model.fused.onnx")
    result = onnxgen.fuse(torch.onnx.export(module, inputs, dynamo=True))
    print(result, result.report.proof.worst)
    onnx.save(result.model, "fused.onnx")

Every keyword is an option of the command and means what it means there. What is for a shell is none:
`--report`, `--json`, `--expect` and `--baseline`, since `Result.report` holds the values, `-v` and
`-q`, and what is for several models, `--out-dir` and `--jobs`. An option that is repeated
takes several words at once, `disable=["GEL001"]`, and `--role NAME=ROLE` a mapping, `{name: role}`.

A model is a path, an `onnx.ModelProto`, an `onnx_ir.Model` or what `torch.onnx.export` returns. None
of them is changed. One that is in memory is written to a temporary file: to be proven it must run in
another process. What goes wrong is a subclass of `onnxgen.OnnxgenError`, whose `report`, where there
is one, holds what was done until then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from onnxgen import inspection, pipeline, pipeline_paged
from onnxgen.errors import UsageError
from onnxgen.explaining import checked_rule, chosen
from onnxgen.model_forms import Model, Program, Result, as_file, into_memory, named, place_for
from onnxgen.model_io import read_model
from onnxgen.report.inspection import Inspection
from onnxgen.report.values import Budget, Proof, Report, Site
from onnxgen.targets.contract import Padding
from onnxgen.targets.paged import KV_DTYPES, Flavor, Logits, PagedOptions

__all__ = ["Model", "Program", "Result", "explain", "fuse", "inspect", "to_paged", "verify"]

Target = Literal["onnx", "ort"]
KvDtype = Literal["fp16", "fp32"]


def fuse(
    model: Model,
    *,
    output: str | os.PathLike[str] | None = None,
    check: bool = False,
    target: Target = "onnx",
    padding: Padding = "any",
    max_length: int | None = None,
    verify: Budget = "full",
    no_verify: bool = False,
    disable: Sequence[str] = (),
    opset: int | None = None,
    inline: bool = False,
    genai_config: bool = False,
    force: bool = False,
    role: Mapping[str, str] | None = None,
    rules: Sequence[Any] = (),
) -> Result:
    """Fuse attention, norms and rotary embeddings, prove the result, and return or write it.

    Inputs and outputs keep their names, order, types and shapes: tokens stay int64 [B,S], say, and
    caches [B,K,P,D].

    Args:
        model: what to fuse; it is not changed.
        output: where to write, the only place where something is left; None keeps the result in
            memory, weights and all.
        check: write nothing; `Result.report` says what would be fused.
        target: what to write for: the ONNX standard, or ONNX Runtime's own operators.
        padding: for "ort": the padding that the result must take; with any other it fails.
        max_length: for "ort": the most tokens, past and new.
        verify: how much to compare: "quick", "full", or "layers", the model cut down.
        no_verify: run nothing; the report says unproven.
        disable: codes of rules to leave out.
        opset: version of the default domain to write.
        inline: expand functions of onnxgen's own.
        genai_config: write what onnxruntime-genai needs beside `output`; reads what lies beside the
            model, which must be a path.
        force: let `output` replace the model.
        role: what inputs are for, by name, where their use leaves that open.
        rules: rules of your own: files, or rules themselves; see `onnxgen.own_rules`.

    Raises:
        FileError: the model cannot be read, or the result not written.
        UsageError: an argument does not fit, or a rule of your own fails.
        RefusedError: the model cannot be converted, or nothing of it can be compared.
        ModelDiffersError: the result differs from the original; nothing was written.
    """
    _choices(target=(target, Target), padding=(padding, Padding), verify=(verify, Budget))
    _numbers(max_length=max_length, opset=opset)
    _check_verify(verify, no_verify)
    _check_beside(model, output, genai_config)
    with as_file(model) as (path, name), place_for(output, "model.onnx") as place:
        options = pipeline.FuseOptions(
            output=place,
            target=target,
            padding=padding,
            max_length=max_length,
            verify=not no_verify,
            budget=verify,
            disable=_words("disable", disable),
            opset=opset,
            inline=inline,
            roles=role or {},
            rules=_several(rules),
            force=force,
            genai_config=genai_config,
            check=check,
        )
        with named({path: name, place: output}):
            report = pipeline.fuse(path, options, _quiet)
        return _result(report, name, place, output)


def to_paged(
    model: Model,
    *,
    output: str | os.PathLike[str] | None = None,
    block_size: int = 16,
    logits: Logits = "all",
    flavor: Flavor = "portable",
    kv_dtype: KvDtype | None = None,
    max_length: int | None = None,
    slot_mapping: bool = False,
    check: bool = False,
    verify: Budget = "full",
    no_verify: bool = False,
    inline: bool = False,
    genai_config: bool = False,
    force: bool = False,
    role: Mapping[str, str] | None = None,
    rules: Sequence[Any] = (),
) -> Result:
    """Turn a decoder with caches into one whose keys and values lie in pools of blocks.

    Tokens of all sequences come in one row; see `onnxgen.targets.paged` for every input and its
    shape, and `onnxgen.paged` for what runs such a model.

    Args:
        model: what to page; it is not changed.
        output: the folder to write model.onnx to; None keeps the result in memory.
        block_size: slots of a block, a power of two.
        logits: which rows are answered.
        flavor: a function of standard operators, or com.microsoft's PagedAttention.
        kv_dtype: type of the pools; the caches' own unless given.
        max_length: with flavor "ort": most tokens of a sequence.
        slot_mapping: add an input that says which slot each token is written to.
        check: convert nothing; `Result.report.paging` says what stands in the way, if anything.
        verify, no_verify, inline, genai_config, force, role, rules: as of `fuse`.

    Raises:
        RefusedError: it cannot be paged; `report.paging.obstacles` says why.
        FileError, UsageError, ModelDiffersError: as of `fuse`.
    """
    _choices(logits=(logits, Logits), flavor=(flavor, Flavor), verify=(verify, Budget))
    if kv_dtype is not None:
        _choices(kv_dtype=(kv_dtype, KvDtype))
    _numbers(max_length=max_length)
    _check_verify(verify, no_verify)
    _check_beside(model, output, genai_config)
    with as_file(model) as (path, name), place_for(output, "paged") as place:
        kind = None if kv_dtype is None else KV_DTYPES[kv_dtype]
        options = pipeline_paged.PageOptions(
            output=place,
            paged=PagedOptions(block_size, logits, kind, slot_mapping, flavor),
            max_length=max_length,
            check=check,
            verify=not no_verify,
            budget=verify,
            inline=inline,
            roles=role or {},
            rules=_several(rules),
            genai_config=genai_config,
            force=force,
        )
        with named({path: name, place: output}):
            report = pipeline_paged.to_paged(path, options, _quiet)
        return _result(report, name, place / "model.onnx", output)


def verify(
    original: Model,
    rewritten: Model,
    *,
    verify: Budget = "full",
    role: Mapping[str, str] | None = None,
) -> Proof:
    """Compare two models that have the same inputs and outputs, by running both.

    Returns:
        The proof, whatever it says: "proven", "differs" or "unverifiable", and why as `reason`.

    Raises:
        FileError: one cannot be read.
        UsageError: an argument does not fit.
    """
    _choices(verify=(verify, Budget))
    with (
        as_file(original) as (one, its_name),
        as_file(rewritten) as (other, others_name),
        named({one: its_name, other: others_name}),
    ):
        return pipeline.verify(one, other, roles=role or {}, budget=verify, progress=_quiet)


def explain(
    model: Model,
    *,
    site: str | None = None,
    rule: str | None = None,
    target: Target = "onnx",
    no_verify: bool = False,
    role: Mapping[str, str] | None = None,
    rules: Sequence[Any] = (),
) -> list[Site]:
    """Why places that look like attention, norms, ... are not fused; nothing is written.

    Args:
        model: what would be fused; it is not changed.
        site: tell of this place alone, fused or not: a node's name, or a module path or its
            beginning.
        rule: tell of places that the rule with this code was nearest to alone.
        target, no_verify, role, rules: as of `fuse`.

    Returns:
        The places; each one's `decline` says how far the nearest rule got, what stopped it, what it
        expected, and what would change it. Empty where nothing is left.

    Raises:
        UsageError: no place has that name, or an argument does not fit.
        FileError, RefusedError: as of `fuse`.
    """
    rule = checked_rule(rule, own=bool(rules))
    result = fuse(model, check=True, target=target, no_verify=no_verify, role=role, rules=rules)
    return chosen(result.report, site, rule)


def inspect(model: Model, *, role: Mapping[str, str] | None = None) -> Inspection:
    """What a model is: its attentions, caches, bytes a token, weights, and what it could become.

    Raises:
        FileError, UsageError, RefusedError: as of `fuse`.
    """
    with as_file(model) as (path, name), named({path: name}):
        found = inspection.inspect(path, role or {}, _quiet)
    found.input = name
    return found


def _quiet(message: str) -> None:
    """Progress that nobody reads."""


def _result(report: Report, name: str, place: Path, output: object) -> Result:
    report.input = name
    if not report.output:
        return Result(report, None, None)
    if output is not None:
        return Result(report, place, None)
    held = read_model(place)
    into_memory(held)
    report.output = ""
    return Result(report, None, held)


def _choices(**given: tuple[Any, Any]) -> None:
    for name, (value, kind) in given.items():
        if value not in get_args(kind):
            raise UsageError(f"{name} is {value!r}: it is one of {', '.join(get_args(kind))}")


def _numbers(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: it is 1 or more")


def _check_verify(verify: Budget, no_verify: bool) -> None:
    if no_verify and verify != "full":
        raise UsageError(f"no_verify and verify={verify!r} exclude one another")


def _check_beside(model: Model, output: object, genai_config: bool) -> None:
    """Whether there is a place for files beside the model, and one where they are read."""
    if genai_config and (output is None or not isinstance(model, str | os.PathLike)):
        raise UsageError("genai_config reads and writes files: give a path and an output")


def _words(name: str, given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise UsageError(f"{name} is several words: [{given!r}]")
    return tuple(given)


def _several(rules: Sequence[Any]) -> tuple[Any, ...]:
    return (rules,) if isinstance(rules, str | os.PathLike | type) else tuple(rules)
