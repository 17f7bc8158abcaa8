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

from benchmarks.speed import SHARES, STAGES, make_encoder, processor
from sarm_lib import encoder, kernels, training
from sarm_lib.dataset import pick_device
from sarm_lib.model import Sarm, SarmSpec
from sarm_lib.windows import Windows, WindowSpec

RESULTS = Path(__file__).with_suffix(".json")
HEADS, BATCH, LAPS = ("sparse", "dense"), 32, 5


def windows(batch: int, length: int, device: str) -> Windows:
    made = torch.randn(batch, 1, length, 512), torch.randn(batch, 512), torch.randn(batch, length, 32)
    return Windows(*made, torch.full((batch,), length)).to(torch.device(device))


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
        shown = windows(BATCH, 9, device)
        sarm.eval()
        found["score"] = compared(lambda: sarm.predict(shown, HEADS, 4)["dense"].tau, device)
    shown, sarm = windows(8, 13, device), sarm.train()
    stage = {head: torch.randint(0, len(names), (8, 13), device=device) for head, names in STAGES.items()}
    tau = {head: torch.rand(8, 13, device=device) for head in STAGES}
    known = {head: torch.ones(8, 13, dtype=torch.bool, device=device) for head in STAGES}
    given = torch.ones(8, dtype=torch.bool, device=device)
    batch = training.Batch(shown, stage, tau, known, given, None, 8 * 13.0)
    loss = training.SarmLoss(sarm)

    def step() -> torch.Tensor:
        sarm.zero_grad()
        total = loss(batch)["loss"]
        total.backward()
        return total.detach()

    found["train"] = compared(step, device)
    where = torch.cuda.get_device_name() if device == "cuda" else processor()
    made = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(made | {where: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
