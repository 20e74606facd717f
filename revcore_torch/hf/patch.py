"""The forward of one layer as part of a reversible stack, and what the layers of a stack share.

The model's own loop goes on calling its layers, with all hooks around them: each layer's ``forward`` is replaced on the
instance, so names, classes and ``state_dict`` stay. What must pass from layer to layer beside the hidden states (the
other stream, the tape) lies in a :class:`revcore_torch.session.Session`, which the first layer opens.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revcore.errors import SpecError
from revcore.policy import MemoryBudget, Policy, StepPolicy, StoreAll, check_policy
from revcore_torch import signatures
from revcore_torch.determinism import check_name
from revcore_torch.hf import caches, engines
from revcore_torch.hf.kinds import Settings
from revcore_torch.replay import is_recomputing
from revcore_torch.session import Session
from revcore_torch.steps import dtype_of, gathered, spread
from revcore_torch.watch import is_faking

_thread = threading.local()
# beside the model, which stays one that can be copied and pickled
_compiled: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class Stack:
    """A list of layers that is run as a reversible network.

    Attributes:
        name: of the list in the model.
        settings: what it was made into.
        policy: what the backward pass keeps and rebuilds; counts are of layers. May be set at any time.
        stream_dtype: in which the streams are held between layers.
        determinism_check: how a layer's second run is compared with its first; may be set at any time.
        enabled: ``False`` runs the ordinary layers.

    >>> import transformers
    >>> from revcore import Reverse
    >>> from revcore_torch.hf import make_reversible, stacks
    >>> config = transformers.GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    >>> (stack,) = stacks(make_reversible(transformers.GPT2LMHeadModel(config), "momentum", beta=0.9))
    >>> stack.policy = Reverse(keep_last=2)
    >>> stack.depth, stack.name
    (4, 'transformer.h')
    """

    def __init__(
        self,
        name: str,
        depth: int,
        settings: Settings,
        policy: Policy,
        stream_dtype: Any,
        determinism_check: str = "values",
    ) -> None:
        self.name, self.depth, self.settings = name, depth, settings
        self.policy = policy
        self.stream_dtype = dtype_of(stream_dtype)
        self.determinism_check = determinism_check
        self.enabled = True
        self.compiled: dict[str, Any] | None = None
        self.program = settings.program(depth)
        # BDIA draws its sign anew in each forward pass
        self.mirrored = settings.program(depth, -1) if settings.kind == "bdia" else None

    @property
    def determinism_check(self) -> str:
        """How a layer's second run is compared with its first."""
        return self._determinism_check

    @determinism_check.setter
    def determinism_check(self, determinism_check: str) -> None:
        self._determinism_check = check_name(determinism_check)

    @property
    def policy(self) -> StepPolicy | Sequence[StepPolicy]:
        """What the backward pass keeps and rebuilds."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        checked = check_policy(policy)
        if isinstance(checked, MemoryBudget):
            raise SpecError(
                "MemoryBudget plans a network that revcore calls, and these layers are called by the model's own loop: "
                "write Reverse(keep_last=...) for what memory is left"
            )
        if isinstance(checked, Sequence) and len(checked) != self.depth:
            raise SpecError(
                f"policy came with {len(checked)} entries, expected one for each of the {self.depth} layers"
            )
        self._policy = checked

    def compile(self, **options: Any) -> None:
        """Compile each layer on its own from now on, as ``torch.compile(layer, **options)`` would.

        A model that is compiled as a whole runs its reversible layers uncompiled, outside of its graph.
        """
        self.compiled = options

    def _open(self, x: Tensor, keeps_all: bool) -> Session:
        """Begin a forward call."""
        stale = _sessions().pop(self, None)
        if stale is not None:  # somebody called a few layers by themselves, who knows when
            stale.forget()
        program = self.program
        if self.mirrored is not None and not is_faking() and torch.rand(()) < 0.5:
            program = self.mirrored
        policy = StoreAll() if keeps_all else self.policy
        streams = spread(x, program.split, program.num_streams)
        join = functools.partial(gathered, merge=program.merge)
        session = Session(program, policy, streams, self.stream_dtype, join, self.determinism_check)
        _sessions()[self] = session
        return session

    def _session(self) -> Session | None:
        """The forward call that is open in this thread, if one is."""
        return _sessions().get(self)

    def _close(self) -> None:
        """End the forward call that is open in this thread, if one is."""
        session = _sessions().pop(self, None)
        if session is not None and not session.is_over:
            session.drop()

    def _save(self, _: nn.Module, __: Any, ___: str, metadata: dict[str, Any]) -> None:
        """A hook of the list of layers, on ``state_dict()``."""
        signatures.write(self, metadata)

    def _load(self, _: nn.Module, __: Any, ___: str, metadata: dict[str, Any], *rest: Any) -> None:
        """A hook of the list of layers, before anything is loaded into it."""
        signatures.compare(self, metadata, self.name)

    def _after_loop(self, _: nn.Module, __: Any, output: Any) -> None:
        """A hook of the module that loops over the layers; it is called after a failure, too."""
        session = self._session()
        done = session.done if session is not None else 0
        self._close()
        if session is not None and output is not None:
            raise SpecError(
                f"{self.name}: layers 0 to {done - 1} of {self.depth} were called, and the output is made after the "
                "last: call make_plain(model), cut the layers, and make it reversible again"
            )


def _sessions() -> weakref.WeakKeyDictionary[Stack, Session]:
    if not hasattr(_thread, "sessions"):
        _thread.sessions = weakref.WeakKeyDictionary()
    return _thread.sessions


class Residual(nn.Module):
    """``f(x) = layer(x) − x``; a block of the program.

    ``own`` is a forward that the layer had of its own before, as Accelerate's hooks give it one.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.own: Callable[..., Any] | None = layer.__dict__.get("forward")
        self.in_tuple = False  # whether the layer returns its hidden states in one

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_recomputing():
            with engines.gathered(self.layer, (x, *args), kwargs) as done:
                out = self.plain_forward(x, *args, **kwargs)
                done(out)
        else:
            out = self.plain_forward(x, *args, **kwargs)
        self.in_tuple = isinstance(out, tuple)
        return (out[0] - x, *out[1:]) if isinstance(out, tuple) else out - x

    @property
    def ordinary(self) -> Callable[..., Any]:
        """The layer's forward as it was."""
        return self.own or functools.partial(type(self.layer).forward, self.layer)  # FSDP2 changes the type later

    def plain_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer as it was, and without Hugging Face's checkpointing: it is rebuilt already."""
        layer: Any = self.layer
        checkpointing = layer.__dict__.get("gradient_checkpointing")
        if not checkpointing:
            return self.ordinary(*args, **kwargs)
        layer.gradient_checkpointing = False
        try:
            return self.ordinary(*args, **kwargs)
        finally:
            layer.gradient_checkpointing = checkpointing


class Patch:
    """Holds a layer's new ``forward``; copied and pickled with the layer."""

    def __init__(self, stack: Stack, number: int, layer: nn.Module) -> None:
        self.stack, self.number, self.layer = stack, number, layer
        self.residual = Residual(layer)

    @property
    def is_outermost(self) -> bool:
        """Whether nobody put a forward of theirs around this one since."""
        return getattr(self.layer.forward, "__self__", None) is self

    @property
    def _block(self) -> nn.Module:
        options = self.stack.compiled
        if options is None:
            return self.residual
        if self.residual not in _compiled:
            _compiled[self.residual] = torch.compile(self.residual, **options)
        return _compiled[self.residual]

    @torch._disable_dynamo  # T10  # pyright: ignore[reportPrivateImportUsage]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack, layer = self.stack, self.layer
        if not stack.enabled or (stack.settings.kind == "bdia" and not layer.training):
            return self.residual.ordinary(*args, **kwargs)
        if not args:
            args = (kwargs.pop("hidden_states"),)
        x, *rest = args
        if self.number == 0:
            # evaluated without no_grad: the caller wants the cache filled, and a block that fills one cannot run twice
            keeps_all = not layer.training and torch.is_grad_enabled() and caches.holds_any(rest, kwargs)
            if keeps_all:
                caches.warn_of_storing()
            session = stack._open(x, keeps_all)
        else:
            session = stack._session()
        if session is None or session.done != self.number:
            came = "before layer 0" if session is None else f"after layer {session.done - 1}"
            stack._close()
            hint = ""
            if torch._C._current_graph_task_id() != -1:
                hint = (
                    ". This is a backward pass: something checkpoints each layer by itself (FSDP's "
                    "activation_checkpointing, checkpoint_wrapper). Leave that out: their inputs are rebuilt"
                )
            raise SpecError(f"{stack.name}: layer {self.number} was called {came}, expected one after the other{hint}")
        try:
            if session.records:
                rest, kwargs = caches.without(rest, kwargs)
            out = session.call(self._block, x, tuple(rest), kwargs)
        except BaseException:
            stack._close()
            raise
        if session.is_over:
            stack._close()
        return out if self.residual.in_tuple else out[0]
