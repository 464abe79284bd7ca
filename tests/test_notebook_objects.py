"""What objects show of themselves in a notebook, and the tidy table of a diagnosis."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import seaborn
from matplotlib.figure import Figure
from synthetic import HEADS, LAYERS, make
from test_decoder import make_model
from test_measured import SEVERAL, made_up
from tiny import random_corpus, random_trace, word_tokenizer

from loopdiag import html
from loopdiag.corpus import CorpusError
from loopdiag.diagnosis import DiagnosisError
from loopdiag.gaincost import decompose, gain_cost, recommend, recommend_training
from loopdiag.interventions import intervene
from loopdiag.summary import by_loop
from loopdiag.trace import record

MARKUP = "<script>alert('x')</script>&"


class Page(HTMLParser):
    """Text of a piece of HTML, its table, and whether its elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.styles, self.text, self.cells = [], set(), [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.styles += [value for _, value in attrs]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1][-1] += data


def effects():
    return intervene(made(), random_corpus(), ["offset"], max_tokens=20)


def made():
    model = make_model(n_loops=3)
    model.tokenizer, model.source = word_tokenizer(), MARKUP
    return model


OBJECTS = {
    "Diagnosis": lambda: make(3, model=MARKUP),
    "GainCost": lambda: gain_cost(make(3, model=MARKUP)),
    "Recommendation": lambda: recommend(make(3, model=MARKUP)),
    "LoopTrace": random_trace,
    "Effects": effects,
    "SweepLosses": lambda: made_up(SEVERAL),
    "Decomposition": lambda: decompose(made_up(SEVERAL)),
    "TrainingRecommendation": lambda: recommend_training(made_up(SEVERAL)),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_html_of_every_object_is_whole_escaped_and_without_colours(name):
    found = OBJECTS[name]()
    assert type(found).__name__ == name
    page = Page(found._repr_html_())
    assert page.tags <= {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.tags >= {"table", "b"}
    assert not any(word in style for style in page.styles for word in ("color", "background", "#", "rgb"))
    assert len({len(row) for row in page.cells}) == 1
    assert "nan" not in page.text
    if name in ("Diagnosis", "GainCost", "Recommendation", "Effects"):
        assert MARKUP in page.text


def test_a_diagnosis_shows_its_means_and_stars_what_is_beyond_training():
    diagnosis = make(5, trained=4, without=("nll_usable",))
    head, *rows = Page(diagnosis._repr_html_()).cells
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5*"]
    assert "usable NLL" not in head
    for heading, name, digits in (
        ("exit NLL", "nll_exit", 3),
        ("cost", "cost", 3),
        ("effective rank", "effective_rank", 1),
    ):
        means = diagnosis.data[name].values.mean(0)[1:]
        assert [row[head.index(heading)] for row in rows] == [f"{mean:.{digits}f}" for mean in means]
    assert rows[0][head.index("cos of updates")] == "-"  # there is none at loop 1
    assert "beyond training" in diagnosis._repr_html_()
    assert "beyond training" not in make(4)._repr_html_()


def test_a_curve_shows_its_numbers_with_their_intervals():
    curve = gain_cost(make(3))
    head, *rows = Page(curve._repr_html_()).cells
    mean, low, high = curve.net.mean[1], curve.net.low[1], curve.net.high[1]
    assert rows[1][head.index("net gain")] == f"{mean:.3f}\u00a0[{low:.3f},\u00a0{high:.3f}]"
    assert rows[2][head.index("cost/gain")] == f"{curve.cost.mean[2] / curve.gain.mean[2]:.2f}"


def test_a_recommendation_shows_both_answers():
    text = Page(recommend(make(4))._repr_html_()).text
    found = recommend(make(4))
    assert f"Measured: {found.recommended_loops}\n" in text
    assert f"not backtested: {found.predicted_training_loops} (" in text
    assert "break-even" in text
    unsure = recommend(make(4, documents=4))  # of two sources
    assert f"Measured: undetermined: {unsure.why}" in Page(unsure._repr_html_()).text


def test_a_sweep_that_has_holes_shows_them_as_dashes():
    losses = made_up(SEVERAL)
    losses.data["nll"].loc[{"loops": losses.data["loops"][-1]}] = np.nan
    assert all(row[-1] == "-" for row in Page(losses._repr_html_()).cells[1:])
    assert Page(decompose(losses)._repr_html_()).cells[-1][1:] == ["-"] * 5


def test_numbers_and_intervals():
    assert html.number(float("nan")) == html.number(float("inf")) == "-"
    assert html.number(1.23456, 2) == "1.23"
    assert html.between(1, 0.5, 1.5, 1) == "1.0\u00a0[0.5,\u00a01.5]"
    assert html.between(1, float("nan"), float("nan")) == "1.000"


# ---------------------------------------------------------------- the tidy table


def test_the_table_has_every_number_once():
    diagnosis = make(3)
    frame = diagnosis.to_frame()
    assert list(frame) == ["model", "document", "source", "measure", "loop", "value", "unit"]
    assert not frame.isna().any(axis=None)
    assert not frame.duplicated(["document", "measure", "loop"]).any()
    assert frame["loop"].dtype.kind == "i"
    for name in ("gain", "effective_rank", "cos_update"):
        values = diagnosis.data[name]
        back = frame[frame["measure"] == name].pivot(index="document", columns="loop", values="value")
        expected = values.dropna("loop", how="all").to_pandas()
        pd.testing.assert_frame_equal(back.loc[expected.index], expected, check_names=False)
    assert set(frame["measure"]) >= {"gate_mean", "nll_exit"}
    assert not set(frame["measure"]) & {"hsic", "effective_rank_pooled", "exit_rule_nll"}
    assert set(frame.loc[frame["measure"] == "nll_exit", "unit"]) == {"nats per token"}


def test_layers_and_heads_are_averaged_or_kept():
    diagnosis = make(3)
    values = diagnosis.data["gate_mean"]
    both = diagnosis.to_frame("gate_mean", keep=("layer", "head"))
    assert len(both) == np.isfinite(values.values).sum()
    assert (both["layer"].nunique(), both["head"].nunique()) == (LAYERS, HEADS)
    by_layer = diagnosis.to_frame("gate_mean", keep=("layer",))
    assert "head" not in by_layer
    assert list(by_layer) == ["model", "document", "source", "measure", "loop", "layer", "value", "unit"]
    for frame in (both, by_layer):
        found = frame.groupby(["document", "loop"], sort=False)["value"].mean()
        np.testing.assert_allclose(found, diagnosis.to_frame("gate_mean").set_index(["document", "loop"])["value"])
    with pytest.raises(ValueError, match="of layer and head, name"):
        diagnosis.to_frame(keep=("document",))


def test_other_dimensions_are_columns():
    frame = make(2).to_frame(["hsic", "nll_exit"])
    assert "loop_b" in frame
    assert frame.loc[frame["measure"] == "nll_exit", "loop_b"].isna().all()
    assert "document" not in make(2).to_frame("effective_rank_pooled")
    with pytest.raises(DiagnosisError, match="has no omega"):
        make(2, offset=False).to_frame("omega")


def test_seaborn_takes_the_table_as_it_is():
    """Its lines go through the means that our figures draw."""
    several = [make(3, model="one"), make(3, model="two", seed=1)]
    frame = pd.concat([diagnosis.to_frame(["gain", "cost"]) for diagnosis in several])
    ax = Figure().subplots()
    seaborn.lineplot(frame, x="loop", y="value", hue="model", style="measure", errorbar=None, ax=ax)
    drawn = [line.get_ydata() for line in ax.lines if len(line.get_xdata())]
    expected = [by_loop(diagnosis, name).mean for diagnosis in several for name in ("gain", "cost")]
    np.testing.assert_allclose(drawn, expected)


# ---------------------------------------------------------------- a text is enough


def test_a_text_is_recorded_like_a_batch_of_its_tokens():
    model = made()
    trace = record(model, "w3 w1 w4 w1")
    assert trace.input_ids.tolist() == [[3, 1, 4, 1]]
    assert trace.mask.all()
    _, cache = model.run_with_cache(trace.input_ids)
    np.testing.assert_array_equal(trace.raw[2], cache["loops.2.hook_out_pre_norm"])


def test_what_is_no_text_to_record_is_refused():
    model = made()
    with pytest.raises(CorpusError, match="empty"):
        record(model, "")
    model.tokenizer = None
    with pytest.raises(CorpusError, match="no tokenizer"):
        record(model, "w1")
