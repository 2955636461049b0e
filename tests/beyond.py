"""Tiny models beyond text, built from configurations: images, sound, diffusion and dense prediction.

``BEYOND`` is to these families what ``zoo.ZOO`` is to those that every method meets: a name, and a function that
builds a fresh model with its inputs.
"""

from typing import Any

import diffusers
import torch
import transformers as hf
import zoo
from torch import Tensor, nn
from zoo import BATCH, CLASSES, HEADS, HIDDEN, LAYERS, WIDTH, Build, Inputs

BEYOND: dict[str, Build] = {}
OUTPUT: dict[str, str] = {}
"""The field of a family's output that is compared."""

SIDE = 8  # of the latents of a diffusion model
_TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


def _member(name: str, output: str) -> Any:
    def register(build: Build) -> Build:
        BEYOND[name], OUTPUT[name] = zoo.seeded(build), output
        return BEYOND[name]

    return register


def output_of(name: str, model: nn.Module, inputs: Inputs) -> Tensor:
    """The main output: logits, the predicted noise, or masks."""
    output: Tensor = getattr(model(**inputs), OUTPUT[name])
    return output


def loss_of(name: str, model: nn.Module, inputs: Inputs) -> Tensor:
    """A scalar that depends on every feature of the output: its mean square distance from one."""
    return (output_of(name, model, inputs) - 1).square().mean()


# Images and sound ---------------------------------------------------------------------------------------


def _images(side: int) -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, side, side)}


@_member("dinov2", "logits")
def dinov2() -> tuple[nn.Module, Inputs]:
    config = hf.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        mlp_ratio=2,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    return hf.Dinov2ForImageClassification(config), _images(8)


@_member("siglip", "logits_per_image")
def siglip() -> tuple[nn.Module, Inputs]:
    """Two towers; attention pools the patches of an image."""
    text = _TOWER | {"vocab_size": 64, "max_position_embeddings": 16, "projection_size": WIDTH}
    config = hf.SiglipConfig(text_config=text, vision_config=_TOWER | {"image_size": 8, "patch_size": 4})
    return hf.SiglipModel(config), _images(8) | {"input_ids": torch.randint(3, 64, (BATCH, 10))}


@_member("whisper-classification", "logits")
def whisper_classification() -> tuple[nn.Module, Inputs]:
    config = hf.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        num_mel_bins=8,
        max_source_positions=10,
        vocab_size=64,
        pad_token_id=0,
        num_labels=CLASSES,
        classifier_proj_size=16,
    )
    return hf.WhisperForAudioClassification(config), {"input_features": torch.randn(BATCH, 8, 20)}


@_member("wav2vec2", "logits")
def wav2vec2() -> tuple[nn.Module, Inputs]:
    config = hf.Wav2Vec2Config(
        **_TOWER,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_labels=CLASSES,
        mask_time_prob=0.0,
    )
    return hf.Wav2Vec2ForSequenceClassification(config), {"input_values": torch.randn(BATCH, 200)}


# Dense prediction ---------------------------------------------------------------------------------------


@_member("segformer", "logits")
def segformer() -> tuple[nn.Module, Inputs]:
    """A pyramid: each stage halves the image and is wider than the one before."""
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=CLASSES,
    )
    return hf.SegformerForSemanticSegmentation(config), _images(16)


@_member("sam", "pred_masks")
def sam() -> tuple[nn.Module, Inputs]:
    """An image encoder with fused projections, and a decoder that attends to the image and back."""
    vision = _TOWER | {"mlp_dim": HIDDEN, "image_size": 32, "patch_size": 4, "output_channels": 16, "window_size": 4}
    vision |= {"num_pos_feats": 8, "global_attn_indexes": [1]}
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.SamConfig(
        vision_config=vision,
        prompt_encoder_config=prompts,
        mask_decoder_config=decoder | {"iou_head_hidden_dim": 16},
    )
    points = 32 * torch.rand(BATCH, 1, 2, 2)  # [batch, masks, points, (x, y)]
    return hf.SamModel(config), _images(32) | {"input_points": points}


@_member("mask2former", "masks_queries_logits")
def mask2former() -> tuple[nn.Module, Inputs]:
    """A Swin encoder, a deformable pixel decoder and a decoder of mask queries."""
    swin = hf.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = hf.Mask2FormerConfig(
        backbone_config=swin,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=4,
        num_labels=CLASSES,
    )
    return hf.Mask2FormerForUniversalSegmentation(config), _images(32)


# Diffusion ----------------------------------------------------------------------------------------------


def _denoising(channels: int = 4) -> Inputs:
    """Noisy latents [batch, channels, side, side] and their time steps."""
    return {"hidden_states": torch.randn(BATCH, channels, SIDE, SIDE), "timestep": torch.tensor([1, 500, 999])}


@_member("unet", "sample")
def unet() -> tuple[nn.Module, Inputs]:
    """Stable Diffusion 1 and 2: convolutions with attention between them, to itself and to a text."""
    model = diffusers.UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    noisy = _denoising()
    text = {"encoder_hidden_states": torch.randn(BATCH, 5, 16)}
    return model, {"sample": noisy["hidden_states"], "timestep": noisy["timestep"]} | text


@_member("dit", "sample")
def dit() -> tuple[nn.Module, Inputs]:
    """A transformer over patches whose norms are set by the time step and a class."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=LAYERS,
        sample_size=SIDE,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    return model, _denoising() | {"class_labels": torch.tensor([0, 3, 9])}


@_member("sd3", "sample")
def sd3() -> tuple[nn.Module, Inputs]:
    """Stable Diffusion 3: image and text side by side in one attention, each with weights of its own."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=8,
        num_attention_heads=HEADS,
        joint_attention_dim=16,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=16,
        pos_embed_max_size=SIDE,
    )
    text = {"encoder_hidden_states": torch.randn(BATCH, 5, 16), "pooled_projections": torch.randn(BATCH, 16)}
    return model, _denoising() | text


@_member("flux", "sample")
def flux() -> tuple[nn.Module, Inputs]:
    """Flux: blocks of two streams, then blocks of one whose attention and MLP share an output projection."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    side = torch.arange(4.0)
    inputs = {
        "hidden_states": torch.randn(BATCH, 16, 4),  # packed latents [batch, tokens, channels]
        "encoder_hidden_states": torch.randn(BATCH, 5, 16),
        "pooled_projections": torch.randn(BATCH, 16),
        "timestep": torch.tensor([0.1, 0.5, 0.9]),
        "img_ids": torch.cat([torch.zeros(16, 1), torch.cartesian_prod(side, side)], dim=1),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs
