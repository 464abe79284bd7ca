"""Line data and labels of the figures of a sweep, not pixels."""

import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_plots import key, legend_labels, line, new_axes, new_figure, texts

from loopdiag import plots
from loopdiag.bootstrap import interval, resampled_means, student_interval
from loopdiag.gaincost import decompose
from loopdiag.gaincost.measured import loss_curves, over_training
from loopdiag.losses import SCHEMA, SweepError, SweepLosses
from loopdiag.plots import sweeps
from loopdiag.plots.parts import PAPER

PLACE = ("seed", "memory", "offset", "loops")
TOKENS, LOOKS, DOCUMENTS = 3_000_000, 6, 12
GAIN = {1: 0.0, 2: 0.09, 3: 0.12, 4: 0.13, 8: 0.12}  # below one loop, without offset
TAX = {1: 0.0, 2: -0.03, 3: 0.03, 4: 0.04, 8: 0.05}
ALL = ["measured_gain_cost", "trained_losses", "losses_over_training"]


def make_sweep(loops=(1, 2, 3, 4), offsets=(1, 0), memories=("first",), seeds=3, data="bundled"):
    """A sweep around the levels above; deep models start late."""
    random = np.random.default_rng(0)
    shape = (seeds, len(memories), len(offsets), len(loops))
    level = np.array([[-GAIN[count] + bool(offset) * TAX[count] for count in loops] for offset in offsets])
    trained = level[..., None] + random.normal(0, 0.003, (*shape, 1)) + random.normal(0, 0.01, (*shape, DOCUMENTS))
    nll = random.normal(3.2, 0.3, DOCUMENTS) + trained
    if loops[0] == 1:  # the same model at every offset and memory
        nll[:, :, :, 0] = nll[:, :1, :1, 0]
    share = np.arange(1, LOOKS + 1) / LOOKS
    late = np.multiply.outer(np.array(loops), 3 * (np.exp(-5 * share) - np.exp(-5)))
    values = {
        "nll": ((*PLACE, "document"), nll),
        "nll_look": ((*PLACE, "look", "document"), (nll[..., None, :] + late[..., None]).astype(np.float32)),
    }
    nothing = ((*PLACE, "document"), np.zeros_like(nll))
    values |= dict.fromkeys(("loop_helped", "loop_harmed", "offset_helped", "offset_harmed"), nothing)
    costs = ("flops", "kv_bytes", "kv_bytes_fixed", "parameters_once", "parameters_looped")
    values |= dict.fromkeys(costs, (PLACE[1:], np.ones(shape[1:])))
    values |= {"learning_rate": ("loops", np.full(len(loops), 0.003))}
    coords = dict(zip(PLACE, (range(seeds), memories, offsets, loops), strict=True))
    coords = {name: list(axis) for name, axis in coords.items()} | {
        "document": [f"text {index}" for index in range(DOCUMENTS)],
        "source": ("document", [f"source {index // 2}" for index in range(DOCUMENTS)]),
        "look": (TOKENS * share).astype(int),
    }
    about = {"schema": SCHEMA, "data": data, "recipe": {"tokens": TOKENS}}
    return SweepLosses(xr.Dataset(values, coords, {"provenance": json.dumps(about)}))


def without(losses, **place):
    """The sweep before the models of a place were trained."""
    data = losses.data.copy(deep=True)
    for name in ("nll", "nll_look"):
        data[name].loc[place] = np.nan
    return SweepLosses(data)


def growing(seeds=3):
    """A sweep that trains: the last seed has its deepest models, another lacks one, a place is empty in all."""
    losses = without(make_sweep(seeds=seeds), seed=seeds - 1, loops=[1, 2, 3])
    return without(without(losses, seed=1, offset=0, loops=2), offset=0, loops=3)


def bars(ax, label):
    """Ends of the vertical bars of a line, which have its colour: [bar, end]."""
    colour = matplotlib.colors.to_rgb(line(ax, label).get_color())
    (found,) = (each for each in ax.collections if matplotlib.colors.to_rgb(each.get_color()[0]) == colour)
    return np.array([segment[:, 1] for segment in found.get_segments()])


def band(ax, label):
    """Lowest and highest point of the band of a line at each x: [x, end]."""
    drawn = line(ax, label)
    colour = matplotlib.colors.to_rgb(drawn.get_color())
    (found,) = (each for each in ax.collections if matplotlib.colors.to_rgb(each.get_facecolor()[0]) == colour)
    x, y = found.get_paths()[0].vertices.T
    return np.array([(y[np.isclose(x, at)].min(), y[np.isclose(x, at)].max()) for at in drawn.get_xdata()])


def assert_points(ax, label, loops, estimate):
    """The line is the mean, and a bar stands wherever there is an interval."""
    np.testing.assert_array_equal(line(ax, label).get_xdata(), loops)
    np.testing.assert_allclose(line(ax, label).get_ydata(), estimate.mean)
    known = np.isfinite(estimate.low)
    np.testing.assert_allclose(bars(ax, label), np.column_stack([estimate.low, estimate.high])[known])


def after_first(estimate):
    return type(estimate)(estimate.mean[1:], estimate.low[1:], estimate.high[1:])


def assert_all_within(ax):
    """Autoscaling sees what stands beside its place: every mean and bar is inside the axes."""
    low, high = ax.get_ylim()
    ends = [each.get_ydata() for each in ax.lines]
    ends += [segment[:, 1] for each in ax.collections for segment in each.get_segments()]
    values = np.concatenate([np.asarray(end, dtype=float) for end in ends])
    assert np.nanmin(values) >= low
    assert np.nanmax(values) <= high


# ---------------------------------------------------------------- the measured gain-cost curve


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("loops", [(1, 2), (1, 2, 3, 4), (2, 4, 8)])
def test_the_measured_curve_draws_the_decomposition(seeds, loops):
    parts, ax = decompose(make_sweep(loops, seeds=seeds)), new_axes()
    assert plots.measured_gain_cost(parts, price=0.01, ax=ax) is ax
    drawn = (("gain (no offset)", parts.gain), ("rise of the tax", parts.rise), ("net (with offset)", parts.net))
    for label, estimate in drawn:
        assert_points(ax, label, loops[1:], after_first(estimate))
    gain, rise, net = (line(ax, label).get_ydata() for label, _ in drawn)
    np.testing.assert_allclose(net, gain - rise, atol=1e-12)
    assert list(line(ax, "price 0.01").get_ydata()) == [0.01, 0.01]
    assert any(list(each.get_ydata()) == [0, 0] for each in ax.lines)
    assert_all_within(ax)
    said = {1: "documents, of one seed; they leave", 2: "documents, of the mean of 2 seeds", 3: "95 % t over 3 seeds"}
    assert said[seeds] in texts(ax)
    assert "Not trained" not in texts(ax)
    assert "No interval" not in texts(ax)


def test_the_rise_is_that_of_the_tax():
    parts = decompose(make_sweep())
    np.testing.assert_allclose(parts.rise.mean[1:], np.diff(parts.tax.mean))
    by_seed = make_sweep().data["nll"].mean("document").sel(memory="first")
    tax = (by_seed.sel(offset=1) - by_seed.sel(offset=0)).values
    low, high = student_interval(np.diff(tax))
    np.testing.assert_allclose((parts.rise.low[1:], parts.rise.high[1:]), (low, high))


def test_the_tax_stands_below():
    parts, ax = decompose(make_sweep()), new_axes()
    plots.measured_gain_cost(parts, ax=ax)
    said = f"{parts.tax.mean[3]:.3f} [{parts.tax.low[3]:.3f}, {parts.tax.high[3]:.3f}] at 4 loops"
    assert said in texts(ax)
    assert "at 1" not in texts(ax)
    assert not any("price" in label for label in legend_labels(ax))


def test_what_is_not_trained_yet_is_left_out_and_said():
    parts, ax = decompose(growing()), new_axes()
    plots.measured_gain_cost(parts, ax=ax)
    gain, net = (line(ax, label).get_ydata() for label in ("gain (no offset)", "net (with offset)"))
    assert list(np.isfinite(gain)) == [True, False, False]
    assert np.isfinite(net).all()
    assert len(bars(ax, "net (with offset)")) == 3
    assert not [each for each in ax.collections if matplotlib.colors.same_color(each.get_color()[0], sweeps.BLUE)]
    assert "fewer than two seeds" in texts(ax)
    assert "Not trained yet: 3 loops without offset." in texts(ax)
    assert_all_within(ax)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (make_sweep((3,)), "one loop count: no other to compare"),
        (without(make_sweep((2, 3)), loops=2), "no two loop counts to compare"),
    ],
)
def test_without_two_loop_counts_the_axes_say_so(losses, said):
    ax = plots.measured_gain_cost(decompose(losses), price=0.01, ax=new_axes())
    assert not ax.lines
    assert said in texts(ax)
    assert "Tax: 0.0" in texts(ax)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("seeds", [1, 3])
def test_losses_are_means_with_their_seeds(seeds):
    losses = make_sweep(seeds=seeds)
    ax = new_axes()
    assert plots.trained_losses(losses, ax=ax) is ax
    for offset, label in ((1, "offset on"), (0, "offset off")):
        nll = losses.data["nll"].sel(offset=offset, memory="first")
        by_seed = nll.mean("document").values
        drawn = line(ax, label)
        np.testing.assert_array_equal(drawn.get_xdata(), (1, 2, 3, 4))
        np.testing.assert_allclose(drawn.get_ydata(), by_seed.mean(0))
        over_documents = resampled_means(nll.mean("seed").values.T, nll["source"].values)
        low, high = student_interval(by_seed) if seeds == 3 else interval(over_documents)
        np.testing.assert_allclose(bars(ax, label), np.column_stack([low, high]))
        alike = [each for each in ax.lines if each.get_color() == drawn.get_color() and each is not drawn]
        points = np.array([each.get_ydata() for each in alike])
        np.testing.assert_allclose(points, by_seed if seeds == 3 else np.empty(0))
        assert all(each.get_linestyle() == "None" for each in alike)
    assert_all_within(ax)
    assert legend_labels(ax) == ["offset on", "offset off"]
    assert ("spread between documents" in texts(ax)) == (seeds == 1)
    assert ("Faint: each seed" in texts(ax)) == (seeds == 3)
    assert "3M training tokens each" in texts(ax)


@pytest.mark.parametrize("loops", [(1,), (1, 2, 3, 4), (1, 2, 4, 8)])
def test_ticks_are_loop_counts(loops):
    ax = plots.trained_losses(make_sweep(loops), ax=new_axes())
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == list(loops)
    assert "loops" in ax.get_xlabel()
    assert "nats per token" in ax.get_ylabel()


def test_memories_are_told_apart_by_lines_and_markers():
    losses = make_sweep(memories=("first", "own"))
    ax = plots.trained_losses(losses, ax=new_axes())
    names = [f"offset {offset}, memory {memory}" for memory in ("first", "own") for offset in ("on", "off")]
    assert legend_labels(ax) == names
    lines = [line(ax, name) for name in names]
    assert [each.get_linestyle() for each in lines] == ["-", "-", "--", "--"]
    assert len({each.get_marker() for each in lines}) == 4
    assert len({each.get_color() for each in lines}) == 2
    one = plots.trained_losses(losses, memory="own", ax=new_axes())
    assert legend_labels(one) == ["offset on", "offset off"]
    np.testing.assert_array_equal(line(one, "offset on").get_ydata(), lines[2].get_ydata())


def test_losses_of_one_offset_and_of_an_unfinished_sweep():
    one = plots.trained_losses(make_sweep(offsets=(0,)), ax=new_axes())
    assert legend_labels(one) == ["offset off"]
    ax = plots.trained_losses(growing(), ax=new_axes())
    assert "Some models are not trained yet" in texts(ax)
    assert list(np.isfinite(line(ax, "offset off").get_ydata())) == [True, True, False, True]
    np.testing.assert_allclose(line(ax, "offset off").get_ydata(), loss_curves(growing())[1].nll.mean)
    assert_all_within(ax)
    nothing = plots.trained_losses(without(make_sweep()), ax=new_axes())
    assert "no model is trained yet" in texts(nothing)


# ---------------------------------------------------------------- over training


@pytest.mark.parametrize("seeds", [1, 3])
def test_losses_over_training_are_differences_at_the_same_tokens(seeds):
    losses = make_sweep(seeds=seeds)
    figure = new_figure()
    on, off, tax = plots.losses_over_training(losses, figure=figure)
    looks = losses.data["nll_look"].sel(memory="first").astype(float)
    above = looks - looks.sel(loops=1)
    differences = (
        (on, above.sel(offset=1)),
        (off, above.sel(offset=0)),
        (tax, looks.sel(offset=1) - looks.sel(offset=0)),
    )
    for ax, values in differences:
        assert [each.get_label() for each in ax.lines[:3]] == ["2 loops", "3 loops", "4 loops"]
        for loops in (2, 3, 4):
            of = values.sel(loops=loops)
            drawn = line(ax, f"{loops} loops")
            np.testing.assert_allclose(drawn.get_xdata(), losses.data["look"].values / 1e6)
            np.testing.assert_allclose(drawn.get_ydata(), of.mean(("seed", "document")).values, atol=1e-12)
            over_documents = resampled_means(of.mean("seed").transpose("document", "look").values, of["source"].values)
            low, high = student_interval(of.mean("document").values) if seeds == 3 else interval(over_documents)
            np.testing.assert_allclose(band(ax, f"{loops} loops"), np.column_stack([low, high]))
        assert len({each.get_marker() for each in ax.lines[:3]}) == 3
        assert "million training tokens" in ax.get_xlabel()
        assert "nats per token" in ax.get_ylabel()
    assert on.get_ylim() == off.get_ylim()
    assert key(figure) == ["2 loops", "3 loops", "4 loops"]
    said = figure.get_supxlabel().replace("\n", " ")
    assert "an earlier look is not what a shorter training would give" in said
    assert ("over 3 seeds" if seeds == 3 else "over documents, of one seed") in said


def test_early_looks_do_not_flatten_the_later_ones():
    for ax in plots.losses_over_training(make_sweep(), figure=new_figure())[:2]:
        early, *later = np.array([each.get_ydata() for each in ax.lines[:3]]).T
        low, high = ax.get_ylim()
        assert early.max() > high
        assert low < np.min(later) < np.max(later) < high
        assert low < 0 < high


def test_the_last_look_is_the_loss_of_the_trained_model():
    losses = make_sweep()
    found, parts = over_training(losses), decompose(losses)
    np.testing.assert_allclose(found.tax.mean[-1], parts.tax.mean, atol=1e-6)
    np.testing.assert_allclose(found.tax.low[-1], parts.tax.low, atol=1e-6)
    np.testing.assert_allclose(found.above[1].mean[-1], parts.loss_on.mean - parts.loss_on.mean[0], atol=1e-6)


def test_without_one_loop_the_fewest_are_compared_with_and_taxed():
    on, _, tax = plots.losses_over_training(make_sweep((2, 4)), figure=new_figure())
    assert "2 loops" in on.get_ylabel()
    assert [each.get_label() for each in on.lines[:-1]] == ["4 loops"]
    assert [each.get_label() for each in tax.lines[:-1]] == ["2 loops", "4 loops"]


def test_one_offset_has_no_tax_and_one_loop_nothing_to_compare():
    (only,) = plots.losses_over_training(make_sweep(offsets=(1,)), figure=new_figure())
    assert only.get_title() == "offset on"
    assert len(only.lines) == 4
    for ax in plots.losses_over_training(make_sweep((1,)), figure=new_figure()):
        assert not ax.lines
        assert "one loop count" in texts(ax) or "no tax" in texts(ax)


def test_looks_of_an_unfinished_sweep():
    figure = new_figure()
    on, off, tax = plots.losses_over_training(growing(), figure=figure)
    assert [each.get_label() for each in on.lines[:-1]] == ["2 loops", "3 loops", "4 loops"]
    assert [each.get_label() for each in off.lines[:-1]] == ["2 loops", "4 loops"]
    assert [each.get_label() for each in tax.lines[:-1]] == ["2 loops", "4 loops"]
    assert "Some models are not trained yet" in figure.get_supxlabel().replace("\n", " ")


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("draw", [plots.trained_losses, plots.losses_over_training])
def test_an_unknown_memory_is_refused(draw):
    with pytest.raises(SweepError, match="no models with memory 'own': it has first"):
        draw(make_sweep(), memory="own")


def test_parts_of_figures_are_drawn_into_and_no_global_state_changes():
    figures, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    parts = new_figure().subfigures(1, 2)
    assert list(plots.losses_over_training(make_sweep(), figure=parts[1])) == parts[1].axes
    plots.trained_losses(make_sweep(), ax=parts[0].subplots())
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_without_a_place_a_figure_is_made_in_the_style_of_a_paper():
    plt.switch_backend("agg")  # no windows where there is a display
    before = plt.get_fignums()
    try:
        narrow = [plots.measured_gain_cost(decompose(make_sweep())), plots.trained_losses(make_sweep())]
        wide = plots.losses_over_training(make_sweep())
        assert [ax.figure.get_figwidth() for ax in (*narrow, wide[0])] == [3.5, 3.5, 7.0]
    finally:
        for number in set(plt.get_fignums()) - set(before):
            plt.close(number)


SWEEPS = {
    "three seeds": make_sweep(),
    "one seed": make_sweep(seeds=1),
    "memories": make_sweep((1, 2, 4, 8), memories=("first", "own"), data="a/folder/of/texts/with/quite/a/long/name"),
    "one offset": make_sweep(offsets=(1,)),
    "unfinished": growing(),
    "two loops": make_sweep((1, 2)),
    "one loop": make_sweep((1,)),
}
LEFT_OUT = {"one offset": ALL[:1], "one loop": [ALL[0], ALL[2]]}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_figure_that_a_sweep_allows_is_written(name, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweeps, "rendered", lambda figure, form: drawn.append(figure) or form.encode())
    files = plots.draw_sweep(SWEEPS[name], tmp_path / "figures", price=0.01)
    missing = LEFT_OUT.get(name, [])
    assert sorted(plots.left_out_of_sweep(SWEEPS[name])) == sorted(missing)
    there = {f"{figure}.{form}" for figure in ALL if figure not in missing for form in ("png", "svg")}
    assert {file.name for file in files} == {file.name for file in (tmp_path / "figures").iterdir()} == there
    with matplotlib.rc_context(PAPER):
        for figure in drawn[::2]:
            assert_fits(figure)


def assert_fits(figure: Figure):
    """Everything is on the page, and no axes lie over others."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    needs, has = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert has[0] <= 7
    assert min(needs.x0, needs.y0) >= -0.01
    assert needs.x1 <= has[0] + 0.01
    assert needs.y1 <= has[1] + 0.01
    boxes = [ax.get_tightbbox(canvas.get_renderer()) for ax in figure.axes]
    assert not any(one.padded(-2).overlaps(other) for one in boxes for other in boxes if one is not other)


def test_what_is_left_out_is_said_with_what_would_bring_it():
    assert "--offset on,off" in plots.left_out_of_sweep(SWEEPS["one offset"])["measured_gain_cost"]
    assert "two loop counts" in plots.left_out_of_sweep(SWEEPS["one loop"])["losses_over_training"]


def test_files_are_the_same_bytes_again(tmp_path):
    one, two = (
        {file.name: file.read_bytes() for file in plots.draw_sweep(make_sweep((1, 2), seeds=1), tmp_path / name)}
        for name in ("one", "two")
    )
    assert one == two
    assert one["trained_losses.png"].startswith(b"\x89PNG")


def test_nothing_is_written_unless_all_can_be_drawn(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("the last figure")

    monkeypatch.setattr(sweeps, "losses_over_training", fails)
    with pytest.raises(RuntimeError, match="the last figure"):
        plots.draw_sweep(make_sweep(), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
