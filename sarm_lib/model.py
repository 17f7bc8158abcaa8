"""SARM: a stage transformer and a progress transformer over windows of frozen embeddings.

Both read three streams of T positions, concatenated stream-major: image embeddings of each camera, the task's text
embedding, the robot's state; the progress transformer a fourth, the one-hot stage. One learned bias on the first visual
frame is the only positional encoding. Attention is causal over the flat order; a fusion over all streams of a position
gives stage logits and, by a sigmoid, τ.

Parameters have LeRobot's names and shapes, so a checkpoint of one camera and 512-wide features is LeRobot's (`checkpoint`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sarm_lib.kernels import linear
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

    def features(self, windows: Windows, last: Sequence[Tensor] = (), read: slice = slice(None)) -> list[Tensor]:
        """What the heads read at positions `read`, (B, n, D); nothing is computed that does not reach them.

        last: alternatives (B, T, ≤ D) for one more stream, zero-padded to the width; there is a result for each. They do
        not see each other, so every result is that of a pass of its own, while the streams before them are computed once.
        """
        x = self.embed(windows, last)
        batch, streams, length, width = x.shape
        shared = streams - len(last)
        # Made on the CPU: a GPU would be waited for, to learn how many tokens there are.
        tokens = _reached(shared, len(last), length, read)
        kept, seen, asked = (index.to(x.device, non_blocking=True) for index in tokens)
        valid = windows.valid[:, None].expand(batch, streams, length).flatten(1)[:, kept]
        h = _run(self.transformer.layers, x.flatten(1, 2)[:, kept], seen, valid, asked)
        h = h.view(batch, streams, -1, width).transpose(1, 2)
        before, alternatives = h[:, :, :shared], h[:, :, shared:]
        return [self._fuse(before, x) for x in alternatives.split(1, dim=2)] if last else [self._fuse(before)]

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


@lru_cache
@torch.inference_mode(False)  # training uses them too
def _reached(shared: int, alternatives: int, length: int, read: slice) -> tuple[Tensor, Tensor, Tensor]:
    """What positions `read` of every stream are computed from, by places in the flat order of streams, on the CPU: the
    tokens (L,) that reach them; which of these (columns) one of them (row) may attend to, (L, L) bool; and where among them
    the positions are, (streams · n,)."""
    streams, asked = shared + alternatives, list(range(length)[read])
    # Attention is causal over the flat order: late positions of a stream that no other one follows reach nothing.
    kept = torch.ones(streams, length, dtype=torch.bool)
    kept[shared if alternatives else -1 :, asked[-1] + 1 :] = False
    seen = torch.ones(streams * length, streams * length, dtype=torch.bool).tril()
    for i in range(alternatives):
        mine = slice((shared + i) * length, (shared + i + 1) * length)
        seen[mine, shared * length : mine.start] = False
    number = kept.flatten().cumsum(0).view(streams, length) - 1
    kept = kept.flatten().nonzero().squeeze(1)
    return kept, seen[kept][:, kept], number[:, asked].flatten()


class _Packing:
    """Tokens (B, L, D) as rows (M, D) and back, without those that are not `valid` (B, L), which come back as zeros."""

    def __init__(self, valid: Tensor) -> None:
        self.shape, self.rows = valid.shape, None if valid.all() else valid.flatten().nonzero().squeeze(1)

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.rows is None else x.flatten(0, 1)[self.rows]

    def unpack(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            x = x.new_zeros(self.shape.numel(), x.shape[-1]).index_copy(0, self.rows, x)
        return x.view(*self.shape, -1)


def _run(layers: nn.ModuleList, x: Tensor, seen: Tensor, valid: Tensor, read: Tensor) -> Tensor:
    """The transformer's layers on tokens (B, L, D), and of the last one only tokens `read` (n,): (B, n, D).

    seen: (L, L) bool, which tokens (columns) a token (row) attends to. valid: (B, L) bool, False for padded positions,
    which nothing attends to and no matrix product is spent on.
    """
    mask, every, asked = (seen & valid[:, None])[:, None], _Packing(valid), _Packing(valid[:, read])
    h = every.pack(x)
    for layer in layers[:-1]:
        h = _layer(layer, h, every, h, every, mask)
    query = asked.pack(every.unpack(h)[:, read])
    return asked.unpack(_layer(layers[-1], query, asked, h, every, mask[:, :, read]))


def _layer(
    layer: nn.TransformerEncoderLayer, query: Tensor, asked: _Packing, h: Tensor, every: _Packing, mask: Tensor
) -> Tensor:
    """One layer for the rows `query` (n, D), which attend to the rows `h` (M, D) as far as `mask` (B, 1, n, L) lets them."""
    attention, width = layer.self_attn, h.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q = asked.unpack(linear(query, weight[:width], bias[:width]))
    k, v = every.unpack(linear(h, weight[width:], bias[width:])).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, mask, attention.dropout if layer.training else 0.0)
    mixed = asked.pack(mixed.transpose(1, 2).flatten(2))
    h = layer.norm1(_added(query, attention.out_proj, mixed, layer.dropout1))
    wide = layer.dropout(linear(h, layer.linear1.weight, layer.linear1.bias, "relu"))
    return layer.norm2(_added(h, layer.linear2, wide, layer.dropout2))


def _added(residual: Tensor, layer: nn.Linear, x: Tensor, dropout: nn.Dropout) -> Tensor:
    """residual + dropout(layer(x)), in one pass where nothing is dropped."""
    if dropout.training:
        return residual + dropout(linear(x, layer.weight, layer.bias))
    return linear(x, layer.weight, layer.bias, residual=residual)


class Prediction(NamedTuple):
    """Of one head at n positions: stage probabilities (B, n, K), argmax stage (B, n), τ (B, n)."""

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

    def stage_logits(self, windows: Windows, heads: Sequence[str], read: slice = slice(None)) -> dict[str, Tensor]:
        """Of each head at positions `read` (B, n, K). The heads share one pass; one stage needs none: its softmax is 1
        whatever the logit, and its loss has no gradient."""
        several = [head for head in heads if self.spec.num_stages(head) > 1]
        features = self.stage_model.features(windows, read=read)[0] if several else None
        return {
            head: self.stage_model.heads[head](features)
            if head in several
            else torch.zeros_like(windows.state[:, read, :1])
            for head in heads
        }

    def tau(self, windows: Windows, stage: dict[str, Tensor], read: slice = slice(None)) -> dict[str, Tensor]:
        """Of each head τ at positions `read` (B, n) in [0, 1], given its stages (B, ≤ T) int64 up to there."""
        later = windows.state.shape[1] - next(iter(stage.values())).shape[1]
        one_hot = [F.one_hot(F.pad(k, (0, later)), self.spec.num_stages(head)) for head, k in stage.items()]
        features = self.subtask_model.features(windows, one_hot, read)
        heads = self.subtask_model.heads
        return {head: torch.sigmoid(heads[head](x)).squeeze(-1) for head, x in zip(stage, features, strict=True)}

    def predict(self, windows: Windows, heads: Sequence[str], position: int | None = None) -> dict[str, Prediction]:
        """k̂ = argmax of the stage head, τ̂ given k̂: at every position, or at one."""
        until, read = (slice(None),) * 2 if position is None else (slice(position + 1), slice(position, position + 1))
        logits = self.stage_logits(windows, heads, until)  # τ sees the stages up to its own position
        probabilities = {head: x.softmax(-1) for head, x in logits.items()}
        stage = {head: p.argmax(-1) for head, p in probabilities.items()}
        tau = self.tau(windows, stage, read)
        shown = slice(None) if position is None else slice(position, None)
        return {head: Prediction(probabilities[head][:, shown], stage[head][:, shown], tau[head]) for head in heads}
