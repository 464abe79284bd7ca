"""Every measure's name, unit and meaning, by group."""

from __future__ import annotations

from collections.abc import Collection

from loopdiag.errors import InputError

_BRANCHES = {"": "the effective map", "_global": "the global branch", "_local": "the local branch"}


def _by_branch(unit: str, text: str, name: str) -> dict[str, tuple[str, str, str]]:
    return {f"{name}{end}": (unit, "attention", f"{text}, {branch}") for end, branch in _BRANCHES.items()}


# By group, name: (unit, state, what it is). The functions' docstrings say more.
GROUPS: dict[str, dict[str, tuple[str, str, str]]] = {
    "prediction": {
        "nll_exit": ("nats per token", "N(Y)", "negative log likelihood of the next token, reading out after loop r"),
        "gain": ("nats per token", "N(Y)", "NLL that loop r takes off the tokens it helps"),
        "cost": ("nats per token", "N(Y)", "NLL that loop r adds to the tokens it harms"),
        "rank": ("rank", "N(Y)", "median rank of the next token, 1 the best"),
        "log_rank": ("nats", "N(Y)", "log of the next token's rank"),
        "confidence": ("1", "N(Y)", "probability of the likeliest next token"),
        "accuracy": ("share of tokens", "N(Y)", "likeliest next token is right"),
        "changed": ("share of tokens", "N(Y)", "loop r changes the likeliest next token"),
        "fixed": ("share of tokens", "N(Y)", "loop r puts the likeliest next token right"),
        "broken": ("share of tokens", "N(Y)", "loop r puts the likeliest next token wrong"),
        "settled": ("share of tokens", "N(Y)", "likeliest next token stays from loop r on"),
        "entropy": ("nats", "N(Y)", "entropy of the exit's distribution"),
        "output_shift": ("nats", "N(Y)", "KL(p^(r) || p^(r-1))"),
        "output_shift_reverse": ("nats", "N(Y)", "KL(p^(r-1) || p^(r))"),
        "output_shift_js": ("nats", "N(Y)", "Jensen-Shannon divergence of p^(r) and p^(r-1)"),
        "breadth": ("share of tokens", "N(Y)", "largest output shift of loops 2.. falls in loop r"),
        "nll_lens": ("nats per token", "N(Y)", "NLL through the plain logit lens, past the coda"),
        "exit_probability": ("1", "N(Y)", "probability that the model's exit gate leaves after loop r"),
    },
    "readouts": {
        "nll_usable": ("nats per token", "N(Y)", "NLL through the exit's fitted translator"),
        "withheld": (
            "nats per token",
            "Z",
            "NLL read from the carry of r-1 that the offset hands over, minus from the token's own",
        ),
    },
    "motion": {
        "step_size": ("residual stream", "Y", "||Y_r - Y_(r-1)||"),
        "relative_step": ("1", "Y", "||Y_r - Y_(r-1)|| / ||Y_(r-1)||"),
        "radial_share": ("1", "Y", "share of the squared update along Y_(r-1)"),
        "acceleration": ("1", "Y", "||Y_r - 2 Y_(r-1) + Y_(r-2)|| / ||Y_(r-1)||"),
        "state_cosine": ("1", "Y", "cos(Y_r, Y_(r-1))"),
        "cos_update": ("1", "Y", "cosine of successive updates"),
        "cos_reference": ("1", "Y", "cosine of successive updates were the loops' states unrelated"),
        "motion_label": ("0 settling, 1 orbiting, 2 drifting", "Y", "what the states do at the run's end"),
    },
    "diversity": {
        "effective_rank": ("1", "N(Y)", "effective rank of a document's states"),
        "effective_rank_centred": ("1", "N(Y)", "effective rank of a document's states less their mean"),
        "participation_ratio": ("1", "N(Y)", "participation ratio of a document's states less their mean"),
        "hsic": ("variance squared", "N(Y)", "unbiased HSIC of the states of two loops, of which CKA is the ratio"),
    },
    "rarefaction": {
        "effective_rank_by_tokens": ("1", "N(Y)", "effective rank of a document's first tokens"),
    },
    "pooled": {
        "effective_rank_pooled": ("1", "N(Y)", "effective rank of all documents' states together"),
        "effective_rank_centred_pooled": ("1", "N(Y)", "effective rank of all documents' states less their mean"),
        "participation_ratio_pooled": ("1", "N(Y)", "participation ratio of all documents' states less their mean"),
    },
    "layers": {
        "hsic_layers": (
            "variance squared",
            "N(resid_post)",
            "unbiased HSIC of the states after two layers of any loops",
        ),
    },
    "fixed_point": {
        "fixed_point_gap": ("residual stream", "Y", "||Y_r - Y_(r+1)||, one more loop of the map that the model runs"),
        "fixed_point_gap_relative": ("1", "Y", "||Y_r - Y_(r+1)|| / ||Y_r||"),
        "fixed_point_gap_layers": (
            "residual stream",
            "Y",
            "||Y_r - f(Y_r)||, f the layers alone: the paper's literal form",
        ),
    },
    "noise": {
        "noise_step": ("residual stream", "Y", "what the run's rounding adds to an update, beside higher precision"),
        "noise_shift": ("nats", "N(Y)", "what the run's rounding moves a token's output shift by"),
        "noise_nll": ("nats per token", "N(Y)", "what the run's rounding moves a token's NLL by"),
    },
    "tokens": {
        "token_text": ("text", "tokens", "each token of a few documents"),
        "token_nll": ("nats", "N(Y)", "NLL of each token of a few documents, given the tokens before it"),
        "token_top": ("text", "N(Y)", "likeliest token in each place of a few documents"),
    },
    "classes": {
        "class_share": ("share of tokens", "tokens", "next tokens of a class"),
        "nll_by_class": ("nats per token", "N(Y)", "exit NLL on next tokens of a class"),
        "gain_by_class": ("nats per token", "N(Y)", "gain on next tokens of a class"),
        "cost_by_class": ("nats per token", "N(Y)", "cost on next tokens of a class"),
    },
    "exit_rules": {
        "exit_rule_loops": ("loops", "Y, N(Y)", "mean loops that a token takes under an exit rule"),
        "exit_rule_nll": ("nats per token", "Y, N(Y)", "NLL when tokens leave by an exit rule"),
        "exit_rule_loops_fit": ("loops", "Y, N(Y)", "mean loops that a token takes, over the fit documents"),
        "exit_rule_nll_fit": ("nats per token", "Y, N(Y)", "NLL when tokens leave, over the fit documents"),
    },
    "offset": {
        "omega": ("carry", "Z", "distance of neighbouring tokens' carries from loop r-1"),
        "omega_relative": ("1", "Z", "that distance over the carry's norm"),
        "omega_random": ("carry", "Z", "distance of any two tokens' carries in the document"),
    },
    "attention": {
        "gate_mean": ("1", "layer input", "weight of the global attention branch"),
        "gate_by_position": ("1", "layer input", "weight of the global branch, heads together, by position"),
        **_by_branch("nats", "entropy of the weights of keys", "attention_entropy"),
        **_by_branch("1", "entropy over the log of the visible keys", "attention_entropy_relative"),
        **_by_branch("nats", "KL of the weights in loop r from those in r-1", "attention_kl"),
        **_by_branch("1", "weight of the document's first token", "attention_sink"),
        "attention_window": ("1", "attention", "weight of the window beyond it, the effective map"),
        "attention_window_global": ("1", "attention", "weight of the window beyond it, the global branch"),
    },
    "attention_pairs": _by_branch(
        "nats", "KL of the weights in one loop from those in any earlier one", "attention_kl_pairs"
    ),
    "heads": {
        **_by_branch("1", "mean cosine of two heads' weights", "head_cosine"),
        **_by_branch("1", "effective rank of the heads' weights", "head_rank"),
    },
}
# Taken unless others are asked for: the rest is slow, and no answer rests on it.
DEFAULT_GROUPS = ("prediction", "readouts", "motion", "diversity", "offset", "attention")
# Token counts of the rarefaction curve, as far as documents reach.
RAREFACTION = (16, 32, 64, 128, 256)
# Dimensions of the measures that are not by `document, loop(, layer, head)`.
DIMENSIONS = {
    "motion_label": ("document",),
    "hsic": ("document", "loop", "loop_b"),
    "effective_rank_by_tokens": ("document", "loop", "tokens"),
    **dict.fromkeys(GROUPS["pooled"], ("loop",)),
    "hsic_layers": ("document", "loop", "layer", "loop_b", "layer_b"),
    "exit_rule_loops": ("document", "rule", "setting"),
    "exit_rule_nll": ("document", "rule", "setting"),
    "exit_rule_loops_fit": ("rule", "setting"),
    "exit_rule_nll_fit": ("rule", "setting"),
    "token_text": ("shown", "token"),
    **dict.fromkeys(("token_nll", "token_top"), ("shown", "loop", "token")),
    "class_share": ("document", "token_class"),
    **dict.fromkeys(("nll_by_class", "gain_by_class", "cost_by_class"), ("document", "loop", "token_class")),
    "gate_by_position": ("document", "loop", "layer", "position"),
    **dict.fromkeys(GROUPS["attention_pairs"], ("document", "loop", "loop_b", "layer", "head")),
}
# Every measure by its name.
DEFINITIONS = {name: said for group in GROUPS.values() for name, said in group.items()}


def chosen(names: Collection[str]) -> tuple[str, ...]:
    """Groups by their names, in the order of `GROUPS`; `default` and `all` stand for several.

    Raises:
        InputError: A name that is none of these, or none at all.
    """
    several = {"default": DEFAULT_GROUPS, "all": tuple(GROUPS)}
    unknown = [name for name in names if name not in GROUPS and name not in several]
    if unknown or not names:
        what = ", ".join(unknown) or "none were given"
        raise InputError(f"Unknown measures: {what}. Allowed are default, all, and the groups {', '.join(GROUPS)}.")
    wanted = {group for name in names for group in several.get(name, (name,))}
    return tuple(group for group in GROUPS if group in wanted)


def is_by_loop(name: str) -> bool:
    """Whether a measure has one number for each loop, after layers and heads are averaged."""
    return name not in DIMENSIONS or DIMENSIONS[name] == ("loop",)


def dimensions(name: str, count: int) -> tuple[str, ...]:
    """Names of a measure's dimensions."""
    return DIMENSIONS.get(name, ("document", "loop", "layer", "head")[:count])
