"""Just enough of the shell's grammar: simple commands, their words, and which shell expands what. Nothing is executed.

In unquoted text a `$` stands where the shell that reads it expands, LATER where it passes a `$` on (quoted or escaped,
for a shell that a task starts), and EARLIER where an outer shell has expanded already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

LATER, EARLIER = "\ue000", "\ue001"
SUBSTITUTIONS = {"$(": ")", "${": "}", EARLIER + "(": ")", EARLIER + "{": "}"}
CLOSES = {**SUBSTITUTIONS, "<(": ")", ">(": ")", "(": ")", '"': '"', "'": "'", "`": "`"}
DEEPEST = 50  # nobody nests more, and nothing unclosed may cost long searches
BLANK, BREAKS = " \t", " \t\n;|&()<>"
OPENING = {"if", "then", "else", "elif", "do", "while", "until", "{", "!", "time"}
PAIRS = {"fi": "if", "done": "do", "}": "{", ")": "("}
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
REDIRECTION = re.compile(r"(?:\d*|&)(?:<<<|<&|<>|>>|>&|>\||<|>)(?:\d+|-)?")
HEREDOC = re.compile(r"\d*<<(-?)[ \t]*(['\"\\]?)([\w.]+)['\"]?")
VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?:\[[@*]\])?(?::?[-=][^{}]*)?\}|([A-Za-z_]\w*))")
Values = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Heredoc:
    """What stands below a command, up to a word of its own; `quoted`: the reading shell leaves `$` alone."""

    text: str
    quoted: bool
    line: int


@dataclass(frozen=True)
class Command:
    """A simple command with its words as written. `before`, `after`: the operators (or keywords) around it."""

    line: int
    words: tuple[str, ...]
    before: str = "\n"
    after: str = "\n"
    background: bool = False
    heredoc: Heredoc | None = None


def closing(text: str, i: int) -> int:
    """The index past what opens at i: a quotation, a substitution. Where nothing closes it, past the one sign."""
    opened = next(o for o in (text[i : i + 2], text[i]) if o in CLOSES)
    stack, j = [CLOSES[opened]], i + len(opened)
    while j < len(text) and len(stack) < DEEPEST:
        top, sign, pair = stack[-1], text[j], text[j : j + 2]
        if sign == "\\" and top != "'":
            j += 2
            continue
        if sign == top:
            stack.pop()
            if not stack:
                return j + 1
        elif top == "'":
            pass
        elif pair in SUBSTITUTIONS:
            stack.append(CLOSES[pair])
            j += 1
        elif sign == "`" or (sign in "'\"" and top != '"'):
            stack.append(sign)
        elif sign == "(" and top == ")":
            stack.append(")")
        elif sign == "#" and top == ")" and text[j - 1] in " \t\n":
            j = text.find("\n", j) if "\n" in text[j:] else len(text)
        j += 1
    return i + 1


def past(text: str, i: int) -> int:
    """The index past the sign at i, or past what opens there."""
    if text[i] == "\\":
        return i + 2
    return closing(text, i) if text[i : i + 2] in CLOSES or text[i] in CLOSES else i + 1


def _word(text: str, i: int) -> int:
    start = i
    while i < len(text):
        if text[i] == "(" and re.fullmatch(r"[A-Za-z_]\w*\+?=", text[start:i]):
            i = closing(text, i)  # an array
        elif text[i] in BREAKS and text[i : i + 2] not in ("<(", ">("):
            break
        else:
            i = past(text, i)
    return min(i, len(text))


def commands(text: str, line: int = 1) -> list[Command]:
    """Every simple command, in the order in which they stand; those inside $(...) are left in their words."""
    reader = _Reader(text, line)
    while reader.i < len(text):
        reader.step()
    reader.end("\n")
    return reader.found


class _Reader:
    def __init__(self, text: str, line: int) -> None:
        self.text, self.line, self.first, self.i = text, line, line, 0
        self.found: list[Command] = []
        self.words: list[str] = []
        self.keyword, self.before = "", "\n"
        self.below: list[tuple[bool, bool, str]] = []  # heredocs of this line: stripped of tabs, quoted, delimiter
        self.opened: list[tuple[str, int]] = []  # groups, and where in `found` they began
        self.group: int | None = None  # where the group began that has just ended
        self.pattern = False  # of a `case`

    def step(self) -> None:
        text, i = self.text, self.i
        sign, pair = text[i], text[i : i + 2]
        if pair == "\\\n":
            self.line, self.i = self.line + 1, i + 2
        elif sign in BLANK:
            self.i += 1
        elif sign == "#":
            self.i = text.find("\n", i) if "\n" in text[i:] else len(text)
        elif sign == "\n":
            self.end("\n")
            self.line, self.i = self.line + 1, i + 1
            self.heredocs()
        elif pair in ("&&", "||", ";;", "|&"):
            self.end("|" if pair == "|&" else pair)
            self.pattern, self.i = pair == ";;", i + 2
        elif pair == "((" and not self.words:
            self.take(closing(text, i))
        elif pair not in ("<(", ">(") and not text.startswith("<<<", i) and (match := HEREDOC.match(text, i)):
            self.below.append((bool(match[1]), bool(match[2]), match[3]))
            self.i = match.end()
        elif pair not in ("<(", ">(") and (match := REDIRECTION.match(text, i)):
            self.take(match.end())
        elif sign in ";|&()":
            self.end(sign)
            self.i += 1
        else:
            self.take(max(i + 1, _word(text, i)))

    def take(self, j: int) -> None:
        """One word, up to j."""
        word = self.text[self.i : j].replace("\\\n", "")
        ahead = not self.words
        if self.pattern and ahead and word != "esac":
            self.i = self.text.find(")", self.i) + 1 or len(self.text)
            self.pattern = False
            return
        if word == "{" and self.words[:1] == ["function"]:
            self.words.clear()
            self.opened.append(("{", len(self.found)))
        elif ahead and word in OPENING:
            self.keyword = word
            if word in PAIRS.values():
                self.opened.append((word, len(self.found)))
        elif ahead and word in PAIRS:
            self.close(word)
        elif word == "in" and self.words[:1] == ["case"]:
            self.words.clear()
            self.pattern = True
        else:
            self.first = self.line if ahead else self.first
            self.words.append(word)
        self.line, self.i = self.line + self.text.count("\n", self.i, j), j

    def end(self, operator: str) -> None:
        """A command ends at an operator, which also says whether it, or the group before it, runs in the background."""
        if operator == ")":
            self.end(";")
            self.close(")")
            return
        if self.words and operator != "(":  # which follows the name of a function
            self.found.append(Command(self.first, tuple(self.words), self.keyword or self.before, operator))
            k = len(self.found) - 1
            while operator == "&" and k >= 0 and (k == len(self.found) - 1 or self.found[k].after in ("|", "&&", "||")):
                self.found[k] = replace(self.found[k], background=True)
                k -= 1
        elif self.group is not None and operator in ("&", "|"):
            for k in range(self.group, len(self.found)):
                self.found[k] = replace(self.found[k], background=operator == "&", after=operator)
        if self.words or operator != "\n":
            self.before = operator
        if operator == "(":
            self.opened.append(("(", len(self.found)))
        self.group, self.keyword = None, ""
        self.words.clear()

    def close(self, word: str) -> None:
        if self.opened and self.opened[-1][0] == PAIRS[word]:
            self.group = self.opened.pop()[1]

    def heredocs(self) -> None:
        for stripped, quoted, delimiter in self.below:
            body, self.i = _heredoc(self.text, self.i, stripped, delimiter)
            if self.found:
                self.found[-1] = replace(self.found[-1], heredoc=Heredoc(body, quoted, self.line))
            self.line += body.count("\n") + 1
        self.below.clear()


def _heredoc(text: str, i: int, stripped: bool, delimiter: str) -> tuple[str, int]:
    tabs = "\t*" if stripped else ""
    match = re.compile(f"^{tabs}{re.escape(delimiter)}$", re.MULTILINE).search(text, i)
    return (text[i : match.start()], min(match.end() + 1, len(text))) if match else (text[i:], len(text))


def unquote(word: str) -> str:
    """The word as the command gets it, but for what is still to be expanded: that is marked (see above)."""
    out, i, double, ticked = [], 0, False, False
    while i < len(word):
        sign, pair = word[i], word[i : i + 2]
        if sign == "\\" and i + 1 < len(word):
            out.append(LATER if pair[1] == "$" else pair[1] if not double or pair[1] in '"\\`\n' else pair)
            i += 2
        elif sign == "'" and not double and closing(word, i) > i + 1:
            out.append(word[i + 1 : closing(word, i) - 1].replace("$", LATER))
            i = closing(word, i)
        elif sign == '"':
            double = not double
            i += 1
        elif sign == "`":
            out.append(")" if ticked else "$(")
            ticked = not ticked
            i += 1
        elif pair in SUBSTITUTIONS:
            out.append(word[i : closing(word, i)])
            i = closing(word, i)
        else:
            out.append(sign)
            i += 1
    return "".join(out)


def inner(text: str) -> str:
    """An unquoted word as the script of another shell."""
    return text.replace("$", EARLIER).replace(LATER, "$")


def shown(text: str) -> str:
    return text.replace(LATER, "$").replace(EARLIER, "$")


def fill(text: str, values: Values) -> str:
    """Variables that the script gives a value, replaced by it."""

    def value(match: re.Match[str]) -> str:
        known = values.get(match[1] or match[2])
        return match[0] if known is None else " ".join(known)

    text = VARIABLE.sub(value, text)
    return re.sub(r"\$\(\([^()]*(?:\([^()]*\)[^()]*)*\)\)", lambda found: _names(found[0], values), text)


def _names(arithmetic: str, values: Values) -> str:
    """In $((...)) a variable needs no `$`."""
    return re.sub(r"(?<![\w$])[A-Za-z_]\w*", lambda m: " ".join(values[m[0]]) if m[0] in values else m[0], arithmetic)


def expand(words: tuple[str, ...], values: Values) -> Iterator[str]:
    """Words as a command gets them; one that is a variable alone may become many, as `"${command[@]}"` does."""
    for word in words:
        alone = re.fullmatch(r"\$\{(\w+)\[[@*]\]\}", unquote(word))
        if alone and alone[1] in values:
            yield from values[alone[1]]
        elif word.startswith("$") and VARIABLE.fullmatch(word):
            yield from split(fill(unquote(word), values))
        else:
            yield fill(unquote(word), values)


def split(text: str) -> Iterator[str]:
    """At blanks, but for those inside substitutions."""
    start = i = 0
    while i < len(text):
        if text[i].isspace():
            if i > start:
                yield text[start:i]
            start = i = i + 1
        else:
            i = closing(text, i) if text[i : i + 2] in SUBSTITUTIONS else i + 1
    if start < len(text):
        yield text[start:]


def array(word: str) -> tuple[str, ...]:
    """The words of `(...)`, as written."""
    return tuple(w for command in commands(word[1:-1]) for w in command.words)
