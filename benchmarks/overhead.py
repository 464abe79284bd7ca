"""What measuring costs: a diagnosis of each group of measures against a bare forward with the same loops.

    python benchmarks/overhead.py [--models tiny-plt-4 100m] [--measures motion heads] [--repeats 3]

Prints the ratio of the two (median of paired runs, in turn, of one process) for a bundled model on 8 documents of 256
tokens and for a random model of 100M parameters on one document of 2,048 tokens: of the time on the wall, and of the
time on the processor, which other work on the machine lengthens less.

- Bare is `model(ids, return_type="last")`: every loop is run, and the head reads the last position alone. What logits
  of every token would cost stands beside it: a measure of the prediction needs those of every exit.
- Each row is a whole `diagnose` of that group, its forward included; "states" records and measures nothing.
- "default" are the default groups without the readouts; "everything" are all groups without the readouts, fixed_point,
  noise and tokens. Fitting translators takes several passes over other documents and is not timed. fixed_point runs the
  model about twice more, noise a few documents twice more, once in higher precision, and tokens a few once more,
  however large the corpus is: they have rows of their own.
- "baseline" are the same numbers as "default", as one would write them without the toolkit (`baseline.py`); that they
  are the same is asserted, for every measure.

Goals, on the larger model: default at most 1.5, everything at most 3, and default a fifth of the baseline in time and
memory. Then, in fresh processes, the peak of resident memory above the model for 1, 2 and 4 documents, one at a time
(it should not grow), and that of the baseline for one. Works on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import baseline
import torch
from loading_memory import in_fresh_process, resident
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import loopdiag as ld
from loopdiag.corpus import Corpus, Document, batches, tokenize
from loopdiag.measures import DEFAULT_GROUPS, GROUPS
from loopdiag.model import LoopedConfig, LoopedLM

LARGE = LoopedConfig(
    vocab_size=32000,
    d_model=768,
    n_layers=10,
    n_heads=12,
    n_kv_heads=12,
    d_head=64,
    d_mlp=2048,
    n_ctx=2048,
    n_loops=4,
    window=64,
)
APART = ("readouts", "fixed_point", "noise", "tokens")
TOGETHER = {
    "default": tuple(group for group in DEFAULT_GROUPS if group != "readouts"),
    "everything": tuple(group for group in GROUPS if group not in APART),
}
GOALS = {"default": 1.5, "everything": 3}
FASTER = 5  # than the baseline, and smaller
# glibc keeps freed blocks of up to 32 MB, and cannot always use them again; with this it gives back those from 1 MB on.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
# Documents and tokens of each.
SIZES = {"tiny-plt-4": (8, 256), "100m": (1, 2048)}


def load(name: str) -> LoopedLM:
    """A bundled model, or the large one."""
    return worded(LARGE) if name == "100m" else ld.load(name)


def worded(cfg: LoopedConfig) -> LoopedLM:
    """A model with random weights, and a word for every token."""
    model = LoopedLM(cfg).eval()
    model.init_weights(0)
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(cfg.vocab_size)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    return model


def documents(model: LoopedLM, name: str, count: int) -> Corpus:
    """Held-out code, or random words; nothing to fit on."""
    if name != "100m":
        return Corpus("bundled", (), ld.corpus.bundled().report[:count])
    return random_words(LARGE.vocab_size, count, LARGE.n_ctx)


def random_words(vocabulary: int, count: int, tokens: int) -> Corpus:
    """Documents for a model that `worded` made."""
    ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
    texts = (" ".join(f"w{token}" for token in row) for row in ids.tolist())
    return Corpus("random", (), tuple(Document(text, f"d{i}", f"d{i}") for i, text in enumerate(texts)))


def as_ids(model: LoopedLM, corpus: Corpus, max_tokens: int) -> list[list[int]]:
    """The documents as token ids."""
    return [document.input_ids for document in tokenize(corpus.report, model.tokenizer, max_tokens)]


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """On the wall, and on the processor."""
    starts = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - starts[0], time.process_time() - starts[1]


def ratios(ones: list[tuple[float, float]], others: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians over the pairs of one repeat, on the wall and on the processor."""
    walls, processors = zip(
        *((one[0] / other[0], one[1] / other[1]) for one, other in zip(ones, others, strict=True)), strict=True
    )
    return statistics.median(walls), statistics.median(processors)


@torch.no_grad()
def times(name: str, groups: list[str], repeats: int) -> None:
    """Print how long each row takes, as a multiple of the bare forward."""
    model, (count, tokens) = load(name), SIZES[name]
    corpus = documents(model, name, count)
    (batch,) = batches(tokenize(corpus.report, model.tokenizer, tokens), count)

    def diagnose(measures: tuple[str, ...]) -> Callable[[], object]:
        return lambda: ld.diagnose(model, corpus, max_tokens=tokens, batch_size=count, measures=measures)

    rows: dict[str, Callable[[], object]] = {
        "bare": lambda: model(batch.input_ids, return_type="last"),
        "logits": lambda: model(batch.input_ids),
        "states": lambda: ld.record(model, batch),
        **{group: diagnose(TOGETHER.get(group, (group,))) for group in groups if group != "baseline"},
    }
    if "baseline" in groups:
        ids = as_ids(model, corpus, tokens)
        rows["baseline"] = lambda: baseline.measure(model, ids)
        baseline.assert_same(baseline.measure(model, ids), ld.diagnose(model, corpus, measures=TOGETHER["default"]))
    rows["bare"]()
    taken: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for _ in range(repeats):
        for row, run in rows.items():
            taken[row].append(seconds(run))
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{name}: {size / 1e6:.1f}M parameters, {model.cfg.n_loops} loops, {count} x {tokens} tokens,", end=" ")
    wall, processor = (statistics.median(times) for times in zip(*taken["bare"], strict=True))
    print(f"bare {wall:.3f} s, {processor:.3f} s processor ({torch.get_num_threads()} threads, {repeats} repeats)")
    print("                   wall  processor")
    for row in list(rows)[1:]:
        wall, processor = ratios(taken[row], taken["bare"])
        goal = f"  goal at most {GOALS[row]}" if name == "100m" and row in GOALS else ""
        print(f"  {row:15} {wall:6.2f} {processor:10.2f}{goal}", flush=True)
    if {"baseline", "default"} <= set(taken):
        wall, processor = ratios(taken["baseline"], taken["default"])
        print(f"  baseline over default {wall:.1f}, {processor:.1f} processor  goal at least {FASTER}")


def memory(name: str, how: str) -> dict[str, float]:
    """Megabytes above the model at their peak, for more and more documents with the default measures or one without."""
    model, (_, tokens) = load(name), SIZES[name]
    model(torch.zeros(1, 8, dtype=torch.long))  # whatever is set up on the way belongs to no document
    before, peaks = resident("VmRSS"), {}
    for count in (1, 2, 4) if how == "default" else (1,):
        corpus = documents(model, name, count)
        if how == "default":
            ld.diagnose(model, corpus, max_tokens=tokens, batch_size=1, measures=TOGETHER["default"])
        else:
            baseline.measure(model, as_ids(model, corpus, tokens))
        peaks[str(count)] = (resident("VmHWM") - before) / 1e6
    return peaks


def peaks(name: str, how: str, **environment: str) -> dict[str, float]:
    """`memory` in a fresh process."""
    return in_fresh_process(__file__, "--models", name, "--memory", how, **environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    rows = [*(group for group in GROUPS if group != "readouts"), *TOGETHER, "baseline"]
    parser.add_argument("--measures", nargs="+", choices=rows, default=rows, metavar="GROUP", help="rows to time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", choices=("default", "baseline"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(memory(given.models[0], given.memory)))
        return
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    for name in given.models:
        times(name, given.measures, given.repeats)
        for what, environment in (("", {}), (", large blocks given back", GIVEN_BACK)):
            ours = peaks(name, "default", **environment)
            shown = ", ".join(f"{count}: {peak:,.0f} MB" for count, peak in ours.items())
            print(f"  peak above the model by documents, default measures{what}: {shown}")
        if "baseline" in given.measures:
            (theirs,) = peaks(name, "baseline").values()
            print(f"  baseline, one document: {theirs:,.0f} MB, {theirs / ours['1']:.1f} times as much", end=" ")
            print(f" goal at least {FASTER}")


if __name__ == "__main__":
    main()
