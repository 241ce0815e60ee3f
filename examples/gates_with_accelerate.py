"""Gates in a loop with accelerate: prepared beside the model, and in step over all processes.

Run it: ``python examples/gates_with_accelerate.py`` (needs ``accelerate``)
"""

from __future__ import annotations

import accelerate
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import narrows
from narrows import training


def main() -> tuple[Tensor, Tensor]:
    """Train, compile, and return what the gated model and the pruned program give."""
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    inputs = torch.randn(256, 8)
    labels = (inputs @ torch.randn(8, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model.append(nn.Linear(16, 4))
    gates = training.GumbelGates(
        model, narrows.capture(model.eval(), (inputs[:2],)), outputs="*", ratio=0.5
    ).to(accelerator.device)
    optimizer = torch.optim.Adam([
        {"params": model.parameters(), "lr": 0.01},
        {"params": gates.parameters(), "lr": 0.05},
    ])  # fmt: skip
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=32)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prepared.train()
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(prepared(x), y) + gates.loss())
            for score in gates.parameters():  # no wrapper averages these
                score.grad = accelerator.reduce(score.grad, "mean")
            gates.step()
            optimizer.step()
    model = accelerator.unwrap_model(prepared).cpu().eval()
    gates.cpu()
    with torch.no_grad():
        gated = model(inputs)
    gates.remove()
    program = narrows.capture(model, (inputs[:2],))
    pruned = narrows.apply(program, gates.plan(program))
    print(f"{program.parameter_count} parameters, pruned {pruned.parameter_count}")
    return gated, pruned(inputs)


if __name__ == "__main__":
    main()
