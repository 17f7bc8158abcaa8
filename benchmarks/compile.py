"""Does `torch.compile` pay? The encoder, scoring and a training step of SARM at full size, as they are and compiled.

    python -m benchmarks.compile [--device cuda]

Leaves the seconds of each, before and after, the seconds of compiling and the largest difference of the results in
benchmarks/compile.json, a row a device.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks.speed import SHARES, STAGES, make_encoder, processor, random_windows, training_batch
from sarm_lib import encoder, kernels, training
from sarm_lib.dataset import pick_device
from sarm_lib.model import Sarm, SarmSpec
from sarm_lib.windows import WindowSpec

RESULTS = Path(__file__).with_suffix(".json")
HEADS, BATCH, LAPS = ("sparse", "dense"), 32, 5


def seconds(work: Callable, device: str) -> float:
    """The median of several laps."""
    laps = []
    for _ in range(LAPS):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        laps.append(time.perf_counter() - start)
    return statistics.median(laps)


def compared(plain: Callable, device: str) -> dict[str, float]:
    """A function of no arguments that gives a tensor, as it is and compiled. What is compiled calls PyTorch's own products:
    the compiler makes of them what it likes."""
    expected, before = plain(), seconds(plain, device)
    with mock.patch.object(kernels, "_has_onednn", lambda: False):
        compiled, start = torch.compile(plain), time.perf_counter()
        difference = (compiled() - expected).abs().max()
        took, after = time.perf_counter() - start, seconds(compiled, device)
    ratio = {"as_is": before, "compiled": after, "ratio": before / after}
    return ratio | {"compiling": took, "max_abs_diff": float(difference)}


def training_step(sarm: Sarm, batch: training.Batch) -> Callable[[], torch.Tensor]:
    """A function that goes forward and back once, and gives the loss."""
    loss = training.SarmLoss(sarm.train())

    def step() -> torch.Tensor:
        sarm.zero_grad()
        total = loss(batch)["loss"]
        total.backward()
        return total.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    device = pick_device(parser.parse_args().device)
    torch.manual_seed(0)
    sarm = Sarm(SarmSpec(WindowSpec("centred", 8, 3, 4), STAGES, SHARES, "dual", dropout=0.0)).to(device)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        clip = encoder.load(str(make_encoder(Path(folder) / "clip")), device)
    pixels = torch.randn(BATCH, 3, 224, 224, device=device)
    with torch.inference_mode():
        found["encode"] = compared(lambda: clip.model.get_image_features(pixels).pooler_output, device)
        shown = random_windows(sarm.spec, BATCH, sarm.spec.window.length).to(torch.device(device))
        sarm.eval()
        found["score"] = compared(lambda: sarm.predict(shown, HEADS, 4)["dense"].tau, device)
    batch = training_batch(sarm.spec, 8).to(torch.device(device))
    found["train"] = compared(training_step(sarm, batch), device)
    where = torch.cuda.get_device_name() if device == "cuda" else processor()
    made = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(made | {where: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
