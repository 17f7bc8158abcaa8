"""Training a LeRobot policy with and without RA-BC weights (Eq 7).

    L_RABC = Σ_i w_i ℓ_i / (Σ_i w_i + ε)                                                       Eq 7

Policies, processors and checkpoints are LeRobot's, made by its factory; the loop is ours, because LeRobot's counts padded
actions in a sample's loss and cannot run two arms on the same draws. Both arms see the same frames and the same noise in
the same order: they differ in the weights alone.

A trained arm is a folder in LeRobot's layout, `checkpoints/last/{pretrained_model,training_state}`. `last` is itself the
checkpoint and no link to `checkpoints/<step>`, because DVC turns links into copies. LeRobot goes on from it with
`lerobot-train --resume=true --config_path=.../checkpoints/last/pretrained_model/train_config.json --steps=...
--dataset.root=...`, on all frames and without weights unless `--sample_weighting` says otherwise.
"""

import contextlib
import dataclasses
import inspect
import io
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from lerobot.common.train_utils import load_training_state, save_checkpoint
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.optim import CosineDecayWithWarmupSchedulerConfig
from lerobot.policies import get_policy_class, make_policy, make_pre_post_processors
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.factory import make_policy_config
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from lerobot.utils.random_utils import set_seed
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import sarm_lib.small_pi0  # noqa: F401  (registers the policy type)
from sarm_lib.artifacts import (
    PROVENANCE,
    code_digest,
    digest,
    folder_identity,
    is_current,
    read_json,
    remove,
    staged,
    write_json,
)
from sarm_lib.dataset import Dataset, Episode, fingerprint, rows_of
from sarm_lib.schedule import learning_rate

log = logging.getLogger(__name__)

CHECKPOINT = Path("checkpoints/last")
WEIGHTS = "model.safetensors"
CURVE = "curve.json"
OTHER_STATE = "observation.other_state"
VALIDATION_FRAMES, VALIDATION_BATCH = 256, 64
SPOT_CHECKS = 16


# --- the policy -----------------------------------------------------------------------------------------------------


def make(settings, dataset: Dataset, device: str) -> tuple[PreTrainedPolicy, Any, Any]:
    """A policy with its pre- and postprocessor, as LeRobot's factory makes them. settings: `params.policy`.

    A pretrained policy is told this dataset's cameras, and normalises with this dataset's statistics.
    Raises ValueError where its weights are not those of the checkpoint.
    """
    config, statistics = make_config(settings, device), training_statistics(dataset)
    config.input_features = input_features(dataset)
    policy = make_policy(config, ds_meta=dataset.lerobot_metadata)
    overrides = {}
    if settings.pretrained_path:
        if not config.use_peft:
            check_weights(policy, settings.pretrained_path)
        normalizer = {"stats": statistics, "norm_map": config.normalization_mapping}
        features = {**config.input_features, **config.output_features}
        overrides = {
            "preprocessor_overrides": {
                "device_processor": {"device": device},
                "normalizer_processor": {**normalizer, "features": features},
            },
            "postprocessor_overrides": {"unnormalizer_processor": {**normalizer, "features": config.output_features}},
        }
    preprocessor, postprocessor = make_pre_post_processors(
        config,
        pretrained_path=settings.pretrained_path,
        dataset_stats=statistics,
        dataset_meta=dataset.lerobot_metadata,
        **overrides,
    )
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            step.rename_map = rename_map(dataset)
    return policy, preprocessor, postprocessor


def make_config(settings, device: str) -> PreTrainedConfig:
    """The policy's configuration: its type's defaults with the fields that `params.policy` sets.

    Raises ValueError, with the key, for a type, a field or a size that cannot be trained here.
    """
    types = PreTrainedConfig.get_known_choices()
    if settings.type not in types:
        raise ValueError(f"policy.type: LeRobot has no {settings.type!r}; it has {', '.join(sorted(types))}")
    if "reduction" not in inspect.signature(get_policy_class(settings.type).forward).parameters:
        raise ValueError(f"policy.type: {settings.type} gives no loss of a single sample to weight; pi0 does")
    if settings.n_action_steps > settings.chunk_size:
        raise ValueError(
            f"policy.n_action_steps: {settings.n_action_steps} of a chunk of {settings.chunk_size} (policy.chunk_size) actions"
        )
    fields = {field.name for field in dataclasses.fields(types[settings.type]) if field.init}
    for name in settings.config:
        if name not in fields:
            raise ValueError(f"policy.config: {settings.type} has no {name!r}; it has {', '.join(sorted(fields))}")
    return make_policy_config(
        settings.type,
        device=device,
        chunk_size=settings.chunk_size,
        n_action_steps=settings.n_action_steps,
        push_to_hub=False,
        pretrained_path=Path(settings.pretrained_path) if settings.pretrained_path else None,
        **settings.config,
    )


def input_features(dataset: Dataset) -> dict[str, PolicyFeature]:
    """What a policy sees: every camera, and `base.state_key` under LeRobot's name of the state."""
    features = dataset_to_policy_features(dataset.lerobot_metadata.features)
    state = PolicyFeature(type=FeatureType.STATE, shape=features[dataset.state_key].shape)
    return {**{key: features[key] for key in dataset.camera_keys}, OBS_STATE: state}


def rename_map(dataset: Dataset) -> dict[str, str]:
    """How the preprocessor, which a checkpoint carries along, names the dataset's state; another state steps aside."""
    if dataset.state_key == OBS_STATE:
        return {}
    return {dataset.state_key: OBS_STATE, OBS_STATE: OTHER_STATE}


def check_weights(policy: PreTrainedPolicy, checkpoint: str | Path) -> None:
    """Raise ValueError unless the tensors of `policy` are those of `checkpoint` (a folder or a Hub id).

    π0's own loading goes on after any error, with random weights or with some of them, and only prints that it does.
    """
    try:
        path = Path(checkpoint) / WEIGHTS
        if not path.exists():
            path = Path(hf_hub_download(str(checkpoint), WEIGHTS, revision=policy.config.pretrained_revision))
        with safe_open(path, "pt") as stored:
            _compare(policy, stored)
    except Exception as error:  # huggingface_hub and safetensors raise a dozen kinds
        raise ValueError(f"the policy's checkpoint {checkpoint} cannot be used: {error}") from error


def _compare(policy: PreTrainedPolicy, stored) -> None:
    """Every tensor of either has its like in the other, and some of them, spread over the network, are equal."""
    own, keys = policy.state_dict(), sorted(stored.keys())
    named = {key: torch.tensor(i) for i, key in enumerate(keys)}
    if rename := getattr(policy, "_fix_pytorch_state_dict_keys", None):  # OpenPI's names of π0
        named = rename(named, policy.config)
    named = {name if name in own else f"model.{name}": keys[i] for name, i in named.items()}
    held = {own[name].data_ptr() for name in named if name in own}  # a file holds tied weights once
    missing = [name for name, tensor in own.items() if tensor.data_ptr() not in held]
    unexpected = [name for name in named if name not in own]
    if missing or unexpected:
        raise ValueError(
            f"of {len(own)} tensors of the policy it lacks {len(missing)} ({', '.join(missing[:3])}), and it holds "
            f"{len(unexpected)} others ({', '.join(unexpected[:3])}): are policy.type and policy.config those it was trained with?"
        )
    for name in list(named)[:: max(1, len(named) // SPOT_CHECKS)]:
        value = stored.get_tensor(named[name])
        if value.shape != own[name].shape or not torch.equal(value.to(own[name].dtype), own[name].cpu()):
            raise ValueError(f"{name} was not loaded: its shape in the file is {tuple(value.shape)}")


def training_statistics(dataset: Dataset) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of state and action over the training episodes, and LeRobot's of the cameras; of nothing else."""
    rows, statistics = rows_of(dataset.split("train")), {}
    for key, vectors in ((OBS_STATE, dataset.states), (ACTION, dataset.actions)):
        values = vectors[rows]
        quantiles = {f"q{q:02d}": np.quantile(values, q / 100, axis=0) for q in (1, 10, 50, 90, 99)}
        ends = {"min": values.min(0), "max": values.max(0), "count": np.array([len(values)])}
        statistics[key] = {"mean": values.mean(0), "std": values.std(0), **ends, **quantiles}
    return statistics | {key: dataset.lerobot_metadata.stats[key] for key in dataset.camera_keys}


def per_sample_loss(policy: PreTrainedPolicy, batch: dict[str, Any]) -> Tensor:
    """ℓ_i (B,): π0's flow-matching loss over the actions that exist, other policies' own per-sample loss.

    LeRobot's `reduction="none"` also averages over the actions padded beyond the end of an episode.
    """
    if not isinstance(policy, PI0Policy):
        return policy.forward(batch, reduction="none")[0]
    images, masks = policy._preprocess_images(batch)
    actions = policy.prepare_action(batch)
    noise = policy.model.sample_noise(actions.shape, actions.device)
    time = policy.model.sample_time(actions.shape[0], actions.device)
    tokens, token_mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
    losses = policy.model.forward(images, masks, tokens, token_mask, policy.prepare_state(batch), actions, noise, time)
    losses = losses[..., : policy.config.output_features[ACTION].shape[0]].mean(-1)  # (B, chunk)
    exists = ~batch["action_is_pad"]
    return (losses * exists).sum(1) / exists.sum(1)


class WeightedLoss(nn.Module):
    """Eq 7 over a batch; without weights, the plain mean."""

    def __init__(self, policy: PreTrainedPolicy, epsilon: float) -> None:
        super().__init__()
        self.policy, self.epsilon = policy, epsilon

    def forward(self, batch: dict[str, Any], weight: Tensor | None) -> Tensor:
        losses = per_sample_loss(self.policy, batch)
        if weight is None:
            return losses.mean()
        return (weight * losses).sum() / (weight.sum() + self.epsilon)


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass
class CachedFrames:
    """All frames of some episodes in memory at the policy's resolution; batches are gathers.

    A batch holds what LeRobot's own loader returns: images (B, 3, H, W) in [0, 1], state, an action chunk (B, chunk, A)
    with `action_is_pad`, task texts and the global frame index.
    """

    dataset: Dataset
    chunk_size: int
    images: dict[str, np.ndarray]  # a camera: (M, 3, H, W) uint8
    position: np.ndarray  # (N,) row of the dataset -> row of `images`, -1 where it is not held

    def batches(self, rows: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
        return map(self.batch, rows)

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        dataset, frames = self.dataset, self.dataset.frames
        held = self.position[rows]
        assert (held >= 0).all(), "a frame that is not in the cache"
        last = rows - frames.frame_index.to_numpy()[rows] + self._lengths[rows] - 1
        chunk = rows[:, None] + np.arange(self.chunk_size)
        tasks = dataset.tasks
        return {
            **{key: torch.from_numpy(images[held]).float() / 255 for key, images in self.images.items()},
            dataset.state_key: torch.from_numpy(dataset.states[rows]),
            ACTION: torch.from_numpy(dataset.actions[np.minimum(chunk, last[:, None])]),
            "action_is_pad": torch.from_numpy(chunk > last[:, None]),
            "index": torch.from_numpy(frames["index"].to_numpy()[rows]),
            "task": [tasks[i] for i in frames.task_index.to_numpy()[rows]],
        }

    @property
    def _lengths(self) -> np.ndarray:
        return np.repeat([e.length for e in self.dataset.episodes], [e.length for e in self.dataset.episodes])


def cache_frames(
    dataset: Dataset, episodes: tuple[Episode, ...], image_keys: list[str], resolution: tuple[int, int], chunk_size: int
) -> CachedFrames:
    """Decode `episodes` once and hold them at `resolution`, resized as π0 does it."""
    position, count = np.full(dataset.num_frames, -1), 0
    for episode in episodes:
        position[episode.rows] = np.arange(count, count + episode.length)
        count += episode.length
    images = {key: np.empty((count, 3, *resolution), dtype=np.uint8) for key in image_keys}
    for key in image_keys:
        frames = tqdm(dataset.iterate_frames(key, episodes), total=count, desc=key, unit="frame", mininterval=5)
        for i, (_, image) in enumerate(frames):
            pixels = torch.from_numpy(image)[None].float() / 255
            resized = resize_with_pad_torch(pixels, *resolution)[0]
            images[key][i] = (resized * 255).round().byte().permute(2, 0, 1).numpy()
    return CachedFrames(dataset, chunk_size, images, position)


@dataclass
class StreamedFrames:
    """Frames read from the dataset when they are needed, by LeRobot's loader in worker processes."""

    dataset: Dataset
    chunk_size: int
    num_workers: int

    def batches(self, rows: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
        meta, index = self.dataset.lerobot_metadata, self.dataset.frames["index"].to_numpy()
        source = LeRobotDataset(
            meta.repo_id,
            root=meta.root,
            delta_timestamps={ACTION: [i / meta.fps for i in range(self.chunk_size)]},
            video_backend=video_backend(),
        )
        sampler = ([int(index[row]) for row in batch] for batch in rows)
        loader = torch.utils.data.DataLoader(source, batch_sampler=_Once(sampler), num_workers=self.num_workers)
        return iter(loader)


def frames_for(settings, dataset: Dataset, splits: tuple[str, ...], device: str) -> CachedFrames | StreamedFrames:
    """Where the policy's batches come from, for the episodes of `splits`. settings: `params.policy`."""
    if not settings.cache_frames:
        return StreamedFrames(dataset, settings.chunk_size, settings.num_workers)
    resolution = make_config(settings, device).image_resolution
    episodes = tuple(episode for split in splits for episode in dataset.split(split))
    return cache_frames(dataset, episodes, dataset.camera_keys, resolution, settings.chunk_size)


def video_backend() -> str:
    """LeRobot's decoder for random access: torchcodec where the system has its FFmpeg libraries, else PyAV."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        log.info("torchcodec finds no FFmpeg libraries: frames are decoded with PyAV, which carries its own")
        return "pyav"
    return "torchcodec"


class _Once:
    """A generator as a batch sampler."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One policy to train: its name, and a weight for every row of the dataset, or None for plain BC."""

    name: str
    weights: np.ndarray | None  # (N,) float32


def train_arm(
    arm: Arm, params, dataset: Dataset, frames: CachedFrames | StreamedFrames, device: str, folder: Path
) -> list[dict[str, float]]:
    """Train one arm into `folder` and return its learning curve.

    What was trained before from the same inputs is kept, and a run that was stopped goes on where it last saved.
    """
    settings, seed = params.policy, params.base.seed
    made_from = provenance(arm, params, dataset)
    work = params.paths.write(f"work/policy-{arm.name}-{digest(made_from)}")
    if is_current(folder, made_from):
        log.info("%s: trained already with these data, weights and settings", arm.name)
        return read_json(folder / CURVE)
    torch.manual_seed(seed)
    policy, preprocessor, postprocessor = make(settings, dataset, device)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = policy.config.get_optimizer_preset().build(trainable)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: learning_rate(s, settings.steps, settings.warmup_steps)
    )
    accelerator = Accelerator(cpu=device == "cpu")
    model, optimizer = accelerator.prepare(WeightedLoss(policy, params.rabc.epsilon), optimizer)
    config = _train_config(settings, dataset, policy, arm, seed)
    step, curve = _resume(work, policy, optimizer, scheduler)

    rows = rows_of(dataset.split("train"))
    draw = lambda s: np.random.default_rng([seed, s, accelerator.process_index]).choice(rows, settings.batch_size)  # noqa: E731
    bar = tqdm(initial=step, total=settings.steps, desc=f"training {arm.name}", unit="step", mininterval=5)
    running: list[tuple[float, float]] = []
    policy.train()
    for batch in frames.batches(draw(s) for s in range(step, settings.steps)):
        weight = None if arm.weights is None else torch.from_numpy(arm.weights[draw(step)]).to(accelerator.device)
        torch.manual_seed(seed * 1_000_003 + step)  # the same noise and times for every arm, also after a resumption
        loss = model(preprocessor(batch), weight)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trainable, policy.config.optimizer_grad_clip_norm)
        optimizer.step()
        scheduler.step()
        step += 1
        bar.update()
        running.append((loss.item(), 1.0 if weight is None else weight.mean().item()))
        if step % settings.log_every == 0 or step == settings.steps:
            loss_mean, weight_mean = np.mean(running, axis=0)
            curve.append({"step": step, "loss": float(loss_mean), "mean_weight": float(weight_mean)})
            running = []
            bar.set_postfix(loss=f"{loss_mean:.4f}")
        if step % settings.save_every == 0 and step < settings.steps and accelerator.is_main_process:
            with staged(work / CHECKPOINT) as partial:
                save_checkpoint(partial, step, config, policy, optimizer, scheduler, preprocessor, postprocessor)
                write_json(partial / CURVE, curve)
    bar.close()
    set_seed(seed)  # the state of Python's generators is saved too, and is another one in every process
    with staged(folder) as partial:
        save_checkpoint(partial / CHECKPOINT, step, config, policy, optimizer, scheduler, preprocessor, postprocessor)
        write_json(partial / CURVE, curve)
        write_json(partial / PROVENANCE, made_from)
    remove(work)
    return curve


def provenance(arm: Arm, params, dataset: Dataset) -> dict[str, Any]:
    """Everything that a trained arm is made from."""
    return {
        "fingerprint": fingerprint(dataset.root),
        "splits": [[episode.index, episode.split] for episode in dataset.episodes],
        "weights": None if arm.weights is None else digest(arm.weights.tobytes().hex(), params.rabc.epsilon),
        "seed": params.base.seed,
        "settings": params.policy.model_dump(),
        "pretrained": folder_identity(Path(params.policy.pretrained_path or "none")),
        "code": code_digest("policy"),
    }


@torch.no_grad()
def validation_loss(
    folder: Path, frames: CachedFrames | StreamedFrames, episodes: tuple[Episode, ...], seed: int, device: str
) -> float:
    """Unweighted loss of a trained policy on evenly spaced frames of `episodes`, with fixed noise."""
    policy, preprocessor, _ = load(folder, device)
    rows = rows_of(episodes)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, VALIDATION_FRAMES).astype(int))]
    torch.manual_seed(seed)
    parts = [rows[i : i + VALIDATION_BATCH] for i in range(0, len(rows), VALIDATION_BATCH)]
    losses = [per_sample_loss(policy, preprocessor(batch)) for batch in frames.batches(iter(parts))]
    return float(torch.cat(losses).mean())


@torch.no_grad()
def first_action(folder: Path, frames: CachedFrames | StreamedFrames, episode: Episode, device: str) -> np.ndarray:
    """The action (A,) that a trained policy takes at the first frame of `episode`, in the robot's units."""
    policy, preprocessor, postprocessor = load(folder, device)
    batch = next(frames.batches(iter([np.array([episode.row])])))
    torch.manual_seed(0)
    observation = {key: value for key, value in preprocessor(batch).items() if key != ACTION}
    return postprocessor(policy.select_action(observation))[0].cpu().numpy()


def load(folder: Path, device: str) -> tuple[PreTrainedPolicy, Any, Any]:
    """A trained policy with its processors, by LeRobot's own loading."""
    path = folder / CHECKPOINT / "pretrained_model"
    config = PreTrainedConfig.from_pretrained(path)
    config.pretrained_path, config.device = path, device
    with contextlib.redirect_stdout(io.StringIO()):  # LeRobot prints that it loads
        policy = get_policy_class(config.type).from_pretrained(path, config=config).to(device).eval()
    if not config.use_peft:
        check_weights(policy, path)
    overrides = {"device_processor": {"device": device}}
    return policy, *make_pre_post_processors(config, pretrained_path=str(path), preprocessor_overrides=overrides)


def _resume(work: Path, policy, optimizer, scheduler) -> tuple[int, list[dict[str, float]]]:
    checkpoint = work / CHECKPOINT
    if not checkpoint.exists():
        return 0, []
    weights = load_file(checkpoint / "pretrained_model" / WEIGHTS)
    policy.load_state_dict(weights, strict=False)  # tied weights are stored once
    step, _, _ = load_training_state(checkpoint, optimizer, scheduler)
    log.info("resuming at step %d", step)
    return step, read_json(checkpoint / CURVE)


def _train_config(settings, dataset: Dataset, policy, arm: Arm, seed: int) -> TrainPipelineConfig:
    """What LeRobot writes beside a policy: how it was trained, and how to go on."""
    peak = settings.learning_rate
    return TrainPipelineConfig(
        dataset=DatasetConfig(
            repo_id=dataset.lerobot_metadata.repo_id,
            episodes=[episode.index for episode in dataset.split("train")],
            video_backend="pyav",  # runs everywhere; LeRobot's default asks the machine
        ),
        policy=policy.config,
        optimizer=dataclasses.replace(policy.config.get_optimizer_preset(), lr=peak),
        scheduler=CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=settings.warmup_steps, num_decay_steps=settings.steps, peak_lr=peak, decay_lr=peak / 10
        ),
        rename_map=rename_map(dataset),
        job_name=arm.name,
        seed=seed,
        batch_size=settings.batch_size,
        steps=settings.steps,
    )
