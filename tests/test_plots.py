"""Line data and labels of the figures, not pixels."""

import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from loopdiag import plots
from loopdiag.bootstrap import interval, resampled_means
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import gain_cost, recommend
from loopdiag.plots.parts import PAPER

LEVELS = {  # by loop 1, 2, ...: a half-trained model with a useless last loop
    "gain": (11.0, 0.45, 0.11, 0.03, 0.02, 0.01),
    "cost": (0.01, 0.14, 0.065, 0.04, 0.05, 0.06),
    "output_shift": (12.0, 0.5, 0.07, 0.01, 0.01, 0.01),
    "nll_usable": (4.4, 4.0, 3.9, 3.9, 3.9, 4.0),
    "withheld": (np.nan, 1.4, 1.6, 1.6, 1.6, 1.6),
    "step_size": (25.0, 12.0, 4.0, 1.6, 0.8, 0.4),
    "relative_step": (24.0, 0.5, 0.18, 0.06, 0.03, 0.02),
    "state_cosine": (0.1, 0.86, 0.98, 0.99, 0.99, 0.99),
    "cos_update": (np.nan, -0.26, -0.08, 0.04, 0.03, 0.02),
    "cos_reference": (np.nan, -0.64, -0.48, -0.49, -0.5, -0.5),
    "effective_rank": (77.0, 79.0, 78.0, 77.0, 76.0, 75.0),
    "effective_rank_centred": (80.0, 82.0, 81.0, 80.0, 79.0, 78.0),
    "omega": (np.nan, 20.0, 18.5, 18.0, 18.0, 18.0),
    "omega_random": (np.nan, 21.0, 20.5, 20.0, 20.0, 20.0),
}


def make(n_loops=4, *, trained=None, without=(), model="tiny", documents=12, spread=0.05):
    """A diagnosis of `documents` documents, two to a source, around LEVELS."""
    noise = np.random.default_rng(0)

    def around(levels):
        values = np.array((np.nan, *levels[:n_loops])) * np.exp(spread * noise.standard_normal((documents, 1)))
        return values * np.exp(spread / 5 * noise.standard_normal(values.shape))

    values = {name: around(levels) for name, levels in LEVELS.items()}
    fall = np.nan_to_num(values["cost"] - values["gain"])
    values["nll_exit"] = 15.5 + fall.cumsum(1)
    about = {
        "model": model,
        "trained_loops": trained or n_loops,
        "run_loops": n_loops,
        "documents": documents,
        "rank_tokens": 256,
        "config": {"d_model": 128},
        "absent": dict.fromkeys(without, "left out here"),
    }
    dataset = xr.Dataset(
        {name: (("document", "loop"), array) for name, array in values.items() if name not in without},
        coords={
            "document": [f"d{index}" for index in range(documents)],
            "source": ("document", [f"s{index // 2}" for index in range(documents)]),
            "loop": np.arange(n_loops + 1),
        },
        attrs={"provenance": json.dumps(about)},
    )
    return Diagnosis(dataset)


def change(diagnosis, name, loop, value):
    data = diagnosis.data.copy(deep=True)
    data[name].loc[{"loop": loop}] = value
    return Diagnosis(data)


def new_axes(rows=1, columns=1):
    return Figure(layout="constrained").subplots(rows, columns)


def draw_gain_cost(diagnosis, ax, **kw):
    return plots.gain_cost(gain_cost(diagnosis), ax=ax, **kw)


SINGLE = {
    "gain_cost": draw_gain_cost,
    "shift_against_offset": lambda diagnosis, ax: plots.shift_against_offset(diagnosis, ax=ax),
    "readability": lambda diagnosis, ax: plots.readability(diagnosis, ax=ax),
}


def all_figures(diagnosis):
    """Every function, each on the axes of a figure of its own."""
    drawn = [draw(diagnosis, new_axes()) for draw in SINGLE.values()]
    return [ax.figure for ax in drawn] + [plots.hidden_states(diagnosis, axes=new_axes(2, 2))[0, 0].figure]


def line(ax, label):
    (found,) = (each for each in ax.lines if each.get_label() == label)
    return found


def span(ax, label, loop):
    """Lower and upper edge of the band of a line, which has its colour, at a loop."""
    colour = matplotlib.colors.to_rgb(line(ax, label).get_color())
    (collection,) = (each for each in ax.collections if matplotlib.colors.to_rgb(each.get_facecolor()[0]) == colour)
    x, y = collection.get_paths()[0].vertices.T
    at = y[np.abs(x - loop) < 0.1]
    return at.min(), at.max()


def texts(ax):
    return " ".join(text.get_text() for text in ax.texts).replace("\n", " ").replace("\u00a0", " ")


def legend_labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def assert_drawn(ax, label, diagnosis, name):
    """The line is the measure's mean over documents, its band the interval."""
    values = diagnosis.data[name]
    loops = [loop for loop in diagnosis.loops if not np.isnan(values.sel(loop=loop)).all()]
    values = values.sel(loop=loops)
    low, high = interval(resampled_means(values.values, values["source"].values))
    np.testing.assert_array_equal(line(ax, label).get_xdata(), loops)
    np.testing.assert_allclose(line(ax, label).get_ydata(), values.values.mean(0))
    for index, loop in enumerate(loops):
        np.testing.assert_allclose(span(ax, label, loop), (low[index], high[index]))


# ---------------------------------------------------------------- every figure


@pytest.mark.parametrize("name", SINGLE)
def test_given_axes_are_drawn_on_and_returned(name):
    ax = new_axes()
    assert SINGLE[name](make(), ax) is ax
    assert ax.lines


def test_given_four_axes_are_drawn_on_and_returned():
    axes = new_axes(1, 4)
    assert plots.hidden_states(make(), axes=axes) is axes
    assert all(ax.lines for ax in axes)


@pytest.mark.parametrize("count", [1, 3])
def test_hidden_states_wants_four_axes(count):
    with pytest.raises(ValueError, match=f"4 axes and was given {count}"):
        plots.hidden_states(make(), axes=new_axes(1, count))


@pytest.mark.parametrize("n_loops", [1, 4])
def test_no_global_state_changes(n_loops):
    figures, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    all_figures(make(n_loops))
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_without_axes_a_figure_is_made_in_the_style_of_a_paper():
    plt.switch_backend("agg")  # no windows where there is a display
    before, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    try:
        drawn = [
            plots.gain_cost(gain_cost(make())),
            plots.shift_against_offset(make()),
            plots.readability(make()),
            plots.hidden_states(make())[0, 0],
        ]
        assert len(plt.get_fignums()) == len(before) + 4
        assert [ax.figure.get_figwidth() for ax in drawn] == [3.5, 3.5, 3.5, 7.0]
        for ax in drawn:
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
            assert ax.get_xlabel() == "loop" or ax.get_shared_x_axes().get_siblings(ax)


@pytest.mark.parametrize("n_loops", [1, 4])
def test_loop_ticks_are_whole(n_loops):
    for figure in all_figures(make(n_loops)):
        for ax in figure.axes:
            low, high = ax.get_xlim()
            ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
            assert ticks
            assert all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize(
    "diagnosis",
    [make(1), make(2), make(6, trained=4, model="/home/someone/models/looped/plt-4-step-20000")],
    ids=["R1", "R2", "R6"],
)
def test_everything_fits_on_the_page(diagnosis):
    with matplotlib.rc_context(PAPER):
        figures = [Figure((3.5, 3.2), layout="constrained") for _ in SINGLE]
        for figure, draw in zip(figures, SINGLE.values(), strict=True):
            draw(diagnosis, figure.subplots())
        figures.append(Figure((7, 4.8), layout="constrained"))
        plots.hidden_states(diagnosis, axes=figures[-1].subplots(2, 2))
        for figure in figures:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            needs, has = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
            assert min(needs.x0, needs.y0) >= -0.01
            assert needs.x1 <= has[0] + 0.01
            assert needs.y1 <= has[1] + 0.01


def test_loops_beyond_training_are_shaded():
    for figure in all_figures(make(6, trained=4)):
        primary = [ax for ax in figure.axes if ax.get_xlabel()]
        assert all(ax.patches[0].get_x() == 4.5 for ax in primary)
        assert sum("beyond training" in legend_labels(ax) for ax in primary) == 1
    assert not any(ax.patches for figure in all_figures(make(4)) for ax in figure.axes)


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
    with pytest.raises(ValueError, match="nll_usable, which needs readouts: diagnose with readouts=True"):
        plots.readability(make(without=["nll_usable"]), ax=ax)
    assert not ax.lines


# ---------------------------------------------------------------- shift against offset


def test_shift_and_offset_have_an_axis_each():
    diagnosis = make()
    ax = plots.shift_against_offset(diagnosis, ax=new_axes())
    twin = ax.figure.axes[-1]
    assert_drawn(ax, "shift Dp", diagnosis, "output_shift")
    assert_drawn(twin, "offset Ω", diagnosis, "omega")
    assert_drawn(twin, "Ω, random pairs", diagnosis, "omega_random")
    assert (ax.get_yscale(), twin.get_yscale()) == ("log", "linear")
    assert twin.get_ylim()[0] == 0
    assert "nats" in ax.get_ylabel()
    assert "carry units" in twin.get_ylabel()
    assert legend_labels(ax) == ["shift Dp", "offset Ω", "Ω, random pairs"]


def test_shift_against_offset_warns_of_units_and_sign():
    said = texts(plots.shift_against_offset(make(), ax=new_axes()))
    assert "different units" in said
    assert "Dp is unsigned" in said


@pytest.mark.parametrize("diagnosis", [make(1), make(without=["omega", "omega_random"])])
def test_without_an_offset_distance_there_is_one_axis(diagnosis):
    ax = plots.shift_against_offset(diagnosis, ax=new_axes())
    assert ax.figure.axes == [ax]
    assert "No loop here has an offset distance" in texts(ax)
    assert_drawn(ax, "shift Dp", diagnosis, "output_shift")


def test_a_shift_of_zero_stands_at_the_foot_of_the_log_axis():
    ax = plots.shift_against_offset(change(make(), "output_shift", [3, 4], 0.0), ax=new_axes())
    assert list(np.isnan(line(ax, "shift Dp").get_ydata())) == [False, False, True, True]
    assert list(line(ax, "zero").get_xdata()) == [3, 4]
    assert ax.get_ylim()[0] > 0.1


# ---------------------------------------------------------------- hidden states


@pytest.mark.parametrize("n_loops", [2, 4])
def test_hidden_states_draws_the_measures_and_their_references(n_loops):
    diagnosis = make(n_loops)
    axes = plots.hidden_states(diagnosis, axes=new_axes(2, 2))
    step, turn, rank, cosine = axes.ravel()
    assert_drawn(step, "step size", diagnosis, "step_size")
    assert_drawn(step.figure.axes[-1], "relative", diagnosis, "relative_step")
    assert_drawn(turn, "measured", diagnosis, "cos_update")
    assert_drawn(turn, "unrelated states", diagnosis, "cos_reference")
    assert_drawn(rank, "raw", diagnosis, "effective_rank")
    assert_drawn(rank, "centred", diagnosis, "effective_rank_centred")
    assert_drawn(cosine, cosine.lines[0].get_label(), diagnosis, "state_cosine")


def test_the_rank_axis_names_its_tokens_and_its_ceiling():
    rank = plots.hidden_states(make(), axes=new_axes(2, 2))[1, 0]
    assert "256 tokens" in rank.get_ylabel()
    assert "at most 128" in rank.get_ylabel()


def test_one_loop_has_no_successive_updates():
    turn = plots.hidden_states(make(1), axes=new_axes(2, 2))[0, 1]
    assert not turn.lines
    assert "no successive updates" in texts(turn)


def test_documents_too_short_for_a_rank_are_left_out():
    diagnosis = make()
    diagnosis.data["effective_rank"][0] = np.nan
    rank = plots.hidden_states(diagnosis, axes=new_axes(2, 2))[1, 0]
    rest = Diagnosis(diagnosis.data.isel(document=slice(1, None)))
    assert_drawn(rank, "raw", rest, "effective_rank")


def test_missing_measures_leave_their_part_out():
    diagnosis = make(without=["cos_reference", "effective_rank_centred", "relative_step", "state_cosine"])
    step, turn, rank, cosine = plots.hidden_states(diagnosis, axes=new_axes(2, 2)).ravel()
    assert [legend_labels(ax) for ax in (step, turn, rank, cosine)] == [["step size"], ["measured"], ["raw"], []]


# ---------------------------------------------------------------- files

FILES = [
    f"{name}.{form}"
    for name in ("gain_cost", "shift_against_offset", "hidden_states", "readability")
    for form in ("png", "svg")
]


def test_draw_writes_these_files_the_same_each_time(tmp_path):
    diagnosis, figures, settings = make(), plt.get_fignums(), dict(matplotlib.rcParams)
    recommendation = recommend(diagnosis)
    first, second = (plots.draw(diagnosis, recommendation, tmp_path / name / "figures") for name in "ab")
    assert [path.name for path in first] == FILES
    assert sorted(path.name for path in (tmp_path / "a" / "figures").iterdir()) == sorted(FILES)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_draw_gives_the_curve_the_price_and_the_recommended_loop(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("loopdiag.plots.files.gain_cost", lambda curve, **kw: given.update(kw))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kw: path.write_bytes(b""))
    recommendation = recommend(make(), price=0.02)
    plots.draw(make(), recommendation, tmp_path)
    assert given["price"] == 0.02
    assert given["recommended"] == recommendation.recommended_loops


def test_draw_leaves_readability_out_without_readouts(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kw: path.write_bytes(b""))
    diagnosis = make(without=["nll_usable", "withheld"])
    assert [path.name for path in plots.draw(diagnosis, recommend(diagnosis), tmp_path)] == FILES[:-2]


def test_a_figure_that_cannot_be_drawn_leaves_no_files(tmp_path):
    diagnosis = make(without=["nll_exit"])
    with pytest.raises(ValueError, match="diagnosis of tiny has no nll_exit: left out here"):
        plots.draw(diagnosis, recommend(make()), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fails(self, path, **kw):
        path.write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / FILES[0]).write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        plots.draw(make(), recommend(make()), tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(FILES[0], b"old")]
