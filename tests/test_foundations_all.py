"""foundations: everything public beside torch's own, so that no piece is without a comparison.

Each case gives an output of ours and of torch's, of any tensors, in float32 and in float64; the
outputs and the gradients of the inputs must agree to 1e-5 and better, and to the bit where both do
the same sums in the same order. What ragged shapes and far-out numbers do is in the other files.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.utils.data as torch_data
from torch import nn

from pellucid import foundations as ours

CASES = {}


def case(*names, exact=False):
    """Enter a comparison for some of the public names."""

    def enter(compare):
        for name in names:
            assert name not in CASES
            CASES[name] = compare, exact
        return compare

    return enter


def same(exact, dtype, function, torchs, *shapes, positive=False):
    """Compare two functions of random tensors: values, and gradients of those that are floats."""
    tensors = [torch.randn(shape, dtype=dtype) * 2 + 0.5 for shape in shapes]
    tensors = [tensor.sigmoid() if positive else tensor for tensor in tensors]
    inputs = [[tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2)]
    outputs = [f(*given) for f, given in zip((function, torchs), inputs, strict=True)]
    close(exact, dtype, *outputs)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(weights)
    close(exact, dtype, *([tensor.grad for tensor in given] for given in inputs))


def close(exact, dtype, one, other):
    tolerance = 0 if exact else 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def layers(make, torchs, *shape):
    """Return a case that compares two layers with the same weights, their gradients too."""

    def compare(exact, dtype):
        one, other = make().to(dtype), torchs().to(dtype)
        one.load_state_dict(other.state_dict())
        same(exact, dtype, one, other, shape)
        close(exact, dtype, *([p.grad for p in layer.parameters()] for layer in (one, other)))

    return compare


IMAGES = 5, 4, 7, 8
for exact, name, make, torchs in (
    (False, "Linear", lambda: ours.Linear(8, 3), lambda: nn.Linear(8, 3)),
    (False, "Conv2d", lambda: ours.Conv2d(4, 6, 3, 2, 1), lambda: nn.Conv2d(4, 6, 3, 2, 1)),
    (True, "ReLU", ours.ReLU, nn.ReLU),
    (True, "Flatten", ours.Flatten, nn.Flatten),
    (True, "MaxPool2d", lambda: ours.MaxPool2d(2), lambda: nn.MaxPool2d(2)),
    (False, "AvgPool2d", lambda: ours.AvgPool2d(3, 2, 1), lambda: nn.AvgPool2d(3, 2, 1)),
    (True, "AdaptiveMaxPool2d",
     lambda: ours.AdaptiveMaxPool2d((3, 2)), lambda: nn.AdaptiveMaxPool2d((3, 2))),
    (False, "AdaptiveAvgPool2d",
     lambda: ours.AdaptiveAvgPool2d((3, 2)), lambda: nn.AdaptiveAvgPool2d((3, 2))),
    (False, "BatchNorm", lambda: ours.BatchNorm(4), lambda: nn.BatchNorm2d(4)),
    (False, "LayerNorm", lambda: ours.LayerNorm((7, 8)), lambda: nn.LayerNorm((7, 8))),
    (False, "GroupNorm", lambda: ours.GroupNorm(2, 4), lambda: nn.GroupNorm(2, 4)),
    (False, "InstanceNorm", lambda: ours.InstanceNorm(4, affine=True),
     lambda: nn.InstanceNorm2d(4, affine=True)),
    (True, "Sequential", lambda: ours.Sequential(ours.ReLU(), ours.MaxPool2d(2)),
     lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))),
):  # fmt: skip
    case(name, exact=exact)(layers(make, torchs, *IMAGES))


TARGETS = torch.arange(6) % 4
for name, torchs, shapes in (
    ("logsumexp", lambda x: torch.logsumexp(x, -1), [(6, 4)]),
    ("log_softmax", lambda x: F.log_softmax(x, -1), [(6, 4)]),
    ("softmax", lambda x: F.softmax(x, -1), [(6, 4)]),
    ("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, [(6, 4), (6, 4)]),
    ("mean_squared_error", F.mse_loss, [(6, 4), (6, 4)]),
    ("variance", lambda x: x.var(correction=0), [(6, 4)]),
    ("standard_deviation", lambda x: x.std(correction=0), [(6, 4)]),
    ("mean_absolute_deviation", lambda x: F.l1_loss(x, x.mean().expand_as(x)), [(6, 4)]),
    ("covariance", lambda x, y: torch.stack([x, y]).cov(correction=0)[0, 1], [(9,), (9,)]),
    ("correlation", lambda x, y: torch.stack([x, y]).corrcoef()[0, 1], [(9,), (9,)]),
):
    case(name)(
        lambda exact, dtype, name=name, torchs=torchs, shapes=shapes: same(
            exact, dtype, getattr(ours, name), torchs, *shapes
        )
    )


@case("cross_entropy", "nll")
def classes(exact, dtype):
    for loss, torchs in ((ours.cross_entropy, F.cross_entropy), (ours.nll, F.nll_loss)):
        same(
            exact, dtype, lambda x, f=loss: f(x, TARGETS), lambda x, f=torchs: f(x, TARGETS), (6, 4)
        )


@case("binary_nll")
def yes_or_no(exact, dtype):
    same(exact, dtype, ours.binary_nll, F.binary_cross_entropy, (6, 4), (6, 4), positive=True)


@case("unfold", "windows")
def patches(exact, dtype):
    same(exact, dtype, lambda x: ours.unfold(x, 3, 2, 1), lambda x: F.unfold(x, 3, 1, 1, 2), IMAGES)

    def by_torch(x):
        return F.unfold(x, 3).view(5, 4, 3, 3, 5, 6).permute(0, 1, 4, 5, 2, 3)

    same(exact, dtype, lambda x: ours.windows(x, 3), by_torch, IMAGES)


@case("moments", "standardised")
def normalising(exact, dtype):
    for part in range(2):
        same(exact, dtype, lambda x, i=part: ours.moments(x, (0, 2))[i],
             lambda x, i=part: torch.var_mean(x, (0, 2), correction=0, keepdim=True)[1 - i],
             (6, 4, 5))  # fmt: skip
    mean, spread = torch.randn(4, dtype=dtype), torch.rand(4, dtype=dtype)
    same(exact, dtype, lambda x: ours.standardised(x, mean, spread, 1e-5),
         lambda x: F.batch_norm(x, mean, spread), (6, 4))  # fmt: skip


@case("fans", "kaiming_normal", "xavier_normal")
def initialising(exact, dtype):
    shape = 6, 4, 3, 3
    assert ours.fans(*shape) == nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
    for draw, fill in (
        (ours.kaiming_normal, partial(nn.init.kaiming_normal_, nonlinearity="relu")),
        (ours.xavier_normal, nn.init.xavier_normal_),
    ):
        torch.manual_seed(1)
        weights = draw(*shape)
        torch.manual_seed(1)
        close(exact, torch.float32, weights, fill(torch.empty(shape)))


# ── optimisers ────────────────────────────────────────────────────────────────────────────────


def moved(make, dtype):
    """Return what three steps make of a parameter."""
    generator = torch.Generator().manual_seed(0)
    w = ours.Parameter(torch.randn(4, 3, dtype=dtype, generator=generator))
    opt = make([w])
    for _ in range(3):
        w.grad = torch.randn(4, 3, dtype=dtype, generator=generator)
        opt.step()
    return w.detach()


def steps(make, torchs):
    return lambda exact, dtype: close(exact, dtype, moved(make, dtype), moved(torchs, dtype))


def optimizer(*steppers, **hypers):
    return lambda params: ours.Optimizer(params, steppers, {"lr": 0.1, **hypers})


def by_torch(name, **hypers):
    return lambda params: getattr(torch.optim, name)(params, lr=0.1, foreach=False, **hypers)


def scaled_by_hand(params):
    """Make LAMB as its paper has it: Adam's direction, to the scale of the weights."""
    inner, [w] = torch.optim.AdamW(params, lr=1.0, eps=1e-6, weight_decay=0.01), params

    class Paper:
        @staticmethod
        def step():
            before = w.detach().clone()
            inner.step()
            direction = before - w.detach()
            w.data = before - 0.1 * before.norm() / direction.norm() * direction

    return Paper()


case("SGD", exact=True)(
    steps(lambda p: ours.SGD(p, 0.1, 0.9, 0.1), by_torch("SGD", momentum=0.9, weight_decay=0.1))
)
case("Adam")(steps(lambda p: ours.Adam(p, 0.1), by_torch("Adam")))
case("AdamW")(steps(lambda p: ours.AdamW(p, 0.1), by_torch("AdamW")))
case("LAMB", "to_scale")(steps(lambda p: ours.LAMB(p, 0.1), scaled_by_hand))
case("Optimizer", exact=True)(steps(optimizer(), by_torch("SGD")))
case("add_decay", exact=True)(
    steps(optimizer(ours.add_decay, weight_decay=0.2), by_torch("SGD", weight_decay=0.2))
)
case("add_momentum", exact=True)(
    steps(optimizer(ours.add_momentum, momentum=0.8), by_torch("SGD", momentum=0.8))
)
case("divide_by_spread", "moving_average")(
    steps(
        optimizer(ours.divide_by_spread, betas=(0.8, 0.9), eps=1e-3),
        by_torch("Adam", betas=(0.8, 0.9), eps=1e-3),
    )
)


# ── what holds parts, and what makes batches ──────────────────────────────────────────────────


def two_layers(module, linear, parameter):
    class Net(module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = linear(8, 3), parameter(torch.ones(3))

        def forward(self, x):
            return self.first(x) * self.scale

    return Net


@case("Composite", "Module", "Parameter", "HookHandle")
def holding(exact, dtype):
    makes = [two_layers(*kinds) for kinds in (
        (ours.Module, ours.Linear, ours.Parameter), (nn.Module, nn.Linear, nn.Parameter),
    )]  # fmt: skip
    layers(*makes, 5, 8)(exact, dtype)
    names, heard = [], []
    for net in (make() for make in makes):
        names.append({name: p.requires_grad for name, p in net.named_parameters()})
        with net.first.register_forward_hook(lambda module, inputs, output: output * 0):
            heard.append(net(torch.ones(1, 8)).abs().sum().item())
        heard.append(net(torch.ones(1, 8)).abs().sum().item() > 0)
    assert names[0] == names[1] and heard == [0, True] * 2


@case("Dataset", "Sampler", "BatchSampler", "DataLoader", "collate", exact=True)
def loading(exact, dtype):
    arrays = torch.randn(11, 3, dtype=dtype), torch.arange(11)
    data, torchs = ours.Dataset(*arrays), torch_data.TensorDataset(*arrays)
    close(
        exact,
        dtype,
        list(ours.DataLoader(data, 4)),
        [tuple(b) for b in torch_data.DataLoader(torchs, 4)],
    )
    items = [data[i] for i in range(3)]
    close(exact, dtype, ours.collate(items), tuple(torch_data.default_collate(items)))
    orders = ours.Sampler(11), torch_data.SequentialSampler(range(11))
    pairs = zip((ours.BatchSampler, torch_data.BatchSampler), orders, strict=True)
    one, other = (list(kind(order, 4, True)) for kind, order in pairs)
    assert one == other


# ── nobody is forgotten ───────────────────────────────────────────────────────────────────────


def test_everything_public_has_a_comparison():
    assert set(CASES) == set(ours.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ours.__all__)
def test_it_computes_what_torch_does(name, dtype):
    compare, exact = CASES[name]
    compare(exact, dtype)
