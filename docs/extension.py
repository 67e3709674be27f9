"""What these pages take from the code itself: settings, commands, docstrings, measured results."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

MADE = re.compile(r"^<!-- made: (\w+) -->$", re.M)
RESULTS = re.compile(r"\[([^\]]+)\]\((?:\.\./)+profiling/results/(\w+)\.md\)")
ESCAPED = re.compile(r"([*_|\\])")
RANGES = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", plain)
    return {"parallel_read_safe": True}


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts what is made from the code into a page; links to measured results, which work in the repository as
    they stand, go to the pages that `measured`, a link to that folder, makes of them."""
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "settings": settings,
        "peft_settings": peft_settings,
        "commands": commands,
        "formats": formats,
        "examples": examples,
    }
    text = MADE.sub(lambda found: "\n".join(makers[found[1]]()), source[0])
    text = RESULTS.sub(r"{doc}`\1 </measured/\2>`", text)
    folder, _, name = docname.rpartition("/")
    if folder == "measured" and not text.startswith("# "):
        text = f"# {name.replace('_', ' ').capitalize()}\n\n{text}"
    source[0] = text


# settings


def settings() -> Iterator[str]:
    """Every section and key of a configuration, from its JSON schema."""
    from snell_dist.config import full_schema
    from snell_dist.run_config import Run

    schema = full_schema(Run)
    for section, about in schema["properties"].items():
        if section == "include":
            continue
        yield f"## {section}"
        named = about.get("discriminator", {}).get("mapping")
        if named is None:
            yield from _keys(schema, about["$ref"], section)
            continue
        yield f"`{section}.name` is one of {', '.join(f'[`{name}`](#{section}-{name})' for name in named)}."
        for name, reference in named.items():
            yield f"\n({section}-{name})=\n### {section}: {name}"
            yield from _keys(schema, reference, section)


def _keys(schema: dict[str, Any], reference: str, section: str) -> Iterator[str]:
    keys = _found(schema, reference)["properties"]
    keys = {key: about for key, about in keys.items() if "const" not in about}
    if not keys:
        yield "\nNo further keys.\n"
        return
    yield "\n| key | type | default | meaning |\n| --- | --- | --- | --- |"
    for key, about in keys.items():
        default = f"`{json.dumps(about['default'], ensure_ascii=False)}`" if "default" in about else "must be said"
        yield f"| `{section}.{key}` | {_type(schema, about)} | {default} | {_cell(about.get('description', ''))} |"
    yield ""


def _found(schema: dict[str, Any], reference: str) -> dict[str, Any]:
    return schema["$defs"][reference.rpartition("/")[2]]


def _type(schema: dict[str, Any], about: dict[str, Any]) -> str:
    """JSON schema's type of a value, in words."""
    if "anyOf" in about:
        return " or ".join(_type(schema, one) for one in about["anyOf"])
    if "$ref" in about:
        keys = _found(schema, about["$ref"])["properties"]
        return "keys " + ", ".join(f"`{key}` ({_type(schema, one)})" for key, one in keys.items())
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    if about["type"] == "array":
        few, many = about.get("minItems"), about.get("maxItems")
        count = "" if few is None else f" of {few}" if few == many else f" of at least {few}"
        return f"list{count}: {_type(schema, about['items'])}"
    limits = [words.format(about[key]) for key, words in RANGES.items() if key in about]
    return " ".join([about["type"], ", ".join(limits)]).strip()


def peft_settings() -> Iterator[str]:
    """What SnellConfig has beside every config of PEFT."""
    from dataclasses import MISSING, fields

    from peft import PeftConfig

    from snell_dist.peft import SnellConfig

    theirs = {known.name for known in fields(PeftConfig)}
    yield "| `SnellConfig` | type | default | meaning |\n| --- | --- | --- | --- |"
    for known in fields(SnellConfig):
        if known.name not in theirs:
            default = known.default if known.default_factory is MISSING else known.default_factory()
            kind = str(known.type).replace("|", "\\|")
            yield f"| `{known.name}` | `{kind}` | `{default!r}` | {_cell(known.metadata['help'])} |"
    yield ""


# commands


def commands() -> Iterator[str]:
    """Every command with its arguments, from the parser itself."""
    from snell_dist.cli import parser

    yield from _command(parser())


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    below = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield f"\n## {parser.prog}\n"
        yield _sentence(parser.description or "")
        usage = " ".join(parser.format_usage().removeprefix("usage: ").replace("[-h] ", "").split())
        yield f"\n```text\n{usage}\n```\n"
        yield "| argument | meaning |\n| --- | --- |"
        for action in actions:
            yield f"| {_argument(action)} | {_cell(_help(parser, action))} |"
        yield f"\n{_sentence(parser.epilog or '')}\n"
    for action in below:
        for name, command in action.choices.items():
            about = {choice.dest: choice.help for choice in action._choices_actions}.get(name)
            command.description = command.description or about
            yield from _command(command)


def _argument(action: argparse.Action) -> str:
    value = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    shown = value if isinstance(value, str) else " ".join(value)
    if not action.option_strings:
        return f"`{shown}`"
    takes = "" if action.nargs == 0 else f" {shown}"
    return f"`{', '.join(action.option_strings)}{takes}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    if action.choices:
        text = f"{text}: {', '.join(map(str, action.choices))}" if text else ", ".join(map(str, action.choices))
    return f"{text} (required)" if action.required and action.option_strings else text


def _sentence(text: str) -> str:
    return text and ESCAPED.sub(r"\\\1", text[0].upper() + text[1:]).rstrip(".") + "."


def _cell(text: str) -> str:
    """Plain text in a cell of a table; `code` stays code."""
    parts = re.split(r"(`[^`]+`)", text)
    escaped = "".join(part if i % 2 else ESCAPED.sub(r"\\\1", part) for i, part in enumerate(parts))
    return escaped.replace("<", "&lt;").replace("--", "\\--")


# examples

CELL = re.compile(r"^# %%( \[markdown\])?\n", re.M)


def examples() -> Iterator[str]:
    """Every script of examples/: its text cells as text, the others as code."""
    for file in sorted((Path(__file__).parent / "examples").glob("*.py")):
        _, *cells = CELL.split(file.read_text())
        for is_text, cell in zip(cells[::2], cells[1::2], strict=True):
            if is_text:
                yield re.sub("^#", "##", re.sub("^# ?", "", cell, flags=re.M), flags=re.M)  # a heading goes one deeper
            else:
                yield f"```python\n{cell.strip()}\n```\n"
        yield f"The whole script: `docs/examples/{file.name}`\n"


# formats


def formats() -> Iterator[str]:
    """What `snell export` writes."""
    from snell_dist import formats

    yield "| `--format` | what is written |\n| --- | --- |"
    for name in formats.NAMES:
        yield f"| `{name}` | {_cell(formats.find(name).ABOUT)} |"
    yield ""


# docstrings


def plain(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Our docstrings are plain text: `code` between backticks, indented lines as they stand, no other markup."""
    result: list[str] = []
    drawn = False
    for number, line in enumerate(lines):
        indented = line.startswith(" ")
        if indented and not drawn and (number == 0 or not lines[number - 1].strip()):
            result += ["::", ""]
            drawn = True
        elif line.strip() and not indented:
            if drawn:
                result.append("")
            drawn = False
        result.append(line if drawn or line.startswith(">>> ") else _escaped(line))
    lines[:] = result


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(part if i % 2 else ESCAPED.sub(r"\\\1", part) for i, part in enumerate(parts))
