"""Orders of channels: the consecutive-ones test, and the choice where one cannot serve all."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from functools import cache
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import PassError
from narrows.passes.forms.order import Order, Reader, choose_order, consecutive, runs_needed
from narrows.passes.forms.ordersearch import Search, conflicting_triples

Sets = list[frozenset[int]]

modest = settings(max_examples=100, derandomize=True, deadline=None, database=None)


@cache
def all_places(width: int) -> np.ndarray:
    """The place of each channel in every order of ``range(width)``: ``[orders, channels]``."""
    return np.array(list(permutations(range(width))), dtype=np.int8).reshape(-1, width)


def served(width: int, channels: Collection[int], prefix: bool = False) -> np.ndarray:
    """Which of all orders serve a reader, by definition."""
    places = all_places(width)[:, sorted(channels)]
    if not channels:
        return np.ones(len(places), dtype=bool)
    low = 0 if prefix else places.min(axis=1)
    return places.max(axis=1) - low == len(channels) - 1


def least_cost(width: int, readers: Sequence[Reader], together: Sets) -> float | None:
    """The least cost of any order that keeps ``together``."""
    costs = sum(
        (r.weight * ~served(width, r.channels, r.prefix) for r in readers),
        np.zeros(len(all_places(width))),
    )
    allowed = np.ones(len(costs), dtype=bool)
    for block in together:
        allowed &= served(width, block)
    return float(costs[allowed].min()) if allowed.any() else None


def serves(order: Sequence[int], reader: Reader) -> bool:
    """Whether an order serves a reader, once more by definition."""
    places = sorted(order.index(c) for c in reader.channels)
    first = 0 if reader.prefix or not places else places[0]
    return places == list(range(first, first + len(places)))


def displacement(universe: Sequence[int], order: Sequence[int]) -> int:
    return sum((universe.index(c) - order.index(c)) ** 2 for c in universe)


def families(width: int, most: int) -> st.SearchStrategy[Sets]:
    return st.lists(st.frozensets(st.integers(0, width - 1)), max_size=most)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[Reader], Sets]:
    """A universe in any order, up to six readers of small weights, and sets to keep together."""
    width = draw(st.integers(1, 7))
    weights = st.sampled_from([0.0, 0.1, 1.0, 1.0, 2.0, 3.5])
    readers = [
        Reader(channels, draw(weights), prefix=draw(st.integers(0, 4)) == 0)
        for channels in draw(families(width, 6))
    ]
    return draw(st.permutations(range(width))), readers, draw(families(width, 2))


def shuffled_intervals(width: int, number: int, seed: int) -> Sets:
    """Intervals of one hidden order."""
    source = random.Random(seed)
    hidden = source.sample(range(width), width)
    ends = (sorted(source.sample(range(width + 1), 2)) for _ in range(number))
    return [frozenset(hidden[first:last]) for first, last in ends]


def small_sets(width: int, number: int, size: int, seed: int) -> list[Reader]:
    source = random.Random(seed)
    return [Reader(source.sample(range(width), size), source.randint(1, 4)) for _ in range(number)]


def forbidden() -> dict[str, Sets]:
    """Tucker's matrices: the minimal families that no order serves, the endless ones up to k=4."""
    found: dict[str, Sets] = {
        "IV": [frozenset(s) for s in ({0, 1}, {2, 3}, {4, 5}, {1, 3, 5})],
        "V": [frozenset(s) for s in ({0, 1}, {2, 3}, {0, 1, 2, 3}, {0, 3, 4})],
    }
    for k in range(1, 5):
        path = [frozenset({i, i + 1}) for i in range(k + 1)]
        last, other = k + 1, k + 2
        found[f"I({k})"] = [*path, frozenset({last, 0})]
        found[f"II({k})"] = [
            *path,
            frozenset({*range(last), other}),
            frozenset({*range(1, last + 1), other}),
        ]
        found[f"III({k})"] = [*path, frozenset({*range(1, last), other})]
    return found


@modest
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), families(n, 6))))
def test_an_order_is_found_exactly_where_one_exists(case: tuple[int, Sets]) -> None:
    width, sets = case
    exists = least_cost(width, [], sets) is not None
    order = consecutive(range(width), sets)
    assert (order is not None) == exists
    if order is not None:
        assert sorted(order) == list(range(width))
        assert all(runs_needed(order, s) <= 1 for s in sets)


@modest
@given(problems())
def test_the_choice_costs_the_least(problem: tuple[list[int], list[Reader], Sets]) -> None:
    universe, readers, together = problem
    least = least_cost(len(universe), readers, together)
    if least is None:
        with pytest.raises(PassError, match="stay together"):
            choose_order(universe, readers, together=together)
        return
    chosen = choose_order(universe, readers, together=together)
    assert sorted(chosen.channels) == sorted(universe)
    assert all(runs_needed(chosen.channels, block) <= 1 for block in together)
    assert chosen.exact
    assert chosen.cost == chosen.bound == pytest.approx(least, abs=1e-12)
    assert chosen.satisfied == tuple(serves(chosen.channels, reader) for reader in readers)


@modest
@given(problems(), st.integers(0, 3000))
def test_bound_and_cost_hold_wherever_the_search_is_cut_short(
    problem: tuple[list[int], list[Reader], Sets], effort: int
) -> None:
    universe, readers, together = problem
    least = least_cost(len(universe), readers, together)
    if least is None:
        return
    chosen = choose_order(universe, readers, together=together, effort=effort)
    assert chosen.bound <= least + 1e-12
    assert chosen.cost >= least - 1e-12
    assert chosen.exact == (chosen.gap == 0)
    assert all(runs_needed(chosen.channels, block) <= 1 for block in together)


@modest
@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.permutations(range(n)), families(n, 3))))
def test_of_all_orders_that_serve_it_is_the_nearest(case: tuple[list[int], Sets]) -> None:
    universe, sets = case
    order = consecutive(universe, sets)
    if order is None:
        return
    width = len(universe)
    allowed = np.ones(len(all_places(width)), dtype=bool)
    for channels in sets:
        allowed &= served(width, channels)
    now = np.array([universe.index(c) for c in range(width)])
    nearest = ((all_places(width)[allowed] - now) ** 2).sum(axis=1).min()
    assert displacement(universe, order) == nearest


@pytest.mark.parametrize("name", forbidden())
def test_tuckers_families_are_refused_and_any_part_of_them_is_not(name: str) -> None:
    family = forbidden()[name]
    universe = sorted(frozenset().union(*family))
    assert consecutive(universe, family) is None
    for part in combinations(family, len(family) - 1):
        assert consecutive(universe, part) is not None
    for column in universe:
        rest = [c for c in universe if c != column]
        assert consecutive(rest, [channels - {column} for channels in family]) is not None
    chosen = choose_order(universe, [Reader(s, 2 + i) for i, s in enumerate(family)])
    assert (chosen.cost, chosen.exact) == (2, True)


def test_conflicts_of_three_sets_are_exactly_those_that_no_order_serves() -> None:
    # What matters is which of the seven parts of three sets' diagram have an element.
    for parts in range(1 << 7):
        columns = [part + 1 for part in range(7) if parts >> part & 1]
        sets = [{i for i, part in enumerate(columns) if part >> k & 1} for k in range(3)]
        masks = [sum(1 << i for i in channels) for channels in sets]
        conflict = conflicting_triples(masks, max(1, len(columns)))
        refused = consecutive(range(len(columns)), sets) is None
        assert all(conflict[order] == refused for order in permutations(range(3)))
        assert conflict.sum() == 6 * refused


@modest
@given(
    st.lists(st.integers(1, 2**6 - 1), min_size=3, max_size=7, unique=True),
    st.lists(st.integers(1, 5), min_size=7, max_size=7),
    st.integers(0, 3000),
)
def test_what_the_search_proves_is_so(masks: list[int], weights: list[int], effort: int) -> None:
    weights = sorted(weights[: len(masks)], reverse=True)
    sets = [frozenset(i for i in range(6) if mask >> i & 1) for mask in masks]
    least = least_cost(6, [Reader(s, w) for s, w in zip(sets, weights, strict=True)], [])
    kept, bound = Search(6, masks, weights).best((), effort)
    assert least is not None
    assert consecutive(range(6), [sets[i] for i in kept]) is not None
    assert bound <= least <= sum(weights) - sum(weights[i] for i in kept)


@pytest.mark.parametrize(
    ("width", "readers"),
    [
        (5, "14:2 013:5 023:3 012:4 12:5 024:3 02:1"),
        (7, "356:2 36:3 013:2 05:4 256:3 04:3 36:1 56:3 35:3"),
        (7, "16:2 046:4 14:1 06:1 136:2 245:1 24:1 256:5 24:1"),
        (6, "14:1 05:3 024:2 23:5 25:5 124:4 034:5 25:2 13:4 345:1"),
    ],
)
def test_the_search_finds_what_greedy_choices_and_exchanges_miss(width: int, readers: str) -> None:
    pairs = (text.split(":") for text in readers.split())
    family = [Reader([int(c) for c in channels], float(weight)) for channels, weight in pairs]
    chosen = choose_order(range(width), family)
    assert chosen.exact
    assert chosen.cost == least_cost(width, family, [])


def test_an_order_that_serves_all_stays_as_it_is() -> None:
    universe = [5, 3, 8, 1, 9, 0]
    readers = [Reader({3, 8}), Reader({8, 1, 9}), Reader({5, 3}, prefix=True)]
    chosen = choose_order(universe, readers, together=[{1, 9, 0}, {9, 1}])
    assert chosen.channels == tuple(universe)
    assert chosen.satisfied == (True, True, True)
    assert (chosen.cost, chosen.exact) == (0, True)


def test_what_is_served_now_goes_only_for_more_weight() -> None:
    cycle = [Reader({0, 2}), Reader({0, 1}), Reader({1, 2})]
    assert choose_order(range(3), cycle).channels == (0, 1, 2)
    heavier = [Reader({0, 2}, 1.5), *cycle[1:]]
    assert choose_order(range(3), heavier).satisfied[0]


def test_readers_that_any_order_serves_change_nothing() -> None:
    trivial = [Reader(()), Reader({4}), Reader(range(5)), Reader((), 1, True), Reader({1, 3}, 0)]
    chosen = choose_order(range(5), [*trivial, Reader(range(5), 1, True)])
    assert chosen.channels == (0, 1, 2, 3, 4)
    assert chosen.satisfied == (True, True, True, True, False, True)
    assert (chosen.cost, chosen.bound, chosen.exact) == (0, 0, True)
    assert choose_order((), [Reader(())]) == Order((), (True,), 0, 0, True, 0)
    assert consecutive((), [()]) == ()


def test_equal_readers_weigh_together() -> None:
    readers = [Reader({0, 1}, 2), Reader({1, 2}, 2), Reader({0, 2}), Reader([2, 0, 2], 1.5)]
    chosen = choose_order(range(3), readers)
    assert chosen.cost == 2
    assert chosen.satisfied[2:] == (True, True)


def test_weights_of_any_magnitude_are_summed_without_rounding() -> None:
    # In floats, 1e16 + 1 is 1e16: the light readers would not count.
    far = [Reader({3, 4}, 1e16), Reader({4, 5}, 1e16), Reader({3, 5}, 1e16)]
    near = [Reader({0, 1}, 1.0), Reader({1, 2}, 1.0), Reader({0, 2}, 1 + 2**-52)]
    chosen = choose_order(range(6), [*far, *near])
    assert chosen.exact
    assert chosen.satisfied[5]
    assert sum(chosen.satisfied) == 4


def test_blocks_stay_together_and_may_be_nested() -> None:
    blocks = [range(4), range(4, 8), range(8)]
    readers = [Reader({0, 2, 5}), Reader({5, 7}), Reader({3, 9}), Reader({9, 10})]
    chosen = choose_order(range(12), readers, together=blocks)
    assert all(runs_needed(chosen.channels, block) == 1 for block in blocks)
    assert chosen.satisfied == (True, True, True, True)
    # Beside the block only one of two readers fits, however much they weigh.
    cycle = [Reader({1, 2}, 30), Reader({0, 2}, 20)]
    assert choose_order(range(3), cycle, together=[{0, 1}]).satisfied == (True, False)
    # One that would begin inside one block and end inside another, with a third between.
    torn = choose_order(range(6), [Reader({1, 2, 4})], together=[{0, 1}, {2, 3}, {4, 5}])
    assert (torn.satisfied, torn.cost, torn.exact) == ((False,), 1, True)


def test_a_stream_shrinks_by_prefix() -> None:
    live = [{0, 1, 2, 3, 4, 5}, {5, 0, 3, 1}, {3, 5}]
    chosen = choose_order(range(8), [Reader(channels, prefix=True) for channels in live])
    assert chosen.channels == (3, 5, 0, 1, 2, 4, 6, 7)
    backwards = [Reader(range(i, 8), prefix=True) for i in range(8)]
    assert choose_order(range(8), backwards).channels == (7, 6, 5, 4, 3, 2, 1, 0)
    both = [Reader({6, 7}, 1, prefix=True), Reader({0, 1}, 2, prefix=True), Reader({7, 0})]
    assert choose_order(range(8), both).satisfied == (False, True, True)


def test_the_same_arguments_give_the_same_order() -> None:
    readers = small_sets(40, 30, 3, seed=5)
    again = [Reader(list(r.channels)[::-1], r.weight) for r in readers]
    first = choose_order(range(40), readers, effort=60_000)
    assert first == choose_order(range(40), again, effort=60_000)


def test_a_hard_choice_is_bounded_in_effort_and_reports_its_gap() -> None:
    readers = small_sets(40, 40, 3, seed=0)
    chosen = choose_order(range(40), readers, effort=60_000)
    assert not chosen.exact
    assert 0 < chosen.bound < chosen.cost
    assert chosen.cost == sum(
        r.weight for r, done in zip(readers, chosen.satisfied, strict=True) if not done
    )
    assert 60_000 <= chosen.effort < 80_000
    assert chosen.cost <= 51  # greedy choices end at 54; the least is 45, after 9 million looks


def test_of_unrelated_readers_two_are_served_and_that_is_proven() -> None:
    source = random.Random(3)
    readers = [Reader(source.sample(range(256), 180), source.random()) for _ in range(24)]
    chosen = choose_order(range(256), readers)
    heaviest = sorted(reader.weight for reader in readers)[-2:]
    assert chosen.exact
    assert chosen.cost == pytest.approx(sum(r.weight for r in readers) - sum(heaviest))


def test_blocks_that_no_reader_joins_are_ordered_each_for_itself() -> None:
    """More sets than are told apart at once, and they fall into two components."""
    draw = random.Random(5)
    blocks = [range(40), range(40, 80)]
    readers = [
        [Reader(draw.sample(block, draw.randint(2, 30)), draw.randint(1, 9)) for _ in range(36)]
        for block in blocks
    ]
    joint = choose_order(range(80), [*readers[0], *readers[1]], together=blocks, effort=10**9)
    alone = [choose_order(b, r, effort=10**9) for b, r in zip(blocks, readers, strict=True)]
    assert joint.bound <= joint.cost
    assert {*joint.channels[:40]} in ({*blocks[0]}, {*blocks[1]})
    assert joint.cost == sum(chosen.cost for chosen in alone)
    assert joint.bound == sum(chosen.bound for chosen in alone)


def test_the_search_costs_by_readers_and_not_by_channels() -> None:
    few = shuffled_intervals(48, 16, seed=1)
    orders = []
    for copies in (2, 32):  # of each channel
        family = [[c * copies + i for c in channels for i in range(copies)] for channels in few]
        orders.append(choose_order(range(48 * copies), [Reader(s) for s in family]))
    narrow, wide = orders
    assert narrow.cost == wide.cost == 0
    assert narrow.effort == wide.effort


@pytest.mark.parametrize("number", [16, 64, 256])
def test_a_feasible_family_costs_a_reduction_per_reader(number: int) -> None:
    sets = shuffled_intervals(4 * number, number, seed=number)
    chosen = choose_order(range(4 * number), [Reader(s) for s in sets])
    assert all(chosen.satisfied)
    assert chosen.effort <= number * (2 * number + 64)


def test_deep_nesting_needs_no_deep_stack() -> None:
    width = 1200
    nested = [range(i, width) for i in reversed(range(1, width))]
    assert consecutive(range(width), nested) == tuple(range(width))
    # Splits every level: the innermost channel has to come to the end of each.
    assert consecutive(range(width), [*nested, {0, width - 1}]) == (*range(1, width), 0)


def test_runs_are_counted() -> None:
    sets = ([], [2], [0, 2], [4, 0, 3], [4, 2, 1, 3])
    assert [runs_needed([4, 2, 0, 1, 3], s) for s in sets] == [0, 1, 1, 3, 2]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(PassError, match="channel 7 is not one of the 3"):
        choose_order(range(3), [Reader({1, 7})])
    with pytest.raises(PassError, match="channel 2 stands twice"):
        consecutive([1, 2, 2], [])
    with pytest.raises(PassError, match="channel 9"):
        runs_needed([0, 1], [9])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PassError, match="weight"):
            choose_order(range(3), [Reader({1}, weight)])
    with pytest.raises(PassError, match="stay together"):
        choose_order(range(3), [], together=[{0, 1}, {1, 2}, {0, 2}])
