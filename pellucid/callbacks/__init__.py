"""What plugs into the loop, one concern a file."""

from .best import Best
from .debug import Debug
from .early_stopping import EarlyStopping
from .progress import Progress
from .schedule import OneCycle, Schedule

__all__ = ["Best", "Debug", "EarlyStopping", "OneCycle", "Progress", "Schedule"]
