"""Figures as SVG, for the report and a README: axes, series with intervals, legend, light and dark.

Text in a figure is escaped, so a hostile name stays a name. Left out: bars, histograms, several
panels.
"""

import html
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

DASHES, COLOURS = ("none", "6 3", "2 3", "8 3 2 3"), 6
# An image sees no page: then the fallbacks hold, a grey that can be read on white and on black.
STYLE = """
.plot{color:var(--muted,#6e7781);font:13px system-ui,-apple-system,"Segoe UI",sans-serif}
.plot text{fill:currentColor}.plot .title{fill:var(--ink,currentColor);font-weight:600}
.plot .grid{stroke:currentColor;stroke-opacity:.17}
.plot .line{fill:none;stroke:var(--c);stroke-width:2}
.plot .band{fill:var(--c);fill-opacity:.17}.plot .mark{fill:var(--c)}
.c0{--c:#0072b2}.c1{--c:#d55e00}.c2{--c:#009e73}.c3{--c:#b5578f}.c4{--c:#a67c00}.c5{--c:#7d7d7d}
@media(prefers-color-scheme:dark){.plot{color:var(--muted,#9198a1)}
.c0{--c:#56b4e9}.c1{--c:#f0803c}.c2{--c:#2fc194}.c3{--c:#dd8fbb}.c4{--c:#e0b040}.c5{--c:#a8a8a8}}"""


def escape(value: object) -> str:
    """Text for HTML, SVG and attributes; U+FFFD for what XML cannot hold (control characters, lone
    surrogates) and for what turns the text after it around."""
    bad = ("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
           "|[\u202a-\u202e\u2066-\u2069]")
    return html.escape(re.sub(bad, "\ufffd", str(value)))


def number(value: object) -> float | None:
    """The value if it is a number that can be drawn (finite, its logarithm too), else None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e100:
        return None
    return value if abs(value) > 1e-100 else 0.0


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers in [low, high]: multiples of 1, 2 or 5 x 10^n; on a log axis at even
    distances."""
    if log:
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        marks = [float(f"{factor}e{n}") for n in powers for factor in (1, 2, 5)]
        inside = [x for x in marks if low <= x <= high]
        if len(inside) > 1:
            return inside[:: math.ceil(len(inside) / 7)]
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if high - low <= 6 * power * factor)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def tick_label(x: float) -> str:
    """0.25, 3000, 2e15"""
    return f"{x:.6g}".replace("e+", "e").replace("-", "\u2212")


def axis(values: Sequence[float | None], log: bool, start: float,
         end: float) -> tuple[Callable[[float | None], float | None], list[float]]:
    """A map from values to pixels (None for what is missing, and on a log axis not positive), and
    the ticks."""
    known = [v for v in values if v is not None and (v > 0 or not log)] or [1.0, 10.0]
    low, high = min(known), max(known)
    if high - low <= 1e-5 * max(abs(low), abs(high)):
        spread = abs(low) / 4 or 1
        low, high = (low / 3, high * 3) if log else (low - spread, high + spread)
    bend = math.log10 if log else float
    a, b = bend(low), bend(high)
    a, b = a - 0.04 * (b - a), b + 0.04 * (b - a)

    def place(value: float | None) -> float | None:
        if value is None or log and value <= 0:
            return None
        return round(start + (bend(value) - a) / (b - a) * (end - start), 1)

    return place, ticks(10**a, 10**b, True) if log else ticks(a, b)


def draw(points: Sequence[tuple], style: int, line: bool) -> Iterator[str]:
    """SVG of one series of (x, y, low, high) in pixels; a missing x or y breaks the line."""
    colour, dash = f"c{style % COLOURS}", DASHES[style % len(DASHES)]
    for known, group in groupby(points, lambda p: p[0] is not None and p[1] is not None):
        whole = list(group) if known else []
        if line and len(whole) > 1:
            edge = [(x, low) for x, _, low, _ in whole]
            edge += [(x, high) for x, _, _, high in reversed(whole)]
            if all(y is not None for _, y in edge):
                corners = " ".join(f"{x},{y}" for x, y in edge)
                yield f'<polygon class="band {colour}" points="{corners}"/>'
            path = " ".join(f"{x},{y}" for x, y, *_ in whole)
            yield f'<polyline class="line {colour}" stroke-dasharray="{dash}" points="{path}"/>'
        else:
            for x, y, *_ in whole:
                yield f'<circle class="mark {colour}" cx="{x}" cy="{y}" r="4"/>'


def legend(names: Sequence[str], width: int, top: float) -> tuple[list[str], float]:
    """A line and the name of each style, in rows from `top` on, and where the rows end."""
    parts, left = [], 10.0
    for style, name in enumerate(names):
        if left > 10 and left + 30 + 7 * len(name) > width:
            left, top = 10.0, top + 19
        sample = [(x, top + 9, None, None) for x in (left, left + 20)]
        parts += draw(sample, style, True)
        parts.append(f'<text x="{left + 26}" y="{top + 13.5}">{escape(name)}</text>')
        left += 44 + 7 * len(name)
    return parts, top + 22


def svg(figure: dict, width: int = 640, height: int = 360) -> str:
    """A standalone SVG of {"title", "x", "y", "log_x", "log_y", "series": [{"name", "x", "y",
    "low", "high", "kind": "line" or "points"}]}.

    Series of one name, as a fit and its points, share a colour and an entry in the legend. low and
    high are drawn as a band around a line.
    """
    series = []
    for given in figure.get("series") or []:
        x, y, low, high = ([number(v) for v in given.get(key) or []]
                           for key in ("x", "y", "low", "high"))
        points = list(zip(x, y, low + [None] * len(x), high + [None] * len(x)))
        series.append((str(given.get("name", ""))[:60], given.get("kind") != "points", points))
    names = list(dict.fromkeys(name for name, *_ in series))
    title, unit = (escape(str(figure.get(key, ""))[: width // 6]) for key in ("title", "y"))
    parts, top = legend(names, width, 28.0) if len(names) > 1 else ([], 28.0)
    top, height = top + 25, max(height, int(top) + 175)  # a long legend does not eat the figure
    bottom, every = height - 46, [point for *_, points in series for point in points]
    y_of, y_ticks = axis([v for p in every for v in p[1:]], bool(figure.get("log_y")), bottom, top)
    left = 18 + 7.5 * max(len(tick_label(y)) for y in y_ticks)
    x_of, x_ticks = axis([p[0] for p in every], bool(figure.get("log_x")), left, width - 22)
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{left} {y_of(y)}H{width - 12}"/>')
    for name, line, points in series:
        placed = [(x_of(x), *map(y_of, rest)) for x, *rest in points]
        parts += draw(placed, names.index(name), line)
    texts = [(12, 20, "start", "title", title), (12, top - 13, "start", "unit", unit),
             ((left + width) / 2, height - 9, "middle", "unit", escape(figure.get("x", "")))]
    texts += [(left - 7, y_of(y) + 4.5, "end", "tick", tick_label(y)) for y in y_ticks]
    texts += [(x_of(x), bottom + 19, "middle", "tick", tick_label(x)) for x in x_ticks]
    parts += [f'<text x="{x}" y="{y}" text-anchor="{at}" class="{of}">{text}</text>'
              for x, y, at, of, text in texts]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" '
            f'aria-label="{title}" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}"><style>{STYLE}</style>{"".join(parts)}</svg>')
