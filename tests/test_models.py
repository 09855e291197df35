"""Models for images: known sizes, weights that stay what they were, any image, any norm."""

import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from pellucid.errors import SetupError
from pellucid.nn import GeneralReLU, Residual, RunningBatchNorm
from pellucid.vision import (
    airbench,
    mlp,
    simple_cnn,
    small_resnet,
    xresnet,
    xresnet18,
    xresnet34,
    xresnet50,
)

NARROW = (8, 8, 16, 16)

MODELS = {
    "simple_cnn": partial(simple_cnn, 3, 10),
    "small_resnet": partial(small_resnet, 3, 10),
    "airbench": partial(airbench, 3, 10, NARROW[:3]),
    "xresnet18": partial(xresnet18, 3, 10, NARROW),
    "xresnet34": partial(xresnet34, 3, 10, NARROW),
    "xresnet50": partial(xresnet50, 3, 10, NARROW),
}

PLUGGABLE = {name: MODELS[name] for name in MODELS if name not in ("small_resnet", "airbench")}

NORMS = {
    "batch": nn.BatchNorm2d,
    "layer": partial(nn.GroupNorm, 1),
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "running": RunningBatchNorm,
    "none": None,
}


def n_params(model):
    return sum(param.numel() for param in model.parameters())


def test_the_sources_parameter_counts():
    assert n_params(mlp(784, 10)) == 39_760
    assert n_params(simple_cnn(1, 10, (8, 16, 32, 32), 5)) == 15_594
    assert n_params(simple_cnn(1, 10, (8, 16, 32, 64, 64), 5)) == 62_090
    assert n_params(simple_cnn(3, 10)) == 98_730
    assert len(list(simple_cnn(3, 10).parameters())) == 10


@pytest.mark.parametrize(
    "make, n", [(xresnet18, 11_708_744), (xresnet34, 21_816_904), (xresnet50, 25_576_264)]
)
def test_xresnets_have_the_known_parameter_counts(make, n):
    # torchvision's resnets (11,689,512, 21,797,672, 25,557,032) with three convolutions and norms
    # (28,512 + 256) for the first (9,408 + 128); timm counts the same for its resnet34d and 50d
    assert n_params(make(3, 1000)) == n


def test_map_sizes_are_the_sources():
    def sizes(model, x):
        found = []
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                found.append(x.shape[-1])
        return found

    assert sizes(simple_cnn(3, 10), torch.randn(2, 3, 64, 64)) == [32, 16, 8, 4]
    lesson = simple_cnn(1, 10, (8, 16, 32, 32), 5)
    assert sizes(lesson, torch.randn(2, 1, 28, 28)) == [14, 7, 4, 2]


def plain_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


class PlainResnet(nn.Module):
    """Small ResNet of two widths, written out in the order in which its weights are drawn."""

    def __init__(self):
        super().__init__()
        self.stem = self.conv_norm(1, 4, 3, 2)
        self.parts = nn.ModuleList()
        for before, after, stride in ((4, 4, 1), (4, 8, 2)):
            body = [self.conv_norm(before, after, 3, stride), self.conv_norm(after, after, 3, 1)]
            self.parts.append(nn.ModuleList([*body, self.conv_norm(before, after, 1, 1)]))
        self.head = nn.Linear(8, 10)

    @staticmethod
    def conv_norm(before, after, kernel, stride):
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x):
        x = self.stem(x).relu()
        (first, second, _), (third, fourth, narrow) = self.parts
        x = (second(first(x).relu()) + x).relu()
        shortcut = narrow(F.avg_pool2d(x, 2, ceil_mode=True))
        x = (fourth(third(x).relu()) + shortcut).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "ours, plain",
    [(lambda: simple_cnn(1, 10, (8, 16), 5), plain_cnn),
     (lambda: small_resnet(1, 10, (4, 8)), PlainResnet)],
)  # fmt: skip
def test_the_default_weights_are_those_of_torchs_layers_in_order(ours, plain):
    torch.manual_seed(5)
    ours = ours()
    after = torch.rand(1)
    torch.manual_seed(5)
    plain = plain()
    assert torch.rand(1) == after
    x = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [28, 32, 64, 97])
def test_any_image_size_will_do(name, size):
    model = MODELS[name]()
    assert model(torch.randn(4, 3, size, size)).shape == (4, 10)
    assert model(torch.randn(4, 3, size, 2 * size)).shape == (4, 10)


def test_an_xresnet_takes_imagenets_images():
    model = xresnet50(3, 10, NARROW)
    assert model(torch.randn(2, 3, 224, 224)).shape == (2, 10)
    assert model[:-2](torch.randn(2, 3, 224, 224)).shape == (2, 64, 7, 7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", PLUGGABLE)
def test_norm_and_activation_are_swapped_in_a_line(name, norm):
    act = partial(GeneralReLU, leak=0.1, sub=0.4)
    model = PLUGGABLE[name](norm=NORMS[norm], act=act)
    kinds = {type(module) for module in model.modules()}
    assert GeneralReLU in kinds and nn.ReLU not in kinds
    norms = {nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, RunningBatchNorm} & kinds
    assert len(norms) == (norm != "none")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all((c.bias is None) == (norm != "none") for c in convolutions)
    out = model(torch.randn(4, 3, 64, 64))
    F.cross_entropy(out, torch.arange(4)).backward()
    assert all(param.grad.isfinite().all() for param in model.parameters())
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("name", ["xresnet18", "xresnet50"])
def test_an_xresnet_is_a_bag_of_tricks(name):
    model = MODELS[name]()
    stem = [part for part in model[:3] for part in part if isinstance(part, nn.Conv2d)]
    assert [(c.kernel_size, c.stride) for c in stem] == [
        ((3, 3), (2, 2)), ((3, 3), (1, 1)), ((3, 3), (1, 1))
    ]  # fmt: skip
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    assert len(blocks) == (8 if name == "xresnet18" else 16)
    x = model[:4](torch.randn(4, 3, 64, 64))
    for block in blocks:
        strided = [m for m in block.modules() if getattr(m, "stride", 1) == (2, 2)]
        assert all(m.kernel_size == (3, 3) for m in strided)
        # a branch begins as nothing, its shortcut averages before it narrows
        assert not block.body(x).any()
        assert torch.equal(block(x), block.shortcut(x).relu())
        widened = block(x).shape[1] != x.shape[1]
        halved = block(x).shape[2] != x.shape[2]
        kinds = [type(part) for part in block.shortcut.children()]
        assert kinds == [nn.AvgPool2d] * halved + [nn.Sequential] * widened
        x = block(x)


def test_an_xresnet_learns():
    torch.manual_seed(0)
    model = xresnet18(1, 4, NARROW)
    x, y = torch.randn(16, 1, 32, 32), torch.arange(16) % 4
    opt = SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


class Airbench94(nn.Module):
    """The published network, written out: convolutions, pools and norms in their order."""

    def __init__(self, widths):
        super().__init__()
        self.first = nn.Conv2d(3, 24, 2)
        self.groups = nn.ModuleList()
        for before, after in zip((24, *widths), widths, strict=False):
            convs = [nn.Conv2d(n, after, 3, padding=1, bias=False) for n in (before, after)]
            norms = [nn.BatchNorm2d(after, momentum=0.4) for _ in range(2)]
            self.groups.append(nn.ModuleList([convs[0], norms[0], convs[1], norms[1]]))
        self.head = nn.Linear(widths[-1], 10, bias=False)

    def forward(self, x):
        x = F.gelu(self.first(x))
        for first, norm, second, last in self.groups:
            x = F.gelu(norm(F.max_pool2d(first(x), 2)))
            x = F.gelu(last(second(x)))
        return self.head(F.max_pool2d(x, 3).flatten(1))


def test_airbench_is_the_published_network():
    ours = airbench(3, 10)
    trained = [param for param in ours.parameters() if param.requires_grad]
    convolutions = sum(n * m * 9 for n, m in [(24, 64), (64, 64), (64, 256), *[(256, 256)] * 3])
    assert sum(param.numel() for param in trained) == convolutions + 312 + 1_152 + 2_560
    plain = Airbench94((64, 256, 256))
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))
    second = ours[6].weight  # passes on what comes in
    assert torch.equal(second, nn.init.dirac_(torch.empty_like(second)))
    frozen = [name for name, param in ours.named_parameters() if not param.requires_grad]
    assert frozen == [f"{i}.weight" for i in (4, 7, 11, 14, 18, 21)]


def test_an_xresnet_of_any_depth_and_width():
    model = xresnet(2, 5, (1, 2, 1), 2, (8, 12, 20))
    assert model(torch.randn(3, 2, 40, 40)).shape == (3, 5)
    assert model[-1].in_features == 40
    with pytest.raises(SetupError, match="a width for each stage"):
        xresnet(3, 10, (1, 1), widths=(8, 16, 32))
    with pytest.raises(SetupError, match="norm with a weight"):
        xresnet18(3, 10, NARROW, norm=nn.InstanceNorm2d)
