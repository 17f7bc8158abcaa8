"""What people say: files that keep their comments, verdicts that are never dropped, raw annotations that stay."""

import difflib
import json
import re
from dataclasses import replace

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sarm_lib import corrections, params, pipeline
from sarm_lib.annotations import Annotation, AnnotationError, Finding, Segment
from sarm_lib.dataset import fingerprint, open_dataset
from tests.conftest import ROOT, run_notebook

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


LAYOUTS = {
    "as written": """\
# two of us looked at these
dataset: {f}   # the recording of May
corrections:
  # the first one
  - episode: 3   # Ana's
    verdict: fix
    # it closes late
    sparse:   # as it should be
      - [reach, 0, 5]
      - [grasp, 6, 19]
    was:
      sparse:
        - [reach, 0, 2]
        - [grasp, 3, 19]
    why: late   # ask her

  # about five
  - episode: 5
    verdict: reject
# the rest is fine
""",
    "without indentation, the fingerprint last": """\
corrections:
- verdict: fix
  episode: 3   # Ana's
  sparse:
  - [reach, 0, 5]
  - [grasp, 6, 19]
# about five
- episode: 5
  verdict: reject   # fell

dataset: {f}
# the rest is fine""",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_line_endings_of_windows_stay(demos, tmp_path, layout):
    path = tmp_path / "corrections.yaml"
    path.write_text(layout.format(f=fingerprint(demos.root)), newline="\r\n")
    corrections.record_correction(path, demos, fix(annotation(demos, 3), 9))
    assert path.read_bytes().count(b"\r\n") == path.read_bytes().count(b"\n") > 10


@pytest.mark.parametrize("entries", ["[]", "[{{episode: 0x3, verdict: reject}}, {{episode: 5, verdict: reject}}]"])
def test_what_stands_on_one_line_is_put_on_several_and_kept(demos, tmp_path, entries):
    path = tmp_path / "corrections.yaml"
    path.write_text(("{{dataset: '{f}', corrections: " + entries + "}}").format(f=fingerprint(demos.root)))
    before = corrections.read_corrections(path, demos)
    corrections.record_correction(path, demos, fix(annotation(demos, 4), 9))
    after = corrections.read_corrections(path, demos)
    assert [c for c in after if c.episode != 4] == before and [c.episode for c in after] == sorted(
        {4, *(c.episode for c in before)}
    )


PIECES = "- : # [ ] { } ' | > & * ! % @ ` ? , ~ null 0x3 1e400 2026-02-30 2026-11-24T25:00:00 !!int !!float .nan episode verdict".split()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mangled_file_is_read_or_refused_by_name_and_never_lost(demos, tmp_path, data):
    """A file of corrections with pieces of YAML put in and lines taken out: read, or an AnnotationError that names the file;
    what can be read can be written to, and only the entry that was written is another one."""
    path = tmp_path / "corrections.yaml"
    text = data.draw(st.sampled_from(list(LAYOUTS.values()))).format(f=fingerprint(demos.root))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        gone = data.draw(st.sampled_from([0, 0, 1, 8, 40]))
        text = text[:at] + data.draw(st.sampled_from([*PIECES, "\n", " ", "\t", ""])) + text[at + gone :]
    path.write_text(text)
    try:
        before = corrections.read_corrections(path, demos)
    except AnnotationError as error:
        assert "corrections.yaml" in str(error)
        with pytest.raises(AnnotationError):
            corrections.record_correction(path, demos, fix(annotation(demos, 3), 9))
        assert path.read_text() == text
        return
    corrections.record_correction(path, demos, fix(annotation(demos, 3), 9))
    after = corrections.read_corrections(path, demos)
    assert [c for c in after if c.episode != 3] == [c for c in before if c.episode != 3]
    assert sum(c.episode == 3 for c in after) == 1


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("when: 2026-02-30", "not YAML that can be read: day is out of range"),
        ("when: 2026-11-24T25:00:00", "not YAML that can be read: hour must be in"),
        ("why: " + "[" * 5000, "nested too deeply"),
        ("why: !!int abc", "not YAML that can be read"),
        ("why: !!int", "not YAML that can be read"),
        ("why: !!float", "not YAML that can be read"),
        ("why: !!bool x", "not YAML that can be read"),
        ("when: !!timestamp x", "not YAML that can be read"),
    ],
)
def test_what_yaml_itself_chokes_on_names_the_file(demos, tmp_path, said, found):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"dataset: {fingerprint(demos.root)}\ncorrections:\n  - episode: 3\n    verdict: reject\n    {said}\n"
    )
    with pytest.raises(AnnotationError, match=r"c\.yaml is not YAML") as error:
        corrections.read_corrections(path, demos)
    assert found in str(error.value)


def test_a_key_that_does_not_belong_is_named(demos, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"dataset: {fingerprint(demos.root)}\nversion: 2\ncorrections:\n")
    with pytest.raises(AnnotationError, match=r"c\.yaml: unknown key 'version'"):
        corrections.read_corrections(path, demos)
    path.write_text(f"dataset: {fingerprint(demos.root)}\ncorrections:\n  - 3\n")
    with pytest.raises(AnnotationError, match=r"entry 1: expected keys and their values, found 3"):
        corrections.read_corrections(path, demos)


def test_what_a_mode_does_not_ask_about_waits_for_one_that_does(demos):
    """Fixes and acceptances of subtasks say nothing where the whole episode is one stage, and are not unfit there."""
    whole = {"sparse": ["task"]}
    length = demos.episodes[1].length
    given = Annotation(1, length, "single_stage", (Segment("task", 0, length - 1),), None)
    said = [fix(annotation(demos, 1), 7), corrections.of_now(annotation(demos, 3), "accept")]
    reviewed = corrections.apply(
        [given, replace(given, episode=3, length=demos.episodes[3].length, sparse=(Segment("task", 0, demos.episodes[3].length - 1),))],
        said, demos, whole,
    )  # fmt: skip
    assert [o.outcome for o in reviewed.outcomes] == ["fixed", "accepted"]
    assert reviewed.annotations[0].sparse == given.sparse


def test_a_fix_of_an_episode_that_nobody_annotated_says_which_head_it_lacks(demos):
    both = {"sparse": ["reach", "grasp"], "dense": ["go", "stop"]}
    reviewed = corrections.apply([], [fix(annotation(demos, 1), 7)], demos, both)
    assert reviewed.outcomes[0].outcome == "unfit"
    assert "nobody annotated this episode, so that its fix has to give dense segments too" in reviewed.outcomes[0].note


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_writing_an_entry_leaves_every_other_line_as_it_is(demos, tmp_path, layout):
    path = tmp_path / "corrections.yaml"
    path.write_text(layout.format(f=fingerprint(demos.root)))
    before = path.read_text()
    comments = {line.strip() for line in before.splitlines() if line.strip().startswith("#")}

    def rest(text: str) -> list[str]:
        """The lines that are not of episode 3."""
        lines = text.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(("  - ", "- ")))
        stop = next((i for i, line in enumerate(lines) if "about five" in line), None)
        return lines[:start] + [line for line in lines[stop:] if line]

    corrections.record_correction(path, demos, fix(annotation(demos, 3), 9))  # again
    after = path.read_text()
    assert {line.strip() for line in after.splitlines() if line.strip().startswith("#")} == comments
    assert rest(after) == rest(before) and "# Ana's" in after
    assert "# ask her" in after or "# ask her" not in before
    again, other = corrections.read_corrections(path, demos)
    assert again.segments["sparse"][1] == Segment("grasp", 9, 19) and other.verdict == "reject"

    corrections.record_correction(path, demos, fix(annotation(demos, 4), 7))  # between the two
    assert [c.episode for c in corrections.read_corrections(path, demos)] == [3, 4, 5]
    difference = list(difflib.ndiff(after.splitlines(), path.read_text().splitlines()))
    assert any(line.startswith("+ ") for line in difference) and not [d for d in difference if d.startswith("- ")]

    corrections.withdraw(path, "corrections", demos, 4)
    assert path.read_text() == after + "\n" * (not after.endswith("\n"))
    corrections.withdraw(path, "corrections", demos, 3)  # with it go the comments within it, and no others
    assert rest(path.read_text() + "\n")[-3:] == rest(before)[-3:]
    assert "# about five" in path.read_text() and "# the rest is fine" in path.read_text()
    corrections.withdraw(path, "corrections", demos, 5)
    assert corrections.read_corrections(path, demos) == []
    corrections.record_correction(path, demos, fix(annotation(demos, 3), 9))
    assert [c.episode for c in corrections.read_corrections(path, demos)] == [3]
    assert "# about five" in path.read_text()


@pytest.mark.parametrize(
    "listed", ["", " null", " ~  # none yet", " []", " [{{episode: 5, verdict: reject}}]  # in a line"]
)
def test_entries_in_a_line_get_lines_of_their_own(demos, tmp_path, listed):
    path = tmp_path / "corrections.yaml"
    path.write_text(f"dataset: {{f}}\ncorrections:{listed}".format(f=fingerprint(demos.root)))
    corrections.record_correction(path, demos, fix(annotation(demos, 3), 9))
    found = [c.episode for c in corrections.read_corrections(path, demos)]
    assert found == ([3, 5] if "5" in listed else [3]) and ("# in a line" in path.read_text()) == ("line" in listed)


def test_an_entry_that_others_refer_to_is_not_taken_from_them(demos, tmp_path):
    """What would leave a file that nobody can read is not written."""
    path = tmp_path / "corrections.yaml"
    entries = "  - {episode: 3, verdict: reject, why: &blurred out of focus}\n  - {episode: 5, verdict: reject, why: *blurred}\n"
    path.write_text(f"dataset: {fingerprint(demos.root)}\ncorrections:\n{entries}")
    before = path.read_text()
    with pytest.raises(AnnotationError, match=r"stays as it was: .*Does this entry refer"):
        corrections.record_correction(path, demos, fix(annotation(demos, 3), 9))
    with pytest.raises(AnnotationError, match=r"stays as it was: .*Does this entry refer"):
        corrections.record_correction(path, demos, fix(annotation(demos, 5), 9))
    assert path.read_text() == before and len(corrections.read_corrections(path, demos)) == 2
    with pytest.raises(AnnotationError, match="a folder: name a file"):
        corrections.read_corrections(tmp_path, demos)


def test_a_rejection_keeps_the_fix_before_it_and_gives_it_back(demos, tmp_path):
    path, raw = tmp_path / "corrections.yaml", annotation(demos, 6)
    corrections.record_correction(path, demos, fix(raw, 4))
    (fixed,) = corrections.read_corrections(path, demos)
    for heads in (corrections.HEADS, ()):  # also in an annotation mode that asks about no head
        corrections.record_correction(path, demos, corrections.of_now(raw, "reject", why="blurred"), heads)
        (rejected,) = corrections.read_corrections(path, demos)
        assert rejected.verdict == "reject" and rejected.why == "blurred" and rejected.segments == fixed.segments
        assert corrections.apply([raw], [rejected], demos, NAMES).rejected == [6]
        assert corrections.withdraw(path, "corrections", demos, 6, heads)
        (again,) = corrections.read_corrections(path, demos)
        assert (again.verdict, again.segments, again.was) == ("fix", fixed.segments, fixed.was)
        assert again.why == "", "the rejection's reason is none for the fix"
    corrections.record_correction(path, demos, corrections.of_now(raw, "reject"))
    corrections.record_correction(path, demos, corrections.of_now(raw, "accept"))
    (accepted,) = corrections.read_corrections(path, demos)
    assert accepted.verdict == "accept" and not accepted.segments, "a person has decided otherwise"


def test_marks_are_annotations(demos, tmp_path):
    mark = annotation(demos, 2)
    corrections.record_mark(tmp_path / "marks.yaml", demos, mark, why="by eye")
    (read,) = corrections.read_marks(tmp_path / "marks.yaml", demos, NAMES)
    assert read.sparse == mark.sparse and read.annotator == "manual" and read.provenance["why"] == "by eye"
    with pytest.raises(AnnotationError, match=r"marks.yaml: episode 2, sparse, coverage"):
        corrections.record_mark(tmp_path / "marks.yaml", demos, replace(mark, sparse=mark.sparse[:1]))
        corrections.read_marks(tmp_path / "marks.yaml", demos, NAMES)


def test_a_renamed_subtask_is_answered_with_what_to_write_where(demos, tmp_path):
    path = tmp_path / "marks.yaml"
    for episode in (2, 4):
        corrections.record_mark(path, demos, annotation(demos, episode))
    with pytest.raises(AnnotationError) as error:
        corrections.read_marks(path, demos, {"sparse": ["reach", "close"]})
    for part in (
        "marks.yaml, episode 2, sparse: 'grasp' is none of annotate.sparse_subtasks (reach, close)",
        "write 'close' in place of 'grasp' throughout marks.yaml (2 times, episodes 2, 4)",
    ):
        assert part in str(error.value)
    path.write_text(path.read_text().replace("grasp", "close"))  # what it says helps
    assert len(corrections.read_marks(path, demos, {"sparse": ["reach", "close"]})) == 2
    with pytest.raises(AnnotationError, match="write one of 'push', 'pull' in place of 'reach'"):
        corrections.read_marks(path, demos, {"sparse": ["push", "pull", "close"]})


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
    assert reviewed.accepted == [0] and [o.episode for o in reviewed.unsettled] == [3]
    assert reviewed.rejected == [2] and [a.episode for a in reviewed.annotations] == [0, 1, 3, 4]
    fixed = {a.episode: a for a in reviewed.annotations}
    assert fixed[1].sparse[1].start == 8 and fixed[1].annotator == "corrected" and fixed[3] == raw[3]
    assert "changed since" in reviewed.outcomes[4].note and fixed[4].sparse[1].start == 6
    assert raw == [annotation(demos, i) for i in range(5)]


def test_what_the_gate_refuses_waits_for_a_person_and_a_person_s_word_stands_above_it(demos):
    raw = [annotation(demos, i) for i in range(4)]
    raw[0] = replace(raw[0], annotator="manual")
    said = [corrections.of_now(raw[1], "accept"), fix(raw[2], 8)]
    findings = [Finding(i, "sparse", "grasp", "unlikely duration", "too long") for i in range(4)]
    reviewed = corrections.refuse(corrections.apply(raw, said, demos, NAMES), findings)
    assert reviewed.refused == (findings[3],) and [a.episode for a in reviewed.annotations] == [0, 1, 2]
    assert reviewed.accepted == [1] and reviewed.rejected == []
    outdated = corrections.of_now(annotation(demos, 3, boundary=9), "accept")  # saw another annotation
    again = corrections.refuse(corrections.apply(raw, [*said, outdated], demos, NAMES), findings)
    assert again.refused == (findings[3],)


@pytest.mark.parametrize("seen", [(), ("sparse",)])
def test_an_acceptance_that_does_not_say_of_what_waits_for_a_new_look(demos, seen):
    """One written by hand, or of one head alone, could never become outdated by the other."""
    both = {"sparse": ["reach", "grasp"], "dense": ["reach", "grasp"]}
    given = replace(annotation(demos, 2), dense=annotation(demos, 2).sparse)
    bare = corrections.Correction(2, "accept", {}, {head: given.head(head) for head in seen})
    (outcome,) = corrections.apply([given], [bare], demos, both).outcomes
    assert outcome.outcome == "outdated" and "dense segments were accepted" in outcome.note
    (outcome,) = corrections.apply([given], [replace(bare, was={h: given.head(h) for h in both})], demos, both).outcomes
    assert outcome.outcome == "accepted"


def test_a_fix_of_heads_that_nobody_asks_about_makes_no_annotation_a_person_s(demos):
    given = replace(annotation(demos, 1), sparse=(Segment("task", 0, demos.episodes[1].length - 1),))
    given = replace(given, dense=annotation(demos, 1).sparse, annotator="x")
    names = {"sparse": ["task"], "dense": ["reach", "grasp"]}
    reviewed = corrections.apply([given], [fix(annotation(demos, 1), 7)], demos, names)  # of the sparse head
    assert reviewed.outcomes[0].outcome == "unfit" and "says nothing of dense segments" in reviewed.outcomes[0].note
    assert reviewed.annotations == [given]


@pytest.mark.parametrize(("moved", "outcome"), [(1, "accepted"), (2, "outdated")])
def test_an_acceptance_survives_what_nobody_sees(moved, outcome, demos):
    """At 10 frames a second, one frame: so much may differ where another processor trained the annotator."""
    raw = annotation(demos, 0)
    seen = annotation(demos, 0, boundary=raw.sparse[1].start + moved)
    (found,) = corrections.apply([raw], [corrections.of_now(seen, "accept")], demos, NAMES).outcomes
    assert found.outcome == outcome


def test_a_correction_that_no_longer_fits_is_reported_and_the_annotation_stands(demos):
    raw = [annotation(demos, 0)]
    said = [fix(raw[0], 6), fix(annotation(demos, 5), 6)]
    reviewed = corrections.apply(raw, said, demos, {"sparse": ["reach", "lift"]})
    assert [o.outcome for o in reviewed.outcomes] == ["unfit", "unfit"]
    assert "unknown subtask 'grasp'" in reviewed.outcomes[0].note and reviewed.annotations == raw
    assert "rename it in this correction too" in reviewed.outcomes[0].note
    assert reviewed.unsettled == reviewed.outcomes and reviewed.accepted == []
    of_another_mode = corrections.apply(raw, [fix(raw[0], 6)], demos, {"dense": ["reach", "grasp"]})
    assert "has segments, and the annotation mode only dense" in of_another_mode.unsettled[0].note


def test_an_episode_that_nobody_annotated_can_be_fixed(demos):
    reviewed = corrections.apply([], [fix(annotation(demos, 6), 4)], demos, NAMES)
    assert [a.episode for a in reviewed.annotations] == [6]
    unseen = replace(fix(annotation(demos, 6), 4), was={})
    assert corrections.apply([], [unseen], demos, NAMES).outcomes[0].note == "late", "nothing has changed beneath it"


def test_a_link_to_a_file_elsewhere_stays_one(demos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "corrections.yaml", tmp_path / "elsewhere/ours.yaml"
    target.write_text(f"dataset: {demos.fingerprint}\ncorrections:\n")
    link.symlink_to(target)
    corrections.record_correction(link, demos, fix(annotation(demos, 3), 9))
    assert link.is_symlink() and [c.episode for c in corrections.read_corrections(target, demos)] == [3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset: [", "is not YAML"),
        ("- 1", "needs `dataset:` and a list"),
        ("dataset: abcd\ncorrections: []", "is about another dataset (abcd"),
        ("dataset: {f}\ncorrections:\n- verdict: fix", "entry 1, episode: field required"),
        ("dataset: {f}\ncorrections:\n- {{episode: -1, verdict: reject}}", "episode -1, episode: input should be"),
        ("dataset: {f}\ncorrections:\n- reject", "entry 1: expected keys and their values, found 'reject'"),
        ("dataset: {f}\ncorrections: 3", "needs `dataset:` and a list"),
        ("dataset: {f}\ncorrections: []\nmarks: []", "unknown key 'marks'"),
        (
            "dataset: {f}\ncorrections:\n- {{episode: 1, verdict: maybe}}",
            "episode 1, verdict: input should be 'accept', 'fix' or 'reject', found 'maybe'",
        ),
        (  # a misspelled key would lose the fix
            "dataset: {f}\ncorrections:\n- {{episode: 1, verdict: fix, sparse: [[reach, 0, 9]], dens: [[a, 0, 9]]}}",
            "episode 1, dens: unknown key",
        ),
        (
            "dataset: {f}\ncorrections:\n- {{episode: 1, verdict: accept, was: [[reach, 0, 9]]}}",
            "episode 1, was: expected keys and their values, found",
        ),
        (
            "dataset: {f}\ncorrections:\n- {{episode: 1, verdict: accept, was: {{sparse: [[reach, 0]]}}}}",
            "episode 1, was, sparse: expected [subtask, first frame, last frame], found ['reach', 0]",
        ),
        ("dataset: {f}\ncorrections:\n- {{episode: 1, verdict: fix}}", "a fix has segments under sparse: or dense:"),
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


@pytest.mark.parametrize("kind", ["marks", "corrections"])
def test_the_documented_example_fits_the_documented_schema_which_is_the_codes(demos, tmp_path, kind):
    text = (ROOT / "docs/annotations.md").read_text()
    _, example, schema = re.search(
        rf"## {kind.title()}\n(.*?)```yaml\n(.*?)```.*?```json\n(.*?)```", text, re.DOTALL
    ).groups()
    assert json.loads(schema) == corrections.json_schema(kind)
    jsonschema.validate(yaml.safe_load(example), json.loads(schema))
    path = tmp_path / "example.yaml"
    path.write_text(re.sub("dataset: [0-9a-f]+", f"dataset: {fingerprint(demos.root)}", example))
    assert corrections.episodes_in(path, kind, demos) == {"marks": [21], "corrections": [12, 30]}[kind]
    broken_ways = [{"dens": []}, {"episode": "12"}, {"sparse": [["a", 0]]}, {"dense": [["a", -1, 5]]}]
    if kind == "corrections":  # the example's first one is a fix
        broken_ways += [{"dense": None}, {"verdict": "accept"}]
    for broken in broken_ways:
        content = yaml.safe_load(example)
        content[kind][0] |= broken
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content, json.loads(schema))


def test_the_schema_fits_what_is_written(demos, tmp_path):
    corrections.record_mark(tmp_path / "marks.yaml", demos, annotation(demos, 2), why="by eye")
    for correction in (fix(annotation(demos, 3), 7), corrections.of_now(annotation(demos, 4), "reject")):
        corrections.record_correction(tmp_path / "corrections.yaml", demos, correction)
    for kind in ("marks", "corrections"):
        jsonschema.validate(corrections.contents(tmp_path / f"{kind}.yaml"), corrections.json_schema(kind))


def test_files_of_another_dataset_stop_the_pipeline_before_it_begins(in_project, tmp_path):
    config, dataset = in_project
    files = {"marks": tmp_path / "m.yaml", "corrections": tmp_path / "c.yaml"}
    config = config.model_copy(
        update={
            "annotate": config.annotate.model_copy(update={"marks": str(files["marks"])}),
            "verify": config.verify.model_copy(update={"corrections": str(files["corrections"])}),
        }
    )
    name = fingerprint(dataset.root)
    pipeline.check_people(config, name)  # no files: nothing is wrong
    for kind, path in files.items():
        path.write_text(f"dataset: elsewhere\n{kind}: []\n")
    with pytest.raises(SystemExit) as error:
        pipeline.check_people(config, name)
    for kind, path in files.items():
        assert f"{path.name} is about another dataset (elsewhere, this one is {name})" in str(error.value)
        assert f"`dataset: {name}` in {path}" in str(error.value) and corrections.KEYS[kind] in str(error.value)
    pipeline.check_people(config, None)  # a dataset of the Hub: the stages ask


def test_half_an_emoji_of_a_person_s_can_be_written_and_read_again(demos, tmp_path):
    path, given = tmp_path / "c.yaml", annotation(demos, 1)
    corrections.record_correction(path, demos, corrections.of_now(given, "accept", why="fine"))
    path.write_text(path.read_text().replace("fine", '"\\ud83d"'))
    (read,) = corrections.read_corrections(path, demos)
    assert read.why == "?"


@pytest.mark.parametrize("text", ["", "# mine", "# mine\n", "~", "null\n", "--- # mine\n...\n", "# mine\n\nnull # x"])
def test_a_file_that_says_nothing_is_begun(demos, tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert corrections.read_corrections(path, demos) == []
    given = fix(annotation(demos, 3), 9)
    corrections.record_correction(path, demos, given)
    (said,) = corrections.read_corrections(path, demos)
    assert said.segments == given.segments
    assert path.read_text().startswith("# mine\n") == text.startswith("# mine")


def test_comments_beside_the_rows_of_a_head_that_is_kept_stay(demos, tmp_path):
    path, given = tmp_path / "c.yaml", fix(annotation(demos, 3), 9)
    corrections.record_correction(path, demos, given)
    row = path.read_text().splitlines()[5]
    path.write_text(path.read_text().replace(row, f"{row}  # slips here", 1))
    corrections.record_correction(path, demos, replace(given, verdict="accept", segments={}), heads=("dense",))
    assert f"{row}  # slips here\n" in path.read_text() and "verdict: fix" in path.read_text()


def test_marks_that_lack_a_head_wait_until_it_is_marked(demos, tmp_path, caplog, monkeypatch):
    """Marked in `dense_only`, asked for in `dual`."""
    path, both = tmp_path / "m.yaml", {"sparse": ["reach", "grasp"], "dense": ["near", "close"]}
    whole, half = annotation(demos, 1), annotation(demos, 2)
    dense = (Segment("near", 0, 4), Segment("close", 5, whole.length - 1))
    corrections.record_mark(path, demos, replace(whole, dense=dense))
    corrections.record_mark(path, demos, half)
    assert [mark.episode for mark in corrections.read_marks(path, demos, both)] == [1]
    assert corrections.unfinished(path, demos, both) == {2: {"sparse": half.sparse}}
    config = params.load(ROOT / "params.yaml", {"annotate.marks": str(path), "base.annotation_mode": "dual"})
    monkeypatch.setattr(corrections, "vocabulary", lambda _: both)
    assert [mark.episode for mark in corrections.marks_from_params(config, demos)] == [1]
    assert "m.yaml: nothing is marked for the dense head of episodes 2" in caplog.text
    assert "the sparse head" not in caplog.text


BY_HAND = [
    "# mine\n",
    "    dataset: {name}\n    corrections:\n",
    '{{\n "dataset": "{name}",\n "corrections":\n}}\n',
    "dataset: {name}\ncorrections: !!null\n",
    """\
# looked at on a Friday
dataset: {name}
corrections:  # by two people

  - episode: 5  # slips
    verdict: accept
    # what was there
    was: {{sparse: [[reach, 0, 9], [grasp, 10, 19]]}}
    why: &said "pick & place"
  # the other one
  - episode: 2
    verdict: reject
    why: *said
# the end
""",
    """\
dataset: {name}
corrections:
- {{"episode": 1, "verdict": "accept", "was":&w {{"sparse": [["reach", 0, 19]]}}}}
- {{"episode": 4, "verdict": "accept", "was":*w }}
""",
    """\
dataset: {name}
corrections:
  - episode: 3
    verdict: reject
    why: |
      see
      # 3 of the list
  # the one below was hard
  - episode: 1
    verdict: reject
    why: |+
      twice


""",
    "\ufeff%YAML 1.1\n---\ndataset: {name}\ncorrections:\n- {{episode: 1, verdict: reject, why: yes}}\n",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(BY_HAND),
    st.lists(
        st.tuples(
            st.integers(0, 6),
            st.sampled_from(["accept", "fix", "reject", "withdraw"]),
            st.sampled_from(
                ["", "*starred", "a: b & c", "# no comment", "2026-11-27", "yes", "\n- episode: 3", "打开抽屉"]
            ),
        ),
        max_size=8,
    ),
)
def test_what_is_known_of_a_file_without_reading_it_again_is_what_it_says(demos, tmp_path, by_hand, steps):
    """And what people wrote of other episodes stays as it was."""
    path = tmp_path / "c.yaml"
    path.write_text(by_hand.format(name=demos.fingerprint))
    for episode, verdict, why in steps:
        given, before = annotation(demos, episode), path.read_text()
        others = [entry for entry in (corrections._parsed(before)[1] or {}).get("corrections") or []]
        try:
            if verdict == "withdraw":
                corrections.withdraw(path, "corrections", demos, episode)
            else:
                said = {"sparse": given.sparse} if verdict == "fix" else {}
                made = corrections.of_now(given, verdict, said, why)
                assert corrections.record_correction(path, demos, made) == verdict
        except AnnotationError as error:  # another entry refers to this one, or the form of the file allows no more
            assert "& and *" in str(error) and path.read_text() == before
        text = path.read_text()
        known, (nodes, values) = corrections._read(text), corrections._parsed(text)
        assert known.values == values
        entries = (values or {}).get("corrections") or []
        assert [e for e in entries if e["episode"] != episode] == [e for e in others if e["episode"] != episode]
        if entries:
            numbers = [entry["episode"] for entry in entries]
            assert corrections._cut(text, "corrections", numbers) == corrections._cut_at(
                nodes, text, "corrections", numbers
            )


def test_names_that_yaml_cannot_hold_are_refused_and_the_file_stays(demos, tmp_path):
    path = tmp_path / "c.yaml"
    for episode in (1, 2):
        corrections.record_correction(path, demos, corrections.of_now(annotation(demos, episode), "accept"))
    before = path.read_text()
    for name in (": >x", ": b", "?!x"):
        odd = replace(annotation(demos, 1), sparse=(Segment(name, 0, annotation(demos, 1).length - 1),))
        try:
            corrections.record_correction(path, demos, corrections.of_now(odd, "accept"))
        except AnnotationError:
            assert path.read_text() == before
        else:
            assert corrections.read_corrections(path, demos)[0].was["sparse"] == odd.sparse
        path.write_text(before)


def test_a_verdict_beside_others_reads_none_of_them_again(demos, tmp_path, monkeypatch):
    path, parsed, read = tmp_path / "c.yaml", corrections._parsed, []
    for episode in (1, 5, 3):
        corrections.record_correction(path, demos, corrections.of_now(annotation(demos, episode), "accept"))
    monkeypatch.setattr(corrections, "_parsed", lambda text: read.append(text) or parsed(text))
    for verdict in ("reject", "accept"):
        corrections.record_correction(path, demos, corrections.of_now(annotation(demos, 3), verdict))
    assert len(read) == 2 and all("episode: 3" in text and "episode: 5" not in text for text in read)
    assert [c.verdict for c in corrections.read_corrections(path, demos)] == ["accept"] * 3


def test_corrections_that_are_not_used_are_told_on_the_console(demos, caplog):
    given = [annotation(demos, 1), annotation(demos, 2)]
    fits = corrections.of_now(given[0], "reject")
    unfit = corrections.of_now(given[1], "fix", {"sparse": (Segment("nobody", 0, given[1].length - 1),)})
    corrections.tell(corrections.apply(given, [fits], demos, NAMES))
    assert caplog.text == ""
    corrections.tell(corrections.apply(given, [fits, unfit], demos, NAMES))
    assert "1 of 2 corrections wait for a new look (episodes 2)" in caplog.text


def test_nothing_is_learned_from_rejected_episodes(in_project):
    config, dataset = in_project
    path = config.paths.read("rejected.json", "02")
    kept, victim = path.read_text(), dataset.split("train")[0]
    assert corrections.without_rejected(dataset, config) == dataset and json.loads(kept)["episodes"] == []
    reviewed = corrections.apply(
        [], [corrections.Correction(victim.index, "reject", {}, {})], dataset, {"sparse": ["reach", "grasp"]}
    )
    try:
        corrections.write_rejected(path, dataset, reviewed)
        left = corrections.without_rejected(dataset, config)
        page = run_notebook(config.paths.root, "05_compute_rabc", {"base.device": "cpu"})
        path.write_text(json.dumps({"dataset": "another", "episodes": [victim.index]}))
        assert corrections.without_rejected(dataset, config) == dataset
    finally:
        path.write_text(kept)
        run_notebook(config.paths.root, "05_compute_rabc", {"base.device": "cpu"})
    assert [e.index for e in left.split("rejected")] == [victim.index]
    assert victim.index not in {e.index for e in left.split("train")} and len(left.episodes) == len(dataset.episodes)
    assert victim.index not in page["train"] and victim.index not in set(page["ranking"].episode)
    assert len(page["weights"].weight) == dataset.num_frames, "rejected frames are weighted all the same"
