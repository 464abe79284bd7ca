"""The plain way of writing the default measures, which the toolkit is timed against, gives the toolkit's numbers."""

import numpy as np
import pytest
from baseline import assert_same, measure
from overhead import TOGETHER, as_ids

import loopdiag as ld
from loopdiag.corpus import Corpus


def test_the_same_numbers():
    """On a trained model in float32, every measure of the default groups. Measured: 8e-4 of values near 0,
    9e-6 of others."""
    model = ld.load("tiny-plt-4")
    corpus = Corpus("some", (), ld.corpus.bundled().report[:3])
    diagnosis = ld.diagnose(model, corpus, max_tokens=100, measures=TOGETHER["default"])
    found = measure(model, as_ids(model, corpus, 100))
    assert_same(found, diagnosis)


def test_a_wrong_number_is_seen():
    """The comparison is not of NaN with NaN."""
    model = ld.load("tiny-plt-2")
    corpus = Corpus("some", (), ld.corpus.bundled().report[:2])
    diagnosis = ld.diagnose(model, corpus, max_tokens=60, measures=TOGETHER["default"])
    found = measure(model, as_ids(model, corpus, 60))
    assert min(np.isfinite(values).mean() for values in found.values()) >= 0.3
    for name in ("nll_exit", "omega_random", "attention_kl", "cka"):
        with pytest.raises(AssertionError, match=name if name != "cka" else "tolerance"):
            assert_same(found | {name: found[name] * 1.01}, diagnosis)
