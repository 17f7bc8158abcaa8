"""The project's pictures: Altair charts in one visual language, and strips of frames.

A stage has the same colour wherever it appears (Okabe and Ito's palette, safe for colour-blind readers). Charts come out
as PNG, which works without a network in Lab, in reports and on GitHub.
"""

import io

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from PIL import Image, ImageDraw, ImageFont

STAGE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
PREDICTED, TARGET, ACCENT = "#0072B2", "#7F7F7F", "#D55E00"
WIDTH, HEIGHT = 640, 220


def setup() -> None:
    """Call once in a notebook: static pictures, twice the resolution."""
    alt.renderers.enable("png", scale_factor=2)
    alt.theme.enable("sarm")
    pd.set_option("display.max_colwidth", None)


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


def episode_lengths(table: pd.DataFrame) -> alt.Chart:
    """Histogram of `seconds` by `split`."""
    return (
        alt.Chart(table, title="Episode lengths")
        .mark_bar()
        .encode(
            x=alt.X("seconds:Q", bin=alt.Bin(maxbins=30), title="length (s)"),
            y=alt.Y("count():Q", title="episodes"),
            color=alt.Color("split:N", scale=stage_scale(["train", "val", "test"])),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def timeline(segments: list[tuple[str, str, int, int]], names: list[str], fps: int, title: str) -> alt.Chart:
    """Subtasks of one episode as bars: rows (head, subtask, first frame, last frame)."""
    table = pd.DataFrame(segments, columns=["head", "subtask", "start", "end"])
    table["start"], table["end"] = table.start / fps, (table.end + 1) / fps
    return (
        alt.Chart(table, title=title)
        .mark_bar(cornerRadius=3)
        .encode(
            x=alt.X("start:Q", title="time (s)"),
            x2="end:Q",
            y=alt.Y("head:N", title=None, sort=["sparse", "dense"]),
            color=alt.Color("subtask:N", scale=stage_scale(names), title=None),
        )
        .properties(width=WIDTH, height=30 * table["head"].nunique())
    )


def learning_curve(curve: pd.DataFrame, columns: list[str], title: str) -> alt.Chart:
    """`columns` of a learning curve over `step`, on a logarithmic scale."""
    table = curve.melt("step", columns, var_name="curve", value_name="value")
    return (
        alt.Chart(table, title=title)
        .mark_line(point=len(curve) < 40)
        .encode(
            x=alt.X("step:Q"),
            y=alt.Y("value:Q", scale=alt.Scale(type="log"), title="loss"),
            color=alt.Color("curve:N", scale=stage_scale(columns), title=None),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def progress(predicted: np.ndarray, target: np.ndarray | None, fps: int, title: str) -> alt.Chart:
    """Predicted progress (T,) of an episode over the target's."""
    time = np.arange(len(predicted)) / fps
    curves = {"predicted": predicted} | ({} if target is None else {"target": target})
    table = pd.concat([pd.DataFrame({"time": time, "progress": v, "curve": name}) for name, v in curves.items()])
    return (
        alt.Chart(table, title=title)
        .mark_line()
        .encode(
            x=alt.X("time:Q", title="time (s)", scale=alt.Scale(nice=False)),
            y=alt.Y("progress:Q", title="progress φ", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color(
                "curve:N", scale=alt.Scale(domain=["predicted", "target"], range=[PREDICTED, TARGET]), title=None
            ),
            strokeDash=alt.StrokeDash(
                "curve:N", scale=alt.Scale(domain=["predicted", "target"], range=[[1, 0], [5, 4]]), legend=None
            ),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def episode(
    images: np.ndarray,
    labels: list[str],
    predicted: np.ndarray,
    target: np.ndarray | None,
    probabilities: np.ndarray,
    names: list[str],
    fps: int,
    title: str,
) -> Image.Image:
    """Frames of an episode over its progress and its stage probabilities, as one picture."""
    parts = [progress(predicted, target, fps, title), stage_probabilities(probabilities, names, fps)]
    chart = alt.vconcat(*parts).resolve_scale(color="independent", x="shared")
    curves = Image.open(io.BytesIO(vl_convert.vegalite_to_png(chart.to_json(), scale=2))).convert("RGB")
    strip = filmstrip(images, labels, width=curves.width)
    page = Image.new("RGB", (curves.width, strip.height + curves.height), "white")
    page.paste(strip, (0, 0))
    page.paste(curves, (0, strip.height))
    return page


def stage_probabilities(probabilities: np.ndarray, names: list[str], fps: int) -> alt.Chart:
    """Stacked stage probabilities (T, K) over time."""
    table = pd.DataFrame(probabilities, columns=names).assign(time=np.arange(len(probabilities)) / fps)
    table = table.melt("time", var_name="stage", value_name="probability")
    table["order"] = table.stage.map({name: k for k, name in enumerate(names)})
    return (
        alt.Chart(table)
        .mark_area()
        .encode(
            x=alt.X("time:Q", title="time (s)", scale=alt.Scale(nice=False)),
            y=alt.Y("probability:Q", stack="normalize", title="stage probability"),
            color=alt.Color("stage:N", scale=stage_scale(names), title=None),
            order="order:Q",
        )
        .properties(width=WIDTH, height=HEIGHT // 3)
    )


WEIGHT_KINDS = ("weight 0", "soft weight", "weight 1")


def delta_bins(delta: np.ndarray, weight: np.ndarray) -> pd.DataFrame:
    """Frames counted by progress delta r and the kind of weight they get: `low`, `high`, `frames`, `kind`."""
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
    label = alt.Chart(pd.DataFrame({"kappa": [kappa], "text": [f"κ = {kappa:g}"]})).mark_text(
        align="left", dx=4, dy=-4, baseline="top"
    )
    return (bars + rule + label.encode(x="kappa:Q", y=alt.value(10), text="text:N")).properties(
        width=WIDTH, height=HEIGHT
    )


def weights_over_time(progress_of: np.ndarray, weight: np.ndarray, fps: int, title: str) -> alt.LayerChart:
    """Progress of an episode with every frame coloured by its weight."""
    table = pd.DataFrame({"time": np.arange(len(weight)) / fps, "progress": progress_of, "weight": weight})
    base = alt.Chart(table, title=title).encode(x=alt.X("time:Q", title="time (s)", scale=alt.Scale(nice=False)))
    y = alt.Y("progress:Q", title="progress φ", scale=alt.Scale(domain=[0, 1]))
    line = base.mark_line(color="#BBBBBB").encode(y=y)
    scale = alt.Scale(domain=[0, 0.5, 1], range=[ACCENT, "#C9C9C9", PREDICTED])
    dots = base.mark_circle(size=45, opacity=1).encode(y=y, color=alt.Color("weight:Q", scale=scale))
    return (line + dots).properties(width=WIDTH, height=HEIGHT)


def scorecard(kinds: dict[str, dict[str, float]], metric: str, title: str) -> alt.LayerChart:
    """One metric by kind, with its interval."""
    table = pd.DataFrame(
        [
            {"kind": k, "value": v[metric], "low": v[f"{metric}_low"], "high": v[f"{metric}_high"]}
            for k, v in kinds.items()
        ]
    )
    base = alt.Chart(table, title=title).encode(y=alt.Y("kind:N", title=None, sort=list(kinds)))
    domain = alt.Scale(zero=False, nice=True)
    bars = base.mark_rule(strokeWidth=2, color=TARGET).encode(x=alt.X("low:Q", title=metric, scale=domain), x2="high:Q")
    return (
        bars
        + base.mark_point(filled=True, size=70, color=PREDICTED, opacity=1).encode(x=alt.X("value:Q", scale=domain))
    ).properties(width=WIDTH, height=26 * len(table))


def policy_curve(curve: pd.DataFrame) -> alt.Chart:
    """Training loss over `step` by `arm`."""
    arms = list(dict.fromkeys(curve.arm))
    return (
        alt.Chart(curve, title="Training loss of both policies")
        .mark_line()
        .encode(
            x="step:Q",
            y=alt.Y("loss:Q", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "arm:N",
                scale=alt.Scale(domain=arms, range=[TARGET, PREDICTED, *STAGE_COLOURS][: len(arms)]),
                title=None,
            ),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def filmstrip(images: np.ndarray, labels: list[str], width: int = 1280) -> Image.Image:
    """Frames (n, H, W, 3) uint8 side by side, each with a label under it."""
    n, height, frame_width = images.shape[:3]
    scale = min(width / (n * frame_width), 2.0)
    size = (round(frame_width * scale), round(height * scale))
    strip = Image.new("RGB", (n * size[0], size[1] + 26), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=18)  # knows no Greek
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        strip.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (i * size[0], 0))
        draw.text((i * size[0] + 4, size[1] + 3), label, fill="black", font=font)
    return strip
