"""``revlib.core``, for ``import revcore_torch as revlib``: see :mod:`revcore_torch.revlib.core`."""

from revcore_torch.revlib.core import *  # noqa: F403
