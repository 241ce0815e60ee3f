"""Gates in a LightningModule: the loss, the step, and the plan at the end.

Run it: ``python examples/gates_with_lightning.py`` (needs ``lightning``)
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import narrows
from narrows import training
from narrows.ir.program import Program


class Pruned(lightning.LightningModule):
    """A classifier that is trained with gates; both are submodules, and so are moved and saved."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        super().__init__()
        self.model = model
        self.gates = training.GumbelGates(model, program, outputs="*", ratio=0.5)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the task's loss and the gates' own."""
        inputs, labels = batch
        return F.cross_entropy(self.model(inputs), labels) + self.gates.loss()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Advance the gates: gradients are there, and the optimizer has not moved yet."""
        self.gates.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the weights and, faster, of the gates."""
        return torch.optim.Adam([
            {"params": self.model.parameters(), "lr": 0.01},
            {"params": self.gates.parameters(), "lr": 0.05},
        ])  # fmt: skip


def main() -> tuple[Tensor, Tensor]:
    """Train, compile, and return what the gated model and the pruned program give."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    labels = (inputs @ torch.randn(8, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model.append(nn.Linear(16, 4))
    module = Pruned(model, narrows.capture(model.eval(), (inputs[:2],)))
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model.train()
    trainer.fit(module, DataLoader(TensorDataset(inputs, labels), batch_size=32))
    with torch.no_grad():
        gated = model.eval()(inputs)
    module.gates.remove()
    program = narrows.capture(model, (inputs[:2],))
    pruned = narrows.apply(program, module.gates.plan(program))
    print(f"{program.parameter_count} parameters, pruned {pruned.parameter_count}")
    return gated, pruned(inputs)


if __name__ == "__main__":
    main()
