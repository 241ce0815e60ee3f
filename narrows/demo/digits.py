"""The digits: a network to learn them, scikit-learn's images of them, and the training."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrows.errors import UsageError

SEED = 0
# The group lasso's strength, per learning rate and square root of a column's size.
PENALTY = 0.18


class Residual(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class DigitsNet(nn.Module):
    """Residual blocks around a concat of two branches: ``[b,1,8,8]`` to ``[b,10]``."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.block1 = Residual(width)
        self.branch1 = nn.Conv2d(width, width, 1)
        self.branch3 = nn.Conv2d(width, width, 3, padding=1)
        self.join = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.join_norm = nn.BatchNorm2d(2 * width)
        self.block2 = Residual(2 * width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        x = self.block1(F.relu(self.stem_norm(self.stem(x))))
        x = torch.cat([F.relu(self.branch1(x)), F.relu(self.branch3(x))], dim=1)
        x = self.block2(F.relu(self.join_norm(self.join(x))))
        return self.head(self.dropout(x.mean((2, 3))))

    def sparse(self) -> list[nn.Conv2d]:
        """Return the convolutions that learn which channels they need."""
        blocks = (*self.block1.modules(), self.join, *self.block2.modules())
        return [m for m in blocks if isinstance(m, nn.Conv2d)]


@dataclass(frozen=True)
class Split:
    """Images ``[n,1,8,8]`` in 0..1 and their digits ``[n]``."""

    images: Tensor
    digits: Tensor

    def accuracy(self, run: Callable[[Tensor], Any]) -> float:
        """Return the share of images that ``run`` gets right, 0..1."""
        with torch.no_grad():
            logits = torch.as_tensor(run(self.images))
        return (logits.argmax(1) == self.digits).double().mean().item()


def load_splits() -> tuple[Split, Split, Split]:
    """Return 1,197 images to train on, 200 to choose the ratio with and 400 to test on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "the demo needs scikit-learn for its data", hint="pip install 'narrows[demo]'"
        ) from None
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(data.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SEED))
    train, validation, test = order.split([len(order) - 600, 200, 400])
    return tuple(Split(images[i], digits[i]) for i in (train, validation, test))  # type: ignore


def train(
    model: nn.Module,
    split: Split,
    epochs: int,
    rate: float,
    label: str,
    sparse: Sequence[nn.Conv2d] = (),
) -> float:
    """Train in place and leave the model in eval mode; returns the seconds it took.

    Args:
        model: The model.
        split: What it learns.
        epochs: How often it sees all of it.
        rate: The highest learning rate.
        label: What `progress` calls it.
        sparse: Convolutions whose input channels are pulled to zero.
    """
    start = time.perf_counter()
    batches = torch.utils.data.DataLoader(
        range(len(split.digits)),  # type: ignore[arg-type]
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(SEED),
    )
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(batches)
    )
    model.train()
    for epoch in range(epochs):
        progress(f"{label}: epoch {epoch + 1} of {epochs}")
        for rows in batches:
            loss = F.cross_entropy(model(split.images[rows]), split.digits[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shrink_columns(sparse, PENALTY * float(schedule.get_last_lr()[0]))
            schedule.step()
    progress("")
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def shrink_columns(convolutions: Sequence[nn.Conv2d], step: float) -> None:
    """Take a proximal step of the group lasso: input channels shrink, the weakest become zero."""
    for convolution in convolutions:
        weight = convolution.weight
        reach = step * math.sqrt(weight[:, 0].numel())
        norms = weight.square().sum((0, 2, 3), keepdim=True).sqrt()
        weight.mul_((1 - reach / norms.clamp_min(1e-12)).clamp_min(0))


def progress(text: str) -> None:
    """Show one changing line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: steady times, and two threads that share a busy core only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
