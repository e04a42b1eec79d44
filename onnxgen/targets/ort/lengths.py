"""The lengths that GroupQueryAttention asks for, read off the model's own inputs, and the guard.

It wants the tokens of each row (less one) and the tokens of the longest row. They come from the
attention mask's width where there is one, not from a cache's length: a runtime that shares one
buffer between past and present feeds caches that are longer than what they hold.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.patterns.building import Builder
from onnxgen.targets.contract import Padding

BOOL, INT32, INT64 = (int(getattr(ir.DataType, name)) for name in ("BOOL", "INT32", "INT64"))
NO_PADDING = "contract: this model was written for inputs without padding"
RIGHT_PADDING = "contract: this model was written for padding behind a prompt only"
BINARY = "contract: this model was written for masks of zeros and ones"
COUNTED = "contract: this model was written for positions that count the tokens"
EMPTY = "contract: this model was written for at least one row and one new token"
SENTENCES = (NO_PADDING, RIGHT_PADDING, COUNTED, EMPTY, BINARY)


def input_mask(facts: Facts, past: ir.Value) -> ir.Value | None:
    """The [B,T] input that marks real tokens, for a cache [B,K,P,D] as long as the past it covers.

    None where there is none, or where the cache is cropped: it then holds fewer places.
    """
    inputs = {value.name: value for value in facts.graph.inputs}
    masks = [each for each in facts.roles.named("mask") if each.axes == ("B", "T")]
    pair = facts.roles.pair_of(past.name or "")
    if len(masks) != 1 or masks[0].additive or pair is None or pair.cap is not None:
        return None
    return inputs[masks[0].name]


def name_guards(graph: ir.Graph) -> None:
    """Give guards their sentence for a name, without the number of a copy that was merged."""
    for sentence in SENTENCES:
        guards = [node for node in graph if (node.name or "").startswith(sentence)]
        for number, node in enumerate(guards):
            node.name = f"{sentence}_{number + 1}" if number else sentence


class Lengths:
    """Makes the nodes for one attention; equal ones of several layers are merged by `tidy`.

    Attributes:
        mask: the [B,T] input that marks real tokens, None where the model has none.
    """

    def __init__(self, facts: Facts, builder: Builder, mask: ir.Value | None) -> None:
        self._builder = builder
        self._facts = facts
        self.mask = mask

    def total(self, q: ir.Value, past: ir.Value) -> ir.Value:
        """T as an int64 vector of one element.

        Args:
            q: [B,S,..]; past: [B,K,P,D].
        """
        op = self._builder.op
        if self.mask is not None:
            return op("Shape", [self.mask], {"start": 1, "end": 2}, name="total_length")
        return op("Add", [self._size(q, 1), self._size(past, 2)], name="total_length")

    def of_zeros_and_ones(self, total: ir.Value) -> ir.Value:
        """T, which can be read only where the mask holds nothing but 0 and 1.

        Other numbers may mean anything: sequences packed in one row, or a bias.
        """
        op = self._builder.op
        assert self.mask is not None
        if self.mask.dtype == ir.DataType.BOOL:
            return total
        real = op("Cast", [op("Cast", [self.mask], {"to": BOOL})], {"to": int(ir.DataType.FLOAT)})
        found = op("Cast", [self.mask], {"to": int(ir.DataType.FLOAT)})
        wrong = op("Cast", [op("Not", [op("Equal", [found, real])])], {"to": INT64})
        # Of no element at all the sum is 0: of a run of nothing another guard speaks.
        wrong = op("ReduceSum", [wrong], {"keepdims": 0})
        return op("Add", [total, self._guard(wrong, BINARY)])

    def rows(
        self, total: ir.Value, q: ir.Value, padding: Padding, positions: ir.Value | None
    ) -> ir.Value:
        """Tokens of each row less one, int32 [B]; fails where the inputs are not as agreed.

        Args:
            total: T; q: [B,S,..].
            positions: an input, [B,S], [1,S] or [S], that must count the tokens as the operator
                does; None for none.
        """
        op, ints = self._builder.op, self._builder.ints
        batch, new = self._size(q, 0), self._size(q, 1)
        real: ir.Value | None = None
        if batch.const_value is None:  # the operator divides by it: the process would end
            missing = op("Sub", [ints(1), op("Min", [op("Mul", [batch, new]), ints(1)])])
            total = op("Add", [total, self._guard(missing, EMPTY)])
        counts = total
        if padding != "any" and self.mask is not None:
            real = self.mask
            if real.dtype != ir.DataType.INT64:
                real = op("Cast", [real], {"to": INT64})
            counts = op("ReduceSum", [real, ints(1)], {"keepdims": 0}, name="tokens")
            if padding == "none":
                wrong, sentence = op("Sub", [total, counts]), NO_PADDING
            else:
                wrong, sentence = self._not_right(real, counts, total, new), RIGHT_PADDING
            guard = self._guard(wrong, sentence)
            counts = op("Add", [counts, guard])
            # The positions are looked at after the padding: where both are wrong it is the cause.
            total = op("Add", [total, guard])
        last = op("Sub", [counts, ints(1)], name="last_token")
        if positions is not None:
            first = op("Sub", [total, new], name="past_tokens")
            last = op("Add", [last, self._counted(positions, first, new, total, real)])
        return op("Cast", [op("Expand", [last, batch])], {"to": INT32}, name="seqlens_k")

    def _counted(
        self,
        positions: ir.Value,
        first: ir.Value,
        new: ir.Value,
        total: ir.Value,
        real: ir.Value | None,
    ) -> ir.Value:
        """The guard that the positions of real tokens count up from `first`, [1]."""
        op, ints = self._builder.op, self._builder.ints
        if positions.dtype != ir.DataType.INT64:
            positions = op("Cast", [positions], {"to": INT64})
        zero, one = (self._builder.constant(np.array(n, dtype=np.int64)) for n in (0, 1))
        steps = op("Range", [zero, op("Squeeze", [new]), one])
        places = op("Add", [op("Unsqueeze", [first, ints(1)]), steps], name="places")
        wrong = op("Abs", [op("Sub", [positions, places])])
        if real is not None:
            recent = op("Slice", [real, op("Sub", [total, new]), total, ints(1)])
            wrong = op("Mul", [wrong, recent])
        return self._guard(op("Min", [wrong, ints(1)]), COUNTED)

    def bias(self, q: ir.Value, total: ir.Value) -> ir.Value:
        """The padding as what is added to the scores, [B,1,S,T]: 0, or the lowest number.

        Not -inf: a row of padding sees nothing, and a NaN there would reach every later layer.
        """
        op, ints = self._builder.op, self._builder.ints
        assert self.mask is not None
        assert q.dtype is not None
        kind = q.dtype.numpy()
        keep = self.mask
        if keep.dtype != ir.DataType.BOOL:
            keep = op("Cast", [keep], {"to": int(ir.DataType.BOOL)})
        low = self._builder.constant(np.array(float(q.dtype.min), dtype=kind))
        zero = self._builder.constant(np.array(0, dtype=kind))
        bias = op("Unsqueeze", [op("Where", [keep, zero, low]), ints(1, 2)])
        full = op("Concat", [ints(1, 1), self._size(q, 1), total], {"axis": 0}, name="sizes")
        return op("Expand", [bias, full], name="attention_bias")

    def _size(self, value: ir.Value, axis: int) -> ir.Value:
        """The size of an axis as an int64 vector of one element, off the graph's inputs if known."""
        shape = self._facts.shapes.of(value)
        known = None if shape is None else self._builder.sizes([shape[axis]])
        if known is not None:
            return known
        return self._builder.op("Shape", [value], {"start": axis, "end": axis + 1}, name="size")

    def _not_right(
        self, mask: ir.Value, counts: ir.Value, total: ir.Value, new: ir.Value
    ) -> ir.Value:
        """[B], above 0 for a row with a hole or without a token, or padded beside a past.

        The operator writes a row's new tokens where its real ones end, less what is new: over a
        past that is where they belong only in rows that are full.
        """
        op, ints = self._builder.op, self._builder.ints
        scalar = op("Squeeze", [total])
        zero, one = (self._builder.constant(np.array(n, dtype=np.int64)) for n in (0, 1))
        places = op("Add", [op("Range", [zero, scalar, one]), ints(1)])
        last = op("ReduceMax", [op("Mul", [mask, places]), ints(1)], {"keepdims": 0})
        hole = op("Sub", [op("Max", [last, ints(1)]), counts])
        over = op("Min", [op("Sub", [total, new]), ints(1)])
        short = op("Mul", [over, op("Sub", [total, counts])])
        return op("Add", [hole, short])

    def _guard(self, violation: ir.Value, sentence: str) -> ir.Value:
        """A 0 that can be read only where no element is above 0: reading it fails elsewhere.

        ONNX Runtime's message holds the node's name, which is the sentence.
        """
        op, ints = self._builder.op, self._builder.ints
        worst = op("ReduceMax", [violation], {"keepdims": 0})
        return op("Gather", [ints(0), worst], {"axis": 0}, name=sentence)
