"""Embeddings: every frame once, whoever decodes it, and never again: after a stop, in a grown dataset, in another process."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sarm_lib import dataset as datasets
from sarm_lib import encoder, params
from tests.conftest import CAMERAS, LENGTHS, ROOT, grow_dataset, launch, make_dataset, make_project


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tiny dataset without its last two episodes."""
    return make_dataset(tmp_path_factory.mktemp("small") / "dataset", lengths=LENGTHS[:6])


@pytest.fixture
def fresh(tmp_path, small, tiny_encoder, monkeypatch):
    """A project with six episodes in which nothing has run yet."""
    folder = make_project(tmp_path / "p", small, tiny_encoder)
    monkeypatch.chdir(folder)
    return folder


def encode(overrides=None):
    """(index, embeddings) of the project in the current folder."""
    config = params.load("params.yaml", overrides)
    opened, folder = datasets.from_params(config), config.paths.write("embeddings")
    index = encoder.ensure_embeddings(folder, config, opened, encoder.from_params(config, "cpu"))
    return index, encoder.open_embeddings(folder, opened)


def count(monkeypatch, after=None):
    """Counts the frames that are encoded; stops like a killed run `after` so many."""
    seen, real = [], encoder.Encoder.embed

    def embed(self, pixels):
        seen.extend(pixels)
        if after is not None and len(seen) > after:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(encoder.Encoder, "embed", embed)
    return seen


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(fresh, monkeypatch):
    _, whole = encode()
    whole = {key: np.array(values) for key, values in whole.cameras.items()}
    shutil.rmtree("outputs")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        count(patched, after=60)
        encode()
    assert not (fresh / "outputs/embeddings").exists()
    seen = count(monkeypatch)
    _, found = encode()
    assert 0 < len(seen) < 2 * sum(LENGTHS[:6]) - 30
    for key, values in whole.items():
        np.testing.assert_array_equal(found.cameras[key], values)
    assert not list((fresh / "outputs").rglob("embeddings-*"))


def test_a_grown_dataset_costs_its_new_episodes(fresh, monkeypatch):
    _, before = encode()
    before = {key: np.array(values) for key, values in before.cameras.items()}
    grow_dataset(fresh / "data/tiny", LENGTHS[6:])
    seen = count(monkeypatch)
    _, after = encode()
    assert len(seen) == 2 * sum(LENGTHS[6:])
    for key, values in before.items():
        np.testing.assert_array_equal(after.cameras[key][: len(values)], values)
    shutil.rmtree("outputs")
    _, again = encode()
    for key in CAMERAS:
        np.testing.assert_array_equal(after.cameras[key], again.cameras[key])


def test_half_precision_halves_the_store_and_moves_embeddings_little(fresh):
    _, full = encode()
    full = {key: np.array(values) for key, values in full.cameras.items()}
    index, half = encode({"prepare.store_dtype": "float16"})
    assert index["dtype"] == "float16" and half.cameras[CAMERAS[0]].dtype == np.float16
    gathered = half.gather(np.arange(8).reshape(2, 4), CAMERAS[:1])
    assert gathered.shape == (2, 1, 4, 512) and str(gathered.dtype) == "torch.float32"
    for key, values in full.items():
        np.testing.assert_allclose(half.cameras[key], values, atol=2e-3, rtol=2e-3)


def test_bf16_encodes_nearly_the_same(fresh):
    _, full = encode()
    full = np.array(full.cameras[CAMERAS[0]])
    index, found = encode({"prepare.precision": "bf16"})
    assert index["precision"] == "bf16" and found.cameras[CAMERAS[0]].dtype == np.float32
    cosine = (full * found.cameras[CAMERAS[0]]).sum(1) / np.linalg.norm(full, axis=1)
    cosine /= np.linalg.norm(found.cameras[CAMERAS[0]], axis=1)
    assert cosine.min() > 0.995 and np.abs(full - found.cameras[CAMERAS[0]]).max() > 0


def test_two_processes_encode_and_score_what_one_does(project, tmp_path):
    made = []
    for processes in (1, 2):
        copy = shutil.copytree(project, tmp_path / str(processes), symlinks=True)
        for stage, left in (("encode", "outputs/embeddings"), ("score", "outputs/sarm_progress.parquet")):
            made_before = copy / left
            shutil.rmtree(made_before) if made_before.is_dir() else made_before.unlink()
            launch(copy, processes, stage)
            (scratch,) = [*(copy / "outputs/scratch").glob(f"*/{made_before.name}")] or [made_before]
            files = sorted(scratch.glob("*.npy")) if scratch.is_dir() else [scratch]
            made.append([path.read_bytes() for path in files])
            if scratch != made_before:
                scratch.rename(made_before)
    assert made[0] == made[2] and made[1] == made[3] and len(made[0]) == 3


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "size", [4, 7, 64]
)  # an episode has 14 frames: batches that end with it, before it, or never fill
@pytest.mark.parametrize("change", [-1, 1])
def test_an_episode_that_gives_too_few_or_too_many_pictures_is_named(monkeypatch, size, change):
    iterate = datasets.Dataset.iterate_frames

    def changed(self, key, episodes):
        frames = list(iterate(self, key, episodes))
        return iter(frames[:-1] if change < 0 else frames + frames[-1:])

    monkeypatch.setattr(datasets.Dataset, "iterate_frames", changed)
    with pytest.raises(datasets.DatasetError, match=f"episode 0, {CAMERAS[0]}: {14 + change} embeddings of 14 frames"):
        encode({"prepare.encode_batch_size": size})


def test_pictures_are_resized_on_the_cpu_whatever_device_encodes_them(tiny_encoder, monkeypatch):
    clip, images = encoder.load(str(tiny_encoder)), np.random.default_rng(0).integers(0, 256, (2, 48, 40, 3), np.uint8)
    at_once = clip.processor(images=torch.from_numpy(images).permute(0, 3, 1, 2), return_tensors="pt").pixel_values
    assert torch.equal(clip.pixels(images), at_once) and at_once.shape == (2, 3, 32, 32)
    devices, resize = [], type(clip.processor).resize
    noted = lambda self, image, *a, **k: (devices.append(image.device.type), resize(self, image, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(type(clip.processor), "resize", noted)
    monkeypatch.setattr(clip, "device", torch.device("meta"))  # from which nothing can be copied back
    assert clip.pixels(images).device.type == "meta" and devices == ["cpu"]


def test_a_gpu_s_convolutions_are_in_float32_while_it_encodes():
    assert torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), encoder.full_precision(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
        raise ZeroDivisionError
    with encoder.full_precision(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32


def test_the_whole_of_clip_gives_the_same_embeddings():
    """On the demo's encoder: faster products and a last layer for one token change nothing but rounding."""
    from transformers import CLIPModel

    path = ROOT / "data/demo/encoder"
    ours, whole = encoder.load(str(path)), CLIPModel.from_pretrained(path, dtype=torch.float32).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)
    pixels = ours.processor(images=list(images), return_tensors="pt")
    with torch.no_grad():
        expected = whole.get_image_features(**pixels)
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    torch.testing.assert_close(ours.images(images), expected, atol=1e-5, rtol=1e-5)


def test_both_decoders_give_the_same_pixels(tiny, monkeypatch):
    if not datasets.torchcodec():
        pytest.skip("torchcodec finds no FFmpeg libraries here")
    opened = datasets.open_dataset(tiny)
    found = []
    for available in (True, False):
        monkeypatch.setattr(datasets, "torchcodec", lambda available=available: available)
        found.append([image for _, image in opened.iterate_frames(CAMERAS[0])])
    np.testing.assert_array_equal(*map(np.stack, found))


@pytest.mark.parametrize("use_videos", [True, False])
def test_content_names_what_a_camera_shows(tmp_path, use_videos):
    root = make_dataset(tmp_path / "a", use_videos=use_videos, lengths=LENGTHS[:3])
    name = lambda: [opened.content(e, key) for key in CAMERAS for e in opened.episodes[:3]]  # noqa: E731
    opened = datasets.open_dataset(root)
    before = name()
    grow_dataset(root, LENGTHS[3:5])
    opened = datasets.open_dataset(root)
    assert len(opened.episodes) == 5 and name() == before and len(set(before)) == 6
    opened = datasets.open_dataset(make_dataset(tmp_path / "b", use_videos=use_videos, lengths=LENGTHS[:3], seed=1))
    assert not set(name()) & set(before)


def test_fetching_ahead_keeps_the_order_raises_what_was_raised_and_stops():
    assert list(encoder.ahead(iter(range(100)), 3)) == list(range(100))

    def broken():
        yield 1
        raise ValueError("frame 2")

    with pytest.raises(ValueError, match="frame 2"):
        list(encoder.ahead(broken(), 3))
    for length in (4, 1000):  # also where the last item waits for room
        before = threading.active_count()
        some = encoder.ahead(iter(range(length)), 3)
        assert next(some) == 0
        time.sleep(0.3)
        some.close()
        assert threading.active_count() == before


def test_frames_are_fetched_before_they_are_asked_for():
    fetched, enough = [], threading.Event()

    def counted():
        for i in range(10):
            fetched.append(i)
            if len(fetched) >= 4:
                enough.set()
            yield i

    frames = encoder.ahead(counted(), 3)
    assert next(frames) == 0
    assert enough.wait(timeout=60)  # nobody asks for the others
    assert list(frames) == list(range(1, 10))


def test_several_threads_keep_the_order_and_hold_no_more_than_asked():
    given, at_once = [], threading.Barrier(4, timeout=60)

    def counted():
        for i in range(40):
            given.append(i)
            yield (i,)

    def waits_for_others(i):  # passes only where four work at a time
        at_once.wait()
        if i == 30:
            raise ValueError(f"frame {i}")
        return i

    with ThreadPoolExecutor(4) as pool:
        found = encoder.in_order(pool, waits_for_others, counted(), 4)
        for i in range(30):
            assert next(found) == i and len(given) <= i + 5
        with pytest.raises(ValueError, match="frame 30"):
            next(found)
        at_once.abort()


@pytest.mark.usefixtures("fresh")
def test_threads_of_their_own_decode_and_resize(monkeypatch):
    threads, iterate, resize = set(), datasets.Dataset.iterate_frames, encoder.Encoder.pixels

    def noted(self, *arguments):
        for frame in iterate(self, *arguments):
            threads.add(threading.current_thread())
            yield frame

    def resized(self, images):
        threads.add(threading.current_thread())
        return resize(self, images)

    monkeypatch.setattr(datasets.Dataset, "iterate_frames", noted)
    monkeypatch.setattr(encoder.Encoder, "pixels", resized)
    encode()
    assert len(threads) == 2 and threading.main_thread() not in threads  # one of each on a processor


def test_a_process_takes_its_own_gpu(monkeypatch):
    from types import SimpleNamespace

    from sarm_lib import processes

    monkeypatch.setattr(processes, "share", lambda device: SimpleNamespace(device=torch.device("cuda:1")))
    assert processes.own_device("cuda") == "cuda:1" and processes.own_device("cpu") == "cpu"


def test_an_encoder_that_cannot_be_had_is_an_error_with_its_key_and_a_way_out(in_project):
    config, _ = in_project
    missing = config.model_copy(update={"prepare": config.prepare.model_copy(update={"encoder": "nobody/no-clip"})})
    with pytest.raises(ValueError, match=r"prepare.encoder: nobody/no-clip is neither .* data/demo/encoder"):
        encoder.from_params(missing, "cpu")
