"""Threads of one process that compile, save and load at once."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

import narrows


def test_threads_compile_at_once(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    found: dict[float, np.ndarray] = {}
    raised: list[BaseException] = []

    def work(ratio: float) -> None:
        try:
            made = narrows.compile(model, (x,), {"ratio": ratio})
            made.save(tmp_path / "shared")
            narrows.load(tmp_path / "shared").run(x)
            found[ratio] = narrows.load(made.save(tmp_path / str(ratio))).run(x)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(ratio,)) for ratio in (0.2, 0.4, 0.6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    for ratio, result in found.items():
        alone = narrows.compile(model, (x,), {"ratio": ratio})
        assert np.array_equal(result, alone.run(x))
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"shared", "0.2", "0.4", "0.6"}
