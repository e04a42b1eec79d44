"""The command `onnxgen new-pattern`: a rule of one's own to start from, with its test."""

from __future__ import annotations

import keyword
from pathlib import Path

import click

from onnxgen.cli_words import PathType
from onnxgen.errors import UsageError
from onnxgen.places import check_place
from onnxgen.report import files

RULE = '''"""{name}: a lower and an upper bound become one operator.

Replaces
    y = Min(Max(x, lo), hi)
    -> Clip-13(x, lo, hi)

Declines
    A bound that is computed, or that has axes: Clip takes scalars.

Numerics
    The same, bit for bit.

Seen in
    the exporter and version that writes it
"""

from onnxscript.rewriter import MatchResult, RewriteRuleClassBase


class {title}(RewriteRuleClassBase):
    """`code` is what --disable takes and reports show."""

    code = "{name}"

    def pattern(self, op, x, lo, hi):
        return op.Min(op.Max(x, lo), hi)

    def check(self, context, x, lo, hi):
        for bound in (lo, hi):
            if bound.const_value is None:
                return MatchResult().fail("a bound is computed", bound)
            if len(bound.const_value.shape) > 0:
                return MatchResult().fail("a bound is no scalar, and Clip takes scalars", bound)
        return MatchResult()

    def rewrite(self, op, x, lo, hi):
        return op.Clip(x, lo, hi)


rules = [{title}]
'''

TEST = '''"""What {name} rewrites, and what it leaves as it is."""

from pathlib import Path

from onnxgen.rule_writing import assert_kept, assert_rewritten

RULES = Path(__file__).with_name("{name}.py")


def test_bounds_become_one_operator():
    assert_rewritten(
        "(float[b,s,40] x) => (float[b,s,40] y) {{ m = Max(x, -1.5)  y = Min(m, 2.0) }}",
        "(float[b,s,40] x) => (float[b,s,40] y) {{ y = Clip(x, -1.5, 2.0) }}",
        RULES,
    )


def test_bounds_with_axes_are_left():
    assert_kept(
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40] lo>"
        "{{ m = Max(x, lo)  y = Min(m, 2.0) }}",
        RULES,
        reason="a bound is no scalar",
    )


def test_another_operator_in_between_is_no_match():
    assert_kept(
        "(float[b,s,40] x) => (float[b,s,40] y)"
        "{{ m = Max(x, -1.5)  n = Neg(m)  y = Min(n, 2.0) }}",
        RULES,
        reason="expected Max, got Neg",
    )
'''


@click.command("new-pattern")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=PathType(file_okay=False),
    default=".",
    metavar="DIR",
    help="Folder to write to; this one unless given.",
)
def new_pattern(name: str, output: Path) -> None:
    """Write NAME.py, a rule of your own in onnxscript's pattern language, and test_NAME.py.

    Both work as they are: change the pattern, what it becomes, and the test's graphs.

    \b
    Example:
      onnxgen new-pattern bounds && pytest test_bounds.py
    """
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii():
        raise UsageError(f"{name!r} is no name of a Python module: letters, digits and '_'")
    files.make_folder(output)
    title = "".join(word.capitalize() for word in name.split("_")) or "Rule"
    written = {output / f"{name}.py": RULE, output / f"test_{name}.py": TEST}
    for path in written:
        check_place(path)
        if path.exists():
            raise UsageError(f"{path} is there already: choose another name")
    for path, text in written.items():
        files.write_text(path, text.format(name=name, title=title))
        click.echo(f"Written {path}")
    rule, test = written
    click.echo(f"Next: pytest {test}; then onnxgen fuse MODEL --rules {rule}")
