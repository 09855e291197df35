"""Which of these tricks matters? Runs with each switch on and off, paired by seed."""

from .effects import Ablation, Effect, Row, Run
from .running import ablate

__all__ = ["Ablation", "Effect", "Row", "Run", "ablate"]
