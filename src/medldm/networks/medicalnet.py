"""The 3D residual networks of MedicalNet, whose published weights give features of medical volumes.

Chen, Ma and Zheng 2019, "Med3D: Transfer Learning for 3D Medical Image Analysis". Module names are those of
the published files, so that they load as they are.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.errors import InputError
from medldm.networks.layers import conv

STAGE_CHANNELS = (64, 128, 256, 512)
STAGE_STRIDES = (1, 2, 1, 1)
STAGE_DILATIONS = (1, 1, 2, 4)  # the last two stages keep the grid of 1/8


def conv_norm(c_in: int, c_out: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> tuple:
    padding = dilation * (kernel // 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "bias": False}
    return conv(3, c_in, c_out, kernel, **options), nn.BatchNorm3d(c_out)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, channels: int, stride: int, dilation: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(c_in, channels, 3, stride=stride, dilation=dilation)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3, dilation=dilation)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, channels: int, stride: int, dilation: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(c_in, channels, 1)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3, stride=stride, dilation=dilation)
        self.conv3, self.bn3 = conv_norm(channels, 4 * channels, 1)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


DEPTHS = {10: (BasicBlock, (1, 1, 1, 1)), 50: (Bottleneck, (3, 4, 6, 3))}


class MedicalNet(nn.Module):
    """ResNet-10 or ResNet-50 without its segmentation head; `num_features` maps at an eighth of the grid.

    It was trained on volumes of zero mean and unit deviation (`standardised`).
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"MedicalNet of depth {depth} is none of {', '.join(map(str, DEPTHS))}")
        block, counts = DEPTHS[depth]
        self.num_features = STAGE_CHANNELS[-1] * block.expansion
        self.conv1, self.bn1 = conv_norm(1, 64, 7, stride=2)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        width = 64
        for i, (channels, count) in enumerate(zip(STAGE_CHANNELS, counts, strict=True)):
            blocks = []
            for k in range(count):
                stride, out = STAGE_STRIDES[i] if k == 0 else 1, channels * block.expansion
                is_other = stride != 1 or width != out
                downsample = nn.Sequential(*conv_norm(width, out, 1, stride=stride)) if is_other else None
                blocks.append(block(width, channels, stride, STAGE_DILATIONS[i], downsample))
                width = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, D, H, W), standardised -> (B, num_features, D/8, H/8, W/8), sizes rounded up."""
        h = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(h))))


def standardised(x: Tensor) -> Tensor:
    """Each volume (B, ...) with mean 0 and deviation 1, in float32; a constant one becomes zero."""
    flat = x.float().flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    return (centred / flat.std(1, unbiased=False, keepdim=True).clamp_min(1e-6)).view_as(x)


def load_medicalnet(depth: int, path: Path) -> MedicalNet:
    """The frozen network with the weights of a published file (`state_dict`, names with `module.`).

    A segmentation head in the file is left out. InputError where the file is of another network.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("state_dict", content)
    state = {key.removeprefix("module."): value for key, value in content.items()}
    state = {key: value for key, value in state.items() if not key.startswith(("conv_seg.", "fc."))}
    with torch.device("meta"):
        network = MedicalNet(depth)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: not the weights of MedicalNet's ResNet-{depth}; fetch it again") from error
    return network.eval().requires_grad_(False)
