"""The scorecard measures what its formulas say, and knows what it cannot measure."""

import typing
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, spearmanr

from benchmarks.scorecard import no_repeats, single_stage
from sarm_lib import checkpoint, encoder, lerobot_io, progress, scorecard, stages
from sarm_lib.artifacts import read_json, write_json
from sarm_lib.dataset import Episode
from sarm_lib.progress import Scores
from sarm_lib.scorecard import Predicted, Reference
from sarm_lib.stages import Labels

FPS = 10


def reference(truth, stage=None, success=True, group="clean", target=None) -> Reference:
    truth = np.asarray(truth, dtype=np.float32)
    stages_ = {} if stage is None else {"dense": np.asarray(stage)}
    target = truth if target is None else np.asarray(target, dtype=np.float32)
    return Reference(group, FPS, success, {"sparse": target, "dense": target}, stages_, truth)


def predicted(progress_of, stage=None, confidence=0.9, **texts) -> Predicted:
    values = np.asarray(progress_of, dtype=np.float32)
    said = np.zeros(len(values), np.int64) if stage is None else np.asarray(stage)
    probabilities = np.full((len(values), 3), (1 - confidence) / 2, np.float32)
    probabilities[np.arange(len(values)), said] = confidence
    scores = Scores(values, said, values, probabilities)
    return Predicted({"sparse": scores, "dense": scores}, **texts)


def figures(pairs) -> dict:
    return scorecard.card([r for r, _ in pairs], [p for _, p in pairs])["all"]


RAMP = np.linspace(0, 1, 41)


def test_a_perfect_prediction_has_no_error_and_the_clock_has_the_best_voc():
    stage = np.repeat([0, 1, 2], [14, 14, 13])
    perfect = figures([(reference(RAMP, stage), predicted(RAMP, stage, 1.0))] * 3)
    assert perfect["mse_truth"] == perfect["mae_target_dense"] == perfect["stage_calibration_error"] == 0
    assert perfect["voc"] == perfect["stage_accuracy_dense"] == 1
    dropped = np.r_[np.linspace(0, 0.8, 21), np.linspace(0.1, 1, 20)]
    (clock,) = scorecard.time_linear([Episode(0, 41, 0, 0, "test", "clean")])
    row = figures([(reference(dropped), clock)])
    assert row["voc"] == 1 and row["mse_truth"] == pytest.approx(np.mean((RAMP - dropped) ** 2), abs=1e-5)
    assert "stage_accuracy_dense" not in row and "wrong_instruction" not in row


def test_every_figure_is_its_formula():
    rng = np.random.default_rng(0)
    truth = np.r_[np.linspace(0, 0.6, 20), np.full(10, 0.6), np.linspace(0.2, 1, 20)]
    stage = np.r_[np.zeros(15), np.ones(15), np.zeros(10), np.full(10, 2)].astype(int)
    said, guess = rng.random(50), rng.integers(0, 3, 50)
    other, rephrased = [rng.random(50), rng.random(50)], [said + 0.1]
    row = figures(
        [
            (
                reference(truth, stage, success=False),
                predicted(said, guess, 0.75, other_tasks=other, paraphrases=rephrased),
            )
        ]
    )
    said32 = said.astype(np.float32).astype(float)
    expected = {
        "mse_truth": np.mean((said32 - truth) ** 2),
        "mae_truth": np.mean(np.abs(said32 - truth)),
        "stage_accuracy_dense": np.mean(guess == stage),
        "voc": spearmanr(said, np.arange(50)).statistic,
        "retry_order": spearmanr(said, truth).statistic,
        "pause_rmse": np.sqrt(np.mean((said[19:30] - said[19]) ** 2)),
        "false_progress": np.mean(np.maximum(said - truth, 0)),
        "wrong_instruction": np.mean([said - text for text in other]),
        "paraphrase_shift": 0.1,
        "stage_calibration_error": abs(0.75 - np.mean(guess == stage)),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=2e-5), name
    assert "success_auc" not in row  # nothing but a failure


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=4, max_size=30).filter(
        lambda x: {s for _, s in x} == {True, False}
    )
)
def test_success_auc_is_the_area_under_the_roc_curve(episodes):
    pairs = [(reference([0, 1], success=s), predicted([0, final])) for final, s in episodes]
    good, bad = ([f for f, s in episodes if s is success] for success in (True, False))
    expected = mannwhitneyu(good, bad).statistic / (len(good) * len(bad))
    row = figures(pairs)
    assert row["success_auc"] == pytest.approx(expected, abs=1e-4)
    assert row["success_auc_low"] <= row["success_auc"] + 1e-4 and row["success_auc"] <= row["success_auc_high"] + 1e-4


def test_intervals_narrow_with_more_episodes_and_hold_the_figure():
    rng = np.random.default_rng(1)
    pairs = [(reference(RAMP), predicted(np.clip(RAMP + rng.normal(0, 0.2), 0, 1))) for _ in range(80)]
    few, many = figures(pairs[:8]), figures(pairs)
    assert many["mse_truth_low"] < many["mse_truth"] < many["mse_truth_high"]
    assert many["mse_truth_high"] - many["mse_truth_low"] < few["mse_truth_high"] - few["mse_truth_low"]


def test_a_pause_is_a_stretch_that_stands_still_long_enough():
    truth = np.r_[np.linspace(0, 0.5, 20), np.full(6, 0.51), np.linspace(0.55, 1, 20)]
    assert [(p.start, p.stop) for p in scorecard.pauses(truth, FPS)] == [(19, 26)]
    assert scorecard.pauses(np.linspace(0, 1, 46), FPS) == []  # moves all the time
    assert scorecard.pauses(np.full(4, 0.5), FPS) == []  # too short
    assert [(p.start, p.stop) for p in scorecard.pauses(np.full(50, 0.5), FPS)] == [(0, 50)]


def test_groups_are_measured_apart_and_what_no_row_has_is_named():
    card = scorecard.card(
        [reference(RAMP, group="clean"), reference(RAMP, group="sloppy")], [predicted(RAMP), predicted(1 - RAMP)]
    )
    assert [card[k]["episodes"] for k in ("all", "clean", "sloppy")] == [2, 1, 1]
    assert card["clean"]["voc"] == 1 and card["sloppy"]["voc"] == -1 and card["all"]["voc"] == 0
    assert "retry_order" in scorecard.left_out({"sarm": card}) and "voc" not in scorecard.left_out({"sarm": card})
    table = scorecard.table({"sarm": card}, ["voc", "retry_order"])
    assert table.voc.tolist() == ["0.000 [-1.000, 1.000]"] and list(table.columns) == [
        "voc"
    ]  # what no row has is no column
    sheet = scorecard.sheet(card)
    assert sheet.loc["voc"].tolist() == ["0.000 [-1.000, 1.000]", "1.000", "-1.000"]
    assert sheet.loc["false_progress", "clean"] == "–" if "false_progress" in sheet.index else True


def test_confusion_is_shares_of_the_reference_s_frames():
    table = scorecard.confusion(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ["a", "b", "c"])
    assert table.to_numpy().tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]


# --- on a dataset -------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(in_project):
    config, dataset = in_project
    embeddings = encoder.open_embeddings(config.paths.read("embeddings", "00"), dataset)
    labels = lerobot_io.read_labels(config.paths.read("dataset/meta", "02").parent, dataset, config.heads)
    model = checkpoint.load_reward_model(config.paths.read("sarm", "03"))
    return config, dataset, embeddings, labels, model, progress.frame_store(dataset, embeddings, model)


def test_the_row_of_a_model_is_measured_with_its_own_and_with_other_texts(parts):
    _, dataset, embeddings, labels, model, store = parts
    (test, *_) = scorecard.test_episodes(dataset, labels)
    number = int(dataset.frames.task_index.to_numpy()[test.row])
    own = torch.from_numpy(embeddings.tasks[[number]])
    row = scorecard.card(
        scorecard.references(dataset, labels, [test]),
        scorecard.predictions(model, store, [test], 1, scorecard.Instructions({number: own}, {number: own})),
    )["all"]
    assert row["wrong_instruction"] == row["paraphrase_shift"] == 0  # it is the task's own text
    assert "mse_truth" not in row and row["mse_target_dense"] > 0  # without truth, what annotations allow
    other = scorecard.card(
        scorecard.references(dataset, labels, [test]),
        scorecard.predictions(model, store, [test], 1, scorecard.Instructions({number: -own}, {})),
    )["all"]
    assert other["wrong_instruction"] != 0 and "paraphrase_shift" not in other


def test_other_tasks_of_the_dataset_are_other_tasks_and_paraphrases_are_of_their_own():
    class Clip:
        def texts(self, texts):
            return list(texts)

    class Settings:
        other_tasks: typing.ClassVar = ["open the door"]
        paraphrases: typing.ClassVar = {"stack": ["pile up"], "of another dataset": ["elsewhere"]}

    told = scorecard.instructions(Settings, ["stack", "", "sort"], Clip())  # a number that no task has
    assert told.others == {0: ["open the door", "sort"], 2: ["open the door", "stack"]}
    assert told.paraphrases == {0: ["pile up"]}


def test_a_truth_takes_the_annotations_place_where_there_is_one(parts):
    _, dataset, _, labels, *_ = parts
    test = scorecard.test_episodes(dataset, labels)
    for true, annotated in zip(
        scorecard.references(dataset, labels, test, "sim."), scorecard.references(dataset, labels, test), strict=True
    ):
        assert annotated.truth is None and true.truth is not None  # the tiny dataset has sim.progress
        np.testing.assert_array_equal(true.target["dense"], annotated.target["dense"])
    with pytest.raises(ValueError, match=r"no column begins with 'real\."):
        scorecard.references(dataset, labels, test, "real.")


def test_without_an_annotated_test_episode_the_remedy_is_named(parts):
    _, dataset, _, labels, *_ = parts
    train = frozenset(e.index for e in dataset.split("train"))
    with pytest.raises(ValueError, match="no test episode is annotated"):
        scorecard.test_episodes(
            dataset, Labels(labels.stage, labels.tau, labels.stage_names, labels.proportions, train)
        )


def test_the_row_of_the_targets_follows_the_annotations(parts):
    _, dataset, _, labels, *_ = parts
    test = scorecard.test_episodes(dataset, labels)
    row = scorecard.card(scorecard.references(dataset, labels, test), scorecard.targets(labels, test))["all"]
    assert row["mse_target_sparse"] == row["mse_target_dense"] == row["stage_calibration_error"] == 0
    assert row["stage_accuracy_dense"] == 1


def test_ablations_of_another_dataset_are_left_out(tmp_path):
    rows = {
        "rows": {"no_rewind": {"all": {"voc": 0.5}}},
        "values": {"no_rewind": [0.1]},
        "made_from": {"fingerprint": "this"},
    }
    rows |= {"metric": "mse_truth", "episodes": [3]}
    write_json(tmp_path / "s.json", rows)
    made = scorecard.ablations(tmp_path / "s.json", "this")
    episodes = [Episode(i, 10, 0, 0, "test", "all") for i in (3, 4)]
    assert made.paired("mse_truth", episodes[:1]) == {"no_rewind": [0.1]}
    assert made.paired("mse_target_dense", episodes[:1]) == {} == made.paired("mse_truth", episodes[1:])
    assert scorecard.ablations(tmp_path / "s.json", "this").cards == rows["rows"]
    for path, fingerprint in (("s.json", "that"), ("none.json", "this")):
        assert scorecard.ablations(tmp_path / path, fingerprint) == scorecard.Ablations()


def test_rows_are_compared_on_the_same_episodes():
    """Two rows that lie far apart in every episode differ for sure, however much the episodes themselves differ."""
    hard = np.linspace(0, 1, 40)
    rows = {"sarm": hard, "worse": hard + 0.01, "luck": hard[::-1]}
    found = scorecard.differences(rows)
    assert list(found.index) == ["sarm", "worse", "luck"] and (found.loc["sarm"] == 0).all()
    assert found.loc["worse"].to_numpy() == pytest.approx([0.01] * 3)
    assert found.loc["luck", "low"] < 0 < found.loc["luck", "high"]
    card = {"all": {"voc": 1.0, "voc_low": 1.0, "voc_high": 1.0}}
    table = scorecard.table(dict.fromkeys([*rows, "of other episodes"], card), ["voc"], found)
    assert table.difference["worse"] == "+0.0100 [+0.0100, +0.0100]" and table.difference["of other episodes"] == "–"


def test_an_episode_s_values_have_the_card_s_mean():
    references = [reference(RAMP), reference(RAMP)]
    said = [predicted(RAMP), predicted(1 - RAMP)]
    card = scorecard.card(references, said)
    assert scorecard.main_metric(card) == "mse_truth"
    values = scorecard.values(references, said, "mse_truth")
    assert values[0] == 0 and np.mean(values) == pytest.approx(card["all"]["mse_truth"], abs=1e-5)


def test_a_model_of_other_stages_is_refused_with_both_vocabularies(parts):
    *_, labels, model, _ = parts
    scorecard.require_stages(model, labels, "mine")
    other = replace(labels, stage_names={**labels.stage_names, "dense": ["push", "pull"]})
    with pytest.raises(
        ValueError, match=r"theirs/sarm knows the dense stages \['leave the edge'.*annotations \['push', 'pull'\]"
    ):
        scorecard.require_stages(model, other, "theirs/sarm")
    with pytest.raises(ValueError, match="the annotations none"):
        scorecard.require_stages(model, replace(labels, stage_names={"sparse": labels.stage_names["sparse"]}), "theirs")


def test_stage_04_leaves_the_scorecard_in_its_form(parts):
    config, _, embeddings, *_ = parts
    cards = read_json(config.paths.read("metrics/scorecard.json", "04"))
    assert set(cards) == {"sarm", "time_linear"} and embeddings.fingerprint
    for kinds in cards.values():
        for values in kinds.values():
            names = {name for name in values if not name.endswith(("_low", "_high")) and name != "episodes"}
            assert names <= set(scorecard.METRICS)
            assert all({f"{name}_low", f"{name}_high"} <= set(values) for name in names)


def test_ablation_labels_no_repeats_visits_each_stage_once_and_single_stage_is_the_clock(parts):
    _, dataset, _, labels, *_ = parts
    stage, tau = labels.stage["dense"].copy(), labels.tau["dense"].copy()
    first = dataset.episodes[0]
    stage[first.rows], tau[first.rows] = stages.targets(
        tuple(
            stages.Segment(labels.stage_names["dense"][k], start, end)
            for k, start, end in [(0, 0, 3), (1, 4, 6), (0, 7, 9), (1, 10, 12), (2, 13, first.length - 1)]
        ),
        labels.stage_names["dense"],
        first.length,
    )
    again = Labels(
        {**labels.stage, "dense": stage},
        {**labels.tau, "dense": tau},
        labels.stage_names,
        labels.proportions,
        labels.annotated,
    )
    once = no_repeats(again, dataset)
    assert once.stage["dense"][first.rows].tolist() == [0] * 10 + [1] * 3 + [2] * (first.length - 13)
    np.testing.assert_allclose(once.tau["dense"][first.rows][:10], np.linspace(0, 1, 10), atol=1e-6)
    assert once.annotated == stages.complete_episodes(again, dataset.episodes)
    assert sum(once.proportions["dense"]) == pytest.approx(1)
    clock = single_stage(labels, dataset)
    np.testing.assert_allclose(clock.progress(first, "sparse"), np.linspace(0, 1, first.length), atol=1e-6)


def test_dense_truth_gives_the_sparse_stages_that_annotations_nest_it_in(parts):
    _, dataset, _, labels, *_ = parts
    nested = stages.nesting(labels, dataset.split("train"))
    assert len(nested) == len(labels.stage_names["dense"]) and (np.diff(nested) >= 0).all()
    rows = np.concatenate([np.arange(dataset.num_frames)[e.rows] for e in dataset.split("train")])
    counted = pd.crosstab(labels.stage["dense"][rows], labels.stage["sparse"][rows])
    assert nested.tolist() == counted.to_numpy().argmax(1).tolist()


def test_the_parameters_of_every_ablation_fit_together():
    from benchmarks import scorecard as ablations
    from sarm_lib import params
    from tests.conftest import ROOT

    for window in ("centred", "past"):
        rows = ablations.rows(["observation.images.front"], window)
        assert set(rows) <= set(scorecard.ROWS) and f"window_{window}" not in rows
        for overrides, _ in rows.values():
            params.load(ROOT / "params.yaml", overrides)
