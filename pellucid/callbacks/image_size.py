"""Progressive resizing: training on small images first."""

from torch import Tensor
from torch.optim import Optimizer

from ..errors import SetupError, are_whole
from ..events import Callback
from ..learner import Learner
from ..schedules import Schedule
from ..tree import describe
from ..vision.sizes import resize


class ImageSize(Callback):
    """Train on images of a size that follows the fraction of the run; validate on whole ones.

    Small images cost less: half the side is a quarter of the work. (Howard, "Training Imagenet in
    3 hours for USD 25; and CIFAR10 for USD 0.26", 2018.) Batches are resized on the device, after
    augmentation and transforms. The model must take any size.

    Args:
        schedule: from the position in the run, 0 to 1, to the share of the side: for instance
            `combine([0.7, 0.3], [linear(0.5, 1), constant(1)])`. At 1 a batch stays as it is.
        multiple: sides are rounded to a multiple of this, once at least.

    Raises:
        SetupError: no schedule, a share that is not above 0, or inputs that are no images.
    """

    order = 5  # after those that mix the batch, at its full size
    changes = True
    decides = "the image size"

    def __init__(self, schedule: Schedule, multiple: int = 4):
        if not callable(schedule) or not are_whole(multiple) or multiple < 1:
            raise SetupError(
                "ImageSize takes a schedule of the side, and a multiple of 1 or more.",
                saw=f"{schedule!r}, multiple={multiple!r}",
                do="ImageSize(schedules.linear(0.5, 1))",
            )
        self.schedule, self.multiple = schedule, multiple

    def curves(self, opt: Optimizer, epochs: int) -> dict[str, Schedule]:
        """Return the share of the side, before it is rounded, by the position in the run."""
        return {"image size": self.schedule}

    def before_batch(self, learn: Learner) -> None:
        """Resize a training batch."""
        share = self.schedule(learn.progress)
        if not learn.training or share == 1:
            return
        if not isinstance(learn.x, Tensor) or learn.x.ndim != 4 or share <= 0:
            raise SetupError(
                "ImageSize resizes images (n, c, h, w) by a share above 0.",
                saw=f"{describe(learn.x)}, a share of {share:g}",
            )
        sides = [int(side * share / self.multiple + 0.5) for side in learn.x.shape[2:]]
        height, width = (max(side, 1) * self.multiple for side in sides)
        learn.x = resize(learn.x, (height, width))
