"""Distributed: many processes train as one.

What needs processes is done by tests/distributed_ranks.py under torchrun, in one launch of two
ranks and one of three, whose findings are judged here; the arithmetic needs none.
"""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pellucid
from pellucid import Learner, Loader
from pellucid.callbacks import Distributed, Progress
from pellucid.data import ArrayDataset
from pellucid.data.sliced import Share, sliced
from pellucid.device import choose_device
from pellucid.distributed import as_the_first_says, is_first, rank, world_size
from pellucid.errors import SetupError, UnknownName
from pellucid.sharding import blocks
from pellucid.vision import AlternatingFlip

RANKS = Path(__file__).parent / "distributed_ranks.py"


def launch(n: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the ranks under torchrun; what they printed goes with the answer."""
    root = str(Path(pellucid.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, "--nproc-per-node", str(n), str(RANKS), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def found_by(n: int, folder: Path, *checks: str) -> tuple[list[dict], str]:
    ended = launch(n, "check", folder, *checks)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(n)], ended.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return found_by(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    checks = ["as_one_process", "exact_metrics", "own_items", "saving"]
    return found_by(3, tmp_path_factory.mktemp("three"), *checks)


# ── as one process ──────────────────────────────────────────────────────────────────────────────


def assert_as_one(found: list[dict]) -> None:
    """Each rank compared itself with one process; and all have the same bits."""
    for mine in found:
        assert mine["weights"] <= 1e-6
        assert mine["losses"] <= 1e-5
        assert mine["counts"]
        assert mine["sum"] == found[0]["sum"]


@pytest.mark.parametrize("world", ["two", "three"])
def test_weights_and_losses_are_those_of_one_process(world, request):
    found = [of_rank["as_one_process"] for of_rank in request.getfixturevalue(world)[0]]
    assert len(found[0]) == 7
    for name in found[0]:
        assert_as_one([of_rank[name] for of_rank in found])
        assert found[0][name]["steps"] == (
            24 if "Accumulate" in name else 8 * (7 if "48" in name else 8)
        )
        # the same row in every process, to the bit
        assert all(of_rank[name]["record"] == found[0][name]["record"] for of_rank in found)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_state_of_an_optimizer_goes_on_in_the_next_fit(mode, two):
    found = [of_rank["other_optimizer"][mode] for of_rank in two[0]]
    assert_as_one(found)
    assert all(mine["own params"] and mine["whole state"] for mine in found)


@pytest.mark.parametrize("world", ["two", "three"])
def test_metrics_are_exactly_those_of_one_process(world, request):
    found = [of_rank["exact_metrics"] for of_rank in request.getfixturevalue(world)[0]]
    for n in map(str, range(1, 14)):
        for mine in found:
            assert len(mine[n]["metrics"]) == 9
            assert mine[n]["metrics"] == mine[n]["alone"]
            assert mine[n]["loss"] <= 1e-6


@pytest.mark.parametrize("way", ["cancels", "cancels, accumulated", "thawed"])
def test_what_steers_a_fit_steers_all(way, two):
    assert_as_one([of_rank["steered"][way] for of_rank in two[0]])


def test_accumulated_gradients_travel_once_a_step(two):
    for of_rank in two[0]:
        # 8 batches in windows of 3, 3 and 2
        assert of_rank["gradients_travel_once_a_step"]["apart"] == [
            True, True, False, True, True, False, True, False,
        ]  # fmt: skip


def test_compiled_replicas_are_one_too(two):
    found = [of_rank["compiled"] for of_rank in two[0]]
    assert_as_one(found)
    assert all("nothing in the model that it can compile" in mine["refused"] for mine in found)


@pytest.mark.parametrize("loader", ["list", "unsized", "torch"])
def test_any_loader_is_cut_and_a_shuffled_one_draws_as_rank_0_would_alone(loader, two):
    assert_as_one([of_rank["other_loaders"][loader] for of_rank in two[0]])


def test_items_of_any_loader_may_draw_as_rank_0_would_alone(two):
    assert_as_one([of_rank["noise_in_items"] for of_rank in two[0]])


def test_a_loss_may_have_one_element_instead_of_no_dimensions(two):
    assert_as_one([of_rank["losses_of_one_element"] for of_rank in two[0]])


def test_a_loss_may_be_the_mean_over_tokens(two):
    for of_ranks in zip(*(of_rank["weighed"].values() for of_rank in two[0]), strict=True):
        assert_as_one(list(of_ranks))


@pytest.mark.parametrize("world", ["two", "three"])
def test_a_rank_makes_its_own_items_alone(world, request):
    found = [of_rank["own_items"] for of_rank in request.getfixturevalue(world)[0]]
    assert_as_one(found)
    asked = [item for mine in found for item in mine["asked"]]
    # 22 in batches of 5: the last has 2, for the third rank of three the first stands in
    stand_ins = 1 if world == "three" else 0
    assert len(asked) == 22 + stand_ins
    assert set(asked) == set(range(22))


def test_a_loader_that_trains_and_validates_counts_its_passes_together(two):
    assert_as_one([of_rank["one_loader_for_both"] for of_rank in two[0]])
    assert all(of_rank["one_loader_for_both"]["epochs"] == [6, 6] for of_rank in two[0])


def test_different_batches_are_refused_in_every_process(two):
    for of_rank in two[0]:
        assert len(of_rank["different_batches"]) == 4
        for text in of_rank["different_batches"].values():
            assert "were given different batches" in text


def test_what_is_no_tensor_is_cut_too(two):
    found = [of_rank["arrays_and_names"] for of_rank in two[0]]
    assert_as_one(found)
    assert all(mine["seen"] for mine in found)


def test_a_part_of_weight_0_may_have_a_loss_of_0_by_0(two):
    assert_as_one([of_rank["nothing_counts_in_a_part"] for of_rank in two[0]])


def test_lazy_layers_are_refused_by_name(two):
    for of_rank in two[0]:
        assert "Lazy layers" in of_rank["lazy_layers"]["text"]
        assert "saw: 1.weight, 1.bias" in of_rank["lazy_layers"]["text"]


def test_a_loss_that_is_no_number_is_found_by_all(two):
    for of_rank in two[0]:
        assert_as_one([of_rank["non_finite"]["skip"]])
        assert of_rank["non_finite"]["skip"]["skipped"] == [1, 1]
        assert all(of_rank["non_finite"][mode]["batch"] == 3 for mode in ("ddp", "fsdp"))
    for mode in ("ddp", "fsdp"):
        texts = [of_rank["non_finite"][mode]["text"] for of_rank in two[0]]
        assert sum("not finite in item 29 of the data set" in text for text in texts) == 1


def test_dropout_is_drawn_apart_and_all_else_is_alike_before_and_after(two):
    one, other = (of_rank["random_numbers"] for of_rank in two[0])
    assert one["in the fit"] != other["in the fit"]
    assert one["after it"] == other["after it"]
    assert one["buffers"] == other["buffers"]
    assert one["weights at first"] == other["weights at first"]
    assert one["first says"] == other["first says"] == [7.0, 7.0]


@pytest.mark.parametrize("average", ["EMA", "SWA", "Lookahead"])
def test_an_average_has_the_statistics_of_all_parts(average, two):
    one, other = (of_rank["statistics_of_averages"][average] for of_rank in two[0])
    assert one == other
    assert len(one["validated"]) == 3 and one["final"] == one["validated"][-1]
    assert one["plain"][0] != one["plain"][1] != one["plain"][2]


@pytest.mark.parametrize("name", [
    "EMA", "SWA", "Lookahead", "ByRole", "ByRole, SGD", "skip", "skip, unfused", "skip, ByRole",
    "stop on the device", "fp16", "fp16, unfused", "fp16, ByRole",
])  # fmt: skip
def test_a_technique_in_shards_is_what_it_is_without(name, two):
    one, other = (of_rank["in_shards"][name] for of_rank in two[0])
    assert one
    for without in one:
        assert one[without]["sum"] == other[without]["sum"]
        for mine in (one[without], other[without]):
            assert mine["weights"] <= 1e-6 and mine["validated"] <= 1e-5
            assert max(mine["buffers"], default=0.0) <= 1e-6
            assert mine["skipped"] == ([1, 1] if "skip" in name else False)


def test_a_convolution_in_shards_may_compute_in_half(two):
    one, other = (of_rank["convolutions_in_shards"] for of_rank in two[0])
    assert one == other
    assert one["counts"] and one["weights"] <= 2e-3  # bf16, in two layouts


def test_lsuv_sets_the_same_weights_everywhere_and_refuses_shards(two):
    one, other = (of_rank["layers_set_by_a_batch"] for of_rank in two[0])
    assert one == other
    assert "LSUV cannot set layers in shards" in one["refused"]


@pytest.mark.parametrize("name", ["one optimiser", "two"])
def test_halves_take_turns_as_in_one_process(name, two):
    assert_as_one([of_rank["turns"][name] for of_rank in two[0]])


def test_where_replicas_are_made_anew_in_each_turn_each_keeps_its_statistics(two):
    assert all(of_rank["turns"]["statistics"] <= 1e-6 for of_rank in two[0])


def test_telemetry_has_rows_of_each_part_and_refuses_shards(two):
    one, other = (of_rank["telemetry"] for of_rank in two[0])
    assert one["updates"] == other["updates"]
    assert one["n"] == [4, 4, 4, 4, 4, 4, 1] and other["n"] == [4, 4, 4, 4, 4, 4, 1]
    assert one["means"] != other["means"]
    assert all(
        "Telemetry cannot watch a model in shards" in mine["refused"] for mine in (one, other)
    )


def test_halves_in_shards_are_refused(two):
    for of_rank in two[0]:
        assert "in shards cannot take turns" in of_rank["turns"]["refused"]


@pytest.mark.parametrize(("number", "taken"), [(0, [0]), (1, [1]), (2, [])])
def test_a_process_without_a_gpu_of_its_own_gets_as_far_as_being_told(number, taken, monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: sum(chosen))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert choose_device() == (torch.device("cuda", number % 2), "a GPU")
    assert chosen == taken  # the fit refuses a number that there is not


# ── nothing is left ─────────────────────────────────────────────────────────────────────────────


def test_everything_is_undone(two):
    for of_rank in two[0]:
        assert len(of_rank["undone"]) == 6
        for way, what in of_rank["undone"].items():
            assert all(what.values()), f"{way}: {[k for k, v in what.items() if not v]}"


def test_looks_in_and_after_a_fit_see_what_one_process_sees(two):
    for of_rank in two[0]:
        for mode in ("ddp", "fsdp"):
            assert of_rank["looks"][mode]["looks"] <= 1e-5
            assert of_rank["looks"][mode]["after"] <= 1e-6
            assert_as_one([of_rank["looks"][mode]])
        assert of_rank["looks"]["search"]


@pytest.mark.parametrize("loader", ["Loader", "list", "Loader, fsdp"])
def test_predictions_in_a_fit_are_those_of_all_items(loader, two):
    for of_rank in two[0]:
        found = of_rank["predictions_in_a_fit"][loader]
        assert found["sizes"] == [9, 9] * 2
        assert found["values"] <= 1e-5


@pytest.mark.parametrize("world", ["two", "three"])
def test_rank_0_alone_prints_and_writes(world, request):
    found, printed = request.getfixturevalue(world)
    for mode in ("ddp", "fsdp"):
        written = [of_rank["saving"][mode] for of_rank in found]
        assert [of_rank["here"] for of_rank in written] == [True] + [False] * (len(found) - 1)
        assert written[0]["same"]
    assert len(re.findall("train loss", printed)) == 1
    assert f"rank 0 of {len(found)}, ddp" in printed


# ── what ends badly ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how, mode", [("kill", "ddp"), ("hang", "fsdp")])
def test_a_rank_that_is_lost_ends_all(how, mode, tmp_path):
    timeout, slack = 6, 20  # on a busy machine; benchmarks/killed_rank.py measures how soon
    ended = launch(2, how, tmp_path, mode, timeout)
    took = time.time() - float((tmp_path / "failed").read_text())
    assert ended.returncode != 0
    assert took < timeout + slack
    # of a rank that is killed torchrun may hear before the others do
    if how == "hang":
        assert "Another process ended, or did nothing for longer than" in ended.stderr
        assert "on rank 0 of 2" in ended.stderr


# ── one process ─────────────────────────────────────────────────────────────────────────────────


def test_in_one_process_nothing_changes_and_it_says_so(data, model, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    bits = []
    for callbacks in ([], [Distributed("fsdp")]):
        torch.manual_seed(0)
        for layer in model:
            getattr(layer, "reset_parameters", lambda: None)()
        data.train.epoch = 0
        learn = Learner(model, data, callbacks=callbacks, device="cpu")
        learn.fit(2)
        bits.append([tensor.numpy().tobytes() for tensor in model.state_dict().values()])
    assert bits[0] == bits[1]
    assert "one process, so Distributed changes nothing" in capsys.readouterr().out
    assert "process" not in learn.device_reason
    assert (rank(), world_size(), is_first(), as_the_first_says(3.0)) == (0, 1, True, 3.0)


def test_slips_are_told(data, model, monkeypatch):
    with pytest.raises(UnknownName, match="did you mean 'fsdp'"):
        Distributed("fsdp2")
    with pytest.raises(SetupError, match="above 0"):
        Distributed("ddp", timeout=0)
    with pytest.raises(SetupError, match="above 0"):
        Distributed("ddp", "a")
    with pytest.raises(UnknownName, match="knows no mode 2"):
        Distributed(2)
    dataset = TensorDataset(torch.zeros(4, 2))
    own = DataLoader(dataset, sampler=DistributedSampler(dataset, 2, 0))
    with pytest.raises(SetupError, match="a part of its part"):
        sliced(own, 0, 2, nullcontext)
    monkeypatch.setenv("WORLD_SIZE", "2")
    lbfgs = Learner(model, data, opt_func=torch.optim.LBFGS, device="cpu")
    with pytest.raises(SetupError, match="LBFGS"):
        lbfgs.fit(1, callbacks=[Distributed(), Progress("off")])


# ── arithmetic ──────────────────────────────────────────────────────────────────────────────────


@given(n=st.integers(0, 200), world=st.integers(1, 17))
def test_parts_are_all_items_once_in_order(n, world):
    shares = [Share(n, rank, world) for rank in range(world)]
    assert [i for share in shares for i in range(n)[share.part]] == list(range(n))
    assert [share.n_own for share in shares] == shares[0].sizes == sorted(shares[0].sizes)[::-1]
    assert max(shares[0].sizes) - min(shares[0].sizes) <= 1


def parts_of(make, world):
    """Give every rank's batches, without those that only stand in."""
    ranks = []
    for number in range(world):
        view = sliced(make(), number, world, nullcontext)
        ranks.append([[t[: view.share.n_own] for t in batch] for batch in view])
    return ranks


class Items:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        return torch.tensor([float(i)]), i


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    size=st.integers(1, 12),
    world=st.integers(1, 5),
    kind=st.sampled_from(["arrays", "items", "list"]),
    drop_last=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_the_parts_of_a_batch_make_the_batch(n, size, world, kind, drop_last, epoch):
    drop_last = drop_last and n >= size

    def make():
        arrays = ArrayDataset(torch.arange(float(n)).reshape(-1, 1), torch.arange(n))
        dataset = Items(n) if kind == "items" else arrays
        loader = Loader(dataset, size, shuffle=True, drop_last=drop_last, seed=3)
        loader.epoch = epoch
        return list(loader) if kind == "list" else loader

    ranks = parts_of(make, world)
    whole = list(make())
    assert [len(batches) for batches in ranks] == [len(whole)] * world
    for number, batch in enumerate(whole):
        for i, tensor in enumerate(batch):
            joined = torch.cat([batches[number][i] for batches in ranks])
            assert torch.equal(joined, tensor)


@pytest.mark.parametrize("size", [3, 8, 50])
def test_the_whole_loader_tells_which_items_a_part_has(size):
    x = torch.rand(20, 1, 2, 3)

    def flipped(world, epochs=3):
        whole = Loader(ArrayDataset(x), size, shuffle=True)
        flip, parts = AlternatingFlip(whole), []
        for number in range(world):
            view = sliced(whole, number, world, nullcontext) if world > 1 else whole
            view.epoch = 0
            own = [
                flip(batch)[: view.share.n_own if world > 1 else None]
                for _ in range(epochs)
                for [batch] in view
            ]
            parts.append(own)
        return torch.cat([torch.cat(batch) for batch in zip(*parts, strict=True)])

    assert torch.equal(flipped(2), flipped(1))
    assert torch.equal(flipped(3), flipped(1))


def test_a_part_is_a_loader_like_the_whole():
    whole = Loader(Items(22), 5, shuffle=True)
    part = sliced(whole, 1, 2, nullcontext)
    assert isinstance(part, Loader)
    assert (len(part), part.batch_size, part.epoch) == (5, 5, 0)
    for batch in part:
        assert part.drawn.items.tolist() == batch[1].tolist()
    assert (part.epoch, part.share) == (1, None)
    [fifth] = part.batches(0, 4)
    assert fifth[1].tolist() == whole.order(0)[21:].tolist()
    assert sliced(part, 1, 2, nullcontext) is part
    part.batch_size = 11  # callbacks.BatchSize does so
    assert [len(batch[1]) for batch in part] == [5, 5]


def test_the_mark_of_a_loader_is_of_what_decides_the_order():
    def mark(n=20, epoch=0, **settings):
        part = sliced(Loader(ArrayDataset(torch.zeros(n)), 5, **settings), 0, 2, nullcontext)
        part.epoch = epoch
        return next((part.mark for _ in part), None)

    settings = [
        {}, {"shuffle": True}, {"n": 19}, {"shuffle": True, "seed": 1},
        {"shuffle": True, "epoch": 1}, {"shuffle": True, "seed": 2**70},
    ]  # fmt: skip
    marks = [mark(**each) for each in settings]
    assert len(set(marks)) == len(marks) and marks == [mark(**each) for each in settings]
    assert mark(epoch=1, seed=1) == mark()  # in order, whoever looked at them before
    assert max(marks) < 2**53


@pytest.mark.parametrize("dtype", [
    torch.uint8, torch.bool, torch.int16, torch.int64, torch.bfloat16, torch.float32, torch.float64,
])  # fmt: skip
def test_the_mark_of_a_batch_is_of_its_last_tensor(dtype):
    def marks(*batches):
        view = sliced([(torch.rand(len(batch)), batch) for batch in batches], 0, 2, nullcontext)
        return [view.mark for _ in view]

    one = torch.tensor([0, 1, 0, 1, 0, 1], dtype=dtype)
    other = torch.tensor([0, 1, 1, 1, 0, 1], dtype=dtype)
    first, second, again = marks(one, other, one.view(2, 3).T)  # not contiguous
    assert first != second and first == again
    if dtype.is_floating_point:
        assert len(set(marks(one / 0, one / 0))) == 1  # NaN too is the same number


def test_the_mark_does_not_depend_on_the_number_of_threads():
    batch, marks, before = [torch.randn(400_000)], set(), torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        view = sliced([batch], 0, 2, nullcontext)
        marks |= {view.mark for _ in view}
    torch.set_num_threads(before)
    assert len(marks) == 1


@pytest.mark.parametrize("names", [list("abcde"), tuple("abcde"), [b"a"] * 5])
def test_arrays_and_lists_of_strings_are_cut_and_other_lists_are_not(names):
    batch = {
        "x": torch.arange(5),
        "y": np.arange(5),
        "names": names,
        "few": ["a", "b"],
        "s": "abcde",
    }
    [[first], [second]] = [sliced([batch], number, 2, nullcontext) for number in range(2)]
    assert (first["names"], second["names"]) == (names[:3], names[3:])
    assert (first["y"].tolist(), second["y"].tolist()) == ([0, 1, 2], [3, 4])
    assert (first["few"], first["s"]) == (["a", "b"], "abcde")


def test_blocks_are_the_members_of_the_outermost_containers():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.ModuleDict(
        {"stem": nn.Linear(2, 2), "body": nn.ModuleList([inner, nn.Linear(2, 2), nn.ReLU()])}
    )
    assert blocks(model) == [inner, model["body"][1]]
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    tied[2].weight = tied[0].weight
    assert blocks(tied) == [tied[1]]
