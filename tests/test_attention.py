"""Attention maps: against the patterns that the model computes, scipy and scikit-learn, and cases worked by hand.

The reference reads the hooked patterns of one document at a time, without padding, query by query.
"""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics.pairwise
import torch
from test_decoder import HUGINN_LIKE, LargestTensor, all_states, make_model
from tiny import assert_all_same, assert_same, padded, token_lists

from loopdiag.measures import attention
from loopdiag.measures.attention import AttentionMeasures, divergence, entropy, head_cosine, head_rank, log_maps
from loopdiag.trace import AttentionInputs, record

NAN, INF = math.nan, math.inf
DOCUMENTS = token_lists(seed=1, lengths=(5, 2, 7, 1, 4))
LEFT = (1, 2, 4)
UNMIXED = {"memory": "own"}
PER_MAP = ("attention_entropy", "attention_entropy_relative", "attention_sink", "attention_kl")
HEADS = ("head_cosine", "head_rank")
# Eigenvalues of a Gram matrix know a singular value of zero to the root of float64's rounding only.
RANK = 1e-5


def inputs_of(model, batch, n_loops=None):
    """What every attention of a run worked from, in the order of the run."""
    collected = []
    record(model, batch, n_loops, on_attention=lambda inputs, mask: collected.append(inputs))
    return collected


def measured(model, batch, n_loops=None, **kwargs):
    """The numbers of one recorded run."""
    measures = AttentionMeasures(**kwargs)
    record(model, batch, n_loops, on_attention=measures)
    return measures.result()


def hooked_maps(states, at):
    """The maps of one attention by the end of their names, from its hooked patterns and gates."""
    if f"{at}hook_pattern" in states:
        return {"": states[f"{at}hook_pattern"]}
    everywhere, nearby = states[f"{at}hook_pattern_global"], states[f"{at}hook_pattern_local"]
    gate = states[f"{at}hook_gate"].transpose(1, 2).unsqueeze(-1)
    return {"": gate * everywhere + (1 - gate) * nearby, "_global": everywhere, "_local": nearby}


def random_maps(seed, *shape, hidden=0.4):
    """Rows of probabilities, some entries exactly zero, the last never."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=generator, dtype=torch.float64) ** 3
    a = a * (torch.rand(shape, generator=generator) > hidden)
    a[..., -1] += 0.1
    return a / a.sum(-1, keepdim=True)


def map_of(*heads):
    """The maps of one query of one document, written [head][key]."""
    return torch.tensor(heads, dtype=torch.float64)[None, :, None]


# -- maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "n_loops"),
    [
        ({}, 3),
        ({"window": 1, "n_kv_heads": 1}, 4),
        ({"window": 99, "n_kv_heads": 4, "gate_input": "query"}, 2),
        (UNMIXED, 3),
        (HUGINN_LIKE | {"n_kv_heads": 2}, 2),
    ],
)
def test_maps_are_those_of_the_model(changes, n_loops):
    """Every row of every map, padding included, is what the model computes when hooked. Measured: 3e-15."""
    model, batch = make_model(**changes), padded(DOCUMENTS, LEFT)
    states = all_states(model, batch.input_ids, attention_mask=batch.attention_mask, n_loops=n_loops)
    collected = inputs_of(model, batch, n_loops)
    layers = range(model.cfg.n_layers)
    assert [(i.loop, i.layer) for i in collected] == [(r, layer) for r in range(1, n_loops + 1) for layer in layers]
    for inputs in collected:
        expected = hooked_maps(states, f"loops.{inputs.loop}.blocks.{inputs.layer}.attn.")
        maps = {name: a.exp() for name, a in log_maps(inputs, batch.attention_mask).items()}
        mixed = model.cfg.memory == "first" and inputs.loop > 1
        assert list(maps) == (["effective", "global", "local"] if mixed else ["effective"])
        for name, a in maps.items():
            assert_same(a, expected["" if name == "effective" else f"_{name}"], 1e-13, name)
            assert torch.equal(a == 0, expected["" if name == "effective" else f"_{name}"] == 0)


@pytest.mark.parametrize("changes", [{}, UNMIXED])
def test_maps_of_some_queries(changes):
    """A slice of the queries gives those rows of the whole, to rounding. Measured: 6e-17."""
    model, batch = make_model(**changes), padded(DOCUMENTS, LEFT)
    inputs = inputs_of(model, batch)[-1]
    whole = log_maps(inputs, batch.attention_mask)
    for queries in (slice(0, 1), slice(2, 5), slice(6, 99)):
        some = log_maps(inputs, batch.attention_mask, queries)
        assert_all_same(some, {name: a[:, :, queries] for name, a in whole.items()}, 1e-13)


def test_what_is_told():
    """The hooked states themselves, loop 1's keys where a loop blends, and the model's window. Measured: 2e-15."""
    model, batch = make_model(), padded(DOCUMENTS, LEFT)
    states = all_states(model, batch.input_ids, attention_mask=batch.attention_mask)
    for inputs in inputs_of(model, batch):
        at = f"loops.{inputs.loop}.blocks.{inputs.layer}.attn.hook_"
        # Hooked patterns take another road through attention, and loops after it see its rounding.
        assert_same(inputs.q, states[at + "rot_q"], 1e-12)
        assert_same(inputs.k, states[at + "rot_k"], 1e-12)
        assert inputs.window == 3
        if inputs.loop == 1:
            assert inputs.k_global is inputs.gate is None
        else:
            assert_same(inputs.k_global, states[f"loops.1.blocks.{inputs.layer}.attn.hook_rot_k"], 1e-12)
            assert_same(inputs.gate, states[at + "gate"], 1e-12)


def test_gates_that_are_shut():
    """A gate of exactly 1 leaves the global map, of exactly 0 the local one, and no NaN; the divergence is infinite."""
    batch = padded(DOCUMENTS, LEFT)
    inputs = inputs_of(make_model(), batch)[-1]
    maps = {
        value: log_maps(replace(inputs, gate=torch.full_like(inputs.gate, value)), batch.attention_mask)
        for value in (0.0, 1.0)
    }
    assert_same(maps[0.0]["effective"], maps[0.0]["local"])
    assert_same(maps[1.0]["effective"], maps[1.0]["global"])
    beyond = (maps[0.0]["global"] > -INF).sum(-1) > (maps[0.0]["local"] > -INF).sum(-1)
    assert torch.equal(divergence(maps[1.0]["effective"], maps[0.0]["effective"]) == INF, beyond)
    assert divergence(maps[0.0]["effective"], maps[1.0]["effective"]).isfinite().all()


# -- numbers of a map -------------------------------------------------------------------------------


def test_entropy_and_divergence_against_scipy():
    """Row by row; infinite exactly where the second map sees less. Measured: 9e-16."""
    a, b, seen_by_all = random_maps(0, 2, 3, 6, 5), random_maps(1, 2, 3, 6, 5), random_maps(2, 2, 3, 6, 5, hidden=0.0)
    assert_same(entropy(a), torch.from_numpy(scipy.stats.entropy(a.numpy(), axis=-1)), 1e-14)
    for other in (b, seen_by_all):
        ours = divergence(a.log(), other.log())
        expected = scipy.special.rel_entr(a.numpy(), other.numpy()).sum(-1)
        assert_same(ours, torch.from_numpy(expected), 1e-14)
        assert_same(ours, torch.from_numpy(scipy.stats.entropy(a.numpy(), other.numpy(), axis=-1)), 1e-14)
        assert torch.equal(ours == INF, ((a > 0) & (other == 0)).any(-1))
    assert (divergence(a.log(), b.log()) == INF).any()
    assert_same(divergence(a.log(), a.log()), torch.zeros(2, 3, 6, dtype=torch.float64))


def test_entropy_and_divergence_by_hand():
    """Powers of two: four even keys are log 4; from a half and a half to a quarter and three it is as on paper."""
    assert_same(
        entropy(map_of([0.25] * 4, [0, 1, 0, 0], [0.5, 0.5, 0, 0])), map_of([2.0], [0.0], [1.0])[..., 0] * math.log(2)
    )
    a, b = map_of([0.5, 0.5], [1.0, 0.0]).log(), map_of([0.25, 0.75], [0.5, 0.5]).log()
    expected = map_of([0.5 * math.log(2) + 0.5 * math.log(2 / 3)], [math.log(2)])[..., 0]
    assert_same(divergence(a, b), expected, 1e-15)
    assert divergence(b, a)[0, :, 0].tolist()[1] == INF


def test_head_diversity_against_scikit_learn_and_numpy():
    """Pairs of different heads; singular values of heads by keys. Measured: cosine 3e-16, rank 3e-7."""
    for heads, keys in ((4, 6), (3, 2), (2, 9)):
        a = random_maps(heads, 2, heads, 5, keys)
        cosine, rank = head_cosine(a), head_rank(a)
        assert cosine.shape == rank.shape == (2, 5)
        for document in range(2):
            for query in range(5):
                own = a[document, :, query].numpy()
                assert_same(cosine[document, query].item(), float(cosine_of(own)), 1e-13)
                assert_same(rank[document, query].item(), rank_of(own), RANK)


@pytest.mark.parametrize(
    ("heads", "cosine", "rank"),
    [
        ([[0.5, 0.2, 0.3]] * 3, 1, 1),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 0, 3),
        ([[1, 0, 0], [1, 0, 0], [0, 0, 1]], 1 / 3, math.exp(scipy.stats.entropy([2**0.5, 1]))),
        ([[1, 0], [0.5, 0.5]], 0.5**0.5, None),
        ([[0.25, 0.75]], NAN, 1),
        ([[1.0], [1.0]], 1, 1),
    ],
)
def test_head_diversity_by_hand(heads, cosine, rank):
    """Identical heads are one, disjoint heads are as many as they are, and a single head has none to compare with."""
    a = map_of(*heads)
    assert_same(head_cosine(a), torch.tensor([[cosine]], dtype=torch.float64), 1e-15)
    if rank is not None:
        assert_same(head_rank(a), torch.tensor([[rank]], dtype=torch.float64), RANK)
    assert head_rank(a.float()).dtype == torch.float64


# -- a whole run ------------------------------------------------------------------------------------


def cosine_of(heads):
    """Mean over pairs of different heads."""
    pairs = np.triu_indices(len(heads), 1)
    return sklearn.metrics.pairwise.cosine_similarity(heads)[pairs].mean() if len(heads) > 1 else NAN


def rank_of(heads):
    """Exponential of the entropy of the singular values."""
    return math.exp(scipy.stats.entropy(np.linalg.svd(heads, compute_uv=False)))


def naive(model, documents, n_loops):
    """Every number from the hooked patterns of documents alone, a mean over queries from the second token on."""
    cfg, rows = model.cfg, {}
    for document, tokens in enumerate(documents):
        states = all_states(model, torch.tensor([tokens]), n_loops=n_loops)
        before = {}
        for loop in range(1, n_loops + 1):
            for layer in range(cfg.n_layers):
                maps = hooked_maps(states, f"loops.{loop}.blocks.{layer}.attn.")
                maps = {end: a[0].numpy() for end, a in maps.items()}
                for query in range(1, len(tokens)):
                    of_query = {end: a[:, query, : query + 1] for end, a in maps.items()}
                    earlier = before.get((layer, query), {})
                    for name, value in numbers_of_query(of_query, earlier, query, cfg.window).items():
                        rows.setdefault(name, {}).setdefault((document, loop, layer), []).append(value)
                    before[layer, query] = of_query
    results = {}
    for name, values in rows.items():
        values = {place: np.stack(of_queries) for place, of_queries in values.items()}
        if name.startswith("attention_window"):  # before, the window holds all there is
            values = {place: of_queries[cfg.window - 1 :] for place, of_queries in values.items()}
        shape = (len(documents), n_loops + 1, cfg.n_layers, *next(iter(values.values())).shape[1:])
        results[name] = torch.full(shape, NAN, dtype=torch.float64)
        for place, of_queries in values.items():
            if len(of_queries):
                results[name][place] = torch.from_numpy(np.asarray(of_queries.mean(0)))
    return results


def numbers_of_query(maps, earlier, query, window):
    """Numbers of the maps [head, visible key] of one query."""
    found, near = {}, slice(max(0, query + 1 - window), query + 1)
    for end, a in maps.items():
        visible = min(query + 1, window) if end == "_local" else query + 1
        found[f"attention_entropy{end}"] = nats = scipy.stats.entropy(a, axis=1)
        found[f"attention_entropy_relative{end}"] = nats / math.log(visible) if visible > 1 else nats * NAN
        found[f"attention_sink{end}"] = a[:, 0]
        if len(maps) == 3 and end != "_local":
            found[f"attention_window{end}"] = a[:, near].sum(1)
        b = earlier.get(end, earlier.get("") if end == "_global" else None)
        if b is not None:
            found[f"attention_kl{end}"] = scipy.stats.entropy(a, b, axis=1)
        found[f"head_cosine{end}"], found[f"head_rank{end}"] = cosine_of(a), rank_of(a)
    return found


@pytest.mark.parametrize(
    ("changes", "n_loops"),
    [
        *(({}, n_loops) for n_loops in (1, 2, 3, 4)),
        ({"window": 1, "n_kv_heads": 1, "gate_input": "query"}, 3),
        ({"window": 99, "n_kv_heads": 4, "offset": 2}, 3),
        ({"n_heads": 1, "n_kv_heads": 1}, 3),
        (UNMIXED, 3),
        (HUGINN_LIKE, 2),
    ],
)
def test_numbers_of_a_run_against_the_hooked_patterns(changes, n_loops):
    """A padded batch gives what scipy finds in the patterns of each document alone. Measured: 1e-14, rank 4e-7."""
    model = make_model(**changes)
    ours, expected = measured(model, padded(DOCUMENTS, LEFT), n_loops), naive(model, DOCUMENTS, n_loops)
    assert set(ours) == set(expected)
    for name in expected:
        assert_same(ours[name], expected[name], RANK if name.startswith("head_rank") else 1e-12, name)


def test_where_numbers_are_defined():
    """Branches from loop 2 on; KL from loop 2 on, but between local branches from loop 3 on; NaN elsewhere."""
    results = measured(make_model(), padded(DOCUMENTS[:3]), 4)
    ends = ("", "_global", "_local")
    windows = {"attention_window", "attention_window_global"}
    assert set(results) == {name + end for name in (*PER_MAP, *HEADS) for end in ends} | windows
    for name, values in results.items():
        first = 1
        if "kl" in name or "_global" in name or "window" in name:
            first = 2
        if name.endswith("_local"):
            first = 3 if "kl" in name else 2
        assert values.shape == (3, 5, 2) + ((4,) if name.startswith("attention") else ())
        assert values[:, :first].isnan().all(), name
        # The window of three tokens holds all of the document of two.
        assert (
            values[:, first:].isfinite().flatten(1).all(1) == torch.tensor([True, "window" not in name, True])
        ).all()


def test_ranges():
    """Relative entropies and shares lie between 0 and 1; no query sees more than a window that is as long."""
    results = measured(make_model(window=99), padded(DOCUMENTS[:3], LEFT))
    for name, values in results.items():
        known = values[~values.isnan()]
        assert (known >= -1e-12).all(), name
        if any(part in name for part in ("relative", "sink", "window", "cosine")):
            assert (known <= 1 + 1e-12).all(), name
        if "rank" in name:
            assert ((known >= 1 - 1e-12) & (known <= 4 + 1e-12)).all(), name
        assert len(known) > 0 or "window" in name


def test_only_the_groups_that_are_asked_for():
    """Each group alone gives its share of both, the same numbers; a model that does not blend names no branches."""
    batch = padded(DOCUMENTS, LEFT)
    for changes in ({}, UNMIXED):
        model = make_model(**changes)
        both = measured(model, batch)
        for group, prefix in (("attention", "attention_"), ("heads", "head_")):
            part = measured(model, batch, groups=(group,))
            assert_all_same(part, {name: values for name, values in both.items() if name.startswith(prefix)})
            assert part
    assert set(both) == {*PER_MAP, *HEADS}


@pytest.mark.parametrize("changes", [{}, UNMIXED, HUGINN_LIKE])
def test_padded_documents_get_the_numbers_they_get_alone(changes):
    """Neither padding, its side, nor neighbours matter. Measured: 2e-14, rank 4e-7."""
    model = make_model(**changes)
    batch = measured(model, padded(DOCUMENTS, LEFT))
    for row, document in enumerate(DOCUMENTS):
        alone = measured(model, padded([document]))
        assert set(alone) == set(batch)
        for name, values in alone.items():
            assert_same(batch[name][row], values[0], RANK if name.startswith("head_rank") else 1e-12, name)


@pytest.mark.parametrize("left", [(), (1,)])
def test_a_document_of_one_token(left):
    """Its only query has no choice: NaN everywhere, and nothing changes for its neighbours. Measured: 3e-16."""
    model, documents = make_model(), [DOCUMENTS[0], [7], DOCUMENTS[2]]
    with_it, without = measured(model, padded(documents, left)), measured(model, padded(documents[::2]))
    assert set(with_it) == set(without)
    for name, values in with_it.items():
        assert values[1].isnan().all(), name
        assert_same(values[::2], without[name], RANK if name.startswith("head_rank") else 1e-12, name)
    assert all(values.isnan().all() for values in measured(model, padded([[7]])).values())


def test_half_precision_is_measured_in_float32():
    """A bfloat16 model gives what float64 makes of the same inputs, to float32. Measured: 2e-7."""
    model, batch = make_model(dtype=torch.bfloat16), padded(DOCUMENTS, LEFT)
    ours, exact = AttentionMeasures(), AttentionMeasures()

    def both(inputs, mask):
        assert inputs.q.dtype == torch.bfloat16
        ours(inputs, mask)
        parts = {name: getattr(inputs, name) for name in ("q", "k", "k_global", "gate")}
        exact(replace(inputs, **{name: part if part is None else part.double() for name, part in parts.items()}), mask)

    record(model, batch, on_attention=both)
    expected = exact.result()
    for name, values in ours.result().items():
        assert values.dtype == (torch.float64 if name.startswith("head_rank") else torch.float32), name
        assert expected[name].dtype == torch.float64
        assert_same(values.double(), expected[name], 2e-5, name)


# -- the closed form --------------------------------------------------------------------------------

SPANS = ((0, 41), (11, 41), (0, 30), (3, 4))  # of the documents of `drawn_inputs`; the last has one token


def drawn_inputs(window, scale=1.0, seed=0, n_loops=3, dtype=torch.float64):
    """Random inputs of every attention of a run, one layer, that blend from loop 2 on (window None: never); the mask.

    `scale` is the standard deviation of the scores.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(SPANS), 41, dtype=torch.bool)
    for row, (start, end) in enumerate(SPANS):
        mask[row, start:end] = True

    def draw(*shape):
        return torch.randn(*mask.shape, *shape, generator=generator, dtype=torch.float64)

    collected = []
    for loop in range(1, n_loops + 1):
        q, k, gate = scale**0.5 * draw(4, 8), scale**0.5 * draw(2, 8), torch.sigmoid(2 * draw(4))
        blended = collected[0].k if loop > 1 and window else None
        gate = None if blended is None else gate.to(dtype)
        collected.append(AttentionInputs(loop, 0, q.to(dtype), k.to(dtype), blended, gate, window or 99))
    return collected, mask


def in_double(inputs):
    """The same inputs, as exact as they are, in float64."""
    parts = {name: getattr(inputs, name) for name in ("q", "k", "k_global", "gate")}
    return replace(inputs, **{name: None if part is None else part.double() for name, part in parts.items()})


def taken(collected, mask, groups=("attention",)):
    measures = AttentionMeasures(groups)
    for inputs in collected:
        measures(inputs, mask)
    return measures.result()


def from_maps(collected, mask):
    """The numbers of the group `attention`, from maps as a whole; [document, loop, layer, head]."""
    kept, place = mask & (mask.cumsum(1) > 1), mask.cumsum(1)
    index = torch.arange(mask.shape[1])
    ahead, first = index[:, None] - index, mask.int().argmax(1)
    found, before = {}, {}
    for inputs in collected:
        maps = log_maps(inputs, mask)
        now = {}
        for branch, log_a in maps.items():
            end, a = "" if branch == "effective" else f"_{branch}", log_a.exp()
            visible = place.clamp_max(inputs.window) if branch == "local" else place
            most = torch.where(visible > 1, visible.double(), NAN).log()[:, None]
            now |= {f"attention_entropy{end}": entropy(a), f"attention_entropy_relative{end}": entropy(a) / most}
            now[f"attention_sink{end}"] = torch.stack([of_one[..., key] for of_one, key in zip(a, first, strict=True)])
            if len(maps) == 3 and branch != "local":
                now[f"attention_window{end}"] = torch.where(ahead < inputs.window, a, 0.0).sum(-1)
            earlier = before.get(branch, before.get("effective") if branch == "global" else None)
            if earlier is not None:
                now[f"attention_kl{end}"] = divergence(log_a, earlier)
        for name, values in now.items():
            counts = mask & (place > inputs.window) if name.startswith("attention_window") else kept
            mean = torch.where(counts[:, None], values, 0.0).sum(-1) / counts.sum(1)[:, None]
            shape = (len(mask), len(collected) + 1, 1, mean.shape[1])
            found.setdefault(name, mean.new_full(shape, NAN))[:, inputs.loop, 0] = mean
        before = maps
    return found


@pytest.mark.parametrize("window", [None, 1, 2, 5, 41, 99])
@pytest.mark.parametrize("scale", [1, 50])
def test_the_closed_form_is_that_of_the_maps(window, scale):
    """Every number of the group, float64, padding on both sides; scores of up to 7 and of up to 370.

    Measured: 9e-16 of up to 3, 7e-13 of divergences of up to 110.
    """
    collected, mask = drawn_inputs(window, scale)
    assert_all_same(taken(collected, mask), from_maps(collected, mask), 1e-12 if scale == 1 else 1e-10)


@pytest.mark.parametrize("window", [None, 1, 5, 99])
@pytest.mark.parametrize(("scale", "atol"), [(1, 5e-6), (4, 1e-5), (7, 5e-5), (50, 5e-4)])
def test_the_closed_form_in_float32(window, scale, atol):
    """Beside maps in float64 of the same float32 inputs; scores of up to 7, 30, 52 and 370.

    A difference of large numbers, but hardly worse than from float32 maps. Measured: 3e-7, 2e-6, 3e-6 and 4e-5 (of
    divergences of 110); from maps 4e-7, 2e-6, 3e-6 and 2e-5.
    """
    collected, mask = drawn_inputs(window, scale, dtype=torch.float32)
    ours = taken(collected, mask)
    assert {values.dtype for values in ours.values()} == {torch.float32}
    exact = from_maps([in_double(inputs) for inputs in collected], mask)
    assert_all_same({name: values.double() for name, values in ours.items()}, exact, atol)


def test_the_closed_form_by_hand():
    """Two tokens, one head: a query that sees keys 1 to 3, one that sees them even, and half of it on itself."""
    keys, even, queries, half = torch.tensor([[0, math.log(3)], [0, 0], [0, 1], [0.5, 0.5]], dtype=torch.float64)

    def inputs(loop, k, blended=None):
        q, k = queries.reshape(1, 2, 1, 1), k.reshape(1, 2, 1, 1)
        return AttentionInputs(loop, 0, q, k, blended, None if blended is None else half.reshape(1, 2, 1), 1)

    mask, three = torch.ones(1, 2, dtype=torch.bool), keys.reshape(1, 2, 1, 1)
    found = taken([inputs(1, keys), inputs(2, even)], mask)
    of_three = math.log(4) - 0.75 * math.log(3)
    expected = {
        "attention_entropy": [NAN, of_three, math.log(2)],
        "attention_entropy_relative": [NAN, of_three / math.log(2), 1],
        "attention_sink": [NAN, 1 / 4, 1 / 2],
        "attention_kl": [NAN, NAN, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)],
    }
    for name, values in found.items():
        assert values.flatten().tolist() == pytest.approx(expected[name], abs=1e-14, nan_ok=True), name
    found = taken([inputs(1, keys), inputs(2, even, three)], mask)  # blended: (1/4, 3/4) and (0, 1), half and half
    expected = {
        "attention_entropy": math.log(8) - 7 / 8 * math.log(7),
        "attention_sink": 1 / 8,
        "attention_window": 7 / 8,
        "attention_window_global": 3 / 4,
        "attention_entropy_global": of_three,
        "attention_entropy_local": 0,
        "attention_kl": 1 / 8 * math.log(1 / 2) + 7 / 8 * math.log(7 / 6),
        "attention_kl_global": 0,
    }
    for name, value in expected.items():
        assert found[name][0, 2].item() == pytest.approx(value, abs=1e-14), name


@pytest.mark.parametrize("window", [1, 3, 99])
def test_gates_that_are_shut_in_the_closed_form(window):
    """Gates of exactly 0 and 1 beside open ones, in both loops: as from maps, infinite where those are, and no NaN."""
    collected, mask = drawn_inputs(window, n_loops=4)
    values = torch.tensor([0.0, 1.0, 0.3]).double()
    for index in (1, 2, 3):
        drawn = torch.randint(3, collected[index].gate.shape, generator=torch.Generator().manual_seed(index))
        if index == 3:  # gates that never shut, after one that did
            drawn = drawn.clamp_min(1)
        collected[index] = replace(collected[index], gate=values[drawn])
    ours, expected = taken(collected, mask), from_maps(collected, mask)
    assert_all_same(ours, expected, 1e-12)
    assert bool((expected["attention_kl"] == INF).any()) == (window < 41)
    for shut, branch in ((0.0, "local"), (1.0, "global")):
        closed = [replace(i, gate=None if i.gate is None else torch.full_like(i.gate, shut)) for i in collected]
        found = taken(closed, mask)
        for name in ("attention_entropy", "attention_sink"):
            assert_same(found[name][:, 2:], found[f"{name}_{branch}"][:, 2:], 1e-12, name)
        assert_same(found["attention_kl"][:, 3:], found[f"attention_kl_{branch}"][:, 3:], 1e-12)


@pytest.mark.parametrize("window", [1, 5, 99])
@pytest.mark.parametrize(("shortest", "entries"), [(1, 2**21), (2, 2**21), (7, 2**21), (64, 1), (64, 500), (3, 100)])
def test_blocks_of_the_window_change_nothing(window, shortest, entries, monkeypatch):
    """Blocks shorter and longer than the window and the document, with and without a remainder. Measured: 9e-16."""
    collected, mask = drawn_inputs(window)
    whole = taken(collected, mask)
    monkeypatch.setattr(attention, "SHORTEST_BLOCK", shortest)
    monkeypatch.setattr(attention, "ENTRIES_AT_A_TIME", entries)
    assert_all_same(taken(collected, mask), whole, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("entries", [1, 4 * 41 * 3, 2**21])
def test_means_on_any_device(dtype, entries, monkeypatch):
    """What devices without the fused kernel compute, in blocks of queries, is what it gives, and softmax by hand.

    Measured: 9e-16; 5e-7 in float32, of normalisers of up to 5.
    """
    monkeypatch.setattr(attention, "ENTRIES_AT_A_TIME", entries)
    atol = 1e-13 if dtype == torch.float64 else 1e-5
    q, k, v = torch.randn(3, 4, 41, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    scores = (q.double() @ k.double().mT * 8**-0.5).masked_fill(~torch.ones(41, 41).tril().bool(), -INF)
    exact = scores.softmax(-1) @ v.double(), scores.logsumexp(-1)
    for found in (attention.mean_under(q, k, v), attention._mean_in_blocks(q, k, v)):
        for ours, expected in zip(found, exact, strict=True):
            assert ours.dtype == dtype
            assert_same(ours.double(), expected, atol)
    collected, mask = drawn_inputs(5, dtype=dtype)
    fused = taken(collected, mask)
    monkeypatch.setattr(attention, "mean_under", attention._mean_in_blocks)
    assert_all_same(taken(collected, mask), fused, atol)


@pytest.mark.parametrize("window", [None, 3])
def test_a_loop_like_the_one_before(window):
    """The same queries, keys and gates once more: nothing has moved, in any branch. Measured: 0."""
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        collected, mask = drawn_inputs(window, dtype=dtype)
        found = taken([*collected, replace(collected[-1], loop=4)], mask)
        for name, values in found.items():
            if "_kl" in name:
                assert (values[:3, 4] >= 0).all()
                assert_same(values[:3, 4], torch.zeros_like(values[:3, 4]), atol, name)
            else:
                assert_same(values[:, 4], values[:, 3], what=name)


@pytest.mark.parametrize("changes", [{}, {"window": 99}, UNMIXED, HUGINN_LIKE])
def test_pairs_of_loops(changes):
    """The divergence from every earlier loop: that of the loop before, and as from maps; NaN for what is no pair."""
    model, batch = make_model(**changes), padded(DOCUMENTS, LEFT)
    found = measured(model, batch, 4, groups=["attention_pairs"])
    assert_all_same(
        measured(model, batch, 4, groups=["attention", "attention_pairs"]),
        found | measured(model, batch, 4, groups=["attention"]),
    )
    adjacent = measured(model, batch, 4, groups=["attention"])
    blends = model.cfg.memory == "first"
    assert set(found) == {f"attention_kl_pairs{end}" for end in (("", "_global", "_local") if blends else ("",))}
    for name, values in found.items():
        assert values.shape == (5, 5, 5, 2, 4)  # document, loop, loop_b, layer, head
        first = 2 if name.endswith("_local") else 1
        for loop in range(5):
            for other in range(5):
                there = values[:, loop, other]
                if other < first or other >= loop:
                    assert there.isnan().all(), (name, loop, other)
                    continue
                assert there[[0, 1, 2, 4]].isfinite().all()
                if other == loop - 1:
                    assert_same(there, adjacent[name.replace("_pairs", "")][:, loop], 1e-13)
    collected = inputs_of(model, batch, 4)
    for loop, other, layer in ((4, 1, 0), (4, 2, 1), (3, 1, 1)):
        pair = [next(i for i in collected if (i.loop, i.layer) == (r, layer)) for r in (other, loop)]
        renamed = [replace(pair[0], loop=1, layer=0), replace(pair[1], loop=2, layer=0)]
        for name, values in from_maps(renamed, batch.attention_mask).items():
            if "_kl" in name:
                ours = found[name.replace("_kl", "_kl_pairs")][:, loop, other, layer]
                assert_same(ours, values[:, 2, 0], 1e-12, name)


def test_loops_that_are_kept():
    """Of kept loops each is held against the kept one before, and the pairs are those of the whole run."""
    model, batch, at = make_model(), padded(DOCUMENTS, LEFT), [1, 2, 4]
    groups = ["attention", "attention_pairs", "heads"]
    whole, kept = measured(model, batch, 4, groups=groups), AttentionMeasures(groups)
    record(model, batch, at=at, on_attention=kept)
    for name, values in kept.result().items():
        places = [0, *at]
        if "pairs" in name:
            assert_same(values, whole[name][:, places][:, :, places], 1e-13, name)
        elif "_kl" in name:
            assert_same(values[:, 2], whole[name][:, 2], 1e-13, name)
            assert_same(values[:, 3], whole[name.replace("_kl", "_kl_pairs")][:, 4, 2], 1e-13, name)
        else:
            assert_same(values, whole[name][:, places], 1e-13, name)


# -- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, UNMIXED])
@pytest.mark.parametrize("entries", [1, 5 * 4 * 7 * 2 + 1])
def test_blocks_change_nothing(changes, entries, monkeypatch):
    """One query at a time, or two, gives what all at once give. Measured: 2e-16, rank 6e-8."""
    model, batch = make_model(**changes), padded(DOCUMENTS, LEFT)
    whole = measured(model, batch)
    monkeypatch.setattr(attention, "ENTRIES_AT_A_TIME", entries)
    for name, values in measured(model, batch).items():
        assert_same(values, whole[name], RANK if name.startswith("head_rank") else 1e-13, name)


@pytest.mark.parametrize("changes", [{}, UNMIXED])
def test_maps_exist_in_blocks_only(changes, monkeypatch):
    """No tensor is larger than a block, heads x queries x keys, however long the documents; in one, all would be."""
    model = make_model(dtype=torch.float32, **changes)
    for length in (75, 150):
        batch = padded(token_lists(seed=2, lengths=(length, length // 2)), (1,))
        collected = inputs_of(model, batch)
        for step in (8, length):
            block = model.cfg.n_heads * step * length
            monkeypatch.setattr(attention, "ENTRIES_AT_A_TIME", block)
            with LargestTensor() as seen:
                measures = AttentionMeasures()
                for inputs in collected:
                    measures(inputs, batch.attention_mask)
            assert block / 2 < seen.numel <= block
            assert seen.numel == block or step < length


def test_maps_of_a_run_exist_in_blocks_only(monkeypatch):
    """Nor does recording make more than the blocks and the model's own masks, which have no heads."""
    length, model = 150, make_model(dtype=torch.float32)
    batch = padded(token_lists(seed=2, lengths=(length, length // 2)), (1,))
    monkeypatch.setattr(attention, "ENTRIES_AT_A_TIME", 2**13)
    with LargestTensor() as seen:
        measured(model, batch)
    assert seen.numel <= 2 * length**2


@pytest.mark.parametrize("window", [None, 3, 70])
def test_memory_grows_with_the_document(window):
    """Not with its square: twice the tokens, twice the largest tensor, for every group; nothing near S x S."""
    for groups, entries in ((["attention", "attention_pairs"], None), (["heads"], 2**14)):
        largest = []
        for length in (256, 512):
            generator = torch.Generator().manual_seed(0)
            q, k = (torch.randn(1, length, heads, 8, generator=generator) for heads in (4, 2))
            gate = None if window is None else torch.rand(1, length, 4, generator=generator)
            blended = None if window is None else k
            inputs = [AttentionInputs(1, 0, q, k, None, None, 9)]
            inputs += [AttentionInputs(loop, 0, q, k, blended, gate, window or 9) for loop in (2, 3)]
            with pytest.MonkeyPatch.context() as patch, LargestTensor() as seen:
                if entries is not None:
                    patch.setattr(attention, "ENTRIES_AT_A_TIME", entries)
                taken(inputs, torch.ones(1, length, dtype=torch.bool), groups)
            largest.append(seen.numel)
        assert largest[1] <= 2 * largest[0]
        assert largest[1] < 512**2 / 4


def test_inputs_are_let_go():
    """Once the next loop has been measured nothing holds the inputs of a loop."""
    measures, told = AttentionMeasures(), []

    def tell(inputs, mask):
        measures(inputs, mask)
        told.append((inputs.loop, weakref.ref(inputs)))

    record(make_model(), padded(DOCUMENTS), 4, on_attention=tell)
    assert [loop for loop, inputs in told if inputs() is not None] == [4, 4]


# -- hooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, UNMIXED, HUGINN_LIKE])
def test_watching_attention_changes_nothing(changes):
    """The trace is the same to the bit, no hooks stay behind, and what is told needs no graph."""
    model, batch = make_model(**changes), padded(DOCUMENTS, LEFT)
    plain, told = record(model, batch), []
    watched = record(model, batch, on_attention=lambda inputs, mask: told.append((inputs, mask)))
    assert model.list_hooks() == {}
    for name in ("raw", "carry", "readout", "gate", "coda"):
        if getattr(plain, name) is None:
            assert getattr(watched, name) is None
        else:
            assert_same(getattr(watched, name), getattr(plain, name), what=name)
    assert len(told) == model.cfg.n_layers * model.cfg.n_loops
    for inputs, mask in told:
        assert isinstance(inputs, AttentionInputs)
        assert torch.equal(mask, batch.attention_mask)
        assert not inputs.q.requires_grad


def test_no_hooks_stay_when_a_listener_fails():
    """An error in the listener comes through, and the model is as before."""
    model, batch = make_model(), padded(DOCUMENTS)

    def fail(inputs, mask):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        record(model, batch, on_attention=fail)
    assert model.list_hooks() == {}


@pytest.mark.parametrize("changes", [{}, UNMIXED])
def test_hooks_of_the_caller_are_felt(changes):
    """Queries that the caller sets to zero look at all they see alike: the relative entropy is 1 there."""
    model, batch = make_model(**changes), padded(DOCUMENTS[:3], LEFT)
    plain = measured(model, batch)
    with model.hooks(fwd_hooks=[("loops.2.blocks.1.attn.hook_rot_q", lambda q, hook: q * 0)]):
        edited = measured(model, batch)
    for end in ("",) if changes else ("_global", "_local"):
        even = edited[f"attention_entropy_relative{end}"]
        assert_same(even[:, 2, 1], torch.ones_like(even[:, 2, 1]), 1e-14)
    for name, values in plain.items():
        assert_same(edited[name][:, :2], values[:, :2], what=name)
        assert_same(edited[name][:, 2, 0], values[:, 2, 0], what=name)
    assert not torch.equal(edited["attention_entropy"][:, 3], plain["attention_entropy"][:, 3])
