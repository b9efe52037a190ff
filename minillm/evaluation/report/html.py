"""Building blocks of the HTML reports: pages, tables and cells. Whatever is generated is escaped.

Templates are in `templates`, and escape every value (Jinja, autoescape). A page holds its style and its script, and
loads nothing, so that it works offline and from a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from minillm.evaluation.formatting import number

MAX_PROMPTS = 400
"""Prompts in a table of answers, which is searched and shown ten at a time."""

_TEMPLATES = Environment(loader=PackageLoader("minillm.evaluation.report"), autoescape=True, undefined=StrictUndefined)


def write_page(folder: Path, sections: Iterable[str], *, refresh: int = 0) -> Path:
    """Write `report.html`, a self-contained page, into a folder whose name is its title.

    Args:
        folder: What the report is about.
        sections: HTML from the functions of this package, in the order of the page. A section without content is empty.
        refresh: Seconds after which a browser loads the page again; 0 for a page that is finished.

    Returns:
        The page's path.
    """
    page = folder / "report.html"
    html = _TEMPLATES.get_template("page.html").render(
        title=folder.absolute().name, refresh=refresh, sections=[Markup(section) for section in sections if section]
    )
    part = page.with_name(page.name + ".part")  # a browser may read while a training writes
    part.write_text(html, encoding="utf-8")
    part.replace(page)
    return page


def block(name: str, **values: Any) -> Markup:
    """Render a macro of `templates/blocks.html`; values that are no `Markup` are escaped."""
    macro = getattr(_TEMPLATES.get_template("blocks.html").module, name)
    return Markup(macro(**values))


def heading(text: str, level: int = 2) -> Markup:
    """A heading; the text is escaped."""
    return Markup("<h{0}>{1}</h{0}>").format(level, text)


def note(text: str) -> Markup:
    """A paragraph in small print; the text is escaped."""
    return Markup("<p class=small>{}</p>").format(text)


def conclusion(text: str, colour: str) -> Markup:
    """The sentence that a page begins with; the text is escaped, and `colour` is green, yellow or red."""
    return Markup('<p class="conclusion {}"><span>{}</span></p>').format(colour, text)


def bullets(texts: Iterable[str]) -> Markup:
    """A list; the texts are escaped."""
    return Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(text) for text in texts))


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table.

    Args:
        heads: Titles of the columns, which are escaped.
        rows: Rows of cells, which are HTML (see `text_cell` and the others).
    """
    return block("table", heads=list(heads), rows=[[Markup(cell) for cell in cells] for cells in rows])


def text_cell(text: str, mark: str = "") -> Markup:
    """A cell of text, which is escaped; `mark` is added in bold."""
    return Markup("<td>{}{}</td>").format(text, Markup(" <b>{}</b>").format(mark) if mark else "")


def number_cell(value: float | None, digits: int = 2) -> Markup:
    """A cell with a number."""
    return Markup("<td class=n>{}</td>").format(number(value, digits))


def interval_cell(score: Mapping[str, float | None] | None, digits: int = 2) -> Markup:
    """A cell with `mean [low, high]`; empty where nothing was measured."""
    if score is None:
        return Markup("<td class=n></td>")
    ends = f"[{number(score['low'], digits)}, {number(score['high'], digits)}]"
    return Markup("<td class=n>{} <span class=small>{}</span></td>").format(number(score["mean"], digits), ends)


def deviation_cell(score: Mapping[str, Any] | None) -> Markup:
    """A cell with `mean ± standard deviation`; empty where nothing was measured."""
    if score is None:
        return Markup("<td class=n></td>")
    deviation = score.get("spread")
    small = "" if deviation is None else Markup(" <span class=small>± {}</span>").format(number(deviation))
    return Markup("<td class=n>{}{}</td>").format(number(score["mean"]), small)


def answers_table(
    title: str, first: tuple[str, Mapping[int, str]], answers: Mapping[str, Mapping[int, str]], rows: Iterable[int]
) -> Markup:
    """Answers of several models side by side, with search and pages.

    Args:
        title: Heading of the table.
        first: Title of the first column, and its text by the prompt's row number.
        answers: For each model its answers by the prompt's row number; a model may have no answer to some prompts.
        rows: The prompts' row numbers, of which the first `MAX_PROMPTS` are shown.
    """
    name, texts = first
    body = [[found.get(row, "") for found in (texts, *answers.values())] for row in sorted(rows)[:MAX_PROMPTS]]
    return block("answers", title=title, heads=[name, *answers], rows=body) if body else Markup("")
