"""Sentences under figures, against tables in which the answer is plain to see."""

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
