"""pellucid: a PyTorch training library you can see through.

Names are fetched when they are first used, so that `pellucid --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ablation import ablate
    from .data import DataLoaders, Loader
    from .device import seed_everything
    from .errors import PellucidError
    from .events import Callback, CancelBatch, CancelEpoch, CancelFit, CancelStep
    from .learner import Learner
    from .record import Record

__version__ = "0.1.0"

_HOMES = {
    "Callback": "events",
    "CancelBatch": "events",
    "CancelEpoch": "events",
    "CancelFit": "events",
    "CancelStep": "events",
    "DataLoaders": "data",
    "Learner": "learner",
    "Loader": "data",
    "PellucidError": "errors",
    "Record": "record",
    "ablate": "ablation",
    "seed_everything": "device",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pellucid' has no attribute {name!r}")
    return getattr(import_module(f"pellucid.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
