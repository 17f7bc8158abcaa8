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
    assert findings.confused(shares * 0) == "no frames to tell stages by"
    assert findings.confused(pd.DataFrame([[1.0]], ["task"], ["task"])) == "no frame of any stage is taken for another"


def test_highest_and_lowest_of_named_values():
    values = {"clean": 0.01, "failed": 0.2, "unknown": float("nan")}
    assert findings.extremes(values, "error") == "highest error: failed (0.200); lowest error: clean (0.010)"
    assert findings.extremes({"a": 1.0}, "error", 1) == "error: a (1.0)"
    assert findings.extremes({}, "error") == "no error to compare"


def test_suspicion_that_finds_nothing_says_so():
    assert "look by kind" in findings.suspicion(-0.03) and "look first" in findings.suspicion(0.6)
    assert "nothing to compare" in findings.suspicion(None)


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
    }
    said = findings.detection(row)
    assert "25% of these frames bad" in said and "0.30" in said and "20% of the bad" in said and "right in 95%" in said
    none = findings.detection(row | {"zero_recall": 0.0, "zero_precision": float("nan")})
    assert none.endswith("weight 0 falls on none of the bad ones")
    assert findings.detection(row | {"bad": 0}) == "the simulator calls no frame bad"


def test_final_progress_counts_the_failures_that_look_like_successes():
    final, succeeded = np.array([1.0, 0.95, 0.2, 0.1]), np.array([True, False, False, False])
    said = findings.final_progress(final, succeeded)
    assert "ROC area 1.000 (1 succeeded, 3 failed, and 1 of these end above 0.9)" in said and "say little" in said
    assert "say little" not in findings.final_progress(np.tile(final, 5), np.tile(succeeded, 5))
    assert "ended alike" in findings.final_progress(final, succeeded & False)
