"""`python -m llava.train`: train a LLaVA, or a language model alone, with LLaVA's flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.integrations import integration_utils
from transformers.utils.generic import is_flash_attention_requested

from llava import ranks
from llava.data import Collator, ConversationDataset, InputFormat
from llava.errors import Preempted, UsageError
from llava.files import storage_errors, write_json
from llava.launch import process
from llava.model.checkpoint import Loaded
from llava.packing import PackingCollator
from llava.records import load_records
from llava.train import checkpoints, quantize, zero
from llava.train.arguments import Arguments, check_machine, parse
from llava.train.evaluation import is_evaluated
from llava.train.identity import FILE, check_same, identity
from llava.train.interrupt import Interrupt, StopAtSignal
from llava.train.plan.page import print_plan
from llava.train.plan.plan import take
from llava.train.stages import Exporter, load_model, prepare
from llava.train.trainer import LlavaTrainer


def make_dataset(
    arguments: Arguments, loaded: Loaded, path: str | None = None
) -> ConversationDataset:
    """The records of `path`, by default `--data_path`.

    Raises UsageError if they need images that cannot be had.
    """
    data = arguments.data
    path = path or data.data_path
    folder = Path(data.image_folder or ".")
    if not folder.is_dir():
        raise UsageError(f"--image_folder {folder}: no such directory")
    records = load_records(path)
    if loaded.image_processor is None and any(record.has_image for record in records):
        raise UsageError(f"{path}: has images; give --vision_tower and --image_folder")
    roots = [Path(root) for root in data.image_roots]
    return ConversationDataset(records, folder, InputFormat.of(loaded), roots)


def make_collator(loaded: Loaded, packing: bool = False) -> Collator | PackingCollator:
    """The collator that fits the model and, with `packing`, its attention."""
    processor = loaded.image_processor
    collator = Collator(loaded.tokenizer.pad_id, None if processor is None else processor.size)
    if not packing:
        return collator
    single_row = is_flash_attention_requested(loaded.model.get_decoder().config)
    return PackingCollator(collator, None if single_row else loaded.model_max_length)


def train(
    arguments: Arguments,
    trainer_type: Callable[..., LlavaTrainer] = LlavaTrainer,
    more: dict[str, Any] | None = None,
) -> None:
    """Run one stage of training and write its model to `--output_dir`.

    A run that was interrupted goes on from its newest complete checkpoint; one that is done says
    so. Raises Preempted after a signal, when a checkpoint is written. `more` is what else decides
    the run, where `trainer_type` does.
    """
    flags = arguments.training
    check_machine(flags)
    quantize.check(flags)
    check_trackers(flags.report_to)
    zero.start(flags)
    ranks.limit_waiting(flags.ddp_timeout)
    with Interrupt() as interrupt:
        set_seed(flags.seed)
        output_dir = Path(flags.output_dir)
        run = ranks.from_main(lambda: {**identity(arguments), **(more or {})})
        if ranks.from_main(lambda: is_done(output_dir, run)):
            return
        resumed = ranks.from_main(lambda: resume_point(arguments, run))
        trainer, exporter = make_trainer(arguments, run, trainer_type)
        stop = StopAtSignal(interrupt)
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=resumed)
        if stop.stopped:
            raise Preempted(
                f"{interrupt.received or 'a signal to another process'}: stopped after step "
                f"{trainer.state.global_step} of {trainer.state.max_steps}, its checkpoint is "
                "complete; the same command goes on"
            )
        finish(trainer, exporter, run)


def check_trackers(names: list[str]) -> None:
    """UsageError with the remedy if a tracker of `--report_to` is not installed."""
    for name in names:
        available = getattr(integration_utils, f"is_{name}_available", None)
        if available is not None and not available():
            raise UsageError(
                f"--report_to {name}: not installed; pip install {name}, or --report_to none"
            )


def is_done(output_dir: Path, run: dict) -> bool:
    """Whether the final model of this very run is there, and whole; UsageError if of another."""
    if not (output_dir / checkpoints.MARKER).is_file():
        return False
    check_same(output_dir, run)
    reason = checkpoints.flaw(output_dir)
    if reason is None:
        print(f"{output_dir}: already trained with these flags; nothing to do", file=sys.stderr)
        return True
    print(f"{output_dir}: {reason}; the model is written again", file=sys.stderr)
    return False


def resume_point(arguments: Arguments, run: dict) -> str | None:
    """The newest complete checkpoint; UsageError if it is of another run."""
    output_dir = Path(arguments.training.output_dir)
    if output_dir.resolve() == Path(arguments.model.model_name_or_path).resolve():
        raise UsageError(f"--output_dir {output_dir}: is the model itself; give another directory")
    newest = checkpoints.set_aside(output_dir)
    if newest is None:
        return None
    check_same(newest, run)
    if zero.enabled(arguments.training):
        checkpoints.check_owner(newest)
    return str(newest)


def make_trainer(
    arguments: Arguments, run: dict, trainer_type: Callable[..., LlavaTrainer] = LlavaTrainer
) -> tuple[LlavaTrainer, Exporter]:
    """Model and data of the flags, ready to train, and what writes the result."""
    loaded = load_model(arguments)
    data = make_dataset(arguments, loaded)
    held_out = arguments.data.eval_data_path
    model = prepare(arguments, loaded)
    exporter = Exporter(arguments, loaded, model)

    def export(folder: Path) -> None:
        exporter.checkpoint(folder)
        if ranks.rank() == 0:
            write_json(folder / FILE, run)

    trainer = trainer_type(
        model=model,
        args=arguments.training,
        train_dataset=data,
        data_collator=make_collator(loaded, arguments.training.packing),
        eval_dataset=make_dataset(arguments, loaded, held_out) if held_out else None,
        export=export,
        restore=exporter.restore,
    )
    return trainer, exporter


def finish(trainer: LlavaTrainer, exporter: Exporter, run: dict) -> None:
    """Evaluate where the last step was not, write the final model and mark it complete."""
    if trainer.eval_dataset is not None and not is_evaluated(trainer.state):
        trainer.evaluate()
    output_dir = Path(trainer.args.output_dir)
    main = trainer.is_world_process_zero()
    if main:
        (output_dir / checkpoints.MARKER).unlink(missing_ok=True)
        with storage_errors(output_dir):
            trainer.save_state()
    before = _inodes(output_dir)
    exporter.final()
    if main:
        write_json(output_dir / FILE, run)
    written = {name for name, inode in _inodes(output_dir).items() if before.get(name) != inode}
    checkpoints.mark_complete(output_dir, written)
    if main:
        print(f"wrote {output_dir}", file=sys.stderr)


def _inodes(folder: Path) -> dict[str, int]:
    """Files are written aside and renamed: what is new has another number."""
    if not folder.is_dir():
        return {}
    return {entry.name: entry.inode() for entry in os.scandir(folder) if entry.is_file()}


def main(attention: str | None = None) -> None:
    """Train as the command line says; `attention` is used where it names no other."""
    argv, plan = take(sys.argv[1:])
    arguments = parse(argv)
    arguments.model.attn_implementation = arguments.model.attn_implementation or attention
    if plan is None:
        train(arguments)
    else:
        print_plan(arguments, plan)


if __name__ == "__main__":
    process(main)
