"""Charts as inline SVG. Colours are CSS classes and variables of the page, so that they follow light and dark.

Shape legend: ``N`` points or steps, ``C`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polymodal.evaluation.markup import Markup, element
from polymodal.evaluation.scores import Row, Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHAPES = {
    "blind": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "shuffled": "M0,-5L5,0L0,5L-5,0Z",
    "majority": "M-1.2,-9H1.2V9H-1.2Z",
    "wording": "M-4,-4H4V4H-4Z",
    "without": "M0,-5L5,4H-5Z",
    "chance": "M-1.2,-9H1.2V9H-1.2Z",
}


def control_label(name: str) -> str:
    """How a control is called in reports: ``without_image`` -> ``without image``."""
    return name.replace("_", " ")


def marker(name: str) -> Markup:
    """The mark of one control, centred at 0, 0."""
    kind = name.partition("_")[0]
    return element("path", d=_SHAPES.get(kind, _SHAPES["wording"]), class_=f"mark mark-{kind}")


def legend_mark(name: str) -> Markup:
    """The mark as a small picture of its own."""
    return element("svg", marker(name), viewBox="-10 -10 20 20", width=18, height=18, aria_hidden="true")


def score_bar(row: Row) -> Markup:
    """The score as a bar from 0 to 1 with its interval, and a mark for each control."""
    value = row.score.value
    words = "; ".join([f"score {value:.1%}", *(f"{control_label(k)} {v.value:.1%}" for k, v in row.controls.items())])
    return element(
        "svg",
        element("rect", class_="track", x=0, y=6, width="100%", height=14, rx=4),
        element("rect", class_="bar", x=0, y=6, width=f"{100 * value:.2f}%", height=14, rx=4),
        _whisker(row.score),
        [_placed(name, score) for name, score in row.controls.items()],
        class_="score-bar", width="100%", height=26, role="img", aria_label=f"{row.family}: {words}",
    )  # fmt: skip


def _whisker(score: Score) -> Markup:
    return element("line", class_="whisker", x1=f"{100 * score.low:.2f}%", x2=f"{100 * score.high:.2f}%", y1=13, y2=13)


def _placed(name: str, score: Score) -> Markup:
    tip = element("title", f"{control_label(name)}: {score.value:.1%}")
    return element("svg", element("g", tip, marker(name)), x=f"{100 * score.value:.2f}%", y=13, overflow="visible")


_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 28


def line_chart(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, title: str) -> Markup:
    """Lines over steps: the values faintly, and smoothed.

    Args:
        series: name -> (x values, y values), both of one length; values that are not finite are left out.
        x_label: what x counts.
        title: what a screen reader says.
    """
    cleaned = {name: _finite(xs, ys) for name, (xs, ys) in series.items()}
    cleaned = {name: pair for name, pair in cleaned.items() if len(pair[0])}
    if not cleaned:
        return element("p", "No values were logged.", class_="muted")
    x_low, x_high = _range([xs for xs, _ in cleaned.values()])
    y_ticks = nice_ticks(*_y_range([ys for _, ys in cleaned.values()]))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> str:
        px = _LEFT + (xs - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)
        py = _HEIGHT - _BOTTOM - (np.clip(ys, y_low, y_high) - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(px, py, strict=True))

    lines = []
    for i, (xs, ys) in enumerate(cleaned.values()):
        thin_xs, thin_ys = bucket_means(xs, ys, 240)
        lines.append(element("polyline", class_=f"line raw series-{i % 6}", points=place(thin_xs, thin_ys)))
        lines.append(element("polyline", class_=f"line series-{i % 6}", points=place(thin_xs, smoothed(thin_ys))))
    return element(
        "svg", _axes(y_ticks, x_low, x_high, x_label), lines,
        class_="chart", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title,
    )  # fmt: skip


def _axes(y_ticks: list[float], x_low: float, x_high: float, x_label: str) -> list[Markup]:
    bottom, parts = _HEIGHT - _BOTTOM, []
    for tick in y_ticks:
        y = bottom - (tick - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - _TOP)
        parts.append(element("line", class_="grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y))
        parts.append(element("text", f"{tick:g}", class_="tick", x=_LEFT - 8, y=y + 4, text_anchor="end"))
    ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high]
    for tick in ticks:
        x = _LEFT + (tick - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)
        label = f"{tick:,.0f} {x_label}" if tick == ticks[-1] else f"{tick:,.0f}"
        anchor = "end" if tick == ticks[-1] and x > _WIDTH - 60 else "middle"
        parts.append(element("text", label, class_="tick", x=x + (8 if anchor == "end" else 0), y=_HEIGHT - 8,
                             text_anchor=anchor))  # fmt: skip
    return parts


def waveform(samples_N: NDArray[Any]) -> Markup:
    """A recording as the envelope of its amplitude, -1..1."""
    columns = min(120, max(1, len(samples_N)))
    peaks = [float(np.abs(block).max()) if block.size else 0.0 for block in np.array_split(samples_N, columns)]
    bars = [
        element("rect", x=240 * i / columns, y=32 - 30 * peak, width=240 / columns * 0.7, height=max(1.0, 60 * peak))
        for i, peak in enumerate(peaks)
    ]
    return element("svg", bars, class_="waveform", viewBox="0 0 240 64", role="img", aria_label="waveform")


def cloud(xyz_N3: NDArray[Any], rgb_N3: NDArray[Any] | None, max_points: int = 500) -> Markup:
    """A point cloud seen from the front and above (z up), far points first; colours 0..1."""
    chosen = np.linspace(0, len(xyz_N3) - 1, min(max_points, len(xyz_N3))).round().astype(int)
    xyz = np.asarray(xyz_N3, dtype=np.float64)[chosen]
    extent = " \u00d7 ".join(f"{side:.3g}" for side in np.ptp(xyz, axis=0))
    xyz = xyz - (xyz.min(axis=0) + xyz.max(axis=0)) / 2
    xyz = xyz / (np.abs(xyz).max() or 1.0)
    turn, tilt = math.radians(35), math.radians(25)
    x = xyz[:, 0] * math.cos(turn) - xyz[:, 1] * math.sin(turn)
    depth = xyz[:, 0] * math.sin(turn) + xyz[:, 1] * math.cos(turn)
    height = xyz[:, 2] * math.cos(tilt) - depth * math.sin(tilt)
    away = depth * math.cos(tilt) + xyz[:, 2] * math.sin(tilt)
    dots = []
    for i in np.argsort(-away):
        near = 1 - (away[i] + 1.7) / 3.4
        fill = None
        if rgb_N3 is not None:
            red, green, blue = (np.clip(rgb_N3[chosen[i]], 0, 1) * 255).round().astype(int)
            fill = f"#{red:02x}{green:02x}{blue:02x}"
        place = {"cx": 80 + 46 * x[i], "cy": 80 - 46 * height[i], "r": 1.6 + 1.2 * near}
        dots.append(element("circle", **place, fill=fill, class_=None if fill else "dot"))
    # The drawing fills its frame whatever the size, so the size is written beside it.
    dots.append(element("text", extent, class_="tick small", x=154, y=154, text_anchor="end"))
    return element("svg", dots, class_="cloud", viewBox="0 0 160 160", role="img", aria_label="point cloud")


def recording(values_NC: NDArray[Any], names: Sequence[str] | None, max_channels: int = 8) -> Markup:
    """A sensor recording: one line per channel, above each other.

    Each has its own scale, but none is magnified above a tenth of the largest range: quiet channels look quiet.
    """
    values = np.atleast_2d(np.asarray(values_NC, dtype=np.float64).T)[:max_channels]
    row = 22
    parts = []
    least = 0.1 * float(np.ptp(values, axis=1).max())
    for c, channel in enumerate(values):
        xs, ys = bucket_means(np.arange(len(channel), dtype=np.float64), channel, 160)
        middle, reach = float(ys.min() + ys.max()) / 2, max(float(np.ptp(ys)), least) / 2 or 1.0
        px = 56 + xs / max(1, len(channel) - 1) * 200
        py = row * (c + 0.5) - (ys - middle) / reach * (row / 2 - 4)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(px, py, strict=True))
        parts.append(element("polyline", class_=f"line series-{c % 6}", points=points))
        name = str(names[c]) if names else f"channel {c + 1}"
        parts.append(element("text", name[:10], class_="tick", x=0, y=row * c + row / 2 + 4))
    return element("svg", parts, class_="recording", viewBox=f"0 0 260 {row * len(values) + 4}", role="img",
                   aria_label="sensor recording")  # fmt: skip


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, about ``wanted`` steps of 1, 2 or 5 x 10^k."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def bucket_means(
    xs: NDArray[np.float64], ys: NDArray[np.float64], most: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most ``most`` points, each the mean of equally many neighbours."""
    if len(xs) <= most:
        return xs, ys
    return (
        np.array([block.mean() for block in np.array_split(xs, most)]),
        np.array([block.mean() for block in np.array_split(ys, most)]),
    )


def smoothed(ys: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a centred window of a tenth of the points, narrower towards the ends."""
    half = len(ys) // 20
    total = np.concatenate([[0.0], np.cumsum(ys)])
    centre = np.arange(len(ys))
    reach = np.minimum(half, np.minimum(centre, len(ys) - 1 - centre))
    means: NDArray[np.float64] = (total[centre + reach + 1] - total[centre - reach]) / (2 * reach + 1)
    return means


def _finite(xs: Sequence[float], ys: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def _range(arrays: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    together = np.concatenate(arrays)
    return float(together.min()), float(together.max())


def _y_range(arrays: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """From 0 (or the least value) to where 99 % of the values lie: one early spike does not flatten the rest."""
    together = np.concatenate(arrays)
    return min(0.0, float(together.min())), max(float(np.quantile(together, 0.99)), 1e-6)
