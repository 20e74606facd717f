"""What a Hugging Face model can do, it can do when it is reversible; what it cannot is refused in words."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
import transformers
from torch import nn

import revcore_torch
from revcore import MemoryBudget, SpecError
from revcore_torch import Reverse, StoreAll, is_recomputing, keep, outside
from revcore_torch.hf import compare, make_plain, make_reversible, plain, stacks
from revcore_torch.memory import LiveBytes
from tests.helpers import assert_close, tree_error
from tests.hf.models import GENERATORS, by_hand, inputs, make

PROMPT = torch.tensor([[5, 7, 11, 13]])


def momentum(family: str, beta: float = 0.5, **options: Any) -> Any:
    return make_reversible(make(family), "momentum", beta=beta, **options)


def gradients(model: nn.Module) -> dict[str, Any]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- generation -------------------------------------------------------------------------------------------------------


def tokens(model: Any, **options: Any) -> list[int]:
    given = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 8, "do_sample": False}
    return model.eval().generate(**given, **options).tolist()


@pytest.mark.parametrize("family", GENERATORS)
def test_generate_gives_the_same_tokens_where_the_function_is_the_same(family: str) -> None:
    ordinary = make(family)
    expected = tokens(ordinary)
    same: list[tuple[Any, dict[str, Any]]] = [("bdia", {}), ("momentum", {"beta": 1e-9})]
    for kind, options in same:
        model = make_reversible(copy.deepcopy(ordinary), kind, **options)
        assert tokens(model) == expected
        given = {name: value for name, value in inputs(family).items() if name != "labels" or family == "t5"}
        assert compare(model, **given).agreement == 1.0
        assert compare(model, **given).relative < 1e-6


@pytest.mark.parametrize("family", GENERATORS)
def test_a_cache_changes_no_token(family: str) -> None:
    model = momentum(family)
    assert tokens(model) == tokens(model, use_cache=False)


def test_how_far_it_is_otherwise() -> None:
    near, far = (compare(momentum("gpt2", beta), input_ids=PROMPT) for beta in (0.01, 0.9))
    assert near.output == "logits"
    assert near.relative < 0.1 < far.relative
    assert near.cosine > 0.99 > far.cosine
    assert str(near).startswith("logits: relative distance 0.0")


def test_comparing_leaves_the_model_as_it_was() -> None:
    model = momentum("bert")
    model.bert.pooler = None
    model.bert.embeddings.eval()
    compare(model, PROMPT)
    assert model.training
    assert model.bert.encoder.layer[0].training
    assert not model.bert.embeddings.training
    assert stacks(model)[0].enabled


def test_an_evaluation_with_gradients_fills_its_cache_and_says_what_that_costs() -> None:
    model = momentum("gpt2").eval()
    with pytest.warns(UserWarning, match="keeps all activations"):
        out = model(PROMPT)
    out.logits.sum().backward()
    assert (out.cache if "cache" in out else out.past_key_values).get_seq_length() == 4


def test_a_filled_cache_in_training_is_refused() -> None:
    model = momentum("gpt2")
    with torch.no_grad():
        out = model.eval()(PROMPT)
    name = "cache" if "cache" in out else "past_key_values"  # until 5.23
    with pytest.raises(SpecError, match="a cache with 4 tokens came"):
        model.train()(PROMPT, **{name: out[name]})
    model(PROMPT, labels=PROMPT).loss.backward()


# --- what else comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_hidden_states_and_attentions_come_out_with_gradients(family: str) -> None:
    model = make(family)
    model.eval()
    model.set_attn_implementation("eager")
    reference = copy.deepcopy(model)
    make_reversible(model, "momentum", beta=0.5)
    for stack in stacks(model):
        by_hand(reference.get_submodule(stack.name), "momentum", 0.5)
    found = []
    for each in (model, reference):
        out = each(**inputs(family), output_hidden_states=True, output_attentions=True, use_cache=False)
        prefix = "decoder_" if family == "t5" else ""
        hidden, attention = out[f"{prefix}hidden_states"], out[f"{prefix}attentions"]
        assert len(hidden) == 4
        assert len(attention) == 3
        (hidden[1].square().sum() + hidden[3].sum() + attention[1].square().sum()).backward()
        found.append({"h": [*hidden], "a": [*attention], "g": gradients(each)})
    assert tree_error(*found) < 1e-9


def test_hidden_states_alone_outlive_the_output() -> None:
    model, reference = momentum("bert"), make("bert")
    by_hand(reference.bert.encoder.layer, "momentum", 0.5)
    found = []
    for each in (model.eval(), reference.eval()):
        hidden = each(**inputs("bert"), output_hidden_states=True).hidden_states[1]
        gc.collect()
        hidden.square().sum().backward()
        found.append(gradients(each))
    assert tree_error(*found) < 1e-9


def test_gradient_checkpointing_is_no_third_run() -> None:
    model = momentum("bert")
    runs: list[bool] = []
    model.bert.encoder.layer[1].intermediate.register_forward_hook(lambda *_: runs.append(is_recomputing()))
    found = []
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # until 5.23
    for switch in ("enable", "disable"):
        getattr(model, f"{name}_checkpointing_{switch}")()
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs("bert")).loss.backward()
        found.append(gradients(model))
    assert runs == [False, True, False, True]
    assert tree_error(*found) == 0


def test_its_memory_is_planned() -> None:
    model, given = momentum("bert"), inputs("bert")
    found = revcore_torch.plan(model, **given, policies=[StoreAll(), Reverse()], loss=lambda out: out.loss)
    assert found.depth == 3
    with LiveBytes() as memory:
        loss = model(**given).loss
        assert found.rows[1].held == memory.live < found.rows[0].held
        loss.backward()
    assert stacks(model)[0].policy == Reverse()


# --- saving, copying, undoing -----------------------------------------------------------------------------------------


def test_it_is_saved_with_its_settings_and_loaded(tmp_path: Path) -> None:
    model, names = momentum("gpt2", 0.3, exact=10), [*make("gpt2").state_dict()]
    assert [*model.state_dict()] == names
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert stacks(loaded) == []
    loaded = make_reversible(loaded)
    assert stacks(loaded)[0].settings == stacks(model)[0].settings
    assert torch.equal(loaded.eval()(PROMPT, use_cache=False).logits, model.eval()(PROMPT, use_cache=False).logits)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_is_a_model_of_its_own(how: str) -> None:
    model = momentum("bert")
    if how == "copied":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.manual_seed(1)
    expected = model(**inputs("bert"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.manual_seed(1)
    found = other(**inputs("bert"))
    assert_close(found.logits.detach(), expected.logits.detach())
    found.loss.backward()
    assert gradients(other)
    assert not gradients(model)
    assert stacks(other)[0] is not stacks(model)[0]


def test_it_is_made_plain_again() -> None:
    model, ordinary = momentum("bert").eval(), make("bert").eval()
    expected = ordinary(**inputs("bert")).logits
    with plain(model):
        assert torch.equal(model(**inputs("bert")).logits, expected)
    assert not torch.equal(model(**inputs("bert")).logits, expected)
    assert torch.equal(make_plain(model)(**inputs("bert")).logits, expected)
    assert stacks(model) == []
    assert not hasattr(model.config, "revcore")
    make_reversible(model, "revnet")


# --- precision and compilation ----------------------------------------------------------------------------------------


def test_autocast_and_wide_streams() -> None:
    model = make_reversible(make("bert", dtype=torch.float32), "momentum", beta=0.5)
    found = []
    for policy in (Reverse(), StoreAll()):
        stacks(model)[0].policy = policy
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs("bert", torch.float32)).loss
        loss.backward()
        found.append(gradients(model))
    assert tree_error(*found) < 0.05

    model = make_reversible(make("bert", dtype=torch.bfloat16), "revnet", stream_dtype="float32")
    out = model(**inputs("bert", torch.bfloat16))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("policy", [Reverse(), StoreAll()], ids=["reverse", "store"])
def test_wide_streams_pass_an_identity_between_layers(policy: Any) -> None:
    """A full backward hook puts one there, as FSDP2 and ZeRO-3 do: it sees the gradient, and none of it is lost."""

    def run(hooks: bool, stream_dtype: str | None = "float64") -> tuple[dict[str, Any], dict[str, Any]]:
        model = make("bert", dtype=torch.float32).eval()
        make_reversible(model, "momentum", beta=0.5, policy=policy, stream_dtype=stream_dtype)
        seen: dict[str, Any] = {}
        for i, layer in enumerate(model.bert.encoder.layer if hooks else ()):
            layer.register_full_backward_hook(lambda _, into, out, i=i: seen.update({f"{i}": into[0], f"{i}+": out[0]}))
        model(**inputs("bert", torch.float32)).loss.backward()
        return gradients(model), seen

    (found, seen), (expected, _), (_, ordinary) = run(True), run(False), run(True, None)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert len(seen) == 6
    assert tree_error(seen, ordinary) < 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, at its breaks
@pytest.mark.parametrize("whole", [True, False], ids=["the model", "each layer"])
def test_compiled_gradients_are_the_same(whole: bool) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model = make_reversible(make("bert", depth=2), "momentum", beta=0.5).eval()
    model(**inputs("bert")).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    if whole:
        torch.compile(model, backend=backend)(**inputs("bert")).loss.backward()
    else:
        stacks(model)[0].compile(backend=backend, fullgraph=True)
        model(**inputs("bert")).loss.backward()
    assert graphs
    assert tree_error(gradients(model), expected) < 1e-9
    copy.deepcopy(model)


@pytest.mark.parametrize(("number", "kind"), [("beta", "momentum"), ("h", "leapfrog"), ("gamma", "bdia")])
def test_a_number_tells_the_kind(number: str, kind: str) -> None:
    options: Any = {number: 0.5}
    (stack,) = stacks(make_reversible(make("bert"), **options))
    assert stack.settings.kind == kind


# --- what is refused, and what is left after a failure ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda m: make_reversible(m), "came without a kind, and model.config.revcore holds none"),
        (lambda m: make_reversible(m, cast("Any", "reversed")), "kind came as 'reversed', expected one of 'momentum'"),
        (lambda m: make_reversible(m, "revnet", beta=0.5), "beta came as 0.5 with kind='revnet', expected none"),
        (lambda m: make_reversible(m, "momentum", beta=1.5), "beta came as 1.5, but must lie strictly between"),
        (lambda m: make_reversible(m, "revnet", layers="encoder"), "has no list of layers 'encoder'; it has 'bert.enc"),
        (lambda m: make_reversible(nn.Linear(2, 2), "revnet"), "Linear has no list of layers .* it has none"),
        (lambda m: make_reversible(make_reversible(m, "revnet"), "revnet"), "is reversible already: call make_plain"),
        (lambda m: make_reversible(m, "revnet", policy=MemoryBudget(fraction=0.5)), "write Reverse.keep_last=...."),
        (
            lambda m: make_reversible(m, "revnet", policy=[Reverse()]),
            "with 1 entries, expected one for each of the 3 lay",
        ),
        (lambda m: compare(m, PROMPT), "the model has no reversible layers"),
    ],
)
def test_what_is_asked_for_wrongly(make_it: Any, words: str) -> None:
    model = make("bert")
    before = model.config.to_dict()
    with pytest.raises(SpecError, match=words):
        make_it(model)
    if "already" not in words:
        assert stacks(model) == []
        assert model.config.to_dict() == before


class Loop(nn.Module):
    def __init__(self, between: Any = lambda x: x, start: int = 0, stop: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3)])
        self.between, self.start, self.stop = between, start, stop

    def forward(self, x: Any) -> Any:
        for layer in self.layers[self.start : self.stop]:
            x = self.between(layer(x))
        return x


class LateChange:
    """Changes what the layer before the last one returned, which is the other stream."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, x: Any) -> Any:
        self.seen.append(x)
        if len(self.seen) == 2:
            self.seen[0].add_(1)
        return x


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"between": lambda x: x + 1}, "layer 1 got other hidden states than the layers before it returned"),
        ({"between": lambda x: x.add_(1)}, "layer 1 got other hidden states"),
        ({"between": lambda x: x.view_as(x).add_(1)}, "layer 1 got other hidden states"),
        ({"between": LateChange()}, "layer 2 got other hidden states"),
        ({"stop": 2}, "layers: layers 0 to 1 of 3 were called"),
        ({"start": 1}, "layers: layer 1 was called before layer 0"),
    ],
)
def test_a_loop_that_does_not_call_layer_after_layer(options: Any, words: str) -> None:
    model = make_reversible(Loop(**options), "revnet", layers="layers")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpecError, match=words):
        model(torch.randn(5, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_checkpointing_each_layer_is_refused_in_words() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper  # FSDP's

    model = momentum("bert")
    layers = model.bert.encoder.layer
    for i, layer in enumerate([*layers]):
        layers[i] = checkpoint_wrapper(layer, preserve_rng_state=False)
    loss = model(**inputs("bert")).loss
    with pytest.raises(SpecError, match=r"layer 2 was called before layer 0.*Leave that out"):
        loss.backward()


def test_a_forward_of_the_layers_own_is_kept() -> None:
    """Such as Accelerate's hooks, which may come before or after."""

    class Count:
        def __init__(self, layer: Any) -> None:
            self.inner, self.calls = layer.forward, 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.inner(*args, **kwargs)

    model = make("bert")
    layer = model.bert.encoder.layer[1]
    first = Count(layer)
    layer.forward = first.forward
    make_reversible(model, "momentum", beta=0.5)
    model(**inputs("bert")).loss.backward()
    assert first.calls == 2
    make_plain(model)(**inputs("bert"))
    assert first.calls == 3

    make_reversible(model, "momentum", beta=0.5)
    later = Count(layer)
    layer.forward = later.forward
    model(**inputs("bert")).loss.backward()
    assert (later.calls, first.calls) == (1, 5)
    assert len(stacks(model)) == 1
    with pytest.raises(SpecError, match="reversible already"):
        make_reversible(model, "momentum", beta=0.5)
    with pytest.raises(SpecError, match=r"bert\.encoder\.layer\.1\.forward was replaced after make_reversible"):
        make_plain(model)
    layer.forward = later.inner
    make_plain(model)
    assert stacks(model) == []


def test_layers_that_were_called_by_themselves_are_forgotten() -> None:
    model = make_reversible(Loop(), "revnet", layers="layers")
    x = torch.randn(5, 4)
    model.layers[0](x)
    random = torch.randn(3)  # drawn meanwhile, and not to be drawn again
    model(x).sum().backward()
    assert not torch.equal(random, torch.randn(3))


def test_what_is_stored_is_offloaded_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Any] = []
    monkeypatch.setattr(keep, "to_host", lambda tensor: packed.append(tensor) or tensor)

    def count(policy: Any) -> int:
        model = make_reversible(Loop(), "revnet", layers="layers", policy=policy)
        packed.clear()
        model(torch.randn(5, 4, requires_grad=True)).sum().backward()
        return len(packed)

    assert count(StoreAll()) == count(Reverse(keep_last=1)) == 0
    of_three_layers, streams = count(StoreAll(offload=True)), count(Reverse(offload=True))
    assert of_three_layers > 0
    assert count(Reverse(keep_last=1, offload=True)) == of_three_layers // 3 + streams


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Any, generator: torch.Generator | None = None) -> Any:
        y = self.linear(x)
        return y if generator is None else y * torch.rand(y.shape, generator=generator, dtype=y.dtype)


def test_a_generator_that_only_a_later_layer_gets_is_put_back() -> None:
    class Model(Loop):
        def forward(self, x: Any) -> Any:
            generator = torch.Generator().manual_seed(0)
            for i, layer in enumerate(self.layers):
                x = layer(x, **({"generator": generator} if i else {}))
            return x

    found = []
    for policy in (Reverse(), StoreAll()):
        model = Model()
        model.layers = nn.ModuleList([Noise() for _ in range(3)])
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        make_reversible(model.double(), "momentum", beta=0.5, layers="layers", policy=policy)
        model(torch.ones(5, 4, dtype=torch.float64).cumsum(0)).square().sum().backward()
        found.append(gradients(model))
    assert tree_error(*found) < 1e-12


class Chance(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(4, 4), draw

    def forward(self, x: Any) -> Any:
        return self.linear(x) * self.draw()


@pytest.mark.parametrize(("name", "draw"), [("random", random.random), ("numpy.random", np.random.rand)])
def test_a_layer_that_draws_from_another_generator_is_refused_once(
    name: str, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "recorded", [])
    x, found = torch.ones(5, 4, dtype=torch.float64).cumsum(0), []
    for policy in (Reverse(), StoreAll()):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the generator that is meant
        model = Loop()
        model.layers = nn.ModuleList([Chance(draw) for _ in range(3)])
        make_reversible(model.double(), "momentum", beta=0.5, layers="layers", policy=policy)
        if policy == Reverse():
            with pytest.raises(SpecError, match=f"a layer drew from {name}, .* call the model once more"):
                model(x)
        model(x).sum().backward()
        found.append(gradients(model))
    assert tree_error(*found) < 1e-12


def test_an_identity_between_layers_is_let_through() -> None:
    """FSDP and ZeRO put a function of their own there, through which gradients go."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            return 2 * g[0]

    found = []
    for policy in (Reverse(), StoreAll()):
        torch.manual_seed(0)
        model = make_reversible(Loop(Identity.apply).double(), "momentum", beta=0.5, layers="layers", policy=policy)
        model(torch.ones(5, 4, dtype=torch.float64).cumsum(0)).square().sum().backward()
        found.append(gradients(model))
    assert tree_error(*found) < 1e-12
    with torch.inference_mode():
        assert model(torch.ones(5, 4, dtype=torch.float64)).isfinite().all()


class Stop(Exception):  # noqa: N818 - it is no error
    pass


def test_a_failure_between_layers_leaves_nothing_behind() -> None:
    seen: list[Any] = []

    def between(x: Any) -> Any:
        seen.append(weakref.ref(x.untyped_storage()))
        if len(seen) == 2:
            raise Stop
        return x

    model = make_reversible(Loop(between), "revnet", layers="layers")
    before, x, random = copy.deepcopy(model.state_dict()), torch.randn(5, 4), torch.get_rng_state()
    with contextlib.suppress(Stop):
        model(x)
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    model(x).sum().backward()


def test_an_output_that_is_dropped_frees_its_tape() -> None:
    model = momentum("gpt2")
    alive: list[Any] = []
    hook = model.transformer.h[1].register_forward_hook(
        lambda _, __, out: alive.append(weakref.ref(out.untyped_storage()))
    )
    out = model(PROMPT, labels=PROMPT)
    del out
    hook.remove()
    gc.collect()
    assert [ref() for ref in alive] == [None]
