"""Networks that move channels without computing: split, slice, shuffle, reshape, roll, pad."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import IMAGE, TOKENS, conv, conv_bn, network, sandwich


def shuffle(x: Tensor, blocks: int = 2) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, blocks, c // blocks, h, w).transpose(1, 2).reshape(b, c, h, w)


@network(IMAGE)
class SplitSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.a, self.b, self.c = conv(3, 4), conv(5, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.stem(x).relu(), [3, 5, 4], dim=1)
        return self.a(a) + self.b(b) * self.c(c)


@network(IMAGE)
class SplitEqual(nn.Module):
    """The last part is smaller, and the parts come back in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 10), conv(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.stem(x).relu().split(4, 1)
        return self.head(torch.cat([c, a, b], 1))


@network(IMAGE)
class ChunkTwoReaders(nn.Module):
    """Two convolutions on one chunk, one on the other: traversal order must not decide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.a, self.b, self.c = conv(6, 4), conv(6, 4, 1), conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().chunk(2, dim=1)
        return self.a(right) + self.b(left) * self.c(right)


@network(IMAGE)
class Unbind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).unflatten(1, (2, 4)).unbind(1)
        return self.a(left.relu()) + self.b(right)


@network(IMAGE)
class TensorSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 9), conv(2, 4), conv(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tensor_split(self.stem(x).relu(), [2], dim=1)
        return self.a(a) + self.b(b)


@network(IMAGE)
class SplitResidual(nn.Module):
    """A cross-stage block: half passes through, half is worked on (Res2Net, CSP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 12), conv_bn(4, 4), conv_bn(4, 4)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.stem(x).relu().chunk(3, 1)
        two = self.a(two).relu()
        three = self.b(two + three).relu()
        return self.head(torch.cat([one, two, three], 1))


@network(IMAGE)
class ShuffleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), conv(8, 5)
        self.branch = nn.Sequential(
            conv_bn(4, 4, 1), nn.ReLU(), conv_bn(4, 4, groups=4), conv_bn(4, 4, 1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for _ in range(2):
            keep, work = x.chunk(2, dim=1)
            x = shuffle(torch.cat([keep, self.branch(work)], 1))
        return self.head(x)


sandwich("channel_shuffle", lambda: lambda x: shuffle(x, 4))
sandwich("channel_shuffle_op", lambda: nn.ChannelShuffle(2))
sandwich("slice_prefix", lambda: lambda x: x[:, :5], head=5)
sandwich("slice_middle", lambda: lambda x: x[:, 2:7], head=5)
sandwich("slice_strided", lambda: lambda x: x[:, 1::3], head=3)
sandwich("slice_negative", lambda: lambda x: x[:, -3:], head=3)
sandwich("slice_overlapping", lambda: lambda x: torch.cat([x[:, :5], x[:, 3:]], 1), head=10)
sandwich("slice_space", lambda: lambda x: x[:, :, 1:-1, ::2])
sandwich("select_channel", lambda: lambda x: x * x[:, 3].unsqueeze(1))
sandwich("narrow", lambda: lambda x: x.narrow(1, 2, 4), head=4)
sandwich("index_constant", lambda: lambda x: x[:, [6, 0, 3, 3]], head=4)
sandwich("flip_add", lambda: lambda x: x + x.flip(1))
sandwich("flip_space", lambda: lambda x: x + x.flip(3))
sandwich("roll_channels", lambda: lambda x: x.roll(3, 1))
sandwich("roll_space", lambda: lambda x: x.roll((1, -2), (2, 3)))
sandwich("pixel_shuffle", lambda: nn.PixelShuffle(2), head=2)
sandwich("pixel_unshuffle", lambda: nn.PixelUnshuffle(2), width=4, head=16)
sandwich("repeat_channels", lambda: lambda x: x.repeat(1, 2, 1, 1), head=16)
sandwich("repeat_interleave", lambda: lambda x: x.repeat_interleave(2, dim=1), head=16)
sandwich("expand_pooled", lambda: lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8) + x)
sandwich("expand_one_channel", lambda: lambda x: x[:, :1].expand(-1, 6, -1, -1), head=6)
sandwich("maxout", lambda: lambda x: x.unflatten(1, (4, 2)).amax(2), head=4)
sandwich("reflection_pad", lambda: nn.ReflectionPad2d(1))
sandwich("replication_pad", lambda: nn.ReplicationPad2d((1, 0, 2, 1)))
sandwich("constant_pad", lambda: nn.ConstantPad2d((1, 2, 0, 1), 0.7))
sandwich("crop_pad", lambda: lambda x: F.pad(x, (-1, 2, -2, 0)))
sandwich("channel_pad_constant", lambda: lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.3), head=11)
sandwich("flatten_linear", lambda: nn.Flatten(), head=lambda: nn.Linear(512, 5))
sandwich(
    "pooled_flatten_linear",
    lambda: lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 2), 1),
    head=lambda: nn.Linear(32, 5),
)
sandwich("view_linear", lambda: lambda x: x.view(x.shape[0], 512), head=lambda: nn.Linear(512, 5))
sandwich("view_inferred", lambda: lambda x: x.view(x.size(0), -1), head=lambda: nn.Linear(512, 5))
sandwich(
    "channels_last_flatten",
    lambda: lambda x: x.permute(0, 2, 3, 1).flatten(1),
    head=lambda: nn.Linear(512, 5),
)
sandwich("permute_linear", lambda: lambda x: x.permute(0, 2, 3, 1), head=lambda: nn.Linear(8, 5))
sandwich(
    "tokens_of_image",
    lambda: lambda x: x.flatten(2).transpose(1, 2),
    head=lambda: nn.Linear(8, 5),
)
sandwich("linear_over_space", lambda: lambda x: x.flatten(2), head=lambda: nn.Linear(64, 5))
sandwich("view_blocks", lambda: lambda x: x.view(-1, 2, 4, 8, 8).sum(1), head=4)
sandwich("squeeze_unsqueeze", lambda: lambda x: x.unsqueeze(2).relu().squeeze(2))
sandwich("transpose_space", lambda: lambda x: x.transpose(2, 3).contiguous())


@network(IMAGE)
class LinearThenView(nn.Module):
    """A Linear whose outputs become an image, read by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = conv_bn(3, 4), nn.Linear(4, 6 * 4)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.stem(x).relu().mean((2, 3)))
        return self.up(x.view(-1, 6, 2, 2).relu())


@network(TOKENS)
class LinearOverTokens(nn.Module):
    """The token axis is mixed by a Linear (MLP-Mixer); the channel axis passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 10), nn.LayerNorm(10)
        self.mix, self.unmix, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mixed = self.unmix(F.gelu(self.mix(self.norm(x).transpose(1, 2))))
        return self.head(x + mixed.transpose(1, 2))
