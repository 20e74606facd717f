"""A checkpoint of another program is refused, before any weight of the network has changed."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from revcore import Coupling, Momentum, SpecError, momentum_net
from revcore_torch import Checkpoint, ReversibleSequential, StoreAll
from revcore_torch.signatures import check_signature, signature


def network(depth: int = 3, **settings: Any) -> ReversibleSequential:
    return ReversibleSequential(*[nn.Linear(4, 4) for _ in range(depth)], **settings)


def in_a_model(body: nn.Module) -> nn.Sequential:
    return nn.Sequential(body, nn.Linear(8, 2))


def saved(model: nn.Module) -> Any:
    """Return a state dict that was in a file, read as data alone."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def is_unchanged(model: nn.Module, before: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, before, weights(model)))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "coupling": ({}, r"in step 0 the coupling is Momentum\(beta=0.9\) there and Additive\(scale=1.0\) here"),
    "constant": (
        {"coupling": Momentum(0.5)},
        r"in step 0 the coupling is Momentum\(beta=0.9\) there and Momentum\(beta=0.5\)",
    ),
    "streams": ({"coupling": Momentum(0.9), "num_streams": 3}, "the number of streams is 2 there and 3 here"),
    "split_dim": ({"coupling": Momentum(0.9), "split_dim": 2}, "the dimension that is parted is 1 there and 2 here"),
    "copied": ({"coupling": Momentum(0.9), "split_dim": None}, "split is 'chunk' there and 'copy' here"),
    "program": ({"program": momentum_net(3)}, "step 1 is “1 from 0” there and “1 from 0, no block” here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_network_are_refused(name: str) -> None:
    settings, words = OTHERS[name]
    state = saved(in_a_model(network(coupling=Momentum(0.9))))
    model = in_a_model(network(**settings))
    before = weights(model)
    with pytest.raises(SpecError, match=f"^0: these are weights of another network: {words}.*dict\\(state_dict\\)"):
        model.load_state_dict(state)
    assert is_unchanged(model, before)
    model.load_state_dict(dict(state))  # as the message says
    assert not is_unchanged(model, before)


def test_weights_of_the_same_network_are_loaded() -> None:
    theirs = in_a_model(network(coupling=Momentum(0.9), policy=StoreAll()))
    ours = in_a_model(network(coupling=Momentum(0.9), split_dim=-1, policy=Checkpoint(), stream_dtype="float64"))
    ours.load_state_dict(saved(theirs))
    assert is_unchanged(ours, weights(theirs))


def test_names_are_those_of_sequential_and_nothing_is_added() -> None:
    assert list(network().state_dict()) == list(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).state_dict())
    network().load_state_dict(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).state_dict())
    nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).load_state_dict(network(coupling=Momentum(0.9)).state_dict())


def test_nothing_is_known_of_functions_without_a_name() -> None:
    halved = Coupling.from_functions(lambda x, f: 0.5 * x + f, lambda y, f: (y - f) / 0.5)
    network(coupling=halved).load_state_dict(saved(network()))
    network().load_state_dict(saved(network(coupling=halved)))


def test_a_part_of_a_network_is_one_too() -> None:
    whole = network(4, coupling=[Momentum(0.9), Momentum(0.8)])
    whole[1:].load_state_dict(whole[1:].state_dict())
    other = network(4, coupling=[Momentum(0.8), Momentum(0.9)])
    with pytest.raises(SpecError, match="in step 0 the coupling is"):
        other[1:].load_state_dict(whole[1:].state_dict())


def test_wrappers_make_no_difference() -> None:
    model = in_a_model(network(coupling=Momentum(0.9)))
    check_signature(nn.ModuleDict({"module": copy.deepcopy(model)}), signature(model))
    check_signature(torch.compile(model, backend="eager"), signature(model))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"^0: these are weights of another network"):
        check_signature(in_a_model(network()), signature(model))
    with pytest.raises(SpecError, match=r"it had 2 reversible networks \(0, 1\), and this one has 1 \(0\)"):
        check_signature(model, signature(nn.Sequential(network(), network())))
    with pytest.raises(SpecError, match="Linear holds no reversible network"):
        signature(nn.Linear(1, 1))


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=16
    )
    return transformers.BertModel(config)


def test_a_converted_model_carries_its_signature() -> None:
    pytest.importorskip("transformers")
    from revcore_torch.hf import make_plain, make_reversible

    ours, theirs = make_reversible(bert(), "momentum", beta=0.5), make_reversible(bert(), "momentum", beta=0.9)
    before = weights(ours.encoder)
    with pytest.raises(SpecError, match=r"^encoder\.layer: .*Momentum\(beta=0.9\) there and Momentum\(beta=0.5\)"):
        ours.load_state_dict(saved(theirs))
    assert is_unchanged(ours.encoder, before)
    theirs.load_state_dict(saved(pickle.loads(pickle.dumps(theirs))))
    check_signature(theirs, signature(copy.deepcopy(theirs)))
    with pytest.raises(SpecError, match="weights of another network"):
        check_signature(ours, signature(theirs))
    make_plain(ours).load_state_dict(saved(theirs))
    assert all("revcore" not in entry for entry in ours.state_dict()._metadata.values())


def test_what_a_model_was_saved_as_is_not_forgotten(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from revcore_torch.hf import make_reversible

    make_reversible(bert(), "momentum", beta=0.9).save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    words = r"came with kind='momentum', beta=0.5, but the weights are those of kind='momentum', beta=0.9"
    with pytest.raises(SpecError, match=words):
        make_reversible(loaded, "momentum", beta=0.5)
    make_reversible(loaded, "momentum", beta=0.9, exact=True)  # the same network
    other = transformers.BertModel.from_pretrained(tmp_path)
    del other.config.revcore
    make_reversible(other, "revnet")
