"""The project's pictures: Altair charts in one visual language, and strips of frames.

A stage has the same colour wherever it appears (Okabe and Ito's palette, safe for colour-blind readers; from the ninth
stage on some of Tol's, which beside those are not). Charts come out as PNG, which works without a network in Lab, in reports
and on GitHub; one in which something can be chosen answers the mouse as well in a notebook that somebody has open.
"""

import io
import itertools
import logging
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from altair.utils.mimebundle import spec_to_mimebundle
from PIL import Image, ImageColor, ImageDraw, ImageFont

from sarm_lib import live

log = logging.getLogger(__name__)

STAGE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
STAGE_COLOURS += ("#332288", "#44AA99", "#882255", "#DDCC77", "#117733", "#AA4499", "#999933", "#CC6677")
PREDICTED, TARGET, ACCENT, TRUTH = "#0072B2", "#7F7F7F", "#D55E00", "#009E73"
WIDTH, HEIGHT = 640, 220
MOST_POINTS = 1200  # of a curve: twice its width in pixels
MOST_ROWS = 5000  # of a chart: Altair takes no more
MOST_EPISODES = 60  # of a chart that carries the curves of each; or rollouts
# Of curves, for print without colours.
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right")
DASHES = ([1, 0], [7, 3], [2, 2], [9, 2, 2, 2], [4, 4], [12, 3], [1, 3], [6, 2, 1, 2])
VEGA_LITE_OF_LAB = "application/vnd.vegalite.v5+json"
Segments = list[tuple[str, int, int]]


def setup() -> None:
    """Call once in a notebook: pictures of twice the resolution, and charts that answer where somebody watches."""
    alt.renderers.enable("answering" if live.watched() else "png", scale_factor=2)
    alt.theme.enable("sarm")
    pd.set_option("display.max_colwidth", None)


def _answering(spec: dict, **options) -> tuple[dict, dict]:
    """A picture of the chart and, if something can be chosen in it, the chart as JupyterLab draws it without a network."""
    bundle, metadata = spec_to_mimebundle(spec, "png", mode="vega-lite", **options)
    if "params" in spec:  # Altair writes Vega-Lite 6, of which these charts use nothing that Lab's Vega-Lite 5 lacks
        bundle[VEGA_LITE_OF_LAB] = spec | {"$schema": "https://vega.github.io/schema/vega-lite/v5.json"}
    return bundle, metadata


alt.renderers.register("answering", _answering)


@alt.theme.register("sarm", enable=False)
def _theme() -> alt.theme.ThemeConfig:
    return {
        "config": {
            "view": {"continuousWidth": WIDTH, "continuousHeight": HEIGHT, "stroke": None},
            "font": "sans-serif",
            "axis": {
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "gridColor": "#EEEEEE",
                "domainColor": "#888888",
            },
            "legend": {"labelFontSize": 12, "titleFontSize": 12, "orient": "top", "titleFontWeight": "normal"},
            "title": {"fontSize": 14, "anchor": "start", "fontWeight": "normal"},
        }
    }


def stage_scale(names: list[str]) -> alt.Scale:
    """The colours of these stages, in order."""
    return alt.Scale(domain=names, range=[STAGE_COLOURS[i % len(STAGE_COLOURS)] for i in range(len(names))])


def thinned(length: int, most: int = MOST_POINTS) -> np.ndarray:
    """Which of `length` frames a curve draws: all, or `most` evenly spaced ones."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def telling(values: np.ndarray, most: int) -> np.ndarray:
    """Which frames of `values` (T,) a curve draws that may lose no short drop: all, or the lowest and the highest of every
    one of equal stretches, at most `most` of them."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), max(1, most // 2) + 1).astype(int)
    ends = [a + np.array([values[a:b].argmin(), values[a:b].argmax()]) for a, b in itertools.pairwise(edges)]
    return np.unique(ends)


def _by_curve(names: list[str], colours: list[str], dashed: dict[str, list[int]] | None = None) -> dict:
    """Colour and dash of every curve, by the column `curve`, in one legend."""
    dashes, legend = [(dashed or {}).get(name, DASHES[0]) for name in names], _in_columns(names)
    return {
        "color": alt.Color("curve:N", scale=alt.Scale(domain=names, range=colours), title=None, legend=legend),
        "strokeDash": alt.StrokeDash("curve:N", scale=alt.Scale(domain=names, range=dashes), title=None, legend=legend),
    }


def _in_columns(names: list[str]) -> alt.Legend:
    """A legend over a chart, not wider than it: the joints of two arms stand in several rows, and long names are not cut."""
    font = _font(names, 12)
    wide = [1.1 * font.getlength(name) + 34 for name in names]  # pixels, roughly
    return alt.Legend(labelLimit=WIDTH, columns=0 if sum(wide) <= WIDTH else max(1, int(WIDTH // max(wide))))


def table(figures: pd.DataFrame) -> pd.DataFrame:
    """Figures as a page shows them: whole numbers as such, – for what is not there, and names that may be broken."""
    shown = figures.convert_dtypes().astype(object)
    return shown.where(figures.notna(), "–").rename(columns=lambda name: str(name).replace("_", " "))


def episode_lengths(table: pd.DataFrame) -> alt.Chart:
    """Histogram of `seconds` by `split`. Binned before it is drawn: any number of episodes."""
    edges = np.linspace(0, table.seconds.max(), 31)
    rows = [
        {"low": low, "high": high, "episodes": count, "split": split}
        for split, mine in table.groupby("split")
        for low, high, count in zip(edges, edges[1:], np.histogram(mine.seconds, edges)[0], strict=False)
        if count
    ]
    return (
        alt.Chart(pd.DataFrame(rows), title="Episode lengths")
        .mark_bar()
        .encode(
            x=alt.X("low:Q", bin="binned", title="length (s)"),
            x2="high:Q",
            y=alt.Y("episodes:Q", stack="zero", title="episodes", axis=alt.Axis(tickMinStep=1)),
            color=alt.Color("split:N", scale=stage_scale(["train", "val", "test"])),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def learning_curve(curve: pd.DataFrame, columns: list[str], title: str) -> alt.Chart:
    """`columns` of a learning curve over `step`, on a logarithmic scale; any number of steps."""
    tables = []
    for column in columns:
        mine = curve[["step", column]].dropna()  # not every step is validated
        mine = mine.iloc[thinned(len(mine), MOST_ROWS // len(columns))] if len(mine) else mine
        tables.append(mine.set_axis(["step", "value"], axis=1).assign(curve=column))
    colours = [STAGE_COLOURS[i % len(STAGE_COLOURS)] for i in range(len(columns))]
    dashed = {column: DASHES[i % len(DASHES)] for i, column in enumerate(columns)}
    return (
        alt.Chart(pd.concat(tables), title=title)
        .mark_line(point=len(curve) < 40)
        .encode(
            x=alt.X("step:Q"),
            y=alt.Y("value:Q", scale=alt.Scale(type="log"), title="loss"),
            **_by_curve(columns, colours, dashed),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def panel(
    title: str,
    curves: dict[str, np.ndarray],
    fps: float,
    kind: str = "lines",
    domain: tuple[float, float] | None = (0, 1),
    colours: list[str] | None = None,
    dashed: tuple[str, ...] = (),
    height: int = HEIGHT,
) -> alt.Chart:
    """Curves (T,) of an episode over time, or areas stacked on one another (a third as high), the first at the bottom."""
    names = list(curves)
    shown = thinned(len(curves[names[0]]), min(MOST_POINTS, MOST_ROWS // len(names)))
    colours = colours or [STAGE_COLOURS[i % len(STAGE_COLOURS)] for i in range(len(names))]
    tables = [
        pd.DataFrame({"time": shown / fps, "value": np.asarray(v, dtype=float)[shown], "curve": name, "order": i})
        for i, (name, v) in enumerate(curves.items())
    ]
    chart = alt.Chart(pd.concat(tables)).properties(width=WIDTH)
    x = alt.X("time:Q", title="time (s)", scale=alt.Scale(nice=False))
    if kind == "areas":
        y = alt.Y("value:Q", stack="zero", title=title, scale=alt.Scale(domain=domain) if domain else alt.Undefined)
        color = alt.Color(
            "curve:N", scale=alt.Scale(domain=names, range=colours), title=None, legend=_in_columns(names)
        )
        return chart.mark_area().encode(x=x, y=y, color=color, order="order:Q").properties(height=HEIGHT // 3)
    y = alt.Y("value:Q", title=title, scale=alt.Scale(domain=domain) if domain else alt.Scale(zero=False))
    looks = _by_curve(names, colours, {name: [5, 4] for name in dashed})
    return chart.mark_line().encode(x=x, y=y, **looks).properties(height=height)


def progress(predicted: np.ndarray, target: np.ndarray | None, fps: float, title: str) -> alt.Chart:
    """Predicted progress (T,) of an episode over the target's."""
    curves = {"predicted": predicted} | ({} if target is None else {"target": target})
    return panel("progress φ", curves, fps, colours=[PREDICTED, TARGET][: len(curves)], dashed=("target",)).properties(
        title=title
    )


def episode(images: np.ndarray, labels: list[str], panels: list[alt.Chart], title: str) -> Image.Image:
    """Frames of an episode over its panels, as one picture."""
    chart = alt.vconcat(*panels, title=title).resolve_scale(color="independent", strokeDash="independent", x="shared")
    curves = Image.open(io.BytesIO(vl_convert.vegalite_to_png(chart.to_json(), scale=2))).convert("RGB")
    strip = filmstrip(images, labels, width=curves.width)
    page = Image.new("RGB", (curves.width, strip.height + curves.height), "white")
    page.paste(strip, (0, 0))
    page.paste(curves, (0, strip.height))
    return page


def moving_episode(
    images: np.ndarray, frames: np.ndarray, predicted: np.ndarray, target: np.ndarray | None, fps: int, title: str
) -> list[Image.Image]:
    """An episode as it goes on: one picture for every one of `images` (n, H, W, 3), taken at `frames` (n,) of the curves
    (T,), beside its progress so far."""
    left, top, width, height, below = 52, 62, 440, 150, 44
    padding = {"left": left, "top": top, "right": 14, "bottom": below}
    said = title + ("" if target is None else ": predicted (blue), target (dashed)")
    chart = progress(predicted, target, fps, said).properties(
        width=width, height=height, padding=padding, autosize="none"
    )  # so that it is known where in the picture a frame is
    curves = Image.open(io.BytesIO(vl_convert.vegalite_to_png(chart.to_json()))).convert("RGB")
    pages = []
    for image, frame in zip(images, frames, strict=True):
        size = (round(image.shape[1] * curves.height / image.shape[0]), curves.height)
        page = Image.new("RGB", (size[0] + curves.width, curves.height), "white")
        page.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (0, 0))
        page.paste(curves, (size[0], 0))
        x = size[0] + left + width * frame / max(1, len(predicted) - 1)
        y = top + height * (1 - float(predicted[frame]))
        draw = ImageDraw.Draw(page)
        draw.line((x, top, x, top + height), fill="black")
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=ACCENT)
        pages.append(page)
    return pages


def save_film(path: Path, pages: list[Image.Image], seconds: float) -> None:
    """Pictures of one size as a GIF that takes so long, rests at its end, and begins again."""
    pages = [page.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for page in pages]
    durations = [max(20, round(1000 * seconds / len(pages)))] * (len(pages) - 1) + [2000]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=durations, loop=0, optimize=True)


WEIGHT_KINDS = ("weight 0", "soft weight", "weight 1")


def delta_bins(delta: np.ndarray, weight: np.ndarray) -> pd.DataFrame:
    """Frames counted by progress delta r and the kind of weight they get: `low`, `high`, `frames`, `kind`."""
    known = np.isfinite(delta)  # LeRobot's file may say nothing of a frame
    delta, weight = delta[known], weight[known]
    edges = np.linspace(*np.percentile(delta, [0.2, 99.8]), 61)
    rows = []
    for kind, mine in zip(WEIGHT_KINDS, (weight == 0, (weight > 0) & (weight < 1), weight == 1), strict=True):
        counts, _ = np.histogram(delta[mine], edges)
        bins = zip(edges[:-1].round(5).tolist(), edges[1:].round(5).tolist(), counts.tolist(), strict=True)
        rows += [{"low": low, "high": high, "frames": count, "kind": kind} for low, high, count in bins if count]
    return pd.DataFrame(rows)


def delta_histogram(delta: np.ndarray, weight: np.ndarray, kappa: float) -> alt.LayerChart:
    """The distribution of r with κ marked. Binned before it is drawn: any number of frames."""
    bars = (
        alt.Chart(delta_bins(delta, weight), title="Progress gained in Δ frames, and the weight it earns")
        .mark_bar()
        .encode(
            x=alt.X("low:Q", bin="binned", title="r = φ(t+Δ) − φ(t)"),
            x2="high:Q",
            y=alt.Y("frames:Q", stack="zero"),
            color=alt.Color(
                "kind:N", scale=alt.Scale(domain=list(WEIGHT_KINDS), range=[ACCENT, "#56B4E9", PREDICTED]), title=None
            ),
        )
    )
    rule = alt.Chart(pd.DataFrame({"kappa": [kappa]})).mark_rule(strokeDash=[4, 3]).encode(x="kappa:Q")
    label = alt.Chart(pd.DataFrame({"kappa": [kappa], "text": [f"κ = {kappa:.3g}"]})).mark_text(
        align="left", dx=-4, baseline="bottom"
    )
    return (bars + rule + label.encode(x="kappa:Q", y=alt.value(-2), text="text:N")).properties(
        width=WIDTH, height=HEIGHT
    )


def linked_episodes(
    table: pd.DataFrame, measure: str, curves: dict[int, dict[str, np.ndarray]], fps: float, title: str
) -> alt.VConcatChart:
    """Every episode as a dot, and the curves of the one that is clicked; moving over these reads their values.

    table: `episode`, `group` and `measure` (the column drawn upwards), those to look at first before the others; `why`
    is said beside a chosen one.
    curves: of an episode, name: (T,) values; a curve called `weight` colours the first one instead of being drawn.
    """
    groups = sorted(set(table.group.astype(str)))  # of all, so that a kind has its colour in every chapter
    table = table.head(MOST_EPISODES)
    names = list(curves[int(table.episode.iloc[0])])
    drawn = [name for name in names if name != "weight"]
    rows = []
    for index in table.episode:
        mine = pd.DataFrame(curves[int(index)])
        telling_curve = mine["weight" if "weight" in mine else names[0]].to_numpy()
        mine = mine.iloc[telling(telling_curve, MOST_ROWS // len(table))].astype(float).round(4)
        rows.append(mine.assign(episode=index, time=(mine.index / fps).round(3)))
    lengths = {index: len(curves[int(index)][names[0]]) / fps for index in table.episode}
    table = table[[c for c in ("episode", "group", measure, "why") if c in table]]
    table = table.assign(seconds=table.episode.map(lengths).round(2))

    chosen = alt.selection_point(fields=["episode"], value=[{"episode": int(table.episode.iloc[0])}], toggle=False)
    legend = {"title": None} if len(groups) > 1 else {"legend": None}
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(groups))]
    dots = (
        alt.Chart(table, title=title)
        .mark_point(filled=True, stroke="black", opacity=1)
        .encode(
            x=alt.X("seconds:Q", title="length (s)", scale=alt.Scale(zero=False, padding=12)),
            y=alt.Y(f"{measure}:Q"),
            color=alt.Color("group:N", scale=stage_scale(groups), **legend),
            shape=alt.Shape("group:N", scale=alt.Scale(domain=groups, range=shapes), **legend),
            size=alt.condition(chosen, alt.value(160), alt.value(60)),
            strokeWidth=alt.condition(chosen, alt.value(2), alt.value(0.5)),
            tooltip=["episode:Q", "group:N", "seconds:Q", alt.Tooltip(f"{measure}:Q", format=".3f")],
        )
        .add_params(chosen)
        .properties(width=WIDTH, height=HEIGHT // 2)
    )
    name = (
        alt.Chart(table)
        .transform_filter(chosen)
        .transform_calculate(
            said="'episode ' + datum.episode + (datum.group == 'all' ? '' : ' (' + datum.group + ')') + (datum.why ? ': ' + datum.why : '')"
        )
        .mark_text(align="left", fontSize=13, limit=WIDTH)
        .encode(x=alt.value(6), y=alt.value(12), text="said:N")
    )
    shown = alt.Chart(pd.concat(rows)).transform_filter(chosen)
    x = alt.X("time:Q", title="time (s)", scale=alt.Scale(nice=False))
    y = alt.Y("progress:Q", title="progress φ", scale=alt.Scale(domain=[0, 1.1]), axis=alt.Axis(values=[0, 0.5, 1]))
    lines = shown.transform_fold(drawn, as_=["curve", "progress"]).encode(x=x, y=y)
    if "weight" in names:
        scale = alt.Scale(domain=[0, 0.5, 1], range=[ACCENT, "#C9C9C9", PREDICTED])
        dotted = lines.mark_circle(size=45, opacity=1).encode(color=alt.Color("weight:Q", scale=scale))
        panel = lines.mark_line(color="#BBBBBB") + dotted
    else:
        colours = [PREDICTED, TARGET, *STAGE_COLOURS[2:]][: len(drawn)]
        panel = lines.mark_line().encode(**_by_curve(drawn, colours, {"target": [5, 4]}))
    when = alt.selection_point(fields=["time"], nearest=True, on="pointerover", empty=False)
    values = [alt.Tooltip("time:Q", format=".2f"), *(alt.Tooltip(f"{n}:Q", format=".3f") for n in names)]
    reading = shown.mark_rule(color="#888888").encode(
        x=x, opacity=alt.condition(when, alt.value(1), alt.value(0)), tooltip=values
    )
    panel = (panel + reading.add_params(when) + name).properties(width=WIDTH, height=HEIGHT)
    own = dict.fromkeys(("color", "shape", "size", "strokeDash"), "independent")
    return alt.vconcat(dots, panel).resolve_scale(**own)


def scorecard(figures: dict[str, dict[str, float]], metric: str, title: str) -> alt.LayerChart:
    """One metric by kind or by row, with its interval; whatever does not have it is left out."""
    table = pd.DataFrame(
        [
            {"name": k, "value": v[metric], "low": v[f"{metric}_low"], "high": v[f"{metric}_high"]}
            for k, v in figures.items()
            if metric in v
        ]
    )
    base = alt.Chart(table, title=title).encode(
        y=alt.Y("name:N", title=None, sort=list(figures), axis=alt.Axis(labelLimit=200))
    )
    domain = alt.Scale(zero=False, nice=True)
    bars = base.mark_rule(strokeWidth=2, color=TARGET).encode(x=alt.X("low:Q", title=metric, scale=domain), x2="high:Q")
    return (
        bars
        + base.mark_point(filled=True, size=70, color=PREDICTED, opacity=1).encode(x=alt.X("value:Q", scale=domain))
    ).properties(width=WIDTH, height=26 * len(table))


def differences(table: pd.DataFrame, measure: str, title: str) -> alt.LayerChart:
    """By how much rows lie above another one (`difference`, `low`, `high` of each), on a scale on which a tenth of the largest
    is still seen, the largest first."""
    table = table.sort_values("difference", ascending=False).rename_axis("name").reset_index()
    nearest = table.difference.abs()[table.difference != 0].min() if table.difference.any() else 1.0
    scale = alt.Scale(type="symlog", constant=float(nearest), nice=True)
    base = alt.Chart(table, title=title).encode(
        y=alt.Y("name:N", title=None, sort=table.name.tolist(), axis=alt.Axis(labelLimit=200))
    )
    x = alt.X(
        "low:Q", title=f"difference of {measure}", scale=scale, axis=alt.Axis(format="+~g", values=_symlog_ticks(table))
    )
    zero = alt.Chart(pd.DataFrame({"at": [0.0]})).mark_rule(strokeDash=[4, 4]).encode(x=alt.X("at:Q", scale=scale))
    bars = base.mark_rule(strokeWidth=2, color=TARGET).encode(x=x, x2="high:Q")
    points = base.mark_point(filled=True, size=70, color=PREDICTED, opacity=1).encode(
        x=alt.X("difference:Q", scale=scale)
    )
    return (zero + bars + points).properties(width=WIDTH, height=26 * len(table))


def _symlog_ticks(table: pd.DataFrame) -> list[float]:
    """0, and powers of ten as far as the intervals go, to both sides."""
    most = max(float(table[["low", "high"]].abs().max().max()), 1e-12)
    powers = [10.0**p for p in range(int(np.floor(np.log10(most))) - 2, int(np.floor(np.log10(most))) + 1)]
    return [-p for p in powers if -p >= table.low.min()] + [0.0, *powers]


def policy_curve(curve: pd.DataFrame) -> alt.Chart:
    """Training loss over `step` by `arm`; any number of steps."""
    arms = list(dict.fromkeys(curve.arm))
    tables = [curve[curve.arm == arm] for arm in arms]
    table = pd.concat([mine.iloc[thinned(len(mine), MOST_ROWS // len(arms))] for mine in tables])
    colours = [TARGET, PREDICTED, *STAGE_COLOURS][: len(arms)]
    return (
        alt.Chart(table.rename(columns={"arm": "curve"}), title="Training loss of both policies")
        .mark_line()
        .encode(
            x="step:Q",
            y=alt.Y("loss:Q", scale=alt.Scale(zero=False)),
            **_by_curve(arms, colours, dict(zip(arms, DASHES, strict=False))),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def rollouts(scores: dict[str, list[np.ndarray]], done: dict[str, list], fps: float) -> alt.FacetChart:
    """Progress of every rollout over time, a row an arm, coloured by how it ended; the first ones of very many."""
    scores = {arm: of_arm[:MOST_EPISODES] for arm, of_arm in scores.items()}
    cut = any(len(done[arm]) > MOST_EPISODES for arm in scores)
    points = max(2, MOST_ROWS // max(1, sum(len(of_arm) for of_arm in scores.values())))
    tables = [
        pd.DataFrame({"time": shown / fps, "progress": phi[shown], "rollout": str(r.seed), "arm": arm, "curve": end})
        for arm in scores
        for phi, r in zip(scores[arm], done[arm], strict=False)
        for end in ["success" if r.success else "failure"]
        for shown in [thinned(len(phi), points)]
    ]
    tables.sort(key=lambda table: table.curve.iloc[0] == "success")  # drawn last, over the failures
    lines = (
        alt.Chart(pd.concat(tables))
        .mark_line(opacity=0.8)
        .encode(
            x=alt.X("time:Q", title="time (s)", scale=alt.Scale(nice=False)),
            y=alt.Y("progress:Q", title="progress φ", scale=alt.Scale(domain=[0, 1])),
            detail="rollout:N",
            **_by_curve(["success", "failure"], [PREDICTED, ACCENT], {"failure": DASHES[1]}),
        )
        .properties(width=WIDTH, height=HEIGHT // 2)
    )
    header = alt.Header(title=None, labelAnchor="start", labelOrient="top")
    title = f"Progress of {f'the first {MOST_EPISODES} rollouts' if cut else 'every rollout'}"
    return lines.facet(row=alt.Row("arm:N", sort=list(scores), header=header), title=title)


def mean_weights(table: pd.DataFrame, kappa: float, title: str) -> alt.LayerChart:
    """What κ and Δ do together: columns `kappa`, `mean weight` and `curve` (one a Δ), the κ in use marked."""
    names = list(dict.fromkeys(table.curve))
    lines = (
        alt.Chart(table, title=title)
        .mark_line()
        .encode(
            x=alt.X("kappa:Q", title="κ"),
            y=alt.Y("mean weight:Q", title="mean weight", scale=alt.Scale(domain=[0, 1])),
            **_by_curve(names, list(STAGE_COLOURS[: len(names)]), dict(zip(names, DASHES, strict=False))),
        )
    )
    healthy = pd.DataFrame({"low": [0.3], "high": [0.8]})
    band = alt.Chart(healthy).mark_rect(color="#EEEEEE").encode(y=alt.Y("low:Q", title="mean weight"), y2="high:Q")
    rule = alt.Chart(pd.DataFrame({"kappa": [kappa]})).mark_rule(strokeDash=[4, 3]).encode(x="kappa:Q")
    return (band + lines + rule).properties(width=WIDTH, height=HEIGHT)


@lru_cache(maxsize=64)
def _font_file(letters: str) -> str | None:
    """The file of a font that has ASCII and all these letters, or the most of them; None for Pillow's own, which has ASCII alone."""
    from matplotlib import font_manager, ft2font  # a second, which most pictures need not wait for

    default = font_manager.findfont("DejaVu Sans")  # comes with matplotlib: Latin, Greek, Cyrillic
    others = sorted(font_manager.findSystemFonts(), key=lambda path: ("Regular" not in Path(path).stem, path))
    best, lacking = None, set(letters)
    for path in [default, *others]:
        try:
            known = ft2font.FT2Font(path).get_charmap()
        except (OSError, RuntimeError):  # no font after all
            continue
        missing = {letter for letter in letters if ord(letter) not in known}
        if not known.keys() >= set(range(ord(" "), ord("~") + 1)):
            continue
        if best is None or len(missing) < len(lacking):
            best, lacking = path, missing
        if not lacking:
            return best
    log.warning(
        "no font of this machine has %s: pictures show boxes in their place. Install one that does (for Chinese, Japanese and Korean "
        "on Debian or Ubuntu: apt install fonts-noto-cjk)",
        " ".join(sorted(lacking)),
    )
    return best


def _font(texts: Iterable[str], size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """A font that has the letters of all `texts`, if this machine has one."""
    letters = {letter for text in texts for letter in text if letter.isprintable() and not letter.isascii()}
    if not letters:
        return ImageFont.load_default(size)
    path = _font_file("".join(sorted(letters)))
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def filmstrip(images: np.ndarray, labels: list[str], width: int = 1280) -> Image.Image:
    """Frames (n, H, W, 3) uint8 side by side, each with a label under it."""
    n, height, frame_width = images.shape[:3]
    scale = min(width / (n * frame_width), 2.0)
    size = (round(frame_width * scale), round(height * scale))
    strip = Image.new("RGB", (n * size[0], size[1] + 26), "white")
    draw, font = ImageDraw.Draw(strip), _font(labels, 18)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        strip.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (i * size[0], 0))
        draw.text((i * size[0] + 4, size[1] + 3), label, fill="black", font=font)
    return strip


def annotated_episode(
    images: np.ndarray, segments: dict[str, Segments], names: dict[str, list[str]], length: int, fps: float, title: str
) -> Image.Image:
    """What an annotation claims: `images` (n, H, W, 3) of equal stretches of an episode over a bar a head.

    Picture i was taken in the middle of the i-th of n equal stretches (`middles`), and stands over it. Names that fit into
    none of their segments stand below, with their colour.
    segments: head: rows of (subtask, first frame, last frame).
    """
    left, width, bar, n = 64, 1280, 30, len(images)
    tile = (width - left) // n
    width, height = left + n * tile, round(tile * images.shape[1] / images.shape[2])
    texts = [title, *segments, *(row[0] for rows in segments.values() for row in rows)]
    top, font = 30, _font(texts, 15)

    def x_of(frame: float) -> float:
        return left + frame / length * n * tile

    def colour_of(head: str, subtask: str) -> str:
        known = subtask in names[head]  # a correction may name what the vocabulary has no more
        return STAGE_COLOURS[names[head].index(subtask) % len(STAGE_COLOURS)] if known else "#777777"

    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    fitting = {
        (head, row): _fitting(row[0], measure, font, x_of(row[2] + 1) - x_of(row[1]) - 8)
        for head, rows in segments.items()
        for row in map(tuple, rows)
    }
    whole = {(head, row[0]) for (head, row), text in fitting.items() if text == row[0]}
    cut_off = {
        head: dict.fromkeys(row[0] for row in segments[head] if (head, row[0]) not in whole) for head in segments
    }
    legend, lines = _legend(cut_off, measure, font, left, width)
    axis = top + height + 8 + len(segments) * (bar + 6) + 46
    page = Image.new("RGB", (width, axis + 22 * len(lines)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((4, 5), title, fill="black", font=_font(texts, 18))
    for i, image in enumerate(images):
        page.paste(Image.fromarray(image).resize((tile - 2, height), Image.Resampling.LANCZOS), (left + i * tile, top))

    def cut(x: float, y0: float, y1: float) -> None:
        """A boundary: black between white, for white alone is the gap between two pictures."""
        draw.line((x, y0, x, y1), fill="white", width=6)
        draw.line((x, y0, x, y1), fill="black", width=2)

    y = top + height + 8
    for head, rows in segments.items():
        draw.text((4, y + 6), head, fill="black", font=font)
        draw.rectangle((left, y, width - 1, y + bar), fill="#DDDDDD")  # seen where no segment is
        for subtask, start, end in rows:
            colour, x0, x1 = colour_of(head, subtask), x_of(start), x_of(end + 1)
            draw.rectangle((x0, y, max(x0, x1 - 1), y + bar), fill=colour)  # a short one of a long episode: a line
            if start:
                cut(x0, y, y + bar)
            if start and head == list(segments)[-1]:  # its boundaries also cut the pictures
                cut(x0, top, top + height)
            draw.text((x0 + 5, y + 6), fitting[head, (subtask, start, end)], fill=_readable_on(colour), font=font)
        y += bar + 6
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600) if length / fps / s <= 14)
    for i in range(int(length / fps / step) + 1):
        x = x_of(i * step * fps)
        draw.line((x, y, x, y + 5), fill="#888888")
        draw.text((min(x, width - 50), y + 6), f"{i * step:g} s", fill="#444444", font=font)
    for line, head in enumerate(lines):
        draw.text((4, axis + 22 * line), head, fill="black", font=font)
    for (head, subtask), (x, line) in legend.items():
        y = axis + 22 * line
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=colour_of(head, subtask))
        draw.text((x + 19, y), subtask, fill="black", font=font)
    return page


def _legend(
    names: dict[str, Iterable[str]], draw: ImageDraw.ImageDraw, font, left: int, width: int
) -> tuple[dict[tuple[str, str], tuple[float, int]], list[str]]:
    """Where names stand, by head and name: x and line; and the head of each line."""
    places, lines = {}, []
    for head, subtasks in names.items():
        x = width  # a head begins on a line of its own
        for subtask in subtasks:
            wide = 34 + draw.textlength(subtask, font)
            if x + wide > width:
                x = left
                lines.append(head)
            places[head, subtask] = x, len(lines) - 1
            x += wide
    return places, lines


def middles(length: int, n: int) -> list[int]:
    """Frames in the middle of n equal stretches of an episode."""
    return [int((i + 0.5) * length / n) for i in range(n)]


def contact_sheet(images: np.ndarray, columns: int = 15, width: int = 1500) -> Image.Image:
    """Every frame (n, H, W, 3) with its number: what a person looks at to mark an episode."""
    tile = width // columns
    height = round(tile * images.shape[1] / images.shape[2])
    rows, font = -(-len(images) // columns), ImageFont.load_default(size=14)
    page = Image.new("RGB", (columns * tile, rows * (height + 16)), "white")
    draw = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        x, y = i % columns * tile, i // columns * (height + 16)
        draw.text((x + 2, y), str(i), fill="black", font=font)
        page.paste(Image.fromarray(image).resize((tile - 2, height), Image.Resampling.LANCZOS), (x, y + 16))
    return page


def confusion(table: pd.DataFrame, title: str, rows: str = "reference", columns: str = "annotation") -> alt.LayerChart:
    """Shares of a reference's frames (rows) by what the other says (columns); both named by any text."""
    cells = table.rename_axis("row").reset_index().melt("row", var_name="column", value_name="share")
    order = list(table.index)
    base = alt.Chart(cells, title=title).encode(
        x=alt.X("column:N", title=columns, sort=order, axis=alt.Axis(labelAngle=-20, labelLimit=220)),
        y=alt.Y("row:N", title=rows, sort=order, axis=alt.Axis(labelLimit=220)),
    )
    scale = alt.Scale(domain=[0, 1], range=["#FFFFFF", PREDICTED], interpolate="rgb")
    fill = base.mark_rect(stroke="#EEEEEE").encode(color=alt.Color("share:Q", scale=scale, legend=None))
    dark = alt.condition("datum.share > 0.5", alt.value("white"), alt.value("black"))
    text = base.mark_text(fontSize=12).encode(text=alt.Text("share:Q", format=".2f"), color=dark)
    return (fill + text).properties(width=90 * len(order), height=34 * len(order))


def shares(table: pd.DataFrame, group: str, value: str, title: str) -> alt.LayerChart:
    """A share in [0, 1] by group."""
    base = alt.Chart(table, title=title).encode(y=alt.Y(f"{group}:N", title=None, sort=list(table[group])))
    x = alt.X(f"{value}:Q", scale=alt.Scale(domain=[0, 1]), title=value.replace("_", " "))
    text = base.mark_text(align="left", dx=4).encode(x=x, text=alt.Text(f"{value}:Q", format=".3f"))
    return (base.mark_bar(color=PREDICTED).encode(x=x) + text).properties(width=WIDTH, height=24 * len(table))


def _readable_on(colour: str) -> str:
    """Dark or light letters, whichever have more contrast (WCAG's, to which this luminance is near); as in the scrubber."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in ImageColor.getrgb(colour))
    return "#111111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.19 else "#FFFFFF"


def _fitting(text: str, draw: ImageDraw.ImageDraw, font, width: float) -> str:
    """As much of a text as fits into a width; nothing where not even a few letters do."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…" if len(text) > 3 else ""


def boundary_errors(errors: dict[str, list[float]], limit: int, title: str) -> alt.FacetChart:
    """How far boundaries lie from those of each reference, in frames; what is `limit` away or farther was missed."""
    rows = []
    for name, values in errors.items():
        counts = np.bincount(np.minimum(np.round(values), limit).astype(int), minlength=limit + 1)
        for i, n in enumerate(counts.tolist()):
            found = "missed" if i == limit else "found"
            row = {"reference": name, "low": i - 0.5, "high": i + 0.5, "share": n / len(values), "is": found}
            rows += [row] if n else []
    scale = alt.Scale(domain=[-0.5, limit + 0.5], nice=False)
    places = [*range(0, limit - limit // 8, max(1, limit // 8)), limit]
    axis = alt.Axis(values=places, labelExpr=f"datum.value == {limit} ? '{limit} or more' : datum.value")
    bars = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar()
        .encode(
            x=alt.X("low:Q", bin="binned", title="frames off", scale=scale, axis=axis),
            x2="high:Q",
            y=alt.Y("share:Q", title="share", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=3)),
            color=alt.Color("is:N", scale=alt.Scale(domain=["found", "missed"], range=[PREDICTED, ACCENT]), title=None),
        )
        .properties(width=WIDTH, height=HEIGHT // 4)
    )
    header = alt.Header(title=None, labelAnchor="start", labelOrient="top")
    return bars.facet(row=alt.Row("reference:N", sort=list(errors), header=header), title=title)
