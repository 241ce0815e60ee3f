"""UDFC: how badly the other filters of a layer reproduce a filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import DataFree
from narrows.passes.choosing.criteria.chains import folded
from narrows.passes.choosing.criteria.filters import filters


@dataclass(frozen=True)
class Sums:
    """How filters are expressed by others: what the criterion and the compensation are told.

    Attributes:
        ridge: The ridge, relative to the mean of ``|f|^2``.
        shift: How much an error of the shift counts, beside one of a weight.
    """

    name: ClassVar[str] = "udfc"
    paper: ClassVar[str] = (
        "Bai et al., Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning, "
        "ICCV 2023"
    )
    ridge: float = 0.01
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.ridge > 0 or not self.shift >= 0:
            raise PlanUsageError(
                f"udfc takes a ridge above 0 and a shift of 0 or more, got {self.ridge!r} and "
                f"{self.shift!r}",
                why="without a ridge the weights of a sum need not be unique",
            )

    def damping(self, rows: Tensor) -> float:
        """Return the ridge for some filters, ``[filters, weights + 1]``; 0 if they are zero."""
        return self.ridge * float(rows.square().sum(1).mean())


@dataclass(frozen=True)
class Udfc(Sums, DataFree):
    """The smallest error of a filter as a weighted sum of the layer's others, ridge included.

    With the batch norm that follows folded in, a filter is ``f_j = (scale_j w_j, shift_j)``; its
    score is the minimum over ``s`` of ``|f_j - sum s_i f_i|^2 + ridge |s|^2``. With
    ``G = F F^T + ridge I`` that is ``1 / (G^-1)_jj - ridge``, for all filters at once.
    """

    sides: ClassVar[tuple[str, ...]] = ("outputs",)

    def score(self, program: Program, layer: Layer, side: str) -> Tensor:
        """Return the errors; a layer of zeros has zeros."""
        rows = self.folded(program, layer)
        ridge = self.damping(rows)
        if ridge == 0:
            return rows.new_zeros(len(rows))
        return 1 / _inverse_diagonal(rows, ridge) - ridge

    def folded(self, program: Program, layer: Layer) -> Tensor:
        """Return the filters with their norm folded in, float64: ``[outputs, weights + 1]``."""
        rows = filters(program, layer, "outputs").double()
        bias = rows.new_zeros(len(rows))
        if layer.bias is not None and layer.bias.op == "get_attr":
            bias = program.tensor(layer.bias).detach().double().expand(len(rows))
        norm = folded(program, layer)
        if norm is not None:
            rows = rows * norm.scale[:, None]
            bias = (bias - norm.mean) * norm.scale + norm.shift
        return torch.cat([rows, self.shift * bias[:, None]], 1)


def _inverse_diagonal(rows: Tensor, ridge: float) -> Tensor:
    """Return the diagonal of ``(rows rows^T + ridge I)^-1``.

    Of more rows than columns it is found on the columns' side, by Woodbury's identity.
    """
    count, width = rows.shape
    eye = torch.eye(min(count, width), dtype=rows.dtype) * ridge
    if count <= width:
        factor = torch.linalg.cholesky(rows @ rows.T + eye)
        return torch.cholesky_inverse(factor).diagonal()
    factor = torch.linalg.cholesky(rows.T @ rows + eye)
    half = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    return (1 - half.square().sum(0)) / ridge
