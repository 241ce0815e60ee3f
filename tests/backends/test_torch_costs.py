"""The cost table of eager PyTorch: what ships, and a calibration of very few probes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from narrows.backends import make_target
from narrows.backends.torch import costs, probes
from narrows.backends.torch.eager import EagerTable
from narrows.backends.torch.probes import Probe
from narrows.ir.work import Work

CONV = Work(
    "conv", "conv2d", inputs=64, outputs=64, kernel=(3, 3), stride=(1, 1), space=(28, 28),
    source=(28, 28),
)  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Probe]:
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path))
    wanted = [*probes._conv(1, 7, 16, 16, (1, 1), 1), *probes._moves(7)]
    monkeypatch.setattr(probes, "probes", lambda quick: iter(wanted))
    return wanted


def test_the_shipped_table_prices_what_models_do() -> None:
    table = costs.TABLES.shipped()
    assert costs.TABLES.file.stat().st_size < 50_000
    assert table.layout.block == 1
    wider = table.seconds(CONV.resized(inputs=128, outputs=128))
    assert 0 < table.seconds(CONV) < wider
    assert {p.grid for p in probes.probes(False)} == set(table.grids)


def test_a_slice_of_one_example_is_cheaper_than_of_several() -> None:
    table = costs.TABLES.shipped()
    one = table.copy_seconds("slice", 512, 256, (28, 28), 1)
    assert one < table.copy_seconds("slice", 64, 32, (28, 28), 8)


def test_the_target_has_it_for_eager_code_alone() -> None:
    assert isinstance(make_target("torch").costs(), EagerTable)
    assert make_target("torch", form="aot").costs() is None


def test_a_calibration(few: list[Probe]) -> None:
    told: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    table, complete = costs.calibrate(tell=lambda done, all: told.append((done, all)))
    assert complete
    assert told[-1] == (len(few), len(few))
    assert torch.get_num_threads() == threads
    assert set(table.grids) == {p.grid for p in few}
    assert table.runtime == costs.TABLES.version()
    path = costs.TABLES.keep(table)
    assert costs.TABLES.current().made == table.made
    path.unlink()


def test_an_interrupt_keeps_what_is_whole(
    few: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> probes.Call:
        raise KeyboardInterrupt

    few[1:] = [Probe("gather", ("elements",), (1.0,), stop)]
    table, complete = costs.calibrate()
    assert not complete
    shipped = costs.TABLES.shipped().grids
    for name in ("plain conv 1x1/1", "gather"):  # at more sizes than the one that was measured
        assert table.grids[name].us.shape == shipped[name].us.shape


def test_a_quick_one_fills_up_from_the_table_there_is(few: list[Probe]) -> None:
    table, complete = costs.calibrate(quick=True)
    assert complete
    assert set(table.grids) == set(costs.TABLES.shipped().grids)
