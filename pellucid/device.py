"""Where a run happens: the choice of the device, with its reason, and one switch for the seeds."""

import os
import random

import numpy as np
import torch

from .errors import SetupError
from .randomness import checked_seed


def choose_device(device: str | torch.device = "auto") -> tuple[torch.device, str]:
    """Choose a device and say why.

    Args:
        device: "auto" takes CUDA, else Apple's MPS, else the CPU; anything else is taken as
            torch names it ("cpu", "cuda:1").

    Returns:
        The device as tensors on it name it ("cuda" is "cuda:0", say), and the reason for it, a
        short phrase.

    Raises:
        SetupError: torch does not know the name, or the device is not there.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device, "as asked"
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise SetupError(
                f"The device {str(device)!r} cannot be used.",
                saw=str(error).splitlines()[0],
                do='choose "auto", "cpu", or a device that torch sees on this machine.',
            ) from None
    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", "-1"))
        if 0 <= number < torch.cuda.device_count():  # of torchrun's processes each has its own
            torch.cuda.set_device(number)
        return torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.empty(0, device="mps").device, "Apple's GPU"
    threads = torch.get_num_threads()
    return torch.device("cpu"), f"no GPU that torch can use; {threads} thread{'s'[: threads > 1]}"


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (on every device) with one number.

    Loaders carry their own seed, an argument, and do not depend on these.

    Args:
        seed: 0 <= seed < 2**32, the range that all of them take.
    """
    seed = checked_seed(seed)
    if not 0 <= seed < 2**32:
        raise SetupError("A seed must lie between 0 and 2**32 - 1.", saw=str(seed))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def choose_precision(device: torch.device) -> tuple[str, str]:
    """Return "bf16" where a device computes in it faster than in float32, else "fp32", and why."""
    if device.type == "cuda":
        name, (major, minor) = (
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
        )
        if major >= 8:
            return "bf16", f"{name} has tensor cores for it"
        return "fp32", f"{name}, compute capability {major}.{minor}, has no bf16; fp16 is faster"
    if device.type == "cpu":
        for feature, supported in (
            ("AMX", torch.cpu._is_amx_tile_supported),
            ("AVX-512 BF16", torch.cpu._is_avx512_bf16_supported),
        ):
            if supported():
                return "bf16", f"this CPU has {feature}"
        return "fp32", "this CPU has neither AMX nor AVX-512 BF16"
    return "fp32", f"nothing is known of bf16 on {device.type}"
