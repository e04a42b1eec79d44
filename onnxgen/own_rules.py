"""Finding the rules that users wrote: files that `--rules` names, and installed packages.

Each offers one name, `rules`: a rule, several, or a `RewriteRuleSet`. A rule is a `RewriteRule` or
a subclass of `RewriteRuleClassBase` of onnxscript, or a subclass of `onnxgen.patterns.rule.Rule`.
It may say, as attributes:

    code    what `--disable` takes and the report shows; by default the rule's name
    kind    what its sites are called; by default the code
    stage   "before" (the default) or "after": when it is applied, seen from our own rules

Packages offer theirs under the entry point group `onnxgen.patterns`: `module:rules`, or `module`.
Code is run because the user names a file or has installed a package, never because of a model.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase, RewriteRuleSet

from onnxgen.errors import FileError, UsageError
from onnxgen.patterns.foreign import STAGES, GivenRule, Origin, OwnRule, ScriptRule, raised
from onnxgen.patterns.rule import Rule

GROUP = "onnxgen.patterns"
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class OwnRules:
    """Users' rules, in the order in which they are applied.

    Attributes:
        rules: those of files first, then those of packages.
        warnings: one sentence for each package whose rules cannot be had.
    """

    rules: tuple[OwnRule, ...] = ()
    warnings: list[str] = field(default_factory=list)

    @property
    def codes(self) -> list[str]:
        return [rule.code for rule in self.rules]

    def at(self, stage: str) -> list[OwnRule]:
        """Those of a stage."""
        return [rule for rule in self.rules if rule.stage == stage]


def find_rules(given: Iterable[Any], taken: Collection[str]) -> OwnRules:
    """The rules of files, then those of installed packages.

    Args:
        given: paths of files, or rules themselves.
        taken: codes that are ours.

    Raises:
        FileError: a file cannot be read.
        UsageError: a file is no Python, raises, has no `rules`, or one that is none; a code is
            taken.
    """
    found: list[OwnRule] = []
    codes = dict.fromkeys(taken, "onnxgen")
    for number, each in enumerate(given, 1):
        if isinstance(each, str | Path):
            path = Path(each)
            origin = Origin(str(path), str(path.resolve()))
            found += _rules(_offered(_load(path), origin), path.stem, origin, codes)
        else:
            found += _rules(each, f"rule{number}", Origin("the rules given"), codes)
    warnings: list[str] = []
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        package = entry.dist.name if entry.dist is not None else entry.value
        origin = Origin(f"the package {package}")
        try:
            try:
                loaded = entry.load()
            except (Exception, SystemExit) as error:
                raise UsageError(raised(error, "")) from error
            offered = _offered(loaded, origin) if isinstance(loaded, ModuleType) else loaded
            found += _rules(offered, entry.name, origin, dict(codes))
            codes |= {rule.code: origin.name for rule in found if rule.origin == origin}
        except UsageError as error:
            warnings.append(
                f"the rules of the package {package} ({entry.value}) are left out: {error}"
            )
    return OwnRules(tuple(found), warnings)


def _load(path: Path) -> ModuleType:
    """Run a file as a module of its own; it is found again by whoever asks for its source."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    file = str(path.resolve())
    name = f"onnxgen_rules_{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}"
    spec = importlib.util.spec_from_loader(name, None, origin=file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = file
    sys.modules[name] = module  # dataclasses look themselves up
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} is no file of rules: {raised(error, file)}") from error
    return module


def _offered(module: ModuleType, origin: Origin) -> Any:
    if not hasattr(module, "rules"):
        raise UsageError(f"{origin.name} has no rules: it must define the name 'rules'")
    return module.rules


def _rules(offered: Any, stem: str, origin: Origin, codes: dict[str, str]) -> list[OwnRule]:
    """What was offered as rules, each under a code that no other has; adds these to `codes`."""
    found: list[OwnRule] = []
    for number, variants in enumerate(_groups(offered, origin), 1):
        rule = _rule(variants, f"{stem}-{number}", origin)
        if not _CODE.fullmatch(rule.code):
            raise UsageError(
                f"{origin.name}: {rule.code!r} is no code: letters, digits, '-', '_' and '.'"
            )
        if rule.code in codes:
            raise UsageError(
                f"{origin.name}: the code {rule.code} is taken by a rule of {codes[rule.code]}: "
                "give the rule an attribute 'code' of its own"
            )
        codes[rule.code] = origin.name
        found.append(rule)
    if not found:
        raise UsageError(f"{origin.name} has no rules: 'rules' is empty")
    return found


def _groups(offered: Any, origin: Origin) -> list[list[Any]]:
    """Rules, one a list; those of a set that bear one name are one rule in several spellings."""
    if isinstance(offered, RewriteRuleSet):
        named: dict[Any, list[Any]] = {}
        for rule in offered:
            named.setdefault(rule.name or rule, []).append(rule)
        return list(named.values())
    if isinstance(offered, str) or not isinstance(offered, Iterable):
        return [[offered]]
    return [group for each in offered for group in _groups(each, origin)]


def _rule(variants: Sequence[Any], default: str, origin: Origin) -> OwnRule:
    first = variants[0]
    if isinstance(first, type) and issubclass(first, Rule | RewriteRuleClassBase):
        try:
            make: Any = first.rule if issubclass(first, RewriteRuleClassBase) else first
            first = make()
        except Exception as error:
            raise UsageError(
                f"{origin.name}: the rule {first.__name__} cannot be made: "
                f"{raised(error, origin.file)}"
            ) from error
        variants = [first]
    if not isinstance(first, Rule | RewriteRule):
        raise UsageError(
            f"{origin.name}: {first!r} among its rules is none: onnxscript's RewriteRule, a "
            "subclass of its RewriteRuleClassBase or of onnxgen.patterns.rule.Rule"
        )
    stage = _said(first, "stage") or "before"
    if stage not in STAGES:
        raise UsageError(f"{origin.name}: a rule's stage is {stage!r}: it is 'before' or 'after'")
    if isinstance(first, Rule):
        missing = [name for name in ("code", "kind", "anchors") if not hasattr(first, name)]
        if missing:
            raise UsageError(
                f"{origin.name}: the rule {type(first).__name__} has no {missing[0]!r}"
            )
        return GivenRule(first, stage, origin)
    code = _said(first, "code") or re.sub(r"[^A-Za-z0-9_.-]+", "-", first.name or default)
    if any(variant.as_function for variant in variants):
        raise UsageError(
            f"{origin.name}: the rule {code} makes a function of what it matches (as_function), "
            "which onnxgen does not take"
        )
    return ScriptRule(variants, str(code), str(_said(first, "kind") or code), stage, origin)


def _said(rule: Any, name: str) -> Any:
    """An attribute of a rule; of one that `RewriteRuleClassBase.rule` made, its class's."""
    maker = getattr(getattr(rule, "graph_pre_visitor", None), "__self__", None)
    return getattr(rule, name, None) or getattr(maker, name, None)
