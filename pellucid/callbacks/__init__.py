"""What plugs into the loop, one concern a file."""

from .best import Best
from .debug import Debug
from .early_stopping import EarlyStopping
from .lsuv import LSUV
from .progress import Progress
from .schedule import OneCycle, Schedule
from .telemetry import Telemetry

__all__ = [
    "LSUV",
    "Best",
    "Debug",
    "EarlyStopping",
    "OneCycle",
    "Progress",
    "Schedule",
    "Telemetry",
]
