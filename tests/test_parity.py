"""LoopedLM against numbers that other people's code produced for the released families, from file to logits."""

import functools
import json
from pathlib import Path

import pytest
import torch
from plain_looped import plain_run
from safetensors.torch import load_file

import loopdiag as ld

DATA = Path(__file__).parent / "data" / "parity"
CASES = sorted(f"{folder.parent.name}/{folder.name}" for folder in DATA.glob("*/*/"))
# The data was computed in float64 and rounded once to float32. Measured over all cases, in absolute terms:
# float64 9e-7, float32 3e-5. A wiring mistake moves some tensor by 0.2 to 20.
TOLERANCE = {torch.float64: {"atol": 2e-6, "rtol": 1e-6}, torch.float32: {"atol": 2e-4, "rtol": 1e-4}}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])

# What every reference of a family must hold, for each of its loops where it ends in ".r".
ALWAYS = {"input_ids", "embed", "logits", "logits.r", "loop_input.r", "loop_state.r"}
BESIDES = {
    "iquestpltcoder": {"loop_state_pre_norm.r"},
    "iquestloopcoder": {"loop_state_pre_norm.r"},
    "nanbeige": {"loop_state_pre_norm.r"},
    "ouro": {"loop_state_pre_norm.r", "exit_gate_logit.r", "exit_pdf", "exit_loop", "expected_logits"},
    "huginn_raven": {"initial_state", "num_steps", "prelude_output", "coda_input.r", "head_input.r"},
}
GATED = ("iquestpltcoder", "iquestloopcoder")
# Hook points of the tensors that need no more than to be looked up.
HOOKS = {
    "embed": "hook_embed",
    "initial_state": "hook_initial_state",
    "prelude_output": "prelude.hook_out",
    "loop_input": "loops.{}.hook_in",
    "loop_state_pre_norm": "loops.{}.hook_out_pre_norm",
    "loop_state": "loops.{}.hook_out",
    "head_input": "loops.{}.hook_readout",
    "coda_input": "coda.hook_in",
}
NOT_A_STATE = ("input_ids", "num_steps", "exit_pdf", "exit_loop", "expected_logits")


@functools.cache
def loaded(name, dtype=torch.float64):
    """A case, loaded once for all tests: none of them changes it."""
    return Case(name, dtype)


class Case:
    """A reference, the model loaded from the files beside it, and how to run it."""

    def __init__(self, name, dtype):
        self.family, self.folder = name.split("/")[0], DATA / name
        self.model = ld.load(self.folder, dtype=dtype)
        self.keys = json.loads((self.folder / "config.json").read_text())
        reference = load_file(self.folder / "reference.safetensors")
        self.reference = {key: x.to(dtype) if x.is_floating_point() else x for key, x in reference.items()}
        self.ids = reference["input_ids"]
        self.n_loops = int(reference.get("num_steps", self.model.cfg.n_loops))
        self.given = {key: self.reference[key] for key in ("initial_state",) if key in reference}

    @torch.no_grad()
    def run(self, n_loops=None):
        """Logits and every state."""
        return self.model.run_with_cache(self.ids, n_loops=n_loops or self.n_loops, **self.given)


def counterpart(case, name, logits, cache):
    """Ours of a reference tensor.

    Raises:
        KeyError: There is no such tensor.
    """
    kind, *numbers = name.split(".")
    model = case.model
    if len(numbers) != {"gate": 2}.get(kind, int(f"{kind}.r" in ALWAYS | BESIDES[case.family])) and name != "logits":
        raise KeyError(name)
    if kind == "gate":
        loop, layer = numbers
        return cache[f"loops.{loop}.blocks.{layer}.attn.hook_gate"].transpose(1, 2)
    if kind == "coda_input":
        return case.run(int(numbers[0]))[1]["coda.hook_in"]
    if kind in HOOKS:
        return cache[HOOKS[kind].format(*numbers)]
    if kind == "logits" and numbers:
        return model.unembed(cache[f"loops.{numbers[0]}.hook_readout"])
    ours = {
        "input_ids": lambda: case.ids,
        "num_steps": lambda: torch.tensor([case.n_loops]),
        "logits": lambda: model.early_exit(case.ids).logits if model.cfg.exit_gate else logits,
        "exit_gate_logit": lambda: torch.logit(cache[f"loops.{numbers[0]}.hook_exit_gate"]),
        "exit_loop": lambda: model.early_exit(case.ids).loop,
        "exit_pdf": lambda: model.early_exit(case.ids).probabilities,
        "expected_logits": lambda: sum(
            p * model.unembed(cache[f"loops.{loop}.hook_readout"])
            for loop, p in enumerate(model.early_exit(case.ids).probabilities.split(1, dim=-1), start=1)
        ),
    }
    return ours[kind]()


def assert_close(ours, expected, what, atol=1e-10, rtol=0.0):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}")


# -- the data ---------------------------------------------------------------------------------------


def test_the_data_is_there():
    """An oracle that is missing protects nobody: every family, every tensor, every loop."""
    counts = {family: sum(case.startswith(f"{family}/") for case in CASES) for family in BESIDES}
    assert counts == {"iquestpltcoder": 9, "iquestloopcoder": 1, "nanbeige": 3, "ouro": 1, "huginn_raven": 1}
    assert len(CASES) == sum(counts.values())


@pytest.mark.parametrize("name", CASES)
def test_a_reference_says_everything_of_its_family(name):
    """No tensor more or less, so that none goes missing without a word."""
    case = loaded(name)
    expected = set()
    for kind in ALWAYS | BESIDES[case.family]:
        loops = range(1, case.n_loops + 1) if kind.endswith(".r") else [0]
        expected |= {kind.replace(".r", f".{loop}") for loop in loops}
    if case.family in GATED:
        layers = range(case.model.cfg.n_layers)
        expected |= {f"gate.{loop}.{layer}" for loop in range(2, case.n_loops + 1) for layer in layers}
    assert set(case.reference) == expected


@pytest.mark.parametrize("name", CASES)
def test_every_stored_number_is_read(name):
    """As many numbers in the model as in the file, but for the copy of a tied head that some files hold."""
    case = loaded(name)
    stored = load_file(case.folder / "model.safetensors")
    if case.model.cfg.tie_embeddings:
        stored.pop("lm_head.weight", None)
    held = case.model.state_dict()
    assert sum(x.numel() for x in held.values()) == sum(x.numel() for x in stored.values())
    assert_close(
        sum(x.double().sum() for x in held.values()), sum(x.double().sum() for x in stored.values()), "sum", atol=1e-6
    )


# -- numbers ----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_reference_tensor(name, dtype):
    """Embedding, input, output and hand-over of every loop, gates, exits, and logits of every loop count."""
    case = loaded(name, dtype)
    logits, cache = case.run()
    assert logits.dtype == dtype
    for key, expected in case.reference.items():
        ours = counterpart(case, key, logits, cache)
        if expected.is_floating_point():
            assert_close(ours, expected, key, **TOLERANCE[dtype])
        else:
            assert torch.equal(ours, expected), key


def test_an_unknown_tensor_fails():
    """A tensor that nothing is compared with is no silent pass."""
    case = loaded("ouro/t3_exit_threshold_06")
    for name in ("surprise", "surprise.1", "embed.1", "loop_input"):
        with pytest.raises(KeyError):
            counterpart(case, name, *case.run())


@DTYPES
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_running_fewer_loops_gives_the_logits_of_that_exit(name, dtype):
    """Later loops never reach back: r loops give the reference's exit after loop r, and its states."""
    case = loaded(name, dtype)
    _, whole = case.run()
    for loop in range(1, case.n_loops):
        logits, cache = case.run(loop)
        assert_close(logits, case.reference[f"logits.{loop}"], f"logits.{loop}", **TOLERANCE[dtype])
        for point in ("hook_in", "hook_out_pre_norm", "hook_readout"):
            hook = f"loops.{loop}.{point}"
            torch.testing.assert_close(cache[hook], whole[hook], atol=0, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_plain_implementation_is_right_too(name):
    """The oracle of `test_decoder.py` stands on the same outside numbers (causal, so a prefix will do)."""
    case, length = loaded(name), 14
    weights = {key: x.double() for key, x in case.model.state_dict().items()}
    given = {key: x[1, :length] for key, x in case.given.items()}
    states = plain_run(case.model.cfg, weights, case.ids[1, :length].tolist(), case.n_loops, **given)
    head = weights["embed.weight" if case.model.cfg.tie_embeddings else "head.weight"]
    for key, expected in case.reference.items():
        kind, *numbers = key.split(".")
        if kind in NOT_A_STATE or (kind == "coda_input" and int(numbers[0]) < case.n_loops):
            continue
        if kind == "logits":
            ours = states[f"loops.{numbers[0] if numbers else case.n_loops}.hook_readout"] @ head.T
            if not numbers:
                assert_close(states["logits"], ours, key)
            if not numbers and case.model.cfg.exit_gate:
                continue  # what leaves early is no state
        elif kind == "gate":
            ours, expected = states["loops.{}.blocks.{}.attn.hook_gate".format(*numbers)], expected.mT
        elif kind == "exit_gate_logit":
            ours = torch.logit(states[f"loops.{numbers[0]}.hook_exit_gate"])
        else:
            ours = states[HOOKS[kind].format(*numbers)]
        assert_close(ours, expected[1, :length], key, **TOLERANCE[torch.float64])


# -- more loops than trained ------------------------------------------------------------------------


def entering(case, cache, loop):
    """What enters a loop >= 2 by the family's formula, from what the loop before handed on and the file's keys."""
    handed = cache[f"loops.{loop - 1}.hook_out"]
    if case.family == "iquestpltcoder":
        a, b = (1.0 if case.keys[key] is None else case.keys[key] for key in ("plt_emb_scale", "plt_hidden_scale"))
        shifted = torch.zeros_like(handed)
        shifted[:, 1:] = handed[:, :-1]
        return a * cache["hook_embed"] + b * shifted
    if case.family == "huginn_raven":
        weight = load_file(case.folder / "model.safetensors")["transformer.adapter.weight"].double()
        return torch.cat((handed, cache["prelude.hook_out"]), dim=-1) @ weight.T
    return handed


def normed(case, raw):
    """The final norm by its formula."""
    stored = load_file(case.folder / "model.safetensors")
    weight = stored.get("model.norm.weight", stored.get("transformer.ln_f.weight")).double()
    eps = case.keys.get("rms_norm_eps", case.keys.get("norm_eps"))
    return raw / (raw.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_more_loops_than_trained_go_on_by_the_same_formula(name):
    """Trained loops stay as they are; each further one maps what enters it as a trained loop would."""
    case = loaded(name)
    trained, total = case.n_loops, case.n_loops + 2
    _, few = case.run()
    logits, many = case.run(total)
    for point in ("hook_in", "hook_out_pre_norm", "hook_readout"):
        for loop in range(1, trained + 1):
            torch.testing.assert_close(many[f"loops.{loop}.{point}"], few[f"loops.{loop}.{point}"], atol=0, rtol=0)
    hands_normed = {"ouro": True, "huginn_raven": False, "iquestloopcoder": False}.get(
        case.family, case.keys.get("plt_normalize_per_loop", not case.keys.get("skip_loop_final_norm"))
    )
    for loop in range(trained, total):
        raw = many[f"loops.{loop}.hook_out_pre_norm"]
        handed = normed(case, raw) if hands_normed else raw
        assert_close(many[f"loops.{loop}.hook_out"], handed, f"handed on by {loop}")
    # Loop 2 stands for all later ones; where keys and values are each loop's own, so does loop 1.
    stand_in = 2 if case.family in GATED else 1
    for loop in range(max(trained + 1, stand_in), total + 1):
        x = many[f"loops.{loop}.hook_in"]
        assert_close(x, entering(case, many, loop), f"what enters loop {loop}")
        with case.model.hooks([(f"loops.{stand_in}.hook_in", lambda _, hook, x=x: x)]):
            ours, cache = case.run(stand_in)
        for point in ("hook_out_pre_norm", "hook_readout"):
            assert_close(many[f"loops.{loop}.{point}"], cache[f"loops.{stand_in}.{point}"], f"{point} of loop {loop}")
        if loop == total:
            assert_close(logits, ours, "logits")


# -- padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_padded_document_gets_the_numbers_it_gets_alone(name, side):
    """Readouts of every loop, logits and exits, of documents of 24, 11 and 1 tokens."""
    case = loaded(name)
    model, lengths = case.model, (24, 11, 1)
    points = [f"loops.{loop}.hook_readout" for loop in range(1, case.n_loops + 1)]
    batch = torch.full((len(lengths), max(lengths)), 3)
    mask = torch.zeros_like(batch)
    spans = [slice(max(lengths) - n, None) if side == "left" else slice(n) for n in lengths]
    for row, (span, n) in enumerate(zip(spans, lengths, strict=True)):
        batch[row, span], mask[row, span] = case.ids[row % 2, :n], 1
    together, kept = model.run_with_cache(batch, mask, names_filter=points, n_loops=case.n_loops)
    exits = model.early_exit(batch, mask) if model.cfg.exit_gate else None
    for row, (span, n) in enumerate(zip(spans, lengths, strict=True)):
        document = case.ids[row % 2, :n][None]
        alone, states = model.run_with_cache(document, names_filter=points, n_loops=case.n_loops)
        assert_close(together[row, span], alone[0], f"logits of document {row}")
        for point in points:
            assert_close(kept[point][row, span], states[point][0], f"{point} of document {row}")
        if exits is not None:
            single = model.early_exit(document)
            assert torch.equal(exits.loop[row, span], single.loop[0])
            assert_close(exits.logits[row, span], single.logits[0], f"early exit of document {row}")
            assert_close(exits.probabilities[row, span], single.probabilities[0], f"exits of document {row}")
