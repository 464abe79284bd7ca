"""How alike the states of two loops are, whatever rotation lies between them. On N(Y)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopdiag.trace import LoopTrace


def hsic(x: Float[Tensor, "view token d_model"]) -> Float[Tensor, "view view_b"]:
    """Unbiased HSIC with a linear kernel between every two views of the same tokens, in float64.

    Units of squared variance; 0 in the mean for independent views, and so negative in about half of the draws.

    Raises:
        ValueError: Fewer than four tokens, for which it is not defined.

    Source: Song et al. (2012), HSIC_1, as in minibatch CKA (Nguyen et al., 2021).
    """
    if x.shape[1] < 4:
        raise ValueError(f"hsic: {x.shape[1]} tokens are too few: at least 4 are needed.")
    return _hsic_of(_gram(x))


def _gram(x: Float[Tensor, "*view token d_model"]) -> Float[Tensor, "*view token token_b"]:
    """Inner products of every two tokens of a view, in float64, zero on the diagonal."""
    x = x.double()
    x = x - x.mean(-2, keepdim=True)  # changes nothing but rounding: it keeps the entries small
    gram = x @ x.transpose(-1, -2)
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    return gram


def _hsic_of(gram: Float[Tensor, "view token token_b"]) -> Float[Tensor, "view view_b"]:
    n = gram.shape[1]
    flat, rows = gram.flatten(1), gram.sum(2)
    total = rows.sum(1)
    return (flat @ flat.T + total[:, None] * total / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def loop_hsic(trace: LoopTrace, tokens: int) -> Float[Tensor, "document loop loop_b"]:
    """`hsic` of every two loops 0..R over the first `tokens` real tokens of each document.

    Stored rather than the ratio, so that documents can be pooled: their HSIC are averaged before `cka` divides them.
    NaN for documents with fewer real tokens.
    """
    loops = len(trace.raw)
    found = torch.full((len(trace.mask), loops, loops), math.nan, dtype=torch.float64)
    states = trace.normed
    for document, real in enumerate(trace.mask):
        if int(real.sum()) >= tokens:
            found[document] = hsic(states[:, document, real][:, :tokens]).cpu()
    return found


class LayerSimilarity:
    """HSIC of the states after every two layers of any loops: `record(..., on_layer=LayerSimilarity(...))`.

    Of a state, only the inner products of its first `tokens` real tokens are kept.

    Args:
        tokens: Tokens of each document that count; documents with fewer have NaN.
        norm: What is applied to a state first: the model's final norm, for states as a head would read them.
    """

    def __init__(self, tokens: int, norm: Callable[[Tensor], Tensor]) -> None:
        self.tokens, self.norm = tokens, norm
        self._grams: dict[tuple[int, int], list[Tensor | None]] = {}

    def __call__(
        self, loop: int, layer: int, state: Float[Tensor, "document pos d_model"], mask: Bool[Tensor, "document pos"]
    ) -> None:
        self._grams[loop, layer] = [
            _gram(self.norm(h[real][: self.tokens])) if int(real.sum()) >= self.tokens else None
            for h, real in zip(state, mask, strict=True)
        ]

    def result(self) -> dict[str, Float[Tensor, "document loop layer loop_b layer_b"]]:
        """`hsic_layers`; loops are 0 and those that were watched, NaN at loop 0. `cka` of it wants the places flat."""
        loops = sorted({loop for loop, _ in self._grams})
        layers = 1 + max(layer for _, layer in self._grams)
        documents = len(next(iter(self._grams.values())))
        found = torch.full((documents, *(len(loops) + 1, layers) * 2), math.nan, dtype=torch.float64)
        for document in range(documents):
            places = [self._grams[loop, layer][document] for loop in loops for layer in range(layers)]
            grams = [gram for gram in places if gram is not None]  # of a document all are there, or none
            if grams:
                terms = _hsic_of(torch.stack(grams)).cpu()
                found[document, 1:, :, 1:] = terms.reshape(*(len(loops), layers) * 2)
        return {"hsic_layers": found}


def cka(terms: Float[Tensor, "*batch view view_b"]) -> Float[Tensor, "*batch view view_b"]:
    """Debiased linear CKA from unbiased HSIC: their ratio to the root of the product of the two own ones.

    1 for a view and itself, 0 in the mean for independent ones; negative values are kept. NaN where a view's own HSIC
    is not positive. Its spread over draws is about sqrt(2) / tokens.

    Source: Kornblith et al. (2019) with the estimator of Song et al. (2012).

    Example:
        Turned, stretched and shifted states are the same; unrelated ones of 4,096 tokens are not, to about 0.02.

        >>> random = torch.Generator().manual_seed(0)
        >>> x, other = torch.randn(2, 4096, 8, generator=random)
        >>> turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=random))
        >>> found = cka(hsic(torch.stack([x, 2 * x @ turn + 1, other])))
        >>> bool((found[0, 1] - 1).abs() < 1e-6), bool(found[0, 2].abs() < 0.02)
        (True, True)
    """
    own = terms.diagonal(dim1=-2, dim2=-1).clone()
    own[own <= 0] = math.nan
    return terms / (own[..., :, None] * own[..., None, :]).sqrt()
