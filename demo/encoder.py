"""Train the demo's image-text encoder: CLIP's form and file format, a hundredth of its size.

    python -m demo.encoder data/demo/encoder

No pretrained CLIP can be shipped with the repository, so this one is trained contrastively on frames recorded apart from
the dataset (other seeds), with sentences about the simulator's state. It is to the demo what `openai/clip-vit-base-patch32`
is to a user's data: both load through `sarm_lib.encoder.load`.
"""

import argparse
import copy
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from demo.captions import TASKS, caption
from demo.demonstrations import KINDS, demonstrate
from demo.simulator import IMAGE_SIZE, AssemblySimulator, RenderingError
from sarm_lib.artifacts import staged

FIRST_SEED = 9000
EPISODES = 64
STEPS, BATCH, LEARNING_RATE = 500, 96, 1e-3
TEXT_STEPS, TEXT_LEARNING_RATE = 300, 3e-4
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

log = logging.getLogger(__name__)


def record_frames() -> tuple[np.ndarray, list[str]]:
    """Images (N, 2, 128, 128, 3) uint8 of both cameras and their N captions."""
    sim, images, captions = AssemblySimulator(), [], []
    for i in tqdm(range(EPISODES), desc="recording frames"):
        frames: list[np.ndarray] = []
        demonstration = demonstrate(
            sim,
            KINDS[i % len(KINDS)],
            FIRST_SEED + i,
            on_frame=lambda kept=frames: kept.append(np.stack(list(sim.render().values()))),
        )
        images += frames
        captions += [caption(scene) for scene in demonstration.scenes]
    return np.stack(images), captions


def train_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-pair encoding in CLIP's form: lower case, end-of-word suffix, 256 bytes as base alphabet."""
    tokenizer = Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=alphabet,
        # Among them, letters that end a word have a place; the trainer itself takes them in the order of a hash table.
        special_tokens=[BOS, EOS, *(f"{letter}</w>" for letter in alphabet)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = map(Path, tokenizer.model.save(str(folder)))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    clip = CLIPTokenizer(vocab=str(vocab), merges=str(merges), model_max_length=77, **special)
    vocab.unlink(), merges.unlink()  # `save_pretrained` writes both into tokenizer.json
    return clip


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            **special,
        },
        vision_config={
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
        },
        projection_dim=512,
    )
    return CLIPModel(config)


def contrast(a: Tensor, b: Tensor, positives: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of (B, D) features; `positives` (B, B) marks pairs that mean the same.

    The batch mean is subtracted first: all frames show the same table, and the common part would drown the differences.
    """
    a, b = (F.normalize(x - x.mean(0), dim=-1) for x in (a, b))
    logits, target = scale.exp() * a @ b.T, positives / positives.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))) / 2


def train(images: np.ndarray, captions: list[str], tokenizer: CLIPTokenizer, model: CLIPModel) -> CLIPModel:
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    unique = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    ids = np.array([unique[text] for text in captions])

    progress = tqdm(range(STEPS), desc="training the encoder", mininterval=10)
    for _ in progress:
        rows, cameras = rng.choice(len(images), BATCH, replace=False), rng.integers(0, 2, BATCH)
        pixels = torch.from_numpy(images[rows, cameras]).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels * float(rng.uniform(0.85, 1.15))).clamp(0, 1)
        same = torch.from_numpy((ids[rows][:, None] == ids[rows][None]).astype(np.float32))
        frames = model.get_image_features((pixels - mean) / std).pooler_output
        said = text_features(model, tokenizer, [captions[r] for r in rows])
        loss = contrast(frames, said, same, model.logit_scale)
        pair = [rng.choice(len(task), 2, replace=False) for task in TASKS]
        one, two = (
            text_features(model, tokenizer, [task[p[i]] for task, p in zip(TASKS, pair, strict=True)]) for i in (0, 1)
        )
        loss = loss + 0.2 * contrast(one, two, torch.eye(len(TASKS)), model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def align_paraphrases(captions: list[str], tokenizer: CLIPTokenizer, model: CLIPModel) -> CLIPModel:
    """Train the text tower on, alone: every wording of a task gets the mean embedding of its wordings, captions keep theirs.

    The loss of `train` pulls wordings together only as far as they have to be told from other tasks.
    """
    rng, before = np.random.default_rng(1), copy.deepcopy(model).requires_grad_(False)
    means = torch.stack([text_features(before, tokenizer, list(task)).mean(0) for task in TASKS])
    spread = (means - means.mean(0)).square().sum(1).mean()
    parameters = [*model.text_model.parameters(), *model.text_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TEXT_LEARNING_RATE, weight_decay=0.0)
    for _ in tqdm(range(TEXT_STEPS), desc="aligning paraphrases", mininterval=10):
        wordings = text_features(model, tokenizer, [str(rng.choice(task)) for task in TASKS])
        some = [captions[i] for i in rng.integers(0, len(captions), len(TASKS))]
        kept, moved = (text_features(tower, tokenizer, some) for tower in (before, model))
        loss = ((wordings - means).square().sum(1).mean() + (moved - kept).square().sum(1).mean()) / spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return model.get_text_features(**tokens).pooler_output


@torch.no_grad()
def retrieval_rank(images: np.ndarray, captions: list[str], tokenizer: CLIPTokenizer, model: CLIPModel) -> float:
    """Mean percentile of a frame's own caption among 200 others' (0.5 is chance, 1 perfect)."""
    rows = np.linspace(0, len(images) - 1, 200).astype(int)
    pixels = torch.from_numpy(images[rows, 0]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    frames = model.get_image_features((pixels - mean) / std).pooler_output
    texts = text_features(model, tokenizer, [captions[r] for r in rows])
    frames, texts = (F.normalize(x - x.mean(0), dim=-1) for x in (frames, texts))
    similarity = frames @ texts.T
    return float((similarity.diagonal()[:, None] >= similarity).float().mean())


def main(folder: Path) -> None:
    with staged(folder) as partial:
        partial.mkdir()
        make(partial)


def make(folder: Path) -> None:
    """Train tokenizer and model, and leave them in `folder`."""
    torch.manual_seed(0)
    images, captions = record_frames()
    held_out = len(images) * 9 // 10
    tokenizer = train_tokenizer([*captions, *(text for task in TASKS for text in task)], folder)
    model = train(images[:held_out], captions[:held_out], tokenizer, make_model(tokenizer))
    model = align_paraphrases(captions[:held_out], tokenizer, model)
    log.info(
        "mean percentile of the own caption, held-out frames: %.3f",
        retrieval_rank(images[held_out:], captions[held_out:], tokenizer, model),
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=MEAN,
        image_std=STD,
    )
    model.half().save_pretrained(folder)  # half precision on disk: a few MB in git; it is loaded in float32
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    try:
        main(parser.parse_args().folder)
    except RenderingError as error:
        sys.exit(str(error))
