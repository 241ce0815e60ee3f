"""What became of each goal: a line with the number, the goal, and whether it is met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.reorder.case import EIGHT
from benchmarks.reorder.forms import SAME_FUNCTION
from benchmarks.reorder.ratios import (
    UPSCALE,
    Result,
    against_best,
    geomean,
    moved,
    predicted,
    quickest,
    relative,
    title,
)

SLACK = 1.03  # how much slower counts as not slower

# Against apple-upscale's faster export, ONNX Runtime, batch 1, geometric mean over the eight.
GOAL_2 = {0.3: 0.75, 0.5: 0.82, 0.7: 0.88}
GOAL_3 = 1.08
GOAL_5_DENSENET = {0.5: 0.90}
GOAL_7 = 20.0
GOAL_7_SECONDS = 1.0


def goals(results: Sequence[Result], amount: float) -> list[str]:
    """Return a line per goal at an amount; one without measurements has none."""
    of_amount = [r for r in results if r["amount"] == amount]
    eight = [r for r in of_amount if r["model"] in EIGHT]
    lines = [*goal_1(of_amount, amount), *goal_2(eight, amount), *goal_3(of_amount, amount)]
    for batch in ("1", "8"):
        lines += goal_5(of_amount, amount, f"eager-{batch}")
    return [*lines, *goal_6(of_amount, amount), *goal_7(of_amount, amount)]


def goal_1(results: Sequence[Result], amount: float) -> Iterator[str]:
    """Never slower than the unpruned model, nor than the best other form of the masks."""
    others = [f for f in SAME_FUNCTION if not f.startswith("narrows")]
    yield from _never_slower(f"goal 1 at {amount:g}", results, "onnx-1", others)


def goal_2(results: Sequence[Result], amount: float) -> Iterator[str]:
    """Faster than apple-upscale's faster export."""
    found = [x[0] for r in results if (x := against_best(r, "onnx-1", UPSCALE))]
    goal = GOAL_2.get(amount)
    if found and goal:
        mean = geomean(found)
        yield (
            f"goal 2 at {amount:g}: geomean {mean:.3f} of apple-upscale's faster export over "
            f"{len(found)} of the eight (goal {goal}): {verdict(mean <= goal)}"
        )


def goal_3(results: Sequence[Result], amount: float) -> Iterator[str]:
    """Near the bound of the cost table."""
    found = []
    for r in results:
        facts = predicted(r, "onnx")
        own = relative(r, "onnx-1", "narrows")
        if own is not None and facts:
            found.append((own / (facts["bound"] / facts["original"]), r["model"]))
    if found:
        mean = geomean(x for x, _ in found)
        yield (
            f"goal 3 at {amount:g}: geomean {mean:.3f} of the cost table's bound over "
            f"{len(found)}, farthest {max(found)[1]} {max(found)[0]:.2f} (goal {GOAL_3}): "
            f"{verdict(mean <= GOAL_3)}"
        )


def goal_5(results: Sequence[Result], amount: float, key: str) -> Iterator[str]:
    """In eager torch, never slower than apple-upscale's faster export."""
    yield from _never_slower(f"goal 5 at {amount:g}, {title(key)}", results, key, UPSCALE)
    goal = GOAL_5_DENSENET.get(amount)
    for r in results:
        found = against_best(r, key, UPSCALE) if r["model"] == "densenet121" else None
        if found and goal:
            yield (
                f"goal 5 at {amount:g}, {title(key)}: densenet121 {found[0]:.3f} of {found[1]} "
                f"(goal {goal}): {verdict(found[0] <= goal)}"
            )


def goal_6(results: Sequence[Result], amount: float) -> Iterator[str]:
    """How many bytes are copied, beside apple-upscale; whether any can be spared is not shown."""
    ours = {r["model"]: m for r in results if (m := moved(r, "narrows"))}
    theirs = {r["model"]: m for r in results if (m := moved(r, "upscale-narrow"))}
    if not ours:
        return
    without = sum(count == 0 for count, _ in ours.values())
    line = f"goal 6 at {amount:g}: no copy in {without} of {len(ours)}"
    both = ours.keys() & theirs.keys()
    if both:
        a, b = ([sum(m[model][i] for model in both) for i in (0, 1)] for m in (ours, theirs))
        line += (
            f"; {a[0]} copies of {a[1]:.1f} MB where apple-upscale makes {b[0]} of {b[1]:.1f} MB "
            f"(over {len(both)})"
        )
    yield line


def goal_7(results: Sequence[Result], amount: float) -> Iterator[str]:
    """Plan and rewrite, everything for the target, beside apple-upscale's compute and prune.

    Theirs is one run, kept with the form. `benchmarks.compile_time` runs both in turns, and has the
    work that is alike, too.
    """
    ours = {
        r["model"]: f["seconds"]
        for r in results
        if "seconds" in (f := r["forms"].get("narrows", {}))
    }
    if not ours:
        return
    slowest = max(ours, key=lambda m: ours[m])
    yield (
        f"goal 7 at {amount:g}: slowest plan and rewrite {slowest} {ours[slowest]:.2f} s "
        f"(goal {GOAL_7_SECONDS:g}): {verdict(ours[slowest] <= GOAL_7_SECONDS)}"
    )
    found = [
        q["seconds"] / ours[r["model"]]
        for r in results
        if r["model"] in ours and "seconds" in (q := quickest(r))
    ]
    if found:
        mean = geomean(found)
        yield (
            f"goal 7 at {amount:g}: geomean {mean:.1f}x faster than apple-upscale over "
            f"{len(found)}, least {min(found):.1f}x (goal {GOAL_7:g}x): {verdict(mean >= GOAL_7)}"
        )


def _never_slower(
    name: str, results: Sequence[Result], key: str, others: Sequence[str]
) -> Iterator[str]:
    found = [(*x, r["model"]) for r in results if (x := against_best(r, key, others))]
    if not found:
        return
    fine = sum(x <= SLACK for x, *_ in found)
    worst, form, model = max(found)
    yield (
        f"{name}: {fine} of {len(found)} not slower than the best other form, worst {model} "
        f"{worst:.3f} of {form} (goal {SLACK}): {verdict(worst <= SLACK)}"
    )


def verdict(met: bool) -> str:
    """Return whether a goal is met, in a word."""
    return "met" if met else "missed"
