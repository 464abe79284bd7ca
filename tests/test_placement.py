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
from loopdiag.model import LoopedLM
from loopdiag.model.parallel import check_parallel
from loopdiag.model.past import Past
from loopdiag.model.placement import connect, place_of, placed, room
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


def spread_out(cfg, connected=True):
    """The last layers of prelude, loops and coda away, everything else at home."""
    with torch.device("meta"):
        model = LoopedLM(cfg).eval().requires_grad_(False)
    parts = {"prelude_blocks": cfg.n_prelude, "blocks": cfg.n_layers, "coda_blocks": cfg.n_coda}
    places = {"": HOME} | {f"{part}.{count - 1}": AWAY for part, count in parts.items() if count}
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


def test_attention_is_told_where_it_is(no_values):
    """Each layer's inputs and the mask are on its own device; states of loops, and of layers, at home."""
    model, ids = spread_out(BASE), torch.zeros(2, 9, dtype=torch.long)
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
    assert told == [(loop, layer, {(HOME, AWAY)[layer]}) for loop in (1, 2, 3) for layer in (0, 1)]
    assert set(layers) == {(HOME, HOME)}
    assert {x.device for x in (trace.raw, trace.carry, trace.readout, trace.gate)} == {HOME}


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
    places = placed(model, torch.float32, rooms)
    assert places.pop("") == gpus[0]
    assert list(places.values()) == [gpus[0]] * 2 + [gpus[2]] * 3 + [HOME]
    assert set(placed(model, torch.bfloat16, {gpus[0]: (rest + 6 * one) / 2, HOME: 0}).values()) == {gpus[0]}


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
    assert room() == {HOME: float("inf")}
    model, auto = ld.load("tiny-plt-2"), ld.load("tiny-plt-2", device="auto")
    for one, other in zip(model.parameters(), auto.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.device == HOME


def test_free_memory_of_gpus_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 + gpu, 5000))
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert room() == pytest.approx({first: 800, second: 800.8, HOME: float("inf")})
