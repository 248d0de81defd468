"""Hugging Face's Trainer with LLaVA's sampler, learning rates and freezing, and with guards.

The loss is the mean over all supervised tokens of an optimizer step, on every device and in every
accumulated batch (LLaVA averaged each micro-batch by itself). Logits are computed at supervised
positions only. A step whose loss or gradient is not finite stops the run before weights change
(promise P18). A checkpoint counts once it is marked complete (P14), and holds what makes a resumed
run equal to one that never stopped (P15).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.trainer_pt_utils import nested_gather

from llava import ranks
from llava.data import ConversationDataset, ModalityLengthSampler, modality_lengths
from llava.errors import DataError, NonFiniteError
from llava.files import storage_errors, write_json
from llava.tokens import IGNORE_INDEX
from llava.train import checkpoints, zero
from llava.train.evaluation import held_out_loss, is_evaluated
from llava.train.interrupt import LoaderProcess
from llava.train.progress import Meter, Progress
from llava.train.rows import NumberedCollator, NumberedDataset

MASKED_LIMIT = 10  # optimizer steps in a row without a supervised token before the run stops
METERS = "meters.json"
_PROJECTORS = ("multi_modal_projector", "mm_projector")
_SHOWN = 64  # rows in an error


class EpochSampler(ModalityLengthSampler):
    """Modality grouping whose order depends on seed and epoch only: a resumed run agrees."""

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        world_size: int,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(lengths, batch_size, world_size, generator, accumulation)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


def token_losses(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy at every supervised position (T,), and which row of the batch it is in (T,).

    `inputs` hold `labels` (B, L). The output layer runs only at positions where some row of the
    batch is supervised; without any, the sum is 0 and still connected to every parameter.
    """
    labels = inputs.pop("labels")[:, 1:]
    supervised = labels != IGNORE_INDEX  # (B, L - 1)
    keep = supervised.any(dim=0).nonzero().flatten()  # (K,)
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits  # (B, K, V)
    chosen = supervised[:, keep]
    losses = F.cross_entropy(logits[chosen].float(), labels[:, keep][chosen], reduction="none")
    return losses, chosen.nonzero()[:, 0]


@contextmanager
def seen_beside(model: torch.nn.Module, pixel_values: torch.Tensor) -> Iterator[None]:
    """Inside, `model` also looks at a picture (1, 3, H, W) that changes no result (P19).

    Tower and projector run where they do for a batch with images, between embedding and language
    model, and are part of the gradient's graph there. ZeRO-3 needs that: it gathers weights module
    by module, so every process must come to the modules in one order, forwards and backwards.
    """
    llava = next(module for module in model.modules() if isinstance(module, LlavaModel))

    def look(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        features = llava.get_image_features(pixel_values, return_dict=True).pooler_output
        embedded = kwargs["inputs_embeds"]
        nothing = 0.0 * torch.cat(list(features)).sum().to(embedded.dtype)
        return args, {**kwargs, "inputs_embeds": embedded + nothing}

    # First of all hooks: ZeRO-3's own announces the language model's turn.
    hook = llava.language_model.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class LlavaTrainer(transformers.Trainer):
    """Trainer for a LLaVA or a language model alone.

    Args:
        export: writes the model as it is now, ready to use, into a folder; on every process.
        restore: puts back the weights that a checkpoint folder holds.
        eval_dataset: held-out samples for `evaluate`.

    `train` raises NonFiniteError, or DataError for a sample that cannot be used and when nothing
    is supervised: on every process, so that none waits for another.
    """

    loss_is_scaled_for_ga = True  # see `reduced`

    def __init__(
        self,
        *,
        export: Callable[[Path], None],
        restore: Callable[[Path], None],
        train_dataset: ConversationDataset,
        data_collator: Callable[[Sequence[dict]], dict[str, Any]],
        eval_dataset: ConversationDataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            train_dataset=NumberedDataset(train_dataset),
            eval_dataset=None if eval_dataset is None else NumberedDataset(eval_dataset),
            data_collator=NumberedCollator(data_collator),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # count the supervised tokens of a whole step
        self.export, self.restore = export, restore
        if self.args.ddp_broadcast_buffers is None:
            self.args.ddp_broadcast_buffers = False  # none of ours ever changes
        self.masked_steps = self.supervised_steps = 0
        self.step_rows: list[int] = []
        self.meter = Meter()
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(Progress(not self.args.disable_tqdm, self.meter, len(train_dataset)))
        self.add_callback(Resumed(self))

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        inner = loader.base_dataloader  # of accelerate's, which hands on what is asked of it
        inner.worker_init_fn = LoaderProcess(inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        sampler = EpochSampler(
            modality_lengths(self.train_dataset.dataset.records),
            self.args.train_batch_size,
            self.args.world_size,
            self.args.data_seed or self.args.seed,
            self.args.gradient_accumulation_steps,
        )
        self.add_callback(EpochOrder(sampler))
        return sampler

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's; with `mm_projector_lr` the projector gets parameter groups of its own."""
        optimizer = super().create_optimizer(model)
        rate = self.args.mm_projector_lr
        if rate is None:
            return optimizer
        named = (model or self.model).named_parameters()
        projector = {id(p) for name, p in named if any(part in name for part in _PROJECTORS)}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in projector]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in projector]
                optimizer.add_param_group({**group, "params": moved, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # ---- a step ----------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any) -> tuple[list, int]:
        """The batches of one step and their number of supervised tokens, over all devices."""
        batches, n_tokens = super().get_batch_samples(*args)
        self.step_rows = [row for batch in batches for row in batch["rows"]]
        if n_tokens == 0:
            self.masked_steps += 1
            if self.masked_steps >= MASKED_LIMIT:
                raise DataError(self._all_masked(f"{MASKED_LIMIT} steps in a row"))
            return batches, 1  # a loss of 0 instead of 0 / 0
        self.masked_steps = 0
        self.supervised_steps += 1
        return batches, n_tokens

    def _get_num_items_in_batch(self, batches: list, device: torch.device) -> int:
        """Supervised tokens of the step, in one exchange with all else that processes share."""
        errors = [batch["error"] for batch in batches if "error" in batch]
        names = ("n_supervised", "n_tokens", "n_samples")
        on_this = [sum(batch.get(name, 0) for batch in batches) for name in names]
        *on_all, n_errors = ranks.total([*on_this, len(errors)])
        if n_errors:
            ranks.agree(errors[0] if errors else None)
        self.meter.add(samples=on_all[2], tokens=on_all[1])
        return (on_all if self.args.average_tokens_across_devices else on_this)[0]

    def _all_masked(self, when: str) -> str:
        return (
            f"{when} without a supervised token (around step {self.state.global_step}); do answers "
            "follow the questions, and do they fit into --model_max_length?"
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        rows = inputs["rows"]
        # Devices average their gradients, but the loss is already divided by the tokens of all.
        world_size = self.args.world_size if self.args.average_tokens_across_devices else 1
        loss = self._loss(model, inputs, num_items_in_batch) * world_size
        finite = bool(torch.isfinite(loss))
        if ranks.any_of(not finite):
            ranks.agree(None if finite else self._not_finite(f"loss is {loss.item()}", rows))
        return loss

    def _loss(self, model: torch.nn.Module, inputs: dict[str, Any], n_tokens: int) -> torch.Tensor:
        dummy = inputs.pop("pixel_values") if inputs.pop("dummy_image", False) else None
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        with nullcontext() if dummy is None else seen_beside(self.model, dummy):
            return self.reduced(*token_losses(model, tensors), inputs["rows"], n_tokens)

    def reduced(
        self,
        losses: torch.Tensor,
        sample: torch.Tensor,
        rows: Sequence[int],
        n_tokens: torch.Tensor | int,
    ) -> torch.Tensor:
        """The batch's loss from those of its tokens (T,), of `rows[sample]` (T,)."""
        return losses.sum() / n_tokens

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # With float16, overflow is normal: the loss scaler skips the step and scales less.
        if not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)):
            rows = sorted(row for part in ranks.gathered(self.step_rows) for row in part)
            raise self._not_finite(f"gradient's norm is {float(norm)}", rows)
        return norm

    def _not_finite(self, what: str, rows: Sequence[int]) -> NonFiniteError:
        names = [self.train_dataset.name(row) for row in rows[:_SHOWN]]
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        return NonFiniteError(
            f"step {self.state.global_step + 1}: the {what}; nothing was changed by it. Rows of "
            f"the batch, counted from 0: {', '.join(names)}{more}. Look at them, lower the "
            "learning rate, or use --bf16 instead of --fp16"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the speed since the last line."""
        if "loss" in logs:
            logs.update(self.meter.rates())
        super().log(logs, start_time)

    # ---- a run -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self.resumed_from = resume_from_checkpoint
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if not self.supervised_steps and self.state.global_step > self._initial_global_step:
            raise DataError(self._all_masked("the whole run went by"))
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # else resumed when all was done
            super()._run_epoch(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the supervised tokens of the held-out samples; see `held_out_loss`."""
        started = time.monotonic()
        self.model.eval()
        loss, n_tokens = held_out_loss(
            self._summed_loss,
            self.eval_dataset,
            self.data_collator,
            self.args.eval_batch_size,
            self.args.dataloader_num_workers,
        )
        if zero.stage(self.args) == 3:  # weights fetched for a backward pass that never comes
            self.deepspeed.empty_partition_cache()
        self.model.train()
        values = {"loss": loss, "tokens": n_tokens, "runtime": time.monotonic() - started}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def _summed_loss(self, batch: dict[str, Any]) -> tuple[float, int]:
        with self.compute_loss_context_manager():
            loss = self._loss(self.model, self._prepare_inputs(dict(batch)), 1)
        return loss.item(), batch["n_supervised"]

    # ---- checkpoints -----------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the model as it is now; to be called by all processes."""
        self.export(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        output_dir = Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if ranks.from_main((folder / checkpoints.MARKER).exists):
            return  # this step was saved a moment ago, before its epoch ended
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with storage_errors(folder, checkpoints.GOES_ON):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self._save_meters(folder)
        checkpoints.mark_complete(folder)
        if self.args.should_save:
            checkpoints.rotate(output_dir, limit, self.state.best_model_checkpoint)

    def _save_meters(self, folder: Path) -> None:
        """The losses since the last line of the log: a resumed run's curve is the same."""
        losses = nested_gather(self._tr_loss, self.args.parallel_mode).flatten().tolist()
        if self.args.should_save:
            write_json(folder / METERS, {"losses": losses, "since": self._globalstep_last_logged})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if zero.enabled(self.args):
            super()._load_best_model()
        else:
            self.restore(Path(self.state.best_model_checkpoint))


class EpochOrder(TrainerCallback):
    """Tells the sampler the epoch, also when a run is resumed in the middle of one."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class Resumed(TrainerCallback):
    """Puts back what Trainer leaves out when it goes on from a checkpoint."""

    def __init__(self, trainer: LlavaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        state.compute_steps(args, state.max_steps)  # as this command says, not the interrupted one
        if trainer.resumed_from is None:
            return
        saved = json.loads((Path(trainer.resumed_from) / METERS).read_text(encoding="utf-8"))
        losses = saved["losses"]
        mean = sum(losses) / len(losses)
        same_size = len(losses) == ranks.world_size()
        trainer._tr_loss += losses[ranks.rank()] if same_size else mean
        trainer._total_loss_scalar = -mean  # the average over this call leaves them out again
        trainer._globalstep_last_logged = saved["since"]
        at_epoch_end = float(state.epoch).is_integer()  # saved before the epoch's evaluation
        if args.eval_strategy == "epoch" and at_epoch_end and not is_evaluated(state):
            trainer.evaluate()
