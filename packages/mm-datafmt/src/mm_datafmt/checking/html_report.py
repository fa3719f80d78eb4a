"""The report of ``check`` as one page that needs nothing outside it, and trusts nothing that the data says.

All text of the data is escaped, control and direction characters are made visible, no script runs and nothing is loaded
(a content security policy says so to the browser too). Images are small JPEGs in data URIs.
"""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..appearing import appearing
from ..errors import RecordError
from .gallery import Exhibit, Gallery
from .headers import read_header
from .histogram import Bin, bins_of
from .pictures import CheckedMedia
from .result import CheckReport

THUMBNAIL = 160
LISTED = 200
_MOST_PIXELS = 40_000_000

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--bar:#3b7dd8;--bad:#c0392b}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:left;border-bottom:1px solid var(--line);
vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}
.ok{color:#2e8b57}.bad{color:var(--bad)}svg{width:100%;height:14rem}rect{fill:var(--bar)}
svg text{font-size:11px;fill:currentColor}.limit{stroke:var(--bad);stroke-width:1.5}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1rem}
article{border:1px solid var(--line);border-radius:.4rem;padding:.7rem;overflow-wrap:anywhere}
article p{margin:.3rem 0;white-space:pre-wrap;unicode-bidi:isolate}
b{font-weight:600}img{margin:.2rem;vertical-align:top}
"""
_HEAD = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'\">\n"
    '<meta name="viewport" content="width=device-width">\n'
)


def write_html(
    target: Path, report: CheckReport, gallery: Gallery, media: CheckedMedia, *, overwrite: bool = False
) -> None:
    """Write the page; it appears when it is complete. Raises as :func:`mm_datafmt.appearing.appearing` does."""
    with appearing(target, overwrite=overwrite) as file:
        for piece in page(report, gallery, media):
            file.write(piece.encode("utf-8", "replace"))


def page(report: CheckReport, gallery: Gallery, media: CheckedMedia) -> Iterator[str]:
    """Yield the page in pieces."""
    yield f"{_HEAD}<title>Check of {_safe(report.source)}</title><style>{_STYLE}</style></head><body>\n"
    yield f"<h1>{_safe(report.source)}</h1>\n"
    verdict, sign = ("passed", "ok") if report.passed else ("not passed", "bad")
    yield (
        f'<p>Format {_safe(report.format)}, {report.records} records: <b class="{sign}">{verdict}</b>. '
        f"{report.problem_count} problems in {report.bad_records} records; "
        f"rejected {report.rejected}, repaired {report.repaired}.</p>\n"
    )
    yield from _problems(report)
    yield from _lengths(report)
    if media.looks_inside:
        captions = (("Bad records", gallery.bad), ("Longest", gallery.longest), ("By chance", gallery.by_chance))
        for caption, exhibits in captions:
            yield from _cards(caption, exhibits, media)
    yield "</body></html>\n"


def _problems(report: CheckReport) -> Iterator[str]:
    if report.ok:
        return
    yield "<h2>Problems</h2>\n"
    counts = sorted(report.counts.items(), key=lambda item: -item[1])
    yield _table(("reason", "times"), [(_safe(code), str(count)) for code, count in counts], numbers=(1,))
    shown = report.problems[:LISTED]
    rows = [(str(one.record), str(one.line or ""), _safe(one.code), _safe(one.message)) for one in shown]
    rest = report.problem_count - len(shown)
    yield f"<h2>The first {len(shown)}</h2>\n" if rest else "<h2>Where</h2>\n"
    yield _table(("record", "line", "reason", "in words"), rows, numbers=(0, 1))


def _table(names: Iterable[str], rows: Iterable[tuple[str, ...]], *, numbers: tuple[int, ...]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if n in numbers else ''}>{cell}</td>" for n, cell in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>\n"


def _lengths(report: CheckReport) -> Iterator[str]:
    yield "<h2>Length in tokens</h2>\n"
    for line in report.lengths.describe():
        yield f"<p>{_safe(line)}</p>\n"
    bins = bins_of(report.lengths.counts)
    if bins:
        yield _chart(bins, report.lengths.seq_length)


def _chart(bins: list[Bin], limit: int | None) -> str:
    """Return the histogram as SVG of 1000 by 200 units."""
    full, wide = max(one.samples for one in bins), 1000 / len(bins)
    parts = []
    for number, one in enumerate(bins):
        tall = 160 * one.samples / full
        name = f"{one.start}+" if one.beyond else f"{one.start}–{one.end - 1}"
        parts.append(
            f'<rect x="{number * wide + 1:.1f}" y="{170 - tall:.1f}" width="{wide - 2:.1f}" height="{tall:.1f}">'
            f"<title>{name}: {one.samples}</title></rect>"
        )
        if number % max(1, len(bins) // 10) == 0:
            parts.append(f'<text x="{number * wide:.1f}" y="185">{one.start}</text>')
    if limit is not None and bins[0].start <= limit <= bins[-1].end:
        at = 1000 * (limit - bins[0].start) / (bins[-1].end - bins[0].start)
        parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="170"/>')
        parts.append(f'<text x="{at + 4:.1f}" y="10">seq_length {limit}</text>')
    return f'<svg viewBox="0 0 1000 200" role="img" aria-label="histogram">{"".join(parts)}</svg>\n'


def _cards(caption: str, exhibits: list[Exhibit], media: CheckedMedia) -> Iterator[str]:
    if not exhibits:
        return
    yield f'<h2>{caption}</h2>\n<div class="cards">\n'
    for one in exhibits:
        length = "" if one.length is None else f", {one.length} tokens"
        yield f"<article><p><b>Record {one.number}</b>{length}</p>\n"
        yield from (f'<p class="bad">{_safe(code)}: {_safe(words)}</p>\n' for code, words in one.faults)
        yield from (thumbnail(path, media) for path in one.images)
        yield from (f"<p><b>{_safe(role)}</b> {_safe(text)}</p>\n" for role, text in one.turns)
        yield f"<p>{_safe(one.left_out)}</p></article>\n" if one.left_out else "</article>\n"
    yield "</div>\n"


def thumbnail(path: str, media: CheckedMedia) -> str:
    """Return an ``<img>`` of at most :data:`THUMBNAIL` pixels a side, or the reason why there is none."""
    file = media.file_of(path)
    try:
        if file is None:
            raise RecordError("no such file inside the folder", code="missing_file")
        header = read_header(file)
        if header.width * header.height > _MOST_PIXELS:
            raise RecordError(f"{header.width}x{header.height}: too large for a thumbnail", code="image_large")
        data = _small_jpeg(file)
    except RecordError as fault:
        return f'<p class="bad">{_safe(path)}: {_safe(str(fault))}</p>\n'
    title = _safe(f"{path}, {header.width}x{header.height}")
    return f'<img alt="{title}" title="{title}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">\n'


def _small_jpeg(file: str) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")) as image:
                image.draft("RGB", (THUMBNAIL, THUMBNAIL))
                small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(out, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, ArithmeticError, RuntimeError, Image.DecompressionBombError) as error:
        raise RecordError(f"no thumbnail: {error}", code="bad_image") from None
    return out.getvalue()


def _safe(text: str) -> str:
    """Return ``text`` for HTML: markup escaped, what would steer the page's text shown as its code point."""
    shown = [one if one.isprintable() or one == "\n" else f"\\u{ord(one):04x}" for one in text]
    return html.escape("".join(shown), quote=True)
