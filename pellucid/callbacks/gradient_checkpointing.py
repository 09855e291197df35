"""Gradient checkpointing for the time of a fit."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from ..errors import SetupError, UnknownName, did_you_mean
from ..events import Callback
from ..gradient_checkpointing import gradient_checkpointing
from ..learner import Learner


class GradientCheckpointing(Callback):
    """Train with less memory: what lies within some modules is computed twice and not kept.

    The weights come out the same; see the function `gradient_checkpointing`. When the fit ends the
    modules are as they were.

    Args:
        modules: their names in the model, as `learn.summary()` shows them: blocks with much in
            them, none within another.

    Raises:
        SetupError: there are no names.
        UnknownName: in the fit, if the model has no module of a name.
    """

    def __init__(self, modules: Sequence[str]):
        self.modules = [modules] if isinstance(modules, str) else list(modules)
        if not self.modules:
            raise SetupError("GradientCheckpointing takes names of modules, one or more.")

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Let the modules compute twice, until the fit ends."""
        known = dict(learn.model.named_modules())
        for name in self.modules:
            if name not in known:
                names = [other for other in known if other]
                raise UnknownName(
                    f"The model has no module {name!r}.", do=did_you_mean(name, names)
                )
        with gradient_checkpointing([known[name] for name in self.modules]):
            yield
