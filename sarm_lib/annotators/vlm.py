"""Annotations from a local vision-language model: Qwen3-VL of any size, dense or mixture of experts.

Frames are handed over in memory, each with its own time before it; decoding is constrained by a grammar to valid
answers and draws from a random stream of its own for each question, so that an answer depends on its batch only through
rounding. Nothing is loaded, and neither transformers nor xgrammar imported, before an episode is asked about.
"""

import gc
import itertools
import logging
import multiprocessing
import multiprocessing.connection
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sarm_lib.annotations import Annotation, AnnotationError
from sarm_lib.annotators import Failure
from sarm_lib.annotators.question import Interview, Interviewer, Question
from sarm_lib.artifacts import digest
from sarm_lib.dataset import Episode

log = logging.getLogger("sarm")
DEFAULT_MODEL = "Qwen/Qwen3-VL-30B-A3B-Instruct"
FAMILY = ("qwen3_vl", "qwen3_vl_moe")  # others are told the times of frames otherwise
GRAMMAR_CACHE = 500_000_000  # bytes; the grammar of a long episode takes ten million


@dataclass(kw_only=True)
class VlmAnnotator(Interviewer):
    """Asks a model that runs here. model: a folder, or user/name of the Hub, with @revision where it is not the newest one.
    batch_size: questions answered at once. num_workers: processes, on a GPU each."""

    name = "vlm"
    model: str = DEFAULT_MODEL
    batch_size: int = 1
    num_workers: int = 1
    device: str = "auto"  # auto takes the GPU, and all of them where one worker has several

    @property
    def identity(self) -> dict:
        return {**super().identity, "model": model_name(self.model), "model_files": _files(self.model)}

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation | Failure]:
        """Yield one result an episode, after each batch. Raises AnnotationError where the model cannot be loaded or a
        worker died. The model is there as long as this lasts: another annotator may need its place."""
        batches = list(itertools.batched(episodes, self.batch_size))
        if self.asked and self.num_workers > 1 and len(batches) > 1:
            yield from _in_workers(self, batches)
            return
        try:
            for batch in batches:
                yield from self.annotate_batch(batch)
        finally:
            if self.__dict__.pop("_loaded", None):
                gc.collect()  # a model refers to itself
                torch.cuda.empty_cache()  # nothing where there is no GPU

    def annotate_batch(self, episodes: Sequence[Episode]) -> list[Annotation | Failure]:
        """One batch, with the model kept for the next one. Raises AnnotationError where it cannot be loaded."""
        if self.asked:
            self._loaded  # noqa: B018 -- a model that cannot be loaded fails once, not once an episode
        return self._annotate(episodes)

    def _annotate(self, episodes: Sequence[Episode]) -> list[Annotation | Failure]:
        """One batch. Where it fails as a whole, each episode alone; what fails then is a Failure."""
        held: dict[int, dict[str, Interview]] = {episode.index: {} for episode in episodes}
        try:
            return self._ask(episodes, held)
        except Exception as error:
            log.debug("%d episodes", len(episodes), exc_info=True)
            reason = f"{type(error).__name__}: {error}"
        # Only here, as the traceback holds on to the tensors of the batch: where memory was short, it would stay so.
        torch.cuda.empty_cache()
        if len(episodes) > 1:
            log.warning("a batch of %d episodes failed, asking one at a time: %s", len(episodes), reason)
            return [result for episode in episodes for result in self._annotate([episode])]
        (episode,) = episodes
        return [Failure(episode.index, reason, self.provenance(episode, held[episode.index]))]

    def _ask(self, episodes: Sequence[Episode], held: dict[int, dict[str, Interview]]) -> list[Annotation | Failure]:
        """Hold the interviews of a batch, by episode and head, in `held`."""
        frames = {episode.index: self.frames(episode) for episode in episodes} if self.asked else {}
        failures: dict[int, Failure] = {}
        for head in self.asked:
            interviews = {e.index: Interview(self.question(e, head)) for e in episodes if e.index not in failures}
            for index, interview in interviews.items():
                held[index][head] = interview
            for attempt in range(self.max_attempts):
                waiting = [interview for interview in interviews.values() if interview.segments is None]
                if not waiting:
                    break
                questions = [interview.question for interview in waiting]
                seeds = [self.try_seed(question, attempt) for question in questions]
                clips = [(self.shown(q.episode), frames[q.episode.index]) for q in questions]
                texts = self._loaded.answer(questions, clips, seeds, self.try_temperature(attempt))
                for interview, text, seed in zip(waiting, texts, seeds):
                    interview.hear(text, seed)
            for index, interview in interviews.items():
                if interview.segments is None:
                    provenance = self.provenance(interview.question.episode, held[index])
                    failures[index] = Failure(index, interview.complaint, provenance)
        return [failures.get(e.index) or self.annotation(e, held[e.index]) for e in episodes]

    def provenance(self, episode: Episode, held: dict[str, Interview]) -> dict:
        """What was asked and answered, and which commit of a model of the Hub answered."""
        return {**super().provenance(episode, held), "model_commit": self._loaded.commit if self.asked else None}

    @cached_property
    def _loaded(self) -> "_Model":
        return _Model(self.model, self.device)

    def estimate(self, episodes: Sequence[Episode]) -> "Estimate":
        """What annotating will need. Reads the model's configuration, not its weights."""
        return estimate(self, episodes)


def model_name(model: str) -> str:
    """What artifacts call a model: no path of this machine."""
    return Path(model).name if Path(model).is_dir() else model


def _place(model: str) -> tuple[str, dict[str, str]]:
    """Where `from_pretrained` finds a model: its first argument, and the revision where one is named."""
    name, at, revision = model.partition("@")
    return (name, {"revision": revision}) if at and not Path(model).is_dir() else (model, {})


def _files(model: str) -> str | None:
    """Names the files of a local model by name, size and last bytes, which no training leaves alone; None for one of the Hub."""
    files = sorted(path for path in Path(model).glob("*") if path.is_file()) if Path(model).is_dir() else []
    return digest(*((path.name, path.stat().st_size, _end(path)) for path in files)) if files else None


def _end(path: Path, most: int = 2**16) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().hex()


# --- the model ------------------------------------------------------------------------------------------------------


class _Model:
    """A loaded model with its processor and grammar compiler."""

    def __init__(self, path: str, device: str) -> None:
        import xgrammar
        from transformers import AutoModelForImageTextToText, GenerationConfig

        device = _device(device)
        several = device == "cuda" and torch.cuda.device_count() > 1
        name, revision = _place(path)
        self.commit = _config(path)._commit_hash
        if self.commit:  # weights and processor of the same one, should there be a new one by now
            path, revision = f"{name}@{self.commit}", {"revision": self.commit}
        log.info("loading %s on %s", model_name(path), "all GPUs" if several else device)
        self.processor = _processor(path)
        try:
            self.model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=_dtype(device), device_map="auto" if several else {"": device}, **revision
            ).eval()
        except Exception as error:  # half a download, too little memory...: each library has errors of its own
            raise AnnotationError(f"annotate.model: cannot load {path}: {type(error).__name__}: {error}") from error
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        # The checkpoint's own settings (top-k, repetition penalty) would bend what the grammar and the seed decide.
        self.model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
        )
        vocabulary = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=self.model.config.text_config.vocab_size, stop_token_ids=tokenizer.eos_token_id
        )
        self.compiler = xgrammar.GrammarCompiler(vocabulary, cache_limit_bytes=GRAMMAR_CACHE)

    def inputs(self, questions: list[Question], clips: list[tuple[list[int], np.ndarray]]) -> dict[str, Tensor]:
        """Input tensors of a batch; a clip is (frame indices, (n, H, W, 3) uint8)."""
        # One patch of the model spans two frames and is stamped with the mean of their times. Each frame is shown twice:
        # then every frame has a patch of its own, under its own time.
        depth = self.processor.video_processor.temporal_patch_size
        metadata = [
            {
                "fps": question.fps,
                "total_num_frames": question.episode.length,
                "frames_indices": [index for index in indices for _ in range(depth)],
            }
            for question, (indices, _) in zip(questions, clips)
        ]
        messages = [
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question.prompt}]}]
            for question in questions
        ]
        inputs = self.processor(
            text=[self.processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages],
            videos=[torch.from_numpy(np.repeat(frames, depth, axis=0)).permute(0, 3, 1, 2) for _, frames in clips],
            video_metadata=metadata,
            do_sample_frames=False,
            padding=True,
            return_tensors="pt",
        )
        reaching, shown = inputs["video_grid_thw"][:, 0].tolist(), [len(frames) for _, frames in clips]
        if reaching != shown:
            raise AnnotationError(f"{reaching} frames would reach the model instead of {shown}")
        return inputs

    @torch.inference_mode()
    def answer(
        self, questions: list[Question], clips: list[tuple[list[int], np.ndarray]], seeds: list[int], temperature: float
    ) -> list[str]:
        """The text of one answer a question."""
        from xgrammar.contrib.hf import LogitsProcessor

        inputs = self.inputs(questions, clips).to(self.model.device)
        grammars = [self.compiler.compile_grammar(question.grammar) for question in questions]
        processors = [LogitsProcessor(grammars)] + ([_Draw(seeds, temperature)] if temperature > 0 else [])
        tokens = self.model.generate(
            **inputs, logits_processor=processors, max_new_tokens=max(question.max_tokens for question in questions)
        )
        written = tokens[:, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(
            written, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class _Draw:
    """Turns greedy decoding into sampling: the argmax of logits/T plus Gumbel noise is a draw from softmax(logits/T).
    Each sequence has its own noise, whatever else is in the batch."""

    def __init__(self, seeds: list[int], temperature: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[1]
        uniform = torch.stack([torch.rand(size, generator=g, dtype=torch.float64) for g in self.generators])
        return scores.float() / self.temperature - torch.log(-torch.log(uniform)).float().to(scores.device)


def _config(path: str):
    """The model's configuration. Raises AnnotationError where it cannot be read or is no Qwen3-VL's."""
    from transformers import AutoConfig

    name, revision = _place(path)
    try:
        config = AutoConfig.from_pretrained(name, **revision)
    except (OSError, ValueError) as error:
        raise AnnotationError(f"annotate.model: cannot read the configuration of {path}: {error}") from error
    if config.model_type not in FAMILY:
        raise AnnotationError(
            f"annotate.model: {path} is a {config.model_type}, and `vlm` asks a Qwen3-VL, of any size. For another model serve it "
            "(annotate.annotator: server)"
        )
    return config


def _processor(path: str):
    """Raises AnnotationError where there is none, or none that can ask."""
    from transformers import AutoProcessor

    name, revision = _place(path)
    try:
        processor = AutoProcessor.from_pretrained(name, **revision)
    except (OSError, ValueError) as error:
        raise AnnotationError(f"annotate.model: cannot load the processor of {path}: {error}") from error
    if not processor.chat_template:
        raise AnnotationError(f"annotate.model: the processor of {path} has no chat template (chat_template.json)")
    return processor


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


# --- several workers ------------------------------------------------------------------------------------------------


def _in_workers(annotator: VlmAnnotator, batches: list[Sequence[Episode]]) -> Iterator[Annotation | Failure]:
    """Deal batches out to processes, the next to whoever is free, and yield results as they come."""
    count, device = min(annotator.num_workers, len(batches)), _device(annotator.device)
    if device == "cuda" and count > torch.cuda.device_count():
        raise AnnotationError(
            f"annotate.num_workers: {count} workers need a GPU each, and there are {torch.cuda.device_count()}"
        )
    context, todo = multiprocessing.get_context("spawn"), iter(batches)  # a fork would inherit threads and CUDA
    workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    try:
        for rank in range(count):
            own = replace(annotator, num_workers=1, device=f"cuda:{rank}" if device == "cuda" else device)
            ours, theirs = context.Pipe()
            workers[ours] = context.Process(target=_work, args=(theirs, own, count), daemon=True)
            workers[ours].start()
            theirs.close()  # so that the worker's death is an end of file here
            ours.send(next(todo))
        while workers:
            for connection in multiprocessing.connection.wait(list(workers)):
                try:
                    message = connection.recv()
                    if message is None:  # the batch is finished
                        batch = next(todo, None)
                        connection.send(batch)
                except (EOFError, OSError):
                    workers[connection].join()
                    raise AnnotationError(
                        f"a worker died (exit code {workers[connection].exitcode}; -9 mostly is a lack of memory). "
                        "Finished episodes are saved: run again, with fewer workers or a smaller batch."
                    ) from None
                if message is None and batch is None:
                    workers.pop(connection).join()
                elif isinstance(message, Exception):
                    raise message
                elif message is not None:
                    yield message
    finally:
        for process in workers.values():
            process.terminate()
            process.join()


def _work(connection: Connection, annotator: VlmAnnotator, count: int) -> None:
    """A worker: batches in; results, and None after each batch, out."""
    if annotator.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        while (batch := connection.recv()) is not None:
            for result in annotator.annotate_batch(batch):
                connection.send(result)
            connection.send(None)
    except (EOFError, BrokenPipeError):  # the parent is gone
        return
    except AnnotationError as error:
        connection.send(error)
    except Exception as error:
        connection.send(AnnotationError(f"a worker failed: {type(error).__name__}: {error}"))


# --- the estimate ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What annotating will need, roughly: memory of one worker in GiB, time of all workers together in seconds.

    room_gib: what a worker finds free here. coarse: what is to be said of long episodes.
    """

    model: str
    device: str
    parameters: int
    active_parameters: int  # that a token passes through
    questions: int
    tokens: int  # of the longest question
    weights_gib: float
    cache_gib: float  # keys and values of a batch
    working_gib: float
    seconds: float
    room_gib: float
    coarse: str = ""

    @property
    def memory_gib(self) -> float:
        return self.weights_gib + self.cache_gib + self.working_gib

    def __str__(self) -> str:
        time = f"{self.seconds / 60:.0f} min" if self.seconds > 90 else f"{self.seconds:.0f} s"
        small = (
            ""
            if self.memory_gib < self.room_gib
            else (
                f". THAT IS MORE than the {self.room_gib:.1f} GiB that a worker finds free here: take a smaller annotate.model, fewer "
                "annotate.num_workers or a smaller annotate.batch_size"
            )
        )
        return (
            f"Estimate for {self.model} on {self.device}: about {self.memory_gib:.1f} GiB a worker "
            f"({self.weights_gib:.1f} weights, {self.cache_gib:.1f} cache, {self.working_gib:.1f} work) and {time} "
            f"for {self.questions} questions of up to {self.tokens:,} tokens "
            f"({self.parameters / 1e9:.1f} B parameters, {self.active_parameters / 1e9:.1f} B active){small}{self.coarse}"
        )


def estimate(annotator: VlmAnnotator, episodes: Sequence[Episode]) -> Estimate:
    """Count parameters on the meta device and tokens as the processor does; time by how fast this machine multiplies."""
    from transformers import AutoModelForImageTextToText

    device, config, processor = _device(annotator.device), _config(annotator.model), _processor(annotator.model)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=_dtype(device))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    text = config.text_config
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (1 - text.num_experts_per_tok / text.num_experts) if experts else 0
    vision = sum(size for name, size in sizes.items() if ".visual." in name)
    total, active = sum(sizes.values()), round(sum(sizes.values()) - idle)

    patches = {e.index: _patches(annotator, processor, e) for e in episodes}
    merged = processor.video_processor.merge_size**2
    prompts = {  # one prompt a head stands for all: they differ in a few digits
        head: len(processor.tokenizer(annotator.question(episodes[0], head).prompt)["input_ids"])
        for head in annotator.asked[: len(episodes)]
    }
    stamp = 10  # tokens of a frame's time
    asked = [
        (patches[e.index], patches[e.index] // merged + stamp * len(annotator.shown(e)) + tokens, head)
        for e in episodes
        for head, tokens in prompts.items()
    ]
    longest = max((tokens for _, tokens, _ in asked), default=0)
    bytes_ = _dtype(device).itemsize
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * bytes_
    widest = max((count for count, _, _ in asked), default=0) * config.vision_config.intermediate_size
    work = annotator.batch_size * 4 * bytes_ * max(widest, longest * text.hidden_size * 4)
    gib = 2**30

    workers = max(1, min(annotator.num_workers, -(-len(episodes) // annotator.batch_size)))
    flops, bandwidth = _speed(device)
    seconds = 0.0
    for count, tokens, head in asked:
        read = 2 * vision * count + 2 * (active - vision) * tokens
        written = 20 * 1.5 * len(annotator.vocabulary[head])  # tokens of a segment; every second subtask tried again
        step = max((active - vision) * bytes_ / bandwidth, text.num_hidden_layers * (7e-4 if device != "cpu" else 1e-4))
        seconds += read / flops + written * step / annotator.batch_size
    return Estimate(
        model=model_name(annotator.model),
        device=device,
        parameters=total,
        active_parameters=active,
        questions=len(asked),
        tokens=longest,
        weights_gib=total * bytes_ / gib,
        cache_gib=annotator.batch_size * longest * per_token / gib,
        working_gib=work / gib,
        seconds=seconds / workers,
        room_gib=_room(device, workers) / gib,
        coarse=annotator.coarse(episodes),
    )


def _room(device: str, workers: int) -> float:
    """Bytes that each of `workers` finds free: of its GPU, of all of them where one worker has several, or of the memory."""
    if not device.startswith("cuda"):
        import psutil

        return psutil.virtual_memory().available / workers
    gpus = range(torch.cuda.device_count() if device == "cuda" else 1)
    free = [torch.cuda.mem_get_info(gpu if device == "cuda" else device)[0] for gpu in gpus]
    return sum(free) if workers == 1 else min(free)


def _patches(annotator: VlmAnnotator, processor, episode: Episode) -> int:
    """Patches that the model's vision part sees of an episode; a token of its language part stands for merge_size²."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    video, (height, width) = processor.video_processor, annotator.picture_size
    frames, depth = len(annotator.shown(episode)), video.temporal_patch_size
    height, width = smart_resize(
        num_frames=frames * depth,
        height=height,
        width=width,
        temporal_factor=depth,
        factor=video.patch_size * video.merge_size,
        min_pixels=video.size["shortest_edge"],
        max_pixels=video.size["longest_edge"],
    )
    return frames * (height // video.patch_size) * (width // video.patch_size)


def _speed(device: str) -> tuple[float, float]:
    """Floating-point operations and bytes a second, measured in a moment; 40 % of the former, as models reach."""
    import time

    size = 1024 if device == "cpu" else 8192
    a, b = (torch.ones(size, size, device=device, dtype=_dtype(device)) for _ in range(2))
    finish = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def seconds(work) -> float:
        work()
        finish()
        start = time.perf_counter()
        work()
        finish()
        return time.perf_counter() - start

    return 0.4 * 2 * size**3 / seconds(lambda: a @ b), 2 * a.nbytes / seconds(lambda: a.clone())
