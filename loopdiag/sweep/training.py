"""Training one looped model on packed text, with transformers' Trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loopdiag.corpus import Batch
from loopdiag.files import whole
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM
from loopdiag.monitor import BATCH_SIZE, LoopMonitor, undisturbed

MONITORED = 32  # documents


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for every loop count.

    Attributes:
        tokens: Training tokens.
        sequence: Tokens of a training sequence.
        batch_size: Sequences of a batch.
        learning_rate: Peak of a cosine schedule with warm-up.
        warmup: Share of the batches that warm up.
        weight_decay: AdamW's, on matrices.
        seed: Of initial weights and data order.
        bf16: Autocast to bfloat16.
        compile: torch.compile the model; needs a C compiler.
        evaluate_every: Batches between two looks at the held-out loss, each with a checkpoint.
        monitor_every: Batches between two looks at what each loop gives and takes; none when None.
    """

    tokens: int
    sequence: int = 256
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    seed: int = 0
    bf16: bool = True
    compile: bool = True
    evaluate_every: int = 160
    monitor_every: int | None = 10

    @property
    def batches(self) -> int:
        """Batches of the run."""
        return self.tokens // (self.sequence * self.batch_size)


class Packed(Dataset):
    """A stream of tokens cut into sequences of equal length."""

    def __init__(self, stream: np.ndarray, sequence: int) -> None:
        self.rows = stream[: len(stream) // sequence * sequence].reshape(-1, sequence)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self.rows[index].astype(np.int64))}


class LoopedTrainer(Trainer):
    """Trainer for a model that is not one of transformers' own."""

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        loss = model(inputs["input_ids"], return_type="loss")
        return (loss, {"loss": loss}) if return_outputs else loss


class HeldOutLoss(TrainerCallback):
    """Looks at the held-out documents' losses and keeps them in the Trainer's history, and so in its checkpoints.

    Args:
        model: The bare model, whatever training wraps it in.
        held_out: Batches of documents.
        every: Updates from one look to the next; there is one after the last update, too.
    """

    def __init__(self, model: LoopedLM, held_out: Sequence[Batch], every: int) -> None:
        self.model, self.held_out, self.every = model, held_out, every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        nll = [float(losses.mean()) for losses in token_losses(self.model, self.held_out)]
        entry: dict[str, Any] = {"step": state.global_step, "eval_loss": float(np.mean(nll)), "eval_nll": nll}
        state.log_history.append(entry)
        control.should_save = True


class _Tell(TrainerCallback):
    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def token_losses(model: LoopedLM, held_out: Sequence[Batch]) -> list[np.ndarray]:
    """What each document's tokens cost a model, run with the loops that it was trained with.

    In the dtype of the weights, also where training runs under autocast; the model is left as it was.

    Returns:
        For each document the negative log likelihood of its tokens from the second on, in nats, float32.
    """
    found = []
    with undisturbed(model):
        for batch in held_out:
            ids = batch.input_ids.to(model.embed.weight.device)
            logits = model(ids, batch.attention_mask.to(ids.device))[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
            found += [row[there].numpy() for row, there in zip(nll, batch.attention_mask[:, 1:], strict=True)]
    return found


def rows_as_batches(rows: np.ndarray) -> list[Batch]:
    """Batches of documents of one length, from [document, pos] tokens."""
    batches = []
    for first in range(0, len(rows), BATCH_SIZE):
        input_ids = torch.from_numpy(rows[first : first + BATCH_SIZE].astype(np.int64))
        names = tuple(f"held out {first + row}" for row in range(len(input_ids)))
        batches.append(Batch(input_ids, torch.ones_like(input_ids, dtype=torch.bool), names, names))
    return batches


def monitored(rows: np.ndarray) -> list[Batch]:
    """Batches of the documents that are looked at while training: a few, spread over the [document, pos] tokens."""
    return rows_as_batches(rows[np.linspace(0, len(rows) - 1, min(len(rows), MONITORED)).round().astype(int)])


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint; one that a kill left half written goes away."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for step in sorted(steps, reverse=True):
        try:  # what the Trainer writes last
            if json.loads((steps[step] / "trainer_state.json").read_text())["global_step"] == step:
                return steps[step]
        except (OSError, ValueError, KeyError):
            pass
        shutil.rmtree(steps[step])
    return None


def _claim(folder: Path, cfg: LoopedConfig, recipe: Recipe) -> None:
    """Say in the folder which run it is of; refuse one of another, whose checkpoints would be taken for this one's."""
    # What changes speed alone may change when a stopped run goes on.
    ours = {"config": asdict(cfg), "recipe": asdict(recipe) | {"compile": None}}
    said = folder / "run.json"
    if said.is_file():
        if json.loads(said.read_text()) != ours:
            raise ValueError(f"{folder} holds another training run ({said.name} says which): give another folder.")
    elif folder.is_dir() and _last_whole_checkpoint(folder):
        raise ValueError(f"{folder} holds checkpoints of an unknown training run: give another folder.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(said) as partial:
            partial.write_text(json.dumps(ours, indent=1) + "\n")


def train(
    cfg: LoopedConfig,
    recipe: Recipe,
    stream: np.ndarray,
    held_out: Sequence[Batch],
    folder: Path,
    *,
    start: Mapping[str, Tensor] | None = None,
    watched: Sequence[Batch] = (),
    progress: Callable[[int, int], None] | None = None,
) -> LoopedLM:
    """Train a model, or go on where an earlier call in the same folder stopped.

    Args:
        cfg: The model.
        recipe: The training run.
        stream: Training tokens; of a longer one `recipe.tokens` are used, a shorter one is seen again.
        held_out: Documents whose loss is looked at on the way.
        folder: Checkpoints (the last one is kept) and `log.json`, all of that.
        start: Weights to train on from, by name; those that the model has beyond them are fresh.
        watched: Documents of which each loop's gain and cost are looked at, every `recipe.monitor_every` batches.
        progress: Called with (updates done, of how many).

    Raises:
        ValueError: `stream` is shorter than a batch, `start` is of another model, or the folder holds another run.
    """
    if len(stream) < recipe.sequence * recipe.batch_size:
        raise ValueError(
            f"A batch of the recipe has {recipe.sequence * recipe.batch_size:,} tokens and the stream {len(stream):,}."
        )
    _claim(folder, cfg, recipe)
    # After a few models torch would hold what it compiled for too much, and go on without compiling.
    torch.compiler.reset()
    model = LoopedLM(cfg)
    model.init_weights(recipe.seed)
    if start is not None:
        differ = model.load_state_dict(start, strict=False)
        # A shared memory needs gates, and nothing else is a wiring's own.
        if other := [name for name in (*differ.missing_keys, *differ.unexpected_keys) if ".attn.gate" not in name]:
            raise ValueError(f"The weights to start from do not fit the model: {', '.join(other[:4])}.")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.batches,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup * recipe.batches),
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=recipe.compile,
        logging_steps=20,
        save_strategy="no",  # HeldOutLoss asks for it
        save_total_limit=1,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        disable_tqdm=progress is not None,
        report_to="none",
    )
    # Of several devices the Trainer would use all, and a batch would be as many times larger.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    callbacks: list[TrainerCallback] = [HeldOutLoss(model, held_out, recipe.evaluate_every)]
    if watched and recipe.monitor_every:
        # Before the one that asks for a checkpoint, which keeps what was looked at.
        callbacks.insert(0, LoopMonitor(watched, recipe.monitor_every))
    if progress is not None:
        callbacks.append(_Tell(progress))
    dataset = Packed(stream[: recipe.tokens], recipe.sequence)
    trainer = LoopedTrainer(model=model, args=arguments, train_dataset=dataset, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    last = _last_whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    with whole(folder / "log.json") as partial:
        partial.write_text(json.dumps(trainer.state.log_history, indent=1))
    return model.eval()
