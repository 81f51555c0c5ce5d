"""A report as a list of blocks, and its two forms: Markdown with files beside it, and one HTML page."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from pathlib import Path

from packloop.bench.drawing import standalone
from packloop.bench.page import PAGE


@dataclass(frozen=True)
class Heading:
    """Level 1 is the report's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text; `code` between backquotes is set as such."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """One line of running text an item."""

    items: list[str]


@dataclass(frozen=True)
class Attachment:
    """A text that is folded away in the page and a file of its own beside the Markdown."""

    key: str
    title: str
    text: str

    @property
    def path(self) -> str:
        return f"conditions/{self.key}.yaml"


@dataclass(frozen=True)
class Reference:
    """A table's entry that leads to an attachment."""

    text: str
    target: Attachment


@dataclass(frozen=True)
class Link:
    """A table's entry that leads out of the report."""

    text: str
    url: str


Entry = str | Reference | Link


@dataclass(frozen=True)
class Table:
    """Columns that begin with `#` hold numbers and are set flush right, without the sign."""

    columns: list[str]
    rows: list[list[Entry]]


@dataclass(frozen=True)
class Picture:
    """An SVG. key: of its file; title: what a reader who cannot see it is told; caption: below it."""

    key: str
    title: str
    svg: str
    caption: str = ""

    @property
    def path(self) -> str:
        return f"plots/{self.key}.svg"


Block = Heading | Paragraph | Bullets | Table | Picture | Attachment


@dataclass
class Document:
    """Blocks in the order of reading."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block) -> None:
        self.blocks.extend(blocks)


def write_document(document: Document, directory: Path) -> tuple[Path, Path]:
    """Writes report.md with its plots and conditions, and report.html, which needs no other file."""
    for block in document.blocks:
        if isinstance(block, Picture | Attachment):
            path = directory / block.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(standalone(block.svg) if isinstance(block, Picture) else block.text, encoding="utf-8")
    markdown, page = directory / "report.md", directory / "report.html"
    markdown.write_text(render_markdown(document), encoding="utf-8")
    page.write_text(render_page(document), encoding="utf-8")
    return markdown, page


def render_markdown(document: Document) -> str:
    """GitHub's Markdown. An attachment is a link, where a table names it and in its own place."""
    parts = [f"# {document.title}"]
    for block in document.blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Bullets(items):
                parts.append("\n".join(f"- {item}" for item in items))
            case Table():
                parts.append(markdown_table(block))
            case Picture():
                caption = f"\n\n{block.caption}" if block.caption else ""
                parts.append(f"![{block.title}]({block.path}){caption}")
            case Attachment():
                parts.append(f"[{_markdown_entry(block.title)}]({block.path})")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """With columns padded to one width, so that it can also be read as it stands."""
    names = [name.removeprefix("#") for name in table.columns]
    is_number = [name.startswith("#") for name in table.columns]
    rows = [[_markdown_entry(entry) for entry in row] for row in table.rows]
    widths = [max(3, *(len(row[n]) for row in [names, *rows])) for n in range(len(names))]

    def line(entries: list[str]) -> str:
        padded = [e.rjust(w) if right else e.ljust(w) for e, w, right in zip(entries, widths, is_number, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, is_number, strict=True)]
    return "\n".join([line(names), line(rule), *map(line, rows)])


def _markdown_entry(entry: Entry) -> str:
    if isinstance(entry, Reference):
        return f"[{_markdown_entry(entry.text)}]({entry.target.path})"
    if isinstance(entry, Link):
        return f"[{_markdown_entry(entry.text)}]({entry.url})"
    return re.sub(r"([|*_<\\])", r"\\\1", entry).replace("\n", " ")


def render_page(document: Document) -> str:
    """One HTML page with its style and pictures in it: no network, no script."""
    parts = [f"<h1>{html.escape(document.title)}</h1>"]
    for number, block in enumerate(document.blocks):
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{_html_text(text)}</p>")
            case Bullets(items):
                parts.append("<ul>" + "".join(f"<li>{_html_text(item)}</li>" for item in items) + "</ul>")
            case Table():
                parts.append(_html_table(block))
            case Picture():
                caption = f"<figcaption>{_html_text(block.caption)}</figcaption>" if block.caption else ""
                parts.append(f"<figure>{_inline_svg(block, f'p{number}')}{caption}</figure>")
            case Attachment():
                # A browser opens what is folded when a link leads into it.
                parts.append(
                    f"<details><summary>{html.escape(block.title)}</summary>"
                    f'<pre id="{html.escape(block.key)}">{html.escape(block.text)}</pre></details>'
                )
    return PAGE.substitute(title=html.escape(document.title), body="\n".join(parts))


def _html_text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _html_table(table: Table) -> str:
    right = [' class="number"' if name.startswith("#") else "" for name in table.columns]
    head = "".join(f"<th{r}>{html.escape(name.removeprefix('#'))}</th>" for name, r in zip(table.columns, right))
    body = "".join(
        "<tr>" + "".join(f"<td{r}>{_html_entry(entry)}</td>" for entry, r in zip(row, right, strict=True)) + "</tr>\n"
        for row in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _html_entry(entry: Entry) -> str:
    if isinstance(entry, Link):
        return f'<a href="{html.escape(entry.url)}">{html.escape(entry.text)}</a>'
    if isinstance(entry, Reference):
        return f'<a href="#{html.escape(entry.target.key)}">{html.escape(entry.text)}</a>'
    return html.escape(entry)


def _inline_svg(picture: Picture, prefix: str) -> str:
    """With ids of its own, as the page holds several pictures, and a title for who cannot see it."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', picture.svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    title = html.escape(picture.title)
    return re.sub(r"<svg\b([^>]*)>", rf'<svg role="img" aria-label="{title}"\1>', svg, count=1)
