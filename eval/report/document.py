"""A report as a list of blocks, as Markdown and as one HTML page that needs no other file.

All texts are plain: this file escapes them for either format.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from olmoe_jax.errors import printable


class Strong(str):
    """The text of a table cell that stands out."""


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the report's title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]  # numbers and short words
    wraps: bool = False  # the cells are long texts instead


@dataclass(frozen=True)
class Picture:
    """A file beside report.md and inside report.html; its name ends in .svg or .png."""

    name: str
    content: bytes
    description: str


@dataclass(frozen=True)
class Pictures:
    """Pictures that share the page's width."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Output:
    """A model's text, unchanged."""

    label: str
    text: str


Block = Heading | Paragraph | Items | Table | Pictures | Output


def _visible(text: str) -> str:
    return printable(text.replace("\r\n", "\n"))


# Markdown

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


def to_markdown(blocks: Sequence[Block]) -> str:
    """Returns the report as GitHub's Markdown, with links to pictures in the same directory."""
    return "\n".join(_markdown(block) for block in blocks)


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", _visible(text).replace("\n", " "))


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}\n"
        case Paragraph(text):
            return f"{_plain(text)}\n"
        case Items(texts):
            return "".join(f"- {_plain(text)}\n" for text in texts)
        case Table(head, rows):
            lines = [_markdown_row(head), "|" + " --- |" * len(head), *map(_markdown_row, rows)]
            return "\n".join(lines) + "\n"
        case Pictures(pictures):
            return "".join(f"![{_plain(p.description)}]({p.name})\n" for p in pictures)
        case Output(label, text):
            longest = max(map(len, re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{_plain(label)}\n\n{fence}text\n{_visible(text)}\n{fence}\n"


def _markdown_row(cells: Sequence[str]) -> str:
    texts = (f"**{_plain(c)}**" if isinstance(c, Strong) else _plain(c) for c in cells)
    return f"| {' | '.join(texts)} |"


# HTML

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 75rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .5rem }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap }
wbr { white-space: normal }
th[scope=col] { border-bottom-color: #888; white-space: normal; vertical-align: bottom }
th:first-child { position: sticky; left: 0; background: #fff; text-align: left;
  white-space: normal; font-weight: normal; min-width: min(11rem, 27vw); max-width: 33vw;
  overflow-wrap: anywhere }
.texts td, .texts th { text-align: left; white-space: normal; overflow-wrap: anywhere;
  vertical-align: top; min-width: 7rem }
.figures { display: flex; flex-wrap: wrap; gap: 1rem }
img { max-width: 100%; height: auto }
pre { margin: .3rem 0 1rem; padding: .6rem; background: #f5f5f5; border-left: 3px solid #ccc;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
"""
# Nothing on the page may load or run anything, whatever a model wrote.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_KINDS = {"svg": "image/svg+xml", "png": "image/png"}


def to_html(blocks: Sequence[Block]) -> str:
    """Returns the report as one page for any browser, without scripts or other files."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "report")
    body = "\n".join(_html(block) for block in blocks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _escaped(text: str) -> str:
    return html.escape(_visible(text))


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_escaped(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_escaped(text)}</p>"
        case Items(texts):
            return "\n".join(["<ul>", *(f"<li>{_escaped(text)}</li>" for text in texts), "</ul>"])
        case Table(head, rows, wraps):
            columns = "".join(f'<th scope="col">{_cell(name)}</th>' for name in head)
            lines = [f"<tr>{columns}</tr>", *map(_html_row, rows)]
            start = f'<div class="scroll"><table{" class=texts" if wraps else ""}>'
            return "\n".join([start, *lines, "</table></div>"])
        case Pictures(pictures):
            return "\n".join(['<div class="figures">', *map(_html_picture, pictures), "</div>"])
        case Output(label, text):
            return f"<p>{_escaped(label)}</p>\n<pre>{_escaped(text)}</pre>"


def _html_picture(picture: Picture) -> str:
    kind, content = _KINDS[picture.name.rpartition(".")[2]], base64.b64encode(picture.content)
    data = f"data:{kind};base64,{content.decode()}"
    return f'<img src="{data}" alt="{_escaped(picture.description)}">'


def _html_row(cells: Sequence[str]) -> str:
    first, *others = cells
    texts = (f"<b>{_cell(c)}</b>" if isinstance(c, Strong) else _cell(c) for c in others)
    inside = "".join(f"<td>{text}</td>" for text in texts)
    return f'<tr><th scope="row">{_cell(first)}</th>{inside}</tr>'


def _cell(text: str) -> str:
    """Returns a cell's text, which may break before an interval and within a long name."""
    texts = (
        re.sub(r"[_/](?=\w)", r"\g<0><wbr>", _escaped(word)) if len(word) > 16 else _escaped(word)
        for word in text.split(" ")
    )
    return re.sub(r" (?=\([^)]* to )", " <wbr>", " ".join(texts))
