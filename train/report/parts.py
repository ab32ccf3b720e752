"""Pieces of the HTML pages: the document with its style, tables, tiles, figures. Every text given to them is escaped.

A page holds everything inside: no script, no address, no date of its own, readable on a phone and in print.
"""

import base64
from html import escape

from train.report.plot import ReportFigure

CSS = """
:root{--ink:#22272b;--soft:#5b636a;--line:#dde1e4;--accent:#1d4d38;--tint:#f4f6f5}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2.2rem 1.2rem 4rem;max-width:54rem;color:var(--ink);background:#fff;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
header{border-bottom:2px solid var(--accent);padding-bottom:.9rem;margin-bottom:1.4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .7rem;font-weight:650;color:var(--accent)}
h3{font-size:1rem;margin:1.6rem 0 .5rem;font-weight:650}
p{margin:.4rem 0}
.kicker{color:var(--accent);font-weight:600;font-size:.8rem;letter-spacing:.06em;text-transform:uppercase;
margin:0 0 .2rem}
.status,.note{color:var(--soft)}
.note{font-size:.86rem}
.warn{border:2px solid var(--ink);padding:.5rem 1rem;margin:1rem 0}
.warn p{font-weight:650}
.warn ul{margin:.3rem 0;padding-left:1.1rem}
.tiles{display:grid;grid-template-columns:repeat(3,1fr);gap:1px;padding:1px;margin:0}
.tiles div{box-shadow:0 0 0 1px var(--line);padding:.75rem .9rem}
.tiles dt{font-size:.8rem;color:var(--soft)}
.tiles dd{margin:.1rem 0 0;font-size:1.35rem;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:.8rem;font-weight:400;color:var(--soft);line-height:1.35}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.34rem .9rem .34rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
thead th{font-weight:600;color:var(--soft);font-size:.8rem;vertical-align:bottom;border-bottom:1px solid var(--ink)}
tbody th{font-weight:400;color:var(--soft);white-space:nowrap;width:13rem}
td.n,th.n{text-align:right;white-space:nowrap}
td.t{white-space:nowrap}
td{overflow-wrap:break-word}
.bar{display:inline-block;height:.62em;background:var(--accent);min-width:1px}
td.b{width:45%;min-width:6rem;vertical-align:middle}
.two{display:grid;grid-template-columns:1fr 1fr;gap:0 2.5rem}
.two h3{margin-top:1rem}
tr.old td{color:var(--soft);text-decoration:line-through}
figure{margin:1rem 0 2rem}
figure img{display:block;width:100%;height:auto}
figcaption{font-size:.86rem;color:var(--soft);margin-top:.5rem;max-width:46rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--accent);font-weight:600}
pre{background:var(--tint);padding:.8rem 1rem;overflow-x:auto;
font:12.5px/1.45 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font:.92em ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
@media (max-width:600px){body{padding:1.3rem 1rem 3rem;font-size:15px}h1{font-size:1.4rem}
tbody th{white-space:normal;width:40%}
.tiles{grid-template-columns:1fr 1fr}.tiles dd{font-size:1.15rem}.two{grid-template-columns:1fr}}
@media print{body{max-width:none;padding:0;font-size:11pt}h2,h3{break-after:avoid}figure,tr{break-inside:avoid}
.scroll{overflow:visible}}
""".strip()


def document(title: str, body: list[str]) -> str:
    """A whole page of sections that are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n"
        + "\n".join(section for section in body if section)
        + "\n</body>\n</html>\n"
    )


def header(kicker: str, title: str, status: str) -> str:
    """The head of a page."""
    return (
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="status">{escape(status)}</p></header>'
    )


def tiles_of(tiles: list[tuple[str, str, str]]) -> str:
    """Large numbers, each with its name and a note."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, value, small in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: list[str], rows: list[list[str]], kinds: str, old: list[bool] | None = None) -> str:
    """A table of escaped cells. `kinds` has a letter per column: n number, t text on one line, space other text."""
    classes = [f' class="{kind}"' if kind in "nt" else "" for kind in kinds]
    names = "".join(f"<th{css}>{escape(name)}</th>" for name, css in zip(head, classes, strict=True))
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{css}>{escape(cell)}</td>" for cell, css in zip(row, classes, strict=True))
        lines.append(f"<tr{' class=' + chr(34) + 'old' + chr(34) if old and old[i] else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def pairs(rows: list[tuple[str, str]]) -> str:
    """A table of names and values, both escaped."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


def bars(head: tuple[str, str], rows: list[tuple[str, str, float]]) -> str:
    """Rows of name, value and a bar from 0 to 1; name and value are escaped."""
    lines = "".join(
        f'<tr><td class="t">{escape(name)}</td><td class="n">{escape(value)}</td>'
        f'<td class="b"><span class="bar" style="width:{100 * share:.1f}%"></span></td></tr>'
        for name, value, share in rows
    )
    names = f'<th>{escape(head[0])}</th><th class="n">{escape(head[1])}</th><th></th>'
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'


def figure_of(figure: ReportFigure) -> str:
    """A figure with its heading and caption, both pictures inside."""
    wide, narrow = (base64.b64encode(png).decode("ascii") for png in (figure.wide_png, figure.narrow_png))
    return (
        f'<h2 id="{escape(figure.name)}">{escape(figure.title)}</h2>\n<figure><picture>'
        f'<source media="(max-width:600px)" srcset="data:image/png;base64,{narrow}">'
        f'<img src="data:image/png;base64,{wide}" alt="{escape(figure.title)}: see the text below the figure">'
        f"</picture><figcaption>{escape(figure.caption)}</figcaption></figure>"
    )
