"""Each family's file: names, settings, defaults, refusals; and the two families that transformers can check."""

import json
import math

import pytest
import torch
import transformers.modeling_rope_utils as rope_utils
import transformers.models.llama.modeling_llama as modeling_llama
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import loopdiag as ld
from loopdiag.model.checkpoints import FAMILIES, family_of
from loopdiag.model.checkpoints.common import Rows
from loopdiag.model.config import LoopedConfig, RopeScaling
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.layers import _angles
from loopdiag.model.loading import LoadError, read_config

V, WIDTH, HIDDEN, HEADS, KV, D = 40, 16, 24, 4, 2, 6  # d_head is not d_model / n_heads
IDS = torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(3))

# -- what each family's files say, written down by hand ---------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": D,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
PLT = LLAMA | {
    "model_type": "iquestpltcoder",
    "plt_num_loops": 3,
    "plt_window_size": [8, 0],
    "plt_normalize_per_loop": True,
    "plt_emb_scale": 0.7,
    "plt_hidden_scale": 0.05,
    "plt_gate_use_hidden_states": True,
}
LOOPCODER = LLAMA | {"model_type": "iquestloopcoder", "loop_num": 2, "loop_window_size": 8}
OURO = LLAMA | {
    "model_type": "ouro",
    "total_ut_steps": 4,
    "early_exit_threshold": 0.9,
    "use_sliding_window": False,
    "layer_types": ["full_attention"] * 2,
}
NANBEIGE = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {
    "model_type": "nanbeige",
    "kv_channels": D,
    "num_loops": 2,
    "loop_loss_weights": [],
    "skip_loop_final_norm": False,
    "enable_mhc": False,
}
HUGINN = {
    "model_type": "huginn_raven",
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 64,
    "injection_type": "linear",
    "intermediate_size": HIDDEN,
    "mean_recurrence": 3,
    "mlp_class_name": "GatedMLP",
    "n_embd": WIDTH,
    "n_heads": HEADS,
    "n_layers_in_coda": 1,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 2,
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-6,
    "padded_vocab_size": V,
    "qk_bias": True,
    "rope_base": 50000,
    "state_init": "like-init",
    "tie_embeddings": True,
    "vocab_size": V - 3,
}
RETROFITTED = HUGINN | {
    "init_values": {"embed_scale": 1.0, "std": 0.02},
    "max_position_embeddings": 64,
    "norm_eps": 1e-5,
    "num_key_value_heads": KV,
    "qk_bias": False,
    "rope_theta": 500000.0,
    "tie_embeddings": False,
}
NATIVE = {
    "model_type": "loopdiag",
    "vocab_size": V,
    "d_model": WIDTH,
    "n_layers": 1,
    "n_heads": HEADS,
    "n_kv_heads": KV,
    "d_head": D,
    "d_mlp": HIDDEN,
    "n_ctx": 64,
    "n_loops": 2,
    "n_coda": 1,
    "norms": "post",
    "memory": "own",
    "offset": 2,
}


LLAMA3_KEYS = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 128,
}


def llama_tensors(layer=(), model=(), tied=False):
    """Names and shapes of a Llama stack of two layers, and whatever else its layers and the model hold."""
    parts = {
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
        "self_attn.q_proj.weight": (HEADS * D, WIDTH),
        "self_attn.k_proj.weight": (KV * D, WIDTH),
        "self_attn.v_proj.weight": (KV * D, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, HEADS * D),
        "mlp.gate_proj.weight": (HIDDEN, WIDTH),
        "mlp.up_proj.weight": (HIDDEN, WIDTH),
        "mlp.down_proj.weight": (WIDTH, HIDDEN),
    } | dict(layer)
    whole = {"model.embed_tokens.weight": (V, WIDTH), "model.norm.weight": (WIDTH,)} | dict(model)
    if not tied:
        whole["lm_head.weight"] = (V, WIDTH)
    return whole | {f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in parts.items()}


def raven_tensors(norms, kv, bias=False, tied=False, table=False):
    """Names and shapes of prelude, core and coda in Raven's code base; here d_head is d_model / n_heads."""
    head = WIDTH // HEADS
    parts = {
        **{f"norm_{n}.weight": (WIDTH,) for n in norms},
        "attn.Wqkv.weight": ((HEADS + 2 * kv) * head, WIDTH),
        "attn.proj.weight": (WIDTH, WIDTH),
        "mlp.fc.weight": (2 * HIDDEN, WIDTH),
        "mlp.proj.weight": (WIDTH, HIDDEN),
    }
    if bias:
        parts["attn.qk_bias"] = (2, 1, HEADS, head)
    whole = {
        "transformer.wte.weight": (V, WIDTH),
        "transformer.adapter.weight": (WIDTH, 2 * WIDTH),
        "transformer.ln_f.weight": (WIDTH,),
    }
    if table:
        whole["freqs_cis"] = (1, 64, 1, head // 2, 2)
    if not tied:
        whole["lm_head.weight"] = (V, WIDTH)
    stages = ("prelude.0", "core_block.0", "core_block.1", "coda.0")
    return whole | {f"transformer.{stage}.{name}": shape for stage in stages for name, shape in parts.items()}


NATIVE_LAYER = {
    "ln1_post.weight": (WIDTH,),
    "ln2_post.weight": (WIDTH,),
    "attn.q_proj.weight": (HEADS * D, WIDTH),
    "attn.k_proj.weight": (KV * D, WIDTH),
    "attn.v_proj.weight": (KV * D, WIDTH),
    "attn.o_proj.weight": (WIDTH, HEADS * D),
    "mlp.gate_proj.weight": (HIDDEN, WIDTH),
    "mlp.up_proj.weight": (HIDDEN, WIDTH),
    "mlp.down_proj.weight": (WIDTH, HIDDEN),
}
HIDDEN_GATE = {
    "self_attn.plt_gate.weight": (HEADS, WIDTH),
    "self_attn.plt_gate.bias": (HEADS,),
    "self_attn.plt_gate.gate_norm.weight": (WIDTH,),
}
QUERY_GATE = {"self_attn.plt_gate.weight": (HEADS, D), "self_attn.plt_gate.bias": (HEADS,)}
LOOP_GATES = {
    f"model.gate_projections.{n}.{part}": s for n in (0, 1) for part, s in (("weight", (4, 6)), ("bias", (4,)))
}
EXIT_GATE = {"model.early_exit_gate.weight": (1, WIDTH), "model.early_exit_gate.bias": (1,)}
TWO_NORMS = {"input_layernorm_2.weight": (WIDTH,), "post_attention_layernorm_2.weight": (WIDTH,)}
TIED = {"tie_word_embeddings": True}

# Keys, and the tensors that must stand beside them.
FILES = {
    "llama": (LLAMA, llama_tensors()),
    "llama tied": (LLAMA | TIED, llama_tensors(tied=True)),
    "iquestpltcoder": (PLT, llama_tensors(HIDDEN_GATE)),
    "iquestpltcoder query tied": (
        PLT | {"plt_gate_use_hidden_states": False} | TIED,
        llama_tensors(QUERY_GATE, tied=True),
    ),
    "iquestloopcoder": (LOOPCODER, llama_tensors(model=LOOP_GATES)),
    "ouro": (OURO, llama_tensors(TWO_NORMS, EXIT_GATE)),
    "ouro tied": (OURO | TIED, llama_tensors(TWO_NORMS, EXIT_GATE, tied=True)),
    "nanbeige": (NANBEIGE, llama_tensors()),
    "huginn": (HUGINN, raven_tensors((1, 2, 3, 4), HEADS, bias=True, tied=True, table=True)),
    "huginn plain": (
        HUGINN | {"qk_bias": False, "tie_embeddings": False, "num_key_value_heads": KV},
        raven_tensors((1, 2, 3, 4), KV, table=True),
    ),
    "retrofitted": (RETROFITTED, raven_tensors((1, 2), KV)),
    "native": (
        NATIVE,
        {"embed.weight": (V, WIDTH), "ln_final.weight": (WIDTH,)}
        | {f"{stage}.0.{name}": shape for stage in ("blocks", "coda_blocks") for name, shape in NATIVE_LAYER.items()},
    ),
}
EVERY_FILE = pytest.mark.parametrize(("keys", "tensors"), FILES.values(), ids=FILES)


def write(folder, keys, tensors):
    """A checkpoint; tensors are given, or drawn where only their shape is."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: x if isinstance(x, torch.Tensor) else torch.randn(x, generator=generator) for name, x in tensors.items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(weights, folder / "model.safetensors")
    return weights


def said(tmp_path, keys):
    """The configuration that keys describe, through the file."""
    (tmp_path / "config.json").write_text(json.dumps(keys))
    return read_config(tmp_path)[0]


def refusal(tmp_path, keys):
    with pytest.raises(LoadError) as error:
        said(tmp_path, keys)
    return str(error.value)


# -- names ------------------------------------------------------------------------------------------


def test_every_family_is_here():
    """A family that is added must be written down above."""
    assert {family_of(keys) for keys, _ in FILES.values()} == set(FAMILIES)


@EVERY_FILE
def test_names_cover_the_model_and_the_file_exactly(keys, tensors):
    """One source for every weight and buffer, and of every stored tensor each row once."""
    family = family_of(keys)
    cfg = family.read_config(keys)
    with torch.device("meta"):
        held = LoopedLM(cfg).state_dict()
    names = family.weight_names(cfg) if hasattr(family, "weight_names") else {name: name for name in held}
    assert set(names) - ({"head.weight"} if cfg.tie_embeddings else set()) == set(held)
    rows = {}
    for ours, like in held.items():
        source = names[ours]
        if isinstance(source, Rows):
            assert tensors[source.name] == source.shape
            rows.setdefault(source.name, []).append((source.start, source.stop))
            kept = (source.stop - source.start, *source.shape[1:])
            assert math.prod(kept) == like.numel()
        else:
            assert tensors[source] == tuple(like.shape)
            rows.setdefault(source, []).append((0, tensors[source][0]))
    assert set(rows) == set(tensors)
    for name, taken in rows.items():
        ends = [0, *(stop for _, stop in sorted(taken))]
        assert [start for start, _ in sorted(taken)] == ends[:-1], name
        assert ends[-1] == tensors[name][0], name


@EVERY_FILE
def test_every_missing_strange_or_misshapen_tensor_is_named(tmp_path, keys, tensors):
    """Exact coverage, tensor by tensor; and the whole file loads."""
    weights = write(tmp_path, keys, tensors)
    assert ld.load(tmp_path)(IDS[:1, :3]).isfinite().all()
    file = tmp_path / "model.safetensors"
    for name in tensors:
        save_file({other: x for other, x in weights.items() if other != name}, file)
        with pytest.raises(LoadError) as error:
            ld.load(tmp_path)
        assert f"missing {name}, unexpected none" in str(error.value)
    for name in (f"{next(iter(tensors))}_2", "model.layers.7.self_attn.q_proj.weight", "head.weight"):
        save_file(weights | {name: torch.zeros(2)}, file)
        with pytest.raises(LoadError) as error:
            ld.load(tmp_path)
        assert f"missing none, unexpected {name}." in str(error.value)
    for name, x in weights.items():
        save_file(weights | {name: torch.zeros(x.shape[0] + 1, *x.shape[1:])}, file)
        with pytest.raises(LoadError, match=rf"{name} has shape \({x.shape[0] + 1},.*asks for \({x.shape[0]},"):
            ld.load(tmp_path)


@EVERY_FILE
def test_stored_rows_arrive_where_they_belong(tmp_path, keys, tensors):
    """q before k before v, gate before up, bias 0 for queries: by value, from the stored tensors."""
    weights = write(tmp_path, keys, tensors)
    held = ld.load(tmp_path).state_dict()
    for name, x in weights.items():
        place, _, part = name.removeprefix("transformer.").partition(".attn.")
        place = (
            place.replace("core_block", "blocks").replace("prelude", "prelude_blocks").replace("coda", "coda_blocks")
        )
        head = WIDTH // HEADS
        if part == "Wqkv.weight":
            n_kv = (x.shape[0] // head - HEADS) // 2
            split = x.split([HEADS * head, n_kv * head, n_kv * head])
            expected = dict(zip((f"{place}.attn.{p}_proj.weight" for p in "qkv"), split, strict=True))
        elif part == "qk_bias":
            expected = {f"{place}.attn.{p}_proj.bias": x[i].flatten() for i, p in enumerate("qk")}
        elif name.endswith("mlp.fc.weight"):
            stage = place.removesuffix(".mlp.fc.weight")
            expected = {f"{stage}.mlp.gate_proj.weight": x[:HIDDEN], f"{stage}.mlp.up_proj.weight": x[HIDDEN:]}
        elif name == "freqs_cis":
            expected = {"rope_table.table": x[0, :, 0]}
        else:
            continue
        for ours, value in expected.items():
            assert torch.equal(held[ours], value), ours


def test_a_model_type_that_two_families_share():
    """Raven's code base: Llama's RoPE key tells models cut out of a Llama from Huginn."""
    assert family_of(HUGINN).__name__.endswith(".huginn")
    assert family_of(RETROFITTED).__name__.endswith(".retrofitted")
    assert family_of(HUGINN | {"rope_parameters": {"rope_theta": 1e4}}).__name__.endswith(".retrofitted")


@pytest.mark.parametrize("keys", [{}, {"model_type": "gpt2"}, {"model_type": None}, {"model_type": ["llama"]}])
def test_an_unknown_family_is_told_which_there_are(tmp_path, keys):
    """The message says what came and lists every supported model type once."""
    message = refusal(tmp_path, keys)
    assert f"model_type {keys.get('model_type')!r} is not supported" in message
    for family in FAMILIES:
        assert message.count(f" {family.MODEL_TYPE}") == 1


# -- settings ---------------------------------------------------------------------------------------

LLAMA_LIKE = {"llama": LLAMA, "iquestpltcoder": PLT, "iquestloopcoder": LOOPCODER, "ouro": OURO, "nanbeige": NANBEIGE}
NOT_BUILT = [
    *((keys, {"attention_bias": True}) for keys in LLAMA_LIKE.values()),
    *((keys, {"mlp_bias": True}) for keys in LLAMA_LIKE.values()),
    *((keys, {"hidden_act": "gelu"}) for keys in LLAMA_LIKE.values()),
    *(
        (LLAMA, {key: {name: kind, "factor": 2.0}})
        for key in ("rope_scaling", "rope_parameters")
        for name in ("type", "rope_type")
        for kind in ("linear", "dynamic", "yarn", "longrope")
    ),
    *((keys, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}) for keys in LLAMA_LIKE.values()),
    (RETROFITTED, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    (PLT, {"plt_window_size": [8, 8]}),
    (PLT, {"plt_window_size": [8, -1]}),
    (OURO, {"use_sliding_window": True}),
    (OURO, {"layer_types": ["full_attention", "sliding_attention"]}),
    (NANBEIGE, {"enable_hyper_connection": True}),
    (NANBEIGE, {"enable_mhc": True}),
    (NANBEIGE, {"enable_double_loop_split": True}),
    (NANBEIGE, {"loop_middle_layers": [1]}),
    (NANBEIGE, {"loop_middle_layers": 1}),
    (NANBEIGE, {"loop_share_kv": True}),
    (NANBEIGE, {"enable_depth_attention": True}),
    (NANBEIGE, {"emb_neighbor_num": 2}),
    (NANBEIGE, {"qk_layernorm": True}),
    (NANBEIGE, {"enable_whatever_comes_next": 1}),
    (HUGINN, {"bias": True}),
    (HUGINN, {"injection_type": "add"}),
    (HUGINN, {"state_init": "zero"}),
    (HUGINN, {"nonlin_name": "GELU"}),
    (HUGINN, {"block_class_name": "TransformerPreNormBlock"}),
    (HUGINN, {"mlp_class_name": "BaseMLP"}),
    (HUGINN, {"norm_class_name": "LayerNorm"}),
    (HUGINN, {"test_time_noise": 0.1}),
    (RETROFITTED, {"qk_bias": True}),
    (RETROFITTED, {"injection_type": "add"}),
    (RETROFITTED, {"bias": True}),
]


@pytest.mark.parametrize(
    ("keys", "change"), NOT_BUILT, ids=[f"{keys['model_type']}-{json.dumps(change)}" for keys, change in NOT_BUILT]
)
def test_what_is_not_built_is_refused_by_name(tmp_path, keys, change):
    """A setting that would compute something else: the message has the key and what came."""
    message = refusal(tmp_path, keys | change)
    (key, value), *_ = change.items()
    assert str(tmp_path / "config.json") in message
    if key.startswith("rope_"):
        assert repr(value.get("type", value.get("rope_type"))) in message
        assert "rope_scaling" in message
    else:
        assert f"{key} = {value!r}" in message
    assert "allowed is" in message or "allowed are" in message


@pytest.mark.parametrize("off", [False, None])
def test_what_is_switched_off_is_no_obstacle(tmp_path, off):
    """Released files name many settings that they do not use."""
    for keys in LLAMA_LIKE.values():
        switched_off = {"attention_bias": off, "mlp_bias": off, "rope_scaling": None, "use_sliding_window": off}
        assert said(tmp_path, keys | switched_off) == said(tmp_path, keys)
    unused = {"enable_mhc": off, "loop_share_kv": off, "loop_middle_layers": [], "emb_neighbor_num": 0}
    assert said(tmp_path, NANBEIGE | unused) == said(tmp_path, NANBEIGE)
    assert said(tmp_path, HUGINN | {"bias": off}) == said(tmp_path, HUGINN)


REQUIRED_LLAMA = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
REQUIRED_RAVEN = (
    *("n_embd", "n_heads", "n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda"),
    *("intermediate_size", "mean_recurrence", "norm_eps", "tie_embeddings"),
)
REQUIRED = [
    *((keys, key) for keys in LLAMA_LIKE.values() for key in REQUIRED_LLAMA),
    *(
        (keys, key)
        for keys in LLAMA_LIKE.values()
        for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings")
        if keys is not LLAMA
    ),
    (LOOPCODER, "loop_num"),
    (LOOPCODER, "loop_window_size"),
    (OURO, "total_ut_steps"),
    (NANBEIGE, "num_loops"),
    *((HUGINN, key) for key in (*REQUIRED_RAVEN, "block_size", "rope_base", "qk_bias")),
    *((RETROFITTED, key) for key in (*REQUIRED_RAVEN, "max_position_embeddings")),
]


@pytest.mark.parametrize(
    ("keys", "key"),
    REQUIRED,
    ids=[f"{'retro-' * (keys is RETROFITTED)}{keys['model_type']}-{k}" for keys, k in REQUIRED],
)
def test_a_missing_key_is_named_with_its_family(tmp_path, keys, key):
    """No size is guessed."""
    message = refusal(tmp_path, {name: value for name, value in keys.items() if name != key})
    assert f"the key '{key}' is missing; {keys['model_type']} needs it" in message


def test_a_missing_vocabulary_of_huginn(tmp_path):
    """`vocab_size` stands in for `padded_vocab_size`, and nothing for both."""
    keys = {name: value for name, value in HUGINN.items() if name != "padded_vocab_size"}
    assert said(tmp_path, keys).vocab_size == V - 3
    assert said(tmp_path, HUGINN).vocab_size == V
    del keys["vocab_size"]
    assert "'vocab_size' is missing; huginn_raven needs it" in refusal(tmp_path, keys)


def test_an_unknown_key_of_our_own_layout_is_refused(tmp_path):
    """A field of another version would silently mean its default."""
    assert "unknown keys ['windw']" in refusal(tmp_path, NATIVE | {"windw": 3})
    assert said(tmp_path, NATIVE | {"dtype": "float32", "eos_token_id": 3}) == said(tmp_path, NATIVE)


@pytest.mark.parametrize("keys", [LLAMA, OURO, RETROFITTED], ids=["llama", "ouro", "retrofitted"])
@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        LLAMA3_KEYS | {"partial_rotary_factor": 0.5},
    ],
    ids=["by layer type", "partial", "partial llama3"],
)
def test_a_rotary_embedding_of_another_kind_is_refused(tmp_path, keys, rope):
    """RoPE by layer type, or of a part of each head, is not built: never a silent default."""
    assert "rope_parameters" in refusal(tmp_path, keys | {"rope_parameters": rope})


def test_huginn_with_biases_and_grouped_queries_is_refused(tmp_path):
    """One bias [2, 1, n_heads, d_head] fits no keys of fewer heads: refused before weights are read."""
    keys = HUGINN | {"num_key_value_heads": KV}
    write(tmp_path, keys, raven_tensors((1, 2, 3, 4), KV, bias=True, tied=True, table=True))
    with pytest.raises(LoadError, match="num_key_value_heads"):
        ld.load(tmp_path)


@pytest.mark.parametrize("window", [64, [64], [64, 0, 0], [8, 8], [8, -1], ["8", 0], [-1, 0], None, "64"])
def test_a_window_that_is_none(tmp_path, window):
    """`[n, 0]` and nothing else."""
    assert "window" in refusal(tmp_path, PLT | {"plt_window_size": window})


MALFORMED = [
    (PLT, {"plt_emb_scale": "large"}),
    (LLAMA, {"rope_theta": "large"}),
    (LLAMA, {"rope_scaling": "linear"}),
    (LLAMA, {"hidden_size": None, "head_dim": None}),
    (NANBEIGE, {"loop_loss_weights": 3}),
]


@pytest.mark.parametrize(("keys", "change"), MALFORMED, ids=[json.dumps(change) for _, change in MALFORMED])
def test_a_value_of_the_wrong_kind_is_refused(tmp_path, keys, change):
    """One message with the file, not a traceback."""
    assert str(tmp_path / "config.json") in refusal(tmp_path, keys | change)


@pytest.mark.parametrize(("keys", "change"), MALFORMED, ids=[json.dumps(change) for _, change in MALFORMED])
def test_a_value_of_the_wrong_kind_is_named(tmp_path, keys, change):
    """The message says which key."""
    assert next(iter(change)) in refusal(tmp_path, keys | change)


@pytest.mark.parametrize("key", ["vocab_size", "n_loops", "d_model"])
def test_a_missing_key_of_our_own_layout_is_named(tmp_path, key):
    """Fields without a default are required."""
    assert f"'{key}'" in refusal(tmp_path, {name: value for name, value in NATIVE.items() if name != key})


def test_a_missing_key_of_our_own_layout_is_named_with_its_family(tmp_path):
    """In the same words as for any other family."""
    keys = {name: value for name, value in NATIVE.items() if name != "n_loops"}
    assert "the key 'n_loops' is missing; loopdiag needs it" in refusal(tmp_path, keys)


def test_configurations_of_every_family(tmp_path):
    """Every field that a family sets, against the formulas of its release; the rest is as in `LoopedConfig`."""
    sizes = {"vocab_size": V, "d_model": WIDTH, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KV, "d_head": D}
    sizes |= {"d_mlp": HIDDEN, "n_ctx": 64, "rope_base": 5000.0, "norm_eps": 1e-5, "tie_embeddings": False}
    plain = {"offset": 0, "injection": "none", "memory": "own"}
    raven = sizes | {"d_head": 4, "n_prelude": 1, "n_coda": 1, "n_loops": 3, "initial_state": "random", "offset": 0}
    raven |= {"injection": "concat", "memory": "own", "norm_between_loops": False}
    expected = {
        "llama": sizes | plain | {"n_loops": 1, "norm_between_loops": False},
        "iquestpltcoder": sizes | {"n_loops": 3, "window": 9, "embed_scale": 0.7, "carry_scale": 0.05},
        "iquestloopcoder": sizes
        | {"n_loops": 2, "window": 8, "offset": 0, "injection": "none", "gate_input": "query"}
        | {"norm_between_loops": False},
        "ouro": sizes | plain | {"n_loops": 4, "norms": "sandwich", "exit_gate": True, "exit_threshold": 0.9},
        "nanbeige": sizes | plain | {"n_loops": 2},
        "huginn": raven
        | {"n_kv_heads": HEADS, "embed_multiplier": 4.0, "initial_std": math.sqrt(0.4), "norms": "pre_post"}
        | {"norm_before_coda": True, "qk_bias": True, "rope_base": 50000.0, "rope_pairs": "adjacent"}
        | {"rope_table": True, "norm_eps": 1e-6, "tie_embeddings": True},
        "retrofitted": raven | {"initial_std": 0.02, "rope_base": 500000.0},
    }
    for name, settings in expected.items():
        assert said(tmp_path, FILES[name][0]) == LoopedConfig(**settings), name


def test_what_a_missing_key_means(tmp_path):
    """The defaults of the releases."""

    def without(keys, *names):
        return said(tmp_path, {name: value for name, value in keys.items() if name not in names})

    plt = without(PLT, *(key for key in PLT if key.startswith("plt_")))
    assert (plt.n_loops, plt.window, plt.norm_between_loops) == (2, 65, True)
    assert (plt.embed_scale, plt.carry_scale, plt.gate_input) == (1.0, 1.0, "query")
    null = said(tmp_path, PLT | {"plt_emb_scale": None, "plt_hidden_scale": None})
    assert (null.embed_scale, null.carry_scale) == (1.0, 1.0)
    zero = said(tmp_path, PLT | {"plt_emb_scale": 0, "plt_hidden_scale": 0.0})
    assert (zero.embed_scale, zero.carry_scale) == (0.0, 0.0)

    assert without(OURO, "early_exit_threshold").exit_threshold == 1.0
    assert said(tmp_path, OURO | {"early_exit_threshold": None}).exit_threshold == 1.0
    assert without(OURO, "use_sliding_window", "layer_types") == said(tmp_path, OURO)

    assert said(tmp_path, NANBEIGE | {"loop_loss_weights": [0.1, 0.2], "num_loops": 7}).n_loops == 3
    assert without(NANBEIGE | {"loop_loss_weights": [0.1]}, "num_loops").n_loops == 2
    assert without(NANBEIGE, "loop_loss_weights", "skip_loop_final_norm") == said(tmp_path, NANBEIGE)
    assert not said(tmp_path, NANBEIGE | {"skip_loop_final_norm": True}).norm_between_loops
    assert said(tmp_path, NANBEIGE | {"head_dim": 8}).d_head == 8

    no_init = without(RETROFITTED, "init_values")
    assert (no_init.embed_multiplier, no_init.initial_std) == (4.0, pytest.approx(math.sqrt(0.4)))
    scaled = said(tmp_path, RETROFITTED | {"init_values": {"embed_scale": 3.0, "std": 0.5}})
    assert (scaled.embed_multiplier, scaled.initial_std) == (3.0, 1.5)


def test_missing_llama_keys_mean_what_transformers_says(tmp_path):
    """Sizes aside, a key that is left out has the default of transformers' own configuration."""
    keys = {key: LLAMA[key] for key in (*REQUIRED_LLAMA, "model_type")}
    theirs = LlamaConfig(**keys)
    ours = said(tmp_path, keys)
    assert ours.rope_base == theirs.rope_parameters["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.n_ctx == theirs.max_position_embeddings
    assert (ours.n_kv_heads, ours.d_head) == (theirs.num_key_value_heads, theirs.head_dim)
    assert said(tmp_path, keys | {"num_key_value_heads": None, "head_dim": None}) == ours


def test_rotary_keys_of_either_generation(tmp_path):
    """`rope_parameters` of transformers 5 overrule `rope_theta`; a base may stand beside or inside the scaling."""
    bare = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.5, high_freq_factor=5.0, original_n_ctx=128)
    for keys, base, stretched in (
        (bare | {"rope_theta": 7.0}, 7.0, None),
        (bare | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        (bare | {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0}, 7.0, None),
        (bare | {"rope_theta": 8.0, "rope_scaling": {"type": "default"}}, 8.0, None),
        (bare | {"rope_parameters": LLAMA3_KEYS}, 500.0, scaling),
        (bare | {"rope_theta": 8.0, "rope_scaling": LLAMA3}, 8.0, scaling),
        (bare | {"rope_theta": 8.0, "rope_scaling": {"type": "llama3"} | LLAMA3}, 8.0, scaling),
        (bare | {"rope_scaling": None, "rope_parameters": None}, 10000.0, None),
    ):
        cfg = said(tmp_path, keys)
        assert (cfg.rope_base, cfg.rope_scaling) == (base, stretched)
    without = {key: value for key, value in LLAMA3_KEYS.items() if key != "factor"}
    assert "the key 'factor' is missing" in refusal(tmp_path, bare | {"rope_parameters": without})


# -- against transformers ---------------------------------------------------------------------------


class InFloat64:
    """`torch` for code of transformers whose norms and RoPE compute in float32 by name."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(modeling_llama, "torch", InFloat64())
    monkeypatch.setattr(rope_utils, "torch", InFloat64())


LLAMA3 = {key: value for key, value in LLAMA3_KEYS.items() if key != "rope_theta"}


def llama_config(**changes):
    rope = {"rope_theta": 500.0} | changes.pop("rope", {"rope_type": "default"})
    sizes = {key: value for key, value in LLAMA.items() if key not in ("model_type", "rope_theta")}
    return LlamaConfig(**(sizes | {"rope_parameters": rope, "attn_implementation": "sdpa"} | changes))


def randomised(module, seed=0):
    """Peaky attention, norms far from neutral, float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.double().named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        peaky = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
        weight.data = 1 + 0.2 * noise if weight.ndim == 1 else peaky * noise * weight.shape[1] ** -0.5
        if "embed" in name:
            weight.data = noise
    return module.eval().requires_grad_(False)


# Measured: 2e-15. As transformers computes it, norms and RoPE in float32 by name: 1e-6.
EXACT = {"atol": 1e-12, "rtol": 0}


@pytest.mark.parametrize("old_keys", [False, True], ids=["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3], ids=["default", "llama3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_dense_llama_equals_transformers(tmp_path, float64, n_kv, tied, rope, old_keys):
    """A model that transformers made, saved and ran; its float32 casts are switched to float64."""
    theirs = randomised(
        LlamaForCausalLM(llama_config(num_key_value_heads=n_kv, tie_word_embeddings=tied, rope=dict(rope)))
    )
    theirs.save_pretrained(tmp_path)
    if old_keys:
        keys = json.loads((tmp_path / "config.json").read_text())
        del keys["rope_parameters"]
        keys |= {"rope_theta": 500.0, "rope_scaling": None if rope["rope_type"] == "default" else rope}
        (tmp_path / "config.json").write_text(json.dumps(keys))
    ours = ld.load(tmp_path, dtype="float64")
    assert ours.cfg.n_loops == 1
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, **EXACT)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = theirs(IDS, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(ours(IDS, mask)[1, 7:], padded[1, 7:], **EXACT)


def test_dense_llama_in_float32_as_transformers_runs_it(tmp_path):
    """Nothing switched: float32 on both sides."""
    theirs = randomised(LlamaForCausalLM(llama_config(rope=dict(LLAMA3)))).float()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ld.load(tmp_path)(IDS), theirs(IDS).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("d_head", [16, 64, 128])
def test_llama3_scaling_equals_that_of_transformers(d_head, factor):
    """Rotation speeds, of fast, slow and blended pairs (theirs are float32)."""
    given = LLAMA3 | {"rope_theta": 500000.0, "factor": factor, "original_max_position_embeddings": 8192}
    theirs, attention_factor = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(head_dim=d_head, rope_parameters=given), device="cpu"
    )
    assert attention_factor == 1.0
    scaling = RopeScaling(factor, 1.5, 5.0, 8192)
    sizes = {"vocab_size": 1, "d_model": 1, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "d_mlp": 1, "n_loops": 1}
    cfg = LoopedConfig(**sizes, d_head=d_head, n_ctx=8, rope_base=500000.0, rope_scaling=scaling)
    cos, sin = _angles(cfg, torch.tensor([[1]]), None)
    speed = torch.atan2(sin, cos).flatten()
    torch.testing.assert_close(speed.float(), theirs, atol=0, rtol=2e-6)
    plain = 500000.0 ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    slowed = plain / speed
    assert slowed[0] == pytest.approx(1)
    assert slowed[-1] == pytest.approx(factor)
    assert ((slowed > 1.01) & (slowed < factor - 0.01)).any()  # some are blended


# -- models cut out of a Llama ----------------------------------------------------------------------

STAGES = {"prelude": 1, "core_block": 2, "coda": 1}


class Retrofitted(torch.nn.Module):
    """The published formula, composed of transformers' own layers.

    e = prelude(scale * wte[ids]); s <- core(W [s; e]) in every loop; logits = lm_head(ln_f(coda(s))).
    """

    def __init__(self, config, scale, tied=False):
        super().__init__()
        self.scale = scale
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.adapter = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.stages = torch.nn.ModuleDict(
            {
                stage: torch.nn.ModuleList(modeling_llama.LlamaDecoderLayer(config, n) for n in range(count))
                for stage, count in STAGES.items()
            }
        )
        self.norm = modeling_llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = None if tied else torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = modeling_llama.LlamaRotaryEmbedding(config)

    def through(self, stage, x):
        positions = torch.arange(x.shape[1])[None]
        for layer in self.stages[stage]:
            x = layer(x, position_embeddings=self.rotary(x, positions))
        return x

    def forward(self, ids, state, n_loops):
        start = self.through("prelude", self.scale * self.embed(ids))
        for _ in range(n_loops):
            state = self.through("core_block", self.adapter(torch.cat((state, start), dim=-1)))
        out = self.norm(self.through("coda", state))
        return F.linear(out, self.embed.weight if self.lm_head is None else self.lm_head.weight)

    def released(self):
        """Its weights under the released names."""
        tensors = {
            "transformer.wte.weight": self.embed.weight,
            "transformer.adapter.weight": self.adapter.weight,
            "transformer.ln_f.weight": self.norm.weight,
        }
        if self.lm_head is not None:
            tensors["lm_head.weight"] = self.lm_head.weight
        for stage, layers in self.stages.items():
            for n, layer in enumerate(layers):
                attn, mlp = layer.self_attn, layer.mlp
                parts = {
                    "norm_1": layer.input_layernorm.weight,
                    "norm_2": layer.post_attention_layernorm.weight,
                    "attn.Wqkv": torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]),
                    "attn.proj": attn.o_proj.weight,
                    "mlp.fc": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    "mlp.proj": mlp.down_proj.weight,
                }
                tensors |= {f"transformer.{stage}.{n}.{name}.weight": weight for name, weight in parts.items()}
        return {name: weight.detach().contiguous() for name, weight in tensors.items()}


@pytest.mark.parametrize(("scale", "tied", "n_kv"), [(1.0, False, 2), (4.0, True, 4)])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3], ids=["default", "llama3"])
@torch.no_grad()
def test_a_retrofitted_model_equals_the_composition_of_transformers_layers(tmp_path, float64, rope, scale, tied, n_kv):
    """From the released names to the logits after every loop, from a given state."""
    config = llama_config(head_dim=WIDTH // HEADS, num_key_value_heads=n_kv, rope=dict(rope))
    theirs = randomised(Retrofitted(config, scale, tied))
    keys = RETROFITTED | {"num_key_value_heads": n_kv, "tie_embeddings": tied, "rope_theta": 500.0}
    keys |= {"init_values": {"embed_scale": scale}, "rope_scaling": None if rope["rope_type"] == "default" else rope}
    write(tmp_path, keys, theirs.released())
    ours = ld.load(tmp_path, dtype="float64")
    assert ours.rope_table is None
    state = torch.randn(*IDS.shape, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for n_loops in (1, 3, 5):
        expected = theirs(IDS, state, n_loops)
        torch.testing.assert_close(ours(IDS, n_loops=n_loops, initial_state=state), expected, **EXACT)
    # Exits of a longer run, and the state that the configuration draws where none is given.
    _, cache = ours.run_with_cache(IDS, n_loops=3, initial_state=state)
    torch.testing.assert_close(ours.unembed(cache["loops.1.hook_readout"]), theirs(IDS, state, 1), **EXACT)
    logits, cache = ours.run_with_cache(IDS, names_filter="hook_initial_state", seed=4)
    torch.testing.assert_close(logits, theirs(IDS, cache["hook_initial_state"], 3), **EXACT)


@torch.no_grad()
def test_a_retrofitted_model_that_ignores_its_state_is_the_stacked_llama(tmp_path, float64):
    """With the adapter [0 | I] one loop is prelude, core and coda one after the other: transformers' own model."""
    theirs = randomised(LlamaForCausalLM(llama_config(head_dim=WIDTH // HEADS, num_hidden_layers=4)))
    cut = Retrofitted(theirs.config, 1.0)
    cut.embed, cut.norm, cut.lm_head = theirs.model.embed_tokens, theirs.model.norm, theirs.lm_head
    cut.adapter.weight.copy_(torch.cat((torch.zeros(WIDTH, WIDTH), torch.eye(WIDTH)), dim=1))
    layers = iter(theirs.model.layers)
    for stage, count in STAGES.items():
        cut.stages[stage] = torch.nn.ModuleList(next(layers) for _ in range(count))
    write(tmp_path, RETROFITTED | {"rope_theta": 500.0}, cut.released())
    ours = ld.load(tmp_path, dtype="float64")
    for n_loops in (1, 4):
        torch.testing.assert_close(ours(IDS, n_loops=n_loops, seed=n_loops), theirs(IDS).logits, **EXACT)


def test_transformers_writes_the_files_that_are_checked(tmp_path):
    """The table of names above is what transformers saves for a Llama."""
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    stored = {name: tuple(x.shape) for name, x in load_file(tmp_path / "model.safetensors").items()}
    assert stored == llama_tensors()
