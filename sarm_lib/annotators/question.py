"""What a vision-language model is asked about an episode, and what is understood: shared by `vlm` and `server`.

A model sees frames with their times and answers `{"segments": [{"start": 0.0, "subtask": "reach the nut"}, ...]}`.
Segments touch: each lasts until the next one starts. Each head is a question of its own. The grammar lets only valid
answers through; a JSON schema cannot say that times increase, so every answer is also parsed and judged.
"""

import io
import json
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from sarm_lib.annotations import SINGLE_STAGE, Annotation, AnnotationError, Segment, validate, whole_episode
from sarm_lib.artifacts import digest, readable
from sarm_lib.dataset import Dataset, Episode

MAX_STEPS = 1500  # start times to choose from: xgrammar compiles the grammar of so many in two seconds
MAX_SEGMENTS = 200  # of an answer; bounds its length in tokens, through the least duration of a segment
RETRY_TEMPERATURE = 0.7  # of a further try where the first was greedy: another seed would not change that one

PROMPT = """\
The video shows one try of a robot at this task: "{task}". It lasts {duration:.2f} seconds, and the time in seconds \
stands before each frame.

Say what the robot does from the start of the video to its end, as a list of segments. These are the names of the \
{head} subtasks, in their usual order. Use them exactly as they are written, and no others:
{names}

Rules:
- Segments stand in the order of time and touch: each lasts until the next one starts, the last until the video ends.
- The first segment starts at {first}. Each other starts at least {least} seconds after the one before.
- Give start times in seconds, to {step} seconds; interpolate between frames where a change lies between two.
- A subtask may occur again: when the robot fails and tries again, or loses the object, give each try its own segment.
- The video may end early: leave out subtasks that do not happen.
- A subtask mostly ends where contact begins or is lost, where the gripper closes or opens, or where the object starts \
or stops to move. Look for these moments at the gripper.

Answer with JSON only, in this form:
{{"segments": [{{"start": {first}, "subtask": {example}}}, ...]}}"""


# --- time -----------------------------------------------------------------------------------------------------------


def frames_to_show(length: int, fps: float, frames_per_second: float, max_frames: int) -> list[int]:
    """Evenly spread frame indices, from the first one to the last at a whole tenth of a second.

    Qwen3-VL is told a frame's time with one decimal. Of all frames only those nearest to whole tenths are shown, so that
    this time is true: to half a frame, and exactly where fps is a multiple of ten.
    """
    ticks = min(Fraction(10), Fraction(fps))  # a second; of fewer frames a second each may be shown
    last = math.floor(Fraction(length - 1) / Fraction(fps) * ticks)
    count = 1 + math.floor((length - 1) / fps * frames_per_second)
    count = max(2, min(count, max_frames))
    return sorted({round(round(i) * Fraction(fps) / ticks) for i in np.linspace(0, last, count).tolist()})


def stamp(frame: int, fps: float) -> str:
    """A frame's time as Qwen3-VL's own processor writes it."""
    return f"<{frame / fps:.1f} seconds>"


@dataclass(frozen=True)
class Steps:
    """The start times that an answer may name: multiples of `size` seconds, as they are written. A segment lasts `gap`
    steps at least, which is two frames or more."""

    texts: tuple[str, ...]
    size: Decimal
    gap: int

    @property
    def max_segments(self) -> int:
        return 1 + (len(self.texts) - 1) // self.gap


def time_steps(length: int, fps: float, resolution: float) -> Steps:
    """Steps of `resolution` seconds; 2, 5, 10... times as long where an episode would have more than MAX_STEPS."""
    duration, size = Fraction(length) / Fraction(fps), Decimal(str(resolution))
    factors = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    size *= next(factor for factor in factors if duration / Fraction(size * factor) <= MAX_STEPS)
    gap = math.ceil(max(2 / Fraction(fps), duration / MAX_SEGMENTS) / Fraction(size))
    last = max(0, math.floor(duration / Fraction(size)) - gap)
    places = max(1, -size.normalize().as_tuple().exponent)
    return Steps(tuple(f"{i * size:.{places}f}" for i in range(last + 1)), size.normalize(), gap)


# --- what is asked --------------------------------------------------------------------------------------------------


def prompt(names: list[str], head: str, duration: float, task: str, steps: Steps) -> str:
    """The text of the question."""
    return PROMPT.format(
        task=task,
        duration=duration,
        head={"sparse": "coarse", "dense": "fine"}[head],
        names="\n".join(f"- {name}" for name in names),
        first=steps.texts[0],
        least=f"{steps.gap * steps.size:f}",
        step=f"{steps.size:f}",
        example=json.dumps(names[0], ensure_ascii=False),
    )


def json_schema(names: list[str], steps: Steps) -> dict:
    """JSON schema of an answer. It cannot say that times increase."""
    # Bounds and no list of times: xgrammar would write its 0.1 as 0.10000000000000001.
    start = {"type": "number", "minimum": 0, "maximum": float(steps.texts[-1])}
    segment = {
        "type": "object",
        "properties": {"start": start, "subtask": {"type": "string", "enum": list(names)}},
        "required": ["start", "subtask"],
        "additionalProperties": False,
    }
    segments = {"type": "array", "items": segment, "minItems": 1, "maxItems": steps.max_segments}
    return {
        "type": "object",
        "properties": {"segments": segments},
        "required": ["segments"],
        "additionalProperties": False,
    }


def grammar(names: list[str], steps: Steps) -> str:
    """EBNF (GBNF) of every valid answer and nothing else: exact names, and start times that increase by `gap` or more.

    `at{i}` is what follows the i-th time, `from{i}` any time from the i-th on. Times are chosen digit by digit (`after`
    a whole second, `digits` and `second` are the tree of them): with one chain of all times the compiler is too slow.
    """
    last, gap = len(steps.texts) - 1, steps.gap
    width = len(steps.texts[-1].split(".")[0])
    seconds: dict[str, list[int]] = {}  # whole seconds, all of one width: steps within
    for i in range(gap, last + 1):
        seconds.setdefault(steps.texts[i].split(".")[0].zfill(width), []).append(i)
    tree: dict[str, list[str]] = {}  # what may follow the first digits
    for whole in seconds:
        for k in range(width):
            following = tree.setdefault(whole[:k], [])
            if whole[: k + 1] not in following:
                following.append(whole[: k + 1])

    def written(digits: str) -> str:
        return digits.lstrip("0") if len(digits) < width else str(int(digits))

    def below(digits: str) -> str:
        return f"digits{digits}" if len(digits) < width else f"second{digits}"

    def fractions(choices: list[int]) -> str:
        return " | ".join(f'".{steps.texts[i].split(".")[1]}" at{i}' for i in choices)

    rules = [
        f'root ::= "{{\\"segments\\": [{{\\"start\\": {steps.texts[0]}" at0',
        'body ::= ", \\"subtask\\": " name',
        "name ::= " + " | ".join(_quoted(json.dumps(name, ensure_ascii=False)) for name in names),
        'next ::= "}, {\\"start\\": "',
        'end ::= "}]}"',
    ]
    for digits, following in tree.items():
        if digits:
            choices = (f'"{written(d)[len(written(digits)) :]}" {below(d)}' for d in following)
            rules.append(f"digits{digits} ::= " + " | ".join(choices))
    for whole, choices in seconds.items():
        rules.append(f"second{whole} ::= {fractions(choices)}")
        later = [d for k in range(width) for d in tree[whole[:k]] if d > whole[: k + 1]]
        after = ""
        if later:
            rules.append(f"after{whole} ::= " + " | ".join(f'"{written(d)}" {below(d)}' for d in later))
            after = f" | after{whole}"
        rules += [f'from{i} ::= "{int(whole)}" ({fractions([j for j in choices if j >= i])}){after}' for i in choices]
    for i in (0, *range(gap, last + 1)):
        rules.append(f"at{i} ::= body (end | next from{i + gap})" if i + gap <= last else f"at{i} ::= body end")
    return "\n".join(rules)


def _quoted(text: str) -> str:
    """A literal of the grammar."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def max_tokens(names: list[str], steps: Steps) -> int:
    """No answer of the grammar has more tokens: its longest text in bytes, and the end token."""
    name = max((json.dumps(name, ensure_ascii=False) for name in names), key=lambda text: len(text.encode()))
    segment = f'{{"start": {steps.texts[-1]}, "subtask": {name}}}, '
    return len('{"segments": []}') + steps.max_segments * len(segment.encode()) + 1


# --- what is understood ---------------------------------------------------------------------------------------------


def parse(text: str, names: list[str], length: int, fps: float) -> tuple[Segment, ...]:
    """The segments of an answer, from frame 0 to the episode's last. Raises AnnotationError, whatever the text is."""
    try:
        answer = json.loads(_unwrapped(text))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"the answer is not JSON: {error}; it is {reprlib.repr(text)}") from None
    if isinstance(answer, dict):
        answer = answer.get("segments")
    if not isinstance(answer, list) or not answer:
        raise AnnotationError('the answer has no list "segments", or an empty one')
    starts: list[int] = []
    for i, item in enumerate(answer, 1):
        if not isinstance(item, dict) or item.keys() != {"start", "subtask"}:
            raise AnnotationError(f'segment {i} is {reprlib.repr(item)}; it needs "start" and "subtask", nothing else')
        time, name = item["start"], item["subtask"]
        if not isinstance(name, str) or name not in names:
            raise AnnotationError(f"segment {i}: unknown subtask {reprlib.repr(name)}; known are {', '.join(names)}")
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < length / fps:
            raise AnnotationError(
                f"segment {i} ({name!r}) starts at {reprlib.repr(time)}, not a time from 0 to {length / fps:.2f} seconds"
            )
        frame = round(round(time * fps, 6))  # 1.1 * 5 is not 5.5
        if i == 1 and frame != 0:
            raise AnnotationError(f"segment 1 ({name!r}) starts at {time} seconds; the first has to start at 0")
        if starts and frame < starts[-1] + 2:
            raise AnnotationError(
                f"segment {i} ({name!r}) starts at {time} seconds; it has to start later than the one before, "
                f"which starts at {answer[i - 2]['start']}, by two frames ({2 / fps:.3f} seconds) or more"
            )
        starts.append(frame)
    if length - starts[-1] < min(2, length):  # an episode of a single frame has room for nothing longer
        raise AnnotationError(f"the last segment starts at {answer[-1]['start']} seconds, where the video ends")
    ends = [start - 1 for start in starts[1:]] + [length - 1]
    return tuple(Segment(item["subtask"], start, end) for item, start, end in zip(answer, starts, ends))


def _unwrapped(text: str) -> str:
    """The answer without what a server that follows no schema lets a model write around it: its thoughts, a Markdown fence."""
    text = text.rpartition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    return fenced[1] if fenced else text


# --- an episode's questions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One head of one episode."""

    episode: Episode
    head: str
    names: list[str]
    task: str
    fps: float
    resolution: float

    @cached_property
    def steps(self) -> Steps:
        return time_steps(self.episode.length, self.fps, self.resolution)

    @cached_property
    def prompt(self) -> str:
        return prompt(self.names, self.head, self.episode.length / self.fps, self.task, self.steps)

    @property
    def json_schema(self) -> dict:
        return json_schema(self.names, self.steps)

    @property
    def grammar(self) -> str:
        return grammar(self.names, self.steps)

    @property
    def max_tokens(self) -> int:
        return max_tokens(self.names, self.steps)

    def parse(self, text: str) -> tuple[Segment, ...]:
        return parse(text, self.names, self.episode.length, self.fps)


@dataclass
class Interview:
    """A question and what a model said to it, try by try, until an answer was valid.

    segments, answer, seed: of the valid answer; None before there is one. refused: the tries before it, each with its
    answer, seed and the reason.
    """

    question: Question
    segments: tuple[Segment, ...] | None = None
    answer: str | None = None
    seed: int | None = None
    refused: list[dict[str, Any]] = field(default_factory=list)

    def hear(self, text: str, seed: int, *, cut_off: bool = False) -> None:
        """Take an answer, or refuse it with the reason."""
        text = readable(text)
        try:
            if cut_off:
                raise AnnotationError("the answer was cut off: it is too long for the server")
            self.segments = self.question.parse(text)
        except AnnotationError as error:
            self.refused.append({"answer": text, "seed": seed, "reason": str(error)})
        else:
            self.answer, self.seed = text, seed

    @property
    def complaint(self) -> str:
        """Why there is no valid answer."""
        last = self.refused[-1]["reason"]
        return f"{self.question.head}: no valid answer in {len(self.refused)} tries; the last: {last}"

    @property
    def record(self) -> dict[str, Any]:
        """JSON values for the provenance."""
        return {
            "prompt": self.question.prompt,
            "answer": self.answer,
            "seed": self.seed,
            "refused": self.refused,
        }


@dataclass
class Interviewer:
    """What the annotators that ask a model have in common.

    vocabulary: names of each head. A head whose one subtask is `task` (`single_stage`, the sparse head of `dense_only`)
    is not asked about: its one segment is the episode.
    video_key: the camera that the model sees; None takes the dataset's first.
    """

    name: ClassVar[str]

    dataset: Dataset
    vocabulary: dict[str, list[str]]
    _: KW_ONLY
    model: str
    video_key: str | None = None
    seed: int = 0
    temperature: float = 0.0
    frames_per_second: float = 4.0  # times in the question have one decimal: at most 10
    max_frames: int = 128
    resolution: float = 0.1  # seconds
    max_attempts: int = 3

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that, with dataset and vocabulary, decide the answers."""
        asked = ("model", "video_key", "seed", "temperature", "frames_per_second", "max_frames", "resolution")
        return {"annotator": self.name, "prompt": digest(PROMPT), **{key: getattr(self, key) for key in asked}}

    @cached_property
    def _videos(self) -> dict[int, str]:
        return {}

    def video_identity(self, episode: Episode) -> str:
        """Names the video that the model is shown frames of, by its bytes."""
        if episode.index not in self._videos:
            self._videos[episode.index] = self.dataset.content(episode, self.camera)
        return self._videos[episode.index]

    def fits(self, annotation: Annotation, episode: Episode) -> bool:
        """Whether an answer from another dataset, such as this one before it has grown, is one to the same question about the same
        video."""
        said = annotation.provenance.get("answers") or {}
        asked = {head: self.question(episode, head).prompt for head in self.asked}
        if {head: (said.get(head) or {}).get("prompt") for head in self.asked} != asked:
            return False
        try:
            return annotation.provenance.get("content") == self.video_identity(episode)
        except Exception:  # it cannot be read: asking says so
            return False

    def coarse(self, episodes: Sequence[Episode]) -> str:
        """What is to be said of episodes that are too long to be asked as finely as is wanted; else nothing."""
        steps = [time_steps(e.length, self.dataset.fps, self.resolution) for e in episodes]
        longer = [step.size for step in steps if float(step.size) > self.resolution]
        told = ""
        if longer:
            told += (
                f". {len(longer)} of the episodes: more than {MAX_STEPS} steps of annotate.time_resolution, so that they are asked in "
                f"steps of up to {max(longer):f} s"
            )
        shortest, *least = [s.gap * s.size for s in (time_steps(2, self.dataset.fps, self.resolution), *steps)]
        if rough := [seconds for seconds in least if seconds > shortest]:
            told += (
                f". {len(rough)} of the episodes: an answer has at most {MAX_SEGMENTS} segments, and is asked for none that lasts less "
                f"than {max(rough):f} s in the longest of them"
            )
        return told

    @property
    def camera(self) -> str:
        return self.video_key or self.dataset.image_keys[0]

    @property
    def asked(self) -> list[str]:
        """Heads that a model is asked about."""
        return [head for head, names in self.vocabulary.items() if names != [SINGLE_STAGE]]

    def question(self, episode: Episode, head: str) -> Question:
        task = self.dataset.tasks[int(self.dataset.frames.task_index.iloc[episode.row])]
        return Question(episode, head, self.vocabulary[head], task, self.dataset.fps, self.resolution)

    def shown(self, episode: Episode) -> list[int]:
        """Indices of the frames that a model sees of an episode."""
        return frames_to_show(episode.length, self.dataset.fps, self.frames_per_second, self.max_frames)

    def frames(self, episode: Episode) -> np.ndarray:
        """The frames that a model sees, (n, H, W, 3) uint8."""
        self.video_identity(episode)  # which its answer will need: read here, where reading is waited for anyway
        return self.dataset.read_frames(episode, self.camera, self.shown(episode))

    def try_seed(self, question: Question, attempt: int) -> int:
        """Seed of a try; depends on nothing but the question, so that neither order nor batch changes an answer."""
        return int(digest(self.seed, question.episode.index, question.head, attempt), 16) % 2**31

    def try_temperature(self, attempt: int) -> float:
        return self.temperature if attempt == 0 else self.temperature or RETRY_TEMPERATURE

    def annotation(self, episode: Episode, held: dict[str, Interview]) -> Annotation:
        """The annotation from the interviews, by head. Raises AnnotationError where it is not valid."""
        heads = {h: held[h].segments if h in held else whole_episode(episode) for h in self.vocabulary}
        sparse, dense = heads.get("sparse"), heads.get("dense")
        provenance = self.provenance(episode, held) | {"content": self.video_identity(episode)}
        found = Annotation(episode.index, episode.length, self.name, sparse, dense, provenance=provenance)
        validate(found, self.vocabulary, episode.length)
        return found

    def provenance(self, episode: Episode, held: dict[str, Interview]) -> dict[str, Any]:
        """What was asked and answered, JSON values."""
        times = [round(i / self.dataset.fps, 4) for i in self.shown(episode)] if held else []
        said = {head: interview.record for head, interview in held.items()}
        return {**self.identity, "video_key": self.camera, "frame_times": times, "answers": said}

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the camera's pictures. LeRobot's shapes say them first, unless the names say otherwise."""
        feature = self.dataset.features[self.camera]
        names, shape = feature.get("names") or (), feature["shape"]
        first = 1 if names and names[0] in ("channels", "channel", "c") else 0
        return tuple(shape[first : first + 2])


def jpeg(frame: np.ndarray) -> bytes:
    """A frame (H, W, 3) uint8 as a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()
