"""`page`: a `QuantReport` as one HTML file that needs nothing else: no scripts, no network.

Plots are inline SVG, whose marks differ in shape, not in colour alone; what a mark stands for shows
where the pointer rests on it. Colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from narrows.files.quoting import html as escape
from narrows.passes.quant.figures import (
    COLUMNS,
    CULPRITS,
    LEFT,
    TOLD,
    Figures,
    Measured,
    cells,
    decibels_text,
)

STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --dim: #5c666d; --rule: #d5dadd;
  --back: #ffffff; --band: #cfe0ee; --one: #1667a8; --two: #b3400f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ea; --dim: #9aa5ac; --rule: #3a4348;
  --back: #16191b; --band: #24445e; --one: #6cb4ee; --two: #f0925f; } }
body { margin: 2rem auto; max-width: 82rem; padding: 0 1.5rem; color: var(--ink);
  background: var(--back); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; }
p { margin: .2rem 0 .8rem; color: var(--dim); max-width: 62rem; }
dl { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 1rem 0; }
dt { color: var(--dim); font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--dim); font-weight: 500; position: sticky; top: 0;
  background: var(--back); }
th, td { padding: .12rem .55rem; white-space: nowrap; border-bottom: 1px solid var(--rule); }
td { text-align: right; } .word { text-align: left; }
svg { display: block; } svg text { fill: var(--dim); font-size: 11px; }
.rule { stroke: var(--rule); } .band { fill: var(--band); }
.one { stroke: var(--one); fill: var(--one); } .two { stroke: var(--two); fill: var(--two); }
.line { fill: none; stroke-width: 1.5; } .open { fill: var(--back); stroke-width: 1.5; }
.lost { color: var(--two); font-weight: 600; }
"""

CLIPPED = 0.01  # the share of clipped values from which the page points at it


def page(report: Figures, artifact: str = "") -> str:
    """Return the page's text, with the identity of the artifact that it is about."""
    parts = [
        f"<h1>Quantization of {escape(report.name)}</h1>",
        _facts(report, artifact),
        "<h2>Error along the network</h2>",
        "<p>Signal to quantization noise of every tensor in execution order; more is better. "
        "<b>Circles on the line</b>: the tensor in the quantized network, with all that came "
        "before. <b>Open circles</b>: an activation alone, the exact one put on its grid. "
        "<b>Squares</b>: a weight alone. At the upper edge nothing is lost.</p>",
        f'<div class="wide">{_along(report.tensors)}</div>',
        *_culprits(report),
        *_parts(report),
        "<h2>Ranges and errors, tensor by tensor</h2>",
        "<p>Magnitudes on one scale of powers of two. <b>Band</b>: what the grid holds, from half "
        "a step to its end. <b>Bar</b>: the largest number; beyond the band it is clipped. "
        "<b>Circle</b>: the root mean square. <b>Cross</b>: the error's. Rounding and clipping are "
        "root mean square errors; <i>alone</i> and <i>along</i> are the ratios of the plot "
        "above.</p>",
        f'<div class="wide">{_tensors(report.tensors)}</div>',
        "<h2>Stays floating-point</h2>",
        _floats(report),
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>Quantization of {escape(report.name)}</title>\n<style>{STYLE}</style>\n</head>\n"
    )
    return head + "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"


def _facts(report: Figures, artifact: str) -> str:
    share = report.after / report.before if report.before else 1.0
    facts = {
        "outputs": decibels_text(report.sqnr),
        "weights": f"{report.before:,} to {report.after:,} bytes ({share:.0%})",
        "quantizers": f"{len(report.tensors):,}",
        "measured on": f"{report.samples:,} samples",
        "stay floating-point": f"{len(report.floats):,} operators",
        **({"artifact": artifact[:12]} if artifact else {}),
    }
    told = (f"<div><dt>{what}</dt><dd>{escape(fact)}</dd></div>" for what, fact in facts.items())
    return f"<dl>{''.join(told)}</dl>"


def _floats(report: Figures) -> str:
    if not report.floats:
        return "<p>Nothing.</p>"
    rows = (_row((name, reason), words=(0, 1)) for name, reason in report.floats.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _row(texts: Iterable[str], words: Iterable[int] = (), kind: str = "td") -> str:
    left = set(words)
    made = (
        f'<{kind} class="word">{escape(t)}</{kind}>' if i in left else f"<{kind}>{t}</{kind}>"
        for i, t in enumerate(texts)
    )
    return f"<tr>{''.join(made)}</tr>"


# ------------------------------------------------------------------ along the network

LEFT_EDGE, TOP, HEIGHT, STEP = 44, 14, 240, 14


def _along(tensors: tuple[Measured, ...]) -> str:
    known = [v for t in tensors for v in (t.sqnr, t.along) if v is not None and math.isfinite(v)]
    most = 10 * math.ceil(max([10.0, *known]) / 10) + 5
    least = 10 * math.floor(min([0.0, *known]) / 10)
    width = LEFT_EDGE + STEP * (len(tensors) + 1)

    def at(value: float) -> float:
        value = min(max(value, least), most)  # infinite where nothing is lost
        return round(TOP + HEIGHT * (most - value) / (most - least), 1)

    parts = []
    for tick in range(least, most, 10):
        parts.append(f'<line class="rule" x1="{LEFT_EDGE}" x2="{width}" y1="{at(tick)}" '
                     f'y2="{at(tick)}"/>')  # fmt: skip
        parts.append(f'<text x="{LEFT_EDGE - 6}" y="{at(tick) + 4}" text-anchor="end">'
                     f'{tick}{" dB" if tick == least else ""}</text>')  # fmt: skip
    points = [(LEFT_EDGE + STEP * (i + 1), t) for i, t in enumerate(tensors)]
    line = " ".join(f"{x},{at(t.along)}" for x, t in points if t.along is not None)
    parts.append(f'<polyline class="one line" points="{line}"/>')
    for x, t in points:
        told = escape(f"{t.name} ({t.grid}): alone {decibels_text(t.sqnr)}")
        if t.along is None:
            parts.append(f'<rect class="two" x="{x - 3}" y="{at(t.sqnr) - 3}" width="6" '
                         f'height="6"><title>{told}</title></rect>')  # fmt: skip
            continue
        told += f", along {decibels_text(t.along)}"
        parts.append(f'<circle class="one open" cx="{x}" cy="{at(t.sqnr)}" r="3.2">'
                     f"<title>{told}</title></circle>")  # fmt: skip
        parts.append(f'<circle class="one" cx="{x}" cy="{at(t.along)}" r="3.2">'
                     f"<title>{told}</title></circle>")  # fmt: skip
    return _svg(width + 10, TOP + HEIGHT + 12, parts, "Signal to noise of every tensor")


def _svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'width="{width}" height="{height}">{"".join(parts)}</svg>'
    )


# ------------------------------------------------------------------ culprits


def _culprits(report: Figures) -> Iterator[str]:
    if not report.switched:
        return
    told = report.culprits[:TOLD]
    yield "<h2>Culprits</h2>"
    yield (
        f"<p>{CULPRITS.capitalize()}, with all others at work, on {report.switched:,} samples. "
        f"The {len(told)} costliest of {len(report.culprits):,}.</p>"
    )
    longest = max((t.gain or 0.0 for t in told if math.isfinite(t.gain or 0.0)), default=0.0)
    yield '<div class="wide"><table><tbody>'
    for t in told:
        share = min(max(t.gain or 0.0, 0.0) / longest, 1.0) if longest > 0 else 0.0
        bar = f'<rect class="two" x="0" y="3" width="{round(260 * share, 1)}" height="9"/>'
        plot = _svg(262, 15, [bar], decibels_text(t.gain, "+.2f"))
        yield (
            f'<tr><td class="word">{escape(t.name)}</td><td class="word">{t.kind}</td>'
            f'<td class="word">{escape(t.grid)}</td><td>{decibels_text(t.gain, "+.2f")}</td>'
            f'<td>{plot}</td><td class="word">{escape(t.source)}</td></tr>'
        )
    yield "</tbody></table></div>"


def _parts(report: Figures) -> Iterator[str]:
    if not report.parts:
        return
    yield "<h2>Parts of what is joined</h2>"
    yield (
        "<p>What the quantized network leaves of each operand of a concatenation. A small one "
        "beside a large one does not show in the ratio of the whole.</p>"
    )
    yield '<div class="wide"><table><tbody>'
    for p in report.parts:
        lost = ' class="lost"' if p.lost else ""
        yield (
            f'<tr><td class="word">{escape(p.joined)}</td><td class="word">{escape(p.part)}</td>'
            f"<td>{p.low:.3g}</td><td>{p.high:.3g}</td><td{lost}>{decibels_text(p.along)}</td>"
            f'<td class="word">{escape(p.source)}</td></tr>'
        )
    yield "</tbody></table></div>"


# ------------------------------------------------------------------ tensor by tensor

PLOT = 300  # how wide a row's plot is


def _tensors(tensors: tuple[Measured, ...]) -> str:
    ends = [_band(t) for t in tensors]
    tops = [_power(max(-t.low, t.high)) for t in tensors]
    least = min((low for low, _ in ends), default=-1.0)
    most = max([*(high for _, high in ends), *(v for v in tops if v is not None), least + 1])

    def at(power: float) -> float:
        return round(4 + (PLOT - 8) * (max(power, least) - least) / (most - least), 1)

    lines = [_header()]
    for t in tensors:
        row = _row(cells(t), LEFT)
        clipped = f"<td>{t.clipped:.2%}</td>"
        if t.clipped >= CLIPPED:
            row = row.replace(clipped, clipped.replace("<td>", '<td class="lost">'), 1)
        first = row.index("</td>") + len("</td>")
        lines.append(row[:first] + f"<td>{_range(t, at)}</td>" + row[first:])
    axis = [
        f'<text x="{at(p)}" y="11" text-anchor="middle">2^{p}</text>'
        for p in range(math.ceil(least), math.floor(most) + 1)
        if p % 8 == 0 and 14 < at(p) < PLOT - 14
    ]
    axis_row = f"<tr><td></td><td>{_svg(PLOT, 14, axis, 'the scale of magnitudes')}</td></tr>"
    body = "".join(lines[1:])
    return f"<table><thead>{lines[0]}{axis_row}</thead><tbody>{body}</tbody></table>"


def _header() -> str:
    row = _row(COLUMNS, LEFT, "th")
    first = row.index("</th>") + len("</th>")
    return row[:first] + '<th class="word">range</th>' + row[first:]


def _band(t: Measured) -> tuple[float, float]:
    """Return the powers of two from half of the finest step to the largest end of a grid."""
    return -max(t.exponents) - 1, math.log2(t.end) - min(t.exponents)


def _power(value: float) -> float | None:
    return math.log2(value) if value > 0 else None


def _range(t: Measured, at: Callable[[float], float]) -> str:
    low, high = _band(t)
    parts = [f'<rect class="band" x="{at(low)}" y="2" width="{round(at(high) - at(low), 1)}" '
             'height="11"/>']  # fmt: skip
    top, rms = _power(max(-t.low, t.high)), _power(t.rms)
    error = _power(math.hypot(t.rounding, t.clipping))
    if top is not None:
        x = at(top)
        kind = "two" if top > high else "one"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="0" y2="15" stroke-width="2"/>')
    if rms is not None:
        parts.append(f'<circle class="one" cx="{at(rms)}" cy="7.5" r="3"/>')
    if error is not None:
        x = at(error)
        parts.append(f'<path class="two line" d="M{x - 3} 4.5l6 6m0 -6l-6 6"/>')
    return _svg(PLOT, 15, parts, f"{t.name}: {t.grid}, from {t.low:.3g} to {t.high:.3g}")


__all__ = ["page"]
