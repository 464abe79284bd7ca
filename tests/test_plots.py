"""Line data and labels of the figures, not pixels."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic import change, make

from loopdiag import plots
from loopdiag.bootstrap import interval, resampled_means
from loopdiag.diagnosis import Diagnosis, DiagnosisError
from loopdiag.gaincost import gain_cost, recommend
from loopdiag.plots import files
from loopdiag.plots.parts import PAPER
from loopdiag.summary import exit_trade_off, loop_cka


def new_axes(rows=1, columns=1):
    return Figure(layout="constrained").subplots(rows, columns)


def draw_gain_cost(diagnosis, ax, **kw):
    return plots.gain_cost(gain_cost(diagnosis), ax=ax, **kw)


ON_AXES = {
    "gain_cost": draw_gain_cost,
    "readability": lambda diagnosis, ax: plots.readability(diagnosis, ax=ax),
    "similarity": lambda diagnosis, ax: plots.similarity(diagnosis, ax=ax),
    "rarefaction": lambda diagnosis, ax: plots.rarefaction(diagnosis, ax=ax),
    "exit_rules": lambda diagnosis, ax: plots.exit_rules(diagnosis, ax=ax),
}
# Of one model or several, with the number of panels.
TOGETHER = {
    plots.hidden_states: 6,
    plots.shift_against_offset: 2,
    plots.predictions: 4,
    plots.shares: 3,
    plots.attention: 6,
    plots.heads: 6,
}
FAMILY = [make(loops, model=f"plt-{loops}", seed=loops) for loops in (1, 2, 3, 4)]
HUGINN = make(32, at=(1, 2, 4, 8, 16, 32), model="huginn", offset=False, gated=False)


def new_figure(**size):
    return Figure(layout="constrained", **size)


def all_figures(diagnosis):
    """Every function on a figure of its own, those that a model of few loops has."""
    figures = [draw(diagnosis, new_axes()).figure for draw in ON_AXES.values()]
    for draw in (plots.gate, *TOGETHER):
        least = {plots.gate: 2, plots.shares: 3}.get(draw, 1)
        if len(diagnosis.loops) >= least:
            figures.append(new_figure())
            draw(diagnosis, figure=figures[-1])
    return figures


def line(ax, label):
    (found,) = (each for each in ax.lines if each.get_label() == label)
    return found


def span(ax, label, loop):
    """Lower and upper edge of the band of a line, which has its colour, at a loop."""
    colour = matplotlib.colors.to_rgb(line(ax, label).get_color())
    collection = next(each for each in ax.collections if matplotlib.colors.to_rgb(each.get_facecolor()[0]) == colour)
    x, y = collection.get_paths()[0].vertices.T
    at = y[np.abs(x - loop) < 0.1]
    return at.min(), at.max()


def texts(ax):
    return " ".join(text.get_text() for text in ax.texts).replace("\n", " ").replace("\u00a0", " ")


def legend_labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def key(figure):
    """The labels that all panels of a figure share."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def assert_drawn(ax, label, diagnosis, name, spans=True):
    """The line is the measure's mean over documents, its band the interval."""
    values = diagnosis.data[name]
    loops = [loop for loop in diagnosis.loops if not np.isnan(values.sel(loop=loop)).all()]
    values = values.sel(loop=loops)
    low, high = interval(resampled_means(values.values, values["source"].values))
    np.testing.assert_array_equal(line(ax, label).get_xdata(), loops)
    np.testing.assert_allclose(line(ax, label).get_ydata(), values.values.mean(0))
    for index, loop in enumerate(loops if spans else []):
        np.testing.assert_allclose(span(ax, label, loop), (low[index], high[index]))


# ---------------------------------------------------------------- every figure


@pytest.mark.parametrize("name", ON_AXES)
def test_given_axes_are_drawn_on_and_returned(name):
    ax = new_axes()
    assert ON_AXES[name](make(), ax) is ax
    assert ax.lines or ax.images


@pytest.mark.parametrize("draw", [plots.gate, *TOGETHER])
def test_given_figures_and_parts_of_them_are_drawn_into(draw):
    parts = new_figure().subfigures(1, 2)
    axes = draw(make(), figure=parts[1])
    assert len(axes) == TOGETHER.get(draw, 2)
    assert list(axes) == parts[1].axes
    assert not parts[0].axes
    assert all(ax.lines for ax in axes)


@pytest.mark.parametrize("n_loops", [1, 4])
def test_no_global_state_changes(n_loops):
    figures, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    all_figures(make(n_loops))
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_without_a_place_a_figure_is_made_in_the_style_of_a_paper():
    plt.switch_backend("agg")  # no windows where there is a display
    before, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    try:
        narrow = [plots.gain_cost(gain_cost(make()))]
        narrow += [draw(make()) for draw in (plots.readability, plots.similarity, plots.rarefaction, plots.exit_rules)]
        wide = [draw(make())[0] for draw in (plots.gate, *TOGETHER)]
        assert len(plt.get_fignums()) == len(before) + len(narrow) + len(wide)
        assert {ax.figure.get_figwidth() for ax in narrow} == {3.5}
        assert {ax.figure.get_figwidth() for ax in wide} == {7.0}
        for ax in narrow + wide:
            assert min(text.get_fontsize() for text in ax.figure.findobj(Text) if text.get_text()) >= 8
    finally:
        for number in set(plt.get_fignums()) - set(before):
            plt.close(number)
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("n_loops", [1, 4])
def test_both_axes_say_what_and_in_which_unit(n_loops):
    for figure in all_figures(make(n_loops)):
        for ax in figure.axes:
            assert "(" in ax.get_ylabel()
            assert "loop" in ax.get_xlabel() or "(" in ax.get_xlabel() or ax.get_label() == "<colorbar>"


@pytest.mark.parametrize("diagnosis", [make(1), make(4), HUGINN], ids=["R1", "R4", "huginn"])
def test_loop_ticks_are_whole_and_loops_that_were_run(diagnosis):
    for draw in TOGETHER:
        if draw is not plots.shares or len(diagnosis.loops) > 2:
            for ax in draw(diagnosis, figure=new_figure()):
                low, high = ax.get_xlim()
                ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
                assert ticks
                assert set(ticks) <= set(diagnosis.loops)


LONG = make(6, trained=4, model="trained/local/models/looped/plt-4-step-20000")


@pytest.mark.parametrize(
    "diagnoses",
    [[make(1)], [make(2)], [LONG], FAMILY, [HUGINN, LONG]],
    ids=["R1", "R2", "R6", "family", "huginn"],
)
def test_everything_fits_on_the_page(diagnoses):
    with matplotlib.rc_context(PAPER):
        for kind in files.FIGURES.values():
            pairs = [(diagnosis, None) for diagnosis in diagnoses if files._takes_part(kind, diagnosis)]
            if not pairs:
                continue
            apart = isinstance(kind, files.Apart)
            figure = files._apart(kind, pairs) if apart else files._together(kind, diagnoses)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            needs, has = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
            assert has[0] <= 7
            assert min(needs.x0, needs.y0) >= -0.01
            assert needs.x1 <= has[0] + 0.01
            assert needs.y1 <= has[1] + 0.01
            boxes = [ax.get_tightbbox(canvas.get_renderer()) for ax in figure.axes if ax.get_label() != "<colorbar>"]
            assert not any(one.padded(-2).overlaps(other) for one in boxes for other in boxes if one is not other)


def test_loops_beyond_training_are_shaded():
    for draw in TOGETHER:
        figure = new_figure()
        assert all(ax.patches[0].get_x() == 4.5 for ax in draw(make(6, trained=4), figure=figure))
        assert "beyond training" in key(figure)
        assert not any(ax.patches for ax in draw(make(4), figure=new_figure()))


# ---------------------------------------------------------------- several models


@pytest.mark.parametrize("draw", TOGETHER)
def test_every_model_has_a_line_of_its_own_look(draw):
    figure = new_figure()
    axes = draw(FAMILY, figure=figure)
    # No share can be taken of one loop after the first: the key has no model without a line.
    drawn = ["plt-3", "plt-4"] if draw is plots.shares else ["plt-1", "plt-2", "plt-3", "plt-4"]
    assert [label for label in key(figure) if label != "lost in rounding"] == drawn
    for ax in axes:
        lines = [each for each in ax.lines if each.get_label() in key(figure)]
        assert lines
        assert len({each.get_color() for each in lines}) == len({each.get_marker() for each in lines}) == len(lines)
    (last,) = (each for each in axes[0].lines if each.get_label() == "plt-4")
    assert last.get_xdata()[-1] == 4


def test_lines_of_several_models_are_their_measures():
    axes = plots.hidden_states(FAMILY, figure=new_figure())
    for diagnosis, name in zip(FAMILY, ("plt-1", "plt-2", "plt-3", "plt-4"), strict=True):
        assert_drawn(axes[0], name, diagnosis, "step_size")
        if name != "plt-1":
            assert_drawn(axes[2], f"{name}: unrelated states", diagnosis, "cos_reference", spans=False)


def test_marks_that_coincide_stand_side_by_side():
    twins = [make(model="a"), make(model="b")]
    ax = plots.predictions(twins, figure=new_figure())[0]
    first, second = (line(ax, name) for name in "ab")
    (left, height), (right, as_high) = (
        ax.transData.inverted().transform(each.get_transform().transform((2, 3.0))) for each in (first, second)
    )
    assert (left, right) == (pytest.approx(1.96), pytest.approx(2.04))
    assert height == pytest.approx(as_high)
    np.testing.assert_array_equal(first.get_xdata(), second.get_xdata())


def test_models_that_differ_in_training_have_hollow_marks_beyond_it():
    figure = new_figure()
    axes = plots.predictions([make(6, trained=2, model="a"), make(4, trained=4, model="b")], figure=figure)
    assert not any(ax.patches for ax in axes)
    assert key(figure) == ["a", "b", "beyond training"]
    (hollow,) = (each for each in axes[0].lines if each.get_markerfacecolor() == "white")
    np.testing.assert_array_equal(hollow.get_xdata(), (3, 4, 5, 6))
    assert line(axes[0], "a").get_markevery() == [0, 1]


def test_what_is_lost_in_rounding_is_crossed():
    figure = new_figure()
    step = plots.hidden_states(make(6), figure=figure)[0]
    assert "lost in rounding" in key(figure)
    (crossed,) = (each for each in step.lines if each.get_marker() == "x")
    np.testing.assert_array_equal(crossed.get_xdata(), (5, 6))


def test_sparse_loops_stand_on_a_logarithmic_axis():
    axes = plots.predictions(HUGINN, figure=new_figure())
    assert {ax.get_xscale() for ax in axes} == {"log"}
    np.testing.assert_array_equal(line(axes[0], "huginn").get_xdata(), (1, 2, 4, 8, 16, 32))


def test_models_of_different_documents_say_how_many():
    figure = new_figure()
    plots.predictions([make(model="a"), make(model="b", documents=10)], figure=figure)
    assert figure.legends[0].get_title().get_text() == "Intervals: 95 % over 10 to 12 documents."


def test_no_model_with_shares_is_refused_and_one_is_enough():
    with pytest.raises(DiagnosisError, match="two loops or more after the first"):
        plots.shares([make(2), make(1)], figure=new_figure())
    axes = plots.shares([make(2, model="two"), make(4, model="four")], figure=new_figure())
    assert [each.get_label() for each in axes[0].lines] == ["four", "four: equal shares"]
    np.testing.assert_allclose(line(axes[0], "four: equal shares").get_ydata(), 1 / 3)


# ---------------------------------------------------------------- attention, heads, gate


@pytest.mark.parametrize(("draw", "name"), [(plots.attention, "attention_kl"), (plots.heads, "head_rank")])
def test_attention_is_drawn_by_branch(draw, name):
    diagnosis = make()
    axes = draw(diagnosis, figure=new_figure())
    assert [ax.get_title() for ax in axes[3:]] == ["effective map", "global branch", "local branch"]
    for ax, end in zip(axes[3:], ("", "_global", "_local"), strict=True):
        of_loops = Diagnosis(diagnosis.data.mean(["layer", "head"]).assign_attrs(diagnosis.data.attrs))
        assert_drawn(ax, "tiny", of_loops, f"{name}{end}")
        assert ax.get_ylim() == axes[3].get_ylim()
        assert ax.get_yscale() == ("log" if name == "attention_kl" else "linear")
    assert axes[0].get_ylim() != axes[3].get_ylim()


def test_a_model_without_a_gate_has_one_map():
    axes = plots.attention(HUGINN, figure=new_figure())
    assert len(axes) == 2
    assert not any(ax.get_title() for ax in axes)
    assert axes[0].get_ylim() != axes[1].get_ylim()  # of different units
    with pytest.raises(DiagnosisError, match="no gate_mean: no loop of this run blends attention"):
        plots.gate(HUGINN, figure=new_figure())


def test_the_gate_stands_beside_a_half():
    diagnosis = make()
    by_layer, by_position = plots.gate(diagnosis, figure=new_figure())
    values = diagnosis.data["gate_mean"].sel(loop=3).mean(["document", "head"])
    np.testing.assert_allclose(line(by_layer, "loop 3").get_ydata(), values)
    values = diagnosis.data["gate_by_position"].sel(loop=3).mean(["document", "layer"])
    np.testing.assert_allclose(line(by_position, "loop 3").get_ydata(), values)
    assert [label.get_text() for label in by_position.get_xticklabels()] == [
        str(position) for position in diagnosis.data["position"].values
    ]
    for ax in (by_layer, by_position):
        assert [0.5, 0.5] in [list(each.get_ydata()) for each in ax.lines]


# ---------------------------------------------------------------- similarity, rarefaction, exit rules


def test_similarity_draws_the_pooled_matrix():
    diagnosis = make()
    ax = plots.similarity(diagnosis, ax=new_axes())
    np.testing.assert_allclose(ax.images[0].get_array(), loop_cka(diagnosis).mean)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2", "3", "4"]
    assert "0.64" in texts(ax)


def test_similarity_of_many_loops_has_no_numbers():
    ax = plots.similarity(make(24), ax=new_axes())
    assert "1.00" not in texts(ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(loop) for loop in range(0, 25, 3)]


def test_rarefaction_draws_each_loop_beside_the_most_that_tokens_allow():
    diagnosis = make()
    ax = plots.rarefaction(diagnosis, ax=new_axes())
    values = diagnosis.data["effective_rank_by_tokens"].mean("document")
    for loop in (1, 2, 3, 4):
        np.testing.assert_allclose(line(ax, f"loop {loop}").get_ydata(), values.sel(loop=loop))
    bound = line(ax, "most possible")
    # No more directions than tokens, nor than the 128 entries of a state.
    np.testing.assert_array_equal(bound.get_ydata(), np.minimum(bound.get_xdata(), 128))


def test_loops_beyond_training_have_a_star():
    """In figures with a line or a tick for each loop, where no shade can stand."""
    diagnosis = make(4, trained=2)
    ax = plots.rarefaction(diagnosis, ax=new_axes())
    assert legend_labels(ax)[:4] == ["loop 1", "loop 2", "loop 3*", "loop 4*"]
    assert "*: beyond training." in texts(ax)
    ax = plots.similarity(diagnosis, ax=new_axes())
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2", "3*", "4*"]
    assert "*: beyond training." in texts(ax)
    assert "Trained with 2 loops." in texts(plots.exit_rules(diagnosis, ax=new_axes()))


def test_of_many_loops_powers_of_two_and_the_last_are_drawn():
    ax = plots.rarefaction(make(12), ax=new_axes())
    assert legend_labels(ax) == [*(f"loop {loop}" for loop in (1, 2, 4, 8, 12)), "most possible"]


def test_exit_rules_are_drawn_against_running_all_tokens_alike():
    diagnosis = make()
    found = exit_trade_off(diagnosis, 0.01)
    ax = plots.exit_rules(diagnosis, ax=new_axes())
    for rule in found.rules:
        np.testing.assert_allclose(line(ax, rule.name).get_xdata(), rule.loops.mean)
        np.testing.assert_allclose(line(ax, rule.name).get_ydata(), rule.excess.mean)
    np.testing.assert_allclose(line(ax, "all tokens alike").get_ydata(), found.always.mean)
    loops, nll, excess = (each.mean.item() for each in (found.oracle.loops, found.oracle.nll, found.oracle.excess))
    assert f"Oracle, not drawn: {loops:.2f} loops, {nll:.2f} nats, {-excess:.2f} below the last loop." in texts(ax)
    rules = np.concatenate([rule.excess.mean for rule in found.rules])
    assert ax.get_ylim()[0] < rules.min() < rules.max() < ax.get_ylim()[1]
    assert "at the price 0.01" in texts(ax)
    assert "gate" not in legend_labels(ax)


# ---------------------------------------------------------------- files


def test_pictures_are_the_same_bytes_again():
    diagnoses = [make(3, documents=4), make(4, documents=4, model="b")]
    only = {"shares": files.FIGURES["shares"], "gain_cost": files.FIGURES["gain_cost"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loopdiag.plots.files.FIGURES", only)
        pictures = plots.pictures(diagnoses)
        assert pictures == plots.pictures(diagnoses)
    assert set(pictures) == {"shares.png", "shares.svg", "gain_cost.png", "gain_cost.svg"}


def test_what_is_left_out_is_said_with_what_would_bring_it():
    assert not plots.left_out(FAMILY)
    few = plots.left_out([make(groups=("prediction", "motion", "diversity"), without=["hsic"])])
    assert "--measures default,heads" in few["heads"]
    assert "--measures default,rarefaction" in few["rarefaction"]
    assert few["similarity"] == "no hsic: left out here"
    assert plots.left_out([make(2)])["shares"] == "no run has enough loops for it"
    assert "no loop of this run blends attention" in plots.left_out([HUGINN])["gate"]


def test_the_recommendation_gives_the_price_and_the_loop_to_mark(monkeypatch):
    given = []
    monkeypatch.setattr("loopdiag.plots.files.gain_cost", lambda curve, **kw: given.append((curve.model, kw)))
    monkeypatch.setattr("loopdiag.plots.files.exit_rules", lambda diagnosis, **kw: given.append(("exit", kw)))
    monkeypatch.setattr("loopdiag.plots.files.rendered", lambda figure, form: b"")
    recommendation = recommend(make(), price=0.02)
    plots.pictures([make(), make(model="b")], [recommendation, None])
    (_, told), (_, silent), (_, exits), _ = given
    assert (told["price"], told["recommended"]) == (0.02, recommendation.recommended_loops)
    assert (silent["price"], silent["recommended"]) == (None, None)
    assert exits["price"] == 0.02


def test_draw_writes_what_is_pictured(tmp_path, monkeypatch):
    monkeypatch.setattr("loopdiag.plots.files.pictures", lambda diagnoses, told: {"a.png": b"a", "b.svg": b"b"})
    written = plots.draw([make(4)], [None], tmp_path / "new" / "figures")
    assert {path.name: path.read_bytes() for path in written} == {"a.png": b"a", "b.svg": b"b"}
    assert {path.name for path in (tmp_path / "new" / "figures").iterdir()} == {"a.png", "b.svg"}


def test_a_figure_that_cannot_be_drawn_leaves_no_files(tmp_path, monkeypatch):
    def fails(*args, **kw):
        raise ValueError("no picture")

    (tmp_path / "gain_cost.png").write_bytes(b"old")
    monkeypatch.setattr("loopdiag.plots.files.exit_rules", fails)  # the last
    monkeypatch.setattr("loopdiag.plots.files.rendered", lambda figure, form: b"new")
    with pytest.raises(ValueError, match="no picture"):
        plots.draw([make(4)], [None], tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("gain_cost.png", b"old")]


# ---------------------------------------------------------------- gain and cost


@pytest.mark.parametrize("n_loops", [2, 4, 6])
@pytest.mark.parametrize(("label", "field"), [("gain", "gain"), ("cost", "cost"), ("net gain", "net")])
def test_gain_cost_draws_the_curve_from_loop_2(label, field, n_loops):
    curve = gain_cost(make(n_loops))
    ax = plots.gain_cost(curve, ax=new_axes())
    estimate = getattr(curve, field)
    np.testing.assert_array_equal(line(ax, label).get_xdata(), range(2, n_loops + 1))
    np.testing.assert_array_equal(line(ax, label).get_ydata(), estimate.mean[1:])
    for index in range(1, n_loops):
        np.testing.assert_array_equal(span(ax, label, index + 1), (estimate.low[index], estimate.high[index]))


def test_loop_1_is_stated_and_never_on_the_axis():
    curve = gain_cost(make())
    ax = plots.gain_cost(curve, ax=new_axes())
    assert ax.get_xlim()[0] > 1
    assert ax.get_ylim()[1] < curve.gain.mean[0]
    for estimate in (curve.gain, curve.cost, curve.nll_exit):
        assert f"{estimate.mean[0]:.2f} [{estimate.low[0]:.2f}, {estimate.high[0]:.2f}]" in texts(ax)


def test_gain_cost_is_in_nats_per_token():
    assert "nats per token" in draw_gain_cost(make(), new_axes()).get_ylabel()


def test_a_negative_net_gain_is_on_the_axis():
    ax = draw_gain_cost(make(), new_axes())
    assert line(ax, "net gain").get_ydata().min() < 0
    assert ax.get_ylim()[0] < span(ax, "net gain", 4)[0] < 0


@pytest.mark.parametrize(
    ("price", "linear"), [(None, 0.01), (0.0, 0.01), (0.01, 0.01), (0.03, 0.01), (0.002, 0.001), (5.0, 0.1)]
)
def test_the_axis_is_linear_within_the_price(price, linear):
    ax = draw_gain_cost(make(), new_axes(), price=price)
    assert ax.yaxis.get_transform().linthresh == pytest.approx(linear)
    assert f"linear within ±{linear:g}" in texts(ax)


def test_price_and_recommended_loop_are_marked():
    ax = draw_gain_cost(make(), new_axes(), price=0.01, recommended=3)
    assert list(line(ax, "price 0.01").get_ydata()) == [0.01, 0.01]
    assert list(line(ax, "recommended: 3 loops").get_xdata()) == [3, 3]
    assert legend_labels(ax) == ["gain", "cost", "net gain", "price 0.01", "recommended: 3 loops"]


def test_what_is_not_given_is_not_marked():
    assert legend_labels(draw_gain_cost(make(), new_axes())) == ["gain", "cost", "net gain"]


def test_a_recommended_loop_off_the_axis_is_stated():
    ax = draw_gain_cost(make(), new_axes(), recommended=1)
    assert "Recommended: 1 loop." in texts(ax)
    assert legend_labels(ax) == ["gain", "cost", "net gain"]


def test_line_keywords_reach_the_three_lines():
    ax = draw_gain_cost(make(), new_axes(), linewidth=5)
    assert [line(ax, label).get_linewidth() for label in ("gain", "cost", "net gain")] == [5, 5, 5]


def test_one_loop_has_no_gain_to_draw():
    ax = draw_gain_cost(make(1), new_axes(), price=0.01, recommended=1)
    assert not ax.lines
    assert "no extra loop" in texts(ax)
    assert "Recommended: 1 loop." in texts(ax)


def test_loops_that_change_nothing_are_drawn_at_zero():
    diagnosis = make()
    for name in ("gain", "cost"):
        diagnosis = change(diagnosis, name, [2, 3, 4], 0.0)
    diagnosis = change(diagnosis, "nll_exit", [2, 3, 4], diagnosis.data["nll_exit"].sel(loop=[1]).values)
    assert not line(draw_gain_cost(diagnosis, new_axes()), "net gain").get_ydata().any()


# ---------------------------------------------------------------- readability


@pytest.mark.parametrize("n_loops", [1, 2, 4])
def test_readability_draws_both_readings(n_loops):
    diagnosis = make(n_loops)
    ax = plots.readability(diagnosis, ax=new_axes())
    assert_drawn(ax, "as it is", diagnosis, "nll_exit")
    assert_drawn(ax, "usable (translator)", diagnosis, "nll_usable")
    assert "nats per token" in ax.get_ylabel()


def test_withheld_is_stated_as_the_span_of_its_intervals():
    diagnosis = make()
    values = diagnosis.data["withheld"].sel(loop=[2, 3, 4])
    low, high = interval(resampled_means(values.values, values["source"].values))
    said = f"withholds {low.min():.2f} to {high.max():.2f} nats per token from loops 2 to 4"
    assert said in texts(plots.readability(diagnosis, ax=new_axes()))


@pytest.mark.parametrize("diagnosis", [make(without=["withheld"]), make(1)])
def test_nothing_withheld_is_nothing_said(diagnosis):
    assert "withholds" not in texts(plots.readability(diagnosis, ax=new_axes()))


def test_readability_needs_readouts():
    ax = new_axes()
    with pytest.raises(DiagnosisError, match="no nll_usable: left out here"):
        plots.readability(make(without=["nll_usable"]), ax=ax)
    assert not ax.lines


# ---------------------------------------------------------------- shift against offset


def test_shift_and_offset_have_a_panel_each():
    diagnosis = make()
    shift, omega = plots.shift_against_offset(diagnosis, figure=new_figure())
    assert_drawn(shift, "tiny", diagnosis, "output_shift")
    assert_drawn(omega, "tiny", diagnosis, "omega")
    assert_drawn(omega, "tiny: any two tokens", diagnosis, "omega_random", spans=False)
    assert (shift.get_yscale(), omega.get_yscale()) == ("log", "linear")
    assert omega.get_ylim()[0] == 0
    assert "nats, unsigned" in shift.get_ylabel()
    assert "carry" in omega.get_ylabel()
    assert legend_labels(omega) == ["any two tokens"]


@pytest.mark.parametrize("diagnosis", [make(1), HUGINN])
def test_without_an_offset_distance_its_panel_says_so(diagnosis):
    shift, omega = plots.shift_against_offset(diagnosis, figure=new_figure())
    assert not omega.lines
    assert "no loop has an offset" in texts(omega)
    assert shift.lines


def test_a_shift_of_zero_stands_at_the_foot_of_the_log_axis():
    ax = plots.shift_against_offset(change(make(), "output_shift", [3, 4], 0.0), figure=new_figure())[0]
    assert list(np.isnan(line(ax, "tiny").get_ydata())) == [False, False, True, True]
    assert list(line(ax, "zero").get_xdata()) == [3, 4]
    assert ax.get_ylim()[0] > 0.1


# ---------------------------------------------------------------- hidden states


@pytest.mark.parametrize("n_loops", [2, 4])
def test_hidden_states_draws_the_measures_and_their_references(n_loops):
    diagnosis = make(n_loops)
    step, relative, turn, rank, centred, gap = plots.hidden_states(diagnosis, figure=new_figure())
    assert_drawn(step, "tiny", diagnosis, "step_size")
    assert_drawn(relative, "tiny", diagnosis, "relative_step")
    assert_drawn(turn, "tiny", diagnosis, "cos_update")
    assert_drawn(turn, "tiny: unrelated states", diagnosis, "cos_reference", spans=False)
    assert_drawn(rank, "tiny", diagnosis, "effective_rank")
    assert_drawn(centred, "tiny", diagnosis, "effective_rank_centred")
    assert_drawn(gap, "tiny", diagnosis, "fixed_point_gap")
    assert_drawn(gap, "tiny: layers alone", diagnosis, "fixed_point_gap_layers", spans=False)
    assert legend_labels(turn) == ["unrelated states"]
    assert legend_labels(gap) == ["one more loop", "layers alone"]


def test_without_a_fixed_point_gap_there_is_the_state_cosine():
    diagnosis = make(groups=("prediction", "motion", "diversity"))
    cosine = plots.hidden_states(diagnosis, figure=new_figure())[-1]
    assert_drawn(cosine, "tiny", diagnosis, "state_cosine")


def test_the_rank_axis_names_its_tokens_and_its_ceiling():
    for rank in plots.hidden_states(FAMILY, figure=new_figure())[3:5]:
        assert "256 tokens" in rank.get_ylabel()
        assert "at most 128" in rank.get_ylabel()


def test_one_loop_has_no_successive_updates():
    turn = plots.hidden_states(make(1), figure=new_figure())[2]
    assert not turn.lines
    assert "no successive updates" in texts(turn)


def test_documents_too_short_for_a_rank_are_left_out():
    diagnosis = make()
    diagnosis.data["effective_rank"][0] = np.nan
    rank = plots.hidden_states(diagnosis, figure=new_figure())[3]
    rest = Diagnosis(diagnosis.data.isel(document=slice(1, None)))
    assert_drawn(rank, "tiny", rest, "effective_rank")


def test_missing_measures_leave_their_part_out():
    without = ["cos_reference", "effective_rank_centred", "relative_step", "fixed_point_gap_layers"]
    _, relative, turn, _, centred, gap = plots.hidden_states(make(without=without), figure=new_figure())
    assert "not measured" in texts(relative)
    assert "not measured" in texts(centred)
    assert turn.get_legend() is None
    assert gap.get_legend() is None
