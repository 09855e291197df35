"""Weights in a file: all of them come back, what is shared is shared, what is broken is named."""

import pytest
import torch
from torch import nn

from pellucid import weights
from pellucid.errors import DataError, DataNotFound

CPU = torch.device("cpu")


def tied() -> nn.Sequential:
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7), nn.Conv2d(3, 8, 3)
    )
    model[2].weight = model[0].weight
    return model


def test_all_that_a_model_holds_comes_back_however_it_lies_in_memory(tmp_path):
    model, other = tied().to(memory_format=torch.channels_last), tied()
    model[1](torch.randn(5, 4))
    path = weights.save(model, tmp_path / "deep" / "er" / "weights.safetensors")
    weights.load(other, str(path), CPU)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert other[2].weight is other[0].weight
    assert other[3].weight.stride() == (27, 9, 3, 1)  # as its own user laid it out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 of torch.save", "cut"])
def test_a_file_that_is_none_of_ours_is_named(content, tmp_path):
    path = weights.save(tied(), tmp_path / "weights.safetensors")
    path.write_bytes(path.read_bytes()[:-3] if content == "cut" else content)
    model, before = tied(), tied()
    before.load_state_dict(model.state_dict())
    with pytest.raises(DataError, match=r"saved weights cannot be read\.\n  saw: .*weights\.safe"):
        weights.load(model, path, CPU)
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    with pytest.raises(DataNotFound, match="no saved weights"):
        weights.load(model, tmp_path, CPU)


def test_weights_of_another_model_leave_this_one_as_it_is(tmp_path):
    path = weights.save(tied(), tmp_path / "weights.safetensors")
    other = nn.Sequential(nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.ReLU())
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        DataError, match=r"nothing was loaded\.\n  saw: .*3\.weight in the file alone"
    ):
        weights.load(other, path, CPU)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    untied = tied()
    untied[2].weight = nn.Parameter(torch.zeros(7, 4))
    with pytest.raises(DataError, match=r"(0|2)\.weight in the model alone"):
        weights.load(untied, path, CPU)
    untied[2] = nn.Linear(4, 3)
    with pytest.raises(DataError, match=r"2\.bias \(3,\) here, \(7,\) in the file"):
        weights.load(untied, path, CPU)
    assert not untied[2].weight.equal(torch.zeros(3, 4))
