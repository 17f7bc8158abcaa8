"""The frozen image-text encoder (CLIP) and the embeddings it leaves behind: each frame of each camera encoded once.

`embeddings/` holds one memory-mapped array a camera, (N, E) float32, one for the task texts, and `index.json`, which
names the dataset and the encoder. After stage 00 nothing decodes a video to score or train a reward model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sarm_lib.artifacts import code_digest, digest, file_digest, is_current, read_json, staged, write_json
from sarm_lib.dataset import Dataset, DatasetError, fingerprint

INDEX = "index.json"


class Encoder:
    """CLIP's two towers, frozen, in float32."""

    def __init__(self, path: str, device: str, name: str) -> None:
        from transformers import AutoTokenizer, CLIPModel  # seconds to load, and only stages that encode need them
        from transformers.models.clip import CLIPImageProcessor

        self.path, self.name, self.device = path, name, torch.device(device)
        self.model = CLIPModel.from_pretrained(path, dtype=torch.float32).to(self.device).eval().requires_grad_(False)
        self.processor = CLIPImageProcessor.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @property
    def width(self) -> int:
        """Length E of an embedding (512 for ViT-B/32)."""
        return self.model.config.projection_dim

    @property
    def identity(self) -> str:
        """A name for weights, preprocessing and tokenizer, whatever folder they lie in."""
        return identity(self.path) or digest(self.path, self.model.config._commit_hash)

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> Tensor:
        """Embed (B, H, W, 3) uint8 images: (B, E) float32 on the CPU."""
        pixels = self.processor(images=list(torch.from_numpy(images).permute(0, 3, 1, 2)), return_tensors="pt")
        return _pooled(self.model.get_image_features(**pixels.to(self.device))).cpu()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Embed n texts: (n, E) float32 on the CPU."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.model.get_text_features(**tokens)).cpu()


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
        return torch.from_numpy(np.stack([self.cameras[key][rows] for key in image_keys], axis=1))


def load(path: str, device: str = "cpu", name: str | None = None) -> Encoder:
    """A CLIP encoder from a local folder or the Hub; `name` is what artifacts call it. Raises OSError with what was
    looked for."""
    return Encoder(path, device, name or path)


def identity(path: str) -> str | None:
    """Names the files of a local encoder; None for one of the Hub."""
    files = sorted(p for p in Path(path).glob("*") if p.is_file() and not p.name.startswith("."))
    return digest(*((p.name, file_digest(p)) for p in files)) if files else None


def from_params(params, device: str) -> Encoder:
    """The encoder that `prepare.encoder` names."""
    return load(params.encoder, device, params.prepare.encoder)


def encode_dataset(
    dataset: Dataset, encoder: Encoder, folder: Path, batch_size: int, image_keys: Sequence[str] = ()
) -> dict:
    """Encode every frame of `dataset` into `folder`, unless it holds exactly that already. Returns the index.

    image_keys: cameras beside those that the reward model sees. Raises DatasetError for one that does not exist.
    """
    cameras = list(dict.fromkeys([*dataset.image_keys, *image_keys]))
    for key in cameras:
        if key not in dataset.camera_keys:
            raise DatasetError(
                f"prepare.image_keys: no camera {key!r}; the dataset has {', '.join(dataset.camera_keys)}"
            )
    made_from = {
        "fingerprint": fingerprint(dataset.root),
        "encoder": encoder.name,
        "encoder_identity": encoder.identity,
        "cameras": cameras,
        "episodes": [[episode.index, episode.length] for episode in dataset.episodes],
        "tasks": dataset.tasks,
        "code": code_digest("encoder"),
    }
    if is_current(folder, made_from):
        return read_json(folder / INDEX)
    index = {"width": encoder.width, "frames": dataset.num_frames, **made_from}
    with staged(folder) as partial:
        partial.mkdir()
        for key in cameras:
            store = np.lib.format.open_memmap(
                partial / f"{key}.npy", mode="w+", dtype=np.float32, shape=(dataset.num_frames, encoder.width)
            )
            _encode_camera(dataset, key, encoder, store, batch_size)
            store.flush()
        np.save(partial / "tasks.npy", encoder.texts(dataset.tasks).numpy())
        write_json(partial / INDEX, index)
        write_json(partial / "provenance.json", made_from)
    return index


def open_embeddings(folder: Path, dataset: Dataset) -> Embeddings:
    """Open the embeddings of `dataset`. Raises ValueError when they are another dataset's."""
    index = read_json(folder / INDEX)
    if index["fingerprint"] != fingerprint(dataset.root):
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


def _encode_camera(dataset: Dataset, key: str, encoder: Encoder, store: np.ndarray, batch_size: int) -> None:
    progress, row = tqdm(total=dataset.num_frames, desc=key, unit="frame", mininterval=5), 0
    for batch in _batches((image for _, image in dataset.iterate_frames(key)), batch_size):
        store[row : row + len(batch)] = encoder.images(batch).numpy()
        row += len(batch)
        progress.update(len(batch))
    progress.close()


def _batches(images: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _pooled(output) -> Tensor:
    """transformers 5 returns an output object where version 4 returned the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output
