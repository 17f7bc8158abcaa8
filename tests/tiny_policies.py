"""LeRobot's larger policies at a size that a test can train: the same classes and processors, randomly initialised."""

from pathlib import Path

import torch
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from benchmarks import small_pi05
from sarm_lib.small_pi0 import train_tokenizer
from tests.conftest import TINY

TEXTS = ["cross the picture", "State: 0 1 2 3 4 5 6 7 8 9, Task:;\nAction: "]


def make_smolvlm(folder: Path) -> Path:
    """The vision-language model under SmolVLA, with its processor, in Hugging Face format."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(
        image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
        },
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    size = {"longest_edge": 32}
    images = SmolVLMImageProcessor(size=size, max_image_size=size)
    videos = SmolVLMVideoProcessor(size=size, max_image_size=size, fps=1, num_frames=2)
    SmolVLMProcessor(images, tokenizer, videos, image_seq_len=1, chat_template="{{ messages }}").save_pretrained(folder)
    return folder


def shrink_pi05(monkeypatch) -> None:
    """π0.5 with towers as small as the tests' π0, and a tokenizer of its own: its sizes cannot be configured."""
    sizes = {**TINY["policy.config"], "tokenizer_max_length": 64}
    for module, name, value in small_pi05.replacements(sizes, ["cross the picture"]):
        monkeypatch.setattr(module, name, value)


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few words. special: names of special tokens and what they read."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_specific_special_tokens=special)
