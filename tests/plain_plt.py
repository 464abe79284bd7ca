"""The looped decoder once more, as plainly as it can be written: the specification in code.

It shares no code with `loopdiag`: plain tensor arithmetic, explicit loops over loops, layers, positions and heads,
one document without padding at a time. The tests hold `LoopedLM` against it, state by state.

E is the embedding, N the final norm, a and b the scales of embedding and carry, and shift moves a state `offset`
tokens to the right, zeros entering at the start:

    B_1 = E                                  hook_in
    B_r = a*E + b*shift(Z_{r-1})             (injection "none": shift(Z_{r-1}))
    Y_r = layers(B_r)                        hook_out_pre_norm
    Z_r = N(Y_r) after the last loop or when the model normalises between loops, else Y_r        hook_out
    N(Y_r), what the head reads after loop r                                                     hook_readout
"""

import math

import torch


def plain_run(cfg, weights, tokens, n_loops):
    """Run one document.

    Args:
        cfg: Anything with the attributes of a `LoopedConfig`.
        weights: State dict of a `LoopedLM`. Everything is computed in its dtype.
        tokens: Token numbers, a list of integers.
        n_loops: Loops to run.

    Returns:
        Every state by hook name, patterns included, and "logits". States have no batch dimension: [pos, d_model],
        [pos, head, d_head], [pos, head] (gate) and [head, query, key] (patterns).
    """
    embedding = torch.stack([weights["embed.weight"][token] for token in tokens])
    states = {"hook_embed": embedding}
    memory = [None] * cfg.n_layers  # loop 1's rotated keys and values, layer by layer
    carry = None
    for loop in range(1, n_loops + 1):
        at = f"loops.{loop}."
        x = embedding if loop == 1 else next_input(cfg, embedding, carry)
        states[at + "hook_in"] = x
        for layer in range(cfg.n_layers):
            shared = memory[layer] if cfg.memory == "first" else None
            x, made = one_layer(cfg, weights, layer, x, shared, states, at)
            if loop == 1:
                memory[layer] = made
        readout = norm(x, weights["ln_final.weight"], cfg)
        carry = readout if cfg.norm_between_loops or loop == n_loops else x
        states[at + "hook_out_pre_norm"] = x
        states[at + "hook_out"] = carry
        states[at + "hook_readout"] = readout
    head = weights["embed.weight"] if cfg.tie_embeddings else weights["head.weight"]
    states["logits"] = torch.stack([head @ row for row in states[f"loops.{n_loops}.hook_out"]])
    return states


def next_input(cfg, embedding, carry):
    """What enters loops 2, 3, ...: the carry of the token `offset` places to the left, and the embedding."""
    rows = []
    for pos in range(len(embedding)):
        source = pos - cfg.offset
        carried = carry[source] if source >= 0 else torch.zeros_like(carry[0])
        if cfg.injection == "add":
            carried = cfg.embed_scale * embedding[pos] + cfg.carry_scale * carried
        rows.append(carried)
    return torch.stack(rows)


def one_layer(cfg, weights, layer, x, shared, states, at):
    """A pre-norm layer; returns its output and the rotated keys and values that it made."""
    own = {
        name.removeprefix(f"blocks.{layer}."): w for name, w in weights.items() if name.startswith(f"blocks.{layer}.")
    }
    at = f"{at}blocks.{layer}."
    states[at + "hook_resid_pre"] = x
    attention, made = attend(cfg, own, x, shared, states, at + "attn.")
    x = x + attention
    states[at + "hook_resid_mid"] = x
    x = x + swiglu(own, norm(x, own["ln2.weight"], cfg))
    states[at + "hook_resid_post"] = x
    return x, made


def attend(cfg, own, x, shared, states, at):
    """Attention, blended with loop 1's keys and values when `shared` holds them."""
    normed = norm(x, own["ln1.weight"], cfg)
    q = heads(normed, own["attn.q_proj.weight"], cfg.n_heads)
    k = heads(normed, own["attn.k_proj.weight"], cfg.n_kv_heads)
    v = heads(normed, own["attn.v_proj.weight"], cfg.n_kv_heads)
    rot_q, rot_k = rotate(q, cfg.rope_base), rotate(k, cfg.rope_base)
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


def heads(x, weight, n_heads):
    """Projection of every position, cut into heads: [pos, head, d_head]."""
    return torch.stack([(weight @ row).reshape(n_heads, -1) for row in x])


def rotate(x, base):
    """RoPE: at position p the pair (i, i + d_head / 2) turns by p / base ** (2 i / d_head)."""
    half = x.shape[2] // 2
    turned = torch.zeros_like(x)
    for pos in range(x.shape[0]):
        for i in range(half):
            angle = pos / base ** (i / half)
            cos, sin = math.cos(angle), math.sin(angle)
            for head in range(x.shape[1]):
                first, second = x[pos, head, i], x[pos, head, half + i]
                turned[pos, head, i] = cos * first - sin * second
                turned[pos, head, half + i] = sin * first + cos * second
    return turned
