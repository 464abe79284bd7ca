"""A model on several devices. Two that torch has everywhere stand for them, under a mode that computes no numbers but
refuses, as GPUs do, to mix tensors of both."""

from dataclasses import replace

import pytest
import torch
from test_decoder import BASE, IDS, assert_same, make_model
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode

import loopdiag as ld
from loopdiag.corpus import Batch
from loopdiag.errors import InputError
from loopdiag.measures.attention import gate_by_position
from loopdiag.model import LoopedLM
from loopdiag.model.parallel import check_parallel
from loopdiag.model.past import Past
from loopdiag.model.placement import connect, place_of, placed, places_of, room
from loopdiag.probing.states import untrained
from loopdiag.results import _devices
from loopdiag.trace import record

HOME, AWAY = torch.device("cpu"), torch.device("meta")
WIRINGS = {
    "PLT": BASE,
    "both ends": replace(BASE, memory="own", offset=0, injection="concat", n_prelude=2, n_coda=1, exit_gate=True),
    "a head of its own": replace(BASE, tie_embeddings=False, gate_input="query", rope_table=True),
}


@pytest.fixture
def no_values(monkeypatch):
    """Tensors have shapes and devices, and nothing can be asked of their values, as the check of tokens does."""
    monkeypatch.setattr(LoopedLM, "_checked", lambda self, ids, mask: mask)
    with FakeTensorMode():
        yield


def spread_out(cfg, connected=True, every=False):
    """The last layers of prelude, loops and coda away, or every one, everything else at home."""
    with torch.device("meta"):
        model = LoopedLM(cfg).eval().requires_grad_(False)
    parts = {"prelude_blocks": cfg.n_prelude, "blocks": cfg.n_layers, "coda_blocks": cfg.n_coda}
    places = {"": HOME} | {
        f"{part}.{layer}": AWAY
        for part, count in parts.items()
        for layer in range(0 if every else max(0, count - 1), count)
    }
    if connected:
        connect(model, places)
    shapes = {name: tuple(x.shape) for name, x in [*model.named_parameters(), *model.named_buffers()]}
    state = {name: torch.empty(shape, device=place_of(name, places)) for name, shape in shapes.items()}
    model.load_state_dict(state, assign=True)
    assert {weight.device for weight in model.parameters()} == {HOME, AWAY}
    return model


@pytest.mark.parametrize("cfg", WIRINGS.values(), ids=WIRINGS)
@torch.no_grad()
def test_what_a_layer_needs_comes_to_its_device(no_values, cfg):
    """Padded, cached and plain runs; logits are at home."""
    model = spread_out(cfg)
    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.ones_like(ids, dtype=torch.bool)
    past = Past()
    for logits in (model(ids), model(ids, mask), model(ids, past=past), model(ids[:, :1], past=past)):
        assert logits.device == HOME


@torch.no_grad()
def test_without_connections_devices_would_be_mixed(no_values):
    """The mode notices what the test above is for."""
    model = spread_out(BASE, connected=False)
    with pytest.raises(FakeTensorDeviceMismatchError):
        model(torch.zeros(2, 9, dtype=torch.long))


@pytest.mark.parametrize("every", [False, True])
def test_attention_is_told_where_it_is(no_values, every):
    """Each layer's inputs and the mask are on its own device; states of loops, and of layers, at home."""
    model, ids = spread_out(BASE, every=every), torch.zeros(2, 9, dtype=torch.long)
    told = []

    def on_attention(inputs, mask):
        places = {x.device for x in (inputs.q, inputs.k, inputs.k_global, inputs.gate, mask) if x is not None}
        told.append((inputs.loop, inputs.layer, places))

    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), ("a", "b"), ("a", "b"))
    layers = []
    trace = record(
        model,
        batch,
        on_attention=on_attention,
        on_layer=lambda loop, layer, x, mask: layers.append((x.device, mask.device)),
    )
    assert told == [(loop, layer, {AWAY if every else (HOME, AWAY)[layer]}) for loop in (1, 2, 3) for layer in (0, 1)]
    assert set(layers) == {(HOME, HOME)}
    assert {x.device for x in (trace.raw, trace.carry, trace.readout, trace.gate)} == {HOME}
    assert gate_by_position(trace, 9).device == HOME


def test_side_by_side_is_not_for_several_devices(no_values):
    with pytest.raises(InputError, match="several devices"):
        check_parallel(spread_out(BASE))


def layer_bytes(model):
    return 4 * sum(weight.numel() for weight in model.blocks[0].parameters())


def test_devices_are_filled_in_their_order():
    """What is no layer stands on the first, and takes room there; the last takes all that is left."""
    model = make_model(n_layers=6)
    one, rest = layer_bytes(model), 4 * sum(weight.numel() for weight in model.parameters()) - 6 * layer_bytes(model)
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 2)]
    rooms = dict(zip([*gpus, HOME], [rest + 2.5 * one, 0.9 * one, 3 * one, 0], strict=True))
    places = placed(model, torch.float32, rooms.items())
    assert places.pop("") == gpus[0]
    assert list(places.values()) == [gpus[0]] * 2 + [gpus[2]] * 3 + [HOME]
    assert set(placed(model, torch.bfloat16, [(gpus[0], (rest + 6 * one) / 2), (HOME, 0)]).values()) == {gpus[0]}


def test_a_device_that_others_have_filled_is_passed_over():
    """Embeddings, head and states need room for one layer beside them; nothing goes back to a device passed over."""
    model = make_model(n_layers=3)
    one, rest = layer_bytes(model), 4 * sum(weight.numel() for weight in model.parameters()) - 3 * layer_bytes(model)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    places = placed(model, torch.float32, [(first, rest + 0.9 * one), (second, rest + one), (HOME, float("inf"))])
    assert list(places.values()) == [second, second, HOME, HOME]
    assert set(placed(model, torch.float32, [(first, 0), (HOME, float("inf"))]).values()) == {HOME}


def test_devices_that_are_not_needed_are_not_asked():
    """Asking a GPU takes memory of it."""

    def rooms():
        yield HOME, float("inf")
        pytest.fail("asked the second")

    assert set(placed(make_model(), torch.float32, rooms()).values()) == {HOME}


def test_a_model_that_is_moved_together_works_there(no_values):
    """The connections look where layers are when they run."""
    model = spread_out(BASE)
    assert places_of(model) == {"": HOME, "blocks.0": HOME, "blocks.1": AWAY}
    state = {name: torch.empty(x.shape, device=AWAY) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # as `model.to` does, which the mode cannot
    assert model(torch.zeros(2, 9, dtype=torch.long, device=AWAY)).device == AWAY


def test_provenance_says_where_layers_are(no_values):
    """Rounding differs between kinds of devices, so two runs that differ in it are not the same."""
    assert _devices(spread_out(BASE)) == "cpu, 1 of 2 layers on meta"
    assert _devices(spread_out(BASE, every=True)) == "cpu, 2 of 2 layers on meta"


def test_provenance_of_a_model_on_one_device():
    assert _devices(make_model()) == "cpu"


def test_the_twin_with_random_weights_stands_where_the_model_does():
    """Layer by layer: one that needs several devices needs them with other weights, too."""
    model = make_model()
    model.blocks[1].to("meta")
    connect(model, places_of(model))
    twin = untrained(model, seed=0)
    assert places_of(twin) == places_of(model) == {"": HOME, "blocks.0": HOME, "blocks.1": AWAY}
    assert twin.blocks[1]._forward_hooks
    assert not twin.blocks[0]._forward_hooks


def test_parameters_go_with_their_layer():
    """Layer 1 is not layer 10."""
    places = {"": HOME, "blocks.1": AWAY}
    assert place_of("blocks.1.attn.q_proj.weight", places) == AWAY
    assert place_of("blocks.10.attn.q_proj.weight", places) == HOME
    assert place_of("embed.weight", places) == HOME


@torch.no_grad()
def test_connections_change_no_number():
    """Between two names of one device."""
    model, twin = make_model(n_layers=3), make_model(n_layers=3)
    connect(twin, {"": HOME, "blocks.1": torch.device("cpu", 0), "blocks.2": torch.device("cpu", 0)})
    assert twin.blocks[1]._forward_hooks
    assert_same(twin(IDS), model(IDS), 0)


def test_where_there_is_no_gpu_auto_is_the_processor():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert list(room()) == [(HOME, float("inf"))]
    model, auto = ld.load("tiny-plt-2"), ld.load("tiny-plt-2", device="auto")
    for one, other in zip(model.parameters(), auto.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.device == HOME


def test_free_memory_of_gpus_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 + gpu, 5000))
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert dict(room()) == pytest.approx({first: 800, second: 800.8, HOME: float("inf")})
