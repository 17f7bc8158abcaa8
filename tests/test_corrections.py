"""What people say: files that keep their comments, verdicts that are never dropped, raw annotations that stay."""

import pytest

from sarm_lib import corrections
from sarm_lib.annotations import Annotation, AnnotationError, Segment
from sarm_lib.dataset import fingerprint, open_dataset

NAMES = {"sparse": ["reach", "grasp"]}


@pytest.fixture(scope="module")
def demos(tiny):
    return open_dataset(tiny)


def annotation(demos, episode: int, boundary: int = 5) -> Annotation:
    length = demos.episodes[episode].length
    return Annotation(
        episode, length, "test", (Segment("reach", 0, boundary - 1), Segment("grasp", boundary, length - 1)), None
    )


def fix(given: Annotation, boundary: int) -> corrections.Correction:
    segments = (Segment("reach", 0, boundary - 1), Segment("grasp", boundary, given.length - 1))
    return corrections.of_now(given, "fix", {"sparse": segments}, why="late")


def test_a_file_that_is_not_there_says_nothing(demos, tmp_path):
    assert corrections.read_corrections(tmp_path / "c.yaml", demos) == []
    assert corrections.read_marks(tmp_path / "m.yaml", demos, NAMES) == []


def test_corrections_are_read_back_as_they_were_written_and_comments_stay(demos, tmp_path):
    path = tmp_path / "corrections.yaml"
    first, second = (
        fix(annotation(demos, 1), 7),
        corrections.of_now(annotation(demos, 3), "reject", why="gripper broke"),
    )
    corrections.record_correction(path, demos, first)
    path.write_text("# ask Ana about episode 3\n" + path.read_text())
    corrections.record_correction(path, demos, second)
    assert corrections.read_corrections(path, demos) == [first, second]
    assert path.read_text().startswith("# ask Ana about episode 3\n") and "- [reach, 0, 6]" in path.read_text()
    again = fix(annotation(demos, 1), 9)
    corrections.record_correction(path, demos, again)
    assert corrections.read_corrections(path, demos) == [again, second]
    corrections.withdraw(path, "corrections", demos, 1)
    assert corrections.read_corrections(path, demos) == [second]


def test_marks_are_annotations(demos, tmp_path):
    mark = annotation(demos, 2)
    corrections.record_mark(tmp_path / "marks.yaml", demos, mark, why="by eye")
    (read,) = corrections.read_marks(tmp_path / "marks.yaml", demos, NAMES)
    assert read.sparse == mark.sparse and read.annotator == "manual" and read.provenance["why"] == "by eye"
    with pytest.raises(AnnotationError, match=r"episode 2, sparse, vocabulary: unknown subtask 'reach'"):
        corrections.read_marks(tmp_path / "marks.yaml", demos, {"sparse": ["push"]})


def test_every_verdict_has_its_outcome_and_raw_annotations_stay(demos):
    raw = [annotation(demos, i) for i in range(5)]
    said = [
        corrections.of_now(raw[0], "accept"),
        fix(raw[1], 8),
        corrections.of_now(raw[2], "reject", why="fell"),
        corrections.of_now(annotation(demos, 3, boundary=9), "accept"),  # saw another annotation
        fix(annotation(demos, 4, boundary=9), 6),  # so did this one, but a fix is about the video
    ]
    reviewed = corrections.apply(raw, said, demos, NAMES)
    assert [o.outcome for o in reviewed.outcomes] == ["accepted", "fixed", "rejected", "outdated", "fixed"]
    assert reviewed.rejected == [2] and [a.episode for a in reviewed.annotations] == [0, 1, 3, 4]
    fixed = {a.episode: a for a in reviewed.annotations}
    assert fixed[1].sparse[1].start == 8 and fixed[1].annotator == "corrected" and fixed[3] == raw[3]
    assert "changed since" in reviewed.outcomes[4].note and fixed[4].sparse[1].start == 6
    assert raw == [annotation(demos, i) for i in range(5)]


def test_a_correction_that_no_longer_fits_is_reported_and_the_annotation_stands(demos):
    raw = [annotation(demos, 0)]
    said = [fix(raw[0], 6), fix(annotation(demos, 5), 6)]
    reviewed = corrections.apply(raw, said, demos, {"sparse": ["reach", "lift"]})
    assert [o.outcome for o in reviewed.outcomes] == ["unfit", "unfit"]
    assert "unknown subtask 'grasp'" in reviewed.outcomes[0].note and reviewed.annotations == raw


def test_an_episode_that_nobody_annotated_can_be_fixed(demos):
    reviewed = corrections.apply([], [fix(annotation(demos, 6), 4)], demos, NAMES)
    assert [a.episode for a in reviewed.annotations] == [6]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset: [", "is not YAML"),
        ("- 1", "needs `dataset:` and a list"),
        ("dataset: abcd\ncorrections: []", "is about another dataset (abcd"),
        ("dataset: {f}\ncorrections:\n- verdict: fix", "entry 1: needs an episode number"),
        (
            "dataset: {f}\ncorrections:\n- {{episode: 1, verdict: maybe}}",
            "verdict is accept, fix or reject, not 'maybe'",
        ),
        ("dataset: {f}\ncorrections:\n- {{episode: 1, verdict: fix}}", "a fix, and only a fix, has segments"),
        (
            "dataset: {f}\ncorrections:\n- {{episode: 1, verdict: fix, sparse: [[reach, 0, x]]}}",
            "expected [subtask, first frame, last frame], found ['reach', 0, 'x']",
        ),
        (
            "dataset: {f}\ncorrections:\n- {{episode: 1, verdict: accept}}\n- {{episode: 1, verdict: reject}}",
            "episode 1 stands there twice",
        ),
    ],
)
def test_what_cannot_be_read_is_said_and_never_written_over(demos, tmp_path, text, expected):
    path = tmp_path / "corrections.yaml"
    path.write_text(text.format(f=fingerprint(demos.root)))
    before = path.read_bytes()
    with pytest.raises(AnnotationError) as error:
        corrections.read_corrections(path, demos)
    assert expected in str(error.value) and "corrections.yaml" in str(error.value)
    with pytest.raises(AnnotationError):
        corrections.record_correction(path, demos, fix(annotation(demos, 1), 7))
    assert path.read_bytes() == before
