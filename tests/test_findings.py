"""Sentences under figures, against tables in which the answer is plain to see."""

import numpy as np
import pandas as pd

from sarm_lib import findings


def test_the_hardest_stage_and_what_it_is_taken_for():
    names = ["reach", "grasp", "lift"]
    shares = pd.DataFrame([[0.9, 0.1, 0.0], [0.05, 0.6, 0.35], [0.0, 0.0, 1.0]], index=names, columns=names)
    assert (
        findings.confused(shares)
        == "hardest: 'grasp', 60% of its frames recognised, 35% taken for 'lift'; easiest: 'lift' (100%)"
    )
    shares.loc["reach"] = 0.0  # no frame of it: nothing to recognise
    assert findings.confused(shares).startswith("hardest: 'grasp'")
    level = pd.DataFrame([[0.93, 0.07], [0.06, 0.94]], index=names[:2], columns=names[:2])
    assert findings.confused(level).endswith("taken for 'grasp'; as hard: 'grasp' (94%)")
    shares.loc["lift"] = [0.0, 0.39, 0.61]
    assert "35% taken for 'lift'; as hard: 'lift' (61%)" in findings.confused(shares)
    assert findings.confused(shares * 0) == "no frames to tell stages by"
    assert findings.confused(pd.DataFrame([[1.0]], ["task"], ["task"])) == "no frame of any stage is taken for another"


def test_highest_and_lowest_of_named_values():
    values = {"clean": 0.01, "failed": 0.2, "unknown": float("nan")}
    assert findings.extremes(values, "error") == "highest error: failed (0.200); lowest error: clean (0.010)"
    assert findings.extremes({"a": 1.0}, "error", 1) == "error: a (1.0)"
    assert findings.extremes({}, "error") == "no error to compare"


def test_agreement_with_itself_is_no_reference():
    assert "nothing to compare" in findings.reference(None, False)
    assert findings.reference(("dense", "marks (val)"), False) == "compared with marks (val) (dense)"
    assert "says nothing of being right" in findings.reference(("dense", "propagate-seed-1"), True)


def test_suspicion_that_finds_nothing_says_so():
    few, many = ({"episodes": 6, "of": 60, "errors": share} for share in (0.12, 0.5))
    assert "hold 12% of the frames" in findings.suspicion(few) and "look by kind" in findings.suspicion(few)
    assert "(10%) hold 50%" in findings.suspicion(many) and "suspicious first" in findings.suspicion(many)
    assert "nothing to compare" in findings.suspicion(None)
    assert "too few to say" in findings.suspicion({"episodes": 1, "of": 2, "errors": 1.0})


def test_soft_weights_are_those_between():
    assert findings.soft_weights(np.array([0, 0.25, 0.5, 1, 1])).startswith(
        "those between have weights from 0.25 to 0.50"
    )
    assert findings.soft_weights(np.array([0.0, 1.0])) == "no weight lies between 0 and 1"


def test_what_weights_do_to_bad_frames():
    row = {
        "frames": 200,
        "bad": 50,
        "weight_bad": 0.3,
        "weight_productive": 0.9,
        "zero_recall": 0.2,
        "zero_precision": 0.95,
        "zero_recovering": 0.1,
    }
    said = findings.detection(row)
    assert "25% of these frames bad" in said and "0.30" in said and "20% of the bad" in said and "right in 95%" in said
    assert said.endswith("it falls on 10% of the recovering ones too")
    none = findings.detection(
        row | {"zero_recall": 0.0, "zero_precision": float("nan"), "zero_recovering": float("nan")}
    )
    assert none.endswith("weight 0 falls on none of the bad ones")
    assert findings.detection(row | {"bad": 0}) == "the simulator calls no frame bad"


def test_final_progress_counts_the_failures_that_look_like_successes():
    final, succeeded = np.array([1.0, 0.95, 0.2, 0.1]), np.array([True, False, False, False])
    said = findings.final_progress(final, succeeded)
    assert "ROC area 1.000 (1 succeeded, 3 failed: too few of one kind" in said and "no sign" not in said
    assert "1 of 3 failures end above 0.9 (33%, 95 % interval 6% to 79%)" in said
    many = findings.final_progress(np.tile(final, 20), np.tile(succeeded, 20))
    assert "too few" not in many and "20 of 60" in many and "no sign of success" in many
    assert "ended alike" in findings.final_progress(final, succeeded & False)
    assert "failures" not in findings.final_progress(final, succeeded | True)


def test_findings_are_set_off_a_line_each():
    assert findings.say("a", "", "b\nc").data == "> a  \n> b  \n> c  "


def test_values_by_hand_and_by_the_library():
    ours = np.array([0.1, 0.2])
    assert findings.by_hand(ours, ours + 1e-7, "weights") == "2 weights by the equation and by the library: the same"
    assert findings.by_hand(ours, ours + 0.5, "weights").endswith("up to 0.5 apart")
    assert findings.by_hand(ours[:0], ours[:0], "weights") == "no weights to compute"


def test_the_experiment_says_whether_it_helped():
    rows = {
        "bc": [0.24, np.nan, np.nan, np.nan],
        "rabc": [0.52, 0.28, 0.19, 0.37],
        "oracle": [0.67, 0.43, 0.3, 0.5],
        "shuffled": [0.19, -0.05, -0.1, 0.0],
    }
    table = pd.DataFrame(rows, index=["success rate", "over bc", "low", "high"]).T.assign(seeds=5, weights="")
    said = findings.experiment(table)
    assert "yes: it succeeds in 52% of the rollouts, plain BC in 24% (+0.28, 95 % interval +0.19 to +0.37" in said
    assert "another reward model, shuffled among the frames: 19%, so it matters which frames" in said
    assert "labels: 67%" in said and "One training seed" not in said
    same = table.assign(weights=["", "ab12", "", "ab12"], seeds=[5, 5, 1, 5])
    assert "The same weights, shuffled" in findings.experiment(same)
    assert findings.experiment(same).endswith("whose luck no interval knows: `oracle`")
    assert "Without weights" not in said
    for rate, low, enough in ((0.4, 0.05, False), (0.51, -0.08, True), (0.6, -0.2, True)):
        filtered = table.copy()
        filtered.loc["duration_filter"] = [rate, rate - 0.24, 0.1, 0.5, 5, ""]
        filtered.attrs["over_filter"] = {"difference": 0.52 - rate, "difference_low": low, "difference_high": low + 0.2}
        said = findings.experiment(filtered)
        assert f"succeeded: the faster half of these {rate:.0%}" in said
        assert ("a plain filter does as well here" in said) == enough
    assert "that is not settled" in findings.experiment(table.assign(low=-0.1))
    assert "it harmed" in findings.experiment(table.assign(low=-0.2, high=-0.1))
    assert "was not run" in findings.experiment(None) and "was not run" in findings.experiment(table.loc[["bc"]])


def test_what_kappa_does_and_where_frames_gain_and_lose():
    said = findings.weighting(0.083, "mean", 0.6)
    assert "by the rule `mean`" in said and said.endswith("0.60, healthy")
    assert "outside the healthy" in findings.weighting(0.5, 0.5, 0.1)
    table = pd.DataFrame({"episode": [3, 1], "frame": [4, 0], "later": [12, 8], "delta": [-0.5, -0.2]})
    said = "episode 3 loses most, 0.50 from frame 4 to 12; the others here 0.20 at least"
    assert findings.gains(table, "loses") == said
    assert findings.gains(table.iloc[:0], "loses") == "no frame loses"
    first, last = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    last[0, :2] = 200
    assert findings.change(first, last) == "between the first frame and the last, 0% to 50% of the pixels change"
    assert findings.suspects([(4, "short"), (2, "")]) == "episode 4: short\nepisode 2: nothing suspicious"
    said = findings.outcomes({"bc": [True], "rabc": []}, {"bc": [True, False], "rabc": []})
    assert said == "bc: 1 of the 1 shown succeed, 1 of all 2"


def test_a_lower_validation_loss_and_two_measures_of_error():
    said = findings.losses({"bc": 1.0, "rabc": 1.2})
    assert said.startswith("`bc` has the lower loss") and "not to imitate" in said
    assert findings.losses({"bc": 1.0, "rabc": 0.9}).endswith("(1.0000 for `bc`, 0.9000 for `rabc`)")
    two = findings.two_measures
    assert "against the target a was the hardest" in two({"a": 2, "b": 1}, {"a": 1, "b": 2}, "mse_truth")
    assert two({"a": 2, "b": 1}, {"a": 3, "b": 2}, "mse_truth").startswith("a is the hardest")
    assert two({"a": 2}, {"a": 1}, "mse_target_dense") == ""


def test_rows_that_do_better_are_told_from_luck():
    table = pd.DataFrame(
        {"difference": [0, -0.1, -0.2, 0.3], "low": [0, -0.2, -0.3, 0.1], "high": [0, 0.1, -0.1, 0.5]},
        index=["sarm", "lucky", "better", "worse"],
    )
    said = findings.worth(table, "mse")
    assert "over the same episodes, the most first: `worse` +0.3000; better: `better` -0.2000" in said
    assert said.endswith("not told apart: `lucky` -0.1000")
    assert "no row to hold" in findings.worth(table.loc[["sarm"]], "mse")


def test_ablations_of_other_settings_are_no_comparison():
    made = {"labels": "a", "settings": {"steps": 600}, "code": "x"}
    assert findings.comparable(made, made | {"splits": []}) == ""
    said = findings.comparable(made, {"labels": "b", "settings": {"steps": 700}, "code": "x"})
    assert "other annotations, sarm settings than the rows below" in said
    assert "make scorecard" in findings.comparable({}, made) and "not known" in findings.comparable(made, {})


def test_where_progress_ends():
    up, fallen, failed = np.array([0, 0.5, 1.0]), np.array([0, 1.0, 0.9]), np.array([0, 0.4, 0.3])
    said = findings.ends({4: up, 7: fallen, 9: failed}, [True, True, False])
    assert "the 2 episodes that succeed end at 0.950 (the lowest, 7, at 0.900), 1 of them after a fall" in said
    assert said.endswith("the 1 that fail at 0.300 (the highest, 9, at 0.300)")
    assert findings.ends({4: fallen, 9: up}, [True, False]).endswith("(the highest, 9, at 1.000, as high as a success)")
    assert "fail" not in findings.ends({4: up}, [True]) and "no episode succeeds" in findings.ends({9: failed}, [False])


def test_which_kappa_does_as_much_as_the_chosen_one():
    table = pd.DataFrame(
        [[0.0, 0.3, 1.0], [0.02, 0.1, 0.98], [0.08, 0.1, 0.94]],
        index=["0", "mean / 4", "mean (in use)"],
        columns=["κ", "in bad stretches", "elsewhere"],
    )
    said = findings.kappas(table)
    assert "κ = 0.08 leaves frames in bad stretches 0.10 and others 0.94" in said
    assert "κ = 0.02 filters as much and leaves the others 0.98; at κ = 0 bad stretches keep 0.30" in said
    assert "nothing to tell apart" in findings.kappas(table.assign(**{"in bad stretches": np.nan}))


def test_what_still_falls_and_who_annotates_better():
    assert findings.still_falling([100, 200], [0.2, 0.1]) == "it still falls at the end: by 50% in the last 100 steps"
    assert findings.still_falling([100, 200], [0.1, 0.2]) == "" == findings.still_falling([100], [0.1])
    assert findings.still_learning({"bc": [2.0, 1.0], "rabc": [1.0]}).endswith("by -50% for `bc`, +0% for `rabc`")
    shares = {"keyframes": {"frame_agreement": 0.64}, "propagate": {"frame_agreement": 0.97}}
    assert findings.best_of(shares, "dense").endswith("`propagate` in 97%, `keyframes` in 64%: take `propagate`")
    assert "no validation episode is marked" in findings.best_of({}, "dense")
    nobody = {"propagate": {"episodes": 0, "missing": 6}}  # annotate.episodes names none of them
    assert "no marked validation episode was annotated" in findings.best_of(nobody, "dense")
