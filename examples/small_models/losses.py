"""What each model is trained on: a function from a step's number to its loss."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[int], Tensor]


def vae_loss(model: Any, pictures: npt.NDArray[np.uint8], batch: int, crop: int) -> Loss:
    """Errors of pixels, absolute and squared, and of edges, and a weak prior on latents.

    Parts of ``crop`` pixels make batches more varied. But a group norm sees all of a picture, so
    that the last steps should, too.
    """

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(pictures), (batch,), generator=generator).tolist()
        corners = torch.randint(pictures.shape[1] - crop + 1, (batch, 2), generator=generator)
        crops = [
            pictures[index, top : top + crop, left : left + crop]
            for index, (top, left) in zip(chosen, corners.tolist(), strict=True)
        ]
        pixels = to_pixels(np.stack(crops)).to(model.device)
        return vae_error(model, pixels, generator)

    return loss


def vae_error(model: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of a VAE on ``(N, 3, H, W)`` pixels.

    Clips ``(N, 3, F, H, W)`` have edges from frame to frame as well.
    """
    with autocast(model.device):
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(model.device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
    error = decoded.float() - pixels
    edges = [error.diff(dim=dim).abs().mean() for dim in range(2, error.ndim)]
    prior = posterior.kl().sum() / posterior.mean.numel()
    total: Tensor = error.abs().mean() + error.square().mean() + 0.5 * sum(edges) + 1e-3 * prior
    return total


def sdxl_loss(parts: Any, pipe: Any, latents: Tensor, tokens: list[Tensor], batch: int) -> Loss:
    """Prediction of the velocity or the noise, at even timesteps; one caption in ten is dropped.

    An error of the noise weighs as much as the error of the velocity that it makes, but at most 20
    times as much as itself: where nearly all is noise, a small error decides a picture's colours.
    """
    signal = pipe.scheduler.alphas_cumprod
    of_noise = pipe.scheduler.config.prediction_type == "epsilon"
    side = float(4 * latents.shape[-1])
    size = torch.tensor([[side, side, 0.0, 0.0, side, side]])

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        timestep = torch.randint(len(signal), (batch,), generator=generator)
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        a, b = (part.sqrt().view(-1, 1, 1, 1) for part in (signal[timestep], 1 - signal[timestep]))
        keep = torch.rand(batch, 1, generator=generator) >= 0.1
        ids, noisy, target, keep, timestep, size_ids = _moved(
            parts,
            tokens[0][chosen],
            a * clean + b * noise,
            noise if of_noise else a * noise - b * clean,
            keep,
            timestep,
            size,
        )
        with autocast(ids.device):
            states = [
                parts[name](ids, output_hidden_states=True)
                for name in ("text_encoder", "text_encoder_2")
            ]
            text = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
            predicted = parts["unet"](
                noisy,
                timestep,
                encoder_hidden_states=text * keep[..., None],
                added_cond_kwargs={
                    "text_embeds": states[1].text_embeds * keep,
                    "time_ids": size_ids.expand(batch, -1),
                },
            ).sample
        if not of_noise:
            return F.mse_loss(predicted.float(), target)
        weight = (1 / signal[timestep.cpu()]).clamp(max=20).to(target).view(-1, 1, 1, 1)
        weighted: Tensor = weight * (predicted.float() - target).square()
        return weighted.mean()

    return loss


def flux_loss(parts: Any, pipe: Any, latents: Tensor, tokens: list[Tensor], batch: int) -> Loss:
    """Rectified flow, at times from the distribution that the scheduler's shift gives 256 tokens.

    One caption in ten is replaced by the empty one. The guidance embedding is fed at random and
    so learns to say nothing: this model is not distilled.
    """
    height = latents.shape[-1] // 2
    places = pipe._prepare_latent_image_ids(batch, height, height, "cpu", torch.float32)
    text_places = torch.zeros(tokens[1].shape[1], 3)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = pipe._pack_latents(latents[chosen].float(), batch, *latents.shape[1:])
        noise = torch.randn(clean.shape, generator=generator)
        time = torch.sigmoid(torch.randn(batch, generator=generator) + 0.5)
        mixed = torch.lerp(clean, noise, time.view(-1, 1, 1))
        guidance = 1 + 4 * torch.rand(batch, generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        clip, t5 = (ids[torch.where(dropped, len(latents), chosen)] for ids in tokens)
        clip, t5, mixed, target, time, guidance, img_ids, txt_ids = _moved(
            parts, clip, t5, mixed, noise - clean, time, guidance, places, text_places
        )
        with autocast(clip.device):
            predicted = parts["transformer"](
                hidden_states=mixed,
                timestep=time,
                guidance=guidance,
                pooled_projections=parts["text_encoder"](clip).pooler_output,
                encoder_hidden_states=parts["text_encoder_2"](t5).last_hidden_state,
                img_ids=img_ids,
                txt_ids=txt_ids,
            ).sample
        return F.mse_loss(predicted.float(), target)

    return loss


def edit_loss(
    parts: Any, pipe: Any, latents: tuple[Tensor, Tensor], text: list[Tensor], batch: int
) -> Loss:
    """As `flux_loss`, beside the tokens of a reference, as Kontext takes them.

    Args:
        parts: holds the transformer.
        pipe: of which only the packing of latents is used.
        latents: of the pictures before and after, in the VAE's scale.
        text: what the frozen text encoders make of each prompt and, in the last row, of the empty
            one: pooled vectors, and states.
        batch: pairs of a step.
    """
    before, after = latents
    height = after.shape[-1] // 2
    places = pipe._prepare_latent_image_ids(batch, height, height, "cpu", torch.float32)
    reference_places = places.clone()
    reference_places[:, 0] = 1
    img_ids = torch.cat([places, reference_places])
    txt_ids = torch.zeros(text[1].shape[1], 3)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(after), (batch,), generator=generator)
        reference, clean = (
            pipe._pack_latents(each[chosen].float(), batch, *after.shape[1:])
            for each in (before, after)
        )
        noise = torch.randn(clean.shape, generator=generator)
        time = torch.sigmoid(torch.randn(batch, generator=generator) + 0.5)
        mixed = torch.lerp(clean, noise, time.view(-1, 1, 1))
        guidance = 1 + 4 * torch.rand(batch, generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        pooled, states = (each[torch.where(dropped, len(after), chosen)] for each in text)
        tokens = torch.cat([mixed, reference], dim=1)
        moved = _moved(parts, tokens, time, guidance, pooled, states, img_ids, txt_ids)
        names = ["hidden_states", "timestep", "guidance", "pooled_projections"]
        names += ["encoder_hidden_states", "img_ids", "txt_ids"]
        with autocast(moved[0].device):
            predicted = parts["transformer"](**dict(zip(names, moved, strict=True))).sample
        return F.mse_loss(predicted[:, : clean.shape[1]].float(), (noise - clean).to(moved[0]))

    return loss


def wan_loss(
    parts: Any, pipe: Any, latents: Tensor, tokens: tuple[Tensor, Tensor], batch: int
) -> Loss:
    """Rectified flow, at times from the distribution that the scheduler's shift gives.

    One caption in ten is replaced by the empty one.

    Args:
        parts: holds the transformer and the text encoder.
        pipe: whose scheduler says the shift.
        latents: of clips, in the VAE's scale.
        tokens: of the captions and, in the last row, of the empty one: their numbers, and a mask.
        batch: clips of a step.
    """
    shift = math.log(pipe.scheduler.config.flow_shift)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        time = torch.sigmoid(torch.randn(batch, generator=generator) + shift)
        mixed = torch.lerp(clean, noise, time.view(-1, 1, 1, 1, 1))
        dropped = torch.rand(batch, generator=generator) < 0.1
        ids, mask = (each[torch.where(dropped, len(latents), chosen)] for each in tokens)
        mixed, target, time, ids, mask = _moved(parts, mixed, noise - clean, time, ids, mask)
        with autocast(mixed.device):
            states = parts["text_encoder"](ids, mask).last_hidden_state
            predicted = parts["transformer"](
                hidden_states=mixed,
                timestep=1000 * time,
                encoder_hidden_states=states * mask[..., None],  # as the pipeline does
            ).sample
        return F.mse_loss(predicted.float(), target)

    return loss


def tokens_of(pipe: Any, captions: list[str]) -> list[Tensor]:
    """What each tokenizer makes of the captions and, in the last row, of the empty one."""
    return [
        tokenizer(
            [*captions, ""],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    ]


def to_pixels(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """Bytes ``(N, H, W, 3)`` to numbers from -1 to 1, ``(N, 3, H, W)``."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def clip_pixels(clips: npt.NDArray[np.uint8]) -> Tensor:
    """Bytes ``(N, F, H, W, 3)`` to numbers from -1 to 1, ``(N, 3, F, H, W)``."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def autocast(device: torch.device) -> torch.autocast:
    """Bfloat16 for what gains from it."""
    return torch.autocast(device.type, torch.bfloat16)


def _moved(parts: nn.Module, *tensors: Tensor) -> list[Tensor]:
    device = next(parts.parameters()).device
    return [tensor.to(device) for tensor in tensors]
