"""From a name, a folder or a hub id to a model, and back."""

import json
import re
import shutil
import socket

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from test_families import FILES, IDS, write
from tiny import word_tokenizer
from tokenizers import Tokenizer

import loopdiag as ld
from loopdiag.errors import InputError
from loopdiag.model import LoadError, LoopedConfig, LoopedLM, loading, save, saving
from loopdiag.model.config import RopeScaling
from loopdiag.model.dtypes import as_dtype
from loopdiag.model.loading import BUNDLED, find

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def small(**settings) -> LoopedLM:
    sizes = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 4, "d_mlp": 24}
    model = LoopedLM(LoopedConfig(**(sizes | {"n_ctx": 32, "n_loops": 3, "window": 4} | settings)))
    generator = torch.Generator().manual_seed(0)
    for x in model.state_dict().values():
        x.copy_(torch.randn(x.shape, generator=generator))
    return model.eval().requires_grad_(False)


def llama(folder, **changes):
    """A dense model of the Llama layout, the plainest file there is; returns its tensors."""
    keys, tensors = FILES["llama"]
    return write(folder, keys | changes, tensors)


def sharded(folder, weights, shards=("a.safetensors", "b.safetensors")):
    """The same tensors in several files with an index."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    where = {name: shards[place % len(shards)] for place, name in enumerate(sorted(weights))}
    for shard in shards:
        save_file({name: weights[name] for name, file in where.items() if file == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def assert_equal_states(ours, theirs):
    """Same names, dtypes and bits."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert set(ours) == set(theirs)
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype
        assert torch.equal(x, theirs[name]), name


@pytest.fixture
def nothing_read(monkeypatch):
    """Fails when a weight is read."""

    def read(*_):
        pytest.fail("a weight was read")

    monkeypatch.setattr(loading, "_read", read)


@pytest.fixture
def no_network(monkeypatch):
    def connect(*_):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)


# -- bundled models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-plt-1", "tiny-plt-2", "tiny-plt-3", "tiny-plt-4"])
def test_bundled_models_load(name):
    """Each has the loops its name says, the tokenizer it was trained with, and is ready to be measured."""
    model = ld.load(name)
    assert model.cfg.n_loops == int(name[-1])
    assert model.source == name
    assert len(model.tokenizer) == model.cfg.vocab_size
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_family_differs_in_the_loop_count_alone():
    """Same configuration but for n_loops, same tokenizer file."""
    configs = [json.loads((BUNDLED / name / "config.json").read_text()) for name in ld.bundled_models()]
    assert [keys.pop("plt_num_loops") for keys in configs] == [1, 2, 3, 4]
    assert all(keys == configs[0] for keys in configs)
    assert len({(BUNDLED / name / "tokenizer.json").read_bytes() for name in ld.bundled_models()}) == 1


def test_more_loops_at_once():
    """`load(..., n_loops=6)` has hook points of six loops, and fewer loops take none away."""
    assert "loops.6.hook_out" in ld.load("tiny-plt-2", n_loops=6).hook_dict
    assert "loops.4.hook_out" in ld.load("tiny-plt-4", n_loops=1).hook_dict


@pytest.mark.parametrize("n_loops", [0, -1, True, "3", 2.0])
def test_a_number_of_loops_that_is_none(n_loops, nothing_read):
    """The same rule as for a run."""
    with pytest.raises(LoadError, match=r"n_loops = .* is not allowed: it must be an integer >= 1"):
        ld.load("tiny-plt-2", n_loops=n_loops)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("abacus", "is not known to torch: use 'cpu'"),
        ("cuda", "torch sees no GPU here. Use 'cpu'"),
        ("meta", "does not work here"),
        ("mps", "does not work here"),
    ],
)
def test_a_device_that_is_not_there(nothing_read, monkeypatch, device, said):
    """What was given, and what may be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoadError, match=rf"device '{device}'.*{said}"):
        ld.load("tiny-plt-2", device=device)


# -- names ------------------------------------------------------------------------------------------


def test_a_name_that_is_nothing(tmp_path):
    """What was given, and what may be."""
    for name in ("tiny-plt-9", "a/b/c", ""):
        with pytest.raises(LoadError, match=rf"There is no model '{name}': bundled are tiny-plt-1, .* hub id"):
            ld.load(name)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"weights\.safetensors is a file: give the folder"):
        ld.load(tmp_path / "weights.safetensors")
    with pytest.raises(LoadError, match=r"has no config\.json"):
        ld.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "not readable as JSON"), (b"\xff\xfe{}", "not readable as JSON"), (b"[]", "holds a list: it must be")],
)
def test_a_config_that_is_no_json_object(tmp_path, content, said):
    """The file is named."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LoadError, match=rf"config\.json.*{said}"):
        ld.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "the key 'hidden_size' is missing; iquestpltcoder needs it"),
        ({"plt_window_size": [8, 8]}, r"plt_window_size = \[8, 8\] is not built: allowed is \[n, 0\]"),
        ({"attention_bias": True}, "attention_bias = True is not built: allowed is False or None"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' is not built"),
        ({"plt_num_loops": 0}, "n_loops = 0 is not allowed"),
        ({"num_key_value_heads": 3}, "a divisor of n_heads"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are iquestpltcoder, "),
    ],
)
def test_configurations_that_cannot_be_run(tmp_path, nothing_read, change, said):
    """A setting that would compute something else is refused by name."""
    folder = shutil.copytree(BUNDLED / "tiny-plt-2", tmp_path / "model")
    keys = json.loads((folder / "config.json").read_text()) | change
    keys = {key: value for key, value in keys.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(LoadError, match=rf"config\.json: .*{said}"):
        ld.load(folder)


# -- saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_embeddings": False},
        {"gate_input": "query", "norm_between_loops": False, "window": 1},
        {"embed_scale": 1.0, "carry_scale": 0.0, "n_loops": 1, "norm_eps": 1e-3, "rope_base": 77.0},
    ],
)
def test_a_parallel_loop_transformer_is_saved_in_its_released_layout(tmp_path, settings):
    """Configuration, weights and logits survive, under the released names; nothing but whole files is left."""
    model = small(**settings)
    model.save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "iquestpltcoder"
    stored = set(load_file(tmp_path / "model" / WEIGHTS))
    assert "model.layers.1.self_attn.plt_gate.bias" in stored
    assert ("lm_head.weight" in stored) == (not model.cfg.tie_embeddings)
    again = ld.load(tmp_path / "model")
    assert again.cfg == model.cfg
    assert_equal_states(again, model)
    assert torch.equal(again(IDS), model(IDS))
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", WEIGHTS]


SCALING = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_n_ctx=8)
OTHERS = {
    "no offset": {"offset": 0},
    "wide heads": {"d_head": 6},
    "stretched": {"rope_scaling": SCALING},
    "huginn": {"n_prelude": 2, "n_coda": 1, "embed_multiplier": 4.0, "initial_state": "random", "initial_std": 0.6}
    | {"offset": 0, "injection": "concat", "memory": "own", "norms": "pre_post", "norm_between_loops": False}
    | {"norm_before_coda": True, "qk_bias": True, "rope_pairs": "adjacent", "rope_table": True},
    "ouro": {"offset": 0, "injection": "none", "memory": "own", "norms": "sandwich", "exit_gate": True}
    | {"exit_threshold": 0.7, "tie_embeddings": False},
    "mixed": {"offset": 2, "gate_input": "query", "norms": "post", "n_coda": 2, "n_kv_heads": 4, "window": 2}
    | {"norm_between_loops": False, "rope_scaling": SCALING, "norm_eps": 1e-4},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_any_other_model_is_saved_in_our_own_layout(tmp_path, settings):
    """What no released layout can say comes back just the same."""
    model = small(**settings)
    save(model, tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    assert (keys["model_type"], keys["dtype"]) == ("loopdiag", "float32")
    again = ld.load(tmp_path)
    assert again.cfg == model.cfg
    assert_equal_states(again, model)
    assert torch.equal(again(IDS), model(IDS))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.parametrize(("keys", "tensors"), FILES.values(), ids=FILES)
def test_a_loaded_model_of_any_family_can_be_saved(tmp_path, keys, tensors):
    """The way from a released file to ours and back changes nothing."""
    write(tmp_path / "released", keys, tensors)
    model = ld.load(tmp_path / "released")
    model.save(tmp_path / "ours")
    again = ld.load(tmp_path / "ours")
    assert again.cfg == model.cfg
    assert_equal_states(again, model)


def test_the_stored_dtype_is_the_models_unless_another_is_asked_for(tmp_path):
    """Saving rounds nothing by itself."""
    for dtype in (torch.float64, torch.bfloat16):
        model = small().to(dtype)
        model.save(tmp_path)
        assert {x.dtype for x in load_file(tmp_path / WEIGHTS).values()} == {dtype}
        assert_equal_states(ld.load(tmp_path, dtype=dtype), model)


def test_the_stored_dtype_is_that_asked_for(tmp_path):
    """Weights are rounded, a table of rotations is not; another type is refused before a file is written."""
    model = small(**OTHERS["huginn"])
    model.save(tmp_path / "model", dtype="bfloat16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, x in load_file(tmp_path / "model" / WEIGHTS).items():
        assert x.dtype == (torch.float32 if name == "rope_table.table" else torch.bfloat16)
    assert_equal_states(ld.load(tmp_path / "model", dtype="bfloat16"), model.to(torch.bfloat16))
    with pytest.raises(InputError, match="dtype 'int8' is not allowed"):
        model.save(tmp_path / "other", dtype="int8")
    assert not (tmp_path / "other").exists()


def test_saving_replaces_a_model_whole(tmp_path, monkeypatch):
    """The new one in place of the old; when writing fails, the old one stays and nothing lies beside it."""
    small().save(tmp_path)
    model = small(n_loops=2, offset=0)
    model.save(tmp_path)
    assert_equal_states(ld.load(tmp_path), model)

    def failing(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        small(n_loops=5).save(tmp_path)
    assert_equal_states(ld.load(tmp_path), model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_saving_into_a_folder_with_shards_is_refused(tmp_path):
    """Its index would go on being read."""
    sharded(tmp_path, llama(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=rf"holds a model in several files \({INDEX}\): give another folder"):
        small().save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("settings", [{}, {"offset": 0}], ids=["released layout", "ours"])
def test_tokenizer_and_stop_tokens_are_saved_with_the_model(tmp_path, settings):
    """What is beside the weights comes back with them."""
    model = small(**settings)
    model.tokenizer, model.stop_tokens = word_tokenizer(), (7, 9)
    model.save(tmp_path)
    again = ld.load(tmp_path)
    assert again.stop_tokens == (7, 9)
    assert again.tokenizer("w3 w1 w4")["input_ids"] == [3, 1, 4]


def test_a_tokenizers_files_are_whole(tmp_path, monkeypatch):
    """A save that fails on the way leaves the files that were there as they were."""
    model = small()
    model.tokenizer = word_tokenizer()
    model.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def half(self, folder):
        with open(f"{folder}/tokenizer.json", "w") as file:
            file.write('{"half": ')
        raise OSError("disk full")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", half)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_stop_tokens_are_those_of_the_model_that_was_saved_last(tmp_path):
    """Saving over a released folder leaves no stop tokens of the model that was there."""
    llama(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    model = small()
    model.stop_tokens = (7,)
    model.save(tmp_path)
    assert ld.load(tmp_path).stop_tokens == (7,)


# -- dtypes -----------------------------------------------------------------------------------------


def test_dtypes_that_models_run_in():
    """By name or by type; float32 when nothing is said."""
    assert as_dtype(None) == as_dtype("float32") == as_dtype(torch.float32) == torch.float32
    assert as_dtype("bfloat16") == torch.bfloat16
    assert as_dtype(torch.float16) == as_dtype("float16") == torch.float16
    assert as_dtype("float64") == torch.float64
    for dtype in ("int8", torch.int8, "torch.float32", torch.float8_e4m3fn, "", 32, torch.complex64):
        with pytest.raises(InputError, match=r"is not allowed: use float32, float64, bfloat16, float16\."):
            as_dtype(dtype)


def test_a_dtype_that_models_do_not_run_in_is_refused_first(nothing_read):
    """Before anything is looked for."""
    with pytest.raises(InputError, match="dtype 'int8' is not allowed: use float32"):
        ld.load("no such model", dtype="int8")


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_rounded_as_torch_rounds_them(tmp_path, stored):
    """From every stored type to every type that models run in; float32 when nothing is said."""
    weights = {name: x.to(stored) for name, x in llama(tmp_path).items()}
    save_file(weights, tmp_path / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        held = ld.load(tmp_path, dtype=dtype).blocks[1].mlp.up_proj.weight
        assert held.dtype == (dtype or torch.float32)
        assert torch.equal(held, weights[name].to(dtype or torch.float32))


def test_tensors_of_one_file_may_differ_in_type(tmp_path):
    """As in checkpoints whose norms are kept in float32."""
    weights = llama(tmp_path)
    mixed = {name: x if x.ndim == 1 else x.bfloat16() for name, x in weights.items()}
    save_file(mixed, tmp_path / WEIGHTS)
    model = ld.load(tmp_path)
    assert torch.equal(model.ln_final.weight, weights["model.norm.weight"])
    assert torch.equal(model.embed.weight, mixed["model.embed_tokens.weight"].float())


def test_a_table_of_rotations_stays_in_float32(tmp_path):
    """However the model comes to another type, it computes the same."""
    weights = write(tmp_path, *FILES["huginn"])
    loaded, cast = ld.load(tmp_path, dtype="bfloat16"), ld.load(tmp_path).to(torch.bfloat16)
    for model in (loaded, cast, ld.load(tmp_path).bfloat16(), ld.load(tmp_path, dtype="float64"), cast.to("cpu")):
        assert model.rope_table.table.dtype == torch.float32
        assert torch.equal(model.rope_table.table, weights["freqs_cis"][0, :, 0])
    assert_equal_states(loaded, cast)
    assert torch.equal(loaded(IDS), cast(IDS))
    save_file(weights | {"freqs_cis": weights["freqs_cis"].bfloat16()}, tmp_path / WEIGHTS)
    assert ld.load(tmp_path, dtype="bfloat16").rope_table.table.dtype == torch.float32


# -- weights in one file and in several -------------------------------------------------------------


@pytest.mark.parametrize(("keys", "tensors"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("piece", [1, 300])
def test_reading_in_pieces_changes_nothing(tmp_path, monkeypatch, keys, tensors, piece):
    """Row by row, or a few rows at a time, also where several of our weights share a stored one."""
    write(tmp_path, keys, tensors)
    whole = ld.load(tmp_path)
    monkeypatch.setattr(loading, "PIECE", piece)
    assert_equal_states(ld.load(tmp_path), whole)


def test_no_more_than_a_piece_is_read_at_a_time(tmp_path, monkeypatch):
    """Rows of a large tensor come a few at a time, counted as float32."""
    write(tmp_path, *FILES["huginn"])
    taken = []
    real = loading.safe_open

    class Slice:
        def __init__(self, stored):
            self.stored = stored

        def __getattr__(self, name):
            return getattr(self.stored, name)

        def __getitem__(self, rows):
            piece = self.stored[rows]
            taken.append(piece.numel() * 4)
            return piece

    class File:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

    monkeypatch.setattr(loading, "safe_open", File)
    monkeypatch.setattr(loading, "PIECE", 512)
    model = ld.load(tmp_path)
    # A row of the widest tensor has 32 numbers; the table of rotations is one row in its file.
    assert sorted(set(taken))[-2:] == [512, model.rope_table.table.numel() * 4]


@pytest.mark.parametrize("family", ["llama", "huginn", "iquestpltcoder"])
def test_sharded_weights(tmp_path, family):
    """An index with several files reads as one file does, wherever a tensor stands."""
    weights = write(tmp_path, *FILES[family])
    whole = ld.load(tmp_path)
    sharded(tmp_path, weights, ("model-00001-of-00003.safetensors", "b.safetensors", "c.safetensors"))
    assert_equal_states(ld.load(tmp_path), whole)


def test_the_index_goes_before_a_single_file(tmp_path):
    """As in transformers' own order of a sharded download."""
    weights = llama(tmp_path)
    sharded(tmp_path, weights)
    save_file({name: torch.zeros_like(x) for name, x in weights.items()}, tmp_path / WEIGHTS)
    assert torch.equal(ld.load(tmp_path).embed.weight, weights["model.embed_tokens.weight"])


def test_a_shard_that_is_missing_or_damaged_is_named(tmp_path, nothing_read):
    """Before a weight of the other ones is read."""
    sharded(tmp_path, llama(tmp_path))
    content = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(LoadError, match=r"b\.safetensors is damaged, cut short or missing"):
        ld.load(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(content[:-1])
    with pytest.raises(LoadError, match=r"b\.safetensors is damaged, cut short or missing"):
        ld.load(tmp_path)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_file_that_is_cut_short(tmp_path, nothing_read, length):
    """Empty, in its header, and one byte before the end."""
    llama(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:length])
    with pytest.raises(LoadError, match=rf"{WEIGHTS} is damaged, cut short or missing"):
        ld.load(tmp_path)


@pytest.mark.parametrize(
    "stranger", ["../outside.safetensors", "/etc/outside.safetensors", "deep/outside.safetensors", "..", ""]
)
def test_an_index_that_points_out_of_its_folder(tmp_path, nothing_read, stranger):
    """A checkpoint says nothing about files elsewhere."""
    folder = tmp_path / "model"
    folder.mkdir()
    weights = llama(folder)
    save_file(weights, tmp_path / "outside.safetensors")
    (folder / "deep").mkdir()
    save_file(weights, folder / "deep" / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, stranger)}))
    said = rf"{INDEX} names '{re.escape(stranger)}': allowed are safetensors files of its own folder"
    with pytest.raises(LoadError, match=said):
        ld.load(folder)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": ["a.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"model.norm.weight": 3}}', "has no weight_map"),
        ('{"weight_map": {"model.norm.weight": ["a.safetensors"]}}', "has no weight_map"),
        ("[]", "holds a list"),
        ("{", "not readable as JSON"),
    ],
)
def test_an_index_that_is_none(tmp_path, nothing_read, index, said):
    """Refused by name, even beside a file that could be read."""
    llama(tmp_path)
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(LoadError, match=said):
        ld.load(tmp_path)


def test_an_index_of_nothing(tmp_path, nothing_read):
    """There is no file to be read."""
    llama(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(LoadError, match="missing"):
        ld.load(tmp_path)


def test_a_tensor_in_two_files(tmp_path, nothing_read):
    """Nobody could say which one counts."""
    weights = llama(tmp_path)
    sharded(tmp_path, weights)
    save_file(weights, tmp_path / "b.safetensors")
    with pytest.raises(LoadError, match=r"model\.\S+.* stand in more than one file"):
        ld.load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_not_read(tmp_path, nothing_read, name):
    """They can run code: the message says what to do instead."""
    weights = llama(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(LoadError, match=r"has no weights: model\.safetensors \(or its index\) is missing\.$"):
        ld.load(tmp_path)
    torch.save(weights, tmp_path / name)
    with pytest.raises(LoadError, match=rf"has no weights: .*{name} is a pickle, which can run code: convert it"):
        ld.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8, torch.bool], ids=str)
def test_quantised_weights_are_refused(tmp_path, nothing_read, dtype):
    """Their numbers mean nothing without scales: the tensor and its type are named."""
    weights = llama(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: torch.zeros(weights[name].shape, dtype=dtype)}, tmp_path / WEIGHTS)
    with pytest.raises(LoadError, match=rf"{name} is stored as \w+: allowed are F32, F64, BF16, F16 \(quantised"):
        ld.load(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused_before_any_is_read(tmp_path, nothing_read, change):
    """Which one, and what the configuration asks for; more than ten are counted."""
    weights = llama(tmp_path)
    if change == "missing":
        few, said = (
            {"model.norm.weight": weights["model.norm.weight"]},
            r"missing (\S+, ){9}\S+ and 10 more, unexpected",
        )
    elif change == "unexpected":
        few, said = weights | {"model.extra.weight": torch.zeros(3)}, r"missing none, unexpected model\.extra\.weight\."
    else:
        few = weights | {"lm_head.weight": torch.zeros(40, 17)}
        said = r"lm_head\.weight has shape \(40, 17\), but config\.json asks for \(40, 16\)"
    save_file(few, tmp_path / WEIGHTS)
    with pytest.raises(LoadError, match=said):
        ld.load(tmp_path)


# -- buffers that say nothing new -------------------------------------------------------------------

INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"
SPEEDS = 5000.0 ** (-torch.arange(0, 6, 2) / 6)  # of FILES["llama"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rotation_speeds_of_older_files_are_accepted(tmp_path, dtype):
    """Of every layer or of some, as exact as their type holds them; they change nothing."""
    weights = llama(tmp_path)
    alone = ld.load(tmp_path)
    for layers in ((0,), (0, 1)):
        save_file(weights | {INV_FREQ.format(n): SPEEDS.to(dtype).clone() for n in layers}, tmp_path / WEIGHTS)
        assert_equal_states(ld.load(tmp_path), alone)


@pytest.mark.parametrize("speeds", [SPEEDS * 1.05, SPEEDS * torch.tensor([1, 1, 0.9]), torch.zeros(3), SPEEDS[:2]])
def test_other_rotation_speeds_are_refused(tmp_path, speeds):
    """They were computed from another base."""
    weights = llama(tmp_path)
    save_file(weights | {INV_FREQ.format(1): speeds}, tmp_path / WEIGHTS)
    with pytest.raises(
        LoadError, match=r"layers\.1\.self_attn\.rotary_emb\.inv_freq (does not have the values|has shape)"
    ):
        ld.load(tmp_path)


def test_rotation_speeds_of_a_layer_that_is_not_there_are_refused(tmp_path):
    """As any other tensor too many."""
    save_file(llama(tmp_path) | {INV_FREQ.format(2): SPEEDS}, tmp_path / WEIGHTS)
    with pytest.raises(LoadError, match=r"unexpected model\.layers\.2\.self_attn\.rotary_emb\.inv_freq"):
        ld.load(tmp_path)


# -- tied heads -------------------------------------------------------------------------------------


def test_a_stored_copy_of_a_tied_head_is_accepted(tmp_path, monkeypatch):
    """Also when it is compared piece by piece, and stands in another file."""
    keys, tensors = FILES["llama tied"]
    weights = write(tmp_path, keys, tensors)
    alone = ld.load(tmp_path)
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(both, tmp_path / WEIGHTS)
    assert_equal_states(ld.load(tmp_path), alone)
    monkeypatch.setattr(loading, "PIECE", 200)
    assert_equal_states(ld.load(tmp_path), alone)
    sharded(tmp_path, both)
    assert_equal_states(ld.load(tmp_path), alone)


SAID = r"ties the head to the embedding, but lm_head\.weight is not model\.embed_tokens\.weight"


@pytest.mark.parametrize("piece", [2**26, 200])
@pytest.mark.parametrize("row", [0, 17, 39])
def test_another_head_than_the_one_it_is_tied_to_is_refused(tmp_path, monkeypatch, row, piece):
    """A single number in any row."""
    weights = write(tmp_path, *FILES["llama tied"])
    other = weights["model.embed_tokens.weight"].clone()
    other[row, 3] += 1e-3
    save_file(weights | {"lm_head.weight": other}, tmp_path / WEIGHTS)
    monkeypatch.setattr(loading, "PIECE", piece)
    with pytest.raises(LoadError, match=SAID):
        ld.load(tmp_path)


@pytest.mark.parametrize("shape", [(41, 16), (39, 16), (40, 8), (40,)])
def test_a_head_of_another_shape_than_the_one_it_is_tied_to_is_refused(tmp_path, nothing_read, shape):
    """Rows that happen to agree do not make it a copy."""
    weights = write(tmp_path, *FILES["llama tied"])
    save_file(weights | {"lm_head.weight": torch.zeros(shape)}, tmp_path / WEIGHTS)
    with pytest.raises(LoadError, match=r"lm_head\.weight has shape \(.*\), but config\.json asks for \(40, 16\)"):
        ld.load(tmp_path)


def test_a_head_of_another_type_than_the_one_it_is_tied_to_is_refused(tmp_path):
    """A copy in another type is other numbers."""
    weights = write(tmp_path, *FILES["llama tied"])
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].bfloat16()}, tmp_path / WEIGHTS)
    with pytest.raises(LoadError, match=SAID):
        ld.load(tmp_path)


def test_another_head_is_refused_before_any_weight_is_read(tmp_path, nothing_read):
    """As everything else that can be wrong with the files."""
    weights = write(tmp_path, *FILES["llama tied"])
    save_file(weights | {"lm_head.weight": torch.zeros(40, 16)}, tmp_path / WEIGHTS)
    with pytest.raises(LoadError, match=SAID):
        ld.load(tmp_path)


# -- the hub ----------------------------------------------------------------------------------------


# What repositories hold: first what is needed, then what is not.
PUBLISHED_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PUBLISHED = [
    *("config.json", "generation_config.json", INDEX, *PUBLISHED_SHARDS),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    *("modeling_x.py", "configuration_x.py", "tokenization_x.py", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("model.safetensors", "consolidated.safetensors", "original/model.safetensors", "model.pt", "optimizer.pth"),
    *("README.md", "training_args.bin", "LICENSE", "figure.png"),
]
NEEDED = 14


def test_a_hub_id_goes_through_the_hub_with_its_revision(tmp_path, monkeypatch):
    """`owner/name` is fetched at the revision asked for, then at its commit: what is needed and nothing else."""
    commit = tmp_path / ("a" * 40)
    sharded(commit, llama(commit), PUBLISHED_SHARDS)
    asked = []

    def fetched(repo_id, *, revision, allow_patterns, local_files_only):
        asked.append(
            (repo_id, revision, local_files_only, list(filter_repo_objects(PUBLISHED, allow_patterns=allow_patterns)))
        )
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert ld.load("somebody/some-llama", revision="v1").source == "somebody/some-llama"
    assert asked[0] == ("somebody/some-llama", "v1", False, ["config.json", "generation_config.json"])
    assert {repository for repository, *_ in asked} == {"somebody/some-llama"}
    assert {revision for _, revision, *_ in asked[1:]} == {commit.name}
    assert {local for *_, local, _ in asked} == {False}
    assert sorted(file for *_, files in asked for file in files) == sorted(PUBLISHED[:NEEDED])
    asked.clear()
    find("somebody/some-llama", local_files_only=True)
    assert asked == [("somebody/some-llama", None, True, ["config.json", "generation_config.json"])]


def test_a_bad_configuration_costs_no_download(tmp_path, monkeypatch):
    """A family that is not supported is refused before its weights are fetched."""
    llama(tmp_path, model_type="gpt2")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *_, allow_patterns, **__: asked.append(allow_patterns) or str(tmp_path),
    )
    with pytest.raises(LoadError, match="model_type 'gpt2' is not supported"):
        ld.load("somebody/some-gpt2")
    assert asked == [["config.json", "generation_config.json"]]


def test_a_hub_that_does_not_answer_is_told(monkeypatch):
    """One message with the reason, not the client's traceback."""

    def unreachable(*_, **__):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(LoadError, match=r"is no folder here, and the hub did not give it: OSError: no route to host$"):
        ld.load("somebody/some-plt")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub's cache as its client lays it out, with two revisions of a model; the branch names the second."""
    repository = tmp_path / "cache" / "models--somebody--some-llama"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for number, commit in enumerate(("a" * 40, "b" * 40), start=1):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        weights = llama(snapshot, hidden_act="silu", eos_token_id=number)
        save_file({name: x + number for name, x in weights.items()}, snapshot / WEIGHTS)
        for file in list(snapshot.iterdir()):
            blob = repository / "blobs" / f"{number}-{file.name}"
            file.rename(blob)
            file.symlink_to(f"../../blobs/{blob.name}")
    (repository / "refs" / "main").write_text("b" * 40)
    (repository / "refs" / "old").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_hub_id_from_the_cache_without_a_network(hub_cache, no_network):
    """The branch, a tag and a commit; what the cache does not hold is told."""
    for revision, number in ((None, 2), ("main", 2), ("old", 1), ("a" * 40, 1), ("b" * 40, 2)):
        model = ld.load("somebody/some-llama", revision=revision, local_files_only=True)
        assert model.stop_tokens == (number,)
        assert model.source == "somebody/some-llama"
    for name, revision in (("somebody/some-llama", "c" * 40), ("somebody/other", None)):
        with pytest.raises(LoadError, match=r"is no folder here, and the hub's cache does not hold it: \w+Error: "):
            ld.load(name, revision=revision, local_files_only=True)


def test_a_hub_id_while_offline(hub_cache, no_network, monkeypatch):
    """The client's own offline mode reads the cache, too."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert ld.load("somebody/some-llama").stop_tokens == (2,)
    with pytest.raises(LoadError, match="the hub did not give it"):
        ld.load("somebody/other")


def test_a_folder_goes_before_a_hub_id(tmp_path, monkeypatch, no_network):
    """`owner/name` that exists here is not fetched."""
    (tmp_path / "somebody").mkdir()
    llama(tmp_path / "somebody" / "some-llama")
    monkeypatch.chdir(tmp_path)
    assert ld.load("somebody/some-llama").cfg.n_loops == 1


# -- beside the weights -----------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}{% endfor %}"
TALK = [{"role": "user", "content": "w3 w4"}]


def tokenizer_files(folder, **settings):
    """A tokenizer of words beside the weights, with changed settings."""
    word_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("family", ["llama", "ouro", "huginn", "iquestpltcoder", "native"])
def test_a_tokenizer_comes_with_its_chat_template(tmp_path, family, file):
    """Wherever the template stands; the model may be one that transformers does not know."""
    write(tmp_path, *FILES[family])
    tokenizer_files(tmp_path, **({"chat_template": TEMPLATE} if file == "tokenizer_config.json" else {}))
    if file == "chat_template.jinja":
        (tmp_path / file).write_text(TEMPLATE)
    tokenizer = ld.load(tmp_path).tokenizer
    assert tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "<user> w3 w4"


@pytest.mark.parametrize(
    "tokenizer_class",
    [None, "PreTrainedTokenizerFast", "LlamaTokenizer", "Strange", "Qwen2Tokenizer"],
)
def test_tokenizer_json_says_how_text_is_cut(tmp_path, tokenizer_class):
    """Whatever class the settings name: tokens are those that the file itself gives."""
    llama(tmp_path)
    shutil.copy(BUNDLED / "tiny-plt-2" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    text = "def f(x):\n    return x + 12345  # naïve"
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert ld.load(tmp_path).tokenizer(text)["input_ids"] == expected


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Strange"}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_tokenizer_is_told(tmp_path, nothing_read, file, content):
    """One message that names the folder, no traceback of a parser, and before a weight is read."""
    llama(tmp_path)
    tokenizer_files(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(LoadError, match=str(tmp_path)):
        ld.load(tmp_path)


def test_no_tokenizer_is_no_obstacle(tmp_path):
    """A model without one can still be run on tokens."""
    llama(tmp_path)
    assert ld.load(tmp_path).tokenizer is None


def plant(folder, *names):
    """Files of code that leave a mark when they run."""
    mark = folder / "it-ran"
    for name in names:
        (folder / name).write_text(
            f"open({str(mark)!r}, 'w').close()\n"
            "from transformers import PretrainedConfig, PreTrainedTokenizerFast, PreTrainedModel\n"
            "class XConfig(PretrainedConfig):\n    model_type = 'x'\n"
            "class XTokenizer(PreTrainedTokenizerFast):\n    pass\n"
            "class XModel(PreTrainedModel):\n    pass\n"
        )
    return mark


CODE = ("configuration_x.py", "modeling_x.py", "tokenization_x.py")
AUTO_MAP = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
TOKENIZER_MAP = {"AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x.XTokenizer"]}


@pytest.mark.parametrize("tokenizer_class", ["XTokenizer", None])
@pytest.mark.parametrize("family", ["llama", "ouro", "nanbeige"])
def test_code_of_a_checkpoint_is_never_run(tmp_path, recwarn, family, tokenizer_class):
    """A tokenizer that wants its own class falls back to tokenizer.json; model and configuration are ours anyway."""
    keys, tensors = FILES[family]
    write(tmp_path, keys | {"auto_map": AUTO_MAP}, tensors)
    tokenizer_files(tmp_path, auto_map=TOKENIZER_MAP, tokenizer_class=tokenizer_class, chat_template=TEMPLATE)
    mark = plant(tmp_path, *CODE)
    model = ld.load(tmp_path)
    assert not mark.exists()
    assert not recwarn
    assert model.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert model.tokenizer.apply_chat_template(TALK, tokenize=False) == "<user> w3 w4"


@pytest.mark.parametrize("leftover", ["tokenizer_config.json", "tokenizer.model"])
def test_a_tokenizer_of_code_alone_is_told_and_left_out(tmp_path, leftover):
    """A warning, and the model without it."""
    llama(tmp_path, auto_map=AUTO_MAP)
    settings = {"auto_map": TOKENIZER_MAP, "tokenizer_class": "XTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if leftover == "tokenizer.model":
        (tmp_path / leftover).write_bytes(b"\x00no sentence pieces")
    mark = plant(tmp_path, *CODE)
    with pytest.warns(UserWarning, match="no tokenizer without running code of the checkpoint: "):
        model = ld.load(tmp_path)
    assert model.tokenizer is None
    assert not mark.exists()


def test_the_verbosity_of_transformers_is_left_as_it_was(tmp_path):
    """Also when its tokenizers fail."""
    from transformers.utils import logging

    llama(tmp_path)
    tokenizer_files(tmp_path, auto_map=TOKENIZER_MAP, tokenizer_class="XTokenizer")
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        ld.load(tmp_path)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, ()),
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [2, 5]}, None, (2, 5)),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": 2}, {"eos_token_id": 0}, (0,)),
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": None}, None, ()),
        ({}, {"eos_token_id": 7}, (7,)),
    ],
)
def test_stop_tokens(tmp_path, config, generation, expected):
    """generation_config.json goes before config.json."""
    llama(tmp_path, **config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ld.load(tmp_path).stop_tokens == expected


@pytest.mark.parametrize("wrong", ["x", 1.5, [1, "2"], [[1]], {"a": 1}, [None]])
def test_stop_tokens_that_are_none(tmp_path, nothing_read, wrong):
    """The file and what stands there."""
    llama(tmp_path, eos_token_id=wrong)
    with pytest.raises(LoadError, match=r"config\.json: eos_token_id = .* is not allowed"):
        ld.load(tmp_path)


def test_a_damaged_generation_config_is_told(tmp_path, nothing_read):
    """It is named."""
    llama(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(LoadError, match=r"generation_config\.json is not readable as JSON"):
        ld.load(tmp_path)
