"""SARM is LeRobot's: same forward pass, same checkpoint, same progress; what LeRobot cannot express it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sarm_lib import kernels, model
from sarm_lib.artifacts import checkpoint_digest, file_digest
from sarm_lib.checkpoint import RewardModel, expressible, load_reward_model, save_reward_model
from sarm_lib.model import Sarm, SarmSpec
from sarm_lib.stages import progress
from sarm_lib.windows import Windows, WindowSpec, pad_state
from tests.conftest import ROOT

DUAL = {"sparse": ["pick", "place"], "dense": ["reach", "grasp", "lift", "carry", "lower"]}
SHARES = {"sparse": [0.4, 0.6], "dense": [0.1, 0.2, 0.3, 0.15, 0.25]}


def spec(mode: str = "dual", kind: str = "centred", cameras: int = 1, width: int = 512) -> SarmSpec:
    heads = {"single_stage": {"sparse": ["task"]}, "dense_only": {**DUAL, "sparse": ["task"]}, "dual": DUAL}[mode]
    shares = {head: SHARES[head] if len(names) > 1 else [1.0] for head, names in heads.items()}
    return SarmSpec(
        WindowSpec(kind, 8, 4, 4),
        heads,
        shares,
        mode,
        cameras,
        width,
        width,
        32,
        hidden_dim=24,
        num_heads=2,
        num_layers=2,
    )


def reward_model(a_spec: SarmSpec) -> RewardModel:
    torch.manual_seed(0)
    sarm = Sarm(a_spec).eval()
    for parameter in sarm.parameters():  # zero-initialised parameters would hide a wrong place
        torch.nn.init.normal_(parameter, std=0.2)
    keys = tuple(f"observation.images.{i}" for i in range(a_spec.num_cameras))
    return RewardModel(sarm, keys, "observation.state", np.zeros(3), np.ones(3), "clip", "abc", "def")


def windows(a_spec: SarmSpec, lengths: list[int]) -> Windows:
    torch.manual_seed(1)
    batch, length = len(lengths), a_spec.window.padded_length
    images = torch.randn(batch, a_spec.num_cameras, length, a_spec.image_dim)
    state = torch.randn(batch, length, a_spec.max_state_dim)
    return Windows(images, torch.randn(batch, a_spec.text_dim), state, torch.tensor(lengths))


@pytest.mark.parametrize("mode", ["single_stage", "dense_only", "dual"])
def test_lerobot_loads_our_checkpoint_strictly_and_computes_the_same_progress(tmp_path, mode):
    from lerobot.rewards.sarm.modeling_sarm import SARMRewardModel

    ours = reward_model(spec(mode))
    save_reward_model(ours, tmp_path / "sarm", {"made": "here"}, [])
    theirs = SARMRewardModel.from_pretrained(tmp_path / "sarm", strict=True)
    batch = windows(ours.spec, [9, 9, 9])
    batch = Windows(batch.images[:, :, :9], batch.text, batch.state[:, :9], batch.lengths)
    for head in ours.spec.heads:
        with torch.no_grad():
            found = ours.sarm.predict(batch, [head])[head]
        rewards, probabilities = theirs.calculate_rewards(
            batch.text,
            batch.images[:, 0],
            batch.state,
            batch.lengths,
            return_all_frames=True,
            return_stages=True,
            head_mode=head,
        )
        np.testing.assert_allclose(found.probabilities.numpy(), probabilities, atol=1e-6)
        phi = progress(found.stage.numpy(), found.tau.numpy(), np.array(ours.spec.proportions[head]))
        np.testing.assert_allclose(phi, rewards, atol=1e-6)


def test_our_own_loading_restores_everything(tmp_path):
    ours = reward_model(spec("dual", "past", cameras=2, width=64))
    save_reward_model(ours, tmp_path / "sarm", {}, [{"step": 1}])
    loaded = load_reward_model(tmp_path / "sarm")
    assert loaded.spec == ours.spec and loaded.image_keys == ours.image_keys and loaded.fingerprint == "def"
    for key, value in ours.sarm.state_dict().items():
        assert torch.equal(value, loaded.sarm.state_dict()[key])


@pytest.mark.parametrize("options", [{"kind": "past"}, {"cameras": 2}, {"width": 64}])
def test_lerobot_refuses_what_it_cannot_express(tmp_path, options):
    from lerobot.rewards.sarm.modeling_sarm import SARMRewardModel

    ours = reward_model(spec(**options))
    assert not expressible(ours.spec)
    save_reward_model(ours, tmp_path / "sarm", {}, [])
    with pytest.raises(Exception, match="sarm_lib"):
        SARMRewardModel.from_pretrained(tmp_path / "sarm", strict=True)


def test_padded_positions_are_seen_by_nobody():
    ours = reward_model(spec())
    batch = windows(ours.spec, [9, 11])
    padded = batch._replace(images=torch.where(batch.valid[:, None, :, None], batch.images, 99.0))
    with torch.no_grad():
        one, two = (ours.sarm.stage_logits(w, ["dense"])["dense"] for w in (batch, padded))
    torch.testing.assert_close(one[batch.valid], two[batch.valid])


def plain(model, windows, last=()):
    """PyTorch's own transformer over every token, padded ones too: what `StreamTransformer.features` must equal."""
    x = model.embed(windows, last)
    batch, streams, length, width = x.shape
    causal = torch.ones(streams * length, streams * length, dtype=torch.bool).triu(1)
    padded = ~windows.valid[:, None].expand(batch, streams, length).flatten(1)
    h = model.transformer(x.flatten(1, 2), mask=causal, src_key_padding_mask=padded)
    return model.fusion_backbone(h.view(batch, streams, length, width).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("options", [{}, {"kind": "past"}, {"cameras": 2}])
def test_what_is_not_computed_changes_nothing(options, gradients):
    """Padded positions, streams shared by two heads, and all that does not reach the position that is read."""
    ours = reward_model(spec(**options)).sarm.train()  # without dropout; `eval` has PyTorch skip work too
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in [*ours.stage_model.transformer.layers, *ours.subtask_model.transformer.layers]:
        layer.self_attn.dropout = 0.0
    with torch.set_grad_enabled(gradients):  # without, other matrix products are used
        for lengths in ([9, 13, 10], [9, 9], [13]):
            batch = windows(ours.spec, lengths)
            whole = plain(ours.stage_model, batch)
            (found,) = ours.stage_model.features(batch)
            torch.testing.assert_close(found[batch.valid], whole[batch.valid], atol=1e-6, rtol=1e-6)
            one_hot = [torch.nn.functional.one_hot(torch.randint(0, k, batch.state.shape[:2]), k) for k in (2, 5)]
            alone = [plain(ours.subtask_model, batch, [stages]) for stages in one_hot]
            for read in (slice(None), slice(5), slice(4, 5), slice(8, 9)):
                (found,) = ours.stage_model.features(batch, read=read)
                valid = batch.valid[:, read]
                torch.testing.assert_close(found[valid], whole[:, read][valid], atol=1e-6, rtol=1e-6)
                for found, expected in zip(ours.subtask_model.features(batch, one_hot, read), alone, strict=True):
                    torch.testing.assert_close(found[valid], expected[:, read][valid], atol=1e-6, rtol=1e-6)


def test_the_prediction_at_a_position_is_the_one_of_the_plain_forward():
    for mode in ("single_stage", "dense_only", "dual"):
        ours = reward_model(spec(mode))
        batch = windows(ours.spec, [9, 9, 9])
        batch = Windows(batch.images[:, :, :9], batch.text, batch.state[:, :9], batch.lengths)
        with torch.no_grad():
            every, one = (ours.sarm.predict(batch, ours.spec.heads, position) for position in (None, 4))
        for head in ours.spec.heads:
            for whole, found in zip(every[head], one[head], strict=True):
                torch.testing.assert_close(found[:, 0], whole[:, 4], atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_plain_forward():
    ours = reward_model(replace(spec(), dropout=0.0)).sarm.train()
    batch = windows(ours.spec, [9, 13, 10])
    weight = torch.randn(3, 13, 24) * batch.valid[..., None]
    found = []
    for features in (ours.stage_model.features(batch)[0], plain(ours.stage_model, batch)):
        ours.zero_grad()
        (features * weight).sum().backward()
        found.append([p.grad.clone() for p in ours.stage_model.parameters() if p.grad is not None])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_a_model_that_scored_can_be_trained_on_windows_of_the_same_length():
    """What both keep for the next time does not come from a mode in which nothing can be learned."""
    model._reached.cache_clear()
    ours = reward_model(spec()).sarm
    batch = windows(ours.spec, [9, 13])
    with torch.inference_mode():
        ours.predict(batch, ["sparse", "dense"])
    ours.predict(batch, ["sparse", "dense"])["dense"].tau.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in ours.subtask_model.transformer.parameters())


def test_a_single_stage_needs_no_stage_model():
    ours = reward_model(spec("single_stage"))
    batch = windows(ours.spec, [9, 9])
    ours.sarm.stage_model = None
    assert ours.sarm.predict(batch, ["sparse"])["sparse"].probabilities.eq(1).all()


def test_both_heads_in_one_pass_are_what_each_is_alone():
    """Streams before the stage are computed once, and the two stage streams do not see each other."""
    ours = reward_model(spec())
    batch = windows(ours.spec, [9, 13, 10])
    with torch.no_grad():
        together = ours.sarm.predict(batch, ["sparse", "dense"])
        alone = {head: ours.sarm.predict(batch, [head])[head] for head in together}
    for head, prediction in together.items():
        for one, two in zip(prediction, alone[head], strict=True):
            torch.testing.assert_close(one[batch.valid], two[batch.valid], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["single_stage", "dense_only", "dual"])
def test_a_checkpoint_of_lerobot_s_own_runs_here_with_its_own_statistics(tmp_path, mode):
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline
    from lerobot.rewards.sarm.configuration_sarm import SARMConfig
    from lerobot.rewards.sarm.modeling_sarm import SARMRewardModel

    names = {
        "num_sparse_stages": 2, "sparse_subtask_names": DUAL["sparse"], "sparse_temporal_proportions": SHARES["sparse"],
        "num_dense_stages": 5, "dense_subtask_names": DUAL["dense"], "dense_temporal_proportions": SHARES["dense"],
    }  # fmt: skip
    config = SARMConfig(
        annotation_mode=mode, hidden_dim=24, num_heads=2, num_layers=2, frame_gap=4, device="cpu", **names,
        image_key="observation.images.top", state_key="observation.state",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = SARMRewardModel(config).eval()
    theirs.save_pretrained(tmp_path)
    statistics = {"observation.state": {"mean": np.array([1.0, -2.0, 3.0]), "std": np.array([2.0, 0.5, 4.0])}}
    normalizer = NormalizerProcessorStep(
        features={"observation.state": PolicyFeature(type=FeatureType.STATE, shape=(3,))},
        norm_map={"STATE": NormalizationMode.MEAN_STD},
        stats=statistics,
    )
    PolicyProcessorPipeline(steps=[normalizer], name="policy_preprocessor").save_pretrained(tmp_path)

    ours = load_reward_model(tmp_path)
    assert ours.image_keys == ("observation.images.top",) and ours.encoder == "openai/clip-vit-base-patch32"
    states = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    expected = (states - statistics["observation.state"]["mean"]) / statistics["observation.state"]["std"]
    np.testing.assert_allclose(ours.normalise(states), expected, atol=1e-6)
    batch = windows(ours.spec, [9, 9])
    batch = Windows(batch.images[:, :, :9], batch.text, batch.state[:, :9], batch.lengths)
    with torch.no_grad():
        found = ours.sarm.predict(batch, ours.spec.heads)
    for head, prediction in found.items():
        rewards = theirs.calculate_rewards(
            batch.text, batch.images[:, 0], batch.state, batch.lengths, return_all_frames=True, head_mode=head
        )
        phi = progress(prediction.stage.numpy(), prediction.tau.numpy(), np.array(ours.spec.proportions[head]))
        np.testing.assert_allclose(phi, rewards, atol=1e-6)


def test_what_is_no_reward_model_is_refused_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a reward model"):
        load_reward_model(tmp_path)
    (tmp_path / "config.json").write_text('{"type": "act"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="'act', not a SARM"):
        load_reward_model(tmp_path)


def test_the_last_step_s_weights_are_a_checkpoint_too_and_the_digest_is_of_everything_that_counts(tmp_path):
    ours = reward_model(spec("dual", "past"))
    last = {key: value + 1 for key, value in ours.sarm.state_dict().items()}
    save_reward_model(ours, tmp_path / "sarm", {}, [{"step": 1, "loss": 0.5}], last)
    loaded = load_reward_model(tmp_path / "sarm/last").sarm.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in last.items())
    other = reward_model(replace(ours.spec, proportions={**SHARES, "dense": SHARES["dense"][::-1]}))
    save_reward_model(other, tmp_path / "other", {}, [])
    assert file_digest(tmp_path / "sarm/model.safetensors") == file_digest(tmp_path / "other/model.safetensors")
    assert checkpoint_digest(tmp_path / "sarm") != checkpoint_digest(tmp_path / "other")


def test_on_the_demo_targets_and_progress_are_lerobot_s(tmp_path):
    """The demo's own marks, frames, encoder and window; the weights are random, as LeRobot's would be."""
    from lerobot.rewards.sarm.modeling_sarm import SARMRewardModel
    from lerobot.rewards.sarm.sarm_utils import compute_absolute_indices, find_stage_and_tau

    from sarm_lib import annotations, corrections, encoder, params
    from sarm_lib.dataset import from_params
    from sarm_lib.stages import targets

    config = params.load(ROOT / "params.yaml")
    demos, names = from_params(config), annotations.vocabulary(config)
    for mark in corrections.marks_from_params(config, demos):
        for head, segments in ((head, mark.head(head)) for head in names):
            columns = [[getattr(s, part) for s in segments] for part in ("subtask", "start", "end")]
            theirs = [find_stage_and_tau(t, mark.length, *columns, names[head], {}) for t in range(mark.length)]
            stage, tau = targets(segments, names[head], mark.length)
            assert stage.tolist() == [k for k, _ in theirs]
            np.testing.assert_allclose(tau, [x for _, x in theirs], atol=1e-6)

    ours = reward_model(replace(spec(), stage_names=names))
    save_reward_model(ours, tmp_path / "sarm", {}, [])
    theirs = SARMRewardModel.from_pretrained(tmp_path / "sarm", strict=True)
    episode, clip = demos.episodes[0], encoder.from_params(config, "cpu")
    images = clip.images(demos.read_frames(episode, demos.image_keys[0], range(episode.length)))
    text, window = clip.texts(demos.tasks[:1]), ours.spec.window
    state = torch.from_numpy(demos.states[episode.rows])
    seen = [
        compute_absolute_indices(t, 0, episode.length, window.n_obs_steps, window.frame_gap)[0]
        for t in range(episode.length)
    ]
    np.testing.assert_array_equal(
        torch.stack(seen), window.observed(np.arange(episode.length), np.full(episode.length, episode.length))
    )
    rows = torch.stack(seen)
    batch = Windows(
        images[rows][:, None], text.expand(len(rows), -1), pad_state(state, 32)[rows], torch.full((len(rows),), 9)
    )
    with torch.no_grad():
        found = ours.sarm.predict(batch, list(names))
    for head, prediction in found.items():
        rewards = theirs.calculate_rewards(
            batch.text, images[rows], state[rows], frame_index=window.position, head_mode=head
        )
        phi = progress(prediction.stage.numpy(), prediction.tau.numpy(), np.array(ours.spec.proportions[head]))
        np.testing.assert_allclose(phi[:, window.position], rewards, atol=1e-6)


@torch.no_grad()
def test_packed_weights_are_kept_and_give_the_same_products():
    x, weight, bias = torch.randn(5, 96), torch.randn(64, 96), torch.randn(64)
    plain, kept = torch.nn.functional.linear(x, weight, bias), kernels.Packed(float32=True)
    for _ in range(2):
        with kernels.packed_once(kept):
            torch.testing.assert_close(kernels.linear(x, weight, bias), plain, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(kernels.linear(x, weight[32:], bias[32:]), plain[:, 32:], atol=1e-5, rtol=1e-5)
    assert len(kept._kept) in (0, 2)  # none where the processor's products are not oneDNN's


@torch.no_grad()
def test_weights_that_are_packed_once_give_what_autocast_gives():
    sarm = reward_model(spec()).sarm
    batch = windows(sarm.spec, [13, 9, 11])

    def predicted() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([p.tau.float() for p in sarm.predict(batch, ["sparse", "dense"]).values()], dim=1)

    whole = predicted()
    with kernels.packed_once():
        once = predicted()
        assert torch.equal(once, predicted())  # by the weights that were kept
    torch.testing.assert_close(once, whole, atol=4e-3, rtol=0)  # half a step of bfloat16 below 1
    sarm.subtask_model.transformer.layers[0].linear1.bias += 1  # nothing is kept beyond the block
    assert not torch.equal(predicted(), whole)


@pytest.mark.parametrize("activation", ["none", "relu", "swish"])
def test_a_product_with_its_activation_is_pytorch_s(activation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 7, 24), torch.randn(16, 24), torch.randn(16)
    then = {"none": lambda y: y, "relu": torch.relu, "swish": torch.nn.functional.silu}[activation]
    whole = then(torch.nn.functional.linear(x, weight, bias))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(kernels.linear(x, weight, bias, activation), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_is_added_as_pytorch_does(dtype):
    x, weight, bias, residual = (torch.randn(shape, dtype=dtype) for shape in ((5, 24), (16, 24), (16,), (5, 16)))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = kernels.linear(x, weight, bias, residual=residual)
            whole = residual + kernels.linear(x, weight, bias)
            torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6)  # other processors may sum in another order
