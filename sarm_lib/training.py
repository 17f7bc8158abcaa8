"""Training SARM from the embeddings: batches by vectorised gathers, exact resumption, the best checkpoint by validation.

Every random draw of a step comes from the stream (seed, step, process), so a run that is stopped and resumed draws what
an uninterrupted one does.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from faker import Faker
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sarm_lib.artifacts import code_digest, staged
from sarm_lib.checkpoint import RewardModel
from sarm_lib.dataset import Dataset, Episode
from sarm_lib.encoder import Embeddings, Encoder
from sarm_lib.model import Sarm, SarmSpec
from sarm_lib.progress import frame_store, score
from sarm_lib.schedule import learning_rate
from sarm_lib.stages import Labels, progress
from sarm_lib.windows import FrameStore, Windows, WindowSpec

log = logging.getLogger(__name__)

PERTURBATIONS = 256
VERBS = ("move", "grasp", "rotate", "push", "pull", "slide", "lift", "place")


class Batch(NamedTuple):
    """Training windows and their targets. Keys of `stage` and `tau` are heads; both are (B, T)."""

    windows: Windows
    stage: dict[str, Tensor]
    tau: dict[str, Tensor]
    given: Tensor  # (B,) bool: the progress transformer is given the true stage (teacher forcing)
    rows: np.ndarray  # (B, T) dataset rows of the images, for whoever wants to look


@dataclass
class Augmentation:
    rewind_probability: float
    language_perturbation_probability: float
    gt_stage_ratio: float


@dataclass
class Sampler:
    """Draws training batches from annotated frames."""

    store: FrameStore
    spec: SarmSpec
    rows: np.ndarray  # (M,) frames to draw from
    stage: dict[str, np.ndarray]  # a head: (N,)
    tau: dict[str, np.ndarray]  # a head: (N,)
    perturbations: Tensor  # (P, E) embeddings of texts that are not the task
    augmentation: Augmentation

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """One batch of `size` windows with rewind, language perturbation and teacher forcing drawn a sample."""
        window = self.spec.window
        rows = rng.choice(self.rows, size)
        start, length = self.store.start[rows], self.store.length[rows]
        observed = window.observed(rows - start, length)
        room = window.rewind_room(observed)
        rewinds = rng.random(size) < self.augmentation.rewind_probability
        steps = np.where(rewinds, np.ceil(rng.random(size) * room), 0).astype(np.int64)
        frames, valid = window.with_rewind(observed, steps)
        frames = frames + start[:, None]

        perturbed = rng.random(size) < self.augmentation.language_perturbation_probability
        other = self.perturbations[torch.from_numpy(rng.integers(0, len(self.perturbations), size))]
        text = torch.where(torch.from_numpy(perturbed)[:, None], other, self.store.task_texts(rows))
        right = ~perturbed[:, None]  # with another text than the task's there is no progress
        return Batch(
            self.store.gather(frames, valid, text),
            {head: torch.from_numpy(stage[frames] * right) for head, stage in self.stage.items()},
            {head: torch.from_numpy((tau[frames] * right).astype(np.float32)) for head, tau in self.tau.items()},
            torch.from_numpy(rng.random(size) < self.augmentation.gt_stage_ratio),
            frames,
        )


class SarmLoss(nn.Module):
    """Stage cross-entropy plus τ mean squared error of every head, over valid positions only."""

    def __init__(self, sarm: Sarm) -> None:
        super().__init__()
        self.sarm = sarm

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` and its parts, one number each."""
        valid, parts = batch.windows.valid, {}
        stage_logits = self.sarm.stage_logits(batch.windows, list(batch.stage))
        for head, true_stage in batch.stage.items():
            logits = stage_logits[head]
            prior = torch.where(batch.given[:, None], true_stage, logits.argmax(-1))
            tau = self.sarm.tau(batch.windows, head, prior)
            parts[f"{head}_stage_loss"] = F.cross_entropy(logits[valid], true_stage[valid])
            parts[f"{head}_tau_loss"] = F.mse_loss(tau[valid], batch.tau[head][valid])
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
        perturbations=encoder.texts(perturbed_texts(PERTURBATIONS, params.base.seed)),
        augmentation=Augmentation(
            settings.rewind_probability, settings.language_perturbation_probability, settings.gt_stage_ratio
        ),
    )


def validator(dataset: Dataset, labels: Labels, store: FrameStore) -> Callable[[Sarm], dict[str, float]]:
    """Scores a model on the annotated val episodes, augmentation off: `val_mse` of φ, the mean over episodes and heads."""
    episodes = [episode for episode in dataset.split("val") if episode.index in labels.annotated]
    rows = annotated_rows(tuple(episodes), labels.annotated)
    ends = np.cumsum([episode.length for episode in episodes])[:-1]

    def validate(sarm: Sarm) -> dict[str, float]:
        errors = []
        for head in sarm.spec.heads:
            target = progress(labels.stage[head][rows], labels.tau[head][rows], np.array(labels.proportions[head]))
            squared = (score(sarm, store, rows, head).progress - target) ** 2
            errors += [float(episode.mean()) for episode in np.split(squared, ends)]
        return {"val_mse": float(np.mean(errors))}

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
        "settings": params.sarm.model_dump(),
        "code": code_digest("training"),
    }


def train(
    sarm: Sarm,
    sampler: Sampler,
    validate: Callable[[Sarm], dict[str, float]],
    settings,
    seed: int,
    device: str,
    work: Path,
) -> list[dict[str, float]]:
    """Train `sarm` in place and leave it with the weights that validated best. Returns the learning curve.

    settings: `params.sarm`. work: a folder for unfinished work; a run that finds some there goes on from it.
    """
    # Heads that a mode does not train, and the stage model of a single stage, have no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[unused])
    model = SarmLoss(sarm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, settings.steps, settings.warmup_steps)
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    state = TrainingState(work / "training_state.pt")
    torch.manual_seed(seed)
    step, curve, best = state.restore(sarm, optimizer, schedule) or (0, [], None)
    bar = tqdm(initial=step, total=settings.steps, desc="training SARM", unit="step", mininterval=5)
    sums: dict[str, float] = {}
    while step < settings.steps:
        sarm.train()
        rng = np.random.default_rng([seed, step, accelerator.process_index])
        batch = _to(sampler.draw(rng, settings.batch_size), accelerator.device)
        parts = model(batch)
        optimizer.zero_grad()
        accelerator.backward(parts["loss"])
        accelerator.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        schedule.step()
        step += 1
        bar.update()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % settings.eval_every == 0 or step == settings.steps:
            since = settings.eval_every if step % settings.eval_every == 0 else step % settings.eval_every
            scores = validate(sarm)
            curve.append({"step": step, **{k: v / since for k, v in sums.items()}, **scores})
            sums = {}
            bar.set_postfix(loss=f"{curve[-1]['loss']:.4f}", val_mse=f"{scores['val_mse']:.4f}")
            log.info("%s", json.dumps(curve[-1]))
            if best is None or scores["val_mse"] < best[0]:
                best = (scores["val_mse"], {k: v.detach().cpu().clone() for k, v in sarm.state_dict().items()})
            if accelerator.is_main_process and step % settings.save_every == 0 and step < settings.steps:
                state.save(sarm, optimizer, schedule, step, curve, best)
    bar.close()
    sarm.load_state_dict(best[1])
    sarm.eval()
    return curve


@dataclass
class TrainingState:
    """Unfinished training on disk: what an uninterrupted run would have in memory at a validation step."""

    path: Path

    def save(self, sarm, optimizer, schedule, step: int, curve: list, best: tuple) -> None:
        state = {
            "model": sarm.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "progress": (step, curve, best),
        }
        with staged(self.path) as partial:
            torch.save(state, partial)

    def restore(self, sarm, optimizer, schedule) -> tuple | None:
        if not self.path.exists():
            return None
        state = torch.load(self.path, weights_only=True)
        sarm.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        log.info("resuming at step %d", state["progress"][0])
        return state["progress"]


def annotated_rows(episodes: tuple[Episode, ...], annotated: frozenset[int]) -> np.ndarray:
    """Rows of the frames of those `episodes` that are annotated."""
    rows = [np.arange(e.row, e.row + e.length) for e in episodes if e.index in annotated]
    if not rows:
        raise ValueError("none of these episodes is annotated: annotate some first (notebook 01)")
    return np.concatenate(rows)


def _to(batch: Batch, device: torch.device) -> Batch:
    move = lambda tensors: {k: v.to(device, non_blocking=True) for k, v in tensors.items()}  # noqa: E731
    return Batch(batch.windows.to(device), move(batch.stage), move(batch.tau), batch.given.to(device), batch.rows)
