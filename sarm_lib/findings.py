"""What a figure shows, said in a sentence by the numbers it was drawn from."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import Markdown

from sarm_lib.statistics import roc_auc, wilson

ALIKE = 0.02  # shares of frames that are nearer to each other rank no stage above another
FEW = 5  # rollouts of one outcome, or episodes: with fewer, how well one is told from another is not known


def say(*sentences: str) -> Markdown:
    """Findings as a notebook shows them: set off from what is printed on the way, a line each."""
    return Markdown("\n".join(f"> {line}  " for sentence in sentences for line in sentence.splitlines() if line))


def confused(shares: pd.DataFrame) -> str:
    """Of shares of frames by stage (rows) and by what was said (columns): the hardest stage, those that are as hard within
    `ALIKE`, and what it is taken for."""
    own = pd.Series({name: shares.loc[name, name] for name in shares.index if shares.loc[name].sum() > 0})
    if own.empty:
        return "no frames to tell stages by"
    if own.min() == 1:
        return "no frame of any stage is taken for another"
    hardest = own.idxmin()
    others = shares.loc[hardest].drop(hardest)
    said = f"hardest: {hardest!r}, {own[hardest]:.0%} of its frames recognised"
    if len(others) and others.max() > 0:
        said += f", {others.max():.0%} taken for {others.idxmax()!r}"
    alike = [f"{n!r} ({share:.0%})" for n, share in own.drop(hardest).items() if share - own[hardest] < ALIKE]
    said += f"; as hard: {', '.join(alike)}" if alike else ""
    apart = own.max() - own[hardest] >= ALIKE
    return said + (f"; easiest: {own.idxmax()!r} ({own.max():.0%})" if apart else "")


def extremes(values: Mapping[str, float] | pd.Series, what: str, digits: int = 3) -> str:
    """The highest and the lowest of named values."""
    values = pd.Series(values, dtype=float).dropna()
    if values.empty:
        return f"no {what} to compare"
    ends = [
        f"{word} {what}: {name} ({values[name]:.{digits}f})"
        for word, name in (("highest", values.idxmax()), ("lowest", values.idxmin()))
    ]
    return "; ".join(ends if len(values) > 1 else [f"{what}: {values.index[0]} ({values.iloc[0]:.{digits}f})"])


def two_measures(by_target: Mapping[str, float], by_truth: Mapping[str, float], measure: str) -> str:
    """Where the error by kind is largest, against the target and against the truth: two questions, two answers."""
    if measure != "mse_truth" or not len(by_truth):
        return ""
    target, truth = pd.Series(by_target).idxmax(), pd.Series(by_truth).idxmax()
    if target == truth:
        return f"{truth} is the hardest kind against the target too"
    return f"against the target {target} was the hardest: a target says what the annotations say, and the truth what the scene shows"


def ends(progress: Mapping[int, np.ndarray], succeeded: Sequence[bool], fall: float = 0.05) -> str:
    """Of φ (T,) by episode, and whether each succeeded: whether it arrives, and whether it falls on the last frames."""
    last = pd.Series({episode: phi[-1] for episode, phi in progress.items()})
    done, failed = last[np.array(succeeded)], last[~np.array(succeeded)]
    if done.empty:
        return "no episode succeeds: where progress ends says nothing"
    falls = sum(progress[episode].max() - end > fall for episode, end in done.items())
    said = f"the {len(done)} episodes that succeed end at {done.mean():.3f} (the lowest, {done.idxmin()}, at {done.min():.3f}), {falls} of them after a fall of more than {fall:g}"
    if failed.empty:
        return said
    said += (
        f"; the {len(failed)} that fail at {failed.mean():.3f} (the highest, {failed.idxmax()}, at {failed.max():.3f}"
    )
    return said + (", as high as a success)" if failed.max() >= done.min() else ")")


def worth(differences: pd.DataFrame, measure: str, row: str = "sarm") -> str:
    """Of a table of `scorecard.differences` in an error: which rows have more of it than `row`, which less, and which cannot
    be told from it."""
    others = differences.drop(row)
    if others.empty:
        return f"there is no row to hold against `{row}`"
    worse, better = others.query("low > 0").sort_values("difference", ascending=False), others.query("high < 0")
    alike = others.drop([*worse.index, *better.index])
    listed = lambda rows: ", ".join(f"`{name}` {gap:+.4f}" for name, gap in rows.difference.items()) or "none"  # noqa: E731
    return (
        f"worse than `{row}` by `{measure}`, beyond chance over the same episodes, the most first: {listed(worse)}; better: "
        f"{listed(better)}; not told apart: {listed(alike)}"
    )


def comparable(rows: Mapping, row: Mapping) -> str:
    """Of what rows of ablations and the row `sarm` were made from: whether they differ in more than each row's part."""
    if not rows:
        return "the rows that change a part of SARM are not there for this dataset: `make scorecard`"
    if not row:
        return (
            "`sarm` is a model that does not say what it was trained on: what differs from the rows below is not known"
        )
    words = {
        "labels": "annotations",
        "settings": "sarm settings",
        "image_keys": "cameras",
        "seed": "seed",
        "code": "code",
    }
    other = [word for key, word in words.items() if key in rows and rows[key] != row.get(key)]
    return f"`sarm` was trained with other {', '.join(other)} than the rows below: `make scorecard`" if other else ""


def reference(best: tuple[str, str] | None, itself: bool) -> str:
    """Which (head, name) an annotation is compared with; `itself`: it is the same annotator's, by another seed."""
    if best is None:
        return "there is nothing to compare with"
    said = f"compared with {best[1]} ({best[0]})"
    return (
        f"{said}: the annotator itself, so that agreement says nothing of being right. Mark validation episodes"
        if itself
        else said
    )


def suspicion(found: Mapping[str, float] | None) -> str:
    """Of `agreement.found_early`: may one rely on suspicion?"""
    if found is None:
        return "there is nothing to compare with, or nothing wrong"
    if found["of"] < FEW:
        return f"{found['of']} of the episodes can be compared: too few to say"
    looked = found["episodes"] / found["of"]
    helps = (
        "look at the suspicious first"
        if found["errors"] >= 2 * looked
        else "too few to rely on: look by kind of episode"
    )
    held = (
        f"the {found['episodes']} most suspicious of {found['of']} episodes ({looked:.0%}) hold {found['errors']:.0%}"
    )
    return f"{held} of the frames that are wrong: {helps}"


def soft_weights(weight: np.ndarray) -> str:
    """Where the weights (N,) of frames that are neither dropped nor counted in full lie."""
    soft = weight[(weight > 0) & (weight < 1)]
    if not len(soft):
        return "no weight lies between 0 and 1"
    return (
        f"those between have weights from {soft.min():.2f} to {soft.max():.2f}; the mean of all is {weight.mean():.2f}"
    )


def detection(row: Mapping[str, float]) -> str:
    """Of a row of `diagnosis.detection`: what the weights do to bad frames, and what they let through."""
    if not row["bad"]:
        return "the simulator calls no frame bad"
    zero = f"weight 0 falls on {row['zero_recall']:.0%} of the bad ones and, recovering frames aside, is right in {row['zero_precision']:.0%}"
    if row["zero_recall"] and not np.isnan(row["zero_recovering"]):
        zero += f"; it falls on {row['zero_recovering']:.0%} of the recovering ones too"
    return (
        f"the simulator calls {row['bad'] / row['frames']:.0%} of these frames bad: their mean weight is {row['weight_bad']:.2f}, that "
        f"of productive ones {row['weight_productive']:.2f}; {zero if row['zero_recall'] else 'weight 0 falls on none of the bad ones'}"
    )


def final_progress(final: np.ndarray, succeeded: np.ndarray, high: float = 0.9) -> str:
    """Of the last φ (n,) of rollouts and whether they succeeded (n,): does the reward model tell them apart?"""
    failed, looks = int((~succeeded).sum()), int((final[~succeeded] > high).sum())
    said = []
    if succeeded.all() or not succeeded.any():
        said.append(f"all {len(final)} rollouts ended alike: there is nothing to tell apart")
    else:
        few = ": too few of one kind to rely on" if min(succeeded.sum(), failed) < FEW else ""
        said.append(
            f"final progress against true success: ROC area {roc_auc(final, succeeded):.3f} ({succeeded.sum()} succeeded, {failed} failed{few})"
        )
    if failed:
        low, above = wilson(looks, failed)
        said.append(
            f"{looks} of {failed} failures end above {high} ({looks / failed:.0%}, 95 % interval {low:.0%} to {above:.0%})"
            + (": a high φ of a policy is no sign of success here" if low > 0.1 else "")
        )
    return "\n".join(said)


def weighting(kappa: float, rule: float | str, mean_weight: float) -> str:
    """Which κ was chosen, by what, and what it does to the weight of the training frames."""
    healthy = "healthy" if 0.3 <= mean_weight <= 0.8 else "outside the healthy 0.3 to 0.8"
    how = f"by the rule `{rule}`" if isinstance(rule, str) else "as `rabc.kappa` says"
    said = f"κ = {kappa:.3g}, {how}: a frame that gains more in Δ frames counts in full; the mean weight is {mean_weight:.2f}, {healthy}"
    if isinstance(rule, str) and rule.startswith("mean_weight=") and abs(float(rule[12:]) - mean_weight) > 0.02:
        said += "; no κ gives the one that was asked for, and this is the nearest"
    return said


def reach(delta_frames: int, most: float, least: float, light: float) -> str:
    """Which mean weights κ can give with a Δ: `most` at κ = 0, `least` where nothing exceeds it; light: the κ nearest to 0.3."""
    said = f"with Δ = {delta_frames}, κ moves the mean weight between {most:.2f} (κ = 0) and {least:.2f}"
    return f"{said}: below the healthy 0.3 from κ = {light:.2f} on" if least < 0.3 < most else said


def kappas(table: pd.DataFrame, alike: float = 0.01) -> str:
    """Of a table of `diagnosis.kappa_table`: what the chosen κ does to bad stretches, and which least κ does the same."""
    chosen = table[table.index.str.endswith("(in use)")].iloc[0]
    if not chosen["in bad stretches"] >= 0:
        return "no robot stands still or goes back for long: κ has nothing to tell apart"
    same = table[table["in bad stretches"] <= chosen["in bad stretches"] + alike]
    least, most = same.loc[same["κ"].idxmin()], table.loc[table["κ"].idxmin()]
    said = f"the chosen κ = {chosen['κ']:.3g} leaves frames in bad stretches {chosen['in bad stretches']:.2f} and others {chosen['elsewhere']:.2f}"
    if least["κ"] < chosen["κ"]:
        said += (
            f"; of those listed, κ = {least['κ']:.3g} filters as much and leaves the others {least['elsewhere']:.2f}"
        )
    return said + f"; at κ = {most['κ']:.3g} bad stretches keep {most['in bad stretches']:.2f}"


def by_hand(ours: np.ndarray, theirs: np.ndarray, what: str) -> str:
    """Of values (n,) by the equation, written out, and by the library: whether they are the same."""
    if not len(ours):
        return f"no {what} to compute"
    known = np.isfinite(ours)  # LeRobot's file may say nothing of a frame
    if not known.any():
        return f"no {what} to compute"
    off = float(np.abs(ours - theirs)[known].max())
    same = "the same" if off < 1e-5 else f"up to {off:.2g} apart"
    return f"{int(known.sum())} {what} by the equation and by the library: {same}"


def change(first: np.ndarray, last: np.ndarray, threshold: int = 40) -> str:
    """Of the first and last pictures (n, H, W, 3) of episodes: how much of them a task changes."""
    moved = (np.abs(first.astype(int) - last.astype(int)).max(axis=-1) > threshold).mean(axis=(1, 2))
    return f"between the first frame and the last, {moved.min():.0%} to {moved.max():.0%} of the pixels change"


def suspects(why: Iterable[tuple[int, str]]) -> str:
    """The shown annotations, a line each, and what is suspicious about them."""
    return (
        "\n".join(f"episode {episode}: {reason or 'nothing suspicious'}" for episode, reason in why)
        or "no annotation to look at"
    )


def outcomes(shown: Mapping[str, Sequence[bool]], every: Mapping[str, Sequence[bool]]) -> str:
    """Of the rollouts of each policy that are shown, and of all: how many succeed."""
    lines = [
        f"{arm}: {sum(shown[arm])} of the {len(shown[arm])} shown succeed, {sum(ended)} of all {len(ended)}"
        for arm, ended in every.items()
        if ended
    ]
    return "\n".join(lines) or "no rollouts"


def gains(table: pd.DataFrame, verb: str) -> str:
    """Of a table of `diagnosis.extremes`: what the first frames gain or lose."""
    if table.empty:
        return f"no frame {verb}"
    episode, frame, later = (int(table[column].iloc[0]) for column in ("episode", "frame", "later"))
    size = table.delta.abs()
    return f"episode {episode} {verb} most, {size.iloc[0]:.2f} from frame {frame} to {later}; the others here {size.min():.2f} at least"


def still_falling(steps: Sequence[int], errors: Sequence[float]) -> str:
    """Of validation errors in the order of the steps: whether the last one is the lowest, and what it gained."""
    steps, errors = list(steps), list(errors)
    if len(errors) < 2 or errors[-1] > min(errors):
        return ""
    return (
        f"it still falls at the end: by {1 - errors[-1] / errors[-2]:.0%} in the last {steps[-1] - steps[-2]:.0f} steps"
    )


def still_learning(curves: Mapping[str, Sequence[float]]) -> str:
    """Of each arm's training losses in the order of the steps: by how much the last tenth of them lies below the tenth
    before."""
    said = []
    for arm, values in curves.items():
        tenth = max(1, len(values) // 10)
        before, last = np.mean(values[-2 * tenth : -tenth] or values[:1]), np.mean(values[-tenth:])
        said.append(f"{last / before - 1:+.0%} for `{arm}`")
    return f"from the last but one tenth of the steps to the last, training loss changed by {', '.join(said)}"


def best_of(agreement: Mapping[str, Mapping[str, float]], head: str) -> str:
    """Of how annotators (by name) agree with a person's marks: whom to take."""
    if not agreement:
        return f"no validation episode is marked: nobody can say whose {head} annotations are better"
    shares = pd.Series(
        {n: figures["frame_agreement"] for n, figures in agreement.items() if "frame_agreement" in figures}
    )
    if shares.empty:
        return f"no marked validation episode was annotated: nobody can say whose {head} annotations are better"
    said = ", ".join(f"`{name}` in {share:.0%}" for name, share in shares.sort_values(ascending=False).items())
    best = f": take `{shares.idxmax()}`" if len(shares) > 1 else ""
    return f"of the {head} frames that a person marked, annotators agree: {said}{best}"


def losses(validation: Mapping[str, float]) -> str:
    """Which policy has the lower validation loss; it may well be the one that does worse."""
    bc, ours = validation["bc"], validation["rabc"]
    lower = "`bc`" if bc < ours else "`rabc`"
    said = f"{lower} has the lower loss on validation episodes ({bc:.4f} for `bc`, {ours:.4f} for `rabc`)"
    return said + (
        ", as one would expect: they have bad frames too, which `rabc` was told not to imitate" if bc < ours else ""
    )


def experiment(table: pd.DataFrame | None) -> str:
    """Did RA-BC help? Of a table of `evaluate.experiment`, a row an arm."""
    if table is None or not {"bc", "rabc"} <= set(table.index):
        return "Did RA-BC help? The controlled experiment was not run on this dataset, so nothing here can say"
    bc, ours = table.loc["bc"], table.loc["rabc"]
    if pd.isna(ours["over bc"]):
        return "Did RA-BC help? The experiment's arms were trained by different code, so nothing here can say"
    helped = "yes" if ours["low"] > 0 else "no, it harmed" if ours["high"] < 0 else "that is not settled"
    said = [
        f"Did RA-BC help? In the experiment, {helped}: it succeeds in {ours['success rate']:.0%} of the rollouts, plain BC in "
        f"{bc['success rate']:.0%} ({ours['over bc']:+.2f}, 95 % interval {ours['low']:+.2f} to {ours['high']:+.2f}; {ours['seeds']:.0f} training seeds)"
    ]
    if "shuffled" in table.index:
        shuffled = table.loc["shuffled"]
        same = shuffled["weights"] == ours["weights"] != ""
        which = "The same weights" if same else "Weights of another reward model"
        matters = ", so it matters which frames they fall on" if shuffled["high"] < ours["low"] else ""
        said.append(f"{which}, shuffled among the frames: {shuffled['success rate']:.0%}{matters}")
    if "oracle" in table.index:
        said.append(f"Weights from the simulator's own labels: {table.loc['oracle', 'success rate']:.0%}")
    named = {"success_filter": "all of these", "duration_filter": "the faster half of these"}
    if filters := {arm: table.loc[arm, "success rate"] for arm in named if arm in table.index}:
        rates = ", ".join(f"{named[arm]} {rate:.0%}" for arm, rate in filters.items())
        enough = ""
        if over := table.attrs.get("over_filter"):
            low, high = over["difference_low"], over["difference_high"]
            enough = f"; RA-BC lies {over['difference']:+.2f} over that, 95 % interval {low:+.2f} to {high:+.2f}"
            enough += ": a plain filter does as well here" if low <= 0 else ""
        said.append(f"Without weights, for who knows which episodes succeeded: {rates}{enough}")
    if apart := [f"`{arm}`" for arm in table.index if arm != "bc" and pd.isna(table.loc[arm, "over bc"])]:
        said.append(f"Trained by other code than plain BC, and so not compared with it: {', '.join(apart)}")
    if (table.seeds == 1).any():
        lone = ", ".join(f"`{arm}`" for arm in table.index[table.seeds == 1])
        said.append(f"One training seed, whose luck no interval knows: {lone}")
    return "\n".join(said)
