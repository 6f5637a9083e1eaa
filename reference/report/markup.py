"""HTML from Python values: whatever is not Html already is escaped, so that nobody has to remember to."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""


def html(*parts: object) -> Html:
    """Joins the parts, escaped where they are not Html."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Returns an element; `class_` and the like lose their underscore, an attribute True stands alone, None and False
    are left out."""
    given = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{tag}{given}>{html(*children)}</{tag}>")


def table(header: Sequence[object], rows: Iterable[Sequence[object]], **attributes: object) -> Html:
    """Returns a table that scrolls in its own container. Cells that are `td` or `th` already are taken as such."""
    head = element("tr", *(cell("th", name) for name in header))
    body = [element("tr", *(cell("td", value) for value in row)) for row in rows]
    whole = element("table", element("thead", head), element("tbody", *body), **attributes)
    return element("div", whole, class_="scroll", tabindex=0)


def table_of(rows: Sequence[Mapping[str, object]], class_: str | None = None) -> Html:
    """Returns a table of rows that name their cells; there is at least one."""
    return table(list(rows[0]), [list(row.values()) for row in rows], class_=class_)


def cell(tag: str, content: object) -> Html:
    if isinstance(content, Html) and content.startswith(("<td", "<th")):
        return content
    return element(tag, content)


def folded(title: object, *children: object, opened: bool = False) -> Html:
    return element("details", element("summary", title), *children, open=opened)


def none_of(what: str) -> Html:
    return element("p", f"This run had no {what}.", class_="quiet")


def mark(passed: bool, good: str = "ok", bad: str = "FAILED") -> Html:
    return element("span", good if passed else bad, class_="good" if passed else "bad")
