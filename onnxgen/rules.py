"""Every rule and every code that onnxgen can say, with its page: `onnxgen rules`, and the docs.

python -m onnxgen.rules > docs/rules.md
"""

from __future__ import annotations

from collections.abc import Iterator

from onnxgen.passes import to_paged
from onnxgen.patterns.pages import ENGINE, Page, page_of, read_page
from onnxgen.patterns.rule import Rule
from onnxgen.targets import ort

PAGING = "PAG"


def all_rules() -> list[type[Rule]]:
    """Raising rules in the order in which they are applied, then those of the target `ort`."""
    return [*(type(rule) for rule in ort.RAISING), *ort.RULES]


def all_pages() -> list[Page]:
    """A page for each rule, and one for what stands in the way of paging."""
    rules = [page_of(rule, rule.code) for rule in all_rules()]
    return [*rules, read_page(to_paged.__doc__ or "", PAGING)]


def page_for(code: str) -> Page | None:
    """The page of a rule, or the one that explains an obstacle such as "PAG004"."""
    for page in all_pages():
        if code == page.code or code in page.reasons:
            return page
    return None


def markdown(page: Page) -> Iterator[str]:
    """A page as Markdown, line by line."""
    yield f"## {page.code}"
    yield ""
    yield f"{page.title[:1].upper()}{page.title[1:]}."
    for heading, text in page.sections.items():
        yield ""
        yield f"### {heading}"
        yield ""
        if heading == "Looks for":
            yield from (f"{number}. {step}" for number, step in enumerate(page.steps, 1))
        elif heading == "Declines" and page.reasons:
            yield "| code | met | expected | what would change it |"
            yield "|---|---|---|---|"
            for reason in page.reasons.values():
                cells = (f"`{reason.code}`", reason.when, reason.expected, reason.change)
                yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        else:
            yield "```text"
            yield text
            yield "```"


def reference() -> str:
    """docs/rules.md: every page."""
    lines = [
        "# Rules",
        "",
        "Generated from the rules' files by `python -m onnxgen.rules > docs/rules.md`; "
        "`onnxgen rules CODE` prints one.",
        "",
        "Any rule may also decline with",
        "",
        *(
            f"- `{each.code}`: {each.when}. {each.change[:1].upper()}{each.change[1:]}."
            for each in ENGINE.values()
        ),
    ]
    for page in all_pages():
        lines += ["", *markdown(page)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
