"""Residual networks after He et al. (2016): ResNet-18 and -34, and a small one for two cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "ResNet", "resnet18", "resnet34", "small_resnet"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the input added, ``relu(x + f(x))``."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A residual network: a stem, stages of basic blocks, global averages, a linear layer.

    Args:
        blocks: basic blocks of each stage; all stages but the first halve the image.
        widths: channels of each stage.
        channels: of the images.
        classes: outputs; 1 gives a single logit ``[B]``.
        stem: ``"large"``: 7 x 7, stride 2, then 3 x 3 maximum, stride 2 (for images of 150 pixels
            and more); ``"small"``: 3 x 3, stride 2.

    Raises:
        ValueError: blocks and widths of different length, or sizes that are not positive.

    Example:
        >>> ResNet([1, 1], [8, 16], channels=1, classes=1)(torch.randn(4, 1, 16, 48)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        channels: int = 3,
        classes: int = 1,
        stem: str = "small",
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths) or not blocks or min(*blocks, *widths, channels, classes) < 1:
            raise ValueError(
                "ResNet: expected as many blocks as widths, all sizes positive, got blocks "
                f"{list(blocks)}, widths {list(widths)}, {channels} channels, {classes} classes"
            )
        if stem not in ("large", "small"):
            raise ValueError(f'ResNet: stem must be "large" or "small", got {stem!r}')
        size = 7 if stem == "large" else 3
        self.conv1 = nn.Conv2d(channels, widths[0], size, 2, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1) if stem == "large" else nn.Identity()
        self.stages = nn.Sequential()
        before = widths[0]
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = [BasicBlock(before, width, 1 if i == 0 else 2)]
            stage += [BasicBlock(width, width, 1) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*stage))
            before = width
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` to logits ``[B, K]``, or ``[B]`` where there is one."""
        x = self.pool(torch.relu(self.bn1(self.conv1(images))))
        logits = self.fc(self.stages(x).mean((2, 3)))
        return logits.squeeze(1) if logits.shape[1] == 1 else logits


def resnet18(channels: int = 3, classes: int = 1) -> ResNet:
    """ResNet-18: 11,689,512 parameters with 3 channels and 1,000 classes."""
    return ResNet([2, 2, 2, 2], [64, 128, 256, 512], channels, classes, "large")


def resnet34(channels: int = 3, classes: int = 1) -> ResNet:
    """ResNet-34: 21,797,672 parameters with 3 channels and 1,000 classes."""
    return ResNet([3, 4, 6, 3], [64, 128, 256, 512], channels, classes, "large")


def small_resnet(channels: int = 1, classes: int = 1, stages: int = 5) -> ResNet:
    """A small residual network for a CPU: with five stages its last outputs see 191 pixels in each
    direction, with four 95.

    Args:
        channels: of the images.
        classes: outputs.
        stages: of one block each, 1 to 5.
    """
    widths = [16, 32, 64, 64, 64]
    if not 1 <= stages <= len(widths):
        raise ValueError(f"small_resnet: stages must be in 1..{len(widths)}, got {stages}")
    return ResNet([1] * stages, widths[:stages], channels, classes, "small")


def _small4(channels: int = 1, classes: int = 1) -> ResNet:
    return small_resnet(channels, classes, 4)


NETWORKS = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "small": small_resnet,
    "small4": _small4,
}
"""Name -> function of channels and classes; ``small4`` has four stages, ``small`` five."""
