"""The bundled family: models that differ in nothing but the loop count, trained on Python source.

    python -m loopdiag.sweep.family [--work build/family]

prepares text and tokenizer, trains each model (a stopped run goes on where it was), and writes the bundled
documents and models into the package. With `--out` the models go into a folder instead, and the package stays as it
is; `make figures/saved/emergence.json` trains one on a quarter of the budget so, for a figure of its looks.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loopdiag.bootstrap import interval, resampled_means
from loopdiag.corpus import bundled
from loopdiag.diagnosis import diagnose
from loopdiag.files import whole
from loopdiag.model.config import LoopedConfig
from loopdiag.model.loading import BUNDLED, load
from loopdiag.model.saving import save
from loopdiag.sweep import sources
from loopdiag.sweep.training import MONITORED, Recipe, monitored, rows_as_batches, train

DOCUMENTS = BUNDLED.parents[1] / "corpus" / "bundled"
END = "<|endoftext|>"
LOOPS = (1, 2, 3, 4)
RECIPE = Recipe(tokens=10_485_760)
CHARACTERS_PER_PACKAGE = 2_500_000
DOCUMENTS_PER_PACKAGE, CHARACTERS_PER_DOCUMENT = 5, 2000


def config(n_loops: int) -> LoopedConfig:
    """The family's member with `n_loops` loops: LoopCoder-V2's settings at toy size."""
    return LoopedConfig(
        vocab_size=2048,
        d_model=128,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_head=32,
        d_mlp=384,
        n_ctx=RECIPE.sequence,
        n_loops=n_loops,
        window=33,
    )


def held_out_documents() -> list[dict[str, str]]:
    """Excerpts of packages that no training file comes from; whole packages go to one half of the split."""
    documents = []
    for number, package in enumerate(sources.HELD_OUT_PACKAGES):
        pieces = (
            (file, sources.excerpt(file, CHARACTERS_PER_DOCUMENT))
            for file in sorted(sources.package_files(package), key=lambda file: file.key)
        )
        kept = [(file, text) for file, text in pieces if text][:DOCUMENTS_PER_PACKAGE]
        _, licence, _ = sources.licence(package)
        documents += [
            {
                "name": f"{package}/{file.path}",
                "source": package,
                "split": ("fit", "report")[number % 2],
                "licence": licence,
                "text": text,
            }
            for file, text in kept
        ]
    return documents


def notice() -> str:
    """The licences under which the bundled documents are passed on."""
    parts = [
        "# Licences of the bundled documents",
        "",
        "`documents.jsonl` holds excerpts of Python files of the packages below, unchanged but for their length. Each",
        "remains under its own licence, whose text follows.",
    ]
    for package in sources.HELD_OUT_PACKAGES:
        distribution, licence, text = sources.licence(package)
        parts += ["", f"## {package} ({distribution}): {licence}", "", "```", text.strip().replace("```", "'''"), "```"]
    return "\n".join(parts) + "\n"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; token 0 ends a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=RECIPE.sequence
    )


def prepare(work: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Tokenizer, training stream and held-out rows; made once, then read back from `work`."""
    tokens = work / "tokens.npz"
    if not tokens.is_file():
        documents = held_out_documents()
        training = sources.training_files([document["text"] for document in documents], CHARACTERS_PER_PACKAGE)
        tokenizer = train_tokenizer([file.text for file in training[::4]], config(1).vocab_size)
        encoded = tokenizer([file.text for file in training], verbose=False)["input_ids"]
        lengths = np.cumsum([len(ids) + 1 for ids in encoded])
        used = int(np.searchsorted(lengths, RECIPE.tokens)) + 1
        stream = np.concatenate([np.array([*ids, 0], dtype=np.uint16) for ids in encoded[:used]])
        held_out = [tokenizer(document["text"], verbose=False)["input_ids"] for document in documents]
        if min(map(len, held_out)) < RECIPE.sequence:
            raise RuntimeError("A held-out document is shorter than a training sequence.")
        work.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(work / "tokenizer")
        (work / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        packages = sorted({file.package for file in training[:used]})
        facts = {"training_files": used, "training_packages": {name: sources.licence(name)[:2] for name in packages}}
        (work / "data.json").write_text(json.dumps(facts, indent=1))
        rows = np.array([ids[: RECIPE.sequence] for ids in held_out], dtype=np.uint16)
        with whole(tokens) as partial, partial.open("wb") as file:
            np.savez(file, stream=stream, held_out=rows)
    with np.load(tokens) as stored:
        return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer"), stored["stream"], stored["held_out"]


def card(work: Path) -> str:
    """The family's model card: data, licences, budget, curves and held-out loss, all read off what is there."""
    data = json.loads((work / "data.json").read_text())
    logs = {n_loops: json.loads((work / f"plt-{n_loops}" / "log.json").read_text()) for n_loops in LOOPS}
    report = bundled()
    nll: dict[int, np.ndarray] = {}  # [document, loop 0..]
    for n_loops in LOOPS:
        model = load(f"tiny-plt-{n_loops}")
        measured = diagnose(model, report, n_loops=max(LOOPS), measures=["prediction"]).data["nll_exit"]
        nll[n_loops] = measured.values
    sources = measured["source"].values
    parameters = sum(weight.numel() for weight in model.parameters())

    def shown(values: np.ndarray) -> str:
        low, high = interval(resampled_means(values, sources))
        return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"

    own = [(f"{n}", shown(nll[n][:, n]), shown(nll[n][:, n] - nll[n - 1][:, n - 1]) if n > 1 else "") for n in LOOPS]
    elsewhere = [(f"tiny-plt-{n}", *(f"{value:.3f}" for value in nll[n].mean(0)[1:])) for n in LOOPS]
    looks = {
        n_loops: {entry["step"]: float(entry["eval_loss"]) for entry in log if "eval_loss" in entry}
        for n_loops, log in logs.items()
    }
    curves = [
        (f"{step * RECIPE.sequence * RECIPE.batch_size / 1e6:.1f}M", *(f"{looks[n][step]:.3f}" for n in LOOPS))
        for step in looks[LOOPS[0]]
    ]
    packages = [tuple(facts) for facts in sorted({tuple(facts) for facts in data["training_packages"].values()})]
    fit, reported = len(report.fit), len(report.report)
    return f"""# tiny-plt-1 to tiny-plt-4

Parallel Loop Transformers with 1 to 4 loops, trained from scratch by `make family` on Python source. They differ in
nothing but the loop count: same tokenizer, initial weights, data order, seed and budget. They are made for looking at
loops, not for writing code. This page is written by the command that trains them.

- **Architecture**: LoopCoder-V2's settings at toy size: {parameters:,} parameters, {config(1).n_layers} layers, width
  {config(1).d_model}, {config(1).n_heads} heads ({config(1).n_kv_heads} key/value), vocabulary {config(1).vocab_size},
  context {config(1).n_ctx}, window {config(1).window}, offset 1, a = {config(1).embed_scale},
  b = {config(1).carry_scale}.
- **Budget**: {RECIPE.tokens:,} tokens each, seen once; AdamW, peak rate {RECIPE.learning_rate:g} for every loop count,
  cosine schedule, batches of {RECIPE.batch_size} x {RECIPE.sequence} tokens, bfloat16 autocast, seed {RECIPE.seed}.
- **Training text**: {data["training_files"]:,} Python files of the packages below, in hash order, tests and vendored
  copies left out, and so is every file that shares five lines in a row with a held-out document.
- **Held-out text**: {fit + reported} excerpts from packages that no training file came from, split by package: {fit} to
  fit readouts, {reported} to report on (`loopdiag/corpus/bundled`, with licences).
- **One training seed**: the intervals below are over documents and leave it out.

## Held-out loss

Nats per token on the report documents, cut at {config(1).n_ctx} tokens, with the trained loop count; in brackets 95 %
bootstrap intervals over documents, clustered by package. The change is paired: the same documents, read by the model
with one loop fewer.

{_table(("loops", "NLL", "change from one loop fewer"), own)}

The same models stopped after each loop, or run beyond what they were trained with:

{_table(("model", *(_loops(loop) for loop in LOOPS)), elsewhere)}

## Curves

Loss on all {fit + reported} held-out documents against training tokens.

{_table(("tokens", *(_loops(n_loops) for n_loops in LOOPS)), curves)}

## Packages that training files came from

{_table(("package", "licence"), packages)}
"""


def looks(n_loops: int, recipe: Recipe, log: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What a log says of single loops, with what it takes to read and to repeat it."""
    return {
        "n_loops": n_loops,
        "tokens": recipe.tokens,
        "tokens_per_update": recipe.sequence * recipe.batch_size,
        "seed": recipe.seed,
        "documents": MONITORED,
        "log": [entry for entry in log if any(name.startswith("loop_") for name in entry)],
    }


def _loops(count: int) -> str:
    return f"{count} loop{'s' if count > 1 else ''}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Make the family."""
    parser = argparse.ArgumentParser(description="Train the bundled models again.")
    parser.add_argument("--work", type=Path, default=Path("build/family"), help="checkpoints and prepared text")
    parser.add_argument("--loops", type=int, nargs="+", default=LOOPS, help="members to train")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile (slower)")
    parser.add_argument("--tokens", type=int, default=RECIPE.tokens, help="training tokens of each; needs --out")
    parser.add_argument("--out", type=Path, help="where models go, instead of replacing the bundled ones")
    parser.add_argument("--looks", type=Path, help="JSON file for the looks at the loops of the last member trained")
    arguments = parser.parse_args()
    if arguments.tokens != RECIPE.tokens and arguments.out is None:
        parser.error("--tokens is not the family's budget: give --out, so that no bundled model is replaced.")
    if arguments.tokens > RECIPE.tokens:
        parser.error(f"--tokens {arguments.tokens} is more than the prepared text has: {RECIPE.tokens}.")
    tokenizer, stream, held_out = prepare(arguments.work)
    recipe = replace(RECIPE, tokens=arguments.tokens, compile=not arguments.no_compile)
    for n_loops in arguments.loops:
        folder = arguments.work / f"plt-{n_loops}"
        looked_at = rows_as_batches(held_out)
        model = train(config(n_loops), recipe, stream, looked_at, folder, watched=monitored(held_out))
        model.tokenizer = tokenizer
        save(model, (arguments.out or BUNDLED) / f"tiny-plt-{n_loops}", dtype="bfloat16")
    if arguments.looks is not None:
        log = json.loads((arguments.work / f"plt-{n_loops}" / "log.json").read_text())
        arguments.looks.parent.mkdir(parents=True, exist_ok=True)
        with whole(arguments.looks) as partial:
            partial.write_text(json.dumps(looks(n_loops, recipe, log), indent=1) + "\n")
    if arguments.out is not None:
        return
    DOCUMENTS.mkdir(exist_ok=True)
    shutil.copy(arguments.work / "documents.jsonl", DOCUMENTS)
    (DOCUMENTS / "NOTICE.md").write_text(notice(), encoding="utf-8")
    if all((arguments.work / f"plt-{n_loops}" / "log.json").is_file() for n_loops in LOOPS):
        (BUNDLED / "README.md").write_text(card(arguments.work), encoding="utf-8")


if __name__ == "__main__":
    main()
