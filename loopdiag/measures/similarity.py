"""How alike the states of two loops are, whatever rotation lies between them. On N(Y)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from loopdiag.trace import LoopTrace


def hsic(x: Float[Tensor, "view token d_model"]) -> Float[Tensor, "view view_b"]:
    """Unbiased HSIC with a linear kernel between every two views of the same tokens, in float64.

    Units of squared variance; 0 in the mean for independent views, and so negative in about half of the draws.

    Raises:
        ValueError: Fewer than four tokens, for which it is not defined.

    Source: Song et al. (2012), HSIC_1, as in minibatch CKA (Nguyen et al., 2021).
    """
    n = x.shape[1]
    if n < 4:
        raise ValueError(f"hsic: {n} tokens are too few: at least 4 are needed.")
    x = x.double()
    x = x - x.mean(1, keepdim=True)  # changes nothing but rounding: it keeps the Gram entries small
    gram = x @ x.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).zero_()
    flat, rows = gram.flatten(1), gram.sum(2)
    total = rows.sum(1)
    return (flat @ flat.T + total[:, None] * total / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def loop_hsic(trace: LoopTrace, tokens: int) -> Float[Tensor, "document loop loop_b"]:
    """`hsic` of every two loops 0..R over the first `tokens` real tokens of each document.

    Stored rather than the ratio, so that documents can be pooled: their HSIC are averaged before `cka` divides them.
    NaN for documents with fewer real tokens.
    """
    loops = trace.n_loops + 1
    found = torch.full((len(trace.mask), loops, loops), math.nan, dtype=torch.float64)
    states = trace.normed
    for document, real in enumerate(trace.mask):
        if int(real.sum()) >= tokens:
            found[document] = hsic(states[:, document, real][:, :tokens]).cpu()
    return found


def cka(terms: Float[Tensor, "*batch view view_b"]) -> Float[Tensor, "*batch view view_b"]:
    """Debiased linear CKA from unbiased HSIC: their ratio to the root of the product of the two own ones.

    1 for a view and itself, 0 in the mean for independent ones; negative values are kept. NaN where a view's own HSIC
    is not positive. Its spread over draws is about sqrt(2) / tokens.

    Source: Kornblith et al. (2019) with the estimator of Song et al. (2012).
    """
    own = terms.diagonal(dim1=-2, dim2=-1).clone()
    own[own <= 0] = math.nan
    return terms / (own[..., :, None] * own[..., None, :]).sqrt()
