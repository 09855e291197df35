"""Do initial weights do what their formulas say? The sources' study of initialisation, repeated.

Needs the MNIST files: PELLUCID_DATA, see `pellucid.data.mnist`. Each number is taken for 20 seeds,
none left out; the sources print one run each. `x` is the first 100 validation images, normalised
as the training data are. Codes are those of the project's list of features.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from measure import report, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from pellucid.data import first, mnist
from pellucid.init import (
    fans,
    fixup,
    init_kaiming,
    init_orthogonal,
    init_xavier,
    lsuv,
    study_init,
)
from pellucid.nn import Residual, gain_of
from pellucid.vision import simple_cnn

N_SEEDS = 20


@cache
def images() -> tuple[Tensor, Tensor, Tensor]:
    """Return 100 validation images, their labels, and a training batch of 512."""
    data = mnist(512, split="course")
    x, y = (part[:100] for part in next(iter(data.valid)))
    return data.prepare(x, False), y.float(), data.prepare(first(data.train)[0], False)


def conv1() -> nn.Conv2d:
    return nn.Conv2d(1, 32, 5)


def after_relu(layer: nn.Module) -> float:
    return layer(images()[0]).relu().std().item()


def one_layer() -> Iterator[tuple[str, float, float]]:
    """Q1 and Q4: one convolution."""
    layer = conv1()
    yield "Q1 Conv2d(1, 32, 5): sd of weights", 0.1156, layer.weight.std().item()
    yield "Q1 sd of outputs", 0.5978, layer(images()[0]).std().item()
    yield "Q1 sd after ReLU, torch's default", 0.3653, after_relu(layer)
    init_kaiming(layer)
    yield "Q1 sd after ReLU, Kaiming normal", 1.0199, after_relu(layer)
    init_kaiming(layer, uniform=True)
    yield "Q4 sd after ReLU, Kaiming uniform, a = 0", 1.0921, after_relu(layer)
    init_kaiming(layer, a=math.sqrt(5), uniform=True)
    yield "Q4 sd after ReLU, Kaiming uniform, a = √5", 0.3437, after_relu(layer)


def squared_error(preds: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(preds.flatten(), targets)


def four_layers() -> Iterator[tuple[str, float | None, float]]:
    """Q5: variance shrinks with depth."""
    x, y, _ = images()
    widths = (1, 8, 16, 32, 1)
    layers: list[nn.Module] = []
    for before, after, kernel in zip(widths, widths[1:], (5, 3, 3, 3), strict=False):
        layers += [nn.Conv2d(before, after, kernel, 2, kernel // 2), nn.ReLU()]
    model = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    default = model(x).std().item()
    yield "Q5 four convolutions: sd of outputs, default", 0.0065, default
    yield "Q5 sd of the first gradient, default", 0.0333, first_gradient(model, x, y)
    init_kaiming(model, uniform=True)
    kaiming = model(x).std().item()
    yield "Q5 sd of outputs, Kaiming uniform", 0.4043, kaiming
    yield "Q5 sd of the first gradient, Kaiming uniform", 0.4231, first_gradient(model, x, y)
    yield "Q5 outputs, Kaiming / default", 0.4043 / 0.0065, kaiming / default
    lsuv(model, x)
    yield "   sd of outputs, LSUV", None, model(x).std().item()


def first_gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return study_init(model, (x, y), squared_error).layers[0].grad_sd


def products() -> Iterator[tuple[str, float | None, float]]:
    """Q6 and Q8: a hundred products with matrices of 512×512."""
    x = torch.randn(512)
    grown, n = x, 0
    while grown.isfinite().all() and grown.std().isfinite():
        grown, n = torch.randn(512, 512) @ grown, n + 1
    yield "Q6 products with N(0, 1) until sd is not finite", 28, n
    yield "Q6 sd after 100 products with 0.01 N(0, 1)", 0.0, many(x, lambda w: w.mul_(0.01))
    layer = nn.Linear(512, 512, bias=False)

    def xavier(weights: Tensor) -> Tensor:
        init_xavier(layer)
        return layer.weight.detach()

    def orthogonal(weights: Tensor) -> Tensor:
        init_orthogonal(layer)
        return layer.weight.detach()

    yield "Q6 sd after 100 products, Xavier", 0.93, many(x, xavier)
    yield "Q8 sd after 100 products, orthogonal", None, many(x, orthogonal)


def many(x: Tensor, init: Callable[[Tensor], Tensor]) -> float:
    for _ in range(100):
        x = init(torch.randn(512, 512)) @ x
    return x.std().item()


def magic_numbers() -> Iterator[tuple[str, float, float]]:
    """Q7: what one product does, the mean of 100."""
    gain = gain_of(torch.relu)
    weights, x = torch.randn(100, 512, 512), torch.randn(100, 512, 1)
    y = weights @ x
    yield "Q7 y = Wx: mean of y²", 516.79, y.square().mean().item()
    yield "Q7 after ReLU: mean", 9.0, y.relu().mean().item()
    yield "Q7 after ReLU: mean of squares", 257, y.relu().square().mean().item()
    scaled = (y * gain / math.sqrt(512)).relu()
    yield "Q7 W √(2 / 512), ReLU: mean", 0.564, scaled.mean().item()
    yield "Q7 W √(2 / 512), ReLU: mean of squares", 1.0055, scaled.square().mean().item()
    single = torch.randn(10_000) * torch.randn(10_000)
    yield "Q7 one product: mean of squares", 0.99, single.square().mean().item()
    yield "Q7 one product, ReLU: mean", 0.313, single.relu().mean().item()
    yield "Q7 one product, ReLU: mean of squares", 0.490, single.relu().square().mean().item()


def lesson_cnn() -> Iterator[tuple[str, float | None, float]]:
    """Q9 and Q10: the lessons' CNN on a training batch."""
    batch = images()[2]
    model = simple_cnn(1, 10, (8, 16, 32, 32), 5)
    first_two = model[:2]
    yield "Q10 CNN, sd after the first ReLU, default", 0.3832, first_two(batch).std().item()
    init_kaiming(model)
    yield "Q10 the same, Kaiming normal", 0.9262, first_two(batch).std().item()
    init_kaiming(model, a=0.1)
    yield "Q9 the same, Kaiming normal, a = 0.1", None, first_two(batch).std().item()
    init_kaiming(model, a=0.1, uniform=True)
    yield "Q9 the same, Kaiming uniform, a = 0.1", None, first_two(batch).std().item()


PARTS = (one_layer, four_layers, products, magic_numbers, lesson_cnn)


def rows() -> Iterable[list[str]]:
    found: dict[str, tuple[float | None, list[float]]] = {}
    for seed in range(N_SEEDS):
        torch.manual_seed(seed)
        with torch.no_grad():
            for part in PARTS:
                for name, theirs, value in part():
                    found.setdefault(name, (theirs, []))[1].append(value)
    for name, (theirs, values) in found.items():
        low, high = min(values), max(values)
        inside = "-" if theirs is None else "yes" if low <= theirs <= high else "no"
        source = "-" if theirs is None else f"{theirs:.4g}"
        yield [name, source, spread(values, 4), f"{low:.4g} to {high:.4g}", inside]


def exact() -> str:
    gains = {"1": (1, 1), "0": (0, 1.414214), "0.01": (0.01, 1.414143), "0.1": (0.1, 1.407195)}
    gains["√5"] = (math.sqrt(5), 0.577350)
    lines = [["Q2 fans of Conv2d(1, 32, 5)", "25, 800", ", ".join(map(str, fans(conv1())))]]
    lines += [
        [f"Q3 gain, a = {name}", f"{theirs:.6f}", f"{gain_of(nn.LeakyReLU(a)):.6f}"]
        for name, (a, theirs) in gains.items()
    ]
    lines.append(["Q7 1 / √512", "0.04419", f"{1 / math.sqrt(512):.5f}"])
    return table(["exact", "the source", "ours"], lines)


def ten_thousand_layers() -> str:
    """Fixup's claim: train 10,000 layers without normalisation."""
    torch.manual_seed(0)
    x = images()[0][:, :, ::4, ::4]
    y = images()[1].long()

    def body() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    blocks = [Residual(body()) for _ in range(5_000)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(49, 16), *blocks, nn.Linear(16, 10))
    init_kaiming(model)
    with torch.no_grad():
        finite = bool(model(x).isfinite().all())
    fixup(model)
    opt, losses = SGD(model.parameters(), 0.05), []
    for _ in range(20):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return (
        "Fixup, 10,002 Linear layers in 5,000 residual branches without normalisation: with "
        f"Kaiming weights the output is {'finite' if finite else 'not finite'}; with Fixup 20 "
        "steps of SGD (0.05) bring the loss of 100 images from "
        f"{losses[0]:.3f} to {losses[-1]:.3f}."
    )


def main() -> None:
    torch.set_num_threads(1)
    heads = ["what", "the source", f"ours, {N_SEEDS} seeds", "lowest to highest", "within"]
    command = "python benchmarks/init_study.py"
    lines = list(rows())
    report(
        "init-study", "Initialisation", command, table(heads, lines), exact(), ten_thousand_layers()
    )


if __name__ == "__main__":
    main()
