"""CKA between loops: against the estimator written out over tuples of tokens, its laws, and what it is for noise."""

import itertools
from dataclasses import replace

import ckatorch.core
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import make_model
from tiny import assert_same, padded, random_trace, token_lists

from loopdiag.measures.similarity import LayerSimilarity, cka, hsic, loop_hsic
from loopdiag.trace import record

calm = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(0, 10**6)


def views(seed, count=3, tokens=12, width=5):
    """Views of the same tokens that have something in common, and a mean that is not zero."""
    noise = torch.randn(count + 1, tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise[1:] + 0.7 * noise[0] + 2


def of_four(a, b):
    """HSIC of two views as a U-statistic: the mean over ordered 4-tuples of different tokens of its kernel.

    E[k l] + E[k] E[l] - 2 E[k E[l]], each expectation over other tokens (Gretton et al., 2005, equation 8).
    """
    k, n = a @ a.T, b @ b.T
    terms = [k[i, j] * (n[i, j] + n[q, r] - 2 * n[i, q]) for i, j, q, r in itertools.permutations(range(len(a)), 4)]
    return np.mean(terms)


def as_published(a, b):
    """Song et al. (2012), equation 5, word for word, with numpy."""
    m, one = len(a), np.ones(len(a))
    k, n = (x @ x.T * (1 - np.eye(m)) for x in (a, b))
    whole = one @ k @ one * (one @ n @ one) / ((m - 1) * (m - 2))
    return (np.trace(k @ n) + whole - 2 / (m - 2) * (one @ k @ n @ one)) / (m * (m - 3))


def centred_biased(a, b):
    """HSIC as the plain CKA has it, of centred states."""
    a, b = a - a.mean(0), b - b.mean(0)
    return np.linalg.norm(a.T @ b) ** 2


@pytest.mark.parametrize(("reference", "tokens"), [(of_four, 4), (of_four, 6), (as_published, 4), (as_published, 30)])
def test_hsic_against_references(reference, tokens):
    """Of every two views, in order. Measured: 4e-13 of up to 46."""
    x = views(0, tokens=tokens)
    expected = torch.tensor([[reference(a, b) for b in x.numpy()] for a in x.numpy()], dtype=torch.float64)
    assert_same(hsic(x), expected, 1e-11)
    assert_same(hsic(x.float()), expected, 1e-4)  # what is rounded is the input; measured: 9e-6


def test_hsic_by_hand():
    """Four tokens with one coordinate of -1 or 1. Off the diagonal every Gram entry is -1 or 1, every row sums to -1.

    (12 + 16 / 6 - 4) / 4 with itself; of halves that cross, two pairs of six agree: (-4 + 16 / 6 - 4) / 4.
    """
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])[..., None]
    assert_same(hsic(x), torch.tensor([[8, -4], [-4, 8]], dtype=torch.float64) / 3, 1e-14)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_too_few_tokens(tokens):
    """The unbiased estimate divides by n - 3: refused in words, not infinite."""
    with pytest.raises(ValueError, match=f"hsic: {tokens} tokens are too few: at least 4"):
        hsic(torch.ones(2, tokens, 3))


@given(seed=seeds, scale=st.sampled_from([1e-3, 0.5, 300.0]))
@calm
def test_rotation_scale_and_shift(seed, scale):
    """No basis, no unit and no mean state counts; each view may have its own. Measured: 1e-15."""
    x = views(seed)
    noise = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = x @ torch.linalg.qr(noise).Q
    before = cka(hsic(x))
    assert_same(cka(hsic(turned)), before, 1e-11)
    assert_same(cka(hsic(turned * torch.tensor([scale, 1, 2]).double()[:, None, None])), before, 1e-11)
    assert_same(cka(hsic(x + 10 * noise[:, :1])), before, 1e-11)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert_same(cka(hsic(x[:, order])), before, 1e-11)


@given(seed=seeds)
@calm
def test_a_view_and_itself(seed):
    """1, whichever way it is turned; symmetric between views. Measured: 4e-16."""
    x = views(seed)
    x[2] = x[0].flip(-1) * 3
    found = cka(hsic(x))
    assert_same(found.diagonal(), torch.ones(3).double(), 1e-13)
    assert found[0, 2].item() == pytest.approx(1, abs=1e-12)
    assert_same(found, found.T.contiguous(), 1e-13)
    assert (found <= 1 + 1e-12).all()


def test_independent_views():
    """0 in the mean, where the biased form reads d / (n + d); about half are negative, and kept.

    Of 50 pairs of 64 tokens in 32 dimensions. Measured: 0.002 with a standard error of 0.004, 25 negative; over other
    seeds 22 to 31, and a spread of 0.8 to 1.4 times sqrt(2) / tokens. The biased form: 0.335, where it should be 1/3.
    """
    tokens, width = 64, 32
    x = torch.randn(50, 2, tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.stack([cka(hsic(pair))[0, 1] for pair in x])
    assert found.mean().abs() < 3 * found.std() / 50**0.5
    assert found.std().item() == pytest.approx(2**0.5 / tokens, rel=0.5)
    assert 15 <= (found < 0).sum() <= 35
    biased = [centred_biased(a, b) / (centred_biased(a, a) * centred_biased(b, b)) ** 0.5 for a, b in x.numpy()]
    assert np.mean(biased) == pytest.approx(width / (tokens + width), rel=0.05)


def test_what_has_no_own_variance():
    """Equal states, or a view whose own estimate is not positive: NaN with every view, and the others as without it."""
    x = views(1)
    whole = cka(hsic(x))
    x[1] = x[1, :1]
    found = cka(hsic(x))
    assert found[1].isnan().all()
    assert found[:, 1].isnan().all()
    assert_same(found[::2, ::2], whole[::2, ::2])
    negative = torch.tensor([[1.0, 0.5], [0.5, -1.0]])
    assert cka(negative)[0].tolist() == pytest.approx([1, float("nan")], nan_ok=True)
    assert negative[1, 1] == -1  # what was given stays
    assert cka(-torch.eye(2)).isnan().all()  # the product of two negative ones is no variance


def test_hsic_of_a_trace():
    """The first tokens of each document's N(Y), real ones only, loops 0..R; NaN where there are fewer."""
    trace = random_trace(coda=True)
    found = loop_hsic(trace, 6)
    assert found.shape == (4, 4, 4)
    assert found.isnan().flatten(1).all(1).tolist() == [False, False, True, True]
    for document in (0, 1):
        states = trace.norm(trace.raw)[:, document, trace.mask[document]][:, :6].numpy()
        expected = [[as_published(a, b) for b in states] for a in states]
        assert_same(found[document], torch.tensor(expected), 1e-12)  # Measured: 4e-15
    padding = replace(trace, raw=torch.where(trace.mask[..., None], trace.raw, float("nan")))
    assert_same(loop_hsic(padding, 6), found)


def test_documents_are_pooled_before_the_ratio():
    """The ratio of the mean HSIC, which is near the truth, 1/5, even with five tokens a document.

    The views are independent but for one shared direction of five.
    """
    noise = torch.randn(2000, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    noise[:, 1, :, 0] = noise[:, 0, :, 0]
    terms = torch.stack([hsic(pair) for pair in noise])
    pooled = cka(terms.mean(0))[0, 1]
    assert pooled.item() == pytest.approx(0.2, abs=0.03)  # measured: 0.188; 0.205 and 0.211 with other seeds
    mean = terms.mean(0)
    assert pooled == mean[0, 1] / (mean[0, 0] * mean[1, 1]).sqrt()
    assert_same(cka(terms)[7], cka(terms[7]))


def test_against_an_independent_package():
    """Pooled over documents, as ckatorch has it for minibatches. Measured: 5e-16."""
    documents = torch.stack([views(seed, count=3, tokens=20, width=6) for seed in range(7)])
    found = cka(torch.stack([hsic(document) for document in documents]).mean(0))
    for a, b in itertools.product(range(3), repeat=2):
        expected = ckatorch.core.cka_batch(documents[:, a], documents[:, b])
        assert_same(found[a, b], expected, 1e-12)


@torch.no_grad()
def test_loops_of_a_model():
    """Alone as in a batch; in float32 the terms are float64. Measured: 7e-15; 4e-8 in float32."""
    model = make_model()
    documents = token_lists(seed=3, lengths=(20, 9, 14))
    found = loop_hsic(record(model, padded(documents, left=(1,))), 12)
    assert found[1].isnan().all()
    for index in (0, 2):
        assert_same(found[index], loop_hsic(record(model, padded([documents[index]])), 12)[0], 1e-11)
    half = loop_hsic(record(make_model(dtype=torch.float32), padded(documents)), 12)
    assert half.dtype == torch.float64
    torch.testing.assert_close(cka(half)[0], cka(found)[0], rtol=0, atol=1e-6)


# -- layers -----------------------------------------------------------------------------------------


def layers_of(model, batch, tokens, n_loops=None, norm=None, **settings):
    """HSIC between layers of one recorded run."""
    watch = LayerSimilarity(tokens, norm or model.ln_final)
    record(model, batch, n_loops, on_layer=watch, **settings)
    return watch.result()["hsic_layers"]


@pytest.mark.parametrize("changes", [{}, {"n_prelude": 1, "n_coda": 1, "offset": 0, "memory": "own"}])
@torch.no_grad()
def test_layers_against_hooked_states(changes):
    """HSIC of N of what hooks see after each layer, document by document, padding or not. Measured: 1e-14.

    The last layer of a loop is the loop's state: those terms are those between loops.
    """
    model = make_model(**changes)
    documents = token_lists(seed=3, lengths=(20, 9, 14))
    batch = padded(documents, left=(1, 2))
    found = layers_of(model, batch, 12)
    assert found.shape == (3, 4, 2, 4, 2)  # document, loop, layer, loop_b, layer_b
    assert found.dtype == torch.float64
    assert found[:, 0].isnan().all()
    assert found[:, :, :, 0].isnan().all()
    assert found[1].isnan().all()
    places = [(loop, layer) for loop in (1, 2, 3) for layer in (0, 1)]
    for index in (0, 2):
        _, states = model.run_with_cache(torch.tensor([documents[index]]))
        views = [states[f"loops.{loop}.blocks.{layer}.hook_resid_post"][0, :12] for loop, layer in places]
        views = [model.ln_final(view).numpy() for view in views]
        expected = torch.tensor([[as_published(a, b) for b in views] for a in views])
        assert_same(found[index, 1:, :, 1:].reshape(6, 6), expected, 1e-11)
    assert_same(found[:, 1:, -1, 1:, -1], loop_hsic(record(model, batch), 12)[:, 1:, 1:], 1e-12)
    flat = found[0, 1:, :, 1:].reshape(6, 6)
    assert_same(cka(flat).diagonal(), torch.ones(6).double(), 1e-13)


@torch.no_grad()
def test_layers_of_kept_loops():
    """Loops that were not kept are left out, the others as in the whole run; what is applied first is the caller's."""
    model, batch = make_model(), padded(token_lists(seed=3, lengths=(20, 14)))
    whole, places = layers_of(model, batch, 12, 4), [0, 1, 2, 4]
    assert_same(layers_of(model, batch, 12, at=places[1:]), whole[:, places][:, :, :, places], 1e-13)
    raw = layers_of(model, batch, 12, 4, norm=lambda x: 2 * x)
    assert_same(raw, 16 * layers_of(model, batch, 12, 4, norm=torch.nn.Identity()), 1e-9)
    assert not torch.equal(raw[:, 1:, :, 1:], whole[:, 1:, :, 1:])


def cka_of_features(x, y):
    """Plain linear CKA by the features, Kornblith et al. (2019), equation 5 of their section 3."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def test_many_tokens_leave_the_plain_form():
    """Debiased and plain CKA of related views meet as tokens grow: what bias there is falls with them.

    Measured: 0.50, 0.14, 0.021 apart, of 24 directions.
    """
    apart = []
    for tokens in (16, 128, 1024):
        x = views(2, count=2, tokens=tokens, width=24)
        apart.append(abs(cka(hsic(x))[0, 1].item() - cka_of_features(*x.numpy())))
    assert apart[0] > 3 * apart[1] > 15 * apart[2]
    assert apart[2] < 0.03
