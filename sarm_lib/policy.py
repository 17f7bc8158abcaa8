"""Training a LeRobot policy with and without RA-BC weights (Eq 7, `losses`), or on frames drawn by their weights.

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
import io
import logging
import re
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from huggingface_hub import hf_hub_download
from lerobot.common.train_utils import load_training_state, save_checkpoint
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.configs.default import DatasetConfig, PeftConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.optim import CosineDecayWithWarmupSchedulerConfig
from lerobot.policies import get_policy_class, make_policy, make_pre_post_processors
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.factory import make_policy_config
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import RenameObservationsProcessorStep, TokenizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from lerobot.utils.random_utils import set_seed
from peft import PeftConfig as AdapterConfig
from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

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
from sarm_lib.dataset import Dataset, Episode, rows_of
from sarm_lib.live import bar
from sarm_lib.losses import SEVERAL_DRAWS, TAKES_NOISE, WeightedLoss, gives_sample_losses, per_sample_loss, sample_noise
from sarm_lib.processes import new_accelerator
from sarm_lib.schedule import Average, Estimate, learning_rate

log = logging.getLogger(__name__)

CHECKPOINT = Path("checkpoints/last")
WEIGHTS, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
CURVE, LIVE = "curve.json", "live.safetensors"
OTHER_STATE = "observation.other_state"
VALIDATION_FRAMES, VALIDATION_BATCH = 256, 64
SPOT_CHECKS = 16
TRIAL_STEPS = 3
SAME_POLICY = ("num_workers", "cache_frames", "log_every", "save_every")  # settings that change nothing that is learned
# What LeRobot's policies call the length of their chunks.
CHUNK = ("chunk_size", "horizon", "action_chunk_size", "action_horizon")


# --- the policy -----------------------------------------------------------------------------------------------------


def make(settings, dataset: Dataset, device: str) -> tuple[PreTrainedPolicy, Any, Any]:
    """A policy with its pre- and postprocessor, as LeRobot's factory makes them. settings: `params.policy`.

    A pretrained policy is told this dataset's cameras, and normalises with this dataset's statistics.
    Raises ValueError where its weights are not those of the checkpoint.
    """
    config, statistics = make_config(settings, device), training_statistics(dataset)
    config.input_features = input_features(settings, dataset)
    try:
        policy = make_policy(config, ds_meta=dataset.lerobot_metadata)
    except (ValueError, OSError) as error:  # other cameras than it can see, or weights that cannot be fetched
        raise ValueError(
            f"policy.type: {settings.type} cannot be made for this dataset, with the cameras {', '.join(cameras(settings, dataset))} "
            f"(policy.image_keys) and policy.config {settings.config}: {error}"
        ) from error
    overrides = {}
    if settings.pretrained_path:
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
        if isinstance(step, TokenizerProcessorStep):
            check_task_lengths(step, dataset.tasks)
    return policy, preprocessor, postprocessor


def make_config(settings, device: str) -> PreTrainedConfig:
    """The policy's configuration: its type's defaults with the fields that `params.policy` sets.

    Raises ValueError, with the key, for a type, a field or a size that cannot be trained here.
    """
    types = PreTrainedConfig.get_known_choices()
    if settings.type not in types:
        raise ValueError(f"policy.type: LeRobot has no {settings.type!r}; it has {', '.join(sorted(types))}")
    if settings.weighting == "loss" and not gives_sample_losses(get_policy_class(settings.type)):
        raise ValueError(
            f"policy.weighting: {settings.type} gives no loss of a single sample to weight; draw the samples by their weights "
            "instead (sampling)"
        )
    if settings.n_action_steps > settings.chunk_size:
        raise ValueError(
            f"policy.n_action_steps: {settings.n_action_steps} of a chunk of {settings.chunk_size} (policy.chunk_size) actions"
        )
    named = settings.pretrained_path
    if named and not Path(named).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        raise ValueError(f"policy.pretrained_path: there is no folder {named}, and no Hub id looks like that")
    if settings.peft is not None and not settings.pretrained_path:
        raise ValueError("policy.peft: adapters change a pretrained policy; name one (policy.pretrained_path)")
    fields = {field.name for field in dataclasses.fields(types[settings.type]) if field.init}
    for name in settings.config:
        if name not in fields:
            raise ValueError(f"policy.config: {settings.type} has no {name!r}; it has {', '.join(sorted(fields))}")
    asked = {
        **dict.fromkeys(CHUNK, settings.chunk_size),
        "n_action_steps": settings.n_action_steps,
        "do_mask_loss_for_padding": True,  # Diffusion would learn copies of the last action beyond the end of an episode
        # Of VQ-BeT, which has 20,000 by default.
        "n_vqvae_training_steps": max(1, settings.steps * settings.accumulate // 5),
    }
    asked = {name: value for name, value in asked.items() if name in fields and name not in settings.config}
    try:
        made = make_policy_config(
            settings.type,
            device=device,
            **asked,
            push_to_hub=False,
            pretrained_path=Path(settings.pretrained_path) if settings.pretrained_path else None,
            **settings.config,
        )
    except (ValueError, NotImplementedError) as error:  # the policy's own checks of its fields
        raise ValueError(f"policy.config: {settings.type} refuses {settings.config | asked}: {error}") from error
    if made.action_delta_indices is None or made.reward_delta_indices is not None:
        raise ValueError(
            f"policy.type: {settings.type} learns from rewards, not from demonstrations: choose another one"
        )
    ahead = sum(delta >= 0 for delta in made.action_delta_indices)
    if not fields.intersection(CHUNK) and ahead != settings.chunk_size:
        raise ValueError(
            f"policy.chunk_size: {settings.type} predicts {ahead} actions, by its own fields (policy.config): set this to {ahead}"
        )
    codebook, batches = getattr(made, "n_vqvae_training_steps", 0), settings.steps * settings.accumulate
    if codebook >= batches:
        raise ValueError(
            f"policy.config.n_vqvae_training_steps: {settings.type} learns its codebook of actions from {codebook} batches, and how to "
            f"act from those that follow, of which policy.steps leaves none ({batches} in all)"
        )
    return made


def adapted(policy: PreTrainedPolicy, settings) -> PreTrainedPolicy | PeftModel:
    """What is trained and saved: the policy itself or, with `policy.peft`, the adapters that LeRobot puts into it.

    The policy computes with them from now on; its own weights are frozen.
    """
    if settings.peft is None:
        return policy
    return policy.wrap_with_peft(peft_cli_overrides=dataclasses.asdict(peft_config(settings)))


def peft_config(settings) -> PeftConfig | None:
    """`policy.peft` as LeRobot's configuration. Raises ValueError for a field it does not have."""
    fields = {field.name for field in dataclasses.fields(PeftConfig)}
    if unknown := set(settings.peft or {}) - fields:
        raise ValueError(
            f"policy.peft: LeRobot has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(fields))}"
        )
    return None if settings.peft is None else PeftConfig(**settings.peft)


def cameras(settings, dataset: Dataset) -> list[str]:
    """Those that a policy sees: `policy.image_keys`, or all of the dataset's. Raises ValueError for one that it lacks."""
    for key in settings.image_keys:
        if key not in dataset.camera_keys:
            raise ValueError(
                f"policy.image_keys: no camera {key!r} in this dataset; it has {', '.join(dataset.camera_keys)}"
            )
    return settings.image_keys or dataset.camera_keys


def input_features(settings, dataset: Dataset) -> dict[str, PolicyFeature]:
    """What a policy sees: its cameras, and `base.state_key` under LeRobot's name of the state."""
    features = dataset_to_policy_features(dataset.lerobot_metadata.features)
    state = PolicyFeature(type=FeatureType.STATE, shape=features[dataset.state_key].shape)
    return {**{key: features[key] for key in cameras(settings, dataset)}, OBS_STATE: state}


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


def check_task_lengths(step: TokenizerProcessorStep, tasks: list[str]) -> None:
    """Raise ValueError for a task that the policy would read only in part: two tasks may differ in their last words."""
    for task in tasks:
        needed = len(step.input_tokenizer(task)["input_ids"])
        if needed > step.max_length:
            raise ValueError(
                f"policy.config.tokenizer_max_length: the task {task!r} has {needed} tokens, and the policy reads {step.max_length}"
            )


def _compare(policy: PreTrainedPolicy, stored) -> None:
    """Every tensor of either has its like in the other, and some of them, spread over the network, are equal."""
    own, keys = policy.state_dict(), sorted(stored.keys())
    named = {key: torch.tensor(i) for i, key in enumerate(keys)}
    if rename := getattr(policy, "_fix_pytorch_state_dict_keys", None):  # OpenPI's names of π0
        logging.disable(logging.WARNING)  # it wonders, of every tower's patches, whether they might need handling
        try:
            named = rename(named, policy.config)
        finally:
            logging.disable(logging.NOTSET)
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


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass
class CachedFrames:
    """All frames of some episodes in memory at the policy's resolution; batches are gathers.

    A batch holds what LeRobot's own loader returns: images (B, 3, H, W) in [0, 1], state, an action chunk (B, chunk, A)
    with `action_is_pad`, task texts and the global frame index.
    """

    dataset: Dataset
    images: dict[str, np.ndarray]  # a camera: (M, 3, H, W) uint8
    position: np.ndarray  # (N,) row of the dataset -> row of `images`, -1 where it is not held
    action_deltas: tuple[int, ...]  # actions that a policy learns, 0 that of the current frame
    observation_deltas: tuple[int, ...] | None = None  # frames that it sees; None: the current one, without a time axis

    def batches(self, rows: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
        return map(self.batch, rows)

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        dataset, frames = self.dataset, self.dataset.frames
        first = rows - frames.frame_index.to_numpy()[rows]
        last = first + self._lengths[rows] - 1
        seen = rows
        if self.observation_deltas is not None:  # (B, T), as LeRobot's loader repeats the ends of an episode
            seen = np.clip(rows[:, None] + np.array(self.observation_deltas), first[:, None], last[:, None])
        held = self.position[seen]
        assert (held >= 0).all(), "a frame that is not in the cache"
        chunk = rows[:, None] + np.array(self.action_deltas)
        tasks = dataset.tasks
        return {
            **{key: torch.from_numpy(images[held]).float() / 255 for key, images in self.images.items()},
            dataset.state_key: torch.from_numpy(dataset.states[seen]),
            ACTION: torch.from_numpy(dataset.actions[np.clip(chunk, first[:, None], last[:, None])]),
            "action_is_pad": torch.from_numpy((chunk < first[:, None]) | (chunk > last[:, None])),
            "index": torch.from_numpy(frames["index"].to_numpy()[rows]),
            "task": [tasks[i] for i in frames.task_index.to_numpy()[rows]],
        }

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.repeat([e.length for e in self.dataset.episodes], [e.length for e in self.dataset.episodes])


def cache_frames(
    dataset: Dataset,
    episodes: tuple[Episode, ...],
    image_keys: list[str],
    resolution: tuple[int, int] | None,
    action_deltas: tuple[int, ...],
    observation_deltas: tuple[int, ...] | None = None,
) -> CachedFrames:
    """Decode `episodes` once and hold them at `resolution`, resized as π0 does it, or as they are."""
    position, count = np.full(dataset.num_frames, -1), 0
    for episode in episodes:
        position[episode.rows] = np.arange(count, count + episode.length)
        count += episode.length
    size = {key: tuple(resolution or dataset.features[key]["shape"][:2]) for key in image_keys}
    images = {key: np.empty((count, 3, *size[key]), dtype=np.uint8) for key in image_keys}
    for key in image_keys:
        frames = bar(dataset.iterate_frames(key, episodes), total=count, desc=key, unit="frame")
        for i, (_, image) in enumerate(frames):
            if image.shape[:2] == size[key]:
                images[key][i] = image.transpose(2, 0, 1)
                continue
            pixels = torch.from_numpy(image)[None].float() / 255
            resized = resize_with_pad_torch(pixels, *size[key])[0]
            images[key][i] = (resized * 255).round().byte().permute(2, 0, 1).numpy()
    return CachedFrames(dataset, images, position, action_deltas, observation_deltas)


@dataclass
class StreamedFrames:
    """Frames read from the dataset when they are needed, by LeRobot's loader in worker processes."""

    dataset: Dataset
    image_keys: list[str]
    num_workers: int
    action_deltas: tuple[int, ...]
    observation_deltas: tuple[int, ...] | None = None

    def batches(self, rows: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
        meta, index = self.dataset.lerobot_metadata, self.dataset.frames["index"].to_numpy()
        seconds = lambda deltas: [delta / meta.fps for delta in deltas]  # noqa: E731
        timestamps = {ACTION: seconds(self.action_deltas)}
        if self.observation_deltas is not None:
            seen = (*self.image_keys, self.dataset.state_key)
            timestamps |= dict.fromkeys(seen, seconds(self.observation_deltas))
        source = LeRobotDataset(
            meta.repo_id, root=meta.root, delta_timestamps=timestamps, video_backend=video_backend()
        )
        sampler = ([int(index[row]) for row in batch] for batch in rows)
        # Spawned: a fork of a process that has threads may hang for ever.
        workers = {"num_workers": self.num_workers, "multiprocessing_context": "spawn"} if self.num_workers else {}
        return iter(torch.utils.data.DataLoader(source, batch_sampler=_Once(sampler), **workers))


def cached_bytes(settings, dataset: Dataset, splits: tuple[str, ...], device: str) -> int:
    """What `frames_for` will hold in memory: nothing where frames are streamed."""
    if not settings.cache_frames:
        return 0
    resolution = _resolution(make_config(settings, device))
    sizes = [resolution or dataset.features[key]["shape"][:2] for key in cameras(settings, dataset)]
    count = sum(episode.length for split in splits for episode in dataset.split(split))
    return count * sum(3 * height * width for height, width in sizes)


def _resolution(config: PreTrainedConfig) -> tuple[int, int] | None:
    """That of the images a policy sees, if it pads them as `cache_frames` does (SmolVLA pads otherwise); None where it takes them
    as they are."""
    return getattr(config, "image_resolution", None)


def frames_for(settings, dataset: Dataset, splits: tuple[str, ...], device: str) -> CachedFrames | StreamedFrames:
    """Where the policy's batches come from, for the episodes of `splits`. settings: `params.policy`."""
    return frames_of(settings, dataset, [e for split in splits for e in dataset.split(split)], device)


def frames_of(settings, dataset: Dataset, episodes: Sequence[Episode], device: str) -> CachedFrames | StreamedFrames:
    """The same, for some episodes."""
    config = make_config(settings, device)
    image_keys, seen = cameras(settings, dataset), config.observation_delta_indices
    deltas = tuple(config.action_delta_indices), None if seen is None else tuple(seen)
    if not settings.cache_frames:
        return StreamedFrames(dataset, image_keys, settings.num_workers, *deltas)
    return cache_frames(dataset, tuple(episodes), image_keys, _resolution(config), *deltas)


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
    """One policy to train: its name, and for every row of the dataset a weight and the r it comes from, or None for
    plain BC."""

    name: str
    weights: np.ndarray | None = None  # (N,) float32
    deltas: np.ndarray | None = None  # (N,) float32, only to be logged


class Draws:
    """Which rows a training step learns from, and how much each counts.

    Every row alike, scaled in the loss; or, with `by_weight`, each as often as its weight says and then alike: equal in
    expectation, and no row of weight 0 is computed. Both take the same random numbers, so that arms are paired.
    Raises ValueError where no row has weight.
    """

    def __init__(self, rows: np.ndarray, weights: np.ndarray | None, by_weight: bool, seed: int) -> None:
        self.rows, self.weights, self.seed = rows, weights, seed
        share = np.ones(len(rows)) if weights is None or not by_weight else weights[rows].astype(np.float64)
        if weights is not None and not (weights[rows] > 0).any():
            raise ValueError(
                "every training frame has weight 0: there is nothing to learn from. Progress falls everywhere, then: see notebook 05"
            )
        self.cumulative = np.cumsum(share / share.sum())
        self.cumulative[-1] = 1.0
        self.scales = weights is not None and not by_weight

    def at(self, step: int, samples: int) -> np.ndarray:
        """Rows (samples,) of a step."""
        uniform = np.random.default_rng([self.seed, step]).random(samples)
        return self.rows[np.searchsorted(self.cumulative, uniform, side="right")]


def make_optimizer(policy: PreTrainedPolicy, rate: float) -> torch.optim.Optimizer:
    """LeRobot's optimizer of this policy, for what is trained. rate: the peak; where the policy has parts that learn slower
    (ACT's backbone, the vision encoder of the DiT), their share of it stays."""
    preset, groups = policy.config.get_optimizer_preset(), policy.get_optim_params()
    if not isinstance(groups, dict):  # a dict names its parameters, and LeRobot's optimizer sorts them itself
        groups = list(groups)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    optimizer = preset.build(groups)
    for group in optimizer.param_groups:
        group["lr"] = rate * (group["lr"] / preset.lr)
    return optimizer


def train_arm(
    arm: Arm,
    params,
    dataset: Dataset,
    frames: CachedFrames | StreamedFrames,
    device: str,
    folder: Path,
    seed: int | None = None,
) -> list[dict[str, float]]:
    """Train one arm into `folder` and return its learning curve. seed: `base.seed` if not said.

    What was trained before from the same inputs is kept, and a run that was stopped goes on where it last saved. Under
    `accelerate launch` every process learns from a part of each step's rows; Σ w of Eq 7 is over all of them.
    """
    settings, seed = params.policy, params.base.seed if seed is None else seed
    made_from = provenance(arm, params, dataset, seed)
    work = params.paths.write(f"work/policy-{arm.name}-{digest(made_from)}")
    if is_current(folder, made_from):
        log.info("%s: trained already with these data, weights and settings", arm.name)
        return read_json(folder / CURVE)
    torch.manual_seed(seed)
    policy, preprocessor, postprocessor = make(settings, dataset, device)
    saved = adapted(policy, settings)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = make_optimizer(policy, settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: learning_rate(s, settings.steps, settings.warmup_steps)
    )
    accelerator = make_accelerator(settings, device)
    model, optimizer = accelerator.prepare(WeightedLoss(policy, params.rabc.epsilon, settings.noise_draws), optimizer)
    config = _train_config(settings, dataset, policy, arm, seed)
    average = Average(trainable, settings.ema_decay)
    step, curve = _resume(work, saved, optimizer, scheduler, average)

    parts, size = settings.accumulate * accelerator.num_processes, settings.batch_size
    mine = range(accelerator.process_index, parts, accelerator.num_processes)
    draws = Draws(rows_of(dataset.split("train")), arm.weights, settings.weighting == "sampling", seed)
    drawn = lambda s: draws.at(s, parts * size).reshape(parts, size)  # noqa: E731
    batches = frames.batches(drawn(s)[part] for s in range(step, settings.steps) for part in mine)
    quiet = not accelerator.is_main_process
    steps = bar(initial=step, total=settings.steps, desc=f"training {arm.name}", unit="step", quiet=quiet)
    running: list[dict[str, float]] = []
    policy.train()
    _go_on_with_codebook(policy, step * len(mine))
    while step < settings.steps:
        rows = drawn(step)
        weight = torch.from_numpy(arm.weights[rows]).to(accelerator.device) if draws.scales else None
        optimizer.zero_grad()
        step_loss = 0.0
        for part in mine:
            noise = _noise(policy, settings, seed, step, part, parts, accelerator.device)
            last = part + accelerator.num_processes >= parts
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                batch = preprocessor(next(batches))
                if weight is None:
                    loss = model(batch, None, None, 1, *noise)
                else:
                    loss = model(batch, weight[part], weight.sum(), parts, *noise)
                accelerator.backward(loss / settings.accumulate)
            step_loss += loss.detach() / settings.accumulate
        accelerator.clip_grad_norm_(trainable, policy.config.get_optimizer_preset().grad_clip_norm)
        if weight is not None and not weight.any():
            optimizer.zero_grad()  # nothing to learn: AdamW would move what has a gradient of 0, and lets alone what has none
        optimizer.step()
        scheduler.step()
        average.update()
        step += 1
        steps.update()
        running.append({"loss": accelerator.reduce(step_loss, "mean").item(), **batch_statistics(arm, rows.ravel())})
        if step % settings.log_every == 0 or step == settings.steps:
            said = dict.fromkeys(key for row in running for key in row)  # not every batch has every figure
            means = {key: float(np.mean([row[key] for row in running if key in row])) for key in said}
            curve.append({"step": step} | means)
            running = []
            steps.set_postfix(loss=f"{curve[-1]['loss']:.4f}", refresh=False)
        if step % settings.save_every == 0 and step < settings.steps and accelerator.is_main_process:
            with staged(work / CHECKPOINT) as partial:
                with average.in_place():
                    save_checkpoint(partial, step, config, saved, optimizer, scheduler, preprocessor, postprocessor)
                average.save_live(partial / LIVE)
                write_json(partial / CURVE, curve)
    steps.close()
    set_seed(seed)  # the state of Python's generators is saved too, and is another one in every process
    if accelerator.is_main_process:
        with staged(folder) as partial, average.in_place():
            save_checkpoint(
                partial / CHECKPOINT, step, config, saved, optimizer, scheduler, preprocessor, postprocessor
            )
            write_json(partial / CURVE, curve)
            write_json(partial / PROVENANCE, made_from)
        remove(work)
    accelerator.wait_for_everyone()
    return curve


@dataclass(eq=False)
class _Saved:
    """A tensor that the backward pass needs."""

    tensor: torch.Tensor


def estimate(params, dataset: Dataset, frames: CachedFrames | StreamedFrames, device: str) -> Estimate:
    """Memory and time of training one arm, by steps that are thrown away. Of several processes, each takes this much; frames
    that are held in memory (`cached_bytes`) come on top."""
    settings = params.policy
    before = torch.cuda.memory_allocated() if device == "cuda" else 0  # such as frames, which are no part of this
    policy, preprocessor, _ = make(settings, dataset, device)
    adapted(policy, settings)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = make_optimizer(policy, settings.learning_rate)
    loss = WeightedLoss(policy, params.rabc.epsilon, settings.noise_draws).train()
    draws = Draws(rows_of(dataset.split("train")), None, False, 0)
    batches = frames.batches(draws.at(i, settings.batch_size) for i in range(TRIAL_STEPS))
    held = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    # What is forgotten before the pass ends drops out: its memory is used anew.
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def save(tensor: torch.Tensor) -> _Saved:
        saved.add(kept := _Saved(tensor))
        return kept

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    accelerator, seconds, start = make_accelerator(settings, device), [], time.perf_counter()
    for step, batch in enumerate(batches):
        noise = _noise(policy, settings, 0, step, 0, 1, accelerator.device)
        watched = torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept.tensor)
        with accelerator.autocast(), watched if step == 0 else contextlib.nullcontext():
            value = loss(preprocessor(batch), None, None, 1, *noise)
        if step == 0:
            storages = {s.data_ptr(): s.nbytes() for s in (kept.tensor.untyped_storage() for kept in saved)}
            activations = sum(size for address, size in storages.items() if address not in held)
        value.backward()
        learning = [p for p in trainable if p.grad is not None]  # of the others AdamW keeps nothing
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    bytes_of = lambda parameters: sum(p.numel() * p.element_size() for p in parameters)  # noqa: E731
    weights, gradients, moments = bytes_of(policy.parameters()), bytes_of(learning), 2 * bytes_of(learning)
    # The backward pass gives up activations as it comes by gradients; those of an earlier part of a step stay, and so do the
    # buckets by which processes share them.
    stays = settings.accumulate > 1 or accelerator.num_processes > 1
    memory = weights + moments + (activations + gradients if stays else max(activations, gradients))
    if device == "cuda":  # the optimizer's step may take more, and that is seen
        memory = max(memory, torch.cuda.max_memory_allocated() - before)
    memory += bytes_of(trainable) * (settings.ema_decay > 0)  # the average
    count = sum(p.numel() for p in trainable)
    return Estimate(count, memory, settings.accumulate * min(seconds[1:]), settings.steps)


def make_accelerator(settings, device: str) -> Accelerator:
    """For one process or many, in the precision that `policy.precision` asks for."""
    # π0 brings language heads that no loss sees. With the view, gradients are not held twice.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)
    return new_accelerator(settings.precision, device, kwargs_handlers=[unused])


def batch_statistics(arm: Arm, rows: np.ndarray) -> dict[str, float]:
    """What a step's weights are like, under the names that LeRobot's users know."""
    if arm.weights is None:
        return {}
    weight = arm.weights[rows]
    found = {
        "rabc_mean_weight": float(weight.mean()),
        "rabc_num_zero": float((weight == 0).sum()),
        "rabc_num_full": float((weight == 1).sum()),
    }
    if arm.deltas is not None:
        delta = arm.deltas[rows]
        delta = delta[np.isfinite(delta)]  # LeRobot's file may say nothing of a frame
        if len(delta):
            found |= {"rabc_delta_mean": float(delta.mean()), "rabc_delta_std": float(delta.std())}
    return found


def _noise(policy, settings, seed: int, step: int, part: int, parts: int, device) -> tuple[Any, ...]:
    """The noise and times of one part of a step: the same for every arm, after a resumption, and however a step is divided
    among processes. A policy that draws its own noise only starts from the same seed."""
    torch.manual_seed(seed * 1_000_003 + step)
    if isinstance(policy, TAKES_NOISE):
        draws = settings.noise_draws if isinstance(policy, SEVERAL_DRAWS) else 1
        noise, time = sample_noise(policy, parts * settings.batch_size, draws, device)
        here = slice(part * settings.batch_size, (part + 1) * settings.batch_size)
        return noise[here], time[here]
    if part:
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + part)
    return ()


def is_trained(arm: Arm, params, dataset: Dataset, folder: Path) -> bool:
    """Whether `folder` holds this arm, trained from these data, weights and settings."""
    return is_current(folder, provenance(arm, params, dataset, params.base.seed))


def provenance(arm: Arm, params, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Everything that a trained arm is made from."""
    named = params.policy.pretrained_path
    return {
        "fingerprint": dataset.fingerprint,
        "splits": [[episode.index, episode.split] for episode in dataset.episodes],
        "weights": None if arm.weights is None else digest(arm.weights.tobytes().hex(), params.rabc.epsilon),
        "seed": seed,
        "settings": params.policy.model_dump(exclude={"pretrained_path", *SAME_POLICY}),
        "pretrained": named and (folder_identity(Path(named)) or named),
        "code": code_digest("policy"),
    }


@torch.no_grad()
def validation_loss(
    folder: Path, frames: CachedFrames | StreamedFrames, episodes: tuple[Episode, ...], seed: int, device: str
) -> float:
    """Unweighted loss of a trained policy on evenly spaced frames of `episodes`, with fixed noise. Of a policy that gives no
    loss of a single sample, the mean over batches of the loss that it trains with."""
    policy, preprocessor, _ = load(folder, device)
    single = gives_sample_losses(type(policy))
    policy.train(getattr(policy.config, "use_vae", False))  # ACT's variational loss is there in training only
    rows = rows_of(episodes)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, VALIDATION_FRAMES).astype(int))]
    parts = [rows[i : i + VALIDATION_BATCH] for i in range(0, len(rows), VALIDATION_BATCH)]
    total, batches = 0.0, frames.batches(iter(parts))
    torch.manual_seed(seed)  # behind the loader's own draw
    for batch in batches:
        seen = preprocessor(batch)
        total += float(per_sample_loss(policy, seen).sum() if single else policy.forward(seen)[0] * len(batch["index"]))
    return total / len(rows)


@torch.no_grad()
def first_action(folder: Path, frames: CachedFrames | StreamedFrames, episode: Episode, device: str) -> np.ndarray:
    """The action (A,) that a trained policy takes at the first frame of `episode`, in the robot's units."""
    policy, preprocessor, postprocessor = load(folder, device)
    batch = next(frames.batches(iter([np.array([episode.row])])))
    torch.manual_seed(0)
    observation = {key: value for key, value in preprocessor(batch).items() if key != ACTION}
    if frames.observation_deltas is not None:  # the policy keeps the frames before by itself
        now = frames.observation_deltas.index(0)
        observation |= {key: observation[key][:, now] for key in policy.config.input_features if key in observation}
    return postprocessor(policy.select_action(observation))[0].cpu().numpy()


def load(source: Path | str, device: str) -> tuple[PreTrainedPolicy, Any, Any]:
    """A trained policy with its processors, by LeRobot's own loading.

    source: where a training left its checkpoints, ours or `lerobot-train`'s; the folder of a model; or a Hub id.
    """
    newest = Path(source) / CHECKPOINT / "pretrained_model"
    path = newest if newest.exists() else source
    config = PreTrainedConfig.from_pretrained(path)
    config.pretrained_path, config.device = path, device
    adapters = AdapterConfig.from_pretrained(path) if config.use_peft else None
    source = {"revision": adapters.revision} if adapters else {}
    base = adapters.base_model_name_or_path if adapters else path
    with contextlib.redirect_stdout(io.StringIO()):  # LeRobot prints that it loads
        policy = get_policy_class(config.type).from_pretrained(base, config=config, **source)
    check_weights(policy, base)
    if adapters:
        policy = PeftModel.from_pretrained(policy, path, config=adapters).get_base_model()
    policy = policy.to(device).eval()
    overrides = {"device_processor": {"device": device}}
    return policy, *make_pre_post_processors(config, pretrained_path=str(path), preprocessor_overrides=overrides)


def _resume(work: Path, saved, optimizer, scheduler, average: Average) -> tuple[int, list[dict[str, float]]]:
    checkpoint = work / CHECKPOINT
    if not checkpoint.exists():
        return 0, []
    if isinstance(saved, PeftModel):
        set_peft_model_state_dict(saved, load_file(checkpoint / "pretrained_model" / ADAPTERS))
    else:
        weights = load_file(checkpoint / "pretrained_model" / WEIGHTS)
        saved.load_state_dict(weights, strict=False)  # tied weights are stored once
    step, _, _ = load_training_state(checkpoint, optimizer, scheduler)
    average.resume(checkpoint / LIVE, step)
    log.info("resuming at step %d", step)
    return step, read_json(checkpoint / CURVE)


def _go_on_with_codebook(policy: PreTrainedPolicy, batches: int) -> None:
    """VQ-BeT counts the batches of its codebook in no tensor, and freezes it once, when they are through: a checkpoint carries
    neither."""
    for module in policy.modules():
        if hasattr(module, "optimized_steps"):
            module.optimized_steps = batches
            if module.discretized:
                module.eval()
                module.vq_layer.requires_grad_(requires_grad=False)


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
        peft=peft_config(settings),
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
