"""The page of saved results: whole, alone, the same again, and markup in data is text."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from pages import CHANGES, HOSTILE, Page, hostile, with_tokens
from synthetic import make
from test_cli import expect_refusal, run
from test_decoder import make_model
from test_plots_sweeps import make_sweep
from tiny import random_corpus, word_tokenizer

import loopdiag as ld
from loopdiag import cli
from loopdiag.diagnosis import Diagnosis, DiagnosisError, diagnose
from loopdiag.gaincost import recommend
from loopdiag.interventions import intervene
from loopdiag.measures import DEFINITIONS, GROUPS, is_by_loop
from loopdiag.plots.files import FIGURES
from loopdiag.report import page, recommendation
from loopdiag.report.inline import inline
from loopdiag.report.lenses import BESIDE, LENSES, Cell, number, rows, span
from loopdiag.report.shown import KINDS, MOST_TOKENS, kind_of_change, shown_documents
from loopdiag.scores import SCHEMA, ProbeScores

SAVED = Path(ld.__file__).parents[1] / "figures" / "saved" / "tiny-plt-4.nc"
QUICK = ("prediction", "tokens")
LARGEST = 3_000_000  # bytes


@pytest.fixture(scope="module")
def real():
    """The bundled model of four loops with what its figures need, and four documents token by token."""
    saved = Diagnosis.load(SAVED)
    shown = diagnose(ld.load("tiny-plt-4"), ld.corpus.bundled().take(16), measures=["tokens"])
    tokens = shown.data[list(GROUPS["tokens"])]
    return Diagnosis(saved.data.merge(tokens.drop_vars("loop"), combine_attrs="override"))


@pytest.fixture(scope="module")
def written(real):
    return page([real])


@pytest.fixture(scope="module")
def found(written):
    return Page(written)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, where those do not matter: drawing is what takes long."""
    monkeypatch.setattr("loopdiag.plots.pictures", lambda *args: {})
    monkeypatch.setattr("loopdiag.plots.pictures_of_sweep", lambda *args, **kwargs: {})


@pytest.fixture(scope="module")
def effects():
    model = make_model().requires_grad_(False)
    model.tokenizer = word_tokenizer()
    return intervene(model, random_corpus(), ["offset"])


@pytest.fixture(scope="module")
def probes():
    """Scores of one target and hook at loops 0 to 2, the last beyond training."""
    place, shape = ("target", "hook", "loop", "document"), (1, 1, 3, 6)
    level = np.array([0.5, 0.7, 0.9])[:, None] + np.linspace(-0.05, 0.05, 6)
    values = {
        name: (place, np.broadcast_to(level - less, shape))
        for name, less in (("score", 0), ("control", 0.4), ("floor", 0.3))
    }
    values["nll"] = (place, np.full(shape, 1.0))
    values |= {
        name: (("target", "loop", "document"), np.full((1, 3, 6), 0.25)) for name in ("baseline", "baseline_nll")
    }
    values |= {name: (place[:3], np.ones((1, 1, 3))) for name in ("C", "control_C", "floor_C")}
    names = [f"d{index}" for index in range(6)]
    coords = {"target": ["token i-1"], "hook": ["hook_out"], "loop": [0, 1, 2], "document": names}
    about = {"schema": SCHEMA, "suite": "position", "model": "tiny", "unit": "accuracy", "trained_loops": 1}
    about |= {"run_loops": 2, "documents": 6, "corpus": "made", "absent": {}}
    coords["source"] = ("document", names)
    return ProbeScores(xr.Dataset(values, coords, {"provenance": json.dumps(about)}))


# -- whole ------------------------------------------------------------------------------------------


def test_the_verdict_stands_on_top(real, found):
    """What `recommend` says, its support, price and evidence, before anything else."""
    answer = recommend(real)
    (said,) = found.text("p", class_="answer")
    assert said == f"Run it with {answer.recommended_loops} loops"
    (section,) = found.all("section", id="verdict")
    assert section == found.all("section")[0]
    told = found.texts[section]
    assert f"Picked in {100 * answer.support[3]:.0f} % of resamples" in told
    assert "at a price of 0.01 nats per token" in told
    assert "Loop 3 nets 0.088 nats per token (95 %: 0.082 to 0.095), at a price of 0.01." in told  # as README has it
    assert "Loop 4 would net 0.011" in told
    assert f"Train one like it with {answer.predicted_training_loops} loop" in told
    for lens, pick in answer.lenses.items():
        assert f"{lens} {pick}" in told
    for step in answer.break_even:
        assert f"{step.loops} loops below {step.below:.2g}" in told


def test_every_part_is_there(found):
    """Each link of the page leads to a part, and each part has a heading."""
    links = [found.elements[place][1]["href"] for place in found.all("a")]
    sections = [found.elements[place][1]["id"] for place in found.all("section")]
    assert links == [f"#{name}" for name in sections]
    assert sections == ["verdict", "gain-cost", "tokens", "lenses", "absent", "definitions", "provenance"]
    assert len(found.all("h2")) == len(sections)


def test_every_figure_is_drawn_and_named(found):
    """One SVG for each figure that the diagnosis allows, with a name for those who do not see it."""
    figures = [found.elements[place][1] for place in found.all("svg", role="img")]
    assert len(figures) == len(FIGURES)
    assert len({figure["aria-label"] for figure in figures}) == len(figures)
    assert all(figure["viewbox"].startswith("0 0 ") for figure in figures)


def test_every_measure_is_explained(real, found):
    """Each that the diagnosis holds, in the list of definitions; and on hover, where its numbers stand."""
    there = [name for name in DEFINITIONS if name in real.data]
    assert found.text("dt") == there
    for name, said in zip(there, found.text("dd"), strict=True):
        unit, state, meaning = DEFINITIONS[name]
        assert said.startswith(meaning)
        assert f"({unit}; of {state})" in said
    tips = " ".join(found.text(role="tooltip"))
    for name in (name for name in there if is_by_loop(name)):
        assert f"{name} ({DEFINITIONS[name][0]}; of" in tips, name
    terms = [found.elements[place][1] for place in found.all(class_="term")]
    assert all(term["tabindex"] == "0" for term in terms)  # reached by keys, and by tapping


def test_every_measure_by_loop_has_its_numbers(real):
    """In one lens each, at the loops where it is defined, as the summary has them; beside its reference."""
    tabled = [row for lens in LENSES for row in rows(lens, [real], 0)]
    names = [row.measure for row in tabled]
    assert sorted(names) == sorted(
        name
        for name in real.data
        if is_by_loop(name) and real.data[name].sel(loop=real.loops).notnull().any() and name not in GROUPS["tokens"]
    )
    (nll,) = (row for row in tabled if row.measure == "nll_exit")
    assert [cell.mean for cell in nll.cells] == ["4.120", "3.451", "3.363", "3.352"]  # as README has them
    assert nll.cells[2].interval == "3.263 to 3.461"
    (angle,) = (row for row in tabled if row.measure == "cos_update")
    assert angle.cells[0] is None
    assert "cos_reference" in angle.beside
    assert set(BESIDE) <= set(DEFINITIONS)


def test_the_page_is_small(written):
    assert len(written.encode()) < LARGEST


# -- alone ------------------------------------------------------------------------------------------


def assert_alone(text):
    """Nothing is loaded, nothing runs but one script, and the policy says so with the hashes of what is there."""
    found = Page(text)
    (policy,) = (
        found.elements[place][1]["content"] for place in found.all("meta", **{"http-equiv": "Content-Security-Policy"})
    )
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed.keys() == {"default-src", "style-src", "script-src", "img-src", "base-uri", "form-action"}
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    assert allowed["img-src"] == "data:"
    scripts = [place for place in found.all("script") if "type" not in found.elements[place][1]]
    for kind, places in (("script-src", scripts), ("style-src", found.all("style"))):
        (place,) = places
        digest = hashlib.sha256(found.texts[place].encode()).digest()
        assert allowed[kind] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert {found.elements[place][1].get("type") for place in found.all("script")} <= {None, "application/json"}
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert "@import" not in text
    assert not {tag for tag, _ in found.elements} & {"link", "iframe", "object", "embed", "img", "base", "form"}
    for tag, attributes in found.elements:
        assert not {"src", "srcset", "style", "action", "data"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith(("on", "xlink:"))], (tag, attributes)
        assert (attributes.get("href") or "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = {attributes["href"][1:] for _, attributes in found.elements if attributes.get("href", "").startswith("#")}
    pointed |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert pointed <= set(ids)
    return found


def test_the_page_needs_nothing_else(written):
    assert_alone(written)


def test_markup_in_data_is_text():
    """In names of models, corpora, settings and documents, in documents, predictions and reasons.

    Law: the elements are those of a page whose texts are harmless.
    """
    evil = assert_alone(page([hostile(groups=QUICK)]))
    assert HOSTILE in evil.text("h1")[0]
    assert HOSTILE in evil.text("pre")[0]
    data = json.loads(evil.text("script", type="application/json")[0])
    assert HOSTILE in data["documents"][0]["top"][1]
    assert any(HOSTILE in line for line in evil.text("tr"))
    assert evil.text("span").count(HOSTILE) == 3  # two tokens, and the document's name on its switch
    assert any(HOSTILE in line for line in evil.text("li"))
    calm = hostile(groups=QUICK)
    calm = Diagnosis(
        calm.data.assign_attrs(provenance=calm.data.attrs["provenance"].replace(json.dumps(HOSTILE)[1:-1], "calm"))
    )
    calm = with_tokens(calm, [["calm", "\n", "calm", "é", "", "end"]], ["calm"], "calm")

    def outside_figures(found):
        return [tag for tag, _ in found.elements if tag not in ("g", "path", "use", "text", "defs", "clippath", "rect")]

    assert outside_figures(evil) == outside_figures(Page(page([calm])))


def test_the_same_results_give_the_same_bytes():
    made = with_tokens(make(4, groups=QUICK))
    assert page([made]) == page([made])


# -- documents token by token -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind"),
    [(-3.0, "H"), (-1.0, "H"), (-0.99, "h"), (-0.1, "h"), (-0.09, ""), (0.0, ""), (0.1, "b"), (1.0, "B"), (np.nan, "")],
)
def test_kinds_of_change(change, kind):
    """Hand-worked: less NLL is help, from a tenth of a nat on, and from one nat on much."""
    assert kind_of_change(change) == kind
    assert kind in KINDS


def test_tokens_are_marked_by_what_each_loop_changed():
    """Hand-worked, from the changes at loop 2 that were planted, undone at loop 3."""
    (document,) = shown_documents(with_tokens(make(4, groups=QUICK)))
    marks = [token.classes.split() for token in document.tokens]
    assert CHANGES == (0.0, -5.0, -0.5, 0.5, 2.0, 0.05)
    assert marks == [[], ["H1", "H2", "B3"], ["H1", "h2", "b3"], ["H1", "b2", "h3"], ["H1", "B2", "H3"], ["H1"]]
    assert document.shares[2] == {"H": 0.2, "h": 0.2, "": 0.2, "b": 0.2, "B": 0.2}
    assert document.shares[4][""] == 1.0
    assert document.data["nll"][0] == [None, 9.0, 9.0, 9.0, 9.0, 9.0]
    assert document.data["nll"][2] == [None, 1.0, 5.5, 6.5, 8.0, 6.05]


@pytest.mark.parametrize(
    ("after", "told", "kind"),
    [(6.0951, 6.1, "b2"), (6.0949, 6.09, ""), (5.0049, 5.0, "H2"), (5.0051, 5.01, "h2"), (5.9051, 5.91, "")],
)
def test_a_mark_is_that_of_the_change_that_is_told(after, told, kind):
    """Hand-worked: from 6 nats, to one side or the other of where the second digit would cross a tenth or one nat."""
    made = with_tokens(make(2, groups=QUICK))
    made.data["token_nll"][0, 2, 3] = after
    (document,) = shown_documents(made)
    assert document.data["nll"][2][3] == told
    assert document.tokens[3].classes.split()[1:] == ([kind] if kind else [])


def test_the_text_is_the_document(real, found):
    """Put together, the tokens that are shown are those of the document; the first of them is not marked."""
    documents = shown_documents(real)
    assert len(documents) == 4
    for text, document, place in zip(found.text("pre"), documents, range(4), strict=True):
        expected = "".join(real.data["token_text"].isel(shown=place).values.tolist())
        assert text == expected
        assert document.tokens[0].classes == ""
        for share in document.shares.values():
            assert sum(share.values()) == pytest.approx(1)


def test_long_documents_are_cut_and_said_to_be(undrawn):
    made = with_tokens(make(2, groups=QUICK), [["word "] * (MOST_TOKENS + 7), ["short "] * 3], ["long", "short"])
    long, short = shown_documents(made)
    assert (len(long.tokens), long.left_out) == (MOST_TOKENS, 7)
    assert (len(short.tokens), short.left_out) == (3, 0)
    assert "7 more tokens are in the file" in page([made])


# -- what is not there ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"groups": ("motion",)}, ["No answer", "the group prediction was not asked for", "diagnose with --measures"]),
        ({"groups": ("prediction",)}, ["No document was kept token by token", "--measures default,tokens"]),
        ({"groups": QUICK, "n_loops": 1}, ["Run it with 1 loop", "1 loop at any price", "no prediction"]),
        ({"groups": QUICK, "n_loops": 6, "trained": 4}, ["beyond its training", "*: beyond training"]),
        ({"groups": QUICK, "n_loops": 8, "at": [1, 2, 4, 8]}, ["Some loops were measured", "Loops 3 to 4 would net"]),
    ],
)
def test_what_is_absent_is_said_with_how_to_get_it(form, said, undrawn):
    """A diagnosis of one group, one loop, more loops than trained or some of them gives a page that stands alone."""
    made = make(**form)
    found = assert_alone(page([made]))
    told = " ".join(" ".join(found.texts[found.all("main")[0]].split()).split())
    for each in said:
        assert each in told


def test_data_that_cannot_tell(undrawn):
    """No count in large print: the reason, and what the rule would pick."""
    made = make(4, groups=("prediction",), documents=4, spread=0.3)
    assert recommend(made).recommended_loops is None
    found = Page(page([made]))
    assert found.text("p", class_="answer") == ["The data cannot tell"]
    assert "fewer than 5 sources" in found.texts[found.all("section", id="verdict")[0]]
    assert not found.all("tr", class_="picked")


def test_an_nll_that_is_not_finite(undrawn):
    broken = make(4, groups=("prediction",))
    broken.data["nll_exit"][0, 2] = np.nan
    assert recommendation(broken) is None
    assert "the exit NLL of a loop is not finite" in page([broken])


def test_a_model_that_is_not_ours(undrawn):
    """Without a configuration, a dtype and a hash."""
    made = make(2, groups=QUICK)
    about = made.provenance | dict.fromkeys(("config", "dtype", "device", "weights_sha256"))
    found = assert_alone(page([Diagnosis(made.data.assign_attrs(provenance=json.dumps(about)))]))
    assert "dtypenull" in [line.strip() for line in found.text("tr")]


def test_what_rounding_makes_is_marked(undrawn):
    made = make(4, groups=("prediction", "motion", "noise"))
    made.data["step_size"].loc[{"loop": 4}] = 1e-9
    (row,) = (row for lens in LENSES for row in rows(lens, [made], 0) if row.measure == "step_size")
    assert [cell.in_noise for cell in row.cells] == [False, False, False, True]
    assert "not above twice what rounding alone makes" in page([made])


# -- several results --------------------------------------------------------------------------------


def test_models_stand_side_by_side(undrawn):
    """One table, a verdict each, and a name that tells them apart; another corpus is mentioned."""
    one, other = make(4, groups=QUICK, model="one"), with_tokens(make(2, groups=QUICK, model="other", seed=1))
    about = other.provenance | {"corpus_sha256": "1" * 64}
    other = Diagnosis(other.data.assign_attrs(provenance=json.dumps(about)))
    found = assert_alone(page([one, other]))
    assert found.text("h1") == ["one, other"]
    assert len(found.all("p", class_="answer")) == 2
    table = found.text("table", class_="numbers")[0]
    assert "one" in table
    assert "other" in table
    assert "Mind that the diagnoses are of different documents" in found.text("p", class_="caveat")[0]
    assert len(found.all("div", class_="tokens")) == 1
    with pytest.raises(DiagnosisError, match="give each once"):
        page([one, one])


def test_many_models_do_not_fill_the_heading(undrawn):
    made = [make(2, groups=("motion",), model=f"model {index}") for index in range(5)]
    assert Page(page(made)).text("h1") == ["5 models"]


def test_interventions_and_sweeps(effects):
    """Without a diagnosis: each effect with its interval, each wiring with its answer; nothing at all is refused."""
    found = assert_alone(page(effects=[effects], sweeps=[make_sweep()]))
    told = found.texts[found.all("section", id="interventions")[0]]
    for row in effects.table():
        assert row.change in told
        assert f"{row.effect:z.3f}{row.low:z.3f} to {row.high:z.3f}" in told
    assert "not what training without it would give" in told
    sweep = found.texts[found.all("section", id="sweeps")[0]]
    assert len(found.text("p", class_="answer")) == 2  # offset on and off
    assert "offset 1, memory first" in sweep
    assert len(found.all("svg", role="img")) == 3
    assert not found.all("section", id="verdict")
    with pytest.raises(ValueError, match="nothing to show"):
        page()


def test_probes(probes):
    """Hand-worked: each score beside its control, what remains over it, and random weights."""
    found = assert_alone(page(probes=[probes]))
    rows_told = found.text("tr")
    assert len(rows_told) >= 4
    row = probes.table()[2]
    ends = f"{row.score_low:z.3f} to {row.score_high:z.3f}"
    assert f"token i-1hook_out2*0.900{ends}0.5000.4000.400 to 0.4000.600" in rows_told
    assert len(found.all("svg", role="img")) == 1
    assert found.text("h1") == ["tiny"]


def test_an_effect_is_drawn_where_it_is(effects, undrawn):
    """Marks lie between the ends of their intervals and within the picture."""
    found = Page(page(effects=[effects]))
    lines = [found.elements[place][1] for place in found.all("line")]
    for _, span_of, mean in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        assert 0 <= float(span_of["x1"]) <= float(mean["x1"]) <= float(span_of["x2"]) <= 100


# -- parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0.000"), (1.23456, "1.235"), (-23.456, "-23.46"), (123.456, "123.5"), (1.5e-5, "1.5e-05"), (np.nan, "-")],
)
def test_numbers_of_any_size(value, said):
    assert number(value) == said


def test_an_interval_that_is_not_there_is_not_written():
    assert span(0.1, 0.2) == "0.100 to 0.200"
    assert span(np.nan, np.nan) == ""
    assert Cell("1").interval == ""


def test_a_figure_inside_a_page():
    """Hand-worked: styles become attributes, ids and what points at them have the prefix, metadata go."""
    svg = b"""<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
      width="10pt" height="20pt" viewBox="0 0 10 20"><metadata>when</metadata><defs><style>*{}</style>
      <path id="m" d="M 0 0
      L 1 1"/></defs><g clip-path="url(#p)"><use xlink:href="#m" style="fill: #fff; stroke: none"/></g>
      <clipPath id="p"/><text style="font-size: 8px; font-family: 'A', serif">a &lt;b&gt;</text></svg>"""
    assert inline(svg, "f", 'A "name"') == (
        '<svg viewBox="0 0 10 20" width="10" height="20" role="img" aria-label="A &quot;name&quot;" class="narrow">'
        '<defs><path id="f-m" d="M 0 0 L 1 1" /></defs><g clip-path="url(#f-p)"><use fill="#fff" stroke="none" '
        'href="#f-m" /></g><clipPath id="f-p" /><text font-size="8px">a &lt;b&gt;</text></svg>'
    )


# -- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, effects, probes):
    """Saved results of every kind."""
    folder = tmp_path_factory.mktemp("results")
    with_tokens(make(2, groups=QUICK)).save(folder / "diagnosis.nc")
    make(2, groups=("motion",)).save(folder / "motion.nc")
    effects.save(folder / "effects.nc")
    (folder / "swept").mkdir()
    make_sweep().save(folder / "swept" / "sweep.nc")
    probes.save(folder / "probes.nc")
    (folder / "text.nc").write_text("no result")
    return folder


def test_the_command_tells_results_apart_by_what_they_hold(files, tmp_path, undrawn):
    """Whatever their names; a sweep also by its folder. Only the file's name goes to stdout."""
    out = tmp_path / "page.html"
    saved = [files / "diagnosis.nc", files / "probes.nc", files / "effects.nc", files / "swept"]
    result = run("report", *saved, "-o", out, "--price", "0.2")
    assert (result.exit_code, result.stdout.strip()) == (cli.Exit.ANSWERED, str(out))
    found = Page(out.read_text(encoding="utf-8"))
    sections = {found.elements[place][1]["id"] for place in found.all("section")}
    assert {"verdict", "interventions", "sweeps", "probes"} <= sections
    assert "at a price of 0.2 nats" in found.texts[found.all("section", id="verdict")[0]]
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_says_what_it_replaces_and_what_it_lacks(files, tmp_path, undrawn):
    out = tmp_path / "page.html"
    out.write_text("old")
    result = run("report", files / "motion.nc", "-o", out)
    assert "is there and will be replaced" in result.stderr
    assert "no document is shown token by token: diagnose with --measures default,tokens" in result.stderr
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run("report", files / "motion.nc", "-o", out, "--quiet").stderr == ""


def test_the_command_refuses_before_any_work(files, tmp_path):
    """Wrong files, wrong places and a wrong price; nothing is written, and what is read stays."""
    one = files / "diagnosis.nc"
    before = one.read_bytes()
    for arguments, said in (
        ([tmp_path / "none.nc"], "is no file: give what `--save` wrote, or the folder of a sweep"),
        ([files / "text.nc"], "holds nothing that says what it is: a report shows what `loopdiag diagnose --save`"),
        ([one, one], "is given twice"),
        ([one, "--out", one], "is read, so the page cannot go there"),
        ([files / "swept", "--out", files / "swept" / "sweep.nc"], "is read, so the page cannot go there"),
        ([one, "--out", tmp_path], "is a folder: give the name of a file"),
        ([one, "--out", tmp_path / "no" / "page.html"], "cannot be written"),
        ([one, "--price", "-1"], "--price -1.0 is out of range"),
    ):
        out = () if "--out" in arguments else ("--out", tmp_path / "page.html")
        expect_refusal(run("report", *arguments, *out), said)
    assert not list(tmp_path.iterdir())
    assert one.read_bytes() == before


def test_a_page_that_fails_leaves_the_old_one(files, tmp_path, monkeypatch):
    """Written whole or not at all."""
    out = tmp_path / "page.html"
    out.write_text("old")
    monkeypatch.setattr("loopdiag.report.page", lambda *args, **kwargs: 1 / 0)
    assert run("report", files / "diagnosis.nc", "-o", out).exit_code == cli.Exit.FAILED
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
