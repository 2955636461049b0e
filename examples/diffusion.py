"""LoRA for diffusion models: a UNet and a diffusion transformer learn a new subject; plain diffusers loads the file.

    python examples/diffusion.py                   # both, small, pretrained here on drawn latents
    python examples/diffusion.py --family sd3

With a real pipeline, only where model, latents and texts come from changes:

    pipe = diffusers.AutoPipelineForText2Image.from_pretrained("stabilityai/sd-turbo")
    model = pipe.unet                              # or pipe.transformer
    latents = pipe.vae.encode(images).latent_dist.sample() * pipe.vae.config.scaling_factor
    text = pipe.encode_prompt("a photo of my dog", "cpu", 1, False)[0]
    delta.save("out", format="diffusers")          # then pipe.load_lora_weights("out") anywhere
"""

import argparse
import copy
import tempfile

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltaworks as dw

SIDE, CHANNELS, TOKENS, WIDTH = 8, 4, 4, 16


def blobs(count: int, centre: tuple[float, float], seed: int) -> Tensor:
    """Latents [count, 4, 8, 8] of a round subject near `centre`, its colour the same in all."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.tensor(centre) + 0.7 * torch.randn(count, 2, generator=draw)
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).view(1, SIDE, SIDE, 2)
    bump = (-(grid - places[:, None, None]).square().sum(-1) / 3).exp()
    return 2 * bump[:, None] * torch.tensor([1.0, -1.0, 0.5, -0.5]).view(1, CHANNELS, 1, 1)


class UNet:
    """Stable Diffusion 1 and 2: the model predicts the noise of a diffusion process."""

    part = "unet"

    def __init__(self) -> None:
        self.schedule = diffusers.DDPMScheduler()

    def build(self) -> nn.Module:
        return diffusers.UNet2DConditionModel(
            sample_size=SIDE,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        )

    def denoise(self, model: nn.Module, latents: Tensor, text: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the model predicts of a noisy latent, and what is right."""
        noise = torch.randn(latents.shape, generator=draw)
        steps = torch.randint(1000, (len(latents),), generator=draw)
        noisy = self.schedule.add_noise(latents, noise, steps)
        return model(noisy, steps, encoder_hidden_states=text).sample, noise


class SD3:
    """Stable Diffusion 3: the model predicts the velocity of a straight path from the latent to noise."""

    part = "transformer"

    def build(self) -> nn.Module:
        return diffusers.SD3Transformer2DModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=SIDE,
        )

    def denoise(self, model: nn.Module, latents: Tensor, text: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(latents.shape, generator=draw)
        time = torch.rand(len(latents), 1, 1, 1, generator=draw)
        noisy = (1 - time) * latents + time * noise
        output = model(noisy, encoder_hidden_states=text, pooled_projections=text[:, 0], timestep=1000 * time.flatten())
        return output.sample, noise - latents


FAMILIES = {"unet": UNet, "sd3": SD3}


def fit(family: UNet | SD3, model: nn.Module, groups: list, latents: Tensor, text: Tensor, steps: int) -> None:
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        batch = latents[torch.randint(len(latents), (32,), generator=draw)]
        F.mse_loss(*family.denoise(model, batch, text.expand(len(batch), -1, -1), draw)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_on(family: UNet | SD3, model: nn.Module, latents: Tensor, text: Tensor) -> float:
    draw = torch.Generator().manual_seed(2)
    losses = [
        F.mse_loss(*family.denoise(model, latents, text.expand(len(latents), -1, -1), draw)).item() for _ in range(8)
    ]
    return sum(losses) / len(losses)


def run(name: str, method: str, pretraining: int, steps: int) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]()
    model = family.build()
    known, new = torch.randn(2, 1, TOKENS, WIDTH)  # two texts
    fit(family, model, [{"params": model.parameters(), "lr": 2e-3}], blobs(512, (2.0, 2.0), seed=1), known, pretraining)
    plain = copy.deepcopy(model).eval()
    subject, unseen = blobs(16, (5.0, 5.0), seed=2), blobs(64, (5.0, 5.0), seed=3)

    delta = dw.attach(model, method)
    before = loss_on(family, model, unseen, new)
    fit(family, model, delta.parameter_groups(3e-3), subject, new, steps)
    model.eval()
    trained = sum(parameter.numel() for parameter in delta.parameters())
    print(f"{name}: {method} trains {trained:,} values on 16 latents")
    print(f"  loss on the new subject {before:.3f} -> {loss_on(family, model, unseen, new):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        delta.save(folder, format="diffusers")
        plain.load_lora_adapter(folder, prefix=family.part, use_safetensors=True)
    with torch.no_grad():
        ours, theirs = (
            family.denoise(each, unseen, new.expand(64, -1, -1), torch.Generator().manual_seed(4))[0]
            for each in (model, plain)
        )
    print(f"  plain diffusers with the saved file differs by {float((ours - theirs).abs().max()):.1e} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="one of the two alone")
    parser.add_argument("--method", default="lora[rank=8]", help="what is attached (%(default)s)")
    parser.add_argument("--pretraining", type=int, default=300, help="steps of the small model alone (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the adapter (%(default)s)")
    chosen = parser.parse_args()
    for name in [chosen.family] if chosen.family else FAMILIES:
        run(name, chosen.method, chosen.pretraining, chosen.steps)


if __name__ == "__main__":
    main()
