"""What `make bench` runs, at sizes that take no time: a benchmark that no longer runs is seen here."""

import pytest
import torch

from benchmarks import compile as compiling
from benchmarks import speed
from sarm_lib.model import Sarm, SarmSpec
from sarm_lib.windows import WindowSpec
from tests.conftest import make_encoder

SMALL = {"hidden_dim": 16, "num_heads": 2, "num_layers": 1}


@pytest.fixture
def small_bench(tmp_path, monkeypatch):
    """The speed benchmark on a few frames, with a tiny encoder and a tiny SARM."""
    monkeypatch.setattr(speed, "SIZE", SMALL)
    monkeypatch.setattr(speed, "FRAMES", 6)
    make_encoder(tmp_path / "clip")
    return speed.Bench(tmp_path, "cpu")


def test_a_batch_has_the_loss_that_lerobot_computes(small_bench):
    assert small_bench.loss_difference("fp32") < 1e-6
    assert 0 < small_bench.loss_difference("bf16") < 0.1


def test_a_training_step_is_measured_as_it_is_and_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step: step)  # which takes a minute
    sarm = Sarm(SarmSpec(WindowSpec("centred", 8, 3, 4), speed.STAGES, speed.SHARES, "dual", dropout=0.0, **SMALL))
    batch = speed.training_batch(sarm.spec, 3)
    assert batch.windows.images.shape == (3, 1, 13, 512) and batch.timed == {"sparse": 39.0, "dense": 39.0}
    found = compiling.compared(compiling.training_step(sarm, batch), "cpu")
    assert found["max_abs_diff"] == 0 and found["as_is"] > 0
    for model in (sarm.stage_model, sarm.subtask_model):
        assert all(p.grad.abs().max() > 0 for p in model.heads.parameters())
