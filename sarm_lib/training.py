"""Training SARM from the embeddings: batches by vectorised gathers, exact resumption, the best checkpoint by validation.

Every random draw of a step comes from the stream (seed, step), in which each sample has a row of its own: a run that is
stopped and resumed draws what an uninterrupted one does, and a larger batch begins with the samples of a smaller one. What is
validated and kept is the moving average of the weights. Several
processes (`sarm_lib.launch`) draw the same batch of `sarm.batch_size` windows and each learns its share of it.
"""

import copy
import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from faker import Faker
from torch import Tensor, nn
from torch.nn import functional as F

from sarm_lib.artifacts import code_digest, digest, is_current, remove, staged, write_json_lines
from sarm_lib.checkpoint import LOG, RewardModel, save_reward_model
from sarm_lib.dataset import Dataset, Episode
from sarm_lib.encoder import Embeddings, Encoder
from sarm_lib.live import bar
from sarm_lib.model import Sarm, SarmSpec
from sarm_lib.processes import new_accelerator, share
from sarm_lib.progress import frame_store, score
from sarm_lib.schedule import Average, Estimate, learning_rate
from sarm_lib.stages import Labels, drawn_out, progress
from sarm_lib.windows import FrameStore, Windows, WindowSpec

log = logging.getLogger(__name__)

PERTURBATIONS = 256
VERBS = ("move", "grasp", "rotate", "push", "pull", "slide", "lift", "place")


class Batch(NamedTuple):
    """Training windows and their targets. Keys of `stage` and `tau` are heads; both are (B, T)."""

    windows: Windows
    stage: dict[str, Tensor]
    tau: dict[str, Tensor]
    known: dict[str, Tensor]  # a head: (B, T) bool: τ says something (`unknown_tau`)
    given: Tensor  # (B,) bool: the progress transformer is given the true stage (teacher forcing)
    rows: np.ndarray  # (B, T) dataset rows of the images, for whoever wants to look
    positions: float  # valid positions of the whole batch, a process: what its stage loss is divided by
    timed: dict[str, float]  # a head: those of them whose τ is known: what its τ loss is divided by

    def to(self, device: torch.device) -> "Batch":
        move = lambda tensors: {k: v.to(device, non_blocking=True) for k, v in tensors.items()}  # noqa: E731
        moved = self.windows.to(device), move(self.stage), move(self.tau), move(self.known), self.given.to(device)
        return Batch(*moved, self.rows, self.positions, self.timed)


@dataclass
class Augmentation:
    """How samples are changed in training. `per` and `rewind_images` have LeRobot's defects as second values."""

    rewind_probability: float
    language_perturbation_probability: float
    gt_stage_ratio: float
    per: Literal["sample", "batch"] = "sample"
    rewind_images: Literal["of_targets", "of_lerobot"] = "of_targets"


@dataclass
class Sampler:
    """Draws training batches from annotated frames."""

    store: FrameStore
    spec: SarmSpec
    rows: np.ndarray  # (M,) frames to draw from
    stage: dict[str, np.ndarray]  # a head: (N,)
    tau: dict[str, np.ndarray]  # a head: (N,)
    unknown: dict[str, np.ndarray]  # a head: (N,) bool, frames whose τ is neither learned nor validated
    perturbations: Tensor  # (P, E) embeddings of texts that are not the task
    augmentation: Augmentation
    loss_positions: Literal["valid", "all"] = "valid"

    def draw(self, rng: np.random.Generator, size: int, process: int = 0, processes: int = 1) -> Batch:
        """One batch of `size` windows with rewind, language perturbation and teacher forcing drawn a sample; of several
        processes, each gets its share of it."""
        window, options = self.spec.window, self.augmentation
        # a row a sample, so that what happens to one does not depend on how many there are
        place, rewinds, steps_back, perturbs, words, teaches = rng.random((size, 6)).T
        rows = self.rows[_pick(place, len(self.rows))]
        start, length = self.store.start[rows], self.store.length[rows]
        observed = window.observed(rows - start, length)
        rewound = self._shared(rewinds) < options.rewind_probability
        if options.rewind_images == "of_lerobot":
            steps = np.where(rewound, np.ceil(steps_back * window.lerobot_rewind_room(rows - start)), 0)
            seen, frames, valid = window.with_lerobot_rewind(rows - start, observed, steps.astype(np.int64))
        else:
            steps = np.where(rewound, np.ceil(steps_back * window.rewind_room(observed)), 0)
            frames, valid = window.with_rewind(observed, steps.astype(np.int64))
            seen = frames

        perturbed = self._shared(perturbs) < options.language_perturbation_probability
        other = self.perturbations[torch.from_numpy(_pick(self._shared(words), len(self.perturbations)))]
        text = torch.where(torch.from_numpy(perturbed)[:, None], other, self.store.task_texts(self._shared(rows)))
        given = torch.from_numpy(self._shared(teaches) < options.gt_stage_ratio)
        # With another text than the task's there is no progress, and none is asked for beyond the valid positions.
        inside = np.arange(window.padded_length) < valid[:, None]
        right = ~perturbed[:, None] & inside
        counted = inside if self.loss_positions == "valid" else np.ones_like(inside)

        frames, seen = frames + start[:, None], seen + start[:, None]
        known = {head: ~(undone[frames] & right) for head, undone in self.unknown.items()}
        mine = slice(process, None, processes)
        here, asked = frames[mine], right[mine]
        return Batch(
            self.store.gather(seen[mine], valid[mine], text[mine]),
            {head: torch.from_numpy(stage[here] * asked) for head, stage in self.stage.items()},
            {head: torch.from_numpy((tau[here] * asked).astype(np.float32)) for head, tau in self.tau.items()},
            {head: torch.from_numpy(of[mine]) for head, of in known.items()},
            given[mine],
            seen[mine],
            int(counted.sum()) / processes,
            {head: max(int((of & counted).sum()), 1) / processes for head, of in known.items()},
        )

    def _shared(self, values: np.ndarray) -> np.ndarray:
        """A value for each sample. LeRobot throws one coin for a whole batch, and tells all of it the text of its first
        sample."""
        return values if self.augmentation.per == "sample" else np.full_like(values, values[0])


def _pick(luck: np.ndarray, count: int) -> np.ndarray:
    """One of `count` things by a number in [0, 1)."""
    return (luck * count).astype(np.int64)


class SarmLoss(nn.Module):
    """Stage cross-entropy plus τ mean squared error of every head, over valid positions only."""

    def __init__(self, sarm: Sarm, positions: Literal["valid", "all"] = "valid") -> None:
        super().__init__()
        self.sarm, self.positions = sarm, positions

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` and its parts, one number each: means over the positions of the whole batch, of which this process sums
        its own."""
        counted, parts = batch.windows.valid, {}
        if self.positions == "all":
            counted = torch.ones_like(counted)
        stage_logits = self.sarm.stage_logits(batch.windows, list(batch.stage))
        given = batch.given[:, None]
        prior = {h: torch.where(given, true, stage_logits[h].argmax(-1)) for h, true in batch.stage.items()}
        tau = self.sarm.tau(batch.windows, prior)
        for head, true_stage in batch.stage.items():
            timed = counted & batch.known[head]
            stage_loss = F.cross_entropy(stage_logits[head][counted], true_stage[counted], reduction="sum")
            tau_loss = F.mse_loss(tau[head][timed], batch.tau[head][timed], reduction="sum")
            parts |= {
                f"{head}_stage_loss": stage_loss / batch.positions,
                f"{head}_tau_loss": tau_loss / batch.timed[head],
            }
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def perturbed_texts(count: int, seed: int) -> list[str]:
    """Instructions that are not the task: a verb and one to five words."""
    fake, rng = Faker("en_US"), np.random.default_rng(seed)
    fake.seed_instance(seed)
    return [" ".join([str(rng.choice(VERBS)), *fake.words(nb=int(rng.integers(1, 6)))]) for _ in range(count)]


def state_statistics(dataset: Dataset, episodes: tuple[Episode, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (S,) of the states of `episodes` (the training ones)."""
    states = np.concatenate([dataset.states[episode.rows] for episode in episodes])
    return states.mean(0), states.std(0)


def new_reward_model(params, dataset: Dataset, embeddings: Embeddings, labels: Labels) -> RewardModel:
    """An untrained SARM of the size that `params.sarm` sets, with the statistics of the training episodes."""
    settings = params.sarm
    spec = SarmSpec(
        window=WindowSpec(settings.window, settings.n_obs_steps, settings.frame_gap, settings.max_rewind_steps),
        stage_names=labels.stage_names,
        proportions=labels.proportions,
        annotation_mode=params.base.annotation_mode,
        num_cameras=len(dataset.image_keys),
        image_dim=embeddings.width,
        text_dim=embeddings.width,
        max_state_dim=settings.max_state_dim,
        hidden_dim=settings.hidden_dim,
        num_heads=settings.num_heads,
        num_layers=settings.num_layers,
        dropout=settings.dropout,
        inputs=tuple(settings.inputs),
    )
    torch.manual_seed(params.base.seed)
    mean, std = state_statistics(dataset, dataset.split("train"))
    return RewardModel(
        Sarm(spec), dataset.image_keys, dataset.state_key, mean, std,
        params.prepare.encoder, embeddings.encoder_identity, embeddings.fingerprint,
    )  # fmt: skip


def new_sampler(
    params, dataset: Dataset, embeddings: Embeddings, labels: Labels, model: RewardModel, encoder: Encoder
) -> Sampler:
    """Draws windows of the annotated training episodes, augmented as `params.sarm` sets it."""
    settings = params.sarm
    if encoder.identity != embeddings.encoder_identity:
        raise ValueError(f"the embeddings are of {embeddings.encoder}, not of {encoder.name}: run 00_prepare again")
    return Sampler(
        store=frame_store(dataset, embeddings, model),
        spec=model.spec,
        rows=annotated_rows(dataset.split("train"), labels.annotated),
        stage=labels.stage,
        tau=labels.tau,
        unknown=unknown_tau(labels, dataset, settings),
        perturbations=encoder.texts(perturbed_texts(PERTURBATIONS, params.base.seed)),
        augmentation=Augmentation(
            settings.rewind_probability,
            settings.language_perturbation_probability,
            settings.gt_stage_ratio,
            settings.augmentation_per,
            settings.rewind_images,
        ),
        loss_positions=settings.loss_positions,
    )


def unknown_tau(labels: Labels, dataset: Dataset, settings) -> dict[str, np.ndarray]:
    """A head: (N,) bool, frames whose τ says nothing of how far the robot came: of segments that were given up, and of
    drawn-out ones. settings: `params.sarm`, which may ask for either to be learned all the same."""
    found = {head: np.zeros(len(tau), dtype=bool) for head, tau in labels.tau.items()}
    if not settings.learn_given_up:
        found = {head: labels.given_up.get(head, frames) for head, frames in found.items()}
    if settings.max_relative_duration is not None:
        long = drawn_out(labels, dataset.episodes, settings.max_relative_duration)
        found = {head: frames | long[head] for head, frames in found.items()}
    return found


def validator(dataset: Dataset, labels: Labels, sampler: Sampler) -> Callable[[Sarm], dict[str, float]]:
    """Scores a model on the annotated val episodes, augmentation off. `val_rmse`: root mean squared error of φ where it is
    known, the mean over episodes and heads (of mean squares, two odd episodes would decide which weights are the best);
    `val_accuracy_{head}`: of the stage."""
    unknown, store = sampler.unknown, sampler.store
    rows = annotated_rows(dataset.split("val"), labels.annotated)
    episodes = [episode for episode in dataset.split("val") if episode.index in labels.annotated]
    ends = np.cumsum([episode.length for episode in episodes])[:-1]
    if all(frames[rows].all() for frames in unknown.values()):
        log.warning(
            "no val frame has a τ that is learned (sarm.max_relative_duration, sarm.learn_given_up): validated by all of them"
        )
        unknown = {head: np.zeros_like(frames) for head, frames in unknown.items()}

    def validate(sarm: Sarm) -> dict[str, float]:
        errors, found = [], {}
        for head, scores in score(sarm, store, rows, sarm.spec.heads).items():
            stage = labels.stage[head][rows]
            target = progress(stage, labels.tau[head][rows], np.array(labels.proportions[head]))
            squared = np.where(unknown[head][rows], np.nan, (scores.progress - target) ** 2)
            errors += [float(np.nanmean(part)) ** 0.5 for part in np.split(squared, ends) if np.isfinite(part).any()]
            if sarm.spec.num_stages(head) > 1:
                found[f"val_accuracy_{head}"] = float(np.mean(scores.stage == stage))
        return {"val_rmse": float(np.mean(errors)), **found}

    return validate


def provenance(params, dataset: Dataset, embeddings: Embeddings, labels: Labels) -> dict:
    """Everything that a trained reward model is made from."""
    return {
        "fingerprint": embeddings.fingerprint,
        "encoder_identity": embeddings.encoder_identity,
        "labels": labels.identity,
        "splits": [[episode.index, episode.split] for episode in dataset.episodes],
        "image_keys": list(dataset.image_keys),
        "state_key": dataset.state_key,
        "seed": params.base.seed,
        "settings": params.sarm.model_dump(exclude={"log_with", "log_project"}),
        "code": code_digest("training"),
    }


def estimate(sarm: Sarm, sampler: Sampler, settings, device: str) -> Estimate:
    """Memory and time of training, before it starts, of each process. settings: `params.sarm`."""
    trial, spec = SarmLoss(copy.deepcopy(sarm).to(device), settings.loss_positions).train(), sarm.spec
    processes = share(device).num_processes
    batch = sampler.draw(np.random.default_rng(0), settings.batch_size, 0, processes).to(torch.device(device))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        trial(batch)["loss"].backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in sarm.parameters())
    streams = 2 * (spec.num_cameras + 2) + len(spec.heads)  # of both transformers
    tokens = len(batch.rows) * spec.window.padded_length * streams
    activations = (
        tokens * spec.num_layers * 4 * (17 * spec.hidden_dim + 2.5 * spec.num_heads * spec.window.padded_length * 4)
    )
    held = 16 + 4 * (settings.ema_decay > 0)  # weights, gradients, AdamW's two moments, the average
    return Estimate(parameters, held * parameters + activations, min(seconds[1:]), settings.steps)


class Trained(NamedTuple):
    """log: a line every `sarm.log_every` steps. last: the weights (their average) after the last step; the model itself has
    the best."""

    log: list[dict[str, float]]
    last: dict[str, Tensor]


def train_into(
    folder: Path, model: RewardModel, sampler: Sampler, validate: Callable, params, made_from: dict, device: str
) -> None:
    """Train `model` into the checkpoint `folder`, unless it was made from exactly this before.

    A run that was stopped goes on where it last saved, to the weights that an uninterrupted one has.
    """
    if is_current(folder, made_from):
        log.info("trained before with these data and settings")
        return
    everyone = share(device)
    if everyone.num_processes > 1 and everyone.is_main_process:  # where there is one, its notebook has said it
        log.info("each process: %s", estimate(model.sarm, sampler, params.sarm, device))
    work = params.paths.write(f"work/sarm-{digest(made_from)}")
    trained = train(model.sarm, sampler, validate, params.sarm, params.base.seed, device, work)
    if everyone.is_main_process:
        save_reward_model(model, folder, made_from, trained.log, trained.last)
        remove(work)


def train(
    sarm: Sarm,
    sampler: Sampler,
    validate: Callable[[Sarm], dict[str, float]],
    settings,
    seed: int,
    device: str,
    work: Path,
) -> Trained:
    """Train `sarm` in place and leave it with the weights that validated best.

    settings: `params.sarm`. work: a folder for unfinished work; a run that finds some there goes on from it.
    Raises FloatingPointError where training diverges, ValueError for a batch that the processes cannot share.
    """
    accelerator = make_accelerator(settings, device)
    process, processes = accelerator.process_index, accelerator.num_processes
    if settings.batch_size % processes:
        raise ValueError(f"sarm.batch_size: {settings.batch_size} windows cannot be shared by {processes} processes")
    model = SarmLoss(sarm, settings.loss_positions)
    how = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": device != "mps"}
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, settings.steps, settings.warmup_steps)
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    state, average = TrainingState(work), Average(list(sarm.parameters()), settings.ema_decay)
    step, lines, best = state.restore(sarm, optimizer, schedule, average) or (0, [], None)
    main = accelerator.is_main_process
    steps = bar(initial=step, total=settings.steps, desc="training SARM", unit="step", quiet=not main)
    sums: dict[str, Tensor | float] = {}
    while step < settings.steps:
        sarm.train()
        torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0]))  # dropout's
        batch = sampler.draw(np.random.default_rng([seed, step]), settings.batch_size, process, processes)
        parts = model(batch.to(accelerator.device))
        optimizer.zero_grad()
        accelerator.backward(parts["loss"])
        norm = accelerator.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        schedule.step()
        average.update()
        step += 1
        steps.update()
        for name, value in {**parts, "gradient_norm": norm}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        if step % settings.log_every and step < settings.steps:
            continue
        since = step - (lines[-1]["step"] if lines else 0)
        means = {name: float(accelerator.reduce(value, "mean")) / since for name, value in sums.items()}
        line, sums = {"step": step, **means, "learning_rate": schedule.get_last_lr()[0]}, {}
        if step % settings.eval_every == 0 or step == settings.steps:
            with average.in_place():
                line |= validate(sarm)
                if best is None or line["val_rmse"] < best[0]:
                    best = (line["val_rmse"], _weights(sarm))
        if not all(map(np.isfinite, line.values())):
            raise FloatingPointError(f"training diverged before step {step} ({line}): lower sarm.learning_rate")
        lines.append(line)
        steps.set_postfix({name: f"{line[name]:.4f}" for name in ("loss", "val_rmse") if name in line}, refresh=False)
        accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
        if main:
            state.write_log(lines)
            if step % settings.save_every == 0 and step < settings.steps:
                state.save(sarm, optimizer, schedule, average, step, lines, best)
    steps.close()
    accelerator.end_training()
    with average.in_place():
        last = _weights(sarm)
    sarm.load_state_dict(best[1])
    sarm.eval()
    return Trained(lines, last)


def _weights(sarm: Sarm) -> dict[str, Tensor]:
    return {name: values.detach().cpu().clone() for name, values in sarm.state_dict().items()}


def make_accelerator(settings, device: str) -> Accelerator:
    """Processes, precision and trackers as `params.sarm` and `accelerate launch` set them."""
    tracker = settings.log_with
    if tracker and not importlib.util.find_spec(tracker):
        raise ValueError(f"sarm.log_with: {tracker} is not installed; .venv/bin/uv pip install {tracker}")
    # Heads that a mode does not train, and the stage model of a single stage, have no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    made = new_accelerator(settings.precision, device, log_with=tracker, kwargs_handlers=[unused])
    if tracker:
        made.init_trackers(settings.log_project, config=settings.model_dump(mode="json"))
    return made


@dataclass
class TrainingState:
    """Unfinished training in a folder: what an uninterrupted run would have in memory at a validation step."""

    folder: Path

    def save(self, sarm, optimizer, schedule, average: Average, step: int, lines: list, best: tuple) -> None:
        state = {
            "model": sarm.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "average": average.kept,
            "progress": (step, lines, best),
        }
        with staged(self.folder / "training_state.pt") as partial:
            torch.save(state, partial)

    def write_log(self, lines: list[dict[str, float]]) -> None:
        """The log so far, for whoever watches."""
        write_json_lines(self.folder / LOG, lines)

    def restore(self, sarm, optimizer, schedule, average: Average) -> tuple[int, list, tuple] | None:
        path = self.folder / "training_state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        sarm.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        device = next(sarm.parameters()).device
        average.kept, average.updates = [values.to(device) for values in state["average"]], state["progress"][0]
        log.info("resuming at step %d", state["progress"][0])
        return state["progress"]


def annotated_rows(episodes: tuple[Episode, ...], annotated: frozenset[int]) -> np.ndarray:
    """Rows of the frames of those `episodes`, of one split, that are annotated."""
    rows = [np.arange(e.row, e.row + e.length) for e in episodes if e.index in annotated]
    if not rows:
        listed = ", ".join(str(e.index) for e in episodes[:5]) + (", …" if len(episodes) > 5 else "")
        raise ValueError(
            f"none of the {len(episodes)} {episodes[0].split if episodes else ''} episodes ({listed}) is annotated: annotate or mark "
            "some of them first (notebook 01)"
        )
    return np.concatenate(rows)
