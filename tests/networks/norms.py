"""Networks whose operators look across channels: norms, gates, softmax, reductions, sorts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import IMAGE, TOKENS, add, conv, conv_bn, network, sandwich

sandwich("group_norm", lambda: nn.Sequential(conv(8, 8), nn.GroupNorm(4, 8), nn.ReLU()))
sandwich("group_norm_one_block", lambda: nn.Sequential(conv(8, 8), nn.GroupNorm(1, 8)))
sandwich("group_norm_each_channel", lambda: nn.GroupNorm(8, 8))
sandwich("instance_norm", lambda: nn.Sequential(conv(8, 8), nn.InstanceNorm2d(8, affine=True)))
sandwich("instance_norm_plain", lambda: nn.InstanceNorm2d(8))
sandwich("local_response_norm", lambda: nn.LocalResponseNorm(3))
sandwich("softmax_channels", lambda: lambda x: x.softmax(1))
sandwich("softmax_space", lambda: lambda x: x.flatten(2).softmax(-1).unflatten(-1, (8, 8)))
sandwich("log_softmax_channels", lambda: lambda x: F.log_softmax(x, 1))
sandwich("normalize_channels", lambda: lambda x: F.normalize(x, dim=1))
sandwich(
    "standardize_space",
    lambda: lambda x: (x - x.mean((2, 3), True)) / (x.std((2, 3), keepdim=True) + 1),
)
sandwich("mean_channels_gate", lambda: lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)))
sandwich("max_channels_gate", lambda: lambda x: x * x.amax(1, keepdim=True))
sandwich("sum_channels", lambda: lambda x: torch.cat([x, x.sum(1, keepdim=True)], 1), head=9)
sandwich("cumsum_channels", lambda: lambda x: x.cumsum(1))
sandwich("cumsum_space", lambda: lambda x: x.cumsum(2))
sandwich("sort_channels", lambda: lambda x: torch.sort(x, dim=1).values)
sandwich("topk_channels", lambda: lambda x: torch.topk(x, 4, dim=1).values, head=4)
sandwich("argmax_gate", lambda: lambda x: x * x.argmax(1, keepdim=True))
sandwich("glu", lambda: nn.GLU(1), head=4)


class Gated(nn.Module):
    """Squeeze and excite, with a choice of gate."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = conv(8, 4, 1), conv(4, 8, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.expand(self.reduce(s).relu()))


sandwich("squeeze_excite_sigmoid", lambda: Gated(nn.Sigmoid()))
sandwich("squeeze_excite_hardsigmoid", lambda: Gated(nn.Hardsigmoid()))


class LinearGate(nn.Module):
    """Squeeze and excite with Linear layers and a view back to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.shape
        s = x.mean((2, 3))
        return x * torch.sigmoid(self.expand(self.reduce(s).relu())).view(b, c, 1, 1)


sandwich("squeeze_excite_linear", LinearGate)


class SpatialGate(nn.Module):
    """A map of one channel that scales all channels (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.gate(pooled))


class OneChannelGate(nn.Module):
    """A convolution to one channel gates eight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = conv_bn(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


sandwich("spatial_gate", SpatialGate)
sandwich("one_channel_gate", OneChannelGate)


class ChannelsLast(nn.Module):
    """A layer that works on the last axis, applied to an image's channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


sandwich("layer_norm_channels_last", lambda: ChannelsLast(nn.LayerNorm(8)))
sandwich("layer_norm_whole_image", lambda: nn.LayerNorm([8, 8, 8]))
sandwich("layer_norm_space", lambda: nn.LayerNorm([8, 8]))


class TokenMlp(nn.Module):
    """Linear, norm, Linear over tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 10), norm, nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.embed(x))))


add("layer_norm_tokens", lambda: TokenMlp(nn.LayerNorm(10)), TOKENS)
add("layer_norm_plain", lambda: TokenMlp(nn.LayerNorm(10, elementwise_affine=False)), TOKENS)
add("rms_norm", lambda: TokenMlp(nn.RMSNorm(10)), TOKENS)


class HandRms(nn.RMSNorm):
    """RMSNorm as language models write it out; masks count behind it, as behind any norm."""

    def __init__(self) -> None:
        super().__init__(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


add("rms_norm_by_hand", lambda: TokenMlp(HandRms()), TOKENS)


@network(IMAGE)
class ConvNextBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels, two Linears, layer scale, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), conv(8, 5)
        self.depthwise, self.norm = conv(8, 8, 5, groups=8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head(x + y.permute(0, 3, 1, 2))
