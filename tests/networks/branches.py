"""Networks where tensors meet or part: residuals, concats, several inputs and outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import IMAGE, add, conv, conv_bn, network, sandwich


class Block(nn.Module):
    """Two convolutions with BatchNorm around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = conv_bn(inputs, outputs), conv_bn(outputs, outputs)
        self.shortcut = conv_bn(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


sandwich("residual_plain", lambda: Block(8, 8))
sandwich("residual_projection", lambda: Block(8, 12), head=12)
sandwich("residual_chained", lambda: nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 8)))


@network(IMAGE)
class ResidualTwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.left, self.right = conv_bn(8, 8), conv(8, 8, 1, bias=False)
        self.head = conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.left(x) + self.right(x.relu())).relu())


@network(IMAGE)
class ResidualInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv_bn(3, 8), conv_bn(8, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y = self.body(x)
        y += x
        return self.head(y.relu_())


@network(IMAGE)
class ResidualWithoutNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), conv(8, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + torch.tanh(self.body(x)))


@network(IMAGE)
class AddThenCat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 6), conv(3, 6), conv_bn(3, 4)
        self.head, self.other = conv(10, 5), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        total = self.a(x) + self.b(x)
        joined = torch.cat([total, self.c(x).relu()], dim=1)
        return self.head(joined) + self.other(total.relu())


class Concat(nn.Module):
    """Convolutions of several widths, concatenated and read by one more."""

    def __init__(self, *widths: int, axis: int = 1) -> None:
        super().__init__()
        self.parts = nn.ModuleList(conv_bn(3, w) for w in widths)
        self.head, self.axis = conv(sum(widths), 5), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([part(x) for part in self.parts], dim=self.axis).relu())


add("concat_two", lambda: Concat(6, 6))
add("concat_three_widths", lambda: Concat(4, 8, 5))
add("concat_negative_axis", lambda: Concat(6, 4, axis=-3))
sandwich("concat_same_twice", lambda: lambda x: torch.cat([x, x], 1), head=16)
sandwich("concat_with_negated", lambda: lambda x: torch.cat([x, -x], 1).relu(), head=16)


@network(IMAGE)
class ConcatOfResiduals(nn.Module):
    """Two concats that hold the same tensors in different places, added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 6), conv_bn(3, 6), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu(), self.b(x)
        return self.head(torch.cat([a, b], 1) + torch.cat([b, a], 1))


@network(IMAGE)
class ConcatWithInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), conv(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.stem(x).relu()], 1))


@network(IMAGE)
class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(4))
        self.layers = nn.ModuleList(conv(6 + 4 * i, 4, bias=False) for i in range(3))
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            features.append(layer(norm(torch.cat(features, 1)).relu()))
        y = self.norms[-1](torch.cat(features, 1)).relu()
        return self.head(y.mean((2, 3)))


@network(IMAGE)
class FanOut(nn.Module):
    """One tensor, three readers, each with a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.a, self.b, self.c = conv(12, 4), conv(12, 4, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.a(x).mean((2, 3)) * self.b(x).amax((2, 3)) + self.c(x.mean((2, 3)))


class Two(nn.Module):
    """Two convolutions of the input, merged by an operator."""

    def __init__(self, merge) -> None:
        super().__init__()
        self.a, self.b, self.merge, self.head = conv_bn(3, 8), conv_bn(3, 8), merge, conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.merge(self.a(x), self.b(x).relu()))


add("multiply_branches", lambda: Two(lambda a, b: a * b))
add("multiply_gated", lambda: Two(lambda a, b: a * torch.sigmoid(b)))
add("subtract_branches", lambda: Two(lambda a, b: a - b))
add("subtract_scaled", lambda: Two(lambda a, b: torch.sub(a, b, alpha=2)))
add("divide_branches", lambda: Two(lambda a, b: a / (b + 1.5)))
add("maximum_branches", lambda: Two(torch.maximum))
add("stack_sum", lambda: Two(lambda a, b: torch.stack([a, b], 1).sum(1)))
add("stack_weighted", lambda: Two(lambda a, b: (torch.stack([a, b]) * 0.5).mean(0)))
add("where_branches", lambda: Two(lambda a, b: torch.where(b > 0.1, a, b)))
add("lerp_branches", lambda: Two(lambda a, b: torch.lerp(a, b, 0.3)))
add("addcmul_branches", lambda: Two(lambda a, b: torch.addcmul(a, a, b, value=0.5)))


@network(IMAGE)
class UnetSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = conv_bn(3, 6), conv_bn(6, 10)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.join, self.head = conv_bn(12, 6), conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        y = self.up(self.middle(F.max_pool2d(skip, 2)).relu())
        return self.head(self.join(torch.cat([skip, y], 1)).relu())


@network(IMAGE)
class ChannelPadShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv_bn(3, 6), conv_bn(6, 12), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        shortcut = F.pad(x, (0, 0, 0, 0, 3, 3))
        return self.head((self.body(x) + shortcut).relu())


@network(IMAGE, IMAGE)
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8), conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.a(x).relu() + self.b(y))


@network(IMAGE)
class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv(8, 4), conv_bn(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.a(x), self.b(x).relu()


@network(IMAGE)
class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv(8, 4), conv(8, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        x = self.stem(x).relu()
        return {"out": self.a(x), "more": [self.b(x).mean((2, 3))]}


@network(IMAGE)
class IntermediateOutput(nn.Module):
    """The output holds a tensor that later layers read too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv_bn(3, 8), conv_bn(8, 8), conv(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        y = self.body(x).relu()
        return self.head(y), x


@network(IMAGE)
class OutputTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.head(self.stem(x).relu())
        return y, y, x
