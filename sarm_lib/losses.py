"""What a policy is trained on: the loss of every sample, and their weighted mean (Eq 7).

    L_RABC = Σ_i w_i ℓ_i / (Σ_i w_i + ε)                                                       Eq 7

ℓ_i is the policy's own loss, over the actions that exist: LeRobot's π0 and π0.5 also average over the actions padded beyond
the end of an episode. π0 and π0.5 may try several noises on one encoded observation: images and text cost most of a step,
and the action expert little.
"""

import inspect
from typing import Any

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.pi0.modeling_pi0 import PI0Policy, PI0Pytorch
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn
from transformers import DynamicCache

SEVERAL_DRAWS = (PI0Policy, PI05Policy)
TAKES_NOISE = (*SEVERAL_DRAWS, SmolVLAPolicy)  # those whose noise a step draws itself, whoever shares it


def gives_sample_losses(policy_class: type[PreTrainedPolicy]) -> bool:
    """Whether the losses of single samples can be weighted: not in ACT and Diffusion, which give their mean alone."""
    return "reduction" in inspect.signature(policy_class.forward).parameters


def per_sample_loss(
    policy: PreTrainedPolicy,
    batch: dict[str, Any],
    draws: int = 1,
    noise: Tensor | None = None,
    time: Tensor | None = None,
) -> Tensor:
    """ℓ_i (B,): for π0 and π0.5 the flow-matching loss over the actions that exist, for others their own per-sample loss.

    draws: noises and times tried on each sample, of π0 and π0.5 alone. noise (B, draws, chunk, A) and time (B, draws): given
    by somebody who wants the same ones elsewhere, of π0, π0.5 and (one draw) SmolVLA.
    """
    if not isinstance(policy, SEVERAL_DRAWS):
        given = {} if noise is None else {"noise": noise[:, 0], "time": time[:, 0]}
        return policy.forward(batch, reduction="none", **given)[0]
    images, masks = policy._preprocess_images(batch)
    actions = policy.prepare_action(batch)
    if noise is None:
        noise, time = sample_noise(policy, len(actions), draws, actions.device)
    text = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
    state = (policy.prepare_state(batch),) if isinstance(policy, PI0Policy) else ()  # π0.5 reads it as text
    losses = flow_losses(policy.model, images, masks, *text, state, actions, noise, time)
    losses = losses[..., : policy.config.output_features[ACTION].shape[0]].mean(-1)  # (B, draws, chunk)
    exists = ~batch["action_is_pad"][:, None]
    return ((losses * exists).sum(2) / exists.sum(2)).mean(1)


def sample_noise(policy: PreTrainedPolicy, samples: int, draws: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise (samples, draws, chunk, A) and times (samples, draws), as π0 draws them."""
    chunk, width = policy.config.chunk_size, policy.config.max_action_dim
    noise = policy.model.sample_noise((samples * draws, chunk, width), device)
    time = policy.model.sample_time(samples * draws, device)
    return noise.view(samples, draws, chunk, width), time.view(samples, draws)


def flow_losses(
    model: PI0Pytorch | PI05Pytorch,
    images: list[Tensor],
    image_masks: list[Tensor],
    tokens: Tensor,
    token_mask: Tensor,
    state: tuple[Tensor, ...],
    actions: Tensor,
    noise: Tensor,
    time: Tensor,
) -> Tensor:
    """Squared errors of the velocity, (B, draws, chunk, A): noise (B, draws, chunk, A), time (B, draws).

    One draw is LeRobot's own forward pass. Several share what is computed of images and text, as the steps of denoising
    do: the expert of every draw attends to the keys and values of the same prefix.
    """
    draws = time.shape[1]
    if draws == 1:
        found = model.forward(images, image_masks, tokens, token_mask, *state, actions, noise[:, 0], time[:, 0])
        return found[:, None]
    if model.gradient_checkpointing_enabled:
        raise ValueError("policy.noise_draws: gradient checkpointing keeps no prefix to share; use one draw")
    at = time[..., None, None]
    noisy, velocity = at * noise + (1 - at) * actions[:, None], noise - actions[:, None]
    pair = model.paligemma_with_expert
    dtype = pair.paligemma.model.language_model.layers[0].self_attn.q_proj.weight.dtype

    prefix, prefix_pad, prefix_kind = model.embed_prefix(images, image_masks, tokens, token_mask)
    _, cache = pair.forward(
        attention_mask=prepare_attention_masks_4d(make_att_2d_masks(prefix_pad, prefix_kind)),
        position_ids=prefix_pad.cumsum(1) - 1,
        inputs_embeds=[prefix.to(dtype), None],
        use_cache=True,
    )
    repeat = lambda x: x.repeat_interleave(draws, 0)  # noqa: E731
    cache = DynamicCache(tuple((repeat(keys), repeat(values), window) for keys, values, window in cache))

    suffix, pad, kind, condition = model.embed_suffix(*map(repeat, state), noisy.flatten(0, 1), time.flatten())
    before = repeat(prefix_pad)[:, None].expand(-1, suffix.shape[1], -1)
    (_, out), _ = pair.forward(
        attention_mask=prepare_attention_masks_4d(torch.cat([before, make_att_2d_masks(pad, kind)], dim=2)),
        position_ids=repeat(prefix_pad.sum(1, keepdim=True)) + pad.cumsum(1) - 1,
        past_key_values=cache,
        inputs_embeds=[None, suffix.to(dtype)],
        use_cache=False,
        adarms_cond=[None, condition],
    )
    out = model.action_out_proj(out[:, -noise.shape[2] :].float())
    return (velocity - out.view_as(velocity)) ** 2


class WeightedLoss(nn.Module):
    """Eq 7. A module of its own, so that `accelerate` averages its gradients over processes.

    `total` is Σ w over everything that a step learns from: other processes and other parts of an accumulated batch too, so
    that the mean of theirs is Eq 7 of them all. Without weights it is the plain mean.
    """

    def __init__(self, policy: PreTrainedPolicy, epsilon: float, draws: int = 1) -> None:
        super().__init__()
        self.policy, self.epsilon, self.draws = policy, epsilon, draws

    def forward(
        self,
        batch: dict[str, Any],
        weight: Tensor | None = None,
        total: float | None = None,
        parts: int = 1,
        noise: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """weight (B,). total: Σ w over `parts` batches, of which this is one. Without sample losses and weights, the
        policy's own mean."""
        if weight is None and not gives_sample_losses(type(self.policy)):
            return self.policy.forward(batch)[0]
        losses = per_sample_loss(self.policy, batch, self.draws, noise, time)
        if weight is None:
            return losses.mean()
        return parts * (weight * losses).sum() / ((weight.sum() if total is None else total) + self.epsilon)
