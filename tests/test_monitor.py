"""The monitor: real, tiny training runs with and without it, against loops unrolled by hand and diagnoses."""

import copy
import json
import logging
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_decoder import make_model
from test_training import STREAM, TINY
from tiny import VOCABULARY, padded, token_lists
from transformers import TrainerCallback, TrainingArguments

import loopdiag as ld
from loopdiag.corpus import TokenDocument, tokenize
from loopdiag.errors import InputError
from loopdiag.measures.attention import AttentionMeasures
from loopdiag.model import LoopedLM
from loopdiag.monitor import LoopMonitor, loop_numbers
from loopdiag.plots.training import draw_emergence, emergence, net_gains, pays_from
from loopdiag.sweep import family
from loopdiag.sweep.training import LoopedTrainer, Packed, monitored
from loopdiag.trace import LoopTrace, record

# transformers and torch warn of each other's plans.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning", "ignore::PendingDeprecationWarning"
)
BATCH = padded(token_lists(seed=3, lengths=(9, 4, 7)))
HELD_OUT = monitored(STREAM[-48:].reshape(3, 16))
ALL = ("nll_exit", "gain", "cost", "output_shift", "step_size", "effective_rank", "omega", "gate_mean")


def by_hand(model, batch):
    """NLL, gain and cost of each exit, from runs that stop there, one document at a time."""
    found = {}
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        ids = ids[mask][None]
        nll = [
            F.cross_entropy(model(ids, n_loops=loop)[0, :-1], ids[0, 1:], reduction="none")
            for loop in range(1, model.cfg.n_loops + 1)
        ]
        for loop, of_tokens in enumerate(nll, start=1):
            found.setdefault(f"loop_{loop}/nll_exit", []).append(of_tokens.mean().item())
            if loop > 1:
                change = of_tokens - nll[loop - 2]
                found.setdefault(f"loop_{loop}/gain", []).append((-change).clamp_min(0).mean().item())
                found.setdefault(f"loop_{loop}/cost", []).append(change.clamp_min(0).mean().item())
    return {name: np.mean(values) for name, values in found.items()}


class Keeper(TrainerCallback):
    """Keeps the weights after every update, and everything that reporters are told."""

    def __init__(self):
        self.weights, self.told = {}, []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = copy.deepcopy(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = copy.deepcopy(model)

    def on_log(self, args, state, control, logs, **kwargs):
        self.told.append((state.global_step, dict(logs)))


def make_trainer(folder, *callbacks, updates=7, **arguments):
    model = LoopedLM(TINY)
    model.init_weights(0)
    settings = {"max_steps": updates, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "logging_steps": 2}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings |= {"remove_unused_columns": False, "label_names": ["input_ids"], "dataloader_drop_last": True}
    return LoopedTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings | arguments),
        train_dataset=Packed(STREAM, 16),
        eval_dataset=Packed(STREAM[-64:], 16),
        callbacks=list(callbacks),
    )


def looks(trainer):
    return [entry for entry in trainer.state.log_history if any(name.startswith("loop_") for name in entry)]


def losses(trainer):
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def numbers_of(look):
    return {name: value for name, value in look.items() if name.startswith("loop_")}


# -- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"memory": "own", "offset": 0}, {"n_prelude": 1, "n_coda": 1}])
def test_numbers_are_those_of_runs_that_stop_there(changes):
    """NLL, gain and cost of every loop, documents of several lengths. Measured: 1e-15."""
    model = make_model(**changes)
    numbers = loop_numbers(model, [BATCH])
    expected = by_hand(model, BATCH)
    assert {name for name in numbers if name[:6] not in ("loop_0", "loop_1")} <= set(expected) <= set(numbers)
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-12), name
    assert "loop_0/gain" not in numbers  # not defined


def test_numbers_are_those_of_a_diagnosis():
    """The same weights and documents give the means of what `diagnose` stores, for every group."""
    model, corpus = ld.load("tiny-plt-2"), ld.corpus.bundled().take(16)
    data = ld.diagnose(model, corpus, measures=["prediction", "motion", "diversity", "offset", "attention"]).data
    measures = (*ALL, "cos_update", "participation_ratio", "attention_entropy", "attention_kl")
    numbers = loop_numbers(model, tokenize(corpus.report, model.tokenizer, 256), measures)
    for name in measures:
        for loop in (0, 1, 2):
            values = data[name].sel(loop=loop).values
            if np.isnan(values).all():
                assert f"loop_{loop}/{name}" not in numbers
            else:
                assert numbers[f"loop_{loop}/{name}"] == pytest.approx(np.nanmean(values), rel=1e-5), name


def test_batches_and_more_loops():
    """How documents are batched changes nothing, and more loops than trained can be looked at."""
    model = make_model()
    documents = [TokenDocument(f"d{i}", "s", tuple(ids), False) for i, ids in enumerate(token_lists(3, (9, 4, 7) * 4))]
    whole = loop_numbers(model, documents, ALL, n_loops=5)
    assert "loop_5/gain" in whole
    parts = [padded([document.input_ids for document in documents[at : at + 5]]) for at in (0, 5, 10)]
    assert loop_numbers(model, parts, ALL, n_loops=5) == pytest.approx(whole, rel=1e-12)


def test_attention_is_captured_when_asked_for():
    """As `AttentionMeasures` takes it, layers and heads averaged."""
    model, watch = make_model(), AttentionMeasures(("attention",))
    numbers = loop_numbers(model, [BATCH], ["attention_sink_local"])
    record(model, BATCH, on_attention=watch)
    taken = watch.result()["attention_sink_local"]
    assert numbers == {f"loop_{loop}/attention_sink_local": taken[:, loop].mean().item() for loop in (2, 3)}


class OneMore(torch.nn.Module):
    """Not ours: two loops of one layer, and dropout."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, 8)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, input_ids):
        x = [self.embed(input_ids)]
        for _ in range(2):
            x.append(self.dropout(x[-1] + self.layer(x[-1])))
        return x


def recorded(model, batch):
    """Its trace; draws from every generator that there is."""
    torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 (the old generator, too)
    x = model(batch.input_ids)
    head = model.embed.weight.T
    return LoopTrace.from_states(x[0], x[1:], lambda y: y @ head, input_ids=batch.input_ids, mask=batch.attention_mask)


def test_a_model_of_another_kind():
    """Its record is used, without dropout; every random state is left as it was."""
    model = OneMore()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 (as drawn from)
    numbers = loop_numbers(model, [BATCH], ["nll_exit", "relative_step"], record=recorded)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    after = np.random.get_state()  # noqa: NPY002 (as drawn from)
    assert all(np.array_equal(now, then) for now, then in zip(after, states[2], strict=True))
    assert model.training
    assert model.dropout.training
    logits = model.eval()(BATCH.input_ids)[2] @ model.embed.weight.T
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), BATCH.input_ids[:, 1:], reduction="none")
    kept = BATCH.attention_mask[:, 1:]
    assert numbers["loop_2/nll_exit"] == pytest.approx(((nll * kept).sum(1) / kept.sum(1)).mean().item(), rel=1e-5)


# -- as training has it -----------------------------------------------------------------------------


@pytest.fixture
def _one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_wrapped_models():
    """DataParallel, DistributedDataParallel and accelerate's bfloat16 autocast: the numbers of the bare model."""
    model = make_model(dtype=torch.float32)
    expected = loop_numbers(model, [BATCH], ALL)
    for wrapped in (torch.nn.DataParallel(model), torch.nn.parallel.DistributedDataParallel(model)):
        assert loop_numbers(wrapped, [BATCH], ALL) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert loop_numbers(model, [BATCH], ALL) == expected
    AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    rounded = prepared(BATCH.input_ids)
    assert loop_numbers(prepared, [BATCH], ALL) == expected
    assert torch.equal(prepared(BATCH.input_ids), rounded)  # autocast is back


def test_a_compiled_model_is_not_compiled_again():
    """The numbers are those of the model inside, and what was compiled goes on being used."""
    model, compilations = make_model(dtype=torch.float32), []

    def backend(graph, inputs):
        compilations.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        before = compiled(BATCH.input_ids)
        count = len(compilations)
        assert count > 0
        assert loop_numbers(compiled, [BATCH]) == loop_numbers(model, [BATCH])
        assert torch.equal(compiled(BATCH.input_ids), before)
    assert len(compilations) == count


def test_a_model_is_left_as_it_was():
    """The mode of every module, gradients, hooks, and no graph."""
    model = make_model()
    model.train()
    model.blocks[1].eval()
    model(BATCH.input_ids, return_type="loss").backward()
    modes = [module.training for module in model.modules()]
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    loop_numbers(model, [BATCH], ALL)
    assert [module.training for module in model.modules()] == modes
    left = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(torch.equal(now, then) for now, then in zip(left, gradients, strict=True))
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    assert "forward" not in vars(model)


def test_a_failure_leaves_the_model_as_it_was():
    """So does a record that raises."""
    model = OneMore()

    def broken(model, batch):
        assert not model.training
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        loop_numbers(model, [BATCH], record=broken)
    assert model.dropout.training


# -- in a Trainer -----------------------------------------------------------------------------------


def test_looks_are_logged_and_training_is_not_disturbed(tmp_path):
    """Before the first update, every third, and the last: the numbers of the weights then; weights to the bit."""
    keeper = Keeper()
    watched = make_trainer(tmp_path, LoopMonitor(HELD_OUT, 3, ALL), keeper)
    plain = make_trainer(tmp_path)
    watched.train()
    plain.train()
    assert [look["step"] for look in looks(watched)] == [0, 3, 6, 7]
    for look in looks(watched):
        assert numbers_of(look) == loop_numbers(keeper.weights[look["step"]], HELD_OUT, ALL)
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert losses(watched) == losses(plain) != []
    assert watched.model.training
    assert not any("loop_" in name for _, logs in keeper.told for name in logs)


def test_attached_looks_go_the_trainers_way(tmp_path):
    """To reporters, too, and the Trainer goes on logging its losses as without."""
    keeper = Keeper()
    watched, plain = make_trainer(tmp_path, keeper), make_trainer(tmp_path)
    monitor = LoopMonitor(HELD_OUT, 2)
    assert monitor.attach(watched) is monitor
    watched.train()
    plain.train()
    assert losses(watched) == losses(plain) != []
    told = [(step, numbers_of(logs)) for step, logs in keeper.told if numbers_of(logs)]
    assert [step for step, _ in told] == [0, 2, 4, 6, 7]
    assert told == [(look["step"], numbers_of(look)) for look in looks(watched)]


@pytest.mark.parametrize("stop_in", ["on_step_end", "on_evaluate"])
def test_a_run_that_is_stopped_early(stop_in, tmp_path):
    """Has a last look, too, at the last update."""

    def stop(args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 5
        return control

    stopper = TrainerCallback()
    setattr(stopper, stop_in, stop)
    trainer = make_trainer(tmp_path, LoopMonitor(HELD_OUT, 3), stopper, eval_strategy="steps", eval_steps=5)
    trainer.train()
    assert [look["step"] for look in looks(trainer)] == [0, 3, 5]


def test_a_run_that_goes_on(tmp_path):
    """A stopped run keeps its looks in its checkpoints and takes no look twice; a whole one gives the same."""
    settings = {"save_strategy": "steps", "save_steps": 3}

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "a", LoopMonitor(HELD_OUT, 3), Stop(), **settings).train()
    again = make_trainer(tmp_path / "a", LoopMonitor(HELD_OUT, 3), **settings)
    again.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "b", LoopMonitor(HELD_OUT, 3))
    whole.train()
    assert looks(again) == looks(whole)
    assert [look["step"] for look in looks(again)] == [0, 3, 6, 7]


def test_bfloat16_training(tmp_path):
    """Trained under autocast, looked at in the dtype of the weights."""
    keeper = Keeper()
    trainer = make_trainer(tmp_path, LoopMonitor(HELD_OUT, 2), keeper, updates=2, bf16=True)
    trainer.train()
    bare = LoopedLM(TINY)
    bare.load_state_dict(trainer.model.state_dict())
    assert numbers_of(looks(trainer)[-1]) == loop_numbers(bare, HELD_OUT)


def test_only_the_first_process_measures(tmp_path):
    """The others do nothing."""
    trainer = make_trainer(tmp_path)
    trainer.state.is_world_process_zero = False
    LoopMonitor(HELD_OUT, 1).on_train_begin(trainer.args, trainer.state, trainer.control, model=None)
    assert trainer.state.log_history == []


def test_reporters_that_are_not_reached(tmp_path, caplog):
    """Who asked for a reporter is told how to reach it."""
    trainer = make_trainer(tmp_path)
    trainer.args.report_to = ["wandb"]
    with caplog.at_level(logging.WARNING):
        LoopMonitor(HELD_OUT, 1).on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        assert "for wandb, use LoopMonitor(...).attach(trainer)" in caplog.text
        caplog.clear()
        attached = LoopMonitor(HELD_OUT, 1).attach(trainer)
        attached.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        assert not caplog.text


# -- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every = 0 is not allowed"),
        ({"every": True}, "every = True is not allowed"),
        ({"measures": ["gian"]}, "'gian' cannot be logged: there is no such measure. Allowed are nll_exit, gain"),
        ({"measures": "gain"}, "give a list of names"),
        ({"measures": []}, "give a list of names"),
        ({"measures": ["hsic"]}, "'hsic' cannot be logged: it is not one number for each loop"),
        ({"measures": ["nll_usable"]}, "the group readouts takes more than one run"),
        ({"measures": ["effective_rank_pooled"]}, "the group pooled takes more than one run"),
        ({"measures": ["attention_sink"], "record": recorded}, "captured of models of this toolkit only"),
        ({"n_loops": 2, "record": recorded}, "n_loops goes with models of this toolkit"),
        ({"n_loops": 0}, "n_loops = 0 is not allowed"),
        ({"documents": []}, "documents holds nothing"),
        ({"documents": ["text"]}, "documents holds str"),
        ({"documents": [BATCH] * 22}, "66 documents at every look .* at most 64"),
    ],
)
def test_what_is_refused_at_once(settings, message):
    """Before any training."""
    with pytest.raises(InputError, match=message):
        LoopMonitor(**{"documents": [BATCH], "every": 1} | settings)


def test_what_is_refused_when_training_begins(tmp_path):
    """What a model lacks, models of another kind, and weights in pieces."""
    with pytest.raises(InputError, match="no omega: the model has no cross-loop position offset"):
        loop_numbers(make_model(offset=0), [BATCH], ["omega"])
    with pytest.raises(InputError, match="The model is a OneMore: give a LoopedLM, or record="):
        loop_numbers(OneMore(), [BATCH])
    trainer = make_trainer(tmp_path)
    trainer.args.fsdp = True
    with pytest.raises(InputError, match="FSDP and DeepSpeed ZeRO-3"):
        LoopMonitor([BATCH], 1).on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_diverged_model_is_no_error():
    """Numbers that are not defined are left out."""
    model = make_model()
    model.embed.weight.data.fill_(torch.nan)
    assert loop_numbers(model, [BATCH], (*ALL, "attention_entropy")) == {}


# -- the family and the figure ----------------------------------------------------------------------


def test_documents_of_the_family():
    """At most 32 of them, spread from the first to the last, each once."""
    rows = np.arange(100 * 4, dtype=np.uint16).reshape(100, 4)
    batches = monitored(rows)
    ids = torch.cat([batch.input_ids for batch in batches])
    assert ids.shape == (32, 4)
    assert ids[0].tolist() == [0, 1, 2, 3]
    assert ids[-1].tolist() == rows[-1].tolist()
    assert len(set(ids[:, 0].tolist())) == 32
    assert all(batch.attention_mask.all() for batch in batches)
    assert sum(len(batch.names) for batch in monitored(rows[:3])) == 3


def test_bundled_models_are_not_replaced_by_accident(monkeypatch, capsys):
    """Another budget needs a place of its own."""
    for arguments, message in (
        (["--tokens", "8192"], "give --out"),
        (["--tokens", "99999999", "--out", "x"], "more than the prepared text has"),
    ):
        monkeypatch.setattr("sys.argv", ["family", *arguments])
        with pytest.raises(SystemExit):
            family.main()
        assert message in capsys.readouterr().err


def history_of(nets, every=10):
    """Log entries with these net gains of loops 1.., look by look, among others."""
    entries = [{"loss": 3.0, "step": 1}]
    for look, values in enumerate(nets):
        entry = {"step": look * every}
        for loop, net in enumerate(values, start=1):
            entry |= {f"loop_{loop}/gain": 1 + net, f"loop_{loop}/cost": 1.0, f"loop_{loop}/nll_exit": 2.0}
        entries.append(entry)
    return entries


HISTORY = history_of([(1, 0.5, -0.1, 0.1), (2, 0.5, 0.1, 0.2), (3, -0.5, 0.2, 0.25), (4, 0.5, 0.25, -0.5)])


class Table:
    """What a data frame does of it: every column in every row."""

    def to_dict(self, how):
        assert how == "records"
        names = {name for entry in HISTORY for name in entry}
        return [{name: entry.get(name, np.nan) for name in names} for entry in HISTORY]


def test_when_loops_start_to_pay():
    """The first look from which on the net gain stays above; by hand."""
    assert pays_from(HISTORY) == {1: 0, 2: 30, 3: 10, 4: None} == pays_from(Table())
    assert pays_from(HISTORY, price=0.15) == {1: 0, 2: 30, 3: 20, 4: None}
    update, net = net_gains(HISTORY)[3]
    assert update.tolist() == [0, 10, 20, 30]
    assert net == pytest.approx([-0.1, 0.1, 0.2, 0.25])
    with pytest.raises(ValueError, match="two looks at update 0"):
        net_gains([*HISTORY, *HISTORY])


def test_two_monitors_of_one_training(tmp_path):
    """Each has its own looks, at its own updates."""
    trainer = make_trainer(tmp_path, LoopMonitor(HELD_OUT, 3), LoopMonitor(HELD_OUT, 2, ["nll_exit"]), updates=4)
    trainer.train()
    at = {names: [e["step"] for e in looks(trainer) if ("loop_2/gain" in e) == names] for names in (True, False)}
    assert at == {True: [0, 3, 4], False: [0, 2, 4]}


def test_the_figure_draws_what_it_is_given():
    """Lines of loops 2.. against tokens, filled once they pay, and the statement."""
    ax = emergence(HISTORY, tokens_per_update=50_000)
    lines = {line.get_label(): line for line in ax.lines}
    assert {label for label in lines if label.startswith("loop")} == {"loop 2", "loop 3", "loop 4"}
    assert lines["loop 3"].get_xdata() == pytest.approx([0, 0.5, 1, 1.5])
    assert lines["loop 3"].get_ydata() == pytest.approx([-0.1, 0.1, 0.2, 0.25])
    assert lines["loop 3"].get_markevery() == [1, 2, 3]
    said = " ".join(ax.texts[0].get_text().split())
    assert "loop 2 at 1.50M tokens, loop 3 at 0.50M tokens, loop 4 never" in said
    ax = emergence(HISTORY, price=0.15)
    assert ax.get_xlabel() == "updates"
    assert "above the price of 0.15 for good (filled): loop 2 at 30 updates" in " ".join(ax.texts[0].get_text().split())
    assert "no look" in emergence(history_of([(1,)])).texts[0].get_text()
    plt.close("all")


def test_the_saved_figure(tmp_path):
    """Drawn again, a file is the same to the byte."""
    saved = tmp_path / "looks.json"
    saved.write_text(json.dumps({"tokens_per_update": 8192, "log": HISTORY}))
    first = {file.name: file.read_bytes() for file in draw_emergence(saved, tmp_path / "a")}
    again = {file.name: file.read_bytes() for file in draw_emergence(saved, tmp_path / "b")}
    assert set(first) == {"emergence.png", "emergence.svg"}
    assert first == again
