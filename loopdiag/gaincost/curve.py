"""Gain and cost of each loop in nats per token, on one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from loopdiag import html
from loopdiag.diagnosis import Diagnosis
from loopdiag.summary import Estimate, estimate

PerLoop = Float[np.ndarray, " loop"]


@dataclass(frozen=True)
class GainCost:
    """The gain-cost curve of one checkpoint, loops 1..R, in nats per token.

    With d the change of a token's NLL from exit r-1 to exit r: gain is the mean of max(0, -d), cost of max(0, d), and
    net = gain - cost = nll_exit(r-1) - nll_exit(r). Loop 1 starts from the embedding and does not belong on one axis
    with the others.

    Attributes:
        model: Which model.
        loop: 1..R, or those that were measured; gain, cost and net are then from one to the next.
        trained_loops: Loops the model was trained with; what lies beyond is extrapolated.
        gain, cost, net, nll_exit: With intervals over documents, paired across loops.
        documents: Documents behind every mean.
    """

    model: str
    loop: np.ndarray
    trained_loops: int
    gain: Estimate
    cost: Estimate
    net: Estimate
    nll_exit: Estimate
    documents: int

    @property
    def cost_over_gain(self) -> PerLoop:
        """Near 1, a loop only moves things; NaN for a loop that helps no token."""
        return self.cost.mean / np.where(self.gain.mean > 0, self.gain.mean, np.nan)

    def _repr_html_(self) -> str:
        columns = {"exit NLL [95 %]": self.nll_exit, "gain": self.gain, "cost": self.cost, "net gain": self.net}
        names = html.starred(self.loop, self.trained_loops)
        rows = html.rows(names, columns.values())
        return html.card(
            f"Gain and cost of each loop of {self.model}, trained with {self.trained_loops}",
            ["loop", *columns, "cost/gain"],
            [[*row, html.number(ratio, 2)] for row, ratio in zip(rows, self.cost_over_gain, strict=True)],
            [
                f"Nats per token. Intervals: 95 % over {self.documents} documents; they leave out the training seed. "
                "Loop 1 starts from the embedding and does not compare with the others.",
                html.beyond(names),
            ],
        )


def gain_cost(diagnosis: Diagnosis, *, seed: int = 0) -> GainCost:
    """The gain-cost curve of a diagnosis; its intervals leave out the training seed.

    Example:
        >>> from loopdiag.corpus import bundled
        >>> from loopdiag.diagnosis import diagnose
        >>> from loopdiag.model import load
        >>> curve = gain_cost(diagnose(load("tiny-plt-2"), bundled().take(16), measures=["prediction"], max_tokens=32))
        >>> curve.loop
        array([1, 2])
        >>> np.allclose(curve.net.mean, curve.gain.mean - curve.cost.mean)  # exact but for rounding
        True
    """
    diagnosis.require("nll_exit")
    nll = diagnosis.data["nll_exit"]
    data = diagnosis.data.sel(loop=diagnosis.loops)
    about = diagnosis.provenance
    return GainCost(
        model=about["model"],
        loop=diagnosis.loops,
        trained_loops=about["trained_loops"],
        gain=estimate(data["gain"], seed=seed),
        cost=estimate(data["cost"], seed=seed),
        net=estimate(-nll.diff("loop"), seed=seed),
        nll_exit=estimate(data["nll_exit"], seed=seed),
        documents=data.sizes["document"],
    )
