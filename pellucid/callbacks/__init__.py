"""What plugs into the loop, one concern a file."""

from .accumulate import Accumulate
from .batch_size import BatchSize
from .best import Best
from .clip import Clip
from .clocks import Clocks
from .compile import Compile
from .debug import Debug
from .distributed import Distributed
from .early_stopping import EarlyStopping
from .ema import EMA
from .gradient_checkpointing import GradientCheckpointing
from .image_size import ImageSize
from .label_smoothing import LabelSmoothing
from .lookahead import Lookahead
from .lsuv import LSUV
from .max_time import MaxTime
from .mix import CutMix, MixUp
from .non_finite import NonFinite
from .precision import Precision
from .progress import Progress
from .schedule import OneCycle, Schedule
from .swa import SWA
from .take_turns import TakeTurns
from .telemetry import Telemetry
from .unfreeze import Unfreeze

__all__ = [
    "EMA",
    "LSUV",
    "SWA",
    "Accumulate",
    "BatchSize",
    "Best",
    "Clip",
    "Clocks",
    "Compile",
    "CutMix",
    "Debug",
    "Distributed",
    "EarlyStopping",
    "GradientCheckpointing",
    "ImageSize",
    "LabelSmoothing",
    "Lookahead",
    "MaxTime",
    "MixUp",
    "NonFinite",
    "OneCycle",
    "Precision",
    "Progress",
    "Schedule",
    "TakeTurns",
    "Telemetry",
    "Unfreeze",
]
