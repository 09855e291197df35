"""Do something at one moment: look around, call a function, start the debugger."""

from collections.abc import Callable

from ..errors import UnknownName, did_you_mean
from ..events import MOMENTS, Callback
from ..learner import Learner


class Debug(Callback):
    """Call a function at a moment, after everybody else.

    Args:
        moment: a name from the timetable, such as "after_loss".
        action: takes the learner; None starts the debugger, where `learn` is at hand.

    Raises:
        UnknownName: the timetable has no such moment.
    """

    order = 999
    changes = True  # whoever is in the debugger may assign anything

    def __init__(self, moment: str, action: Callable[[Learner], object] | None = None):
        if moment not in MOMENTS:
            raise UnknownName(
                f"The timetable has no moment {moment!r}.", do=did_you_mean(moment, MOMENTS)
            )
        self.moment, self.action = moment, action
        setattr(self, moment, self._act)

    def _act(self, learn: Learner) -> None:
        if self.action is None:
            breakpoint()
        else:
            self.action(learn)
