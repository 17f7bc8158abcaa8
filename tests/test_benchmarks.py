"""What `make bench` runs, at sizes that take no time: a benchmark that no longer runs is seen here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import compile as compiling
from benchmarks import looks, propagate, small_pi05, speed, unseen
from sarm_lib import agreement, annotations, corrections, dataset, params
from sarm_lib.annotations import Annotation, Segment
from sarm_lib.model import Sarm, SarmSpec
from sarm_lib.windows import WindowSpec
from tests.conftest import ROOT, make_encoder

SMALL = {"hidden_dim": 16, "num_heads": 2, "num_layers": 1}


@pytest.fixture(scope="module")
def small_bench(tmp_path_factory):
    """The speed benchmark on a few frames, of which LeRobot's side takes the first episodes, with a tiny encoder and SARM."""
    folder = tmp_path_factory.mktemp("bench")
    make_encoder(folder / "clip")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        patched.setattr(speed, "SIZE", SMALL)
        patched.setitem(speed.LENGTHS, "cpu", [8, 7, 8, 20])
        yield speed.Bench(folder, "cpu")
    AcceleratorState._reset_state(True)  # which a row leaves with its precision


@pytest.mark.parametrize("name", ["progress_dual_fp32", "progress_single_fp32"])
def test_frames_that_differ_get_lerobot_s_progress(small_bench, tmp_path, name):
    row = speed.measure(name, small_bench, tmp_path)
    assert row["frames"] == 43 and row["lerobot_frames"] == 23
    assert row["ratio"] == pytest.approx((row["lerobot"] / 23) / (row["ours"] / 43))
    assert min(row["std"].values()) > 0.05 and 0 <= row["mean_abs_diff"] <= row["max_abs_diff"] < 5e-6
    assert 0 < row["float64"]["ours"] < 5e-6 and 0 < row["float64"]["lerobot"] < 5e-6
    assert row["max_abs_diff"] <= sum(row["float64"].values())


def test_half_precision_encodes_and_a_row_within_the_row_scores_too(small_bench, tmp_path):
    row = speed.measure("progress_dual_bf16", small_bench, tmp_path)
    also = row["scored_in_bf16"]
    assert (
        row["mean_abs_diff"] > 1e-5 and also["mean_abs_diff"] > 1e-5 and row["mean_abs_diff"] != also["mean_abs_diff"]
    )
    assert row["lerobot"] == also["lerobot"]  # measured once
    again = small_bench.progress_row("dual", "bf16", "fp32")
    assert again["mean_abs_diff"] == row["mean_abs_diff"]


def test_a_training_row_has_lerobot_s_loss_and_the_seconds_with_the_average(small_bench, tmp_path):
    row = speed.measure("train_dual_fp32", small_bench, tmp_path)
    assert row["max_abs_diff"] < 1e-6 and row["ratio"] == min(of["ratio"] for of in row["by_batch"].values())
    assert all(of["with_average"] > 0 for of in row["by_batch"].values())
    assert 0 < small_bench.loss_difference("bf16") < 0.1


def test_encoding_is_measured_against_the_encoder_alone(small_bench, tmp_path):
    row = speed.measure("encode_vs_bare", small_bench, tmp_path)
    assert row["bare"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["bare"])


def test_a_training_step_is_measured_as_it_is_and_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step: step)  # which takes a minute
    sarm = Sarm(SarmSpec(WindowSpec("centred", 8, 3, 4), speed.STAGES, speed.SHARES, "dual", dropout=0.0, **SMALL))
    batch = speed.training_batch(sarm.spec, 3)
    assert batch.windows.images.shape == (3, 1, 13, 512) and batch.timed == {"sparse": 39.0, "dense": 39.0}
    found = compiling.compared(compiling.training_step(sarm, batch), "cpu")
    assert found["max_abs_diff"] == 0 and found["as_is"] > 0
    for model in (sarm.stage_model, sarm.subtask_model):
        assert all(p.grad.abs().max() > 0 for p in model.heads.parameters())


def test_the_second_policy_reads_a_number_as_one_token_and_near_numbers_alike():
    tokenizer = small_pi05.make_tokenizer(["put the nut on the peg"])
    prompts = [
        small_pi05.TEMPLATE.format("put the nut on the peg").replace("State: 0", f"State: {n}") for n in range(-1, 256)
    ]
    tokens = tokenizer(prompts)["input_ids"]
    assert len({len(row) for row in tokens}) == 1 and len({tuple(row) for row in tokens}) == len(prompts)
    assert tokenizer.unk_token_id not in tokens[7]
    assert tokenizer.unk_token_id in tokenizer("fold the towel")["input_ids"]
    with pytest.raises(ValueError, match="too many words: 5"):
        small_pi05.make_tokenizer([" ".join(f"w{i}" for i in range(300))])

    start = small_pi05.waves(torch.arange(256.0), 64)
    near, far = (torch.cosine_similarity(start[:-k], start[k:]) for k in (1, 100))
    assert near.min() > 0.9 and far.abs().max() < 0.5
    pair = small_pi05.towers({"depth": 1, "vision_depth": 1, "expert_width": 32}, tokenizer)
    table = pair.embed_language_tokens(torch.tensor(tokenizer.convert_tokens_to_ids(["7", "8", "107"])))
    assert torch.cosine_similarity(table[0], table[1], dim=0) > 0.9 > torch.cosine_similarity(table[0], table[2], dim=0)


def test_a_third_look_decides_where_two_differ(monkeypatch):
    rows = lambda *starts: tuple(Segment(n, s, s + 9) for n, s in zip("abc", starts))  # noqa: E731
    said = {
        "first": {1: rows(0, 10), 2: rows(0, 10), 3: rows(0, 10), 4: rows(0, 10, 20)},
        "second": {1: rows(0, 13), 2: rows(0, 14), 3: rows(0, 16), 4: rows(0, 10)},
        "third": {2: rows(0, 13), 3: rows(0, 12), 4: rows(0, 30)},
    }
    monkeypatch.setattr(looks, "read", lambda path, demos: said[path.stem])
    first, second = said["first"], said["second"]
    # 1: nearly alike; 2 and 3: the nearer one, by a boundary; 4: by the subtasks
    assert looks.decided(None) == {1: first[1], 2: second[2], 3: first[3], 4: second[4]}


def test_every_held_out_episode_of_the_demo_was_looked_at(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = params.load("params.yaml")
    demos, names = dataset.from_params(config), {"dense": annotations.vocabulary(config)["dense"]}
    found = looks.decided(demos)
    assert found.keys() >= {e.index for e in demos.episodes if e.split != "train"}
    for episode, segments in found.items():
        length = demos.episodes[episode].length
        annotations.validate(Annotation(episode, length, "manual", None, segments), names, length)


def test_confidences_that_are_right_as_often_as_they_say_are_the_likeliest():
    right = np.array([True] * 8 + [False] * 2)
    by = {sure: propagate.believable(np.array([(sure, near) for near in right])) for sure in (0.5, 0.8, 0.99)}
    assert max(by, key=lambda sure: by[sure]["log_likelihood"]) == 0.8
    assert by[0.8]["confidence"] == by[0.8]["right"] == 0.8 and by[0.8]["rows"] == [[10, 0.8, 0.8]]
    assert by[0.5]["log_likelihood"] == pytest.approx(np.log(0.5), abs=1e-4)
    impossible = propagate.believable(
        np.array([(1.0, False), (1.0, True)])
    )  # certain and wrong: bad, not infinitely so
    assert -10 < impossible["log_likelihood"] < -4


def segments(*starts: tuple[str, int], length: int = 40) -> tuple[Segment, ...]:
    ends = [start - 1 for _, start in starts[1:]] + [length - 1]
    return tuple(Segment(name, start, end) for (name, start), end in zip(starts, ends))


def test_retries_of_new_episodes_have_intervals_that_hold_what_was_measured():
    names, back = ["reach", "grasp"], segments(("reach", 0), ("grasp", 10), ("reach", 20), ("grasp", 30))
    none = segments(("reach", 0), ("grasp", 10))
    compare = lambda a, b: agreement.compare(a, b, names, 40, 40)  # noqa: E731
    pairs = (
        [compare(back, back)] * 30 + [compare(back, none)] * 10 + [compare(none, back)] * 5 + [compare(none, none)] * 50
    )
    found = unseen.interval(pairs, np.random.default_rng(0))
    (low, high), (precise, most) = found["retry_recall_95"], found["retry_precision_95"]
    assert 0.5 < low < 0.75 < high < 0.95 and 0.6 < precise < 30 / 35 < most < 1


def test_marks_by_the_truth_have_the_sparse_subtasks_that_the_marks_have(tiny):
    demos = dataset.open_dataset(tiny)
    train = demos.split("train")
    ends = {e.index: e.length for e in train}
    truth = {i: segments(("reach", 0), ("lift", 5), ("reach", 8), ("place", 11), length=n) for i, n in ends.items()}
    dense = segments(("reach", 0), ("lift", 5), ("place", 11), length=14)
    mark = Annotation(train[0].index, 14, "manual", segments(("take", 0), ("put", 11), length=14), dense)
    given = unseen.taught(demos, truth, [mark])
    assert [m.episode for m in given] == list(ends)
    for m in given:
        annotations.validate(m, {"sparse": ["take", "put"], "dense": ["reach", "lift", "place"]}, ends[m.episode])
        assert m.sparse == segments(("take", 0), ("put", 11), length=m.length) and m.dense == truth[m.episode]


@pytest.fixture
def annotated(tiny):
    """The tiny dataset, a truth with a retry in every episode, and annotations that find it in all but the last one."""
    demos, names = dataset.open_dataset(tiny), {"dense": ["reach", "grasp"]}
    ends = {e.index: e.length for e in demos.episodes}
    truth = {i: segments(("reach", 0), ("grasp", 3), ("reach", 6), ("grasp", 9), length=n) for i, n in ends.items()}
    sure = {"dense": (1.0,) * 4}
    given = [Annotation(i, n, "propagate", None, truth[i], sure, doubt={"dense": (0.0,) * 4}) for i, n in ends.items()]
    missed = segments(("reach", 0), ("grasp", 3), length=given[-1].length)
    given[-1] = replace(given[-1], dense=missed, confidence={"dense": (1.0, 0.6)}, doubt={"dense": (0.0, 0.5)})
    return demos, names, truth, given


def stages(demos, truth, names):
    """A simulator's stages (N,), from its segments."""
    labels = [agreement.frame_labels(truth[e.index], names, e.length) for e in demos.episodes]
    return np.concatenate(labels)


def test_what_is_suspicious_first_and_put_right_is_counted_as_right(annotated, monkeypatch):
    demos, names, truth, given = annotated
    monkeypatch.setattr(unseen, "SHARES", (0.0, 1 / len(given)))
    found = unseen.doubted(given, given, {"dense": 0.5}, truth, names, demos.fps)["suspicion"]
    before, after = found.values()
    assert before["retry_recall_once_right"] == pytest.approx(1 - 1 / len(given), abs=1e-4)
    assert after["episodes"] == 1 and after["errors"] == 1.0
    assert after["retry_recall_once_right"] == after["frame_agreement_once_right"] == 1.0


def test_what_an_eye_says_stands_beside_annotator_and_simulator(annotated, tmp_path, monkeypatch):
    demos, names, truth, given = annotated
    monkeypatch.setattr(unseen, "LOOKS", tmp_path / "looks.yaml")
    sees = segments(("reach", 0), ("grasp", 3), ("reach", 7), ("grasp", 9), length=given[-1].length)
    corrections.record_correction(unseen.LOOKS, demos, corrections.of_now(given[0], "accept"))
    corrections.record_correction(unseen.LOOKS, demos, corrections.of_now(given[-1], "fix", {"dense": sees}))
    found = unseen.looked_at(given, demos, stages(demos, truth, names["dense"]), names)
    said = {what: (row["episodes"], row["retries"], row["retry_recall"]) for what, row in found.items()}
    assert said == {
        "annotator against simulator": (2, 2, 0.5),
        "eye against simulator": (2, 2, 1.0),
        "annotator against eye": (2, 2, 0.5),
        "all new ones, these by eye, against simulator": (len(given), len(given), 1.0),
    }
    assert found["eye against simulator"]["frame_agreement"] < 1
    lasting = found["annotator against simulator"]["lasting"]
    assert lasting["0 s"] == lasting["0.25 s"] == {"retries": 2, "retry_recall": 0.5, "retry_recall_95": [0.0, 1.0]}
    assert lasting["1 s"] == {"retries": 0, "retry_recall": None, "retry_recall_95": None}


def test_looks_are_about_episodes_and_not_about_how_a_machine_renders_them(annotated, tmp_path, monkeypatch):
    demos, names, truth, given = annotated
    monkeypatch.setattr(unseen, "LOOKS", tmp_path / "looks.yaml")
    corrections.record_correction(unseen.LOOKS, demos, corrections.of_now(given[0], "accept"))
    unseen.LOOKS.write_text(unseen.LOOKS.read_text().replace(demos.fingerprint, "f" * 16))
    assert unseen.read_looks(demos) == {given[0].episode: given[0].dense}
    length = given[0].length
    unseen.LOOKS.write_text(unseen.LOOKS.read_text().replace(f", {length - 1}]", f", {length}]"))
    with pytest.raises(
        annotations.AnnotationError, match=f"{length + 1} frames were looked at, and it has {length} here"
    ):
        unseen.looked_at(given, demos, stages(demos, truth, names["dense"]), names)
    unseen.LOOKS.unlink()
    corrections.record_correction(unseen.LOOKS, demos, corrections.of_now(given[0], "reject"))
    with pytest.raises(annotations.AnnotationError, match=rf"episodes \[{given[0].episode}\] were rejected"):
        unseen.read_looks(demos)
