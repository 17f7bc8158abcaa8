"""LeRobot's π0.5 with the demo's small towers, as a second policy for the experiment.

Its class, its loss, its processors and its way of acting are LeRobot's. What differs from π0: the state is read as text, in
256 steps a number, and the time of the flow conditions every layer of the action expert. LeRobot fixes the sizes of its towers
and its tokenizer, which is on the Hub; so both are put into its modules here, in the process that calls `shrink`.
"""

from typing import Any

from lerobot.policies.pi05 import modeling_pi05
from lerobot.processor import tokenizer_processor
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sarm_lib.small_pi0 import PAD, SmallPaliGemmaWithExpert, SmallPI0Config, train_tokenizer

STEPS = " ".join(map(str, range(256)))  # of a number of the state, each one a token
TEXTS = [f"Task: pick up the nut and place it on the peg, State: {STEPS};\nAction: "] * 2


def towers(sizes: dict[str, Any]) -> SmallPaliGemmaWithExpert:
    """π0.5's pair of transformers in the sizes of a `SmallPI0Config`."""
    pair = SmallPaliGemmaWithExpert(SmallPI0Config(**sizes))
    config = pair.gemma_expert.config
    config.use_adarms, config.adarms_cond_dim = True, config.hidden_size  # the time of the flow conditions each layer
    pair.gemma_expert = type(pair.gemma_expert)(config)
    pair.gemma_expert.model.embed_tokens = None
    return pair


def replacements(sizes: dict[str, Any], texts: list[str]) -> list[tuple[Any, str, Any]]:
    """What stands for what in LeRobot's modules: (module, name, value)."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(train_tokenizer(texts)), pad_token=PAD)
    width = type("Sizes", (), {"width": SmallPI0Config(**sizes).expert_width})
    loader = type("Tokenizers", (), {"from_pretrained": staticmethod(lambda *_, **__: tokenizer)})
    return [
        (modeling_pi05, "PaliGemmaWithExpertModel", lambda *_, **__: towers(sizes)),
        (modeling_pi05, "get_gemma_config", lambda _: width),
        (tokenizer_processor, "AutoTokenizer", loader),
    ]


def shrink(sizes: dict[str, Any]) -> None:
    """Make every π0.5 of this process a small one."""
    for module, name, value in replacements(sizes, TEXTS):
        setattr(module, name, value)
