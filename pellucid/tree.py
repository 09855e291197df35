"""Batches as nested tuples, lists and dicts of tensors: move, measure, split, describe.

A leaf is a tensor or anything that is no tuple, list or dict; what is no tensor passes untouched.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import DataError


def map_leaves(
    fn: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Apply `fn` to every leaf and rebuild the same structure (named tuples included).

    `is_leaf` names tuples, lists and dicts that are leaves too.
    """
    if is_leaf is not None and is_leaf(tree):
        return fn(tree)
    if isinstance(tree, dict):
        return type(tree)((key, map_leaves(fn, value, is_leaf)) for key, value in tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(fn, value, is_leaf) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_leaves(fn, value, is_leaf) for value in tree)
    return fn(tree)


def leaves(tree: Any) -> list[Any]:
    """Return the leaves in order; nothing is rebuilt, so any kind of tuple or dict will do."""
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host waits for nothing but what it is to read itself.

    CUDA takes a copy of ordinary memory before it goes on. Others may read what is long overwritten
    (torch issue 139550, of MPS), so for them the host waits.
    """
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type == "cuda")


def to_device(tree: Any, device: torch.device) -> Any:
    """Move every tensor to `device`; what is there already is returned as it is, not copied."""
    if isinstance(tree, Tensor):
        return sent(tree, device)
    return map_leaves(
        lambda leaf: to_device(leaf, device) if isinstance(leaf, Tensor) else leaf, tree
    )


def join(trees: list[Any]) -> Any:
    """Join batches of one structure along the first dimension of each tensor.

    Numbers without dimensions, one a batch, become a tensor (batches,); of what is no tensor the
    first is taken.
    """
    kind = type(trees[0])
    if isinstance(trees[0], dict):
        return kind({key: join([tree[key] for tree in trees]) for key in trees[0]})
    if isinstance(trees[0], (tuple, list)):
        parts = [join(list(part)) for part in zip(*trees, strict=True)]
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    if not isinstance(trees[0], Tensor):
        return trees[0]
    return torch.cat(trees) if trees[0].ndim else torch.stack(trees)


def n_items(tree: Any) -> int:
    """Return the number of items in a batch: the length of its first tensor with dimensions.

    Raises:
        DataError: no tensor, or only tensors without dimensions.
    """
    if isinstance(tree, Tensor) and tree.ndim:
        return tree.shape[0]
    for leaf in leaves(tree):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise DataError(
        "A batch holds no tensor whose first dimension counts its items.",
        saw=describe(tree),
        do="give batches of tensors, the first dimension being the item.",
    )


def split(batch: Any, n_inputs: int) -> tuple[Any, Any]:
    """Split a batch into inputs and targets: the first `n_inputs` parts, and the rest.

    One part stands for itself, several stay a tuple (of a dict: a dict), none is None.
    A tensor alone is an input without a target. The inputs of a dict stay a dict, even if there
    is only one, since the model gets them by name.

    Raises:
        DataError: the batch has fewer than `n_inputs` parts.
    """
    if type(batch) in (tuple, list) and len(batch) == 2 and n_inputs == 1:
        return batch[0], batch[1]
    if isinstance(batch, Tensor):
        batch = (batch,)
    if not isinstance(batch, (tuple, list, dict)) or len(batch) < n_inputs or not len(batch):
        raise DataError(
            f"A batch has no {n_inputs} input(s).",
            saw=describe(batch),
            do="let the loader give tuples, lists or dicts, inputs first, and set `n_inputs` of "
            "DataLoaders to the number of inputs.",
        )
    if isinstance(batch, dict):
        keys = list(batch)
        inputs: Any = {key: batch[key] for key in keys[:n_inputs]}
        targets: Any = {key: batch[key] for key in keys[n_inputs:]}
        return inputs, next(iter(targets.values())) if len(targets) == 1 else targets or None
    x, y = tuple(batch[:n_inputs]), tuple(batch[n_inputs:])
    return x[0] if len(x) == 1 else x, y[0] if len(y) == 1 else y or None


def describe(tree: Any) -> str:
    """Describe a batch in one line: dtypes and shapes, nested as it is nested."""
    if isinstance(tree, Tensor):
        shape = "×".join(map(str, tree.shape)) or "scalar"
        return f"{str(tree.dtype).removeprefix('torch.')} {shape}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        return "(" + ", ".join(map(describe, tree)) + ")"
    return "nothing" if tree is None else type(tree).__name__
