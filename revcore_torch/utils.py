"""``revlib.utils``, for ``import revcore_torch as revlib``: see :mod:`revcore_torch.revlib.utils`."""

from revcore_torch.revlib.utils import *  # noqa: F403
