r"""A drawing as one SVG file: ranks as rows, modules as colours, memory below; nothing loaded.

    title, facts, legend
    rank 0 |[F0][F1]   [B0 ]|  12 % idle
    rank 1 |   [F0][F1][B0 ]|   8 % idle
            0        10 ms
    rank 0 | __/--\__  peak |  1.2 of 2.0 GiB

The same drawing gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from megatron_pipeweaver.ir.problem import OpKind
from megatron_pipeweaver.ir.trace import TraceKind
from megatron_pipeweaver.view.layout import KIND_NAMES, Curve, Drawing, Lane
from megatron_pipeweaver.view.units import percent, size

WIDTH = 1200
_LEFT, _RIGHT, _EDGE = 74, 112, 20
_INK, _QUIET, _FAINT, _ALARM = "#1f2933", "#66727f", "#e3e7eb", "#c0392b"

_SHADES = (OpKind.F, OpKind.B, OpKind.W)
_PALETTE = (  # forward, backward, weight gradient of each module; repeats after the last
    ("#f5a962", "#cf6a1b", "#fad0a6"),
    ("#74a9dc", "#2b66a8", "#b5d1ec"),
    ("#79c49a", "#2c8159", "#b8dfc9"),
    ("#b598d9", "#754bad", "#d6c4ec"),
    ("#ea93ad", "#b8406a", "#f5c4d2"),
    ("#6cc5c8", "#1d7f83", "#ade0e2"),
    ("#cdbb5b", "#8a7716", "#e6da9c"),
    ("#a9a29b", "#645c55", "#d0cbc6"),
)
_STRIPS = {TraceKind.SEND: "#3f4c5a", TraceKind.RECV: "#8b98a5", TraceKind.WAIT: "#d96b5f"}

_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;"
    f"fill:{_INK}}}"
    ".h{font-size:19px;font-weight:600}"
    f".q{{fill:{_QUIET}}}.s{{fill:{_QUIET};font-size:11px}}.e{{text-anchor:end}}"
    ".m{text-anchor:middle}.n{font-size:10px;text-anchor:middle;pointer-events:none}"
    ".w{fill:#fff}"
    f".g{{stroke:{_FAINT}}}.b{{stroke:{_ALARM};stroke-dasharray:5 3;fill:none}}"
    ".a{fill:#dbe4ee}.l{fill:none;stroke:#3d5a80;stroke-width:1.3}"
    f".r{{fill:{_ALARM};font-size:11px}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    """Where things stand, in pixels."""

    drawing: Drawing
    lane_height: float
    curve_height: float

    @property
    def lanes_top(self) -> float:
        """Upper edge of the first lane."""
        return 104

    @property
    def lanes_bottom(self) -> float:
        """Lower edge of the last lane."""
        return self.lanes_top + len(self.drawing.lanes) * (self.lane_height + 4)

    @property
    def curves_top(self) -> float:
        """Upper edge of the first memory curve."""
        return self.lanes_bottom + 62

    @property
    def height(self) -> float:
        """Of the whole picture."""
        curves = len(self.drawing.curves)
        if not curves:
            return self.lanes_bottom + 44
        return self.curves_top + curves * (self.curve_height + 8) + 34

    @property
    def plot_width(self) -> float:
        """Of the time axis."""
        return WIDTH - _LEFT - _RIGHT

    def x(self, time_ns: int) -> float:
        """Where the moment `time_ns` stands."""
        return _LEFT + self.plot_width * time_ns / max(self.drawing.end_ns, 1)

    def lane_top(self, rank: int) -> float:
        """Upper edge of the lane of `rank`."""
        return self.lanes_top + rank * (self.lane_height + 4)

    def curve_top(self, rank: int) -> float:
        """Upper edge of the memory curve of `rank`."""
        return self.curves_top + rank * (self.curve_height + 8)


def render_svg(drawing: Drawing) -> bytes:
    """`drawing` as a stand-alone SVG file, 1200 pixels wide, UTF-8."""
    ranks = max(len(drawing.lanes), 1)
    page = _Page(
        drawing=drawing,
        lane_height=min(40.0, max(20.0, 400 / ranks)),
        curve_height=min(54.0, max(26.0, 360 / ranks)),
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{_n(page.height)}" '
        f'viewBox="0 0 {WIDTH} {_n(page.height)}" role="img">',
        f"<title>{_text(drawing.title)}</title>",
        f"<style>{_STYLE}{''.join(_module_styles(drawing))}</style>",
        '<pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse">'
        '<rect width="6" height="6" fill="#f1f3f5"/>'
        '<path d="M-1 7L7 -1M-1 1L1 -1M5 7L7 5" stroke="#d3d9df" stroke-width="1"/></pattern>',
        f'<rect width="{WIDTH}" height="{_n(page.height)}" fill="#fff"/>',
        *_header(page),
        *_lanes(page),
        *_axis(page, page.lanes_top, page.lanes_bottom),
        *_memory(page),
        *_marks(page),
        "</svg>",
    ]
    return ("\n".join(lines) + "\n").encode()


def _module_styles(drawing: Drawing) -> Iterator[str]:
    for module in range(len(drawing.modules)):
        for kind, colour in zip(_SHADES, _PALETTE[module % len(_PALETTE)], strict=True):
            yield f".{kind}{module}{{fill:{colour}}}"
    for strip, colour in _STRIPS.items():
        yield f".{strip}{{fill:{colour}}}"


def _header(page: _Page) -> Iterator[str]:
    drawing = page.drawing
    yield f'<text class="h" x="{_EDGE}" y="34">{_text(drawing.title)}</text>'
    facts = "  ·  ".join(drawing.facts)
    yield f'<text class="q" x="{_EDGE}" y="56">{_text(facts)}</text>'
    x = float(_EDGE)
    for name, fills in _legend(drawing):
        for fill, tip in fills:
            yield (
                f'<rect {fill} x="{_n(x)}" y="72" width="14" height="12" rx="2">'
                f"<title>{_text(tip)}</title></rect>"
            )
            x += 16
        yield f'<text x="{_n(x + 3)}" y="82">{_text(name)}</text>'
        x += 3 + _text_width(name) + 20


def _legend(drawing: Drawing) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Text and swatches: per module its shades, then what else is to be seen."""
    seen = {(box.module, box.kind) for lane in drawing.lanes for box in lane.boxes}
    for module, name in enumerate(drawing.modules):
        shades = [kind for kind in _SHADES if (module, kind) in seen]
        swatches = [(f'class="{kind}{module}"', f"{name} {KIND_NAMES[kind]}") for kind in shades]
        if shades:
            yield f"{name} ({' '.join(kind.value for kind in shades)})", swatches
    yield "bubble", [('fill="url(#idle)" stroke="#d3d9df"', "no op runs")]
    strips = {strip.kind for lane in drawing.lanes for strip in lane.strips}
    for kind in TraceKind:
        if kind in strips:
            yield kind.value, [(f'class="{kind}"', kind.value)]


def _lanes(page: _Page) -> Iterator[str]:
    for rank, lane in enumerate(page.drawing.lanes):
        top, middle = page.lane_top(rank), page.lane_top(rank) + page.lane_height / 2 + 4
        yield f'<text class="e" x="{_LEFT - 10}" y="{_n(middle)}">{_text(lane.name)}</text>'
        yield (
            f'<rect fill="url(#idle)" x="{_LEFT}" y="{_n(top)}" width="{_n(page.plot_width)}" '
            f'height="{_n(page.lane_height)}"/>'
        )
        yield from _boxes(page, lane, top)
        yield from _strips(page, lane, top + page.lane_height - 4)
        yield (
            f'<text class="s" x="{WIDTH - _RIGHT + 10}" y="{_n(middle)}">'
            f"{percent(lane.idle)} idle</text>"
        )


def _boxes(page: _Page, lane: Lane, top: float) -> Iterator[str]:
    height = page.lane_height - (5 if lane.strips else 0)
    for box in lane.boxes:
        left, width = page.x(box.start_ns), page.x(box.end_ns) - page.x(box.start_ns)
        gap = 0.6 if width > 3 else 0.0  # a hairline between neighbours, where there is room
        corner = ' rx="1.5"' if width > 7 else ""
        yield (
            f'<rect class="{box.kind}{box.module}" x="{_n(left)}" y="{_n(top)}" '
            f'width="{_n(width - gap)}" height="{_n(height)}"{corner}>'
            f"<title>{_text(box.title)}</title></rect>"
        )
        label = next((one for one in box.labels if width > 6.2 * len(one) + 3), None)
        if label is not None:
            ink = "n w" if box.kind is OpKind.B else "n"
            x, y = _n(left + (width - gap) / 2), _n(top + height / 2 + 3.6)
            yield f'<text class="{ink}" x="{x}" y="{y}">{_text(label)}</text>'


def _strips(page: _Page, lane: Lane, top: float) -> Iterator[str]:
    for strip in lane.strips:
        left, right = page.x(strip.start_ns), page.x(strip.end_ns)
        yield (
            f'<rect class="{strip.kind}" x="{_n(left)}" y="{_n(top)}" '
            f'width="{_n(max(right - left, 0.7))}" height="4">'
            f"<title>{_text(strip.title)}</title></rect>"
        )


def _axis(page: _Page, top: float, bottom: float) -> Iterator[str]:
    """Time in milliseconds below the rows that end at `bottom`."""
    yield f'<path class="g" d="M{_LEFT} {_n(bottom)}H{_n(_LEFT + page.plot_width)}"/>'
    step_ns = _tick_step_ns(page.drawing.end_ns)
    for time_ns in range(0, page.drawing.end_ns + 1, step_ns):
        x = _n(page.x(time_ns))
        yield f'<path class="g" d="M{x} {_n(bottom)}v5"/>'
        yield f'<text class="s m" x="{x}" y="{_n(bottom + 18)}">{_tick(time_ns, step_ns)}</text>'
    yield (
        f'<text class="s" x="{WIDTH - _RIGHT + 30}" y="{_n(bottom + 18)}">time in ms</text>'
        f'<path class="g" d="M{_LEFT} {_n(top)}V{_n(bottom)}"/>'
    )


def _tick_step_ns(end_ns: int) -> int:
    """The smallest of 1, 2, 5 times a power of ten that needs at most twelve ticks."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if end_ns <= 12 * step:
                return step
        power *= 10


def _tick(time_ns: int, step_ns: int) -> str:
    decimals = 0
    while step_ns * 10**decimals % 1_000_000:
        decimals += 1
    return f"{time_ns / 1e6:,.{decimals}f}"


def _memory(page: _Page) -> Iterator[str]:
    drawing = page.drawing
    if not drawing.curves:
        return
    high = any(_ceiling_bytes(curve) < curve.capacity_bytes for curve in drawing.curves)
    yield (
        f'<text x="{_EDGE}" y="{_n(page.curves_top - 14)}" font-weight="600">'
        "Activation memory held</text>"
        f'<text class="q" x="{_EDGE + 172}" y="{_n(page.curves_top - 14)}">'
        f"dashed: each rank's capacity{', ↑ above the scale' if high else ''}</text>"
    )
    for rank, curve in enumerate(drawing.curves):
        yield from _curve(page, curve, page.curve_top(rank))
    bottom = page.curve_top(len(drawing.curves) - 1) + page.curve_height
    yield from _axis(page, page.curves_top, bottom)


def _ceiling_bytes(curve: Curve) -> int:
    """Where the scale ends: at the capacity, unless the curve would then be lost at the bottom."""
    return max(curve.peak_bytes, min(curve.capacity_bytes, 3 * curve.peak_bytes), 1)


def _curve(page: _Page, curve: Curve, top: float) -> Iterator[str]:
    bottom, middle = top + page.curve_height, top + page.curve_height / 2
    ceiling = _ceiling_bytes(curve)
    arrow = "↑ " if curve.capacity_bytes > ceiling else ""

    def y(held_bytes: int) -> float:
        return bottom - (page.curve_height - 3) * held_bytes / ceiling

    right = _n(_LEFT + page.plot_width)
    line = "".join(f"H{_n(page.x(time_ns))}V{_n(y(held))}" for time_ns, held in curve.steps)
    path = f"M{_LEFT} {_n(bottom)}{line}H{right}"
    tip = f"{curve.name}: peak {size(curve.peak_bytes)} of {size(curve.capacity_bytes)}"
    limit = _n(y(min(curve.capacity_bytes, ceiling)))
    yield f'<path class="g" d="M{_LEFT} {_n(bottom)}H{right}"/>'
    yield f'<path class="a" d="{path}V{_n(bottom)}Z"><title>{_text(tip)}</title></path>'
    yield f'<path class="l" d="{path}"/>'
    yield f'<path class="b" d="M{_LEFT} {limit}H{right}"/>'
    yield f'<text class="e" x="{_LEFT - 10}" y="{_n(middle + 4)}">{_text(curve.name)}</text>'
    x = WIDTH - _RIGHT + 10
    yield (
        f'<text class="r" x="{x}" y="{_n(middle - 2)}">{arrow}{size(curve.capacity_bytes)}</text>'
    )
    yield f'<text class="s" x="{x}" y="{_n(middle + 12)}">peak {size(curve.peak_bytes)}</text>'


def _marks(page: _Page) -> Iterator[str]:
    for mark in page.drawing.marks:
        x = _n(page.x(mark.time_ns))
        yield f'<path class="b" d="M{x} {_n(page.lanes_top - 8)}V{_n(page.lanes_bottom)}"/>'
        yield f'<text class="r e" x="{x}" y="{_n(page.lanes_top - 9)}">{_text(mark.label)}</text>'


def _n(value: float) -> str:
    """A coordinate to a hundredth of a pixel, without idle zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text_width(text: str) -> float:
    """About how wide `text` is at 12 pixels; fonts differ, so a little generous."""
    return 6.7 * len(text)


def _text(text: str) -> str:
    """`text` for XML; what XML cannot hold (control characters) becomes a question mark."""
    return escape(re.sub(r"[^\n\x20-\x7e\xa0-\ufffd\U00010000-\U0010ffff]", "?", text))
