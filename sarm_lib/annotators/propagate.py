"""A person marks a few episodes, and a sequence model carries the marks to all others.

The model is a small dilated temporal convolution over frozen embeddings and robot states, an ensemble of a few seeds,
trained on the marked episodes alone (seconds to minutes, see `estimate`). They are rewound at random, as SARM's are: few marks show the robot fail, and
a stretch seen backwards and then once more is what a failed try looks like. Its frames keep their subtasks, which follow
from what the scene is. The frames' probabilities are decoded by a hidden Markov model whose transitions are counted in the
marks. Both heads are decoded together, as pairs (sparse, dense) that the marks show, so that they never contradict each
other.

Each boundary carries a confidence: the probability, by the same model decoded less sharply (`CAUTION`), that it lies within
`WITHIN` seconds of where it is put (notebook 02 says how often it does). Each segment carries a doubt: how
far the network took its frames for something else, before the order of subtasks was imposed on it. Check the doubtful ones,
mark one or two of them, and run again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sarm_lib.agreement import WITHIN, segments_of
from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.annotators.sequences import Chain, about, best_path, chain, entries, standardised, velocity
from sarm_lib.artifacts import code_digest, digest
from sarm_lib.dataset import Dataset, Episode, rows_of
from sarm_lib.encoder import Embeddings
from sarm_lib.live import bar

COMPONENTS = 8  # principal components of each camera's embeddings
WIDTH, LAYERS, DROPOUT = 48, 4, 0.3
STEPS, LEARNING_RATE, WEIGHT_DECAY, NOISE, SMOOTHING = 250, 3e-3, 1e-2, 0.3, 0.05
WINDOW = 512  # frames of a marked episode that a step learns from at most; the net sees 31
REWIND = 0.8  # how often a marked episode is rewound; SARM's own probability
MEMBERS = 5  # of the ensemble
SHARPNESS = 0.65  # neighbouring frames are not independent evidence
CAUTION = 0.3  # the same where it says how sure it is: then nearly as many boundaries are right as it expects to be
CHUNK = 2**16  # frames
LEARNED, DECODED = 2.2e4, 2e4  # frames a second, of learning and of decoding, on one core: for the estimate
NO_FRAME = -100  # the label of what pads a shorter episode


class PropagateAnnotator:
    """Carries `marks` of training episodes to every episode. Raises AnnotationError where they do not suffice."""

    def __init__(
        self,
        dataset: Dataset,
        embeddings: Embeddings,
        marks: list[Annotation],
        vocabulary: dict[str, list[str]],
        seed: int,
    ) -> None:
        training = {episode.index: episode for episode in dataset.split("train")}
        self.dataset, self.heads, self.names, self.seed = dataset, tuple(vocabulary), vocabulary, seed
        self.embeddings, self.marks = embeddings, [mark for mark in marks if mark.episode in training]
        if not self.marks:
            both = " in both heads" if len(self.heads) > 1 else ""
            raise AnnotationError(
                f"annotate.marks: no training episode is marked{both}. Mark a few in notebook 01 (it suggests which), then run again"
            )
        for mark in self.marks:
            for head in self.heads:
                if not mark.head(head):
                    raise AnnotationError(
                        f"annotate.marks: nothing is marked for the {head} head of episode {mark.episode}"
                    )
        shown = {head: {s.subtask for mark in self.marks for s in mark.head(head)} for head in self.heads}
        for head in self.heads:
            missing = [name for name in vocabulary[head] if name not in shown[head]]
            if missing:
                raise AnnotationError(
                    f"annotate.marks: no marked training episode shows {head} {missing[0]!r}: mark one that does"
                )
        self.identity = {
            "annotator": "propagate",
            "code": code_digest("annotators.propagate"),
            "marks": digest([[m.episode, *(str(m.head(h)) for h in self.heads)] for m in self.marks]),
            "encoder": embeddings.encoder_identity,
            "embeddings": {key: _sample(camera) for key, camera in sorted(embeddings.cameras.items())},
            "state_key": dataset.state_key,
            "training": digest(sorted(training)),
            "seed": seed,
        }

    def estimate(self, episodes: Sequence[Episode]) -> str:
        """How long it will take, roughly."""
        frames = sum(min(WINDOW, mark.length) for mark in self.marks) * STEPS * MEMBERS
        return about(frames / LEARNED + sum(episode.length for episode in episodes) / DECODED)

    @property
    def members(self) -> range:
        """Seeds of the ensemble; two annotators of different seeds share none."""
        return range(self.seed * MEMBERS, (self.seed + 1) * MEMBERS)

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation]:
        """Marked episodes as they were marked, all others decoded; both heads, with confidences."""
        features = self.features()
        learned, marked = self.learn(features), {mark.episode: mark for mark in self.marks}
        for episode in episodes:
            if episode.index in marked:
                yield marked[episode.index]
            else:
                yield self.decode(episode, predict(learned.ensemble, features[episode.rows]), learned)

    def learn(self, features: np.ndarray) -> "Learned":
        """What the marks teach; features (N, D) of all frames."""
        labels, states = self._states()
        where = {episode.index: episode for episode in self.dataset.episodes}
        examples = [(features[where[e].rows], y) for e, y in labels.items()]
        order = np.array([[self.names[h].index(n) for h, n in zip(self.heads, s)] for s in states])
        model = chain(list(labels.values()), np.lexsort(order.T).argsort())
        members = bar(self.members, desc="learning", unit="member")
        turns = np.arange(features.shape[1]) >= features.shape[1] - self.dataset.states.shape[1]
        return Learned([train(examples, turns, len(states), seed) for seed in members], states, model)

    def features(self) -> np.ndarray:
        """(N, D) float32: principal components of the embeddings, states, and, last, how the states change."""
        rows = rows_of(self.dataset.split("train"))
        parts = []
        for camera in self.embeddings.cameras.values():
            parts.append(standardised(principal_components(np.asarray(camera), rows, COMPONENTS), rows))
        states = standardised(self.dataset.states.astype(np.float64), rows)
        parts += [states, standardised(velocity(self.dataset, states), rows)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _states(self) -> tuple[dict[int, np.ndarray], list[tuple[str, ...]]]:
        """Labels of every marked episode (episode: (T,) int), and the names that a label stands for, by head."""
        names = {mark.episode: _names_of_frames(mark, self.heads) for mark in self.marks}
        states = sorted({pair for pairs in names.values() for pair in pairs})
        return {e: np.array([states.index(pair) for pair in pairs]) for e, pairs in names.items()}, states

    def decode(self, episode: Episode, probability: np.ndarray, learned: "Learned") -> Annotation:
        """The annotation that the chain makes of the probabilities (T, K) of each frame by itself."""
        seen = np.log(np.maximum(probability, np.finfo(float).tiny))
        path, begin = best_path(SHARPNESS * seen, learned.chain), entries(CAUTION * seen, learned.chain)
        reach = max(1, round(WITHIN * self.dataset.fps))
        segments, confidence, doubt = {}, {}, {}
        for i, head in enumerate(self.heads):
            names = self.names[head]
            of_state = np.array([names.index(state[i]) for state in learned.states])
            segments[head] = segments_of(of_state[path], names, shortest=max(2, reach // 2))
            confidence[head] = tuple(
                1.0 if s.start == 0 else _probability(begin, of_state == names.index(s.subtask), s.start, reach)
                for s in segments[head]
            )
            doubt[head] = tuple(
                round(float(probability[s.start : s.end + 1, of_state != names.index(s.subtask)].sum(1).mean()), 4)
                for s in segments[head]
            )
        return Annotation(
            episode.index,
            episode.length,
            "propagate",
            segments.get("sparse"),
            segments.get("dense"),
            confidence,
            {"marks": [mark.episode for mark in self.marks]},
            doubt,
        )


@dataclass(frozen=True)
class Learned:
    """What a few marks teach: an ensemble that looks at frames, and the order in which its K `states` follow each other."""

    ensemble: "list[TemporalNet]"
    states: list[tuple[str, ...]]  # the subtask in each head
    chain: Chain


def suggest(dataset: Dataset, embeddings: Embeddings, count: int, split: str = "train") -> list[int]:
    """Episodes worth marking first: together they are nearest to all episodes of the split (greedy k-medoids).

    An episode is described by how its states and embeddings are distributed, how fast they change, and its length.
    """
    rows = rows_of(dataset.split("train"))
    parts = [principal_components(np.asarray(c), rows, COMPONENTS) for c in embeddings.cameras.values()]
    values = standardised(np.concatenate([*parts, dataset.states], axis=1), rows)
    episodes = dataset.split(split)
    described = np.stack([_describe(values[episode.rows]) for episode in episodes])
    described = standardised(described, np.arange(len(episodes)))
    distance = cdist(described, described)
    chosen: list[int] = []
    nearest = np.full(len(episodes), distance.max() + 1)
    for _ in range(min(count, len(episodes))):
        gain = np.maximum(nearest[None] - distance, 0).sum(1)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        nearest = np.minimum(nearest, distance[chosen[-1]])
    return [episodes[i].index for i in chosen]


def principal_components(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """(N, count) projections on the first principal components of `rows` (at most 5,000 of them are looked at)."""
    some = values[rows[:: max(1, len(rows) // 5000)]].astype(np.float64)
    mean = some.mean(0)
    _, vectors = np.linalg.eigh((some - mean).T @ (some - mean))
    axes = vectors[:, ::-1][:, :count]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])  # the sign is arbitrary: fix it
    starts = range(0, len(values), CHUNK)  # all embeddings at once in float64 are gigabytes
    return np.concatenate([(values[i : i + CHUNK] - mean) @ axes for i in starts])


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: the same annotations on any number of cores. The net is too small to gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TemporalNet(nn.Module):
    """(B, D, T) features to (B, K, T) logits; sees 31 frames around each."""

    def __init__(self, inputs: int, states: int) -> None:
        super().__init__()
        self.enter = nn.Conv1d(inputs, WIDTH, 1)
        self.wide = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=2**i, dilation=2**i) for i in range(LAYERS))
        self.mix = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(LAYERS))
        self.drop = nn.Dropout(DROPOUT)
        self.leave = nn.Conv1d(WIDTH, states, 1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        h = self.enter(self.drop(x)) * valid
        for wide, mix in zip(self.wide, self.mix):
            h = (h + self.drop(mix(torch.relu(wide(h))))) * valid
        return self.leave(h)


def rewound(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An episode that is set back once and goes on from there: its frames in the order in which they are seen, (n,) int,
    and whether time runs backwards in them, (n,) bool. At most half of the episode is seen again."""
    last = int(rng.integers(1, length))
    first = max(0, last - int(rng.integers(1, length // 2 + 1)))
    there, back, on = np.arange(last + 1), np.arange(last - 1, first - 1, -1), np.arange(first + 1, length)
    return np.concatenate([there, back, on]), np.repeat([False, True, False], [len(there), len(back), len(on)])


@one_thread()
def train(examples: list[tuple[np.ndarray, np.ndarray]], turns: np.ndarray, states: int, seed: int) -> TemporalNet:
    """One member of the ensemble from (features (T, D), labels (T,)) of the marked episodes.

    turns: (D,) bool, features that change their sign where time runs backwards.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = TemporalNet(len(turns), states)
        optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
        for _ in range(STEPS):
            seen, labels = zip(*(_seen(x, y, turns, rng) for x, y in examples), strict=True)
            x = pad_sequence(seen, batch_first=True).transpose(1, 2)
            y = pad_sequence(labels, batch_first=True, padding_value=NO_FRAME)
            valid = (y != NO_FRAME)[:, None].float()
            logits = net(x + NOISE * torch.randn_like(x) * valid, valid)
            loss = nn.functional.cross_entropy(logits, y, ignore_index=NO_FRAME, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def _seen(
    features: np.ndarray, labels: np.ndarray, turns: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A marked episode as it is learned from this time: of a long one a part; as it was, or rewound."""
    if len(labels) > WINDOW:
        start = int(
            rng.integers(1 - WINDOW, len(labels))
        )  # parts that reach beyond an end are shorter: every frame is seen alike
        part = slice(max(0, start), start + WINDOW)
        features, labels = features[part], labels[part]
    if len(labels) > 1 and rng.random() < REWIND:
        order, backwards = rewound(len(labels), rng)
        signs = np.where(backwards[:, None] & turns, -1, 1).astype(features.dtype)
        features, labels = features[order] * signs, labels[order]
    return torch.from_numpy(features), torch.from_numpy(labels)


@one_thread()
@torch.no_grad()
def predict(ensemble: list[TemporalNet], features: np.ndarray) -> np.ndarray:
    """The members' mean probabilities, (T, K) float64."""
    x = torch.from_numpy(features.T.copy())[None]
    valid = torch.ones(1, 1, x.shape[-1])
    return torch.stack([net(x, valid)[0].softmax(0) for net in ensemble]).mean(0).T.double().numpy()


def _sample(values: np.ndarray) -> str:
    """A digest of some rows: another precision, of encoding or storing, has other values."""
    return digest([str(values.dtype), values[:: max(1, len(values) // 100)].tobytes().hex()])


def _names_of_frames(mark: Annotation, heads: Sequence[str]) -> list[tuple[str, ...]]:
    columns = []
    for head in heads:
        names = [mark.head(head)[0].subtask] * mark.length
        for segment in mark.head(head):  # a gap belongs to the segment before it
            names[segment.start :] = [segment.subtask] * (mark.length - segment.start)
        columns.append(names)
    return list(zip(*columns))


def _probability(begin: np.ndarray, states: np.ndarray, start: int, reach: int) -> float:
    """That one of `states` begins within `reach` frames of `start`."""
    return round(float(min(1.0, begin[max(0, start - reach) : start + reach + 1, states].sum())), 4)


def _describe(values: np.ndarray) -> np.ndarray:
    speed = np.abs(np.diff(values, axis=0)).mean(0) if len(values) > 1 else np.zeros(values.shape[1])
    return np.concatenate([values.mean(0), values.std(0), speed, [3 * np.log(len(values))]])
