"""The frozen image-text encoder (CLIP) and the embeddings it leaves behind: each frame of each camera encoded once.

`embeddings/` holds one memory-mapped array a camera, (N, E) float32 or float16, one for the task texts, and `index.json`,
which names the dataset, the encoder and what each episode shows. After stage 00 nothing decodes a video to score or train
a reward model, and an episode that was encoded before is not encoded again, also in a dataset that has grown.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sarm_lib.artifacts import (
    PROVENANCE,
    code_digest,
    digest,
    folder_digest,
    is_current,
    read_json,
    remove,
    staged,
    write_json,
)
from sarm_lib.dataset import Dataset, DatasetError, Episode
from sarm_lib.kernels import FrozenQuickGELU, Packed, freeze, packed_once
from sarm_lib.live import bar
from sarm_lib.processes import share

INDEX = "index.json"
RESIZING = 2  # threads that resize for a GPU, which encodes a batch sooner than one of them resizes it
Precision = Literal["fp32", "bf16"]


class Encoder:
    """CLIP's two towers, frozen. precision: the image tower's, `fp32` or `bf16`; embeddings are float32 in any case."""

    def __init__(self, path: str, device: str, name: str, precision: Precision = "fp32") -> None:
        from transformers import AutoTokenizer, CLIPModel  # seconds to load, and only stages that encode need them
        from transformers.models.clip import CLIPImageProcessor

        self.path, self.name, self.device, self.precision = path, name, torch.device(device), precision
        self.model = freeze(CLIPModel.from_pretrained(path, dtype=torch.float32).to(self.device))
        layers = self.model.vision_model.encoder.layers
        if self.model.config.vision_config.hidden_act == "quick_gelu":
            for layer in layers:
                layer.mlp = FrozenQuickGELU(layer.mlp.fc1, layer.mlp.fc2)
        layers[-1] = PooledLayer(layers[-1])
        self._packed = Packed()
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model.vision_model.to(self.dtype), self.model.visual_projection.to(self.dtype)
        self.processor = CLIPImageProcessor.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @property
    def width(self) -> int:
        """Length E of an embedding (512 for ViT-B/32)."""
        return self.model.config.projection_dim

    @cached_property
    def identity(self) -> str:
        """A name for weights, preprocessing and tokenizer, whatever folder they lie in."""
        return folder_digest(self.path) or digest(self.path, self.model.config._commit_hash)

    def images(self, images: np.ndarray) -> Tensor:
        """Embed (B, H, W, 3) uint8 images: (B, E) float32 on the CPU."""
        return self.embed(self.pixels(images)).cpu()

    def pixels(self, images: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 images as the model sees them: resized, cropped and normalised, (B, 3, S, S), on the encoder's device.

        A GPU resizes otherwise: one pixel in seven of the demo's differs, and an embedding by half a percent of its length. So
        pictures are resized on the CPU everywhere, and the same frames mean the same to a model wherever it runs.
        """
        # The processor's own steps: called as a whole, it takes a batch apart and puts it together again three times.
        steps, seen = self.processor, torch.from_numpy(images).permute(0, 3, 1, 2)
        if steps.do_resize:
            seen = steps.resize(seen, steps.size, resample=steps.resample)
        if steps.do_center_crop:
            seen = steps.center_crop(seen, steps.crop_size)
        scaling = steps.do_rescale, steps.rescale_factor, steps.do_normalize, steps.image_mean, steps.image_std
        return steps.rescale_and_normalize(seen.to(self.device), *scaling).contiguous()

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """Embed `pixels` (B, 3, S, S): (B, E) float32 on the encoder's device, which a GPU may still be working on."""
        with packed_once(self._packed), full_precision(self.device):
            return _pooled(self.model.get_image_features(pixels.to(self.device, self.dtype))).float()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Embed n texts: (n, E) float32 on the CPU."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.model.get_text_features(**tokens)).cpu()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions in float32: on a GPU PyTorch multiplies them in TF32 (ten bits of mantissa) if nobody objects."""
    if device.type != "cuda":
        yield
        return
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class PooledLayer(nn.Module):
    """CLIP's last image layer, for its first token alone: the embedding is made of no other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """(B, L, D) tokens to (B, 1, D)."""
        layer, attention = self.layer, self.layer.self_attn
        normed = layer.layer_norm1(hidden_states)
        projections = ((attention.q_proj, normed[:, :1]), (attention.k_proj, normed), (attention.v_proj, normed))
        q, k, v = (p(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p, x in projections)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        pooled = hidden_states[:, :1] + attention.out_proj(mixed)
        return pooled + layer.mlp(layer.layer_norm2(pooled))


@dataclass(frozen=True)
class Embeddings:
    """What stage 00 left: `images` (N, C, E) of C cameras, memory-mapped a camera, and `tasks` (n, E)."""

    cameras: dict[str, np.ndarray]
    tasks: np.ndarray
    encoder: str
    encoder_identity: str
    fingerprint: str

    @property
    def width(self) -> int:
        return self.tasks.shape[1]

    def gather(self, rows: np.ndarray, image_keys: tuple[str, ...]) -> Tensor:
        """Image embeddings of frames `rows` (B, T): (B, C, T, E) float32."""
        return torch.from_numpy(np.stack([self.cameras[key][rows] for key in image_keys], axis=1)).float()


def load(path: str, device: str = "cpu", name: str | None = None, precision: Precision = "fp32") -> Encoder:
    """A CLIP encoder from a local folder or the Hub; `name` is what artifacts call it. Raises OSError with what was
    looked for."""
    return Encoder(path, device, name or path, precision)


def from_params(params, device: str) -> Encoder:
    """The encoder that `prepare.encoder` names. Raises ValueError where it cannot be had."""
    try:
        return load(params.encoder, device, params.prepare.encoder, params.prepare.precision)
    except OSError as error:
        said = str(error).strip().splitlines()
        raise ValueError(
            f"prepare.encoder: {params.prepare.encoder} is neither a folder here nor a model of the Hub that can be loaded now "
            f"({said[0] if said else type(error).__name__}). Without a network, name a folder that holds a CLIP model in Hugging "
            "Face format; data/demo/encoder, made for the demo's pictures, shows on any dataset that the pipeline runs"
        ) from error


def ensure_embeddings(folder: Path, params, dataset: Dataset, encoder: Encoder) -> dict:
    """Make `folder` the embeddings of every frame, unless it is that already. Returns the index.

    A stopped run goes on with the episode it was at, and a grown dataset costs its new episodes. Several processes
    (`sarm_lib.launch`) encode an episode each in turn; what they find does not depend on how many they are. Raises
    DatasetError for a camera that does not exist.
    """
    settings = params.prepare
    cameras = list(dict.fromkeys([*dataset.image_keys, *settings.image_keys]))
    for key in cameras:
        if key not in dataset.camera_keys:
            raise DatasetError(
                f"prepare.image_keys: no camera {key!r}; the dataset has {', '.join(dataset.camera_keys)}"
            )
    encoding = {
        "encoder": encoder.name,
        "encoder_identity": encoder.identity,
        "precision": encoder.precision,
        "dtype": settings.store_dtype,
        "code": code_digest("encoder"),
    }
    made_from = encoding | {
        "fingerprint": dataset.fingerprint,
        "cameras": cameras,
        "episodes": [[episode.index, episode.length] for episode in dataset.episodes],
        "tasks": dataset.tasks,
    }
    if is_current(folder, made_from):
        return read_json(folder / INDEX)
    processes = share(encoder.device)
    work, known = params.paths.write(f"work/embeddings-{digest(encoding)}"), _known_episodes(folder, encoding)
    content = {key: [dataset.content(episode, key) for episode in dataset.episodes] for key in cameras}
    pairs = ((shown, (key, e)) for key in cameras for e, shown in zip(dataset.episodes, content[key], strict=True))
    todo = [(shown, *where) for shown, where in dict(pairs).items() if shown not in known]  # what is shown twice, once
    _encode(dataset, todo[processes.process_index :: processes.num_processes], encoder, work, settings)
    processes.wait_for_everyone()
    if processes.is_main_process:
        with staged(folder) as partial:
            partial.mkdir()
            for key in cameras:
                shape = (dataset.num_frames, encoder.width)
                store = np.lib.format.open_memmap(partial / f"{key}.npy", "w+", settings.store_dtype, shape)
                for episode, shown in zip(dataset.episodes, content[key], strict=True):
                    store[episode.rows] = known[shown] if shown in known else np.load(work / f"{shown}.npy")
                store.flush()
            np.save(partial / "tasks.npy", encoder.texts(dataset.tasks).numpy())
            sizes = {"width": encoder.width, "frames": dataset.num_frames}
            write_json(partial / INDEX, made_from | sizes | {"content": content})
            write_json(partial / PROVENANCE, made_from)
        remove(work)
    processes.wait_for_everyone()
    return read_json(folder / INDEX)


def open_embeddings(folder: Path, dataset: Dataset) -> Embeddings:
    """Open the embeddings of `dataset`. Raises ValueError when they are another dataset's."""
    index = read_json(folder / INDEX)
    if index["fingerprint"] != dataset.fingerprint:
        raise ValueError(
            f"{folder} holds the embeddings of another dataset (or of an older state of it): run 00_prepare again "
            "(dvc repro -f 00_prepare)"
        )
    if index["episodes"] != [[episode.index, episode.length] for episode in dataset.episodes]:
        raise ValueError(f"{folder} holds other episodes than base.episodes selects: run 00_prepare again")
    cameras = {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in index["cameras"]}
    return Embeddings(
        cameras, np.load(folder / "tasks.npy"), index["encoder"], index["encoder_identity"], index["fingerprint"]
    )


def similarity_by_distance(embeddings: Embeddings, dataset: Dataset, distances: list[int]) -> dict[int, float]:
    """Mean cosine similarity of two frames of an episode that are so many frames apart, after removing the mean."""
    camera = embeddings.cameras[dataset.image_keys[0]]
    longest = max(episode.length for episode in dataset.episodes)
    distances = [d for d in distances if d < longest]
    if not distances:
        return {}
    rows = np.concatenate(
        [np.arange(e.row, e.row + e.length - max(distances)) for e in dataset.episodes if e.length > max(distances)]
    )
    rows = rows[:: max(1, len(rows) // 2000)]
    centre = camera[rows].mean(0)

    def unit(at: np.ndarray) -> np.ndarray:
        vectors = camera[at] - centre
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return {d: float((unit(rows) * unit(rows + d)).sum(1).mean()) for d in distances}


def _known_episodes(folder: Path, encoding: dict) -> dict[str, np.ndarray]:
    """What an episode shows: its embeddings (T, E), of those that `folder` has from the same encoder."""
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    if any(index.get(key) != value for key, value in encoding.items()):
        return {}
    known = {}
    for key, contents in index["content"].items():
        store, row = np.load(folder / f"{key}.npy", mmap_mode="r"), 0
        for shown, (_, length) in zip(contents, index["episodes"], strict=True):
            known[shown] = store[row : row + length]
            row += length
    return known


def _encode(dataset: Dataset, todo: list[tuple[str, str, Episode]], encoder: Encoder, work: Path, settings) -> None:
    """Embeddings (T, E) of every episode and camera of `todo` into a file of `work` that is named after what it shows,
    unless a stopped run left it. Threads decode and resize ahead of the encoder, also from one episode to the next."""
    size, left = settings.encode_batch_size, [row for row in todo if not (work / f"{row[0]}.npy").exists()]
    resizing = 1 if encoder.device.type == "cpu" else RESIZING

    def batches() -> Iterator[tuple[tuple[str, str, Episode], np.ndarray | None]]:
        # Batches end with their episode, so that an embedding is the same to the bit whichever process makes it, and when.
        for row in left:
            images = (image for _, image in dataset.iterate_frames(row[1], (row[2],)))
            for batch in batched(images, size):
                yield row, np.stack(batch)
            yield row, None  # its end

    def resized(row: tuple[str, str, Episode], images: np.ndarray | None) -> tuple:
        return *row, None if images is None else encoder.pixels(images)

    frames, found = sum(episode.length for *_, episode in todo), []
    before = frames - sum(episode.length for *_, episode in left)
    progress = bar(total=frames, initial=before, desc="encoding", unit="frame")
    with progress as encoded, ThreadPoolExecutor(resizing) as pool:
        for shown, key, episode, pixels in in_order(pool, resized, ahead(batches(), 2), resizing):
            if pixels is not None:
                found.append(encoder.embed(pixels))
                encoded.update(len(pixels))
            elif (given := sum(map(len, found))) != episode.length:
                raise DatasetError(f"episode {episode.index}, {key}: {given} embeddings of {episode.length} frames")
            else:
                with staged(work / f"{shown}.npy") as partial, partial.open("wb") as file:
                    np.save(file, torch.cat(found).cpu().numpy().astype(settings.store_dtype))
                found = []


def ahead[T](items: Iterator[T], count: int) -> Iterator[T]:
    """`items`, of which a thread fetches up to `count` before they are asked for. What it raises is raised here."""
    ready: queue.Queue = queue.Queue(count)
    stopped, done = threading.Event(), object()

    def hand_over(item, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                return ready.put((item, error), timeout=0.1)

    def fetch() -> None:
        try:
            for item in items:
                hand_over(item)
                if stopped.is_set():
                    return
            hand_over(done)
        except BaseException as error:
            hand_over(done, error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def in_order[T](pool: Executor, function: Callable[..., T], items: Iterator[tuple], count: int) -> Iterator[T]:
    """What `function` makes of each of `items`, in their order; `pool` works on up to `count` of them meanwhile."""
    working: deque = deque()
    for item in items:
        working.append(pool.submit(function, *item))
        if len(working) > count:
            yield working.popleft().result()
    while working:
        yield working.popleft().result()


def _pooled(output) -> Tensor:
    """transformers 5 returns an output object where version 4 returned the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output
