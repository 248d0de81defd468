"""Hugging Face's Trainer with LLaVA's sampler, learning rates and freezing, and with a guard.

The loss is the mean over all supervised tokens of an optimizer step, on every device and in every
accumulated batch (LLaVA averaged each micro-batch by itself). Logits are computed at supervised
positions only. A step whose loss or gradient is not finite stops the run before weights change
(promise P18).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.trainer_utils import get_last_checkpoint

from llava.data import Collator, ConversationDataset, ModalityLengthSampler
from llava.errors import DataError, NonFiniteError, UserError
from llava.model.weights import State
from llava.tokens import IGNORE_INDEX

MASKED_LIMIT = 10  # optimizer steps in a row without a supervised token before the run stops
_PROJECTORS = ("multi_modal_projector", "mm_projector")


class NumberedDataset(Dataset):
    """Items with their row; an unusable sample is handed on as its error.

    An error that crosses from a loader process by itself would arrive as a page of traceback.
    """

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        try:
            return row, self.dataset[row]
        except UserError as error:
            return row, error


class NumberedCollator:
    """Batches that know their rows, or the error that one of their samples met."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        rows = [row for row, _ in items]
        try:
            for _, item in items:
                if isinstance(item, UserError):
                    raise item
            return {**self.collator([item for _, item in items]), "rows": rows}
        except UserError as error:
            return {"error": error, "rows": rows}


class EpochSampler(ModalityLengthSampler):
    """Modality grouping whose order depends on seed and epoch only: a resumed run agrees."""

    def __init__(self, lengths: Sequence[int], batch_size: int, world_size: int, seed: int) -> None:
        super().__init__(lengths, batch_size, world_size, torch.Generator().manual_seed(seed))
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


def supervised_loss(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], n_tokens: torch.Tensor | int
) -> torch.Tensor:
    """Sum of the cross entropy at supervised positions, divided by `n_tokens`.

    `inputs` hold `labels` (B, L). The output layer runs only at positions where some row of the
    batch is supervised; without any the result is 0 and still connected to every parameter.
    """
    labels = inputs.pop("labels")[:, 1:]
    supervised = labels != IGNORE_INDEX  # (B, L - 1)
    keep = supervised.any(dim=0).nonzero().flatten()  # (K,)
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits  # (B, K, V)
    chosen = supervised[:, keep]
    loss = F.cross_entropy(logits[chosen].float(), labels[:, keep][chosen], reduction="sum")
    return loss / n_tokens


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
        export: writes the model as it is now, ready to use, into a folder.
        restore: puts back the weights that a checkpoint folder holds.

    `train` raises NonFiniteError, or DataError for a sample that cannot be used and when nothing
    is supervised.
    """

    loss_is_scaled_for_ga = True  # see `supervised_loss`

    def __init__(
        self,
        *,
        export: Callable[[Path], None],
        restore: Callable[[Path], None],
        train_dataset: ConversationDataset,
        data_collator: Collator,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            train_dataset=NumberedDataset(train_dataset),
            data_collator=NumberedCollator(data_collator),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # count the supervised tokens of a whole step
        self.export, self.restore = export, restore
        self.masked_steps = self.supervised_steps = 0
        self.rows: list[int] = []
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(Progress(bar=not self.args.disable_tqdm))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        sampler = EpochSampler(
            self.train_dataset.dataset.modality_lengths(),
            self.args.train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.data_seed or self.args.seed,
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
        projector = {id(p) for name, p in named if any(key in name for key in _PROJECTORS)}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in projector]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in projector]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_batch_samples(self, *args: Any) -> tuple[list, torch.Tensor | int]:
        """The batches of one step and their number of supervised tokens, over all devices."""
        batches, n_tokens = super().get_batch_samples(*args)
        if n_tokens == 0:
            self.masked_steps += 1
            if self.masked_steps >= MASKED_LIMIT:
                raise DataError(self._all_masked(f"{MASKED_LIMIT} steps in a row"))
            return batches, n_tokens + 1  # a loss of 0 instead of 0 / 0
        self.masked_steps = 0
        self.supervised_steps += 1
        return batches, n_tokens

    def _get_num_items_in_batch(self, batches: list, device: torch.device) -> torch.Tensor | int:
        for batch in batches:
            if "error" in batch:
                raise batch["error"]
        return super()._get_num_items_in_batch(batches, device)

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
        self.rows = inputs.pop("rows")
        dummy = inputs.pop("pixel_values") if inputs.pop("dummy_image", False) else None
        # Devices average their gradients, but the loss is already divided by the tokens of all.
        world_size = self.args.world_size if self.args.average_tokens_across_devices else 1
        with nullcontext() if dummy is None else seen_beside(self.model, dummy):
            loss = supervised_loss(model, inputs, num_items_in_batch) * world_size
        if not torch.isfinite(loss):
            raise NonFiniteError(self._not_finite(f"loss is {loss.item()}"))
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # With float16, overflow is normal: the loss scaler skips the step and scales less.
        if not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)):
            raise NonFiniteError(self._not_finite(f"gradient's norm is {float(norm)}"))
        return norm

    def _not_finite(self, what: str) -> str:
        return (
            f"step {self.state.global_step + 1}: the {what}; nothing was changed by it. Rows of "
            f"the last batch, counted from 0: {', '.join(map(str, self.rows))}. Lower the "
            "learning rate, or use --bf16 instead of --fp16"
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        if not self.supervised_steps and self.state.global_step:
            raise DataError(self._all_masked("the whole run went by"))
        return result

    def _save(self, output_dir: str | None = None, state_dict: State | None = None) -> None:
        if self.args.should_save:
            self.export(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.restore(Path(resume_from_checkpoint))


def last_checkpoint(output_dir: str) -> str | None:
    """The newest `checkpoint-N` that was written to the end, to resume from."""
    if not Path(output_dir).is_dir():
        return None
    found = get_last_checkpoint(output_dir)
    if found is not None and not (Path(found) / "trainer_state.json").is_file():
        return None
    return found


class EpochOrder(TrainerCallback):
    """Tells the sampler the epoch, also when a run is resumed in the middle of one."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class Progress(TrainerCallback):
    """A bar on a terminal, else one line every `logging_steps`."""

    def __init__(self, bar: bool) -> None:
        self.show_bar = bar
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.show_bar and state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        text = (
            f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
            f"grad {logs.get('grad_norm', float('nan')):.3f}"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(
                f"step {state.global_step}/{state.max_steps}  {text}", file=sys.stderr, flush=True
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
