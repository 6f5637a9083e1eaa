"""Mutants of Mojo sources: statements, with one of them changed.

No parser of Mojo is at hand, so a source is taken apart into logical lines and tokens. What the compiler refuses is no
mutant. There is no switch as in Python: within a loop it would keep the compiler from vectorizing.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .mutant import Choose, next_digit

TOKEN = re.compile(
    r"""(?x) "(?:\\.|[^"\\])*" | \#[^\n]* | (?:0x[0-9A-Fa-f]+ | \d+(?:\.\d+)?(?:e-?\d+)?) | \w+
    | \*\*|//=?|<<|>>|<=|>=|==|!=|->|[-+*/%&|^]= | [^\s\w] | \s+"""
)
SWAPS = {
    "comparison": {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    "lane comparison": {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"},
    "arithmetic": {"+": "-", "-": "+", "*": "+", "//": "*", "%": "//", "/": "*", "<<": ">>", ">>": "<<", "&": "|"},
    "min, max": {"min": "max", "max": "min"},
    "and, or": {"and": "or", "or": "and"},
}
SIMPLE = re.compile(r"(?s)(?P<head>\s*(?:var [^=:]+?(?::[^=]+)?|[A-Za-z_][\w.]*) = )(?P<of>.+)")
CONDITION = re.compile(r"(?s)(?P<head>\s*(?:if|elif|while) )(?P<of>.+)(?P<tail>:\s*)$")
RETURN = re.compile(r"(?s)(?P<head>\s*return )(?P<of>.+)")
LOOP = re.compile(r"(?s)(?P<head>\s*for .+? in )(?P<of>range\(.+\))(?P<tail>:\s*)$")
STATEMENT = re.compile(r"(?s)\s*[A-Za-z_][\w.]*(?:\[.*\])?(?:\(.*\)|(?:\.\w+|\[[^=]*\])* [-+*/]?= .+)$")
LEFT = re.compile(
    r"\s*(comptime|def|struct|trait|from|import|raise|@|else|pass|break|continue|_ = |fn|try|except|\.\.\.)"
)


@dataclass(frozen=True)
class Line:
    """A logical line: first: the number of its first physical line. text: without the newline at its end."""

    first: int
    text: str


def logical_lines(text: str) -> Iterator[Line]:
    """Yields the lines of a source, those inside brackets or a docstring joined."""
    held: list[str] = []
    start, depth, quoted = 1, 0, False
    for number, line in enumerate(text.split("\n"), 1):
        start = start if held else number
        held.append(line)
        quoted ^= line.count('"""') % 2 == 1
        if not quoted and '"""' not in line:
            tokens = [token for token in TOKEN.findall(line) if token[0] not in '"#']
            depth += sum((token in "([{") - (token in ")]}") for token in tokens)
        if not depth and not quoted:
            yield Line(start, "\n".join(held))
            held = []


def on_gpu(text: str) -> set[int]:
    """Returns the lines of functions that only a GPU executes, by their names."""
    found: set[int] = set()
    inside = False
    for line in logical_lines(text):
        if line.text[:1].strip():
            inside = re.match(r"def \w+_on_gpu\b", line.text) is not None
        if inside:
            found.add(line.first)
    return found


@dataclass
class Group:
    """What stands in brackets: arguments, of which each may change; parameters, known when it is compiled, stay."""

    opening: str
    arguments: "list[Part]"
    separators: list[str]
    parameters: bool

    def __str__(self) -> str:
        return self.joined(map(str, self.arguments))

    def joined(self, arguments: Iterable[str]) -> str:
        pairs = zip(arguments, self.separators, strict=True)
        return self.opening + "".join(argument + separator for argument, separator in pairs)


@dataclass
class Part:
    """An expression, or an argument: tokens, and groups among them. name: of a keyword argument, with its "="."""

    name: str
    pieces: list[str | Group]

    def __str__(self) -> str:
        return self.name + self.code

    @property
    def code(self) -> str:
        return "".join(map(str, self.pieces))


def parsed(tokens: Sequence[str], at: int = 0, within: str = "") -> tuple[Part, int]:
    """Returns the expression that begins at a token, and where it ends: at a comma or bracket, if within brackets."""
    pieces: list[str | Group] = []
    while at < len(tokens) and not (within and tokens[at] in (",", ")", "]", "}")):
        if tokens[at] in ("(", "[", "{"):
            group, at = parsed_group(tokens, at)
            pieces.append(group)
        else:
            pieces.append(tokens[at])
            at += 1
    words = [index for index, piece in enumerate(pieces) if not isinstance(piece, str) or piece.strip()]
    named = within and len(words) > 2 and pieces[words[1]] == "="
    first = words[1] + 1 if named else 0
    return Part("".join(map(str, pieces[:first])), pieces[first:]), at


def parsed_group(tokens: Sequence[str], at: int) -> tuple[Group, int]:
    opening, before = tokens[at], "".join(tokens[at - 1 : at])
    group = Group(opening, [], [], False)
    at += 1
    while not group.separators or group.separators[-1] == ",":
        argument, at = parsed(tokens, at, opening)
        group.arguments.append(argument)
        group.separators.append(tokens[at] if at < len(tokens) else "")
        at += 1
    follows = "".join(tokens[at : at + 1])
    group.parameters = opening == "[" and (follows in ("(", ".") or before[:1].isupper())
    return group, at


def variants(part: Part) -> Iterator[tuple[str, str]]:
    """Yields what an expression becomes, with the operator that made it so; what is in brackets stays."""
    pieces = part.pieces
    for at, piece in enumerate(pieces):
        if isinstance(piece, Group) or not piece.strip() or piece[0] in '"#':
            continue
        before, after = ("".join(map(str, some)) for some in (pieces[:at], pieces[at + 1 :]))
        following = pieces[at + 1] if at + 1 < len(pieces) else ""
        call = isinstance(following, Group) and following.opening == "("
        alone = unary(before)
        for operator, pairs in SWAPS.items():
            word = operator in ("lane comparison", "min, max")
            if piece in pairs and (call and before.endswith(".") == (operator[0] == "l") if word else not alone):
                yield operator, before + pairs[piece] + after
        if piece == "-" and alone:
            yield "sign", before + after
        if piece == "not":
            yield "not dropped", before + after.lstrip()
        if piece[0].isdigit() and (other := str(int(piece) + 1) if piece.isdigit() else next_digit(piece)):
            yield "constant", before + other + after
        if piece in ("+", "-", "*") and not alone:
            yield "term dropped", before.rstrip()
        if piece == "ceildiv" and isinstance(following, Group):
            number, by = (str(argument).strip() for argument in following.arguments)
            yield "remainder dropped", f"{before}(({number}) // ({by})){after[len(str(following)) :]}"
        if piece == "cast" and (left := re.match(r"\[[\w.]+\]\(\)\.cast\[[\w.]+\]\(\)", after)):
            yield "cast left out", before.removesuffix(".") + after[left.end() :]


def unary(before: str) -> bool:
    return not before.strip() or before.rstrip()[-1] in "([,=*/+-<>:" or before.split()[-1] in ("return", "and", "or")


def depth_of(text: str) -> int:
    return sum(text.count(opening) for opening in "([{") - sum(text.count(closing) for closing in ")]}")


@dataclass(frozen=True)
class Writer:
    """Writes expressions of a line with the mutant that is chosen, if it is in them."""

    file: str
    line: int
    choose: Choose

    def chosen(self, operator: str, before: str, after: str) -> bool:
        return bool(self.choose(self.file, self.line, operator, " ".join(before.split()), " ".join(after.split())))

    def expression(self, code: str) -> str:
        return self.written(parsed(TOKEN.findall(code))[0])

    def written(self, part: Part) -> str:
        changed = [after for operator, after in variants(part) if self.chosen(operator, part.code, after)]
        inside = "".join(self.written_group(piece) if isinstance(piece, Group) else piece for piece in part.pieces)
        return part.name + (f"({changed[0]})" if changed else inside)

    def written_group(self, group: Group) -> str:
        if group.parameters:
            return str(group)
        arguments = [self.written(argument) for argument in group.arguments]
        first, second = [argument.code.strip() for argument in group.arguments[:2]] if len(arguments) > 1 else ("", "")
        plain = all(re.fullmatch(r"[A-Za-z_][\w.]*", each) for each in (first, second)) and first != second
        swappable = plain and group.opening == "("
        if swappable and self.chosen("arguments swapped", f"{first}, {second}", f"{second}, {first}"):
            names = (argument.name for argument in group.arguments)
            arguments[:2] = [f"{name} {other}" for name, other in zip(names, (second, first), strict=False)]
        return group.joined(arguments)


def instrumented(text: str, file: str, choose: Choose) -> str:
    """Returns a source with the mutant in it for which `choose` returns a number; without one as it was."""
    left = on_gpu(text)
    return "\n".join(line.text if line.first in left else rewritten(line, file, choose) for line in logical_lines(text))


def rewritten(line: Line, file: str, choose: Choose) -> str:
    text = line.text
    if LEFT.match(text) or '"""' in text:
        return text
    code, writer = text.split("  #")[0], Writer(file, line.first, choose)
    for form in (SIMPLE, CONDITION, RETURN, LOOP):
        if (match := form.fullmatch(code)) and depth_of(match["head"]) == 0:
            written = writer.expression(match["of"])
            return f"{match['head']}{written}{match.groupdict().get('tail') or ''}" if written != match["of"] else text
    return statement(writer, code, text) if STATEMENT.fullmatch(code) else text


def statement(writer: Writer, code: str, text: str) -> str:
    """Returns a call or an assignment with its mutant, which may be to skip it."""
    indent, body = code[: -len(code.lstrip())], code.strip()
    if writer.chosen("statement skipped", body, "pass"):
        return f"{indent}pass"
    assigned = re.fullmatch(r"(?s)(.+?) ([-+*/]?)= (.+)", body)
    if assigned and depth_of(assigned[1]):
        assigned = None  # a call with a keyword
    if assigned and assigned[2] in ("+", "-"):
        other = f"{assigned[1]} {'+-'.replace(assigned[2], '')}= {assigned[3]}"
        if writer.chosen("arithmetic", body, other):
            return indent + other
    left = f"{writer.expression(assigned[1])} {assigned[2]}= " if assigned else ""
    written = left + writer.expression(assigned[3] if assigned else body)
    return indent + written if written != body else text
