"""Threads of one process that compile, save and load at once."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

import narrows


def test_threads_compile_at_once(tmp_path: Path):
    models = [nn.Linear(6, width).eval() for width in (3, 4)]
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    found: dict[int, np.ndarray] = {}
    raised: list[BaseException] = []

    def work(number: int) -> None:
        try:
            made = narrows.compile(models[number], (x,))
            made.save(tmp_path / "shared")
            narrows.load(tmp_path / "shared").run(x)
            found[number] = narrows.load(made.save(tmp_path / str(number))).run(x)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    for number, model in enumerate(models):
        np.testing.assert_allclose(found[number], model(x).detach().numpy(), atol=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"shared", "0", "1"}
