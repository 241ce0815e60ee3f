"""Networks in which a computed index says what is read: tokens by their score, pixels by a grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import IMAGE, TOKENS, conv, network


@network(TOKENS)
class BestTokens(nn.Module):
    """The three tokens with the highest scores go on (token pruning)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.last = nn.Linear(8, 12), nn.Linear(12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        best = self.score(x).squeeze(-1).topk(3, dim=1).indices
        return self.last(x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1])))


@network(TOKENS)
class LastToken(nn.Module):
    """The token where a score is highest speaks for the sentence (CLIP's end of text)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.last = nn.Linear(8, 12), nn.Linear(8, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        end = self.score(x).squeeze(-1).argmax(dim=-1)
        x = torch.tanh(self.first(x))
        return self.last(x[torch.arange(x.shape[0], device=x.device), end])


@network((3, 10))
class Points(nn.Module):
    """The largest of every channel over all points, and where it was (PointNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 12, 1)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(x)))
        values, where = x.max(dim=2)
        ranks = torch.sort(x, dim=2, descending=True).values[:, :, :2].mean(2)
        return self.last(values + 0.1 * where.to(x.dtype) + ranks)


@network(IMAGE)
class Transformed(nn.Module):
    """An image read where a computed transformation says (spatial transformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.where, self.last = conv(3, 8), nn.Linear(8, 6), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        turn = torch.tanh(self.where(x.mean((2, 3))))[:, :, None, None]
        side = torch.linspace(-1, 1, 8, dtype=x.dtype)
        across = turn[:, 0] * side + turn[:, 1] * side[:, None] + turn[:, 2]
        down = turn[:, 3] * side + turn[:, 4] * side[:, None] + turn[:, 5]
        grid = torch.stack([across, down], -1)
        return self.last(F.grid_sample(x, grid, align_corners=True))


@network(IMAGE)
class Patches(nn.Module):
    """Windows as columns, a layer over their places, and summed back (MobileViT, involution)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places, self.last = conv(3, 8), nn.Linear(4, 4), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        columns = F.unfold(x, 2, stride=2).view(-1, 8, 4, 16)
        columns = self.places(columns.transpose(2, 3)).transpose(2, 3).reshape(-1, 32, 16)
        return self.last(F.fold(columns, (8, 8), 2, stride=2))
