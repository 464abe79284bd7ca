"""Held-out losses of matched models: what a sweep measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loopdiag import html
from loopdiag.errors import InputError
from loopdiag.results import About, Layout, Result

SCHEMA = 1


class SweepError(InputError):
    """A sweep that cannot be run or read; the message says what was given, what is allowed and how to fix it."""


@dataclass(frozen=True)
class SweepLosses(Result):
    """Losses of models that differ in nothing but loop count, offset, memory and seed, in nats per token.

    Attributes:
        data: By `seed, memory, offset, loops, document` the held-out loss `nll`, with NaN where a model is not trained
            yet; a model with one loop stands at every offset and memory. By the same, what tokens gain and lose from
            the next smaller loop count, `loop_helped` and `loop_harmed` (means over tokens of max(0, -d) and
            max(0, d), d the change of a token's loss), and what they gain and lose from the offset of that place
            against none, `offset_helped` and `offset_harmed`: 0 where there is none, NaN in a sweep that has no model
            without offset. `nll_look` has the losses on the way, after `look` training tokens. `learning_rate`
            [loops], `search_nll` [memory, offset, loops, rate] on the documents to choose on; `flops` and `kv_bytes` of
            a token, `kv_bytes_fixed`, `parameters_once` and `parameters_looped` [memory, offset, loops]. The coordinate
            `source` gives each document's cluster.
    """

    KIND, WRITTEN_BY, SCHEMA, ERROR = "sweep", "loopdiag sweep", SCHEMA, SweepError
    NUMBERS: ClassVar[Layout] = {
        **{name: (name,) for name in ("seed", "offset", "loops")},
        **dict.fromkeys(
            ("nll", "loop_helped", "loop_harmed", "offset_helped", "offset_harmed"),
            ("seed", "memory", "offset", "loops", "document"),
        ),
        "nll_look": ("seed", "memory", "offset", "loops", "look", "document"),
        "look": ("look",),
        **dict.fromkeys(
            ("flops", "kv_bytes", "kv_bytes_fixed", "parameters_once", "parameters_looped"),
            ("memory", "offset", "loops"),
        ),
        "learning_rate": ("loops",),
    }
    TEXTS: ClassVar[Layout] = {"memory": ("memory",), "document": ("document",), "source": ("document",)}
    ABOUT: ClassVar[About] = {"data": str, "recipe": dict}

    def __repr__(self) -> str:
        about, nll, seeds = self.provenance, self.data["nll"], self.data.sizes["seed"]
        trained = int(nll.notnull().all("document").sum())
        return (
            f"Sweep on {about['data']}: loops {', '.join(map(str, self.data['loops'].values))}, offsets "
            f"{', '.join(map(str, self.data['offset'].values))}, memory {', '.join(self.data['memory'].values)}, "
            f"{seeds} seed{'s' if seeds > 1 else ''}, {about['recipe']['tokens']:,} tokens each; "
            f"{trained} of {nll.size // nll.sizes['document']} places measured"
        )

    def _repr_html_(self) -> str:
        nll = self.data["nll"].mean("document", skipna=False).mean("seed").transpose("memory", "offset", "loops")
        body = [
            [f"memory {memory}, offset {offset}", *map(html.number, nll.sel(memory=memory, offset=offset).values)]
            for memory in nll["memory"].values
            for offset in nll["offset"].values
        ]
        headings = ["", *(f"{loops} loop{'s' if loops > 1 else ''}" for loops in nll["loops"].values)]
        return html.card(repr(self), headings, body, ["Held-out losses in nats per token, means of the seeds."])
