"""The check of a rewrite where it happens: old nodes and new ones on the same inputs.

The part of the graph between what the new nodes read and what they replace is cut out, before and
after. Activations, and weights that the fused node reads, are random; masks, tables and lengths,
which a random tensor would turn into nonsense, are made by the graph that makes them, from inputs
as a user would feed them. Parts of one structure are run once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.feeds import (
    MOST_AXES,
    MOST_BYTES,
    RunShape,
    input_sizes,
    make_feeds,
    nearest_shape,
)
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.scores import MASKED
from onnxgen.analysis.symbols import evaluate
from onnxgen.patterns.rule import Rewrite
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.targets.contract import Contract
from onnxgen.verify.difference import gap_of
from onnxgen.verify.parts import Part
from onnxgen.verify.precision import without_leave
from onnxgen.verify.tolerances import TOLERANCES

# Lengths that are different from one another and from 1, so that a swapped axis cannot pass.
SHAPES = (
    RunShape(batch=2, new=5, past=7),
    RunShape(batch=2, new=5, past=3, padding="left"),
    RunShape(batch=3, new=1, past=11),
    RunShape(batch=2, new=5),  # no past: some operators take no empty cache
    RunShape(batch=2, new=5, padding="left"),
)
# For targets that do not take several new tokens over a past for several sequences.
ONE_SEQUENCE = (
    RunShape(batch=1, new=5, past=7),
    RunShape(batch=1, new=5, past=3, padding="left"),
)
# For caches that GroupQueryAttention counts: rows of different lengths, places to spare.
COUNTED = (
    RunShape(batch=1, new=5, past=7),
    RunShape(batch=3, new=1, past=9, padding="right"),
    RunShape(batch=2, new=1, past=7, spare=3),
)
CROWD = 2048  # tokens: so many may be needed to see what a router does to a crowd


class RewriteChecker:
    """Compares rewrites with what they replace.

    Attributes:
        rewrites: how many rewrites were compared.
        structures: how many of them were run; the others had been run already.
        difference: the largest difference, over the old output's standard deviation.
    """

    def __init__(self, runtime: Runtime, roles: Roles) -> None:
        self._runtime = runtime
        self._fed: dict[RunShape, tuple[dict[str, Any], dict[str, int]]] = {}
        self._roles = roles
        self._verdicts: dict[str, str | None] = {}
        self.rewrites = 0
        self.difference = 0.0
        self.within(Contract())

    def within(self, contract: Contract) -> None:
        """From here on compare only runs that the contract takes, of real tokens only where
        padding behind a prompt may get any answer.
        """
        shapes = [*SHAPES, *(COUNTED if self._roles.counted else ())]
        shapes += () if contract.chunked_batches else ONE_SEQUENCE
        single = [replace(shape, batch=1, pads=()) for shape in SHAPES]
        self._shapes = [s for s in _fitting(self._roles, shapes) if not contract.refuses(s)]
        self._single = [s for s in _fitting(self._roles, single) if not contract.refuses(s)]

    @property
    def structures(self) -> int:
        return len(self._verdicts)

    def __call__(self, facts: Facts, rewrite: Rewrite, nodes: Sequence[ir.Node]) -> str | None:
        """None where old and new values agree, else what differs, in one sentence."""
        self.rewrites += 1
        reason = self._verdict(facts, rewrite, nodes, drawn=True)
        if reason is not None and rewrite.particular:
            reason = self._verdict(facts, rewrite, nodes, drawn=False)
        return reason

    def _verdict(
        self, facts: Facts, rewrite: Rewrite, nodes: Sequence[ir.Node], *, drawn: bool
    ) -> str | None:
        """The comparison, with weights that the new nodes read `drawn` at random or as they are."""
        try:
            part = Part.of(facts, rewrite, nodes, drawn=drawn)
        except CutError as error:
            return f"its check cannot be cut out: {error}"
        key = part.structure(facts)
        if key not in self._verdicts:
            self._verdicts[key] = self._run(facts, rewrite, part)
        return self._verdicts[key]

    def _run(self, facts: Facts, rewrite: Rewrite, part: Part) -> str | None:
        sessions: list[int] = []
        try:
            for model in (part.before, part.after):
                without_leave(model)
                sessions.append(self._runtime.load(model.SerializeToString()))
            return self._compare_all(facts, rewrite, part, sessions)
        except RuntimeFailure as error:
            return f"ONNX Runtime refuses it: {error}"
        finally:
            for session in sessions:
                self._runtime.unload(session)

    def _compare_all(
        self, facts: Facts, rewrite: Rewrite, part: Part, sessions: Sequence[int]
    ) -> str | None:
        failures: list[str] = []
        shapes = [*(self._single if rewrite.repairs else self._shapes)]
        if rewrite.choices:
            if part.farthest > CROWD:
                return f"it may do otherwise with {part.farthest} tokens: too many to run"
            shapes += self._crowds(max(8 * max(rewrite.choices.values()), 2 * part.farthest + 16))
        below = [False] * len(shapes)
        if rewrite.loose:
            shapes, below = [*shapes, *shapes[-1:]], [*below, True]
        for seed, shape in enumerate(shapes):
            rng = np.random.default_rng(seed)
            feeds = self._feeds(facts, rewrite, shape, part, rng, below=below[seed])
            if isinstance(feeds, str):
                failures.append(feeds)
                continue
            try:
                old = self._runtime.run(sessions[0], _given(part.before, feeds), most=MOST_BYTES)
            except RuntimeFailure as error:
                failures.append(str(error))
                continue
            try:
                new = self._runtime.run(sessions[1], _given(part.after, feeds), most=MOST_BYTES)
            except RuntimeFailure as error:
                return f"the old nodes run where the new ones fail: {error}"
            reason = self._compare(rewrite, shape, old, new)
            if reason is not None:
                return reason
        if len(failures) == len(shapes):
            return f"its check cannot be run: {failures[0] if failures else 'no length fits'}"
        return None

    def _crowds(self, tokens: int) -> list[RunShape]:
        """Runs of so many tokens, as far as the model takes them, so that every expert gets some:
        of one sequence and of many, since what is counted may be counted in each.
        """
        return _fitting(self._roles, [RunShape(batch=1, new=tokens), RunShape(batch=tokens, new=1)])

    def _inputs(self, shape: RunShape) -> tuple[dict[str, Any], dict[str, int]]:
        """The model's inputs for a shape, and the sizes of their axes; made once."""
        if shape not in self._fed:
            inputs = make_feeds(self._roles, shape, np.random.default_rng(0))
            self._fed[shape] = (inputs, input_sizes(self._roles, shape))
        return self._fed[shape]

    def _feeds(
        self,
        facts: Facts,
        rewrite: Rewrite,
        shape: RunShape,
        part: Part,
        rng: np.random.Generator,
        *,
        below: bool,
    ) -> dict[str, Any] | str:
        """Arrays for the values that a part is cut off at; the reason as text where one fails.

        Args:
            below: whether some of a router's choices are below 0.
        """
        inputs, binding = self._inputs(shape)
        feeds: dict[str, Any] = {}
        for name, value in part.free.items():
            whole = value.dtype is not None and not value.dtype.is_floating_point()
            if name in inputs and (whole or not facts.is_activation(value)):
                feeds[name] = inputs[name]
                continue
            if value.const_value is not None and value not in part.weights:
                feeds[name] = value.const_value.numpy()
                continue
            dims = facts.shapes.of(value)
            sizes = [] if dims is None else [evaluate(dim, binding) for dim in dims]
            if dims is None or None in sizes:
                return f"the shape of {name!r} is not known"
            content = facts.shapes.content(value)
            if content is not None:
                numbers = [evaluate(each, binding) for each in content.flat]
                if None not in numbers:
                    feeds[name] = np.array(numbers, dtype=np.int64).reshape(content.shape)
                    continue
            shaped = [int(size) for size in sizes if size is not None]
            size = math.prod(shaped)
            if min(shaped, default=0) < 0 or 4 * size > MOST_BYTES or len(shaped) > MOST_AXES:
                return f"{name!r} would be of the shape {shaped}"
            if value in rewrite.choices:
                wide = value.dtype != ir.DataType.INT32
                chosen = _chosen(rng, shaped, rewrite.choices[value])
                if rewrite.repeats and chosen.ndim > 1:
                    chosen[::3] = chosen[::3, ..., :1]
                if below:
                    chosen[rng.random(chosen.shape) < 0.1] = -1
                feeds[name] = chosen.astype(np.int64 if wide else np.int32)
                continue
            if value.dtype in (ir.DataType.INT8, ir.DataType.UINT8):  # quantized activations
                info = np.iinfo(value.dtype.numpy())
                feeds[name] = rng.integers(info.min, info.max, shaped, value.dtype.numpy())
                continue
            if value.dtype is None or not value.dtype.is_floating_point():
                return f"{name!r} holds integers that are computed from activations"
            array = rng.standard_normal(shaped)
            if value in part.weights and array.ndim > 1:
                array /= np.sqrt(array.shape[-1])  # so that activations behind it are not saturated
            if value in rewrite.nonnegative:
                array = np.abs(array)
            feeds[name] = array.astype(value.dtype.numpy())
        return feeds

    def _compare(
        self, rewrite: Rewrite, shape: RunShape, old: Mapping[str, Any], new: Mapping[str, Any]
    ) -> str | None:
        attended = None
        if rewrite.mask is not None:
            attended = _compared_rows(new[rewrite.mask.name or ""], shape)
        counts = None if rewrite.counts is None else new[rewrite.counts.name or ""]
        for index, (old_value, new_value) in enumerate(rewrite.outputs):
            a, b = old[old_value.name or ""], new[new_value.name or ""]
            if a.shape != b.shape:
                return f"{old_value.name!r} becomes {b.shape}, was {a.shape}"
            if a.dtype != b.dtype:
                return f"{old_value.name!r} becomes {b.dtype}, was {a.dtype}"
            dtype = new_value.dtype or ir.DataType.FLOAT
            half = any(v.dtype == ir.DataType.FLOAT16 for v in rewrite.node.inputs if v is not None)
            # Integers are equal or not.
            tolerance = TOLERANCES.get(ir.DataType.FLOAT16 if half else dtype, 0.0)
            a, b = _ordinary(a), _ordinary(b)
            valid = np.isfinite(a)  # an unguarded row that is masked everywhere is NaN
            if attended is not None and index == 0:
                valid &= _rows_like(attended, a)
            if counts is not None and index > 0:
                valid &= (np.arange(a.shape[2]) < counts[:, None])[:, None, :, None]
            if not valid.any():
                continue
            if not (np.isfinite(b) | ~valid).all():
                return f"{old_value.name!r} is not finite where it was"
            gap, _, spread = gap_of(a, b, valid)
            difference = gap / (spread or 1.0)
            if not difference <= tolerance:
                return f"{old_value.name!r} differs by {difference:.1e} of its standard deviation"
            self.difference = max(self.difference, difference)
        return None


def _ordinary(array: Any) -> Any:
    """Numbers of a type that NumPy itself has."""
    return array if array.dtype.kind in "biuf" else array.astype(np.float64)


def _chosen(rng: np.random.Generator, shape: Sequence[int], experts: int) -> Any:
    """Experts for each token, those of one differing; the last token's are every odd one's too, so
    that some experts have many tokens and some none.
    """
    slots = shape[-1] if len(shape) > 1 else 1
    rows = int(np.prod(shape)) // max(slots, 1)
    picked = np.argsort(rng.random((rows, experts)), axis=1)
    picked = np.take(
        picked, np.arange(slots) % experts, axis=1
    )  # again, where slots outnumber them
    picked[1::2] = picked[-1:]
    return picked.reshape(shape)


def _fitting(roles: Roles, shapes: Iterable[RunShape]) -> list[RunShape]:
    """The shapes nearest to these that the model takes, each once."""
    fitting = (nearest_shape(roles, shape) for shape in shapes)
    return list(dict.fromkeys(shape for shape in fitting if shape is not None))


def _compared_rows(mask: Any, shape: RunShape) -> Any:
    """bool [.., S, 1]: the rows of a mask that see anything, and those of real tokens, which count
    for the whole model whatever they see.
    """
    # Half of it: a bias beside the fill lifts what is hidden a little.
    seen = mask if mask.dtype == bool else mask > MASKED / 2
    attended = seen.any(axis=-1, keepdims=True)
    real = shape.real_new.reshape(shape.batch, *[1] * max(attended.ndim - 3, 0), shape.new, 1)
    if attended.shape[-2] not in (1, shape.new) or attended.shape[:-3] not in (
        (),
        (1,),
        (shape.batch,),
    ):
        return attended
    return attended | real


def _rows_like(attended: Any, output: Any) -> Any:
    """The attended rows as a mask on attention's output: [B,H,S,D], or with axes cut or merged."""
    while attended.ndim < 4:
        attended = attended[None]
    batch, heads, rows = attended.shape[:3]
    merged = int(np.prod(output.shape[:-1])) // rows  # batch times heads, in this order
    width = output.shape[-1]
    if output.ndim == 3 and heads > 1 and merged % heads and width % heads == 0:
        by_head = np.swapaxes(attended, 1, 2)[..., 0]  # heads merged with columns: [B, S or 1, H]
        columns = np.repeat(by_head, width // heads, axis=-1)
        return np.broadcast_to(columns, output.shape)
    if heads == 1:
        heads = merged // batch
    else:
        batch = merged // heads
    whole = batch * heads * rows == int(np.prod(output.shape[:-1]))
    if not whole or attended.shape[0] not in (1, batch):
        return np.ones(output.shape, bool)
    full = np.broadcast_to(attended, (batch, heads, rows, 1)).reshape(*output.shape[:-1], 1)
    return np.broadcast_to(full, output.shape)


def _given(part: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: feeds[each.name] for each in part.graph.input}
