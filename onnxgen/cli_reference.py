"""The command reference, written from the commands themselves.

python -m onnxgen.cli_reference > cli.md
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import click

from onnxgen.cli import main
from onnxgen.patterns.rule import Rule
from onnxgen.targets import ort

_PIPE = r"\|"  # which would end a table's cell, in code too


def reference() -> str:
    """cli.md: every command with its usage, arguments, options and example; every rule."""
    lines = [
        "# Commands",
        "",
        "Generated from the commands by `python -m onnxgen.cli_reference > cli.md`.",
        "",
        *_commands("onnxgen", main),
        "",
        *_rules(),
    ]
    return "\n".join(lines) + "\n"


def _commands(name: str, command: click.Command) -> Iterator[str]:
    """A command, and those of its group."""
    yield from _command(name, command)
    inner = command.commands if isinstance(command, click.Group) else {}
    for word, each in sorted(inner.items()):
        if not each.hidden:
            yield ""
            yield from _commands(f"{name} {word}", each)


def _command(name: str, command: click.Command) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield f"    {name} {_usage(command)}"
    yield from _help(command.help or "")
    options = [param for param in command.params if isinstance(param, click.Option)]
    shown = [option for option in options if not option.hidden]
    if shown:
        yield ""
        yield "| option | meaning |"
        yield "|---|---|"
        for option in shown:
            yield f"| `{_spelling(option).replace('|', _PIPE)}` | {_meaning(option)} |"


def _rules() -> Iterator[str]:
    """Every rule's code, with the first line of the file that it is in."""
    yield "## Rules"
    yield ""
    yield "What `--disable` takes; those of `--target ort` begin with ORT, and MOE003 is its own too."
    yield ""
    yield "| code | what is rewritten |"
    yield "|---|---|"
    rules: list[type[Rule]] = [*(type(rule) for rule in ort.RAISING), *ort.RULES]
    for rule in rules:
        title = (sys.modules[rule.__module__].__doc__ or "").partition("\n")[0]
        yield f"| `{rule.code}` | {title.removeprefix(f'{rule.code}: ')} |"


def _usage(command: click.Command) -> str:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    words = ["[OPTIONS]", *(each.metavar or str(each.name).upper() for each in arguments)]
    if isinstance(command, click.Group):
        words.append("COMMAND")
    return " ".join(words)


def _help(text: str) -> Iterator[str]:
    """A docstring's paragraphs; those that click leaves as they are become code."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        yield ""
        if not paragraph.startswith("\b\n"):
            yield " ".join(paragraph.split())
            continue
        title, *code = paragraph.removeprefix("\b\n").splitlines()
        yield title
        yield ""
        yield from (f"    {line.strip()}" for line in code)


def _spelling(option: click.Option) -> str:
    spelling = ", ".join(option.opts)
    if option.is_flag or option.count:
        return spelling
    if isinstance(option.type, click.Choice):
        return spelling + " " + "|".join(map(str, option.type.choices))
    return f"{spelling} {option.metavar or option.type.name.upper()}"


def _meaning(option: click.Option) -> str:
    text = option.help or ""
    if option.show_default:
        text += f" Default: {option.default}."
    return text


if __name__ == "__main__":
    print(reference(), end="")
