"""Training one looped model on packed text, with transformers' Trainer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from loopdiag.corpus import Batch
from loopdiag.files import whole
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM
from loopdiag.monitor import BATCH_SIZE, LoopMonitor

MONITORED = 32  # documents


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for every loop count.

    Attributes:
        tokens: Training tokens, each seen once.
        sequence: Tokens of a training sequence.
        batch_size: Sequences of a batch.
        learning_rate: Peak of a cosine schedule with warm-up.
        warmup: Share of the batches that warm up.
        weight_decay: AdamW's, on matrices.
        seed: Of initial weights and data order.
        bf16: Autocast to bfloat16.
        compile: torch.compile the model; needs a C compiler.
        evaluate_every: Batches between two looks at the held-out loss.
        monitor_every: Batches between two looks at what each loop gives and takes.
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
    monitor_every: int = 10

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


def monitored(held_out: np.ndarray) -> list[Batch]:
    """Batches of the documents that are looked at while training: a few, spread over the [document, pos] tokens."""
    few = np.linspace(0, len(held_out) - 1, min(len(held_out), MONITORED)).round().astype(int)
    batches = []
    for rows in np.split(few, range(BATCH_SIZE, len(few), BATCH_SIZE)):
        input_ids = torch.from_numpy(held_out[rows].astype(np.int64))
        names = tuple(f"held out {row}" for row in rows)
        batches.append(Batch(input_ids, torch.ones_like(input_ids, dtype=torch.bool), names, names))
    return batches


def _claim(folder: Path, cfg: LoopedConfig, recipe: Recipe) -> None:
    """Say in the folder which run it is of; refuse one of another, whose checkpoints would be taken for this one's."""
    # What changes speed alone may change when a stopped run goes on.
    ours = {"config": asdict(cfg), "recipe": asdict(recipe) | {"compile": None}}
    said = folder / "run.json"
    if said.is_file():
        if json.loads(said.read_text()) != ours:
            raise ValueError(f"{folder} holds another training run ({said.name} says which): give another folder.")
    elif folder.is_dir() and get_last_checkpoint(str(folder)):
        raise ValueError(f"{folder} holds checkpoints of an unknown training run: give another folder.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(said) as partial:
            partial.write_text(json.dumps(ours, indent=1) + "\n")


def train(cfg: LoopedConfig, recipe: Recipe, stream: np.ndarray, held_out: np.ndarray, folder: Path) -> LoopedLM:
    """Train a model from scratch, or go on where an earlier call in the same folder stopped.

    Args:
        cfg: The model.
        recipe: The training run.
        stream: Training tokens; `recipe.tokens` of them are used.
        held_out: [document, pos] tokens whose loss is logged on the way, and of some the gain and cost of each loop.
        folder: Checkpoints (the last one is kept) and `log.json`, all of that.

    Raises:
        ValueError: `stream` is shorter than the recipe asks for, or the folder holds another training run.
    """
    if len(stream) < recipe.tokens:
        raise ValueError(f"The recipe asks for {recipe.tokens:,} tokens and the stream has {len(stream):,}.")
    _claim(folder, cfg, recipe)
    model = LoopedLM(cfg)
    model.init_weights(recipe.seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.batches,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
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
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        prediction_loss_only=True,
        label_names=["input_ids"],
        save_steps=recipe.evaluate_every,
        save_total_limit=1,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = LoopedTrainer(
        model=model,
        args=arguments,
        train_dataset=Packed(stream[: recipe.tokens], recipe.sequence),
        eval_dataset=Packed(held_out.reshape(-1), recipe.sequence),
        callbacks=[LoopMonitor(monitored(held_out), recipe.monitor_every)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    with whole(folder / "log.json") as partial:
        partial.write_text(json.dumps(trainer.state.log_history, indent=1))
    return model.eval()
