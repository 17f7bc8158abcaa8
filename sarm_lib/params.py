"""The one typed object behind `params.yaml`: every value of the project, checked when it is read.

`load()` is the first line of every notebook. It rejects unknown keys and wrong types with the key's path and what was
expected, and it knows where artifacts are read and written (`Paths`).
"""

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from sarm_lib.artifacts import digest

AnnotationMode = Literal["single_stage", "dense_only", "dual"]
Annotator = Literal["keyframes", "propagate", "vlm", "server", "dataset", "manual"]
Head = Literal["sparse", "dense"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]


def _kappa(value: Any) -> float | str:
    if isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"auto|mean(\+2?std)?|(mean_weight|quantile)=(0?\.\d+|[01])", value):
        return value
    raise ValueError("should be a number, auto, mean, mean+std, mean+2std, mean_weight=0.5 or quantile=0.6")


def _delta(value: Any) -> int | str | None:
    if value in (None, "auto") or (type(value) is int and value > 0):
        return value
    raise ValueError("should be a number of frames above 0, auto, or null for the policy's chunk")


Kappa = Annotated[float | str, PlainValidator(_kappa)]  # a number, or a rule: `rabc.kappa_of`, `rabc.healthy_rule`


# A number, None for the policy's chunk, or auto: `rabc.suggested_delta`.
Delta = Annotated[int | str | None, PlainValidator(_delta)]


class ParamsError(ValueError):
    """A value in `params.yaml` (or in a notebook's `overrides`) that cannot be used."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _integers_are_floats(cls, values: Any) -> Any:
        """YAML writes `1` where a float is meant; every other mix of types is an error."""
        if isinstance(values, dict):
            floats = {name for name, field in cls.model_fields.items() if field.annotation is float}
            values = {k: float(v) if k in floats and type(v) is int else v for k, v in values.items()}
        return values


class Base(Section):
    """What every stage shares: seed, device, the dataset and its keys, the split."""

    seed: int
    device: str  # "auto" takes a GPU where there is one
    dataset: str  # local LeRobot v3 folder, or a Hub repo id
    revision: str | None  # of a Hub dataset
    episodes: int | None  # only so many, taken from every split in proportion; None for all
    annotation_mode: AnnotationMode
    image_keys: list[str]  # cameras, the first one is the guide's `image_key`; empty for all of the dataset's
    state_key: str
    val_fraction: Fraction  # used only where `meta/info.json` names no val split
    test_fraction: Fraction
    group_key: str | None  # episode column by which the scorecard is broken down
    truth_prefix: str | None  # of a simulator's columns: compared with, never learned from
    outputs: str

    @property
    def image_key(self) -> str | None:
        """The guide's `image_key`: the one camera that LeRobot's form of SARM sees."""
        return self.image_keys[0] if self.image_keys else None


class Prepare(Section):
    """00: decode every frame once and encode it once."""

    encoder: str  # Hugging Face CLIP: a folder or a Hub id
    image_keys: list[str]  # cameras to encode beside the reward model's, for annotators
    encode_batch_size: Positive
    precision: Literal["fp32", "bf16"]  # of the image tower
    store_dtype: Literal["float32", "float16"]  # of the embeddings on disk
    num_visualizations: Annotated[int, Field(ge=0)]


class Annotate(Section):
    """01: where each subtask begins and ends."""

    annotator: Annotator
    second_opinion: Annotator | None  # annotates too, to be compared with
    repeats: Annotated[int, Field(ge=0)]  # so often the annotator answers anew, with another seed, where `seed_matters`
    sparse_subtasks: list[str]
    dense_subtasks: list[str]
    marks: str  # file of the episodes that a person marked
    episodes: list[int] | None  # only these; None for all
    skip_existing: bool
    allow_failed: bool  # go on where an episode could not be annotated
    visualize_only: bool  # show existing annotations, make none
    # What a vision-language model is asked with: `vlm` loads `model` here, `server` asks one that serves it.
    model: str  # a folder or user/name, with @revision if it is to stay the same
    video_key: str | None  # the camera it sees; None for the reward model's first
    frames_per_second: Rate
    max_frames: Annotated[int, Field(ge=2)]
    time_resolution: Annotated[float, Field(gt=0, le=1)]  # seconds
    temperature: Annotated[float, Field(ge=0)]
    max_attempts: Positive
    batch_size: Positive
    num_workers: Positive  # processes, one GPU each
    server_url: Annotated[str, Field(pattern=r"^https?://")]
    requests_in_flight: Positive
    server_grammar: bool  # vLLM takes the whole grammar, other servers a schema only
    server_timeout: Rate  # seconds, of one request

    @property
    def seed_matters(self) -> bool:
        """Whether another seed gives other answers."""
        samples = self.annotator in ("vlm", "server") and self.temperature > 0
        return self.annotator == "propagate" or samples


class Verify(Section):
    """02: a person checks."""

    corrections: str  # file of a person's corrections
    unlikely_duration: Annotated[float, Field(ge=1)] | None  # times the usual ones, see `annotations.unlikely`
    proportions_from: Literal["complete", "all"]
    num_visualizations: Annotated[int, Field(ge=0)]
    visualize_type: Literal["sparse", "dense", "both"]


class Sarm(Section):
    """03: the reward model (the guide's names and meanings)."""

    n_obs_steps: Positive
    frame_gap: Positive
    window: Literal["centred", "past"]
    max_rewind_steps: Annotated[int, Field(ge=0)]
    rewind_probability: Fraction
    language_perturbation_probability: Fraction
    gt_stage_ratio: Fraction
    # LeRobot's behaviour, to compare with (benchmarks/scorecard.py): each of the second values is a defect.
    augmentation_per: Literal["sample", "batch"]
    rewind_images: Literal["of_targets", "of_lerobot"]
    loss_positions: Literal["valid", "all"]
    learn_given_up: bool  # τ also of segments that end in a step back, or with an episode that did not get further
    # τ is learned of segments that last up to so many times what their subtask usually takes; None learns all, as LeRobot does
    max_relative_duration: Annotated[float, Field(ge=1)] | None
    inputs: list[Literal["images", "state"]]  # what the model is shown; for ablations
    hidden_dim: Positive
    num_heads: Positive
    num_layers: Positive
    dropout: Fraction
    max_state_dim: Positive
    steps: Positive
    batch_size: Positive
    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    gradient_clip: Rate
    ema_decay: Annotated[float, Field(ge=0, lt=1)]  # of the weights' moving average, which is what is kept; 0 for none
    precision: Literal["auto", "fp32", "bf16"]  # "auto" is bf16 on a GPU that has it
    log_every: Positive
    eval_every: Positive
    save_every: Positive
    log_with: Literal["wandb", "trackio"] | None  # beside the JSON lines in the checkpoint
    log_project: str


class Visualize(Section):
    """04: what the model predicts."""

    num_visualizations: Annotated[int, Field(ge=0)]
    head_mode: Literal["sparse", "dense", "both"]
    stride: Positive
    other_tasks: list[str]  # instructions of real other tasks: they should lower progress
    paraphrases: dict[str, list[str]]  # a task of the dataset: the same in other words, which should not move it


class Rabc(Section):
    """05: progress of every frame and the weights."""

    # Weight this one instead of `base.dataset`; user/name@revision on the Hub.
    dataset: Annotated[str, Field(min_length=1)] | None
    reward_model_path: str | None  # score with another reward model instead of stage 03's
    progress_path: str | None  # score nothing: take the progress from this file
    head_mode: Literal["sparse", "dense", "both"]
    stride: Positive
    batch_size: Positive
    precision: Literal["fp32", "bf16"]  # of scoring
    kappa: Kappa
    epsilon: Rate
    delta_frames: Delta  # Δ
    lerobot_compat: bool  # what LeRobot's RABCWeights gives, defects and all
    num_visualizations: Annotated[int, Field(ge=0)]  # lightest and heaviest frames to show


class Policy(Section):
    """06: π0 with and without the weights. `config` holds fields of the policy's own LeRobot configuration."""

    type: str
    pretrained_path: str | None  # a folder, beside params.yaml or absolute, or a Hub id
    config: dict[str, Any]
    peft: dict[str, Any] | None  # fields of LeRobot's PeftConfig: adapters on a pretrained policy
    image_keys: list[str]  # cameras that it sees; empty for all of the dataset's
    chunk_size: Positive
    n_action_steps: Positive
    steps: Positive
    batch_size: Positive
    accumulate: Positive  # batches that make a step
    weighting: Literal["loss", "sampling"]  # Eq 7, or frames drawn by their weights
    noise_draws: Positive  # of π0: noises tried on each frame of a batch
    learning_rate: Rate
    warmup_steps: Annotated[int, Field(ge=0)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]  # of the average of the weights that is kept and acts; 0 for none
    precision: Literal["auto", "fp32", "bf16"]
    cache_frames: bool  # hold all frames in memory at the policy's resolution
    num_workers: Annotated[int, Field(ge=0)]
    log_every: Positive
    save_every: Positive


def _named(policies: dict[str, str]) -> dict[str, str]:
    """Names that metrics and files can carry, and that say something else nowhere."""
    taken = {"bc", "rabc", "difference", "compared_by", "final_progress_auc"}
    for name in policies:
        if name in taken or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"a name of letters, digits, _ and - that is none of {', '.join(sorted(taken))}, not {name!r}"
            )
    return policies


class Evaluate(Section):
    """07: the policies act in a simulator, or are held against held-out episodes."""

    environment: str | None  # package.module:Name or a Gymnasium id; None where there is no simulator
    environment_options: dict[str, Any]
    # Other names of its pictures: observation.image or observation.images.… to observation.images.…
    rename_map: dict[str, str]
    rollouts: Positive
    first_seed: Annotated[int, Field(ge=0)]
    num_environments: Positive  # that act together
    max_frames: Positive
    policies: Annotated[dict[str, str], AfterValidator(_named)]  # others beside 06's: a name, and a folder or Hub id
    task: str | None  # what the policies are told; None for the only task of the dataset
    num_visualizations: Annotated[int, Field(ge=0)]  # rollouts of each arm to show
    reference_group: str | None  # without a simulator: test episodes of this group; None for all


class Params(Section):
    base: Base
    prepare: Prepare
    annotate: Annotate
    verify: Verify
    sarm: Sarm
    visualize: Visualize
    rabc: Rabc
    policy: Policy
    evaluate: Evaluate

    _root: Path = PrivateAttr()
    _scratch: str | None = PrivateAttr(default=None)

    @property
    def paths(self) -> "Paths":
        return Paths(self._root, self._root / self.base.outputs, self._scratch)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The model's heads: `single_stage` has no dense one."""
        return ("sparse",) if self.base.annotation_mode == "single_stage" else ("sparse", "dense")

    @property
    def weighing(self) -> "Params":
        """These values for chapters 05 to 07, which weigh and learn from `rabc.dataset` where it names one: as `base.dataset`,
        of which only what the reward model sees is encoded, and which need not name kinds of episodes."""
        if self.rabc.dataset is None:
            return self
        name, _, revision = self.rabc.dataset.partition("@")
        if self.paths.resolve(self.rabc.dataset).exists():
            name, revision = self.rabc.dataset, None
        base = {"dataset": name, "revision": revision or None, "group_key": None}
        prepare = {"image_keys": []}
        changed = {"base": self.base.model_copy(update=base), "prepare": self.prepare.model_copy(update=prepare)}
        return self.model_copy(update=changed)

    def rabc_embeddings(self, dataset) -> Path:
        """Where the embeddings of `rabc.dataset` lie, of which stage 00 knows nothing: named by all that decides them."""
        encoding = self.prepare.encoder, self.prepare.precision, self.prepare.store_dtype
        frames = dataset.fingerprint, dataset.image_keys, [(e.index, e.length) for e in dataset.episodes]
        return self.paths.shared(f"rabc_embeddings/{digest(*encoding, *frames)}")

    @property
    def encoder(self) -> str:
        """The encoder's folder, or its Hub id where there is no such folder."""
        local = self.paths.resolve(self.prepare.encoder)
        return str(local) if local.exists() else self.prepare.encoder


class Paths:
    """Where artifacts lie. Runs with overridden values write to a folder of `outputs/scratch/` that is named after
    these values, and read there first."""

    def __init__(self, root: Path, outputs: Path, scratch: str | None) -> None:
        self.root, self._outputs = root, outputs
        self._scratch = outputs / "scratch" / scratch if scratch else None

    def write(self, name: str) -> Path:
        """Where the artifact `name` is written; its folder exists."""
        path = (self._scratch or self._outputs) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def shared(self, name: str) -> Path:
        """Where work lies that is named by a hash of all that decides it: one place for all runs, overridden or not."""
        path = self._outputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def find(self, name: str) -> Path | None:
        """Where the artifact `name` lies, if it does."""
        folders = filter(None, (self._scratch, self._outputs))
        return next((folder / name for folder in folders if (folder / name).exists()), None)

    def read(self, name: str, made_by: str) -> Path:
        """Where the artifact `name` lies. Raises FileNotFoundError that names the notebook that makes it."""
        if found := self.find(name):
            return found
        raise FileNotFoundError(f"{self._outputs / name} is not there yet: run the notebook {made_by} first.")

    def resolve(self, path: str) -> Path:
        """A path of `params.yaml`, which is relative to the file's folder."""
        return (self.root / Path(path).expanduser()).resolve()


def load(params_file: str | Path = "params.yaml", overrides: dict[str, Any] | None = None) -> Params:
    """Read `params_file`, found in the working directory or above it, with dotted `overrides` applied.

    Raises ParamsError with the path of each bad key, what was expected and what was found.
    """
    path = find_upwards(params_file)
    values = read_yaml(path)
    for dotted, value in (overrides or {}).items():
        _set(values, dotted, value)
    named = (values.get("policy") or {}).get("pretrained_path")
    if isinstance(named, str) and (folder := path.parent / Path(named).expanduser()).is_dir():
        values["policy"]["pretrained_path"] = str(folder.resolve())  # LeRobot looks in the working directory
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise ParamsError("\n".join([f"{path.name} cannot be used:", *map(_explain, error.errors())])) from None
    if params.sarm.max_rewind_steps >= params.sarm.n_obs_steps:
        raise ParamsError("sarm.max_rewind_steps: must be smaller than sarm.n_obs_steps")
    if params.sarm.window == "centred" and params.sarm.n_obs_steps % 2:
        raise ParamsError("sarm.n_obs_steps: a centred window needs an even number (half before, half after)")
    if params.sarm.save_every % params.sarm.eval_every:
        raise ParamsError("sarm.save_every: must be a multiple of sarm.eval_every (a run resumes from a validation)")
    if params.sarm.eval_every % params.sarm.log_every:
        raise ParamsError("sarm.eval_every: must be a multiple of sarm.log_every (a validation is a line of the log)")
    if params.sarm.rewind_images == "of_lerobot" and params.sarm.window == "past":
        raise ParamsError("sarm.rewind_images: LeRobot has centred windows only; set sarm.window to centred")
    if params.policy.save_every % params.policy.log_every:
        raise ParamsError(
            "policy.save_every: must be a multiple of policy.log_every (a run resumes from a logged step)"
        )
    if params.policy.n_action_steps > params.policy.chunk_size:
        raise ParamsError("policy.n_action_steps: must not exceed policy.chunk_size")
    for section in ("rabc", "visualize"):
        if params.base.annotation_mode == "single_stage" and getattr(params, section).head_mode == "dense":
            raise ParamsError(f"{section}.head_mode: annotation_mode single_stage has no dense head; use sparse")
    _check_annotate(params.annotate, params.base.annotation_mode)
    params._root = path.parent
    changed = {key: value for key, value in (overrides or {}).items() if key != "base.device"}
    params._scratch = digest(changed) if changed and "base.outputs" not in changed else None
    return params


def _check_annotate(options: Annotate, mode: AnnotationMode) -> None:
    if options.episodes == []:
        raise ParamsError("annotate.episodes: names no episode; null means all")
    if mode != "single_stage" and len(options.dense_subtasks) == 1:  # LeRobot's format knows no such model
        raise ParamsError(
            "annotate.dense_subtasks: one subtask divides nothing; name two or more, or set base.annotation_mode"
        )
    if mode != "single_stage" and options.second_opinion == options.annotator:
        raise ParamsError(
            f"annotate.second_opinion: {options.annotator} would agree with itself; name another annotator, or null "
            "(annotate.repeats asks the same one again, with other seeds)"
        )


def find_upwards(name: str | Path) -> Path:
    """`name` as it is, or in the nearest folder above the working directory that has it."""
    for folder in [Path.cwd(), *Path.cwd().parents]:
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise ParamsError(f"no {name} in {Path.cwd()} or above it")


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML reads `1e-3` as a string (YAML 1.1); DVC and people read a number."""


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    values = yaml.load(path.read_text(), _Yaml12Loader)
    if not isinstance(values, dict):
        raise ParamsError(f"{path.name}: expected sections, found {type(values).__name__}")
    return values


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ParamsError(f"{dotted}: {section} is a value, not a section")
    values[key] = value


def _explain(error: dict[str, Any]) -> str:
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"  {path}: unknown key.{_suggest(error['loc'])}"
    if error["type"] == "missing":
        return f"  {path}: missing"
    found = error["input"]
    error["msg"] = error["msg"].removeprefix("Value error, ")
    if isinstance(found, float) and math.isnan(found):
        found = "nan"
    return f"  {path}: {error['msg'].lower()}, found {found!r}"


def _suggest(location: tuple[str, ...]) -> str:
    model: Any = Params
    for part in location[:-1]:
        model = model.model_fields[part].annotation
    known = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f" Did you mean {close[0]}?" if close else f" Known keys: {', '.join(known)}"
