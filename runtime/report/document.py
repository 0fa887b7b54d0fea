"""An HTML page in one file: its pictures inside, nothing loaded from anywhere."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from matplotlib.figure import Figure

_DPI = 130
_CSS = """
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: #fff; color: #222;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
img { display: block; max-width: 100%; margin: 1rem auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .93rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.own td { font-weight: 600; background: #eef5fb; }
.box { background: #f6f8fa; border: 1px solid #dde3e8; border-radius: 6px; padding: .4rem 1.2rem; }
.box table { width: 100%; margin: .5rem 0; }
.box td { overflow-wrap: anywhere; }
.box tr:last-child td { border: 0; }
.box td:first-child { white-space: nowrap; width: 12rem; color: #555; }
.note { color: #555; font-size: .9rem; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } h2 { break-after: avoid; }
  img, table { break-inside: avoid; } }
"""


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = BytesIO()
    # Without the version of matplotlib: the same figure gives the same file.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def image(data: bytes, alt: str) -> str:
    """Return the element of a picture, a PNG file."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def box(rows: dict[str, str]) -> str:
    """Return a box of names and values."""
    cells = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows.items())
    return f'<div class="box"><table>{cells}</table></div>'


def document(title: str, sections: Sequence[str]) -> str:
    """Return the page of a title, as text, and sections, as HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join([f"<h1>{escape(title)}</h1>", *sections])
        + "\n</body>\n</html>\n"
    )
