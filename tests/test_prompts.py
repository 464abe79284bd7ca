"""One text, token by token: where its states go, and the figures of it."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from tiny import random_trace

from loopdiag import plots
from loopdiag.measures.tokens import TokenExits
from loopdiag.measures.trajectories import trajectories
from loopdiag.plots.parts import BLUE, ORANGE
from loopdiag.plots.prompts import MOST_TOKENS, visible
from loopdiag.trace import LoopTrace

NAN = float("nan")
# "a = $b$\n": loop 1 gets "=" right, loop 2 puts it wrong and gets "$b$" right.
EXITS = TokenExits(
    loops=(0, 1, 2),
    text=("a", " =", " $b$", "\n"),
    nll=torch.tensor([[NAN, 9.0, 8.0, 7.0], [NAN, 1.0, 5.0, 2.0], [NAN, 1.5, 0.5, 2.0]]),
    top=(("", "a", " =", " $b$"), ("", " =", "x", "\n"), ("", " (", " $b$", "\n")),
)


def axes():
    return Figure(layout="constrained").subplots()


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


# ---------------------------------------------------------------- the plane


def test_the_plane_is_that_of_an_svd():
    trace = random_trace()
    found = trajectories(trace, 1)
    states = trace.normed[1:, 1, trace.mask[1]].numpy()
    flat = states.reshape(-1, states.shape[-1])
    u, s, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found.points.reshape(-1, 2)), np.abs((u * s)[:, :2]))
    np.testing.assert_allclose(found.share, (s**2 / (s**2).sum())[:2])
    assert (found.loops, found.tokens) == ((1, 2, 3), tuple(range(7)))


def test_states_that_move_in_a_plane_keep_their_distances():
    """A hand-worked path: one token goes right, the other up, far from it; the third dimension is nothing."""
    paths = torch.tensor([[[0.0, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 5, 0]], [[2, 0, 0], [0, 9, 0]]])
    found = trajectories(LoopTrace.from_states(torch.zeros(1, 2, 3), paths[:, None]))
    np.testing.assert_allclose(found.share.sum(), 1)
    flat, points = paths.reshape(-1, 3).numpy(), found.points.reshape(-1, 2)
    apart = [np.linalg.norm(x[:, None] - x, axis=-1) for x in (flat, points)]
    np.testing.assert_allclose(*apart, atol=1e-6)
    chosen = trajectories(LoopTrace.from_states(torch.zeros(1, 2, 3), paths[:, None]), tokens=[1])
    assert chosen.points.shape == (3, 1, 2)
    np.testing.assert_allclose(np.ptp(chosen.points[..., 0]), 9)


def test_the_start_is_there_when_asked_for():
    trace = random_trace()
    assert trajectories(trace, start=True).loops == (0, 1, 2, 3)
    assert trajectories(trace, start=True).points.shape == (4, 9, 2)


def test_what_spans_no_plane_is_refused():
    trace = random_trace(n_loops=1)
    with pytest.raises(ValueError, match=r"1 tokens after 1 loops .* do not span a plane"):
        trajectories(trace, tokens=[0])
    with pytest.raises(ValueError, match=r"tokens = \[9\] is not allowed: places here are 0 to 8"):
        trajectories(trace, tokens=[9])


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (" self", "·self"),
        ("\n        ", "↵·₈"),
        ("\t  x", "→··x"),
        ("", "‥"),
        ("            ", "·₁₂"),
        ("abcdefghij", "abcdefgh…"),
    ],
)
def test_white_space_is_visible(text, seen):
    assert visible(text) == seen


def test_the_logit_lens_shows_every_number_and_the_likeliest_tokens():
    ax = plots.logit_lens(EXITS, ax=axes())
    np.testing.assert_allclose(ax.collections[0].get_array(), EXITS.nll[1:, 1:])
    assert labels(ax.xaxis) == ["·=", "·$b$", "↵"]
    assert labels(ax.yaxis) == ["1", "2"]
    cells = {tuple(np.array(cell.get_position()) - 0.5): cell for cell in ax.texts}
    assert cells[1, 1].get_text() == "·$b$"
    bold = {place for place, cell in cells.items() if cell.get_fontweight() == "bold"}
    assert bold == {(0, 0), (2, 0), (1, 1), (2, 1)}
    ax.figure.canvas.draw()  # a pair of dollars is no formula
    assert labels(plots.logit_lens(EXITS, start=True, ax=axes()).yaxis) == ["0", "1", "2"]


def test_the_changes_of_a_loop_are_drawn_where_they_are():
    ax = plots.changes(EXITS, 2, ax=axes())
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [0.5, -4.5, 0.0])
    assert [to_rgb(bar.get_facecolor()) for bar in ax.patches[:2]] == [ORANGE, BLUE]
    (above,) = ax.child_axes
    assert labels(above.xaxis) == ["·= ▸ ·(", "x ▸ ·$b$"]
    assert above.get_xticks().tolist() == [0, 1]
    assert [text.get_fontweight() for text in above.get_xticklabels()] == ["normal", "bold"]
    ax.figure.canvas.draw()


def test_paths_lead_from_the_first_loop_to_the_last():
    paths = trajectories(random_trace(), tokens=[0, 2, 5])
    text = [f"t{place}" for place in range(9)]
    ax = plots.trajectories(paths, text, ax=axes())
    drawn = [line for line in ax.lines if line.get_label() != "_"]
    assert [line.get_label() for line in drawn] == ["0: t0", "2: t2", "5: t5"]
    for column, line in enumerate(drawn):
        np.testing.assert_array_equal(line.get_xydata(), paths.points[:, column])
    assert [(text.get_text(), *text.xy) for text in ax.texts] == [
        (name, *paths.points[-1, column]) for column, name in enumerate(("t0", "t2", "t5"))
    ]
    assert f"{paths.share[0]:.0%}" in ax.get_xlabel()
    with pytest.raises(ValueError, match="places of this text are 0 to 1"):
        plots.trajectories(paths, text[:2], ax=axes())


def test_no_text_stands_on_another_and_equal_tokens_share_one():
    """Planted: four tokens that end in one place, two of them equal, and come from the right; a fifth from the left."""
    ways = torch.tensor([[[3.0, 0], [3, 1], [3, 2], [3, 3], [-3, -3]], [[0, 0], [0, 0], [0, 0], [-0.1, 0], [1, 0]]])
    trace = LoopTrace.from_states(torch.zeros(1, 5, 2), ways[:, None])
    ax = plots.trajectories(trajectories(trace), ["self", "def", "name", "self", "class"], ax=axes())
    assert len({line.get_color() for line in ax.lines if line.get_label() != "_"}) == 4
    assert sorted(text.get_text() for text in ax.texts) == ["class", "def", "name", "self"]
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.fully_overlaps(other) for one, other in combinations(boxes, 2))


def test_without_axes_there_is_a_figure_with_room():
    for ax in (plots.logit_lens(EXITS), plots.changes(EXITS, 1)):
        assert ax.figure.get_size_inches()[0] > 3
    assert plots.trajectories(trajectories(random_trace()), ["x"] * 9).figure.axes
    plt.close("all")


def test_places_and_loops_that_are_not_there_are_refused():
    for draw in (plots.logit_lens, lambda exits, **kw: plots.changes(exits, 2, **kw)):
        for tokens in ([0], [4], []):
            with pytest.raises(ValueError, match="places of this text are 1 to 3"):
                draw(EXITS, tokens=tokens, ax=axes())
    for loop in (0, 3):
        with pytest.raises(ValueError, match=f"loop = {loop} is not there: it must be one of 1, 2"):
            plots.changes(EXITS, loop, ax=axes())


def test_a_long_text_shows_its_first_tokens():
    long = TokenExits((0, 1), ("x",) * 99, torch.ones(2, 99), (("x",) * 99,) * 2)
    assert len(labels(plots.logit_lens(long, ax=axes()).xaxis)) == MOST_TOKENS
