"""SARM: a stage transformer and a progress transformer over windows of frozen embeddings.

Both read three streams of T positions, concatenated stream-major: image embeddings of each camera, the task's text
embedding, the robot's state; the progress transformer a fourth, the one-hot stage. One learned bias on the first visual
frame is the only positional encoding. Attention is causal over the flat order; a fusion over all streams of a position
gives stage logits and, by a sigmoid, τ.

Parameters have LeRobot's names and shapes, so a checkpoint of one camera and 512-wide features is LeRobot's (`checkpoint`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sarm_lib.windows import Windows, WindowSpec

HEADS = ("sparse", "dense")


@dataclass(frozen=True)
class SarmSpec:
    """Everything that defines a SARM besides its weights."""

    window: WindowSpec
    stage_names: dict[str, list[str]]  # a head: its K stages in order
    proportions: dict[str, list[float]]  # a head: ᾱ, (K,)
    annotation_mode: str
    num_cameras: int = 1
    image_dim: int = 512
    text_dim: int = 512
    max_state_dim: int = 32
    hidden_dim: int = 768
    num_heads: int = 12
    num_layers: int = 8
    dropout: float = 0.1

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(head for head in HEADS if head in self.stage_names)

    def num_stages(self, head: str) -> int:
        return len(self.stage_names[head])


class StreamTransformer(nn.Module):
    """Streams in, one fused feature a position out, and a linear head for each annotation head."""

    def __init__(self, spec: SarmSpec, outputs: dict[str, int], extra_streams: int = 0) -> None:
        super().__init__()
        width, streams = spec.hidden_dim, spec.num_cameras + 2 + extra_streams
        self.lang_proj = nn.Linear(spec.text_dim, width)
        self.visual_proj = nn.Linear(spec.image_dim, width)
        self.state_proj = nn.Linear(spec.max_state_dim, width)
        layer = nn.TransformerEncoderLayer(width, spec.num_heads, 4 * width, spec.dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, spec.num_layers)
        self.first_pos = nn.Parameter(torch.zeros(1, width))
        self.fusion_backbone = nn.Sequential(
            nn.LayerNorm(streams * width), nn.Linear(streams * width, width), nn.ReLU()
        )
        self.heads = nn.ModuleDict({head: nn.Linear(width, size) for head, size in outputs.items()})

    def forward(self, windows: Windows, head: str, extra: Tensor | None = None) -> Tensor:
        """Head outputs (B, T, size); `extra` (B, T, ≤ D) is one more stream, zero-padded to the width."""
        return self.heads[head](self.features(windows, extra))

    def features(self, windows: Windows, extra: Tensor | None = None) -> Tensor:
        """What every head reads, (B, T, D)."""
        x = self.embed(windows, extra)
        batch, streams, length, width = x.shape
        padding = ~windows.valid[:, None].expand(batch, streams, length).reshape(batch, -1)
        causal = torch.ones(streams * length, streams * length, dtype=torch.bool, device=x.device).triu(1)
        h = self.transformer(x.reshape(batch, -1, width), mask=causal, src_key_padding_mask=padding, is_causal=True)
        h = h.view(batch, streams, length, width).transpose(1, 2).reshape(batch, length, -1)
        return self.fusion_backbone(h)

    def embed(self, windows: Windows, extra: Tensor | None) -> Tensor:
        """Project every stream to the model's width: (B, streams, T, D)."""
        visual = self.visual_proj(windows.images)
        visual = torch.cat([visual[:, :, :1] + self.first_pos, visual[:, :, 1:]], dim=2)
        text = self.lang_proj(windows.text)[:, None, None].expand(-1, 1, visual.shape[2], -1)
        streams = [visual, text, self.state_proj(windows.state)[:, None]]
        if extra is not None:
            streams.append(F.pad(extra, (0, visual.shape[-1] - extra.shape[-1]))[:, None].to(visual.dtype))
        return torch.cat(streams, dim=1)


class Prediction(NamedTuple):
    """Of one head at every position: stage probabilities (B, T, K), argmax stage (B, T), τ (B, T)."""

    probabilities: Tensor
    stage: Tensor
    tau: Tensor


class Sarm(nn.Module):
    """The two transformers of SARM. Keys of its state dict are those of LeRobot's `SARMRewardModel`."""

    def __init__(self, spec: SarmSpec) -> None:
        super().__init__()
        self.spec = spec
        # LeRobot always builds both heads; a missing dense one has as many outputs as the sparse one and is not used.
        classes = {head: spec.num_stages(head if head in spec.heads else "sparse") for head in HEADS}
        self.stage_model = StreamTransformer(spec, classes)
        self.subtask_model = StreamTransformer(spec, dict.fromkeys(HEADS, 1), extra_streams=1)

    def stage_logits(self, windows: Windows, heads: Sequence[str]) -> dict[str, Tensor]:
        """Of each head (B, T, K). The heads share one pass; one stage needs none: its softmax is 1 whatever the logit, and
        its loss has no gradient."""
        batch, _, length, _ = windows.images.shape
        several = [head for head in heads if self.spec.num_stages(head) > 1]
        features = self.stage_model.features(windows) if several else None
        return {
            head: self.stage_model.heads[head](features)
            if head in several
            else windows.images.new_zeros(batch, length, 1)
            for head in heads
        }

    def tau(self, windows: Windows, head: str, stage: Tensor) -> Tensor:
        """τ (B, T) in [0, 1] given stages (B, T) int64."""
        one_hot = F.one_hot(stage, self.spec.num_stages(head)).to(windows.images.dtype)
        return torch.sigmoid(self.subtask_model(windows, head, one_hot)).squeeze(-1)

    def predict(self, windows: Windows, head: str) -> Prediction:
        """k̂ = argmax of the stage head, τ̂ given k̂."""
        probabilities = self.stage_logits(windows, [head])[head].softmax(-1)
        stage = probabilities.argmax(-1)
        return Prediction(probabilities, stage, self.tau(windows, head, stage))
