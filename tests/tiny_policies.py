"""LeRobot's larger policies at a size that a test can train: the same classes and processors, randomly initialised."""

from pathlib import Path

import torch
from lerobot.policies.pi05 import modeling_pi05
from lerobot.processor import tokenizer_processor
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from sarm_lib.small_pi0 import SmallPaliGemmaWithExpert, SmallPI0Config, train_tokenizer
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

    def build(*_, **__):
        pair = SmallPaliGemmaWithExpert(SmallPI0Config(**TINY["policy.config"], tokenizer_max_length=64))
        width = pair.gemma_expert.config.hidden_size
        pair.gemma_expert = type(pair.gemma_expert)(conditioned(pair.gemma_expert.config, width))
        pair.gemma_expert.model.embed_tokens = None
        return pair

    sizes = type("Sizes", (), {"width": TINY["policy.config"]["expert_width"]})
    monkeypatch.setattr(modeling_pi05, "PaliGemmaWithExpertModel", build)
    monkeypatch.setattr(modeling_pi05, "get_gemma_config", lambda _: sizes)
    loader = type("Tokenizers", (), {"from_pretrained": staticmethod(lambda *_, **__: make_tokenizer())})
    monkeypatch.setattr(tokenizer_processor, "AutoTokenizer", loader)


def conditioned(config, width: int):
    """The expert's configuration with π0.5's adaptive normalisation by the time of the flow."""
    config.use_adarms, config.adarms_cond_dim = True, width
    return config


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few words. special: names of special tokens and what they read."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_specific_special_tokens=special)
