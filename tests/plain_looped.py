"""The looped decoder once more, as plainly as it can be written: the specification in code.

It shares no code with `loopdiag`: plain tensor arithmetic, explicit loops over loops, layers, positions and heads,
one document without padding at a time. The tests hold `LoopedLM` against it, state by state.

E is the embedding, passed through the prelude where there is one, N the final norm, a and b the scales of embedding
and carry, and shift moves a state `offset` tokens to the right, zeros entering at the start:

    B_1 = E, or what any other loop makes of a random Z_0                                        hook_in
    S_r = shift(Z_{r-1})                                                                         hook_carry
    B_r = a*E + b*S_r                        (injection "none": S_r, "concat": A [S_r; E])
    Y_r = layers(B_r)                                                                            hook_out_pre_norm
    Z_r = N(Y_r) when the model normalises between loops, or before a head that follows at once, else Y_r     hook_out
    N(Y_r), or with a coda N(coda(Z_r)): what the head reads after loop r                        hook_readout
"""

import math

import torch


def plain_run(cfg, weights, tokens, n_loops, initial_state=None):
    """Run one document.

    Args:
        cfg: Anything with the attributes of a `LoopedConfig`.
        weights: State dict of a `LoopedLM`. Everything is computed in its dtype.
        tokens: Token numbers, a list of integers.
        n_loops: Loops to run.
        initial_state: Z_0 of a model with a random initial state, [pos, d_model].

    Returns:
        Every state by hook name, patterns included, and "logits". States have no batch dimension: [pos, d_model],
        [pos, head, d_head], [pos, head] (gate), [pos] (exit gate) and [head, query, key] (patterns).
    """
    embedding = torch.stack([weights["embed.weight"][token] * cfg.embed_multiplier for token in tokens])
    states = {"hook_embed": embedding}
    start = embedding
    if cfg.n_prelude > 0:
        for layer in range(cfg.n_prelude):
            start, _ = one_layer(
                cfg, weights, f"prelude_blocks.{layer}.", start, None, states, f"prelude.blocks.{layer}."
            )
        states["prelude.hook_out"] = start
    memory = [None] * cfg.n_layers  # loop 1's rotated keys and values, layer by layer
    carry = None
    if cfg.initial_state == "random":
        carry = states["hook_initial_state"] = initial_state
    for loop in range(1, n_loops + 1):
        at = f"loops.{loop}."
        x = start
        if carry is not None:
            states[at + "hook_carry"] = shifted(carry, cfg.offset)
            x = next_input(cfg, weights, start, states[at + "hook_carry"])
        states[at + "hook_in"] = x
        for layer in range(cfg.n_layers):
            shared = memory[layer] if cfg.memory == "first" else None
            x, made = one_layer(cfg, weights, f"blocks.{layer}.", x, shared, states, f"{at}blocks.{layer}.")
            if loop == 1:
                memory[layer] = made
        normed = norm(x, weights["ln_final.weight"], cfg)
        head_follows = loop == n_loops and cfg.n_coda == 0
        carry = normed if cfg.norm_between_loops or head_follows else x
        states[at + "hook_out_pre_norm"] = x
        states[at + "hook_out"] = carry
        if cfg.exit_gate:
            states[at + "hook_exit_gate"] = torch.stack(
                [
                    1 / (1 + (-(weights["exit_gate.weight"][0] @ row) - weights["exit_gate.bias"][0]).exp())
                    for row in normed
                ]
            )
        readout = normed
        if cfg.n_coda > 0:
            y, inside = coda(cfg, weights, carry)
            if loop == n_loops:
                states.update(inside)
            states[at + "hook_coda_out"] = y
            readout = norm(y, weights["ln_final.weight"], cfg)
        states[at + "hook_readout"] = readout
    head = weights["embed.weight"] if cfg.tie_embeddings else weights["head.weight"]
    states["logits"] = torch.stack([head @ row for row in states[f"loops.{n_loops}.hook_readout"]])
    return states


def coda(cfg, weights, x):
    """The layers after the loops: what they give, and the states on the way."""
    if cfg.norm_before_coda:
        x = norm(x, weights["ln_final.weight"], cfg)
    states = {"coda.hook_in": x}
    for layer in range(cfg.n_coda):
        x, _ = one_layer(cfg, weights, f"coda_blocks.{layer}.", x, None, states, f"coda.blocks.{layer}.")
    return x, states


def shifted(carry, offset):
    """The carry of the token `offset` places to the left; zeros where there is none."""
    return torch.stack(
        [carry[pos - offset] if pos >= offset else torch.zeros_like(carry[0]) for pos in range(len(carry))]
    )


def next_input(cfg, weights, start, carry):
    """What enters a loop: the shifted carry, and E."""
    rows = []
    for pos in range(len(start)):
        carried = carry[pos]
        if cfg.injection == "add":
            carried = cfg.embed_scale * start[pos] + cfg.carry_scale * carried
        if cfg.injection == "concat":
            of_carry, of_start = (
                weights["adapter.weight"][:, : cfg.d_model],
                weights["adapter.weight"][:, cfg.d_model :],
            )
            carried = of_carry @ carried + of_start @ start[pos]
        rows.append(carried)
    return torch.stack(rows)


def one_layer(cfg, weights, name, x, shared, states, at):
    """The layer whose weights begin with `name`; returns its output and the rotated keys and values that it made."""
    own = {weight.removeprefix(name): w for weight, w in weights.items() if weight.startswith(name)}
    own["rope"] = weights.get("rope_table.table")
    states[at + "hook_resid_pre"] = x
    read = x if cfg.norms == "post" else norm(x, own["ln1.weight"], cfg)
    update, made = attend(cfg, own, x, read, shared, states, at + "attn.")
    x = add(cfg, own, x, update, "ln1_post.weight")
    states[at + "hook_resid_mid"] = x
    read = x if cfg.norms == "post" else norm(x, own["ln2.weight"], cfg)
    x = add(cfg, own, x, swiglu(own, read), "ln2_post.weight")
    states[at + "hook_resid_post"] = x
    return x, made


def add(cfg, own, x, update, name):
    """The stream with an update, normalised where the model does it."""
    if cfg.norms == "pre":
        return x + update
    if cfg.norms == "sandwich":
        return x + norm(update, own[name], cfg)
    return norm(x + update, own[name], cfg)


def attend(cfg, own, x, normed, shared, states, at):
    """Attention, blended with loop 1's keys and values when `shared` holds them."""
    q = heads(normed, own["attn.q_proj.weight"], cfg.n_heads, own.get("attn.q_proj.bias"))
    k = heads(normed, own["attn.k_proj.weight"], cfg.n_kv_heads, own.get("attn.k_proj.bias"))
    v = heads(normed, own["attn.v_proj.weight"], cfg.n_kv_heads, None)
    assert cfg.qk_bias == ("attn.q_proj.bias" in own) == ("attn.k_proj.bias" in own)
    rot_q, rot_k = rotate(cfg, own["rope"], q), rotate(cfg, own["rope"], k)
    for name, value in (("q", q), ("k", k), ("v", v), ("rot_q", rot_q), ("rot_k", rot_k)):
        states[f"{at}hook_{name}"] = value
    everything = len(x)
    if shared is None:
        z, states[at + "hook_pattern"] = look(rot_q, rot_k, v, everything)
    else:
        z_global, states[at + "hook_pattern_global"] = look(rot_q, *shared, everything)
        z_local, states[at + "hook_pattern_local"] = look(rot_q, rot_k, v, cfg.window)
        g = gates(cfg, own, x, rot_q)
        z = torch.zeros_like(z_global)
        for pos in range(len(x)):
            for head in range(cfg.n_heads):
                z[pos, head] = g[pos, head] * z_global[pos, head] + (1 - g[pos, head]) * z_local[pos, head]
        states[at + "hook_z_global"], states[at + "hook_z_local"], states[at + "hook_gate"] = z_global, z_local, g
    states[at + "hook_z"] = z
    out = torch.stack([own["attn.o_proj.weight"] @ row.flatten() for row in z])
    return out, (rot_k, v)


def look(q, k, v, window):
    """Softmax attention over the last `window` tokens, the token itself included."""
    length, n_heads, d_head = q.shape
    z, pattern = torch.zeros_like(q), q.new_zeros(n_heads, length, length)
    for head in range(n_heads):
        kv_head = head // (n_heads // k.shape[1])
        for pos in range(length):
            first = max(0, pos - window + 1)
            scores = torch.stack([q[pos, head] @ k[key, kv_head] for key in range(first, pos + 1)]) / math.sqrt(d_head)
            shares = (scores - scores.max()).exp()
            shares = shares / shares.sum()
            pattern[head, pos, first : pos + 1] = shares
            z[pos, head] = sum(share * v[first + i, kv_head] for i, share in enumerate(shares))
    return z, pattern


def gates(cfg, own, x, rot_q):
    """Weight of the global branch: sigmoid of an affine map of the normed layer input or of the rotated query."""
    weight, bias = own["attn.gate.weight"], own["attn.gate.bias"]
    result = x.new_zeros(len(x), cfg.n_heads)
    for pos in range(len(x)):
        for head in range(cfg.n_heads):
            if cfg.gate_input == "hidden":
                seen = norm(x[pos : pos + 1], own["attn.gate.norm.weight"], cfg)[0]
            else:
                seen = rot_q[pos, head]
            result[pos, head] = 1 / (1 + (-(weight[head] @ seen) - bias[head]).exp())
    return result


def swiglu(own, x):
    """down(silu(gate x) * up x), position by position."""
    rows = []
    for row in x:
        gate, up = own["mlp.gate_proj.weight"] @ row, own["mlp.up_proj.weight"] @ row
        rows.append(own["mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up))
    return torch.stack(rows)


def norm(x, weight, cfg):
    """RMSNorm, position by position."""
    return torch.stack([weight * row / torch.sqrt((row * row).mean() + cfg.norm_eps) for row in x])


def heads(x, weight, n_heads, bias):
    """Projection of every position, cut into heads: [pos, head, d_head]."""
    rows = [weight @ row if bias is None else weight @ row + bias for row in x]
    return torch.stack([row.reshape(n_heads, -1) for row in rows])


def rotate(cfg, table, x):
    """RoPE: at position p the pair i, entries (i, i + d_head / 2) or (2i, 2i + 1), turns by p / base ** (2i / d_head).

    Stretched as Llama 3 does it when the configuration says so; or by the cos and sin of a table [pos, pair, 2].
    """
    half = cfg.d_head // 2
    turned = torch.zeros_like(x)
    for pos in range(x.shape[0]):
        for i in range(half):
            if cfg.rope_table:
                cos, sin = table[pos, i, 0], table[pos, i, 1]
            else:
                angle = pos * frequency(cfg, i)
                cos, sin = math.cos(angle), math.sin(angle)
            one, other = (i, half + i) if cfg.rope_pairs == "half" else (2 * i, 2 * i + 1)
            for head in range(x.shape[1]):
                first, second = x[pos, head, one], x[pos, head, other]
                turned[pos, head, one] = cos * first - sin * second
                turned[pos, head, other] = sin * first + cos * second
    return turned


def frequency(cfg, pair):
    """Angle by which a pair turns from token to token."""
    plain = cfg.rope_base ** (-2 * pair / cfg.d_head)
    scaling = cfg.rope_scaling
    if scaling is None:
        return plain
    wavelength = 2 * math.pi / plain
    if wavelength > scaling.original_n_ctx / scaling.low_freq_factor:
        return plain / scaling.factor
    if wavelength < scaling.original_n_ctx / scaling.high_freq_factor:
        return plain
    smooth = (scaling.original_n_ctx / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * plain / scaling.factor + smooth * plain
