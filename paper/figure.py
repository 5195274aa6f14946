"""Figures as SVG, for the report and for a README: axes, series with intervals, a legend, light and dark.

Text in a figure is escaped, so a hostile name stays a name. Left out: bars, histograms, several panels.
"""

import html
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

MARKERS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.5-3.5h7v7h-7z", "M0-5l4.8 8.5h-9.6z", "M0-5l5 5l-5 5l-5-5z")
DASHES, COLOURS = ("none", "6 3", "2 3", "8 3 2 3"), 6
# An image sees no page: then the fallbacks hold, a grey that can be read on white and on black.
PLOT_STYLE = """
.plot{color:var(--muted,#6e7781);font:13px system-ui,-apple-system,"Segoe UI",sans-serif}.plot text{fill:currentColor}
.plot .title{fill:var(--ink,currentColor);font-weight:600}.plot .grid{stroke:currentColor;stroke-opacity:.17}
.plot .line{fill:none;stroke:var(--c);stroke-width:2}.plot .bar{fill:none;stroke:var(--c);stroke-width:1.5}
.plot .band{fill:var(--c);fill-opacity:.17}.plot .mark{fill:var(--c)}
.c0{--c:#0072b2}.c1{--c:#d55e00}.c2{--c:#009e73}.c3{--c:#b5578f}.c4{--c:#a67c00}.c5{--c:#7d7d7d}
@media(prefers-color-scheme:dark){.plot{color:var(--muted,#9198a1)}.c0{--c:#56b4e9}.c1{--c:#f0803c}.c2{--c:#2fc194}
.c3{--c:#dd8fbb}.c4{--c:#e0b040}.c5{--c:#a8a8a8}}"""


def escape(value: object) -> str:
    """Text for HTML, SVG and attributes; U+FFFD for what XML cannot hold (control characters, lone surrogates) and for
    what turns the text after it around."""
    bad = "[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]"
    return html.escape(re.sub(bad, "\ufffd", str(value)))


def number(value: object) -> float | None:
    """The value if it is a number that can be drawn (finite, and logarithms of it too), else None."""
    drawable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
    return (value if abs(value) > 1e-100 else 0.0) if drawable else None


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers in [low, high]: multiples of 1, 2 or 5 x 10^n, or on a log axis a few of each decade."""
    if log:
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        factors = (1, 2, 5) if len(powers) <= 2 else (1,)
        every = powers[:: math.ceil(len(powers) / 7)]
        found = [x for n in every for x in (float(f"{factor}e{n}") for factor in factors) if low <= x <= high]
        if len(found) > 1:
            return found
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if high - low <= 6 * power * factor)
    return [float(f"{n * step:.12g}") for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_label(x: float) -> str:
    """0.25, 3000, 40k, and 2x10^15 with a superscript."""
    if x == 0 or 1e-3 <= abs(x) < 1e6:
        return (f"{x / 1000:.6g}k" if abs(x) >= 1e4 else f"{x:.6g}").replace("-", "\u2212")
    mantissa, exponent = f"{x:.5e}".split("e")
    factor = "" if float(mantissa) == 1 else f"{float(mantissa):g}×".replace("-", "\u2212")
    return factor + "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def axis(values: Sequence[float | None], include: Sequence[float], log: bool, start: float,
         end: float) -> tuple[Callable[[float | None], float | None], list[float]]:
    """A map from values to pixels (None for what is missing, and on a log axis not positive), and the ticks."""
    known = [v for v in (*values, *include) if v is not None and (v > 0 or not log)] or [1.0, 10.0]
    low, high = min(known), max(known)
    if high - low <= 1e-5 * max(abs(low), abs(high)):
        low, high = (low / 3, high * 3) if log else (low - (abs(low) / 4 or 1), high + (abs(high) / 4 or 1))
    bend = math.log10 if log else float
    a, b = bend(low), bend(high)
    a, b = a - 0.04 * (b - a) * (low not in include), b + 0.04 * (b - a) * (high not in include)

    def place(value: float | None) -> float | None:
        missing = value is None or log and value <= 0
        return None if missing else round(start + (bend(value) - a) / (b - a) * (end - start), 1)

    return place, ticks(10**a, 10**b, True) if log else ticks(a, b)


def draw(points: Sequence[tuple], style: int, line: bool, marks: bool) -> Iterator[str]:
    """SVG of one series of (x, y, low, high) in pixels; a missing x or y breaks the line."""
    colour, dash, marker = f"c{style % COLOURS}", DASHES[style % len(DASHES)], MARKERS[style % len(MARKERS)]
    for known, group in groupby(points, lambda p: p[0] is not None and p[1] is not None):
        run = list(group) if known else []
        bars = [p for p in run if p[2] is not None and p[3] is not None]
        if line and len(run) == len(bars) > 1:
            edge = [(x, low) for x, _, low, _ in run] + [(x, high) for x, _, _, high in reversed(run)]
            yield f'<polygon class="band {colour}" points="{" ".join(f"{x},{y}" for x, y in edge)}"/>'
        else:
            for x, _, low, high in bars:
                yield f'<path class="bar {colour}" d="M{x} {low}V{high}M{x - 4} {low}h8M{x - 4} {high}h8"/>'
        if line and len(run) > 1:
            path = " ".join(f"{p[0]},{p[1]}" for p in run)
            yield f'<polyline class="line {colour}" stroke-dasharray="{dash}" points="{path}"/>'
        for x, y, _, _ in run if marks or len(run) == 1 else ():
            yield f'<path class="mark {colour}" transform="translate({x} {y})" d="{marker}"/>'


def legend(series: Sequence[tuple], width: int, top: float) -> tuple[list[str], float]:
    """A sample and the name of each style, in rows from `top` on, and where the rows end."""
    parts, left = [], 10.0
    for style, name in dict.fromkeys((style, name) for name, style, *_ in series):
        if left > 10 and left + 30 + 7 * len(name) > width:
            left, top = 10.0, top + 19
        for _, _, line, marks, _ in (s for s in series if s[1] == style):
            parts += draw([(x, top + 9, None, None) for x in (left, left + 20)] if line else [], style, True, False)
            parts += draw([(left + 10, top + 9, None, None)] if marks else [], style, False, True)
        parts.append(f'<text x="{left + 26}" y="{top + 13.5}">{escape(name)}</text>')
        left += 44 + 7 * len(name)
    return parts, top + 22


def svg(figure: dict, width: int = 640, height: int = 360) -> str:
    """A standalone SVG of {"title", "x", "y", "log_x", "log_y", "y_range": values that the y axis must reach, "series":
    [{"name", "x", "y", "low", "high", "kind": "line" or "points"}]}. Series of one name, as a fit and its points, share
    a colour and an entry in the legend. low and high are drawn as a band around a line, as bars around points.
    """
    given = figure.get("series") or []
    styles = {name: n for n, name in enumerate(dict.fromkeys(str(s.get("name", ""))[:60] for s in given))}
    dotted, series = {str(s.get("name", ""))[:60] for s in given if s.get("kind") == "points"}, []
    for s in given:
        name, line = str(s.get("name", ""))[:60], s.get("kind") != "points"
        x, y, low, high = ([number(v) for v in s.get(key) or []] for key in ("x", "y", "low", "high"))
        points = list(zip(x, y, low + [None] * len(x), high + [None] * len(x)))
        series.append((name, styles[name], line, not line or len(x) <= 12 and name not in dotted, points))
    title, unit = (escape(str(figure.get(key, ""))[: width // 6]) for key in ("title", "y"))
    parts, top = legend(series, width, 28.0 if title else 8.0) if len(styles) > 1 else ([], 28.0 if title else 8.0)
    top += 25 if unit else 6
    height = max(height, int(top) + 150)  # a long legend does not eat the figure
    every, bottom = [p for *_, points in series for p in points], height - (46 if figure.get("x") else 28)
    values, reach = [v for p in every for v in p[1:]], figure.get("y_range") or []
    y_of, y_ticks = axis(values, reach, bool(figure.get("log_y")), bottom, top)
    left = 18 + 7.5 * max(len(tick_label(y)) for y in y_ticks)
    x_of, x_ticks = axis([p[0] for p in every], [], bool(figure.get("log_x")), left, width - 22)
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{left} {y_of(y)}H{width - 12}"/>')
    for _, style, line, marks, points in series:
        parts += draw([(x_of(x), *map(y_of, rest)) for x, *rest in points], style, line, marks)
    texts = [(12, 20, "start", "title", title), (12, top - 13, "start", "unit", unit),
             ((left + width) / 2, height - 9, "middle", "unit", escape(figure.get("x", ""))),
             *((left - 7, y_of(y) + 4.5, "end", "tick", tick_label(y)) for y in y_ticks),
             *((x_of(x), bottom + 19, "middle", "tick", tick_label(x)) for x in x_ticks)]
    parts += [f'<text x="{x}" y="{y}" text-anchor="{at}" class="{of}">{text}</text>' for x, y, at, of, text in texts]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" aria-label="{title}" width="{width}" '
            f'height="{height}" viewBox="0 0 {width} {height}"><style>{PLOT_STYLE}</style>{"".join(parts)}</svg>')
