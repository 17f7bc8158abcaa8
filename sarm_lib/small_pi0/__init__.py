"""`small_pi0`: LeRobot's π0 with towers small enough for a laptop's CPU, registered as a LeRobot policy type.

The architecture, the flow-matching loss and the sampling are `PI0Policy`'s; only the sizes of the towers come from the
configuration instead of being Gemma's and SigLIP's, the weights start at random, and the tokenizer is a byte-level BPE
of the dataset's own task texts, kept in the processor's configuration: a checkpoint needs nothing from the Hub. Because
nothing is pretrained, SigLIP's transformer looks at the output of a few convolutions instead of raw patches: it then
learns from thousands of frames instead of millions (Xiao et al. 2021, "Early convolutions help transformers see better").

LeRobot finds the policy and its processors in this module by its naming rules; `import sarm_lib.small_pi0` registers
the type (on LeRobot's command line: `--policy.discover_packages_path=sarm_lib.small_pi0`, which takes packages only:
hence the folder).
"""

from dataclasses import dataclass, field

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.modeling_pi0 import PaliGemmaWithExpertModel, PI0Policy, PI0Pytorch
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import (
    ProcessorStepRegistry,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import CONFIG_MAPPING

PAD, VOCABULARY = "<pad>", 512
IMAGE_TOKEN = VOCABULARY  # PaliGemma's placeholder for an image; π0 never writes it
HEADS = 8  # LeRobot's π0 computes attention with 8 heads, whatever its configuration says


@PreTrainedConfig.register_subclass("small_pi0")
@dataclass
class SmallPI0Config(PI0Config):
    """π0's configuration with the sizes of its towers."""

    image_resolution: tuple[int, int] = (128, 128)
    tokenizer_max_length: int = 24
    stem: list[int] = field(default_factory=lambda: [32, 64, 96, 128])  # channels of its convolutions, multiples of 8
    vision_width: int = 128
    vision_depth: int = 4
    head_dim: int = 16  # of 8 heads, shared by both experts
    depth: int = 4  # layers of both experts
    vlm_width: int = 128
    expert_width: int = 128

    @property
    def patch_size(self) -> int:
        """Pixels, of a side, that an image token stands for: the first convolution takes 4 x 4, each other one halves."""
        return 2 ** (len(self.stem) + 1)


class Stem(nn.Sequential):
    """Convolutions from images (B, 3, H, W) to tokens (B, width, H / patch_size, W / patch_size)."""

    def __init__(self, channels: list[int], width: int) -> None:
        layers: list[nn.Module] = []
        for before, after in zip([3, *channels[:-1]], channels, strict=True):
            shape = {"kernel_size": 3, "stride": 2, "padding": 1} if layers else {"kernel_size": 4, "stride": 4}
            layers += [nn.Conv2d(before, after, **shape), nn.GroupNorm(max(1, after // 8), after), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(channels[-1], width, 1))

    @property
    def weight(self) -> nn.Parameter:
        """SigLIP casts images to the type of its patch projection's weight."""
        return self[-1].weight


class SmallPaliGemmaWithExpert(PaliGemmaWithExpertModel):
    """π0's pair of transformers, built from `SmallPI0Config`."""

    def __init__(self, config: SmallPI0Config) -> None:
        nn.Module.__init__(self)
        self.freeze_vision_encoder, self.train_expert_only = config.freeze_vision_encoder, config.train_expert_only
        gemma = {
            "head_dim": config.head_dim,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "num_hidden_layers": config.depth,
            "hidden_activation": "gelu_pytorch_tanh",
            "vocab_size": VOCABULARY + 1,
            "pad_token_id": 0,
            "dtype": "float32",
            "use_adarms": False,
            "adarms_cond_dim": None,
        }
        vision = {
            "model_type": "siglip_vision_model",
            "image_size": config.image_resolution[0],
            "patch_size": config.patch_size,
            "hidden_size": config.vision_width,
            "intermediate_size": 4 * config.vision_width,
            "num_hidden_layers": config.vision_depth,
            "num_attention_heads": HEADS,
            "projection_dim": config.vlm_width,
            "vision_use_head": False,
        }
        text = {
            "model_type": "gemma",
            "hidden_size": config.vlm_width,
            "intermediate_size": 4 * config.vlm_width,
            **gemma,
        }
        paligemma = CONFIG_MAPPING["paligemma"](
            text_config=text, vision_config=vision, projection_dim=config.vlm_width, image_token_index=IMAGE_TOKEN
        )
        expert = CONFIG_MAPPING["gemma"](
            hidden_size=config.expert_width, intermediate_size=4 * config.expert_width, **gemma
        )
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config=paligemma)
        self.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding = Stem(
            config.stem, config.vision_width
        )
        self.gemma_expert = PiGemmaForCausalLM(config=expert)
        self.gemma_expert.model.embed_tokens = None
        self.to_bfloat16_for_selected_params(config.dtype)
        self._set_requires_grad()


class SmallPI0(PI0Pytorch):
    """π0's flow matching over the small towers."""

    def __init__(self, config: SmallPI0Config, rtc_processor=None) -> None:
        nn.Module.__init__(self)
        self.config, self.rtc_processor = config, rtc_processor
        self.paligemma_with_expert = SmallPaliGemmaWithExpert(config)
        width = config.expert_width
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.gradient_checkpointing_enabled = False


class SmallPI0Policy(PI0Policy):
    config_class = SmallPI0Config
    name = "small_pi0"

    def __init__(self, config: SmallPI0Config, **kwargs) -> None:
        PreTrainedPolicy.__init__(self, config)  # PI0Policy's own constructor would build Gemma's sizes
        config.validate_features()
        self.config = config
        self.init_rtc_processor()
        self.model = SmallPI0(config, rtc_processor=self.rtc_processor)
        self.model.to(config.device)
        self.reset()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "SmallPI0Policy":
        """Load strictly. π0's own loading renames OpenPI's keys and goes on with random weights after an error."""
        return super(PI0Policy, cls).from_pretrained(*args, **kwargs)


@ProcessorStepRegistry.register(name="small_pi0_tokenizer")
@dataclass
class SmallPI0TokenizerStep(TokenizerProcessorStep):
    """LeRobot's tokenizer step with the tokenizer itself in its configuration."""

    tokenizer_json: str | None = None

    def __post_init__(self) -> None:
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(self.tokenizer_json), pad_token=PAD
        )
        super().__post_init__()

    def get_config(self) -> dict:
        return {**super().get_config(), "tokenizer_json": self.tokenizer_json}


def train_tokenizer(texts: list[str]) -> str:
    """A byte-level BPE of at most 512 tokens, as the JSON of `tokenizers`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{text}\n" for text in texts], trainer)
    return tokenizer.to_str()


def make_small_pi0_pre_post_processors(config: SmallPI0Config, dataset_stats=None, dataset_meta=None):
    """π0's processors with the small tokenizer; LeRobot's factory finds this function by its name."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    tokenizer = train_tokenizer(sorted(dataset_meta.tasks.index) if dataset_meta is not None else [])
    input_steps = [
        steps.rename_observations,
        steps.add_batch_dim,
        Pi0NewLineProcessor(),
        SmallPI0TokenizerStep(tokenizer_json=tokenizer, max_length=config.tokenizer_max_length),
        steps.to_device,
        steps.normalize,
    ]
    return make_policy_processor_pipelines(input_steps=input_steps, output_steps=[steps.unnormalize, steps.to_cpu])
