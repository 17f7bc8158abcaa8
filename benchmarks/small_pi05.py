"""LeRobot's π0.5 with the demo's small towers, as a second policy for the experiment.

Its class, its loss, its processors and its way of acting are LeRobot's. What differs from π0: the state is read as text, in
256 steps a number, and the time of the flow conditions every layer of the action expert. LeRobot fixes the sizes of its towers
and its tokenizer, which is on the Hub; so both are put into its modules here, in the process that calls `shrink`.

A pretrained tower has read of numbers and knows which lie next to each other. One whose weights start at random would learn
each of the 256 steps from the few frames that show it, so here every number is one token, and the tokens of numbers start as
waves of the number: neighbours alike.
"""

from typing import Any

import torch
from lerobot.policies.pi05 import modeling_pi05
from lerobot.processor import tokenizer_processor
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demo.simulator import TASK
from sarm_lib.small_pi0 import PAD, VOCABULARY, SmallPaliGemmaWithExpert, SmallPI0Config

NUMBERS = range(-1, 256)  # the steps of a number of the state; LeRobot writes -1 for what lies below its quantile
UNKNOWN = "<unk>"
TEMPLATE = "Task: {}, State: 0;\nAction: "  # what LeRobot's processor writes


def make_tokenizer(tasks: list[str]) -> PreTrainedTokenizerFast:
    """A word, a number or a mark is one token. Raises ValueError for tasks of more words than the vocabulary has room for."""
    words = pre_tokenizers.Split(Regex(r"-?\w+|[^\w\s]"), "removed", invert=True)
    texts = [word for task in tasks for word, _ in words.pre_tokenize_str(TEMPLATE.format(task))]
    known = list(dict.fromkeys([PAD, UNKNOWN, *map(str, NUMBERS), *texts]))
    if len(known) > VOCABULARY:
        raise ValueError(f"the tasks have too many words: {len(known)} tokens, and the vocabulary has {VOCABULARY}")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = words
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN)


def waves(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """(numbers, width): sines and cosines of each number, of periods from 8 to 1024 steps, with a mean square of 1."""
    periods = torch.logspace(3, 10, width // 2, base=2)
    phases = 2 * torch.pi * numbers[:, None] / periods
    return torch.cat([phases.sin(), phases.cos()], dim=1) * 2**0.5


def towers(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> SmallPaliGemmaWithExpert:
    """π0.5's pair of transformers in the sizes of a `SmallPI0Config`."""
    pair = SmallPaliGemmaWithExpert(SmallPI0Config(**sizes))
    config = pair.gemma_expert.config
    config.use_adarms, config.adarms_cond_dim = True, config.hidden_size  # the time of the flow conditions each layer
    pair.gemma_expert = type(pair.gemma_expert)(config)
    pair.gemma_expert.model.embed_tokens = None
    table = pair.paligemma.model.language_model.get_input_embeddings().weight
    tokens = tokenizer.convert_tokens_to_ids([str(n) for n in NUMBERS])
    with torch.no_grad():
        table[tokens] = waves(torch.tensor(NUMBERS), table.shape[1]) * table[tokens].std()
    return pair


def replacements(sizes: dict[str, Any], tasks: list[str]) -> list[tuple[Any, str, Any]]:
    """What stands for what in LeRobot's modules: (module, name, value)."""
    tokenizer = make_tokenizer(tasks)
    width = type("Sizes", (), {"width": SmallPI0Config(**sizes).expert_width})
    loader = type("Tokenizers", (), {"from_pretrained": staticmethod(lambda *_, **__: tokenizer)})
    return [
        (modeling_pi05, "PaliGemmaWithExpertModel", lambda *_, **__: towers(sizes, tokenizer)),
        (modeling_pi05, "get_gemma_config", lambda _: width),
        (tokenizer_processor, "AutoTokenizer", loader),
    ]


def shrink(sizes: dict[str, Any]) -> None:
    """Make every π0.5 of this process a small one."""
    for module, name, value in replacements(sizes, [TASK]):
        setattr(module, name, value)
