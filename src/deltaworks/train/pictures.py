"""uint8 pictures to the float tensors a vision model was trained on, without an image library."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PictureScaler:
    """Scale, resize and normalise pictures: ``(pixel / 255 - mean) / std``.

    Attributes:
        height: Rows of the result.
        width: Columns of the result.
        channels: Channels of the result; grey pictures are repeated, colour ones averaged to grey.
        mean: Per channel, or one number for all.
        std: Per channel, or one number for all.
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Arrays uint8 [height, width(, channels)] to float32 [batch, channels, height, width]."""
        same_size = len({image.shape for image in images}) == 1
        batches = [torch.stack([torch.as_tensor(image) for image in images])] if same_size else [
            torch.as_tensor(image).unsqueeze(0) for image in images
        ]  # fmt: skip
        pixels = torch.cat([self._resized(batch) for batch in batches])
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized(self, images: Tensor) -> Tensor:
        pixels = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        pixels = pixels.float() / 255
        if pixels.shape[1] == 4 and self.channels == 3:
            pixels = pixels[:, :3]  # without the alpha channel
        if pixels.shape[1] != self.channels:
            grey = pixels.mean(dim=1, keepdim=True)
            pixels = grey.expand(-1, self.channels, -1, -1)
        if pixels.shape[-2:] != (self.height, self.width):
            pixels = F.interpolate(pixels, (self.height, self.width), mode="bilinear", antialias=True)
        return pixels


def scaler_of(source: str, config: Any) -> PictureScaler:
    """The scaler that a published vision model asks for in its preprocessor_config.json."""
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
    size: Any = settings.get("crop_size") or settings.get("size") or getattr(config, "image_size", 224)
    height: Any
    width: Any
    if isinstance(size, int):
        height = width = size
    elif isinstance(size, dict):
        shortest = size.get("shortest_edge", 224)
        height, width = size.get("height", shortest), size.get("width", shortest)
    else:
        height, width = size
    mean, std = settings.get("image_mean") or [0.5], settings.get("image_std") or [0.5]
    return PictureScaler(height, width, getattr(config, "num_channels", 3), tuple(mean), tuple(std))
