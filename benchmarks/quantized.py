"""Quantized models: are they the same numbers everywhere, and how fast are they?

    python -m benchmarks.quantized exactness [--models resnet18 ...] [--size 64] [--images 2]
    python -m benchmarks.quantized exactness --zoo DIR --models resnet20_cifar10 ... [--images 100]
    python -m benchmarks.quantized speed [--models resnet18 ...] [--size 224] [--rounds 15]
    python -m benchmarks.quantized speed --models resnet18 --ratio 0.3
    python -m benchmarks.quantized exactness --models resnet18 --activations 16

*exactness* counts the output elements in which the fake-quantized program, the integer program and
ONNX Runtime (with its optimizations and without, in every form asked for) differ; all are 0 or it
exits with 1. *speed* runs the quantized model against the float one and against
``onnxruntime.quantization.quantize_static`` (U8S8, per channel, its best setting on x86), in turns,
on one thread, and prints the medians of thread CPU time; with ``--ratio`` the quantized model has
lost that share of its channels before, the others have not. Weights are random, norms have the
statistics of random images: what is measured does not hang on the weights. ``--zoo`` takes trained
networks and their images from a folder as `benchmarks.quantized_accuracy` does. With more than 8
bits of activations float32 does not hold the accumulators, and the fake-quantized program differs
in it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import narrows
from benchmarks.machine import table, write
from benchmarks.quantized_accuracy import load_zoo
from narrows.backends.onnx.session import MODEL
from narrows.passes.quant.measure import decibels

MODELS = (
    "resnet18", "mobilenet_v2", "densenet121", "googlenet", "regnet_y_400mf",
    "shufflenet_v2_x1_0", "timm/efficientnet_lite0", "timm/vit_tiny_patch16_224",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False, "aux_logits": False}}
FIXED_SIZE = {"timm/vit_tiny_patch16_224": 224}
WARM = 2


def build(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """Return a model with random weights and settled norms, and two images."""
    from tests.networks.zoo import import_models

    torch.manual_seed(0)
    models = import_models()
    if name.startswith("timm/"):
        import timm

        module = timm.create_model(name.removeprefix("timm/"), pretrained=False)
    else:
        module = getattr(models, name)(weights=None, **OPTIONS.get(name, {}))
    settle_norms(module, size)
    return module.eval(), torch.randn(2, 3, size, size)


def settle_norms(module: nn.Module, size: int) -> None:
    """Give the norms of a network the statistics of random images."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        module.train()(torch.randn(8, 3, size, size))
    module.eval()


# ------------------------------------------------------------------ exactness


def random_case(name: str, size: int, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model with random weights, images to calibrate it on, and images to compare."""
    module, x = build(name, size)
    return module, x, torch.randn(images, 3, size, size)


def trained_case(zoo: Any, name: str, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a trained model, images to calibrate it on, and images to compare."""
    if zoo.MODELS[name]["data"] == "cifar10":
        x, (data, _) = zoo.load_cifar10_calib(64)[0], zoo.load_cifar10_test(images)
    else:
        (x, _), (data, _) = (
            zoo.load_imagenet_sample(part, n) for part, n in (("calib", 16), ("val", images))
        )
    return zoo.load(name), zoo.preprocess(name, x), zoo.preprocess(name, data)


def exactness(
    name: str, module: nn.Module, x: Tensor, data: Tensor, forms: Sequence[str], bits: int
) -> dict[str, Any]:
    """Return how many output elements differ from the integer program's, by who computed them, and
    the signal-to-noise ratio of that in dB."""
    program = narrows.capture(module, (x[:2],), name=name.replace("/", "_"))
    quantized = narrows.quantize(program, [x], activations=bits, check=False)
    expected, exact = quantized.program(data), program(data)
    noise = float((expected - exact).double().square().sum())
    found: dict[str, Any] = {
        "outputs": expected.numel(),
        "islands": len(quantized.plan.floats),
        "dB": decibels(float(exact.double().square().sum()), noise),
        "fake float64": _differing(quantized.fake.to(torch.float64)(data.double()), expected),
        "fake float32": _differing(quantized.fake(data), expected),
    }
    for form in forms:
        artifact = narrows.lower(quantized.program, form=form, check=False)
        for optimize in (True, False):
            (got,) = artifact.run_flat([data], threads=1, optimize=optimize)
            found[f"{form} {'fused' if optimize else 'plain'}"] = _differing(got, expected)
    return found


def _differing(actual: Any, expected: Tensor) -> int:
    return int((torch.as_tensor(actual).double() != expected.double()).sum())


# ------------------------------------------------------------------ speed


def speed(name: str, size: int, rounds: int, ratio: float | None, bits: int) -> dict[str, Any]:
    """Return median thread CPU times in milliseconds: float, quantize_static's, and ours."""
    module, x = build(name, size)
    program = narrows.capture(module, (x,), name=name.replace("/", "_"))
    with tempfile.TemporaryDirectory() as folder:
        floats = narrows.lower(narrows.apply(program), check=False)
        if ratio is not None:
            plan = narrows.plan(program, ratio=ratio, target="onnx")
            program = narrows.apply(program, plan, target="onnx")
        integers = narrows.quantize(program, [x], activations=bits, check=False).program
        ours = narrows.lower(integers, check=False)
        static = Path(folder) / "static.onnx"
        quantize_static(floats.folder / MODEL, static, x.numpy())
        paths = {
            "float": floats.folder / MODEL, "static": static, "narrows": ours.folder / MODEL,
        }  # fmt: skip
        runs = {key: _runner(path, x[:1].numpy()) for key, path in paths.items()}
        times = _in_turns(runs, rounds)
    found: dict[str, Any] = {k: 1e3 * statistics.median(t) for k, t in times.items()}
    ratios = zip(times["float"], times["narrows"], times["static"], strict=True)
    pairs = [(f / n, s / n) for f, n, s in ratios]
    found["against float"] = statistics.median(p[0] for p in pairs)
    found["against static"] = statistics.median(p[1] for p in pairs)
    return found


def quantize_static(model: Path, out: Path, images: np.ndarray) -> None:
    """Write what ONNX Runtime's own tool makes of a float model: QDQ, U8S8, per channel."""
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": image[None]} for image in images]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    import onnx

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    reader = Reader()
    name = onnx.load(prepared).graph.input[0].name
    reader.left = [{name: item["x"]} for item in reader.left]
    ort.quantize_static(
        str(prepared), str(out), reader, quant_format=ort.QuantFormat.QDQ, per_channel=True,
        activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
    )  # fmt: skip


def _runner(path: Path, x: np.ndarray) -> Callable[[], None]:
    import onnxruntime

    from narrows.backends.onnx.session import session_options

    options = session_options(threads=1)
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)


def _in_turns(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {key: [] for key in runs}
    for turn in range(WARM + rounds):
        order = list(runs.items())
        for key, run in order if turn % 2 else reversed(order):
            start = time.thread_time()
            run()
            if turn >= WARM:
                times[key].append(time.thread_time() - start)
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; return 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("exactness", "speed"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--forms", nargs="+", default=["qdq", "qlinear"])
    parser.add_argument("--zoo", metavar="DIR", help="of trained networks, for exactness")
    parser.add_argument("--ratio", type=float, help="of channels to prune, for speed")
    parser.add_argument("--activations", type=int, default=8, metavar="BITS")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    zoo = load_zoo(arguments.zoo) if arguments.zoo else None
    for name in arguments.models:
        size = FIXED_SIZE.get(name, arguments.size)
        if arguments.what == "speed":
            how = (arguments.rounds, arguments.ratio, arguments.activations)
            results[name] = speed(name, size, *how)
        elif zoo is not None:
            case = trained_case(zoo, name, arguments.images)
            results[name] = exactness(name, *case, arguments.forms, arguments.activations)
        else:
            case = random_case(name, size, arguments.images)
            results[name] = exactness(name, *case, arguments.forms, arguments.activations)
        print(name, results[name], file=sys.stderr, flush=True)
    header = ["model", *next(iter(results.values()))]
    cells = [[n, *(f"{v:.4g}" for v in r.values())] for n, r in results.items()]
    print(table(header, cells))
    write(arguments.json, results)
    keys = ("fake float64", "fused", "plain")
    wrong = any(v for r in results.values() for k, v in r.items() if k.endswith(keys))
    return int(arguments.what == "exactness" and wrong)


if __name__ == "__main__":
    sys.exit(main())
