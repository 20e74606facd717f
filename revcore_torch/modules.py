"""The class to swap in for ``nn.Sequential``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revcore import sequential
from revcore.checks import check_blocks
from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.laws import InverseReport
from revcore.policy import Policy, Reverse, check_policy
from revcore.program import Program
from revcore_torch import signatures
from revcore_torch.determinism import check_name
from revcore_torch.functional import Layerwise, eager, inverse, inverse_report, joined
from revcore_torch.steps import dtype_of, gathered, spread

CouplingFunction = Callable[[Any, Any], Any] | None  # None, in a list: the additive one

_REVERSE = Reverse()


class ReversibleSequential(nn.Sequential):
    """Blocks one after the other, as ``nn.Sequential``, over reversible streams.

    The input is parted into streams ``x_0, x_1, …`` along ``split_dim``. Step ``i`` is
    ``x_{i mod n} ← coupling(x_{i mod n}, block_i(x_{(i+1) mod n}))``, and the streams are handed out oldest first, so
    rotated by one place a step, and joined again. For two streams and the additive coupling that is a RevNet (Gomez et
    al., arXiv 1707.04585).

    Shapes: the input and output have one shape; a block sees ``1/num_streams`` of ``split_dim`` and keeps its shape.

    Args:
        *modules: the blocks, or one ``OrderedDict`` of them. Their names in ``state_dict`` are ``nn.Sequential``'s.
        split_dim: the dimension that is parted; ``None`` gives every stream the whole input and returns their mean.
        coupling: a :class:`revcore.Coupling`, or a list that is cycled over the steps; additive by default.
        coupling_forward: ``y = coupling_forward(x, f)``, instead of ``coupling``; one function, or a list to cycle.
        coupling_inverse: ``x = coupling_inverse(y, f)``, its true inverse; checked on random values here and now.
        num_streams: how many streams; at least 2.
        program: any :class:`revcore.Program`, instead of ``coupling`` and ``num_streams``; its ``split`` and ``merge``
            say how streams are made.
        policy: what the backward pass keeps and rebuilds; never changes a value. ``model.policy`` may be set later.
        stream_dtype: in which streams are held between the blocks, as :func:`reversible` has it: ``"float32"`` under a
            model in bfloat16 or float16 keeps the rebuild from drifting. ``model.stream_dtype`` may be set later.
        determinism_check: ``"values"``, ``"shapes"`` or ``"none"``: how a block's second run is compared with its
            first, as :func:`reversible` has it. ``model.determinism_check`` may be set later.
        **revlib: ``memory_mode``, ``target_device`` and ``fused_optimizer`` of the library of that name
            (:class:`revcore_torch.revlib.options.Options`).

    Raises:
        SpecError: arguments that contradict each other, a coupling without a true inverse; on a call, an input that
            does not part, and all that :func:`reversible` raises.

    >>> import torch
    >>> model = ReversibleSequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    >>> x = torch.randn(2, 8)
    >>> torch.allclose(model.inverse(model(x)), x, atol=1e-6)
    True
    """

    def __init__(
        self,
        *modules: Any,
        split_dim: int | None = 1,
        coupling: Coupling | Sequence[Coupling] | None = None,
        coupling_forward: CouplingFunction | Sequence[CouplingFunction] | None = None,
        coupling_inverse: CouplingFunction | Sequence[CouplingFunction] | None = None,
        num_streams: int = 2,
        program: Program | None = None,
        policy: Policy = _REVERSE,
        stream_dtype: torch.dtype | str | None = None,
        determinism_check: str = "values",
        **revlib: Any,
    ) -> None:
        if any(getattr(module, "is_one_step", False) for module in modules):
            from revcore_torch.revlib.options import unwrap

            modules, coupling = unwrap(modules, program, coupling, coupling_forward, coupling_inverse)
            coupling_forward = coupling_inverse = None
        super().__init__(*modules)
        self._couplings = sequential.check_settings(
            program, coupling, coupling_forward, coupling_inverse, num_streams, torch.from_numpy
        )
        if program is not None:
            check_blocks(program, self, program.num_blocks)
        self._program = program
        self._how = sequential.split_and_merge(program, split_dim, "split_dim")
        self.num_streams = num_streams if program is None else program.num_streams
        self.split_dim = split_dim
        self.policy = policy
        self.stream_dtype = stream_dtype
        self.determinism_check = determinism_check
        self.revlib = None
        if revlib:
            from revcore_torch.revlib.options import Options

            self.revlib = Options(tuple(self), **revlib)
            if self.revlib.policy is not None:
                if policy is not _REVERSE:
                    raise SpecError("give either policy or memory_mode: they say the same thing")
                self.policy = self.revlib.policy

    @property
    def stream_dtype(self) -> torch.dtype | None:
        """In which streams are held; ``None`` takes them as they come."""
        return self._stream_dtype

    @stream_dtype.setter
    def stream_dtype(self, stream_dtype: torch.dtype | str | None) -> None:
        self._stream_dtype = dtype_of(stream_dtype)

    @property
    def determinism_check(self) -> str:
        """How a block's second run is compared with its first."""
        return self._determinism_check

    @determinism_check.setter
    def determinism_check(self, determinism_check: str) -> None:
        self._determinism_check = check_name(determinism_check)

    @property
    def policy(self) -> Policy:
        """What the backward pass keeps and rebuilds."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = check_policy(policy)

    @property
    def program(self) -> Program:
        """The given program, or ``revnet`` over the blocks at hand (so ``append`` and ``del`` work)."""
        return self._program or sequential.default_program(len(self), self._couplings, self.num_streams)

    @property
    def blocks(self) -> tuple[Any, ...]:
        """What is called, in running order."""
        return tuple(self) if self.revlib is None else self.revlib.run(tuple(self))

    def __getitem__(self, idx: Any) -> Any:
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        if self._program is not None:
            raise SpecError(
                "a ReversibleSequential with a program of its own cannot be sliced: build the part's program"
            )
        cycle = self._couplings
        couplings = [cycle[i % len(cycle)] for i in range(len(self))[idx]] if len(cycle) > 1 else cycle
        options: Any = {} if self.revlib is None else {"target_device": self.revlib.target_device}
        part = type(self)(
            OrderedDict(list(self._modules.items())[idx]),  # type: ignore[arg-type]
            split_dim=self.split_dim,
            coupling=couplings or None,
            num_streams=self.num_streams,
            policy=self.policy,
            stream_dtype=self.stream_dtype,
            determinism_check=self.determinism_check,
            **options,
        )
        return part.train(self.training)

    def forward(self, input: Tensor, *args: Any, layerwise_args_kwargs: Layerwise = None, **kwargs: Any) -> Any:
        """Return the output, of the input's shape; ``(output, aux)`` where a block returned more than its ``f``.

        ``*args`` and ``**kwargs`` go to every block after its source; ``layerwise_args_kwargs`` holds one more
        ``(args, kwargs)`` pair for each block. ``aux`` is a list with one tuple for each block.
        """
        # copies of parameters come and go while a block runs, which no compiled graph does
        run = eager if self.revlib is not None and self.revlib.target_device is not None else joined
        return run(
            self,
            self.blocks,
            input,
            args,
            kwargs,
            layerwise_args_kwargs,
            self.policy,
            self.split,
            self.merge,
            self.stream_dtype,
            self.determinism_check,
        )

    def inverse(self, output: Tensor, *args: Any, layerwise_args_kwargs: Layerwise = None, **kwargs: Any) -> Tensor:
        """Return the input that :meth:`forward` made ``output`` of.

        Raises:
            SpecError: the streams were not joined by ``"concat"``, so they cannot be told apart.
            InversionError: a block draws random numbers; call ``eval()`` first.
        """
        sequential.check_invertible(self._how, "revcore_torch.inverse")
        streams = inverse(
            self.program,
            self.blocks,
            self.split(output),
            *args,
            layerwise_args_kwargs=layerwise_args_kwargs,
            stream_dtype=self.stream_dtype,
            **kwargs,
        )
        return self.merge(streams)

    def split(self, input: Any) -> tuple[Tensor, ...]:
        """Return the streams made of ``input``."""
        if not isinstance(input, Tensor):
            raise SpecError(f"the input came as {type(input).__name__}, expected a tensor")
        n, how = self.num_streams, self._how[0]
        if how != "chunk":
            return spread(input, how, n)
        assert self.split_dim is not None
        sequential.check_axis(self.split_dim, input.shape, n, "split_dim")
        return input.chunk(n, self.split_dim)

    def merge(self, streams: tuple[Tensor, ...]) -> Tensor:
        """Return the output made of ``streams``."""
        how = self._how[1]
        if how == "concat":
            assert self.split_dim is not None
            return torch.cat(streams, self.split_dim)
        return gathered(streams, how)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            signatures.write(self, metadata)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        signatures.compare(self, local_metadata, prefix[:-1])
        if any(".wrapped_module." in key for key in state_dict):
            from revcore_torch.revlib.keys import rename

            rename(state_dict, prefix, tuple(self._modules))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def extra_repr(self) -> str:
        held = f", stream_dtype={self.stream_dtype}" if self.stream_dtype is not None else ""
        return f"split_dim={self.split_dim}, num_streams={self.num_streams}, policy={self.policy}{held}"


def check_inverse(
    module: ReversibleSequential, input: Tensor, *args: Any, layerwise_args_kwargs: Layerwise = None, **kwargs: Any
) -> InverseReport:
    """Run ``module`` forward and back on ``input``, and report how far each rebuilt stream is from the true one.

    Keeps every step's streams meanwhile, and changes no buffer.

    Args:
        module: the model whose drift is asked for.
        input: what it would be called with, as would ``*args``, ``**kwargs`` and ``layerwise_args_kwargs``.

    Raises:
        InversionError: a block draws random numbers; call ``eval()`` first.

    >>> import torch
    >>> model = ReversibleSequential(*[torch.nn.Linear(4, 4) for _ in range(8)])
    >>> check_inverse(model, torch.randn(2, 8)).worst < 1e-5
    True
    """
    return inverse_report(
        module.program,
        module.blocks,
        module.split(input),
        *args,
        layerwise_args_kwargs=layerwise_args_kwargs,
        stream_dtype=module.stream_dtype,
        **kwargs,
    )
