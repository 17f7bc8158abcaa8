"""The question to a vision-language model, and the whole path of a local one on a tiny Qwen3-VL."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sarm_lib import annotations, annotators
from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.annotators import Failure, question
from sarm_lib.annotators.vlm import VlmAnnotator, _files
from sarm_lib.dataset import open_dataset
from tests.conftest import ROOT
from tests.tiny_vlm import MANY, VOCABULARY, Clips, ask_here, kill_and_go_on, make_tokenizer, make_vlm

NAMES = VOCABULARY["dense"]
LENGTHS = [5, 14, 16, 20, 35, 60, 90, 121]


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    return make_vlm(tmp_path_factory.mktemp("vlm") / "tiny")


# --- the question ---------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 5000),
    st.sampled_from([4, 5, 10, 12, 15, 24, 25, 30, 40, 50]),
    st.floats(0.1, 10),
    st.integers(2, 200),
)
def test_frames_are_shown_from_first_to_last_under_their_true_times(length, fps, frames_per_second, max_frames):
    frames = question.frames_to_show(length, fps, frames_per_second, max_frames)
    assert frames[0] == 0 and length - 1 - fps / 10 - 0.5 <= frames[-1] <= length - 1
    assert frames == sorted(set(frames)) and len(frames) <= max_frames
    said = [float(re.fullmatch(r"<([0-9.]+) seconds>", question.stamp(frame, fps))[1]) for frame in frames]
    off = max(abs(time - frame / fps) for time, frame in zip(said, frames))
    assert off <= min(0.05, 0.5 / fps) + 1e-9 and (fps % 10 or off < 1e-9)
    apart = [b - a for a, b in itertools.pairwise(frames)] or [0]
    assert max(apart) - min(apart) <= 0.2 * fps + 2  # evenly: each to half a tenth and half a frame


def test_a_short_episode_is_asked_finely_and_a_long_one_within_a_second():
    for seconds, size in ((2, "0.1"), (90, "0.1"), (150, "0.1"), (300, "0.2"), (750, "0.5"), (7500, "5")):
        steps = question.time_steps(30 * seconds, 30, 0.1)
        assert steps.size == Decimal(size)
        assert len(steps.texts) <= question.MAX_STEPS and steps.max_segments <= question.MAX_SEGMENTS
        assert float(steps.texts[-1]) == pytest.approx(seconds - steps.gap * float(steps.size))


def test_steps_that_are_coarser_than_wanted_are_told_with_the_estimate(vlm):
    dataset = Clips([100, 20_000], fps=10)
    asked = ask_here(vlm, dataset)
    assert asked.coarse(dataset.episodes[:1]) == ""
    assert "1 of the episodes: more than 1500 steps" in asked.coarse(dataset.episodes)
    assert "steps of up to 2 s. 1 of the episodes: an answer has at most 200 segments" in asked.coarse(dataset.episodes)
    assert str(asked.estimate(dataset.episodes)).endswith("none that lasts less than 10 s in the longest of them")


@pytest.mark.parametrize(("seconds", "least"), [(2, None), (20, None), (40, "0.2"), (90, "0.5"), (600, "3.0")])
def test_how_short_a_segment_can_be_named_is_told_where_the_video_is_too_long_for_shorter_ones(vlm, seconds, least):
    dataset = Clips([30 * seconds], fps=30)
    told = ask_here(vlm, dataset).coarse(dataset.episodes)
    assert told.endswith(f"none that lasts less than {least} s in the longest of them") if least else told == ""


@pytest.mark.parametrize(
    "wrapped", ["```json\n{}\n```", "```\n{}```", "<think>Let me see: {{}}</think>\n\n{}", " {}\n"]
)
def test_an_answer_is_found_in_what_a_model_writes_around_it(wrapped):
    answer = json.dumps({"segments": [{"start": 0.0, "subtask": NAMES[0]}]})
    (segment,) = question.parse(wrapped.format(answer), NAMES, 20, 10)
    assert (segment.subtask, segment.start, segment.end) == (NAMES[0], 0, 19)


def valid(text: str, length: int, fps: float) -> bool:
    """Whether `parse` accepts; what it accepts must pass the gate and cover the episode."""
    try:
        segments = question.parse(text, NAMES, length, fps)
    except AnnotationError as error:
        assert str(error)
        return False
    annotations.validate(Annotation(0, length, "test", None, segments), {"dense": NAMES}, length)
    assert segments[0].start == 0 and segments[-1].end == length - 1
    assert all(before.end + 1 == after.start for before, after in itertools.pairwise(segments))
    return True


@settings(max_examples=1000, deadline=None)
@given(st.text())
@example("[" * 100_000)
@example('{"segments": [{"start": ' + "9" * 5000 + "}]}")
@example('{"segments": [{"start": NaN, "subtask": "reach the nut"}]}')
@example('{"segments": [{"start": 1e999, "subtask": "reach the nut"}]}')
@example('{"segments": [{"start": false, "subtask": "reach the nut"}]}')
@example('{"segments": [{"start": 0, "subtask": ["reach the nut"]}]}')
@example('{"segments": [{"start": 0, "subtask": "\\ud800"}]}')
def test_any_text_is_refused_with_a_reason_or_valid(text):
    valid(text, 20, 10)


ODD = [None, True, False, "", "0", "reach the nut", float("nan"), float("inf"), -0.1, 1.94, 1.96, 2, 1e300, [], {}]
HARM = st.sampled_from(
    ["", "earlier", "later", "swap", "rename", "drop", "repeat", "odd", "missing", "extra", "other", "byte"]
)


def means(text: str, length: int, fps: int) -> list[tuple[str, int]] | None:
    """Names and first frames of an answer, in exact decimals; None where it breaks a rule of the prompt."""
    try:
        answer = json.loads(text, parse_float=Decimal, parse_constant=str)
    except ValueError:
        return None
    answer = answer.get("segments") if isinstance(answer, dict) else answer
    if not isinstance(answer, list) or not all(
        isinstance(s, dict) and s.keys() == {"start", "subtask"} for s in answer
    ):
        return None
    if not all(type(s["start"]) in (int, Decimal) and s["subtask"] in NAMES for s in answer):
        return None
    if not all(0 <= s["start"] < Decimal(length) / fps for s in answer):
        return None
    said = [(s["subtask"], round(s["start"] * fps)) for s in answer]
    edges = [*(frame for _, frame in said), length]
    return said if edges[0] == 0 and all(b - a >= 2 for a, b in itertools.pairwise(edges)) else None


def answer_of(length: int, fps: int, harm: tuple[str, ...], dice: Random) -> str:
    """A valid answer, then harmed."""
    starts = [0, *sorted(dice.sample(range(2, length - 1, 2), dice.randrange(1, 4)))]
    answer = [{"start": start / fps, "subtask": dice.choice(NAMES)} for start in starts]
    for how in harm:
        if not answer:
            break
        here, key = dice.choice(answer), dice.choice(["start", "subtask"])
        match how:
            case "earlier" | "later" if isinstance(here.get("start"), float):
                step = dice.choice([0.04, 0.1, 0.25, 1.0])
                here["start"] = round(here["start"] + (step if how == "later" else -step), 2)
            case "swap":
                there = dice.choice(answer)
                here[key], there[key] = there.get(key), here.get(key)
            case "rename":
                here["subtask"] = dice.choice([*NAMES, *NAMES, "reach", VOCABULARY["sparse"][0]])
            case "drop":
                answer.remove(here)
            case "repeat":
                answer.append(dict(here))
            case "odd":
                here[key] = dice.choice(ODD)
            case "missing":
                here.pop(key, None)
            case "extra":
                here["end"] = 2.0
    if "other" in harm:
        answer = dice.choice([dice.choice(ODD), [*answer, dice.choice(ODD)]])
    text = json.dumps({"segments": answer} if dice.random() < 0.8 else answer)
    if "byte" in harm:
        at = dice.randrange(len(text))
        text = text[:at] + dice.choice('01259.,-e"}] \x00') + text[at + 1 :]
    return text


def test_an_answer_is_understood_exactly_where_it_keeps_the_rules():
    seen = Counter()

    @settings(max_examples=2000)
    @given(st.sampled_from([10, 20]), st.tuples(HARM, HARM), st.integers(0, 2**32))
    def judge(fps, harm, seed):
        text = answer_of(20, fps, harm, Random(seed))
        meant = means(text, 20, fps)
        understood = valid(text, 20, fps)
        assert understood == (meant is not None)
        if understood:
            assert [(s.subtask, s.start) for s in question.parse(text, NAMES, 20, fps)] == meant
        seen[any(harm), understood] += 1

    judge()
    assert not seen[False, False]
    assert min(seen[True, True], seen[True, False]) > 0.1 * seen.total()  # neither answer is a rare one


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ([(0.0, "grab")], "segment 1: unknown subtask 'grab'; known are reach the nut, grasp the nut"),
        ([(0.3, NAMES[0])], "segment 1 ('reach the nut') starts at 0.3 seconds; the first has to start at 0"),
        ([(0, NAMES[0]), (0.1, NAMES[1])], "which starts at 0, by two frames (0.200 seconds) or more"),
        ([(0, NAMES[0]), (2.0, NAMES[1])], "starts at 2.0, not a time from 0 to 2.00 seconds"),
        ([(0, NAMES[0]), (1.9, NAMES[1])], "the last segment starts at 1.9 seconds, where the video ends"),
        ([], "or an empty one"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(segments, reason):
    text = json.dumps({"segments": [{"start": time, "subtask": name} for time, name in segments]})
    with pytest.raises(AnnotationError) as error:
        question.parse(text, NAMES, 20, 10)
    assert reason in str(error.value)


@pytest.fixture(scope="session")
def compiler():
    import xgrammar

    tokenizer = make_tokenizer()
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=0))


def accepts(compiled, text: str) -> bool:
    import xgrammar

    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    return matcher.accept_string(text) and matcher.is_terminated()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_grammar_accepts_what_is_valid_and_nothing_else(compiler, data):
    fps = data.draw(st.sampled_from([5, 10, 24, 30]))
    length = data.draw(
        st.integers(2, 60) | st.integers(90, 130) | st.integers(990, 1100)
    )  # 1 to 3 digits before the point
    resolution = data.draw(st.sampled_from([1, 2.5] if length > 200 else [0.05, 0.1, 0.25, 1]))
    steps = question.time_steps(length, fps, resolution)
    compiled = compiler.compile_grammar(question.grammar(NAMES, steps))
    chosen = data.draw(st.lists(st.integers(1, len(steps.texts) + 3), max_size=4))
    if data.draw(st.booleans()):
        chosen = sorted(set(chosen))
    chosen = [0, *chosen] if data.draw(st.booleans()) else chosen
    names = [data.draw(st.sampled_from([*NAMES, "grab"])) for _ in chosen]
    size, places = steps.size, len(steps.texts[0]) - 2
    items = (
        f'{{"start": {i * size:.{places}f}, "subtask": {json.dumps(n, ensure_ascii=False)}}}'
        for i, n in zip(chosen, names)
    )
    text = f'{{"segments": [{", ".join(items)}]}}'
    apart = all(b - a >= steps.gap for a, b in itertools.pairwise(chosen)) and chosen[:1] == [0]
    inside = apart and chosen[-1] < len(steps.texts) and "grab" not in names
    assert accepts(compiled, text) == inside
    if inside:
        assert valid(text, length, fps)
        assert len(text.encode()) < question.max_tokens(NAMES, steps)


def test_the_longest_answer_fits():
    steps = question.time_steps(400, 40, 0.1)
    name = max(NAMES, key=lambda name: len(json.dumps(name, ensure_ascii=False).encode()))
    starts = [float(text) for text in steps.texts[:: steps.gap]]
    text = json.dumps({"segments": [{"start": t, "subtask": name} for t in starts]}, ensure_ascii=False)
    assert len(starts) == steps.max_segments and valid(text, 400, 40)
    assert len(text.encode()) < question.max_tokens(NAMES, steps)


def test_a_schema_is_small_however_long_the_episode(compiler):
    for length in (20, 900, 90_000):
        schema = question.json_schema(NAMES, question.time_steps(length, 30, 0.1))
        compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        assert accepts(compiled, '{"segments": [{"start": 0.0, "subtask": "reach the nut"}]}')
        assert not accepts(compiled, '{"segments": [{"start": 0.0, "subtask": "grab"}]}')
        assert len(json.dumps(schema)) < 10_000


# --- the local model ------------------------------------------------------------------------------------------------


def test_hundreds_of_answers_are_valid(vlm):
    dataset = Clips(LENGTHS * 20)
    asked = ask_here(vlm, dataset, batch_size=80, temperature=1.5, frames_per_second=1)
    results = list(asked.annotate(dataset.episodes))
    assert [result.episode for result in results] == list(range(160))
    answers = 0
    for result in results:
        annotations.validate(result, VOCABULARY, dataset.episodes[result.episode].length)
        for head in VOCABULARY:
            said = result.provenance["answers"][head]
            assert asked.question(dataset.episodes[result.episode], head).parse(said["answer"]) == result.head(head)
            assert said["refused"] == [] and said["prompt"].startswith("The video shows")
            answers += 1
    assert answers == 320
    names = [[s.subtask for s in result.dense] for result in results]
    assert len({tuple(n) for n in names}) > 50 and any(len(n) > len(set(n)) for n in names)
    assert {name for n in names for name in n} == set(NAMES)
    assert json.loads(json.dumps(results[0].provenance)) == results[0].provenance
    assert str(vlm.parent) not in json.dumps(results[0].provenance)


def test_frames_reach_the_model_with_their_true_times(vlm):
    dataset = Clips([46, 31], fps=30)
    asked = ask_here(vlm, dataset, frames_per_second=10)
    questions = [asked.question(episode, "dense") for episode in dataset.episodes]
    clips = [(asked.shown(episode), asked.frames(episode)) for episode in dataset.episodes]
    inputs = asked._loaded.inputs(questions, clips)
    counts = inputs["video_grid_thw"][:, 0].tolist()
    assert counts == [len(indices) for indices, _ in clips] == [16, 11]
    tokenizer = asked._loaded.processor.tokenizer
    per_frame = inputs["video_grid_thw"][0, 1:].prod().item()
    pixels = inputs["pixel_values_videos"].reshape(sum(counts), per_frame, -1).mean((1, 2))
    for row, (indices, frames) in enumerate(clips):
        text = tokenizer.decode(inputs["input_ids"][row])
        stamps = re.findall(r"<([0-9.]+) seconds><\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>", text)
        assert [float(stamp) for stamp in stamps] == pytest.approx([index / 30 for index in indices])
        assert [f"<{stamp} seconds>" for stamp in stamps] == [question.stamp(index, 30) for index in indices]
        assert text.count("<|video_pad|>") == counts[row] * per_frame // 4
        assert f'"{dataset.tasks[row]}"' in text and text.endswith("<|im_start|>assistant\n")
        grey = (pixels[sum(counts[:row]) :][: counts[row]] + 1) * 127.5
        assert grey.tolist() == pytest.approx(frames.mean((1, 2, 3)).tolist(), abs=0.01)


def test_an_answer_depends_on_the_seed_and_not_on_its_batch(vlm):
    dataset = Clips([20, 14, 8])
    together, alone = (list(ask_here(vlm, dataset, batch_size=n).annotate(dataset.episodes)) for n in (3, 1))
    assert together == alone
    again = list(ask_here(vlm, dataset, seed=1).annotate(dataset.episodes))
    assert [result.dense for result in again] != [result.dense for result in together]


def test_greedy_answers_repeat(vlm):
    dataset = Clips([8, 12])
    first, second = (list(ask_here(vlm, dataset, temperature=0.0, seed=s).annotate(dataset.episodes)) for s in (0, 1))
    assert [(r.sparse, r.dense) for r in first] == [(r.sparse, r.dense) for r in second]


def test_a_mixture_of_experts_answers_too(tmp_path):
    dataset = Clips([20, 30])
    asked = ask_here(make_vlm(tmp_path / "moe", experts=True), dataset)
    assert all(isinstance(result, Annotation) for result in asked.annotate(dataset.episodes))
    needs = asked.estimate(dataset.episodes)
    assert "_loaded" not in vars(asked), "the model stays when it is needed no more"
    experts = sum(p.numel() for n, p in asked._loaded.model.named_parameters() if ".experts." in n)
    assert needs.parameters == asked._loaded.model.num_parameters()
    assert needs.active_parameters == needs.parameters - experts / 2


def test_a_head_of_one_stage_is_not_asked_about(vlm):
    dataset = Clips([20])
    names = {"sparse": [annotations.SINGLE_STAGE], "dense": NAMES}
    asked = VlmAnnotator(dataset, names, model=str(vlm), device="cpu")
    (result,) = asked.annotate(dataset.episodes)
    assert result.sparse == annotations.whole_episode(dataset.episodes[0])
    assert list(result.provenance["answers"]) == ["dense"]
    nothing = VlmAnnotator(dataset, {"sparse": names["sparse"]}, model="no such model")
    (result,) = nothing.annotate(dataset.episodes)
    assert result.sparse == annotations.whole_episode(dataset.episodes[0]) and result.dense is None


def test_a_video_is_annotated(vlm, tiny):
    dataset = open_dataset(tiny)
    results = list(ask_here(vlm, dataset).annotate(dataset.episodes))
    assert [result.length for result in results] == [episode.length for episode in dataset.episodes]
    assert all(isinstance(result, Annotation) for result in results)


def test_an_invalid_answer_is_asked_for_again_and_then_a_failure(vlm, monkeypatch):
    """With a grammar that knows no time, half of the answers are wrong."""

    def loose(names, steps):
        kept = [rule for rule in strict(names, steps).splitlines() if rule.startswith(("body", "name", "next", "end"))]
        root = 'root ::= "{\\"segments\\": [{\\"start\\": 0.0" body (next time body)? (next time body)? end'
        return "\n".join([root, 'time ::= [0-2] "." [0-9]', *kept])

    strict = question.grammar
    monkeypatch.setattr(question, "grammar", loose)
    dataset = Clips([20] * 12)
    asked = ask_here(vlm, dataset, batch_size=12, max_attempts=2)
    results = list(asked.annotate(dataset.episodes))
    failures = [result for result in results if isinstance(result, Failure)]
    assert failures and len(failures) < len(results)
    assert all("no valid answer in 2 tries; the last: " in failure.reason for failure in failures)
    refused = 0
    for result in results:
        episode, answers = dataset.episodes[result.episode], result.provenance["answers"]
        failed = isinstance(result, Failure)
        if not failed:
            annotations.validate(result, VOCABULARY)
        for head, said in answers.items():
            question_ = asked.question(episode, head)
            assert said["prompt"] == question_.prompt
            for attempt, wrong in enumerate(said["refused"]):
                assert wrong["seed"] == asked.try_seed(question_, attempt)
                with pytest.raises(AnnotationError) as error:
                    question_.parse(wrong["answer"])
                assert wrong["reason"] == str(error.value)
                refused += 1
            if said["answer"] is not None:
                assert question_.parse(said["answer"])
                assert said["seed"] == asked.try_seed(question_, len(said["refused"]))
        assert failed == (None in [said["answer"] for said in answers.values()])
        assert failed or set(answers) == set(VOCABULARY)
        assert json.loads(json.dumps(result.provenance)) == result.provenance
    assert refused > 2 * len(failures)  # of annotated episodes too


def test_one_bad_episode_fails_alone(vlm):
    dataset = Clips([20, 30, 1, 25], broken=(1,))
    results = list(ask_here(vlm, dataset).annotate(dataset.episodes))
    assert [type(result) for result in results] == [Annotation, Failure, Annotation, Annotation]
    assert results[1].reason == "DatasetError: episode 1, observation.images.front: file-000.mp4 is missing"
    for head, names in VOCABULARY.items():  # an episode of a single frame
        (only,) = results[2].head(head)
        assert only.subtask in names and (only.start, only.end) == (0, 0)


class TooSmall:
    """Stands for a model: runs out of memory on more than one question, and does not answer while that batch is there."""

    commit = None

    def __init__(self) -> None:
        self.batches: list[weakref.ref] = []

    def answer(self, questions, clips, seeds, temperature) -> list[str]:
        pixels = torch.zeros(len(questions), 3)
        if len(questions) > 1:
            self.batches.append(weakref.ref(pixels))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert not any(batch() is not None for batch in self.batches), "the failed batch is still there"
        return [json.dumps({"segments": [{"start": 0.0, "subtask": questions[0].names[0]}]})]


def test_what_a_batch_took_is_given_back_before_its_episodes_are_asked_alone(caplog):
    caplog.set_level("WARNING", "sarm")
    dataset = Clips([20, 30, 25])
    asked = ask_here(Path("no model"), dataset)
    asked._loaded = model = TooSmall()
    results = list(asked.annotate(dataset.episodes))
    assert [type(result) for result in results] == [Annotation] * 3, results
    assert len(model.batches) == 1 and "asking one at a time: OutOfMemoryError" in caplog.text


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path):
    dataset = Clips([20, 30])
    with pytest.raises(AnnotationError, match="cannot read the configuration of"):
        list(ask_here(tmp_path / "nothing", dataset).annotate(dataset.episodes))


def test_a_model_of_another_family_is_called_that(tmp_path):
    dataset = Clips([20])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    asked = ask_here(tmp_path, dataset)
    for ask in (lambda: asked.estimate(dataset.episodes), lambda: list(asked.annotate(dataset.episodes))):
        with pytest.raises(AnnotationError, match=r"annotate.model: .* is a qwen2_5_vl, and `vlm` asks a Qwen3-VL"):
            ask()


def test_a_processor_that_cannot_ask_is_told_before_anything_is_asked(vlm, tmp_path):
    dataset, mute = Clips([20]), shutil.copytree(vlm, tmp_path / "mute")
    for path in mute.glob("chat_template*"):
        path.unlink()
    for path in mute.glob("*config.json"):
        content = json.loads(path.read_text())
        if content.pop("chat_template", None):
            path.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=r"annotate.model: the processor of .* has no chat template"):
        list(ask_here(mute, dataset).annotate(dataset.episodes))


@pytest.mark.parametrize("workers", [1, 2])
def test_half_a_download_is_called_that_by_whoever_loads_it(vlm, tmp_path, workers):
    half = shutil.copytree(vlm, tmp_path / "half")
    (weights,) = half.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    dataset = Clips([20, 30, 14])
    with pytest.raises(AnnotationError, match=r"annotate.model: cannot load .*: SafetensorError: "):
        list(ask_here(half, dataset, num_workers=workers, batch_size=1).annotate(dataset.episodes))


def test_answers_outlive_the_dataset_s_growth_and_a_changed_video_does_not(vlm, tmp_path):
    def left(lengths: list[int], name: str, *more_tasks: str) -> list[int]:
        dataset = Clips(lengths, root=tmp_path / name)
        dataset.fingerprint, dataset.tasks = name, [*dataset.tasks, *more_tasks]
        asked = ask_here(vlm, dataset)
        waiting = annotators.waiting(asked, dataset, VOCABULARY, tmp_path / "work")
        _, failures = annotators.run(asked, dataset, VOCABULARY, tmp_path / "work")
        assert not failures and not annotators.waiting(asked, dataset, VOCABULARY, tmp_path / "work")
        return [episode.index for episode in waiting]

    assert left([20, 14], "small") == [0, 1]
    assert left([20, 14, 16], "grown", "another task") == [2]
    assert left([20, 15, 16], "another take") == [1]
    assert left([20, 14], "small") == [], "what is known of one dataset is not lost with another"
    reworded = Clips([20, 14], root=tmp_path / "reworded")
    reworded.fingerprint, reworded.tasks = "reworded", ["put the ring on the peg", reworded.tasks[1]]
    waiting = annotators.waiting(ask_here(vlm, reworded), reworded, VOCABULARY, tmp_path / "work")
    assert [episode.index for episode in waiting] == [0]


def test_what_does_not_fit_this_machine_is_said_before_it_is_loaded(vlm):
    dataset = Clips(LENGTHS)
    needs = ask_here(vlm, dataset).estimate(dataset.episodes)
    assert needs.room_gib > needs.memory_gib and "THAT IS MORE" not in str(needs)
    assert "THAT IS MORE than the 0.0 GiB" in str(replace(needs, room_gib=0.0))


def test_the_estimate_reads_no_weights(vlm, tmp_path):
    dataset = Clips(LENGTHS)
    counted = ask_here(vlm, dataset)._loaded.model.num_parameters()
    bare = shutil.copytree(vlm, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    asked = ask_here(bare, dataset, num_workers=2)
    needs = asked.estimate(dataset.episodes)
    assert needs.parameters == needs.active_parameters == counted
    assert needs.questions == 16 and needs.seconds > 0
    assert needs.weights_gib == pytest.approx(counted * 4 / 2**30)
    question_ = asked.question(dataset.episodes[-1], "dense")
    clip = (asked.shown(dataset.episodes[-1]), asked.frames(dataset.episodes[-1]))
    tokens = ask_here(vlm, dataset)._loaded.inputs([question_], [clip])["input_ids"].shape[1]
    assert needs.tokens == pytest.approx(tokens, rel=0.1)
    assert str(needs).startswith("Estimate for bare on cpu: about 0.0 GiB a worker")


# --- processes ------------------------------------------------------------------------------------------------------


class Deadly(Clips):
    """Clips of which the last ends the process that reads it, when a file says so."""

    trigger: Path

    def read_frames(self, episode, image_key, frame_indices):
        if episode == self.episodes[-1]:
            while not self.trigger.exists():
                time.sleep(0.01)
            os._exit(3)
        return super().read_frames(episode, image_key, frame_indices)


def test_two_workers_find_what_one_finds_and_a_dead_one_is_an_error(vlm, tmp_path):
    dataset = Deadly([20, 33, 14, 60, 17, 25, 9], broken=(4,))
    dataset.trigger = tmp_path / "die"
    one = list(ask_here(vlm, dataset, batch_size=2).annotate(dataset.episodes[:6]))
    two = []
    with pytest.raises(AnnotationError, match=r"a worker died \(exit code 3; .*Finished episodes are saved"):
        for result in ask_here(vlm, dataset, batch_size=2, num_workers=2).annotate(dataset.episodes):
            two.append(result)
            if len(two) == len(one):
                dataset.trigger.touch()
    assert sorted(two, key=lambda result: result.episode) == one
    assert isinstance(one[4], Failure) and "file-000.mp4 is missing" in one[4].reason


def test_a_killed_run_goes_on_where_it_was(vlm, tmp_path):
    found = kill_and_go_on("ask_here", str(vlm), tmp_path)
    dataset = Clips(MANY)
    episodes = [dataset.episodes[annotation.episode] for annotation in found]
    unbroken = ask_here(vlm, dataset).annotate(episodes)
    assert [(a.sparse, a.dense) for a in found] == [(a.sparse, a.dense) for a in unbroken]


def test_a_model_that_was_trained_further_in_its_folder_is_another_one(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(200_000))
    name = _files(str(tmp_path))
    assert _files(str(tmp_path)) == name
    (tmp_path / "model.safetensors").write_bytes(bytes(199_999) + b"1")  # of the same size
    assert _files(str(tmp_path)) != name
    assert _files("user/on-the-hub") is None


def test_which_commit_of_a_hub_model_answers_can_be_chosen_and_is_kept(vlm, tmp_path):
    """Asked in another process, as the Hub's cache is found when its libraries are imported."""
    commits = {"main": "a" * 40, "v1": "b" * 40}
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (cache / "refs" / name).write_text(commit)
        shutil.copytree(vlm, cache / "snapshots" / commit)
    script = """
from tests.tiny_vlm import Clips, ask_here
clips = Clips([20])
for model in ("someone/tiny", "someone/tiny@v1"):
    asked = ask_here(model, clips)
    said = str(asked.estimate(clips.episodes))
    (answer,) = asked.annotate(clips.episodes)
    print("FOUND", answer.provenance["model"], answer.provenance["model_commit"], model in said)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
    found = [line.removeprefix("FOUND ") for line in run.stdout.splitlines() if line.startswith("FOUND")]
    assert found == [f"someone/tiny {commits['main']} True", f"someone/tiny@v1 {commits['v1']} True"], run.stderr
