"""Checkpoints as bad days bring them: each is refused by name before anything large is done, or loads right."""

import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from test_cli import run
from test_families import FILES, write

from loopdiag.model import LoadError, LoopedConfig
from loopdiag.model.config import COUNTS, MOST_PASSES
from loopdiag.model.loading import BUNDLED, load, read_config
from loopdiag.model.saving import INDEX, WEIGHTS

HUGE = (2**32, 10**18, 10**30, 10**400)
NUMBERLESS = (None, "", "x", [], [1], {}, {"a": 1}, [[[[]]]], True, False)
NO_SIZES = (*HUGE, *NUMBERLESS, -1, 0, 0.5, 1e308, math.nan, math.inf)
# What counts something in each family's files.
SIZES = {
    "llama": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "iquestpltcoder": ("plt_num_loops", "max_position_embeddings"),
    "iquestloopcoder": ("loop_num", "loop_window_size"),
    "ouro": ("total_ut_steps",),
    "huginn": (
        "n_embd",
        "n_heads",
        "mean_recurrence",
        "n_layers_in_recurrent_block",
        "intermediate_size",
        "block_size",
    ),
    "retrofitted": ("n_embd", "n_heads", "max_position_embeddings"),
    "nanbeige": ("num_loops", "num_hidden_layers"),
    "native": ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "n_ctx", "n_loops"),
}
NUMBERS = {
    "llama": ("rope_theta", "rms_norm_eps"),
    "iquestpltcoder": ("plt_emb_scale", "plt_hidden_scale"),
    "ouro": ("early_exit_threshold",),
    "huginn": ("rope_base", "norm_eps"),
}
NO_NUMBERS = ("x", [1], {"a": 1}, True, 10**400, math.nan, math.inf)
CASES = [
    *((family, key, value) for family, keys in SIZES.items() for key in keys for value in NO_SIZES),
    *((family, key, value) for family, keys in NUMBERS.items() for key in keys for value in NO_NUMBERS),
    *(("iquestpltcoder", "plt_window_size", value) for value in (*NO_SIZES, [64], [64, 1], [-5, 0], [10**18, 0])),
    *(("iquestpltcoder", "plt_gate_use_hidden_states", value) for value in (None, 1, "x", [1])),
    *(("ouro", "layer_types", value) for value in (3, "full_attention", [["full_attention"]], ["sliding"])),
    *(("retrofitted", "init_values", value) for value in (3, "x", [1], {"std": "x"}, {"embed_scale": 10**400})),
    *(("native", "rope_scaling", value) for value in (3, "x", [1], {"a": 1}, {"factor": 8.0})),
    *(("llama", "rope_scaling", value) for value in (3, "x", [1], {"a": 1}, {"type": "llama3"}, {"type": [1]})),
    *(("llama", "model_type", value) for value in (None, 3, [], "auto", "llama" * 10_000)),
    *(("native", "an_unknown_key", value) for value in (1, None)),
]


@pytest.fixture
def folder(tmp_path):
    """The plainest checkpoint there is."""
    write(tmp_path, *FILES["llama"])
    return tmp_path


@pytest.mark.parametrize("name", SIZES)
def test_a_configuration_of_other_things_than_sizes(tmp_path, name):
    """Refused when it is read, by the name of the file, in a message that fits on a screen."""
    mine = [(key, value) for of, key, value in CASES if of == name]
    assert len(mine) > 10
    for key, value in mine:
        keys = FILES[name][0] | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        with pytest.raises(LoadError, match=r"config\.json.*(allowed|not supported|missing|needs|argument)") as refused:
            read_config(tmp_path)
        assert len(str(refused.value)) < 1000, key


def test_as_many_configurations_as_were_promised():
    """With the other cases here and in the tests of data and results, more than 200 inputs."""
    assert len({(of, key, repr(value)) for of, key, value in CASES}) > 200


@pytest.mark.parametrize("name", COUNTS)
def test_every_count_has_a_largest_value(name):
    """Just inside is built, one more is refused with the range."""
    least, most = COUNTS[name]
    keys = FILES["native"][0]
    sizes = {key: value for key, value in keys.items() if key in COUNTS} | {"offset": 1, "memory": "own"}
    other = {"n_layers": {"n_loops": 1}, "n_loops": {"n_layers": 1}, "n_heads": {"n_kv_heads": 1}}
    inside = sizes | other.get(name, {}) | {name: most}
    if name == "n_kv_heads":
        inside["n_heads"] = most
    assert getattr(LoopedConfig(**inside), name) == most
    for wrong in (least - 1, most + 1):
        with pytest.raises(ValueError, match=rf"{name} = {wrong} is not allowed: .* from {least} to {most}\."):
            LoopedConfig(**inside | {name: wrong})


def test_layers_times_loops_are_bounded():
    """Hook points stand for each layer of each loop."""
    keys = {key: value for key, value in FILES["native"][0].items() if key in COUNTS} | {"n_layers": 2**9}
    assert LoopedConfig(**keys | {"n_loops": MOST_PASSES // 2**9}).n_layers == 2**9
    with pytest.raises(ValueError, match=rf"n_layers \* n_loops = 4608 is not allowed: .* at most {MOST_PASSES}"):
        LoopedConfig(**keys | {"n_loops": MOST_PASSES // 2**9 + 1})


TEXTS = {
    "empty": b"",
    "a number": b"3",
    "null": b"null",
    "a string": b'"llama"',
    "binary": bytes(range(256)),
    "utf-16": '{"model_type": "llama"}'.encode("utf-16"),
    "NUL": b"\0" * 100,
    "cut short": b'{"model_type": "llama", "vocab_size": 4',
    "nested without end": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a number of too many digits": b'{"vocab_size": ' + b"9" * 5_000 + b"}",
    "two objects": b"{}{}",
    "a trailing comma": b'{"a": 1,}',
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json"])
def test_a_file_that_is_no_json_object(folder, name, content):
    """Whichever of the three that are read it is."""
    (folder / name).write_bytes(content)
    with pytest.raises(LoadError, match=rf"{name} (is not readable as JSON|holds a)"):
        load(folder)


def test_a_giant_configuration_is_not_read(folder):
    """Five gigabytes that take no room on the disk."""
    with (folder / "config.json").open("wb") as file:
        file.truncate(5 * 2**30)
    with pytest.raises(LoadError, match=r"config\.json has 5,368,709,120 bytes: allowed are 67,108,864"):
        load(folder)


# -- weights ----------------------------------------------------------------------------------------


def test_flipped_bits_of_the_header(folder):
    """Every one is noticed: of its length, of the JSON, of names, types, shapes and places."""
    file = folder / WEIGHTS
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    draw = random.Random(0)
    for place in (*range(8), *draw.sample(range(8, 8 + length), 72)):
        bad = bytearray(good)
        bad[place] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(LoadError, match=rf"{WEIGHTS}|the weights do not fit"):
            load(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_weights_that_are_cut_short(folder, share):
    """At the length, in the header, in the tensors."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(LoadError, match=rf"{WEIGHTS} is damaged, cut short or missing"):
        load(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [18446744073709551615, 18446744073709551615], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": ' * 1000,
    ],
)
def test_headers_that_lie(folder, header):
    """About sizes and places, too."""
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(LoadError, match=rf"{WEIGHTS} is damaged|the weights do not fit"):
        load(folder)


@pytest.mark.parametrize("length", [2**32, 2**63, 2**64 - 1])
def test_headers_of_absurd_length(folder, length):
    """Refused without room being made for them."""
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + bytes(100))
    with pytest.raises(LoadError, match=rf"{WEIGHTS} is damaged"):
        load(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(folder, name, stored, value):
    """One among thousands; another one than it, or none, is no reason."""
    keys, _ = FILES["llama"]
    weights = {each: x.to(stored) for each, x in write(folder, *FILES["llama"]).items()}
    save_file(weights, folder / WEIGHTS)
    assert load(folder).cfg.d_model == keys["hidden_size"]
    weights[name][3, 5] = value
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(LoadError, match=rf"{WEIGHTS}: {name} holds numbers that are NaN or infinite as float32"):
        load(folder)


def test_a_weight_beyond_the_dtype_asked_for(folder):
    """What float16 cannot hold, others can; the message says so."""
    weights = write(folder, *FILES["llama"])
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(
        LoadError, match=r"model\.norm\.weight holds .* as float16: .* load them in float32 or bfloat16"
    ):
        load(folder, dtype="float16")
    assert load(folder, dtype="bfloat16").ln_final.weight[0].item() == pytest.approx(1e6, rel=0.01)


def test_a_model_that_says_tied_with_a_head_of_its_own(folder):
    """And one that says untied without one."""
    keys, _ = FILES["llama"]
    (folder / "config.json").write_text(json.dumps(keys | {"tie_word_embeddings": True}))
    with pytest.raises(LoadError, match=r"config\.json ties the head to the embedding, but lm_head\.weight is not"):
        load(folder)
    tied, tensors = FILES["llama tied"]
    write(folder, tied | {"tie_word_embeddings": False}, tensors)
    with pytest.raises(LoadError, match=r"missing lm_head\.weight"):
        load(folder)


STRANGERS = (
    *("../outside.safetensors", "/etc/passwd", "deep/inside.safetensors", "..", ".", "", "*", "?", "[a].safetensors"),
    *("pytorch_model.bin", "weights.pt", "model.safetensors\0", "a\\b.safetensors", "~/x.safetensors", "\ud800"),
    *("config.json", "x" * 5000, "file:///etc/passwd", "https://example.org/a.safetensors", "model.safetensors\n"),
)


@pytest.mark.parametrize("stranger", STRANGERS, ids=ascii)
def test_an_index_names_safetensors_of_its_folder_only(folder, stranger):
    """No way out, no pattern, no pickle."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": stranger}}))
    with pytest.raises(LoadError, match=r"allowed are safetensors files of its own folder, by their name"):
        load(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path), lambda path: None])
def test_a_shard_that_is_no_file(folder, make):
    """A pipe would be waited for."""
    make(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}))
    with pytest.raises(LoadError, match=r"a\.safetensors is damaged, cut short or missing"):
        load(folder)


def test_a_linked_file_is_what_it_leads_to(folder, tmp_path_factory):
    """The hub's cache consists of links; whatever stands behind one is read as safetensors or not at all."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "blob"
    os.rename(folder / WEIGHTS, elsewhere)
    os.symlink(elsewhere, folder / WEIGHTS)
    assert load(folder).cfg.n_loops == 1
    elsewhere.write_bytes(b"root:x:0:0:root:/root:/bin/sh\n" * 10)
    with pytest.raises(LoadError, match=rf"{WEIGHTS} is damaged"):
        load(folder)


PICKLE = b"cbuiltins\nopen\n(X\x06\x00\x00\x00opened\nX\x01\x00\x00\x00wtR."  # unpickled, it makes a file


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", WEIGHTS])
def test_a_pickle_is_never_opened(folder, monkeypatch, name):
    """Nor where it is called safetensors."""
    monkeypatch.chdir(folder)
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(PICKLE)
    with pytest.raises(LoadError, match=r"is a pickle, which can run code|is damaged"):
        load(folder)
    assert not (folder / "opened").exists()


BROKEN_TOKENIZERS = (b"", b"{", b"[]", b"null", b'{"model": {}}', b"\xff" * 50, b'{"version": "1.0", "model": 3}')


@pytest.mark.parametrize("content", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_told(folder, content):
    """By the folder's name, before a weight is read."""
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(LoadError, match="the tokenizer's files are damaged"):
        load(folder)


TEMPLATES = ("{% for %}", "{{ 1 / 0 }}", "{{ messages.__class__.__mro__ }}", "{{ raise_exception('no') }}")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_fails(tmp_path, template):
    """Whatever it tries: it runs in a sandbox, and what it was is told."""
    folder = shutil.copytree(BUNDLED / "tiny-plt-2", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    result = run("generate", folder, "hello", "--chat", "--quiet")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "its chat template fails (" in result.stderr


def test_a_prompt_that_is_no_unicode():
    """As a shell hands on bytes that are no UTF-8."""
    result = run("generate", "tiny-plt-2", "caf\udce9", "--quiet")
    assert result.exit_code == 2
    assert "The prompt is not valid Unicode" in result.stderr


MEMORY = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from pathlib import Path
from loopdiag.model.loading import LoadError, load
for folder in sorted(Path(sys.argv[2]).iterdir()):
    start = time.monotonic()
    try:
        load(folder)
        print(folder.name, "loaded")
    except LoadError:
        print(folder.name, "refused", time.monotonic() - start < 10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_absurd_sizes_take_neither_time_nor_memory(tmp_path):
    """In a process that cannot have more: the largest that a configuration may say, beside files of other shapes."""
    sizes = {"vocab_size": 2**24, "hidden_size": 2**18, "intermediate_size": 2**20, "head_dim": 2**14}
    cases = [{key: value} for key, value in sizes.items()] + [sizes | {"num_attention_heads": 2**12}]
    cases += [{"num_hidden_layers": 512}, *({key: 10**15} for key in sizes)]
    for number, changes in enumerate([{}, *cases]):
        folder = tmp_path / f"{number:02}"
        folder.mkdir()
        write(folder, *FILES["llama"])
        (folder / "config.json").write_text(json.dumps(FILES["llama"][0] | changes))
    command = [sys.executable, "-c", MEMORY, str(16 * 2**30), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    *told, peak = said.stdout.splitlines()
    assert told == ["00 loaded", *(f"{number:02} refused True" for number in range(1, len(cases) + 1))]
    assert int(peak) < 4 * 2**30
