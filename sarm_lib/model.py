"""SARM: a stage transformer and a progress transformer over windows of frozen embeddings.

Both read three streams of T positions, concatenated stream-major: image embeddings of each camera, the task's text
embedding, the robot's state; the progress transformer a fourth, the one-hot stage. One learned bias on the first visual
frame is the only positional encoding. Attention is causal over the flat order; a fusion over all streams of a position
gives stage logits and, by a sigmoid, τ.

Parameters have LeRobot's names and shapes, so a checkpoint of one camera and 512-wide features is LeRobot's (`checkpoint`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
    inputs: tuple[Literal["images", "state"], ...] = ("images", "state")  # the others are zeros: for ablations

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(head for head in HEADS if head in self.stage_names)

    def num_stages(self, head: str) -> int:
        return len(self.stage_names[head])


class StreamTransformer(nn.Module):
    """Streams in, one fused feature a position out, and a linear head for each annotation head."""

    def __init__(self, spec: SarmSpec, outputs: dict[str, int], last_streams: int = 0) -> None:
        super().__init__()
        width, streams = spec.hidden_dim, spec.num_cameras + 2 + last_streams
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

    def features(self, windows: Windows, last: Sequence[Tensor] = ()) -> list[Tensor]:
        """What the heads read, (B, T, D).

        last: alternatives (B, T, ≤ D) for one more stream, zero-padded to the width; there is a result for each. They do
        not see each other, so every result is that of a pass of its own, while the streams before them are computed once.
        """
        x = self.embed(windows, last)
        batch, streams, length, width = x.shape
        shared, tokens = streams - len(last), streams * length
        padding = ~windows.valid[:, None].expand(batch, streams, length).reshape(batch, -1)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        for i in range(len(last)):
            mine = slice((shared + i) * length, (shared + i + 1) * length)
            hidden[mine, shared * length : mine.start] = True
        h = self.transformer(x.reshape(batch, -1, width), mask=hidden, src_key_padding_mask=padding)
        h = h.view(batch, streams, length, width).transpose(1, 2)
        return [self._fuse(h[:, :, :shared], h[:, :, shared + i, None]) for i in range(len(last))] or [self._fuse(h)]

    def _fuse(self, *streams: Tensor) -> Tensor:
        return self.fusion_backbone(torch.cat(streams, dim=2).flatten(2))

    def embed(self, windows: Windows, last: Sequence[Tensor]) -> Tensor:
        """Project every stream to the model's width: (B, streams, T, D)."""
        visual = self.visual_proj(windows.images)
        visual = torch.cat([visual[:, :, :1] + self.first_pos, visual[:, :, 1:]], dim=2)
        text = self.lang_proj(windows.text)[:, None, None].expand(-1, 1, visual.shape[2], -1)
        streams = [visual, text, self.state_proj(windows.state)[:, None]]
        streams += [F.pad(x, (0, visual.shape[-1] - x.shape[-1]))[:, None].to(visual.dtype) for x in last]
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
        self.subtask_model = StreamTransformer(spec, dict.fromkeys(HEADS, 1), last_streams=1)

    def stage_logits(self, windows: Windows, heads: Sequence[str]) -> dict[str, Tensor]:
        """Of each head (B, T, K). The heads share one pass; one stage needs none: its softmax is 1 whatever the logit, and
        its loss has no gradient."""
        batch, _, length, _ = windows.images.shape
        several = [head for head in heads if self.spec.num_stages(head) > 1]
        features = self.stage_model.features(windows)[0] if several else None
        return {
            head: self.stage_model.heads[head](features)
            if head in several
            else windows.images.new_zeros(batch, length, 1)
            for head in heads
        }

    def tau(self, windows: Windows, stage: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of each head τ (B, T) in [0, 1], given its stages (B, T) int64."""
        one_hot = [F.one_hot(k, self.spec.num_stages(head)).to(windows.images.dtype) for head, k in stage.items()]
        features = self.subtask_model.features(windows, one_hot)
        heads = self.subtask_model.heads
        return {head: torch.sigmoid(heads[head](x)).squeeze(-1) for head, x in zip(stage, features, strict=True)}

    def predict(self, windows: Windows, heads: Sequence[str]) -> dict[str, Prediction]:
        """k̂ = argmax of the stage head, τ̂ given k̂."""
        probabilities = {head: logits.softmax(-1) for head, logits in self.stage_logits(windows, heads).items()}
        stage = {head: p.argmax(-1) for head, p in probabilities.items()}
        tau = self.tau(windows, stage)
        return {head: Prediction(probabilities[head], stage[head], tau[head]) for head in heads}
