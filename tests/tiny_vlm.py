"""A tiny Qwen3-VL, randomly initialised, with the real processor, and clips to show it: its answers mean nothing, its
whole path runs in milliseconds on a CPU and without network."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from sarm_lib.annotations import Annotation
from sarm_lib.dataset import DatasetError, Episode

MANY = [20, 33, 14, 25] * 25  # frames of a hundred clips
VOCABULARY = {
    "sparse": ["pick up the nut", "place the nut"],
    "dense": ["reach the nut", "grasp the nut", 'say "ä\\" to it', "lower the nut onto the peg"],
}
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# What Qwen3-VL's own template makes of messages with text, images and videos.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
# Qwen's: words, single digits, punctuation, white space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def ask_here(model: Path, dataset: "Clips", **changes):
    """An annotator that asks the tiny model in this process, sampling."""
    from sarm_lib.annotators.vlm import VlmAnnotator

    values = {"vocabulary": VOCABULARY, "temperature": 1.0, "batch_size": 8, "device": "cpu", **changes}
    return VlmAnnotator(dataset, model=str(model), **values)


def ask_server(address: str, dataset: "Clips", **changes):
    """An annotator that asks `tests.openai_server`, sampling, four requests in flight."""
    from sarm_lib.annotators.server import ServerAnnotator

    values = {"vocabulary": VOCABULARY, "temperature": 1.0, "in_flight": 4, "frames_per_second": 2}
    values |= {"url": f"{address}/v1", "model": "tiny-vlm", "use_grammar": True, **changes}
    return ServerAnnotator(dataset, **values)


RUN = """
import sys
from pathlib import Path
from sarm_lib import annotators
from tests import tiny_vlm

ask, model, root, work = sys.argv[1:]
dataset = tiny_vlm.Clips(tiny_vlm.MANY, root=Path(root))
annotators.run(getattr(tiny_vlm, ask)(model, dataset), dataset, tiny_vlm.VOCABULARY, Path(work))
"""


def kill_and_go_on(ask: str, model: str, folder: Path) -> list[Annotation]:
    """Annotate a hundred clips in a process, kill it when the first are saved, go on here for a few more. Asserts that
    what was finished is neither asked again nor changed; returns all that is finished then."""
    from sarm_lib import annotators

    root, work = folder / "dataset", folder / "work"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, ask, model, str(root), str(work)]
    with subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE) as process:
        while not list(work.glob("*/[0-9]*.json")):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = {path: path.read_bytes() for path in work.glob("*/[0-9]*.json")}
    done = {int(path.stem) for path in before}
    assert 0 < len(done) < len(MANY)

    dataset = Clips(MANY, root=root)
    more = [episode for episode in dataset.episodes if episode.index not in done][:4]
    wanted = [episode for episode in dataset.episodes if episode.index in done] + more
    asking = globals()[ask](model, dataset)
    asked, annotate = [], asking.annotate
    asking.annotate = lambda episodes: asked.extend(episodes) or annotate(episodes)
    found, failures = annotators.run(asking, dataset, VOCABULARY, work, episodes=wanted)
    assert asked == more and not failures
    assert {annotation.episode for annotation in found} == {episode.index for episode in wanted}
    assert all(path.read_bytes() == content for path, content in before.items())
    return found


def make_tokenizer(size: int = 600):
    """A byte-level BPE of `size` tokens, trained on the question's own words, with Qwen's special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sarm_lib.annotators import question

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([question.PROMPT, '{"segments": [{"start": 0.0, "subtask": "'] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL,
    )


def make_vlm(folder: Path, experts: bool = False) -> Path:
    """Save model and processor into `folder`; with `experts` a mixture of four."""
    import torch
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = make_tokenizer()
    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 768}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **patches),
        video_processor=Qwen3VLVideoProcessor(size=size, **patches),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    text = {
        "vocab_size": len(tokenizer) + 8,  # padded, as the real one
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    if experts:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    make_config = Qwen3VLMoeConfig if experts else Qwen3VLConfig
    make_model = Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    make_model(make_config(text_config=text, vision_config=vision, **ids)).save_pretrained(folder)
    return folder


class Clips:
    """As much of a dataset as annotators look at: clips of grey frames, brighter from frame to frame."""

    def __init__(
        self, lengths: list[int], fps: int = 10, broken: tuple[int, ...] = (), root: Path | None = None
    ) -> None:
        starts = np.cumsum([0, *lengths]).tolist()
        self.episodes = tuple(
            Episode(i, length, start, start, "train", "all") for i, (length, start) in enumerate(zip(lengths, starts))
        )
        self.fps, self.broken = fps, broken
        self.tasks = ["put the nut on the peg", "take the nut off"]
        self.frames = pd.DataFrame({"task_index": [e.index % 2 for e in self.episodes for _ in range(e.length)]})
        self.image_keys = ("observation.images.front",)
        feature = {"dtype": "video", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
        self.features = {self.image_keys[0]: feature}
        if root:
            self.root, self.fingerprint = root, "of clips"
            info = {"fps": fps, "total_frames": sum(lengths), "features": self.features}
            (root / "meta").mkdir(parents=True, exist_ok=True)
            (root / "meta/info.json").write_text(json.dumps(info))

    def content(self, episode: Episode, image_key: str) -> str:
        return f"{image_key}: {episode.length} frames"

    def read_frames(self, episode: Episode, image_key: str, frame_indices: list[int]) -> np.ndarray:
        if episode.index in self.broken:
            raise DatasetError(f"episode {episode.index}, {image_key}: file-000.mp4 is missing")
        brightness = (np.array(frame_indices) * 255 // episode.length).astype(np.uint8)
        return np.broadcast_to(brightness[:, None, None, None], (len(frame_indices), 32, 32, 3)).copy()
