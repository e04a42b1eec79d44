"""Which places of a report are told of: `onnxgen explain`, on the command line and from Python."""

from __future__ import annotations

from onnxgen.errors import UsageError
from onnxgen.report.values import Report, Site
from onnxgen.rules import all_pages
from onnxgen.words import near


def checked_rule(rule: str | None, own: bool) -> str | None:
    """The code of a rule as it is spelled.

    Args:
        own: whether there are rules of the user's, whose codes are not known yet.

    Raises:
        UsageError: there is no such rule.
    """
    codes = [page.code for page in all_pages()]
    if rule is None or rule in codes:
        return rule
    if rule.upper() in codes:
        return rule.upper()
    if not own:
        raise UsageError(f"--rule {rule}: no such rule{near(rule.upper(), codes)}")
    return rule


def chosen(report: Report, name: str | None, rule: str | None) -> list[Site]:
    """The sites that are told of: all that are not fused, or those of a name, fused ones too.

    Raises:
        UsageError: no site has that name.
    """
    sites = [*report.sites, *report.lowered, *report.near_misses]
    if name is None:
        found = [site for site in sites if site.status != "fused"]
    else:
        found = [site for site in sites if _called(site, name)]
        if not found:
            names = [called for site in sites for called in (site.node, site.scope) if called]
            some = f"; there are {', '.join(dict.fromkeys(names[:8]))}" if names else ""
            raise UsageError(f"--site {name}: no such place{near(name, names) or some}")
    return [site for site in found if rule is None or site.rule == rule]


def _called(site: Site, name: str) -> bool:
    nodes = (site.node, *(site.decline.nodes if site.decline is not None else ()))
    return name in nodes or site.scope == name or site.scope.startswith(f"{name}.")
