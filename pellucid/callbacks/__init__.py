"""What plugs into the loop, one concern a file."""

from .accumulate import Accumulate
from .best import Best
from .clip import Clip
from .debug import Debug
from .early_stopping import EarlyStopping
from .lsuv import LSUV
from .non_finite import NonFinite
from .precision import Precision
from .progress import Progress
from .schedule import OneCycle, Schedule
from .telemetry import Telemetry

__all__ = [
    "LSUV",
    "Accumulate",
    "Best",
    "Clip",
    "Debug",
    "EarlyStopping",
    "NonFinite",
    "OneCycle",
    "Precision",
    "Progress",
    "Schedule",
    "Telemetry",
]
