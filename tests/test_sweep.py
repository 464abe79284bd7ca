"""A sweep's models differ in the factor named alone, and `sweep.nc` says what the saved models lose."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import HELD_OUT, SHORT, STREAM, TINY
from tiny import word_tokenizer, words

import loopdiag as ld
from loopdiag.errors import InputError
from loopdiag.gaincost import recommend_training
from loopdiag.losses import SweepError, SweepLosses
from loopdiag.model import LoopedLM
from loopdiag.sweep import planning, running, tasks
from loopdiag.sweep.grid import SEARCH_SEED, Cell, Grid
from loopdiag.sweep.text import prepare
from loopdiag.sweep.training import LoopedTrainer, train

SEQUENCE, BATCH = 32, 4
SMALL = replace(TINY, n_ctx=SEQUENCE, n_loops=1)
TOKENS = 3 * SEQUENCE * BATCH
RATES = (1e-3, 1e-2)
SETTINGS = {"tokens": TOKENS, "size": SMALL, "rates": RATES, "search_tokens": SEQUENCE * BATCH, "batch_size": BATCH}
SETTINGS |= {"bf16": False}
FACTORS = ("n_loops", "offset", "memory")


def texts(folder: Path, files: int = 24) -> Path:
    """A folder of small sources, none of which is like another; the last ones are shorter than a sequence."""
    chosen = random.Random(0)
    folder.mkdir()
    for number in range(files):
        lines = [f"{chosen.choice('abcdef')}{number} = {chosen.randrange(1000)}" for _ in range(12)]
        (folder / f"file{number}.py").write_text("\n".join(lines[: 3 if number >= files - 2 else 12]) + "\n")
    return folder


def swept(data: str | Path, folder: Path, grid: Grid, progress=None, **changed) -> SweepLosses:
    """A sweep as the command line runs it."""
    plan = planning.plan(str(data), folder, grid, **SETTINGS | changed)
    return running.sweep(plan, grid, folder, progress)


@pytest.fixture
def trained(monkeypatch):
    """(configuration, recipe) of every training run from here on."""
    runs = []

    def noted(cfg, recipe, *arguments, **keywords):
        runs.append((cfg, recipe))
        return train(cfg, recipe, *arguments, **keywords)

    monkeypatch.setattr(running, "train", noted)
    return runs


def no_training(monkeypatch) -> None:
    monkeypatch.setattr(running, "train", lambda *_, **__: pytest.fail("trained again"))


# -- the grid ------------------------------------------------------------------------------------------


def test_one_loop_is_one_model_of_a_seed():
    """Seed by seed, the longest first, every place once, and one loop once for all offsets and memories."""
    grid = Grid(loops=(1, 2, 4), offsets=(1, 0), memories=("first", "own"), seeds=(0, 3))
    cells = grid.cells()
    assert len(cells) == len(set(cells)) == 2 * (2 * 2 * 2 + 1)
    assert [cell.seed for cell in cells] == [0] * 9 + [3] * 9
    assert [cell.n_loops for cell in cells[:9]] == [4] * 4 + [2] * 4 + [1]
    assert {grid.cell(0, memory, offset, 1) for memory in grid.memories for offset in grid.offsets} == {cells[8]}
    assert {(cell.offset, cell.memory) for cell in cells[:4]} == {(1, "first"), (0, "first"), (1, "own"), (0, "own")}
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.seed for cell in grid.cells([SEARCH_SEED])] == [SEARCH_SEED] * 9


def test_one_loop_stays_when_a_grid_is_extended():
    """It is the same model, under the same name, in every grid."""
    grids = [Grid((1,)), Grid((1, 2), offsets=(0,)), Grid((1, 2), memories=("own",)), Grid((1, 3), (1, 0))]
    assert {grid.cells()[-1].name for grid in grids} == {"loops1-offset1-first-seed0"}


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"loops": ()}, r"loops = \(\) is not allowed: give different integers, each 1 or more"),
        ({"loops": (0, 1)}, "loops = .* each 1 or more"),
        ({"loops": (2, 2)}, "loops = .* different integers"),
        ({"loops": (2, 1)}, "give loop counts that rise"),
        ({"offsets": ()}, "offsets = .* each 0 or more"),
        ({"offsets": (-1,)}, "offsets = .* each 0 or more"),
        ({"memories": ()}, "give one or both of first, own"),
        ({"memories": ("own", "own")}, "give one or both of first, own"),
        ({"memories": ("none",)}, "give one or both of first, own"),
        ({"seeds": (0, 0)}, "seeds = .* different integers"),
        ({"seeds": ()}, "seeds = "),
    ],
)
def test_factors_that_make_no_grid(factors, said):
    """Empty, repeated or impossible values are refused."""
    with pytest.raises(InputError, match=said):
        Grid(**{"loops": (1, 2)} | factors)


def test_a_cell_is_its_configuration():
    """Nothing but the factors is changed."""
    cell = Cell(seed=5, n_loops=3, offset=0, memory="own")
    assert cell.config(SMALL) == replace(SMALL, n_loops=3, offset=0, memory="own")


# -- models that differ in one factor ------------------------------------------------------------------


@pytest.fixture(scope="module")
def matched(tmp_path_factory):
    """Every wiring at one loop and at two, one at four: first weights, batches, last weights, losses on the way."""
    folder, found = tmp_path_factory.mktemp("matched"), {}
    step = LoopedTrainer.training_step
    # Seen more than once, so that the order of a second round counts, too.
    recipe = replace(SHORT, tokens=16 * 4 * 6)
    with pytest.MonkeyPatch.context() as patch:
        for key in (*product((1, 2), (1, 0), ("first", "own")), (4, 1, "first")):
            first, seen = {}, []

            def spy(self, model, inputs, *rest, first=first, seen=seen):
                if not seen:
                    first |= {name: weight.detach().clone() for name, weight in model.state_dict().items()}
                seen.append(inputs["input_ids"].clone())
                return step(self, model, inputs, *rest)

            patch.setattr(LoopedTrainer, "training_step", spy)
            cfg, place = replace(TINY, **dict(zip(FACTORS, key, strict=True))), folder / "-".join(map(str, key))
            model = train(cfg, recipe, STREAM[: 16 * 4 * 4], HELD_OUT, place)
            log = json.loads((place / "log.json").read_text())
            looks = [entry["eval_nll"] for entry in log if "eval_nll" in entry]
            found[key] = (first, torch.stack(seen), model.state_dict(), looks)
    return found


def assert_shared_weights(ours, theirs):
    shared = ours.keys() & theirs.keys()
    assert "embed.weight" in shared
    assert all("gate" in name for name in ours.keys() ^ theirs.keys())
    for name in shared:
        assert torch.equal(ours[name], theirs[name]), name


def test_models_of_a_seed_start_from_the_same_weights(matched):
    """Over loop counts, offsets and memories."""
    first = matched[1, 1, "first"][0]
    for start, *_ in matched.values():
        assert_shared_weights(start, first)


def test_models_of_a_seed_see_the_same_batches(matched):
    """In the same order, in a second round too, which has an order of its own."""
    batches = matched[1, 1, "first"][1]
    assert batches.shape == (6, 4, 16)
    assert batches[:4].flatten(0, 1).tolist() != STREAM[: 16 * 4 * 4].reshape(16, 16).tolist()
    assert sorted(batches[:4].flatten(0, 1).tolist()) == sorted(STREAM[: 16 * 4 * 4].reshape(16, 16).tolist())
    for _, seen, *_ in matched.values():
        assert torch.equal(seen, batches)


def test_with_one_loop_nothing_is_shifted_or_shared(matched):
    """A law: offset and memory change no bit of a model with one loop, so that one training stands for all."""
    _, _, weights, looks = matched[1, 1, "first"]
    for offset, memory in ((0, "first"), (1, "own"), (0, "own")):
        _, _, others, other_looks = matched[1, offset, memory]
        assert other_looks == looks
        assert_shared_weights(others, weights)


def test_with_more_loops_each_factor_counts(matched):
    """What the law of one loop says is no accident of a factor that nothing reads."""
    looks = [matched[2, offset, memory][3][-1] for offset in (1, 0) for memory in ("first", "own")]
    assert len({tuple(row) for row in looks}) == 4


# -- what a sweep writes -------------------------------------------------------------------------------

GRID = Grid(loops=(1, 2, 3), seeds=(0, 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of text files: its folder, data, losses, plan and what its progress was told."""
    base, told = tmp_path_factory.mktemp("finished"), []
    data = texts(base / "texts")
    losses = swept(data, base / "out", GRID, lambda *said: told.append(said))
    return base / "out", data, losses, planning.plan(str(data), base / "out", GRID, **SETTINGS), told


def copied(finished, folder: Path) -> tuple[Path, Path]:
    """The finished sweep to go on with, and its data."""
    return shutil.copytree(finished[0], folder / "out"), finished[1]


def held_out_losses(model, texts, longest: int) -> list[np.ndarray]:
    """Each document by itself, by the model's plain call: nats of its tokens from the second on."""
    found = []
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"][:longest]])
        log_p = torch.log_softmax(model(ids)[0, :-1].double(), -1)
        found.append(-log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]].numpy())
    return found


def split_mean(changes, sign: int) -> list[float]:
    return [np.maximum(sign * change, 0).mean() for change in changes]


def test_every_place_is_what_its_saved_model_loses(finished):
    """NLL, and what tokens gain and lose, against the saved models read back and run on one document at a time."""
    folder, _, losses, plan, _ = finished
    data = SweepLosses.load(folder / running.RESULT).data
    assert data.identical(losses.data.assign_attrs(data.attrs))
    assert dict(data["nll"].sizes) == {"seed": 2, "memory": 1, "offset": 2, "loops": 3, "document": 8}
    assert np.isfinite(data["nll"]).all()
    report = plan.text.corpus.report
    assert data["document"].values.tolist() == [document.name for document in report]
    assert data["source"].values.tolist() == [document.source for document in report]
    texts = [document.text for document in report]
    for seed in GRID.seeds:
        token = {
            (offset, n): held_out_losses(
                ld.load(folder / "models" / GRID.cell(seed, "first", offset, n).name), texts, SEQUENCE
            )
            for offset in (1, 0)
            for n in GRID.loops
        }
        for (offset, n), rows in token.items():
            at = data.sel(seed=seed, memory="first", offset=offset, loops=n)
            np.testing.assert_allclose(at["nll"], [row.mean() for row in rows], rtol=1e-5)
            for name, others in (("loop", token.get((offset, n - 1))), ("offset", token[0, n])):
                if others is None:
                    assert at[f"{name}_helped"].isnull().all()
                    assert at[f"{name}_harmed"].isnull().all()
                    continue
                changes = [row - other for row, other in zip(rows, others, strict=True)]
                np.testing.assert_allclose(at[f"{name}_helped"], split_mean(changes, -1), atol=2e-6)
                np.testing.assert_allclose(at[f"{name}_harmed"], split_mean(changes, 1), atol=2e-6)
    lengths = {len(row) for row in rows}
    assert max(lengths) == SEQUENCE - 1


def test_what_is_gained_and_lost_adds_up(finished):
    """helped - harmed is the difference of the losses, from one loop to the next and from no offset to one."""
    data = finished[2].data
    by_loop = data["nll"].diff("loops")
    np.testing.assert_allclose(
        (data["loop_harmed"] - data["loop_helped"]).isel(loops=slice(1, None)), by_loop, atol=1e-6
    )
    by_offset = data["nll"] - data["nll"].sel(offset=0)
    np.testing.assert_allclose(data["offset_harmed"] - data["offset_helped"], by_offset, atol=1e-6)
    assert (data["offset_harmed"].sel(offset=0) == 0).all()
    assert (data["offset_harmed"].sel(loops=1) == 0).all()
    assert (data["offset_harmed"].sel(offset=1, loops=3) > 0).any()


def test_looks_on_the_way_end_at_the_loss(finished):
    """After each batch of three; the last one is `nll`."""
    data = finished[2].data
    assert data["look"].values.tolist() == [SEQUENCE * BATCH * step for step in (1, 2, 3)]
    np.testing.assert_allclose(data["nll_look"].isel(look=-1), data["nll"], rtol=1e-6)
    first = data["nll_look"].isel(look=0)
    assert (first.mean("document") > data["nll"].mean("document")).all()


def test_looks_are_at_even_distances_and_at_the_end(tmp_path):
    """Ten, of trainings of more batches, and one at the end where they do not come out even."""
    data = texts(tmp_path / "texts", 40)
    settings = {"tokens": 25 * 16 * 2 + 5, "size": replace(SMALL, n_ctx=16), "rates": (1e-2,), "batch_size": 2}
    found = swept(data, tmp_path / "out", Grid((1,)), **settings).data
    assert found["look"].values.tolist() == [32 * step for step in (*range(2, 25, 2), 25)]
    np.testing.assert_allclose(found["nll_look"].isel(look=-1), found["nll"], rtol=1e-6)
    assert "search_nll" not in found
    assert found["learning_rate"].values.tolist() == [1e-2]


def test_all_loop_counts_share_the_rate_of_least_loss(finished):
    """Least mean over loop counts and offsets of the searches, on the documents to choose on; of no measured seed."""
    folder, _, losses, plan, _ = finished
    data = losses.data
    assert data["rate"].values.tolist() == list(RATES)
    assert dict(data["search_nll"].sizes) == {"memory": 1, "offset": 2, "loops": 3, "rate": 2}
    by_rate = data["search_nll"].mean(("memory", "offset"))
    best = float(data["rate"][by_rate.mean("loops").argmin("rate")])
    assert float((by_rate.sel(rate=best) - by_rate.min("rate")).max()) < running.RATE_MARGIN
    assert data["learning_rate"].values.tolist() == [best] * 3
    told = json.loads((folder / "rates.json").read_text())
    assert told == {"common": best, "loops": dict.fromkeys("123", best)}
    assert SEARCH_SEED not in data["seed"]
    # A search trained again by hand.
    recipe = replace(plan.recipe, tokens=SEQUENCE * BATCH, seed=SEARCH_SEED, learning_rate=RATES[0])
    model = train(
        replace(SMALL, vocab_size=2048, n_loops=2, offset=0), recipe, plan.text.stream, HELD_OUT, folder / "again"
    )
    shutil.rmtree(folder / "again")
    model.requires_grad_(False).tokenizer = plan.text.tokenizer
    fit = held_out_losses(model, [document.text for document in plan.text.corpus.fit], SEQUENCE)
    there = [row.mean() for row in fit if len(row) + 1 >= 16]
    assert float(data["search_nll"].sel(memory="first", offset=0, loops=2, rate=RATES[0])) == pytest.approx(
        np.mean(there), rel=1e-5
    )


@pytest.mark.parametrize(("wins_by", "own"), [(0.049, False), (0.051, True)])
def test_a_rate_of_its_own_has_to_win_clearly(tmp_path, monkeypatch, wins_by, own):
    """By more than what seeds differ by; one loop, at which the other rate is far better, decides for all."""
    grid = Grid((1, 2), offsets=(1,))
    plan = planning.plan(str(texts(tmp_path / "texts")), tmp_path / "out", grid, **SETTINGS)
    run = running._Run(plan, grid, tmp_path / "out", None)
    low, high = RATES
    nll = {1: {low: 3.0, high: 4.0}, 2: {low: 3.0, high: 3.0 - wins_by}}

    def work(what, jobs, do):
        for job in jobs:
            found = {"nll_fit": nll[job.cell.n_loops][job.recipe.learning_rate]}
            job.done.write_text(json.dumps(found))

    monkeypatch.setattr(run, "work", work)
    assert run.choose_rates() == {1: low, 2: high if own else low}


def test_a_rate_that_diverges_is_not_chosen(tmp_path, monkeypatch):
    """Its loss is no number, whichever rate it is."""
    plan = planning.plan(str(texts(tmp_path / "texts")), tmp_path / "out", Grid((2,)), **SETTINGS)
    run = running._Run(plan, Grid((2,)), tmp_path / "out", None)
    for bad in RATES:

        def work(what, jobs, finish, bad=bad):
            for job in jobs:
                found = {"nll_fit": float("nan") if job.recipe.learning_rate == bad else 1.0}
                job.done.write_text(json.dumps(found))

        monkeypatch.setattr(run, "work", work)
        assert run.choose_rates() == {2: next(rate for rate in RATES if rate != bad)}
        (tmp_path / "out" / "rates.json").unlink()


def test_the_folder_says_what_it_is(finished):
    """Settings, seeds, rates and weights in the provenance; checkpoints of finished models are gone."""
    folder, data, losses, _, told = finished
    about = losses.provenance
    assert about["data"] == data.name
    assert about["recipe"]["tokens"] == TOKENS
    assert about["config"]["d_model"] == 16
    assert sorted(about["models"]) == sorted(cell.name for cell in GRID.cells())
    assert data.name in repr(losses)
    assert "12 of 12 places measured" in repr(losses)
    assert not list((folder / "runs").iterdir())
    assert {said[0] for said in told} >= {"learning rates", "models", *(cell.name for cell in GRID.cells())}
    assert all(0 <= done <= of for _, done, of in told)
    assert told[-1] == ("models", 10, 10)


def test_costs_are_those_of_the_configurations(finished):
    """FLOPs rise with the loop count, and nothing that an offset moves costs one."""
    data = finished[2].data
    assert (data["flops"].diff("loops") > 0).all()
    assert (data["flops"].sel(offset=1) == data["flops"].sel(offset=0)).all()


def test_a_task_is_swept(tmp_path):
    """Its own tokenizer and rows; unchanged numbers when the same is asked again."""
    grid = Grid((1, 2), offsets=(1,), memories=("first", "own"))
    row = tasks.TASKS["addition"].sequence
    settings = {"tokens": 2 * row * 4, "rates": (1e-2,), "size": replace(SMALL, n_ctx=16)}
    losses = swept("addition", tmp_path / "out", grid, **settings)
    data = losses.data
    assert dict(data["nll"].sizes) == {"seed": 1, "memory": 2, "offset": 1, "loops": 2, "document": 256}
    assert losses.provenance["recipe"]["sequence"] == losses.provenance["config"]["n_ctx"] == row
    assert losses.provenance["config"]["vocab_size"] == len(tasks.TASKS["addition"].words)
    texts = [document.text for document in tasks.corpus(tasks.TASKS["addition"]).report]
    for memory in grid.memories:
        model = ld.load(tmp_path / "out" / "models" / grid.cell(0, memory, 1, 2).name)
        expected = [row.mean() for row in held_out_losses(model, texts, row)]
        np.testing.assert_allclose(data["nll"].sel(seed=0, memory=memory, offset=1, loops=2), expected, rtol=1e-5)
    assert (data["nll"].sel(memory="own", loops=1) == data["nll"].sel(memory="first", loops=1)).all()
    # No model is without offset.
    assert data["offset_helped"].isnull().all()


def test_finished_models_are_diagnosed(tmp_path):
    """Each that `--diagnose` asks for, as what it is called."""
    data = texts(tmp_path / "texts")
    swept(data, tmp_path / "out", Grid((2,), offsets=(0,)), rates=(1e-2,), measures=("prediction",))
    (file,) = (tmp_path / "out" / "diagnoses").glob("*.nc")
    diagnosis = ld.Diagnosis.load(file)
    assert file.stem == "loops2-offset0-first-seed0"
    measured = SweepLosses.load(tmp_path / "out" / "sweep.nc").data["nll"].sel(loops=2).squeeze()
    np.testing.assert_allclose(diagnosis.data["nll_exit"].sel(loop=2), measured, rtol=1e-5)
    # Also models that were finished without.
    file.unlink()
    swept(data, tmp_path / "out", Grid((2,), offsets=(0,)), rates=(1e-2,), measures=("prediction",))
    again = ld.Diagnosis.load(file)
    assert again.provenance["model"] == diagnosis.provenance["model"]
    np.testing.assert_allclose(again.data["nll_exit"], diagnosis.data["nll_exit"], rtol=1e-5)


# -- going on ------------------------------------------------------------------------------------------


def test_finished_models_are_not_trained_again(finished, tmp_path, monkeypatch):
    """Nor are searches; the same numbers come out, also of a part of the grid."""
    folder, data = copied(finished, tmp_path)
    no_training(monkeypatch)
    assert swept(data, folder, GRID).data.equals(finished[2].data)
    assert swept(data, folder, Grid((2,))).data.equals(finished[2].data)


def test_a_missing_result_is_gathered_again(finished, tmp_path, monkeypatch):
    """As after a kill between the last model and the result; what a killed process left of a run goes away."""
    folder, data = copied(finished, tmp_path)
    (folder / running.RESULT).unlink()
    left = folder / "runs" / GRID.cells()[0].name / "checkpoint-4"
    left.mkdir(parents=True)
    no_training(monkeypatch)
    assert swept(data, folder, GRID).data.equals(finished[2].data)
    assert not left.parent.exists()


def test_only_what_an_extension_adds_is_trained(finished, tmp_path, trained):
    """More seeds and another memory: new models alone, at the rates that were chosen before, and no search."""
    folder, data = copied(finished, tmp_path)
    rates = (folder / "rates.json").read_text()
    grid = Grid((1, 2), memories=("first", "own"), seeds=(0, 2))
    plan = planning.plan(str(data), folder, grid, **SETTINGS)
    new = [cell for cell in grid.cells() if cell not in GRID.cells()]
    assert planning.waiting(plan, grid, folder) == dict.fromkeys(new, TOKENS)
    losses = running.sweep(plan, grid, folder).data
    assert {(cfg, recipe.seed) for cfg, recipe in trained} == {(cell.config(plan.base), cell.seed) for cell in new}
    assert len(trained) == len(new) == 2 + 5
    assert (folder / "rates.json").read_text() == rates
    for cfg, recipe in trained:
        assert recipe.learning_rate == json.loads(rates)["loops"][str(cfg.n_loops)]
    assert np.isfinite(losses["nll"].sel(seed=[0, 2], loops=[1, 2])).all()
    assert losses["nll"].sel(memory="own", loops=3).isnull().all()
    assert losses["nll"].sel(seed=[0, 1], memory=["first"]).equals(finished[2].data["nll"])
    # Searches were of the first memory, and of one loop, which has none.
    searched = losses["search_nll"].sel(memory="own")
    assert searched.sel(loops=[2, 3]).isnull().all()
    assert searched.sel(loops=1).notnull().all()


def test_an_offset_can_be_added(tmp_path, trained):
    """The model with one loop of a sweep without offset is that of one with both."""
    data, settings = texts(tmp_path / "texts"), {"rates": (1e-2,)}
    without = swept(data, tmp_path / "out", Grid((1, 2), offsets=(0,)), **settings)
    assert without.data["offset"].values.tolist() == [0]
    assert np.isfinite(without.data["nll"]).all()
    del trained[:]
    both = swept(data, tmp_path / "out", Grid((1, 2)), **settings)
    assert [(cfg.n_loops, cfg.offset) for cfg, _ in trained] == [(2, 1)]
    assert both.data["nll"].sel(offset=[0]).equals(without.data["nll"])


def test_new_loop_counts_have_a_search_of_their_own(tmp_path, trained):
    """Those that were chosen stay, even where a search would now choose otherwise."""
    data, folder = texts(tmp_path / "texts"), tmp_path / "out"
    one = Grid((1,), offsets=(0,))
    swept(data, folder, one)
    chosen = json.loads((folder / "rates.json").read_text())["common"]
    other = next(rate for rate in RATES if rate != chosen)
    (folder / "rates.json").write_text(json.dumps({"common": other, "loops": {"1": other}}))
    del trained[:]
    grid = Grid((1, 2), offsets=(0,))
    plan = planning.plan(str(data), folder, grid, **SETTINGS)
    waits = planning.waiting(plan, grid, folder)
    assert {cell.seed: count for cell, count in waits.items()} == {0: TOKENS, SEARCH_SEED: 2 * SEQUENCE * BATCH}
    losses = running.sweep(plan, grid, folder)
    assert {cfg.n_loops for cfg, _ in trained} == {2}
    assert len(trained) == len(RATES) + 1
    assert json.loads((folder / "rates.json").read_text())["loops"]["1"] == other
    assert np.isfinite(losses.data["search_nll"]).all()


def test_rates_of_two_processes_with_different_grids_both_stay(finished, tmp_path, monkeypatch):
    """What another process has chosen meanwhile is neither lost nor changed."""
    folder, data = copied(finished, tmp_path)
    ours = json.loads((folder / "rates.json").read_text())
    other = {"common": ours["common"], "loops": {"2": 0.5, "7": 0.25}}
    (folder / "rates.json").unlink()
    no_training(monkeypatch)
    run = running._Run(planning.plan(str(data), folder, GRID, **SETTINGS), GRID, folder, None)
    work = run.work

    def slow(*arguments):
        work(*arguments)
        (folder / "rates.json").write_text(json.dumps(other))

    monkeypatch.setattr(run, "work", slow)
    assert run.choose_rates() == {1: ours["common"], 2: 0.5, 3: ours["common"]}
    assert json.loads((folder / "rates.json").read_text())["loops"] == ours["loops"] | other["loops"]


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({"tokens": 2 * TOKENS}, "tokens"),
        ({"size": replace(SMALL, d_mlp=32)}, "config"),
        ({"rates": (1e-3,)}, "rates, search_tokens"),
        ({"search_tokens": TOKENS}, "search_tokens"),
        ({"batch_size": 2}, "recipe"),
        ({"bf16": True}, "recipe"),
        ({"data": "addition"}, "data"),
        ({"tokenizer": "words"}, "tokenizer"),
    ],
)
def test_a_folder_holds_one_sweep(finished, tmp_path, monkeypatch, changed, differs):
    """Settings that would make models that cannot be compared are refused, and named."""
    folder, data = copied(finished, tmp_path)
    no_training(monkeypatch)
    if "tokenizer" in changed:
        model = LoopedLM(TINY)
        model.tokenizer = word_tokenizer()
        model.save(tmp_path / "words")
        changed = {"tokenizer": str(tmp_path / "words")}
    with pytest.raises(SweepError, match=rf"holds another sweep \(.* says .*{differs} differs\)"):
        swept(changed.pop("data", data), folder, GRID, **changed)


def test_speed_may_change(finished, tmp_path, monkeypatch):
    """A compiled training goes on where another was; so does one that diagnoses its models."""
    folder, data = copied(finished, tmp_path)
    no_training(monkeypatch)
    swept(data, folder, GRID, compiled=True, measures=("prediction",))


def test_text_that_was_only_planned_is_no_choice(tmp_path):
    """A plan keeps text in the folder; other tokens, or other data, make it anew as long as no model needs it."""
    data, out = texts(tmp_path / "texts", 40), tmp_path / "out"
    lengths = [
        len(planning.plan(str(data), out, GRID, **SETTINGS | {"tokens": n}).text.stream) for n in (512, 768, 512)
    ]
    assert lengths == [512, 768, 512]
    big = SETTINGS | {"tokens": 2048, "search_tokens": 1024}
    assert planning.plan("addition", out, GRID, **big).text.corpus.name == "addition"
    (tmp_path / "other").mkdir()
    other = texts(tmp_path / "other" / "texts", 30)
    names = {document.name for document in planning.plan(str(other), out, GRID, **SETTINGS).text.corpus.fit}
    assert names <= {f"file{number}.py" for number in range(30)}
    (out / "text" / "made_for.json").unlink()  # of a version that did not say it: taken as it is
    assert {document.name for document in planning.plan(str(data), out, GRID, **SETTINGS).text.corpus.fit} == names


def test_data_may_move(finished, tmp_path, monkeypatch):
    """The text is in the sweep's folder, and goes by the name of the data."""
    folder, data = copied(finished, tmp_path)
    no_training(monkeypatch)
    shutil.copytree(data, tmp_path / data.name)
    monkeypatch.chdir(tmp_path)
    assert swept(data.name, folder, GRID).data.equals(finished[2].data)


def test_held_out_documents_share_no_source_with_training(tmp_path):
    """Whole sources are held out; the stream is the others', each document ended, and nothing else."""
    lines = []
    for number in range(60):
        lines.append({"text": words([number % 29, number // 29] * 10), "source": f"s{number % 12}"})
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = planning.read_tokenizer(planning.find(planning.TOKENIZER))
    text = prepare(str(tmp_path / "lines.jsonl"), 10**6, read, tmp_path / "text")
    held_out = [document for half in (text.corpus.fit, text.corpus.report) for document in half]
    assert not {document.source for document in text.corpus.fit} & {document.source for document in text.corpus.report}
    sources = {document.source for document in held_out}
    assert (len(held_out), len(sources)) == (16, 4)  # of five documents in each
    trained_on = text.tokenizer.decode(text.stream).split("<|endoftext|>")
    assert trained_on.pop() == ""
    assert sorted(trained_on) == sorted(line["text"] for line in lines if line["source"] not in sources)
    again = prepare(str(tmp_path / "lines.jsonl"), 10**6, read, tmp_path / "text")
    assert again.fingerprint == text.fingerprint


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens": SEQUENCE * BATCH - 1, "rates": (1e-3,)}, "127 training tokens do not fill a batch of 4 x 32"),
        ({"search_tokens": 100}, "100 training tokens do not fill a batch of 4 x 32"),
        ({"tokens": 10**6}, "tokens to train on, of which 1,000,000 are more than 4 rounds"),
        ({"batch_size": 1000, "tokens": 32000, "search_tokens": 32000}, "which do not fill a batch of 1000 x 32"),
        ({"size": "huge"}, "There is no model 'huge': .* A size is also tiny, small, or a JSON file"),
        ({"size": "missing.json"}, "missing.json holds no settings .* Allowed are tiny, small, a JSON file"),
        ({"tokenizer": "missing"}, "There is no model 'missing'"),
        ({"origin": "missing"}, "There is no model 'missing'"),
        ({"size": replace(SMALL, initial_state="random")}, "starts from random states"),
    ],
)
def test_plans_that_cannot_be(tmp_path, changed, said):
    """Too little text or budget, and what does not exist, say so before anything is trained."""
    with pytest.raises(InputError, match=said):
        planning.plan(str(texts(tmp_path / "texts")), tmp_path / "out", GRID, **SETTINGS | changed)
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_data_that_cannot_be_swept(tmp_path):
    """Too few documents to hold some out; a path that is not there is told of tasks, too."""
    with pytest.raises(InputError, match="has 16 documents, too few or of too few sources to hold some out"):
        planning.plan(str(texts(tmp_path / "few", 16)), tmp_path / "out", GRID, **SETTINGS)
    with pytest.raises(InputError, match=r"no such file or folder.*also takes bundled and the tasks p_hop, "):
        planning.plan("missing.jsonl", tmp_path / "out", GRID, **SETTINGS)


@pytest.mark.parametrize("content", ["[]", "{", '{"d_model": -1}', '{"width": 3}', "{}"])
def test_a_size_that_is_no_configuration(tmp_path, content):
    """Broken JSON, wrong, unknown and missing fields."""
    (tmp_path / "size.json").write_text(content)
    with pytest.raises(SweepError, match=r"size\.json holds no settings of a model: .* Allowed are tiny, small"):
        planning.plan("addition", tmp_path / "out", GRID, **SETTINGS | {"size": str(tmp_path / "size.json")})


def test_a_size_in_a_file(tmp_path):
    """The fields of LoopedConfig, without what the grid and the tokenizer say."""
    fields = {name: value for name, value in asdict(SMALL).items() if name not in ("n_loops", "vocab_size")}
    (tmp_path / "size.json").write_text(json.dumps(fields))
    settings = SETTINGS | {"tokens": 2048, "search_tokens": 1024}
    made = [
        planning.plan("addition", tmp_path / "out", GRID, **settings | {"size": size}).base
        for size in (str(tmp_path / "size.json"), SMALL)
    ]
    assert made[0] == made[1]


def test_the_estimate_counts_every_token(finished, tmp_path):
    """Nothing where nothing is left; in proportion to the tokens else."""
    _, data, _, _, _ = finished
    plan = planning.plan(str(data), tmp_path / "new", GRID, **SETTINGS)
    waits = planning.waiting(plan, GRID, tmp_path / "new")
    assert sum(waits.values()) == 10 * TOKENS + 5 * 2 * SEQUENCE * BATCH
    assert planning.estimated_seconds(plan, waits) > 0
    assert planning.waiting(plan, GRID, finished[0]) == {}
    assert planning.estimated_seconds(plan, {}) == 0


# -- training on from a model --------------------------------------------------------------------------


def test_training_on_starts_from_the_models_weights(finished, tmp_path):
    """At a vanishing rate, unchanged cells stay what they started from; changed ones run its weights otherwise."""
    origin = finished[0] / "models" / "loops2-offset1-first-seed1"
    grid = Grid((1, 2), memories=("first", "own"))
    settings = {"origin": str(origin), "rates": (1e-12,), "size": "tiny"}
    losses = swept(finished[1], tmp_path / "out", grid, **settings)
    start = ld.load(origin).state_dict()
    for cell in grid.cells():
        model = ld.load(tmp_path / "out" / "models" / cell.name)
        assert model.cfg == cell.config(ld.load(origin).cfg)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, start[name], rtol=0, atol=1e-6)
    unchanged = losses.data["nll"].sel(seed=0, memory="first", offset=1, loops=2)
    expected = finished[2].data["nll"].sel(seed=1, memory="first", offset=1, loops=2)
    np.testing.assert_allclose(unchanged, expected, atol=1e-4)
    assert losses.provenance["from"].startswith(f"{origin}, weights ")
    with pytest.raises(SweepError, match=r"holds another sweep .*from differs"):
        swept(
            finished[1],
            tmp_path / "out",
            grid,
            **settings | {"origin": str(origin.parent / "loops2-offset1-first-seed0")},
        )


def test_training_on_needs_the_unchanged_setting(finished, tmp_path):
    """What is changed has to be compared with the model trained on as it is; one loop has only its count."""
    models = finished[0] / "models"
    for grid, flag in (
        (Grid((1, 3)), "--loops"),
        (Grid((1, 2), offsets=(0,)), "--offset"),
        (Grid((1, 2), memories=("own",)), "--memory"),
    ):
        with pytest.raises(SweepError, match=f"has 2 loops, offset 1 and memory 'first', and {flag} leaves that out"):
            planning.plan(
                str(finished[1]), tmp_path, grid, **SETTINGS | {"origin": str(models / "loops2-offset1-first-seed1")}
            )
    one = SETTINGS | {"origin": str(models / "loops1-offset1-first-seed0")}
    planning.plan(str(finished[1]), tmp_path / "one", Grid((1, 2), offsets=(0,), memories=("own",)), **one)


def test_what_cannot_be_trained_on(finished, tmp_path):
    """A model without tokenizer, one that knows too few tokens, and one whose loops have no injection."""
    for changes, data, said in (
        ({"vocab_size": 8}, "addition", "knows 8 tokens, and addition has token"),
        ({"vocab_size": 64}, str(finished[1]), "needs a tokenizer"),
        ({"injection": "none"}, "addition", "is no Parallel Loop Transformer"),
    ):
        model = LoopedLM(replace(TINY, **changes))
        model.init_weights(0)
        model.save(tmp_path / "model")
        settings = SETTINGS | {"origin": str(tmp_path / "model"), "tokens": 2048, "search_tokens": 1024}
        with pytest.raises(InputError, match=said):
            planning.plan(data, tmp_path / "out", GRID, **settings)


# -- gathering -----------------------------------------------------------------------------------------


def test_missing_models_are_missing_at_their_places_alone(finished, tmp_path):
    """Each cell taken away leaves NaN where it stood, and where it would be compared with."""
    folder = copied(finished, tmp_path)[0]
    gone = Cell(1, 2, 0, "first")
    (folder / "cells" / f"{gone.name}.nc").unlink()
    data, whole = running.gather(folder).data, finished[2].data
    expected = {name: whole[name].copy() for name in ("nll", "nll_look", "loop_helped", "loop_harmed")}
    expected |= {name: whole[name].copy() for name in ("offset_helped", "offset_harmed")}
    for name, values in expected.items():
        values.loc[{"seed": 1, "offset": 0, "loops": 2}] = np.nan
        if name.startswith("loop"):
            values.loc[{"seed": 1, "offset": 0, "loops": 3}] = np.nan
        if name.startswith("offset"):
            values.loc[{"seed": 1, "loops": 2}] = np.nan
        assert data[name].equals(values), name
    assert gone.name not in json.loads(data.attrs["provenance"])["models"]
    assert (data["learning_rate"] == whole["learning_rate"]).all()
    assert (data["search_nll"] == whole["search_nll"]).all()
    # The model with one loop stands at both offsets.
    (folder / "cells" / "loops1-offset1-first-seed0.nc").unlink()
    data = running.gather(folder).data
    assert data["nll"].sel(seed=0, loops=1).isnull().all()
    assert data["loop_helped"].sel(seed=0, loops=2).isnull().all()
    assert data["nll"].sel(seed=1, loops=1).notnull().all()


def test_a_sweep_of_one_model_so_far(finished, tmp_path):
    """Whichever it is."""
    for cell in GRID.cells([0]):
        folder = tmp_path / cell.name
        (folder / "cells").mkdir(parents=True)
        shutil.copy(finished[0] / "sweep.json", folder)
        shutil.copy(finished[0] / "cells" / f"{cell.name}.nc", folder / "cells")
        data = running.gather(folder).data
        assert data["nll"].size == 8
        np.testing.assert_array_equal(
            data["nll"].squeeze(), finished[2].data["nll"].sel(seed=0, offset=cell.offset, loops=cell.n_loops).squeeze()
        )


def test_a_sweep_knows_what_was_asked_for(finished, tmp_path):
    """Also while most of it is missing; a grid that is extended is the larger one."""
    folder = tmp_path / "begun"
    (folder / "cells").mkdir(parents=True)
    for name in ("sweep.json", "grid.json"):
        shutil.copy(finished[0] / name, folder)
    cell = GRID.cells([0])[0]
    shutil.copy(finished[0] / "cells" / f"{cell.name}.nc", folder / "cells")
    data = running.gather(folder).data
    assert data["nll"].sizes == finished[2].data["nll"].sizes
    assert int(data["nll"].notnull().all("document").sum()) == 1
    with pytest.raises(SweepError, match="yet: run `loopdiag sweep`"):
        recommend_training(running.gather(folder))


def test_a_model_that_diverged_spoils_its_own_place_alone(finished, tmp_path):
    """Its losses are no numbers; those of the others stay."""
    import xarray as xr

    folder = copied(finished, tmp_path)[0]
    file = folder / "cells" / "loops1-offset1-first-seed0.nc"  # the one that is read first
    lost = xr.load_dataset(file, engine="h5netcdf")
    lost["nll_token"] *= np.nan
    lost.to_netcdf(file, engine="h5netcdf")
    data, whole = running.gather(folder).data["nll"], finished[2].data["nll"]
    assert data.sel(seed=0, loops=1).isnull().all()
    assert data.sel(loops=[2, 3]).equals(whole.sel(loops=[2, 3]))
