"""Augmentation on the device: each image its own draws, nothing read back, nothing mixed up."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_law_no_hidden_reads import readings

from pellucid.data.transforms import PerSample
from pellucid.errors import SetupError
from pellucid.randomness import uniforms
from pellucid.vision.augment import Augment, cutout, flip_and_shift, recolour, warp
from pellucid.vision.erasing import RandomErasing

EVERYTHING = Augment(
    flip=0.5, shift=0.1, crop=0.5, rotate=20, brightness=0.3, contrast=0.3, saturation=0.3,
    cutout=0.25,
)  # fmt: skip
NAMES = [
    "flip", "shift_x", "shift_y", "area", "stretch", "crop_x", "crop_y", "rotate", "brightness",
    "contrast", "saturation", "cutout_x", "cutout_y",
]  # fmt: skip


def images(n: int, c: int = 3, h: int = 12, w: int = 10) -> torch.Tensor:
    return torch.randint(256, (n, c, h, w), dtype=torch.uint8)


def pictures(n: int, c: int, h: int, w: int) -> torch.Tensor:
    """Return smooth images, floats from 0 to 1: what a sampling between pixels can follow."""
    waves = F.interpolate(torch.rand(n, c, 4, 4), (h, w), mode="bicubic", align_corners=True)
    return waves.clamp(0, 1)


def draws(n: int, seed: int = 0, **fixed: float) -> torch.Tensor:
    """Return the draws of items 0 .. n-1, some of them fixed."""
    drawn = torch.from_numpy(uniforms(seed, 0, np.arange(n), Augment.n_draws))
    for name, value in fixed.items():
        drawn[:, NAMES.index(name)] = value
    return drawn


# ── draws for each sample ─────────────────────────────────────────────────────────────────────


class Dim(PerSample):
    n_draws = 1

    def apply(self, x, draws):
        return x * (0.5 + 0.5 * draws.view(-1, 1, 1, 1))


def test_a_transform_of_ones_own_takes_draws_or_draws_itself():
    x = torch.ones(4, 1, 2, 2)
    assert Dim()(x, torch.tensor([[0.0], [0.5], [0.25], [0.0]]))[:, 0, 0, 0].tolist() == [
        0.5, 0.75, 0.625, 0.5,
    ]  # fmt: skip
    torch.manual_seed(3)
    drawn = torch.rand(4, 1)
    torch.manual_seed(3)
    assert torch.equal(Dim()(x), Dim()(x, drawn))


@pytest.mark.parametrize(
    "wrong, seen",
    [
        (torch.rand(3, 1), "(3, 1)"),
        (torch.rand(4, 2), "(4, 2)"),
        (torch.rand(4), "(4,)"),
        (torch.rand(4, 1).double(), "float64"),
        (torch.rand(4, 1, device="meta"), "meta"),
    ],
)
def test_wrong_draws_are_refused(wrong, seen):
    with pytest.raises(SetupError, match="Dim needs 1 float32 numbers for each sample") as caught:
        Dim()(torch.ones(4, 1, 2, 2), wrong)
    assert seen in str(caught.value)
    assert "shape (4, 1)" in str(caught.value)


@pytest.mark.parametrize("members", [{}, {"n_draws": 1}, {"apply": lambda self, x, draws: x}])
def test_an_unfinished_transform_is_told_what_it_lacks(members):
    with pytest.raises(TypeError, match=r"n_draws|apply"):
        type("Half", (PerSample,), members)()


def test_given_draws_leave_the_global_generator_alone():
    x = images(4)
    before = torch.get_rng_state()
    EVERYTHING(x, draws(4))
    assert torch.equal(torch.get_rng_state(), before)
    EVERYTHING(x)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_draws_have_the_names_used_here():
    assert Augment.n_draws == len(NAMES)


# ── each sample for itself ────────────────────────────────────────────────────────────────────

SETTINGS = {
    "flip": Augment(flip=0.5),
    "flip and shift": Augment(flip=0.5, shift=0.3),
    "rotate": Augment(rotate=30),
    "crop": Augment(crop=0.3),
    "colour": Augment(brightness=0.5, contrast=0.5, saturation=0.5),
    "cutout": Augment(cutout=0.5),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(12, 10), (1, 5), (33, 31)])
@pytest.mark.parametrize("name", SETTINGS)
def test_an_image_comes_out_alike_in_any_batch_and_place(name, size, channels_last):
    augment, x, drawn = SETTINGS[name], images(37, 3, *size), draws(37)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    whole = augment(x, drawn)
    for i in (0, 1, 17, 36):
        assert torch.equal(augment(x[i : i + 1], drawn[i : i + 1])[0], whole[i])
    order = torch.randperm(37)
    assert torch.equal(augment(x[order], drawn[order]), whole[order])
    assert torch.equal(augment(x[5:21], drawn[5:21]), whole[5:21])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_image_twice_comes_out_differently(name):
    x = images(1).expand(20, -1, -1, -1)
    found = {image.numpy().tobytes() for image in SETTINGS[name](x, draws(20))}
    assert len(found) == 2 if name == "flip" else len(found) > 15


def test_one_setting_leaves_the_draws_of_others_alone():
    x, drawn = images(8), draws(8)
    alone = Augment(flip=0.5)(x, drawn)
    flipped = (alone == x.float() / 255).flatten(1).all(1).logical_not()
    assert torch.equal(flipped, drawn[:, 0] < 0.5)
    both = Augment(flip=0.5, brightness=0.2)(x, drawn)
    assert torch.equal(both, Augment(brightness=0.2)(alone, drawn))


# ── what comes in and what goes out ───────────────────────────────────────────────────────────


def test_neutral_settings_make_floats_and_nothing_else():
    x = images(4)
    assert torch.equal(Augment()(x), x.float() / 255)
    assert torch.equal(Augment()(x.float() / 255), x.float() / 255)


@pytest.mark.parametrize(
    "augment",
    [Augment(flip=1e-9), Augment(rotate=1e-4), Augment(crop=1 - 1e-6), Augment(contrast=1e-6)],
)
def test_nearly_neutral_settings_do_nearly_nothing(augment):
    x = images(16)
    assert torch.allclose(augment(x, draws(16)), x.float() / 255, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", [*SETTINGS, "nothing"])
def test_floats_of_the_same_size_and_memory_format_come_out(name, dtype, channels_last):
    augment = SETTINGS.get(name, Augment())
    reference = images(5)
    x = reference if dtype == torch.uint8 else (reference / 255).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    y = augment(x, draws(5))
    assert torch.equal(x, before)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, torch.float32, x.stride())
    assert y.min() >= 0
    assert y.max() <= 1
    tolerance = 2e-3 if dtype == torch.float16 else 1e-6
    assert torch.allclose(y, augment(reference, draws(5)), atol=tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_view_is_as_good_as_a_batch_of_its_own(name):
    x = images(6, 4, 20, 22)[::2, 1:, 3:15, 4:20:2]
    assert torch.equal(SETTINGS[name](x, draws(3)), SETTINGS[name](x.contiguous(), draws(3)))


@pytest.mark.parametrize("name", SETTINGS)
def test_an_empty_batch_stays_empty(name):
    assert SETTINGS[name](images(0), draws(0)).shape == (0, 3, 12, 10)


@given(
    n=st.integers(1, 4),
    c=st.sampled_from([1, 3]),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_any_size_and_any_settings_work(n, c, h, w, seed, data):
    share = st.floats(0, 1)
    names = ["flip", "shift", "brightness", "contrast", "cutout"] + ["saturation"] * (c == 3)
    chosen = {name: data.draw(share) for name in names if data.draw(st.booleans())}
    augment = Augment(
        **chosen, crop=data.draw(st.floats(0.01, 1)), rotate=data.draw(st.floats(0, 180))
    )
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, c, h, w), dtype=np.uint8))
    y = augment(x, draws(n, seed))
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    assert torch.isfinite(y).all()
    assert y.min() >= 0
    assert y.max() <= 1
    if "cutout" not in chosen and not {"brightness", "contrast", "saturation"} & set(chosen):
        # a sampling mixes pixels: nothing brighter or darker than the image comes out
        for before, after in zip(x.float() / 255, y, strict=True):
            assert after.min() >= before.min() - 1e-5
            assert after.max() <= before.max() + 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_read_back_from_the_device(name):
    x, drawn = images(4), draws(4)
    assert readings(SETTINGS[name], x, drawn).total() == 0
    assert readings(SETTINGS[name], x).total() == 0


def test_another_default_dtype_changes_nothing():
    x, drawn = images(4), draws(4)
    expected = EVERYTHING(x, drawn)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(EVERYTHING(x, drawn), expected)
        assert EVERYTHING(x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_flow_through_for_those_who_attack_images():
    x = (torch.rand(2, 3, 8, 8) * 0.5 + 0.25).requires_grad_()
    EVERYTHING(x, draws(2)).sum().backward()
    assert x.grad.abs().sum() > 0


# ── geometry ──────────────────────────────────────────────────────────────────────────────────


def moved_by_hand(image: torch.Tensor, flipped: bool, right: int, down: int) -> torch.Tensor:
    """Flip and shift one image pixel by pixel; beyond the edge it is mirrored, again and again."""
    h, w = image.shape[1:]
    columns = list(range(w)) + list(range(w))[::-1]
    rows = list(range(h)) + list(range(h))[::-1]
    source = image.flip(2) if flipped else image
    moved = torch.empty_like(image)
    for i in range(h):
        for j in range(w):
            moved[:, i, j] = source[:, rows[(i - down) % (2 * h)], columns[(j - right) % (2 * w)]]
    return moved


@given(
    c=st.integers(1, 5),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    flipped=st.booleans(),
    right=st.integers(-20, 20),
    down=st.integers(-20, 20),
)
@settings(deadline=None, max_examples=100)
def test_flips_and_shifts_move_pixels_as_by_hand(c, h, w, flipped, right, down):
    x = images(2, c, h, w)
    args = [torch.tensor([flipped, False]), torch.tensor([right, 0]), torch.tensor([down, 0])]
    moved = flip_and_shift(x, *args)
    assert moved.dtype == torch.uint8
    assert torch.equal(moved[0], moved_by_hand(x[0], flipped, right, down))
    assert torch.equal(moved[1], x[1])


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_a_certain_flip_is_torch_flip(size):
    x = images(6, 3, *size)
    assert torch.equal(Augment(flip=1)(x), x.flip(3).float() / 255)


def test_augment_moves_whole_pixels_as_drawn():
    x, drawn = images(30, 3, 10, 20), draws(30)
    y = Augment(flip=0.5, shift=0.2)(x, drawn)
    for image, result, row in zip(x, y, drawn.tolist(), strict=True):
        right, down = math.floor(row[1] * 9) - 4, math.floor(row[2] * 5) - 2
        assert torch.equal(result, moved_by_hand(image, row[0] < 0.5, right, down).float() / 255)


def test_sampling_and_moving_agree_on_flips_and_shifts():
    x, drawn = images(30, 3, 10, 20), draws(30, rotate=0.5)  # the middle draw: no angle
    moved, sampled = (Augment(flip=0.5, shift=0.4, rotate=r)(x, drawn) for r in (0, 90))
    assert torch.allclose(moved, sampled, atol=1e-4)


def test_a_small_shift_is_at_least_one_pixel():
    x = torch.zeros(64, 1, 9, 9)
    x[:, :, 4, 4] = 1
    places = Augment(shift=0.01)(x, draws(64)).flatten(1).argmax(1)
    assert set(places.tolist()) == {i * 9 + j for i in (3, 4, 5) for j in (3, 4, 5)}


@pytest.mark.parametrize("size", [2, 3, 8, 31, 32])
@pytest.mark.parametrize("draw, quarters", [(0.25, -1), (0.75, 1), (0.0, 2)])
def test_quarter_turns_are_those_of_torch(size, draw, quarters):
    x = images(3, 3, size, size)
    y = Augment(rotate=180)(x, draws(3, rotate=draw))
    assert torch.allclose(y, torch.rot90(x.float() / 255, quarters, (2, 3)), atol=1e-4)


def test_images_that_are_not_square_turn_without_shear():
    # a round spot stays round
    rows, columns = torch.meshgrid(torch.arange(20) - 9.5, torch.arange(40) - 19.5, indexing="ij")
    spot = torch.exp(-(rows.square() + columns.square()) / 18).expand(9, 1, 20, 40)
    y = Augment(rotate=180)(spot, draws(9))
    middle = (..., slice(4, 16), slice(14, 26))  # mirror images come in further out
    assert torch.allclose(y[middle], spot[middle], atol=0.04)


def test_angles_are_even_over_the_range_both_ways():
    # a bright pixel right of the middle shows the angle
    x = torch.zeros(400, 1, 65, 65)
    x[:, :, 31:34, 56:59] = 1
    y = Augment(rotate=60)(x, draws(400))[:, 0]
    total, place = y.sum((1, 2)), torch.arange(65.0) - 32
    down, right = (y.sum(2) @ place) / total, (y.sum(1) @ place) / total
    angles = torch.rad2deg(torch.atan2(-down, right))
    expected = (draws(400)[:, NAMES.index("rotate")] * 2 - 1) * 60
    assert torch.allclose(angles, expected, atol=0.5)  # anticlockwise for large draws
    assert -60.5 < angles.min() < -55
    assert 55 < angles.max() < 60.5


def test_crops_have_the_area_the_ratio_and_the_place_they_should():
    n, share = 3000, 0.25
    # two ramps show where in the image each pixel comes from
    ramp = (torch.arange(40) + 0.5) / 40
    x = torch.stack([ramp.expand(40, 40), ramp[:, None].expand(40, 40)]).expand(n, 2, 40, 40)
    y = Augment(crop=share)(x, draws(n))
    wide = (y[:, 0, 20, 30] - y[:, 0, 20, 10]) * 2
    high = (y[:, 1, 30, 20] - y[:, 1, 10, 20]) * 2
    area, ratio = wide * high, wide / high
    assert area.min() > share - 1e-3
    assert area.max() < 1 + 1e-3
    assert area.mean() == pytest.approx(0.625, abs=0.02)
    assert ratio.log().mean().abs() < 0.01
    assert ratio.max() < 4 / 3 + 1e-3
    assert ratio.max() > 1.3
    assert max(wide.max(), high.max()) < 1 + 1e-3
    left, right = y[:, 0, 0, 0] - wide / 80, y[:, 0, 0, -1] + wide / 80
    assert left.min() > -1e-3  # never beyond the image
    assert right.max() < 1 + 1e-3
    middle = (left + right - 1) / (1 - wide)  # from -1 to 1 within what is free
    assert middle[wide < 0.9].mean().abs() < 0.05
    assert middle[wide < 0.9].std() == pytest.approx(3**-0.5, abs=0.03)
    top, bottom = y[:, 1, 0, 0] - high / 80, y[:, 1, -1, 0] + high / 80
    across = torch.stack([middle, (top + bottom - 1) / (1 - high)])[:, (wide < 0.9) & (high < 0.9)]
    assert across.corrcoef()[0, 1].abs() < 0.1


def test_warp_is_torch_s_own_sampling():
    x, matrices = pictures(4, 3, 9, 14), torch.eye(2, 3) + 0.3 * torch.randn(4, 2, 3)
    grid = F.affine_grid(matrices, [4, 3, 9, 14], align_corners=False)
    expected = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    assert torch.allclose(warp(x, matrices), expected, atol=1e-5)


# ── colour and cutout ─────────────────────────────────────────────────────────────────────────


def grey_by_hand(image: torch.Tensor) -> torch.Tensor:
    return image if len(image) == 1 else 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def recoloured_by_hand(image, brightness, contrast, saturation):
    """Change one image as torchvision does, one after the other, clamped at the end."""
    image = image.double() * brightness
    image = contrast * image + (1 - contrast) * grey_by_hand(image).mean()
    return (saturation * image + (1 - saturation) * grey_by_hand(image)).clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_as_torchvision_defines_it(channels):
    x, factors = torch.rand(50, channels, 7, 9), torch.rand(3, 50) * 2
    y = recolour(x, *factors)
    for image, result, *of in zip(x, y, *factors.tolist(), strict=True):
        assert torch.allclose(result.double(), recoloured_by_hand(image, *of), atol=1e-6)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_each_change_of_colour_works_alone(given):
    x, factors = torch.rand(20, 3, 7, 9), torch.rand(20) * 2
    alone = [factors if i == given else None for i in range(3)]
    for image, result, factor in zip(x, recolour(x, *alone), factors.tolist(), strict=True):
        expected = recoloured_by_hand(image, *[factor if i == given else 1 for i in range(3)])
        assert torch.allclose(result.double(), expected, atol=1e-6)


def test_augment_draws_its_factors_evenly():
    x, drawn = torch.full((4000, 1, 1, 1), 0.25), draws(4000)
    factors = (Augment(brightness=0.4)(x, drawn) / 0.25).flatten()
    assert 0.6 <= factors.min() < 0.605
    assert 1.395 < factors.max() <= 1.4
    assert factors.mean() == pytest.approx(1, abs=0.02)
    column = drawn[:, NAMES.index("brightness")]
    assert torch.allclose(factors, 0.6 + 0.8 * column)


def test_cutout_erases_a_square_and_nothing_else():
    x = torch.rand(4, 3, 9, 12)
    y = cutout(x, torch.tensor([4, 0, 8, 2]), torch.tensor([5, 0, 11, 11]), 4)
    expected = x.clone()
    squares = [(2, 6, 3, 7), (0, 2, 0, 2), (6, 9, 9, 12), (0, 4, 9, 12)]
    for image, (top, bottom, left, right) in zip(expected, squares, strict=True):
        image[:, top:bottom, left:right] = image.mean((1, 2))[:, None, None]
    assert torch.equal(y != x, expected != x)
    assert torch.allclose(y, expected)


@pytest.mark.parametrize("slip", [
    {"area": 0.1}, {"area": (0.1,)}, {"area": ("0.1", "0.2")}, {"p": "1"}, {"ratio": None},
])  # fmt: skip
def test_slips_of_random_erasing_are_told(slip):
    with pytest.raises(SetupError, match="two shares of the area"):
        RandomErasing(**slip)


@pytest.mark.parametrize("share, side", [(0.5, 10), (0.01, 1), (1.0, 20)])
def test_cutout_comes_everywhere_and_has_its_size(share, side):
    ramp = torch.rand(500, 1, 20, 30)
    y = Augment(cutout=share)(ramp, draws(500))
    erased = (y != ramp)[:, 0]
    assert erased.any(2).sum(1).max() == erased.any(1).sum(1).max() == side
    counts = erased.sum(0)
    assert counts.min() > 0 or share == 0.01
    assert erased.flatten(1).any(1).all()


def test_flips_and_shifts_come_as_often_as_they_should():
    n = 4000
    x = torch.zeros(n, 1, 9, 9)
    x[:, :, 4, 6] = 1
    flipped = Augment(flip=0.3)(x, draws(n))[:, 0, 4, 2]
    assert flipped.mean() == pytest.approx(0.3, abs=5 * (0.21 / n) ** 0.5)
    x = torch.zeros(n, 1, 9, 9)
    x[:, :, 4, 4] = 1
    places = Augment(shift=0.25)(x, draws(n)).flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=81).view(9, 9)
    assert counts[2:7, 2:7].sum() == n
    expected = n / 25
    assert ((counts[2:7, 2:7] - expected) ** 2 / expected).sum() < 24 + 6 * 48**0.5


# ── settings ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "setting",
    [
        {"flip": 1.5}, {"flip": True}, {"flip": -0.1}, {"shift": 2}, {"crop": 0}, {"crop": 1.1},
        {"rotate": 181}, {"rotate": -10}, {"brightness": -1}, {"contrast": 2},
        {"saturation": math.nan}, {"cutout": 8}, {"flip": "0.5"}, {"flip": None},
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(setting):
    [name] = setting
    with pytest.raises(SetupError, match=f"Augment's {name} is") as caught:
        Augment(**setting)
    assert f"{name}={setting[name]!r}" in str(caught.value)
    assert f"{name}={'1' if name == 'crop' else '0'} leaves images" in str(caught.value)


def test_what_are_no_images_is_refused():
    with pytest.raises(SetupError, match=r"images \(n, c, h, w\)") as caught:
        Augment(flip=0.5)(torch.zeros(5, 784, dtype=torch.uint8))
    assert "(5, 784)" in str(caught.value)
    assert "Reshape(1, 28, 28)" in str(caught.value)
    with pytest.raises(SetupError, match="int64"):
        Augment(flip=0.5)(torch.zeros(5, 1, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize("setting", ["brightness", "contrast", "saturation"])
def test_colours_of_images_without_colours_are_refused(setting):
    with pytest.raises(SetupError, match="1 or 3 channels only"):
        Augment(**{setting: 0.5})(images(2, 4))
    assert Augment(flip=0.5, crop=0.5, cutout=0.5)(images(2, 4)).shape == (2, 4, 12, 10)


def test_saturation_of_grey_images_is_refused():
    with pytest.raises(SetupError, match="Saturation does nothing"):
        Augment(saturation=0.5)(images(2, 1))
    assert Augment(brightness=0.5, contrast=0.5)(images(2, 1)).shape == (2, 1, 12, 10)


def test_it_shows_what_is_asked_for():
    assert repr(Augment()) == "Augment()"
    assert repr(Augment(flip=0.5, crop=0.8, rotate=10)) == "Augment(flip=0.5, crop=0.8, rotate=10)"
    assert eval(repr(EVERYTHING)).__dict__ == EVERYTHING.__dict__


@pytest.mark.parametrize("way", [lambda a: pickle.loads(pickle.dumps(a)), copy.deepcopy])
def test_it_pickles_and_copies(way):
    x, drawn = images(4), draws(4)
    assert torch.equal(way(EVERYTHING)(x, drawn), EVERYTHING(x, drawn))
    assert repr(way(EVERYTHING)) == repr(EVERYTHING)
