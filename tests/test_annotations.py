"""The validator, the files, and LeRobot's columns."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sarm_lib import annotations
from sarm_lib.annotations import Annotation, AnnotationError, Segment
from sarm_lib.dataset import open_dataset
from sarm_lib.lerobot_io import read_labels, write_annotated_dataset
from tests.conftest import CAMERAS, ROOT, make_dataset

NAMES = {"sparse": ["reach", "grasp"]}


def annotation(*segments: Segment, length: int = 20) -> Annotation:
    return Annotation(7, length, "test", segments, None)


@pytest.mark.parametrize(
    ("segments", "rule"),
    [
        ([Segment("grab", 0, 19)], "vocabulary: unknown subtask 'grab' (0 to 19); known are reach, grasp"),
        ([Segment("reach", 0, 20)], "bounds: 'reach' (0 to 20) leaves the episode's 20 frames"),
        ([Segment("reach", -1, 18)], "bounds: 'reach' (-1 to 18) leaves the episode's 20 frames"),
        ([Segment("reach", 6, 5), Segment("reach", 7, 19)], "zero length: 'reach' (6 to 5) has fewer than two frames"),
        ([Segment("reach", 0, 0), Segment("grasp", 1, 19)], "zero length: 'reach' (0 to 0) has fewer than two frames"),
        ([Segment("reach", 0, 9), Segment("grasp", 9, 19)], "overlap: 'grasp' (9 to 19) starts inside 'reach'"),
        ([Segment("grasp", 10, 19), Segment("reach", 0, 9)], "order: 'reach' (0 to 9) stands after 'grasp'"),
        ([Segment("reach", 0, 9)], "coverage: only 10 of 20 frames lie in a segment, at least 80% have to"),
        ([], "coverage: no segment"),
    ],
)
def test_a_broken_rule_names_episode_subtask_and_rule(segments, rule):
    with pytest.raises(AnnotationError) as error:
        annotations.validate(annotation(*segments), NAMES)
    assert f"episode 7, sparse, {rule}" in str(error.value)


def test_every_broken_rule_is_named_at_once_and_another_length_too():
    bad = annotation(Segment("fly", 0, 30), Segment("reach", 25, 19))
    rules = {finding.rule for finding in annotations.violations(bad, NAMES)}
    assert rules == {"vocabulary", "bounds", "zero length", "overlap"}
    good = annotation(Segment("reach", 0, 9), Segment("grasp", 10, 19))
    annotations.validate(good, NAMES, length=20)
    with pytest.raises(AnnotationError, match="made for 20 frames, the episode has 21"):
        annotations.validate(good, NAMES, length=21)


def test_what_the_annotation_mode_does_not_have_and_negative_episodes_are_refused():
    good = annotation(Segment("reach", 0, 9), Segment("grasp", 10, 19))
    broken = {
        "dense, vocabulary: has segments": replace(good, dense=(Segment("garbage", -5, 99),)),
        "nonsense, confidence: is of no head": replace(good, confidence={"nonsense": (0.5, 0.5)}),
        "dense, confidence: is of no head": replace(good, confidence={"dense": ()}),
        "sparse, confidence: needs one value": replace(good, confidence={"sparse": (0.5,)}),
        "sparse, doubt: needs one value": replace(good, doubt={"sparse": (0.5,)}),
        "bounds: episodes are numbered from 0": replace(good, episode=-5),
    }
    for message, bad in broken.items():
        with pytest.raises(AnnotationError, match=message):
            annotations.validate(bad, NAMES, length=20)


def test_a_subtask_may_recur_and_an_episode_may_end_early():
    annotations.validate(annotation(Segment("grasp", 0, 9), Segment("reach", 10, 14), Segment("grasp", 15, 19)), NAMES)
    annotations.validate(annotation(Segment("reach", 0, 19)), NAMES)


def test_an_episode_of_a_single_frame_has_a_segment_of_one():
    annotations.validate(annotation(Segment("grasp", 0, 0), length=1), NAMES, length=1)
    for wrong in (Segment("grasp", 0, -1), Segment("grasp", 1, 1), Segment("grasp", 1, 0)):
        with pytest.raises(AnnotationError):
            annotations.validate(annotation(wrong, length=1), NAMES)


def lasting(*durations: tuple[int, int]) -> list[Annotation]:
    """Episodes of 200 frames that reach from the first one on, grasp so many frames, reach again, and grasp to the end."""
    parts = [
        (Segment("reach", 0, 9), Segment("grasp", 10, 9 + n), Segment("reach", 10 + n, 9 + n + m)) for n, m in durations
    ]
    ends = [(*of, Segment("grasp", of[-1].end + 1, 199)) for of in parts]
    return [replace(annotation(*of, length=200), episode=i) for i, of in enumerate(ends)]


def test_a_duration_beyond_the_dataset_s_own_tails_is_unlikely():
    usual = [(10 + i % 3, 20) for i in range(40)]
    assert annotations.unlikely(lasting(*usual), NAMES, 2.0) == []
    found = annotations.unlikely(lasting(*usual, (10, 45), (11, 4), (3, 20)), NAMES, 2.0)
    assert [(f.episode, f.head, f.subtask, f.rule) for f in found] == [
        (40, "sparse", "reach", "unlikely duration"),
        (41, "sparse", "reach", "unlikely duration"),
        (42, "sparse", "grasp", "unlikely duration"),
    ]
    assert "episode 40, sparse, unlikely duration: 'reach' (20 to 64) lasts 45 frames; usual are 10 to 20" in str(
        found[0]
    )
    assert annotations.unlikely(lasting(*usual, (10, 45)), NAMES, 3.0) == []
    assert annotations.unlikely(lasting(*usual[:8], (10, 150)), NAMES, 2.0) == []  # of 18 nobody knows what is usual


def test_how_short_the_last_segment_is_says_nothing_and_one_stage_is_not_judged():
    whole = [annotation(Segment("reach", 0, 9), Segment("grasp", 10, 19)) for _ in range(30)]
    early = annotation(Segment("reach", 0, 14), Segment("grasp", 15, 16), length=17)
    assert annotations.unlikely([*whole, early], NAMES, 2.0) == []
    long = annotation(Segment("task", 0, 999), length=1000)
    assert annotations.unlikely([annotation(Segment("task", 0, 19))] * 30 + [long], {"sparse": ["task"]}, 2.0) == []


def test_a_head_that_the_mode_needs_must_be_there():
    with pytest.raises(AnnotationError, match="dense, coverage: no segment"):
        annotations.validate(annotation(Segment("reach", 0, 19)), {**NAMES, "dense": ["reach"]})


# --- what a file may hold -------------------------------------------------------------------------------------------

BOTH = {**NAMES, "dense": ["near it", "at it", "away"]}
ODD = [None, True, -1, 0, 3, 3.0, 0.5, 1.5, 1e300, 10**30, float("nan"), float("inf"), "", "3", "reach", "fly", [], {}]


def may_be_stored(text: bytes | str, names: dict[str, list[str]], length: int) -> bool:
    """The rules of docs/annotations.md once more, told by the frames: each is painted by one segment at most."""
    try:
        file = json.loads(text.decode() if isinstance(text, bytes) else text)
        json.dumps(file, allow_nan=False)
    except ValueError:
        return False
    needed = {"episode", "length", "annotator", "sparse", "dense"}
    if not isinstance(file, dict) or not needed <= file.keys() <= needed | {"confidence", "provenance", "doubt"}:
        return False
    if not isinstance(file["annotator"], str) or not isinstance(file.get("provenance", {}), dict):
        return False
    if any(type(file[key]) is not int for key in ("episode", "length")):
        return False
    if file["episode"] < 0 or file["length"] != length or any(file[h] is not None for h in BOTH if h not in names):
        return False
    for head in names:
        canvas, begun = [0] * length, -1
        if not isinstance(file[head], list) or not file[head]:
            return False
        for s in file[head]:
            if not isinstance(s, dict) or s.keys() != {"subtask", "start", "end"} or s["subtask"] not in names[head]:
                return False
            if any(type(s[key]) is not int for key in ("start", "end")) or not begun < s["start"] < s["end"] < length:
                return False
            begun = s["start"]
            for frame in range(s["start"], s["end"] + 1):
                canvas[frame] += 1
        if max(canvas) > 1 or 5 * sum(canvas) < 4 * length:
            return False
    for key in ("confidence", "doubt"):
        of_heads = file.get(key)
        if of_heads is None:
            continue
        if not isinstance(of_heads, dict) or not of_heads.keys() <= names.keys():
            return False
        for head, values in of_heads.items():
            if not isinstance(values, list) or len(values) != len(file[head]):
                return False
            if not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
                return False
    return True


def places(value) -> list[tuple]:
    """Every (container, key) within JSON."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in list(inside) for place in ((value, key), *places(inner))]


def moved(file: dict, head: str, how: str, dice: Random) -> None:
    """Change the segments of a head, or the values that belong to them, at random and in place; often they stay valid."""
    segments, rated = file[head], [file[key][head] for key in ("confidence", "doubt") if key in file]
    here, there = dice.randrange(len(segments)), dice.randrange(len(segments))
    match how:
        case "shift":
            segments[here][dice.choice(["start", "end"])] += dice.choice([-9, -2, -1, 1, 2, 9])
        case "swap":
            key = dice.choice(["subtask", "start", "end"])
            segments[here][key], segments[there][key] = segments[there][key], segments[here][key]
        case "rename":
            segments[here]["subtask"] = dice.choice([*BOTH[head], *BOTH["sparse"], "fly", "Reach"])
        case "drop" if len(segments) > 1:
            for values in (segments, *rated):
                if dice.random() < 0.9:  # mostly together
                    values[here : here + 1] = []
        case "repeat":
            segments.insert(there, dict(segments[here]))
        case "longer" if rated:
            dice.choice(rated).append(0.5)
        case "rate" if rated and (values := dice.choice(rated)):
            values[dice.randrange(len(values))] = dice.choice([0, 1, 0.25, -1e-9, 1 + 1e-9, *ODD])


def spoilt(file: dict, how: str, dice: Random) -> None:
    """Change anything of a file, at random and in place."""
    container, key = dice.choice(places(file))
    match how:
        case "odd":
            container[key] = dice.choice(ODD)
        case "missing":
            del container[key]
        case "extra":
            inside = [file, *(found[key] for found, key in places(file))]
            dice.choice([c for c in inside if isinstance(c, dict)])[dice.choice(["more", "dense", "doubt"])] = None
        case "another length":
            file["length"] = dice.choice([19, 20, 21, 30, 31, 32])
        case "another head":
            file["dense"] = file.get("sparse")


MOVES = ("shift", "swap", "rename", "drop", "repeat", "longer", "rate")
SPOILS = ("odd", "missing", "extra", "another length", "another head")
HARM = st.sampled_from([*[""] * 6, *MOVES * 2, *SPOILS, "cut", "byte"])


def file_of(names: dict[str, list[str]], length: int, harm: tuple[str, ...], dice: Random) -> bytes:
    """A valid file, then harmed."""
    file = {"episode": 7, "length": length, "annotator": "x", "sparse": None, "dense": None, "provenance": {"seed": 1}}
    for head in names:
        edges = [0, *sorted(dice.sample(range(2, length - 1, 2), dice.randrange(4))), length]
        spans = [(a, b - dice.choice([1, 1, 2] if b - a > 2 else [1])) for a, b in itertools.pairwise(edges)]
        file[head] = [{"subtask": dice.choice(names[head]), "start": a, "end": b} for a, b in spans]
    for key in ("confidence", "doubt"):
        if dice.random() < 0.5:
            file[key] = {head: [dice.random() for _ in file[head]] for head in names}
    for how in sorted(harm, key=lambda how: how in SPOILS):  # what is spoilt cannot be moved
        if how in MOVES:
            moved(file, dice.choice(list(names)), how, dice)
        elif how in SPOILS:
            spoilt(file, how, dice)
    text = bytearray(json.dumps(file).encode())
    if "cut" in harm:
        del text[dice.randrange(len(text)) :]
    if "byte" in harm and text:
        text[dice.randrange(len(text))] = dice.choice([*b' 0123456789",.-]}e', 0x00, 0xFF])
    return bytes(text)


def judged(text: bytes | str, names: dict[str, list[str]], length: int) -> bool:
    """Whether `parse` accepts a text. Asserts that it ought to, and that what is read is what the file says."""
    try:
        read = annotations.parse(text, names, length)
    except AnnotationError as error:
        assert str(error) and not may_be_stored(text, names, length)
        return False
    assert may_be_stored(text, names, length)
    said = {"confidence": None, "provenance": {}, "doubt": None, **json.loads(text)}
    assert json.loads(json.dumps(asdict(read))) == said
    return True


def test_a_file_is_accepted_exactly_where_it_keeps_the_rules():
    seen = Counter()

    @settings(max_examples=7000, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([NAMES, BOTH]), st.sampled_from([20, 31]), st.tuples(HARM, HARM), st.integers(0, 2**32))
    def judge(names, length, harm, seed):
        seen[any(harm), judged(file_of(names, length, harm, Random(seed)), names, length)] += 1

    judge()
    assert not seen[False, False]  # what nobody harmed is valid
    assert min(seen[True, True], seen[True, False]) > 0.1 * seen.total()  # neither answer is a rare one


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-30, 30) | st.floats() | st.sampled_from(["reach", "grasp", "fly", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=2500)
@given(st.one_of(junk.map(json.dumps), st.text(), st.binary()))
def test_whatever_else_a_file_holds_it_is_refused_with_a_reason(text):
    assert not judged(text, NAMES, 20)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES["sparse"]), st.integers(2, 9)), min_size=1, max_size=8))
def test_what_is_valid_is_accepted_and_survives_its_file(parts):
    edges = list(itertools.accumulate((n for _, n in parts), initial=0))
    segments = tuple(Segment(name, a, b - 1) for (name, _), a, b in zip(parts, edges, edges[1:]))
    whole = Annotation(7, edges[-1], "x", segments, None, {"sparse": (0.5,) * len(parts)}, {"seed": 1})
    assert annotations.parse(json.dumps(asdict(whole)), NAMES, edges[-1]) == whole


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ('"provenance": {"seed": 1, "seed": 2}', "'seed' stands there twice"),
        ('"length": 20, "provenance": {}', "'length' stands there twice"),
        ('"provenance": {"seed": NaN}', "NaN is no number that JSON has"),
        ('"provenance": {"deep": [{"a": -Infinity}]}', "-Infinity is no number"),
        ('"provenance": {"seed": 1e999}', "1e999 is no number"),
    ],
)
def test_what_readers_of_json_differ_on_is_refused(said, reason):
    text = json.dumps(asdict(annotation(Segment("reach", 0, 9), Segment("grasp", 10, 19))))
    annotations.parse(text, NAMES, 20)
    with pytest.raises(AnnotationError, match=reason):
        annotations.parse(text.replace('"provenance": {}', said), NAMES, 20)


@settings(max_examples=200)
@given(st.integers(-3, 3), st.integers(-3, 25), st.integers(-2, 9), st.integers(-1, 21))
def test_what_the_gate_accepts_the_schema_accepts(start, end, episode, length):
    import jsonschema

    given = Annotation(episode, length, "x", (Segment("reach", start, end),), None)
    fits = jsonschema.Draft202012Validator(annotations.json_schema()).is_valid(json.loads(json.dumps(asdict(given))))
    assert fits == (min(start, end, episode, length) >= 0)
    assert fits or annotations.violations(given, NAMES)


def test_the_documented_example_is_valid_and_the_schema_is_the_codes():
    import jsonschema

    text = (ROOT / "docs/annotations.md").read_text()
    example, schema = (block.split("```")[0] for block in text.split("```json\n")[1:3])
    names = {
        "sparse": ["pick up the nut", "place the nut on the peg"],
        "dense": ["reach the nut handle", "grasp the nut"],
    }
    annotations.parse(example, names)
    assert json.loads(schema) == annotations.json_schema()
    jsonschema.validate(json.loads(example), json.loads(schema))


def test_files_are_read_back_as_they_were_written(tmp_path):
    written = [annotation(Segment("reach", 0, 4), Segment("grasp", 5, 19))]
    annotations.save(tmp_path / "a", written, NAMES)
    assert annotations.load(tmp_path / "a", NAMES) == written


def test_opinions_are_read_back_by_name_and_those_of_an_earlier_run_are_gone(tmp_path, tiny):
    demos = open_dataset(tiny)
    episode = demos.episodes[0]
    names = {"dense": ["reach", "grasp"]}
    whole = [Annotation(episode.index, episode.length, "x", None, (Segment("reach", 0, episode.length - 1),))]
    annotations.save_opinions(tmp_path / "opinions", {"keyframes": whole, "vlm-seed-1": [], "old": whole}, names)
    annotations.save_opinions(tmp_path / "opinions", {"keyframes": whole, "vlm-seed-1": []}, names)
    assert annotations.load_opinions(tmp_path / "opinions", names, demos) == {"keyframes": whole, "vlm-seed-1": []}


def test_a_file_that_is_not_named_after_an_episode_is_said(tmp_path):
    annotations.save(tmp_path / "a", [annotation(Segment("reach", 0, 19))], NAMES)
    text = (tmp_path / "a/000007.json").read_text()
    for name in ("000007 (1).json", "7.json", "7a.json"):
        (tmp_path / "a" / name).write_text(text)
        with pytest.raises(AnnotationError) as error:
            annotations.load(tmp_path / "a", NAMES)
        assert f"{name}: files in a are named after their episode, such as 000003.json" in str(error.value)
        (tmp_path / "a" / name).unlink()
    assert len(annotations.load(tmp_path / "a", NAMES)) == 1


def test_an_invalid_annotation_is_never_stored(tmp_path):
    with pytest.raises(AnnotationError):
        annotations.save(tmp_path / "a", [annotation(Segment("reach", 0, 4)), annotation(Segment("fly", 0, 4))], NAMES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [1, 2])
def test_lerobot_opens_the_annotated_dataset_and_every_row_is_the_right_episode_s(tmp_path, files):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = open_dataset(make_dataset(tmp_path / "source", files=files))
    tables = sorted(dataset.root.glob("meta/episodes/**/*.parquet"))
    assert (len(tables) > 1) == (files > 1)
    for path in tables:  # another tool's column stays, another run's annotations do not
        table = pq.read_table(path)
        own, old = pa.array([["a", "b"]] * len(table)), pa.array([["old"]] * len(table))
        pq.write_table(table.append_column("my_subtasks", own).append_column("dense_subtask_names", old), path)
    for path in (dataset.root / "meta").rglob("*"):  # a source that somebody else owns, or that is kept from changes
        path.chmod(0o555 if path.is_dir() else 0o444)
    dataset = open_dataset(dataset.root)
    written = [
        Annotation(
            e.index,
            e.length,
            "test",
            (Segment("reach", 0, e.index + 1), Segment("grasp", e.index + 2, e.length - 1)),
            None,
        )
        for e in dataset.episodes
        if e.index != 3  # partly annotated is fine
    ]
    write_annotated_dataset(dataset, written, {"sparse": {"reach": 0.4, "grasp": 0.6}}, tmp_path / "target")
    opened = LeRobotDataset("test/target", root=tmp_path / "target", video_backend="pyav")
    assert len(opened) == dataset.num_frames
    media = [path for path in (tmp_path / "target").rglob("*") if path.is_file() and "meta" not in path.parts]
    assert media and all(path.is_symlink() for path in media)  # nothing is copied
    from huggingface_hub import HfApi

    uploads = HfApi()._prepare_upload_folder_additions(str(tmp_path / "target"), path_in_repo="")
    assert {str(path.relative_to(tmp_path / "target")) for path in media} < {u.path_in_repo for u in uploads}
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "target/meta").rglob("*"))
    rows = opened.meta.episodes
    assert rows["my_subtasks"] == [["a", "b"]] * len(rows) and "dense_subtask_names" not in rows.column_names
    for i, row in enumerate(rows):
        expected = None if i == 3 else [0, i + 2]
        assert row["sparse_subtask_start_frames"] == row["subtask_start_frames"] == expected
        if i != 3:
            assert row["sparse_subtask_end_times"] == [(i + 1) / 10, (dataset.episodes[i].length - 1) / 10]
    labels = read_labels(tmp_path / "target", open_dataset(tmp_path / "target"), ("sparse",))
    assert labels.annotated == {0, 1, 2, 4, 5, 6, 7} and labels.stage_names == {"sparse": ["reach", "grasp"]}


@pytest.mark.parametrize("lost", ["the links", "where they lead"])
def test_links_that_dvc_did_not_bring_along_are_made_anew(tmp_path, tiny, lost):
    dataset, target = open_dataset(tiny), tmp_path / "target"
    whole = [Annotation(e.index, e.length, "test", (Segment("go", 0, e.length - 1),), None) for e in dataset.episodes]
    write_annotated_dataset(dataset, whole, {"sparse": {"go": 1.0}}, target)
    links = sorted(path for path in target.rglob("*") if path.is_symlink())
    if lost == "the links":
        shutil.rmtree(target / "videos"), shutil.rmtree(target / "data")
    else:
        for path in links:
            path.unlink()
            path.symlink_to("nowhere")
    assert len(read_labels(target, dataset, ("sparse",)).annotated) == 8
    assert links == sorted(path for path in target.rglob("*") if path.is_symlink()) and all(p.exists() for p in links)


def test_a_camera_whose_folder_is_a_link_is_linked_too(tmp_path):
    root = make_dataset(tmp_path / "source")
    camera = next(path for path in sorted((root / "videos").iterdir()))
    camera.rename(tmp_path / "elsewhere")
    camera.symlink_to(tmp_path / "elsewhere")
    dataset = open_dataset(root)
    whole = [Annotation(e.index, e.length, "test", (Segment("go", 0, e.length - 1),), None) for e in dataset.episodes]
    write_annotated_dataset(dataset, whole, {"sparse": {"go": 1.0}}, tmp_path / "target")
    assert sorted(p.name for p in (tmp_path / "target/videos").iterdir()) == sorted(CAMERAS)
    assert list((tmp_path / "target/videos" / camera.name).rglob("*.mp4"))
    assert read_labels(tmp_path / "target", dataset, ("sparse",)).annotated  # it is known for a copy of this dataset


def test_a_subtask_that_the_proportions_do_not_know_is_named_with_its_episode(tmp_path, project):
    copy = shutil.copytree(project / "outputs/dataset", tmp_path / "dataset")
    path = copy / "meta/temporal_proportions_dense.json"
    path.write_text(path.read_text().replace("cross the middle", "stay in the middle"))
    with pytest.raises(
        ValueError, match=r"episode \d+: dense subtask 'cross the middle' is not one of leave the edge, stay in"
    ):
        read_labels(copy, open_dataset(project / "data/tiny"), ("sparse", "dense"))


def test_a_length_that_no_number_of_frames_has_is_refused():
    """JSON knows integers of any size, and no float holds them."""
    text = json.dumps(asdict(annotation(Segment("reach", 0, 9), Segment("grasp", 10, 19))) | {"length": 0})
    with pytest.raises(AnnotationError, match="coverage"):
        annotations.parse(text.replace('"length": 0', '"length": 1' + "0" * 400), NAMES)
