"""`python -m llava.train`: train a LLaVA, or a language model alone, with LLaVA's flags."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from transformers import set_seed

from llava.conversation import get_template
from llava.data import Collator, ConversationDataset, load_records
from llava.errors import UsageError, run_main
from llava.model.checkpoint import Loaded

from .arguments import Arguments, parse
from .stages import Exporter, load_model, prepare
from .trainer import LlavaTrainer, last_checkpoint


def make_dataset(arguments: Arguments, loaded: Loaded) -> ConversationDataset:
    """The records of `--data_path`; UsageError if they need images that cannot be had."""
    data = arguments.data
    folder = Path(data.image_folder or ".")
    if not folder.is_dir():
        raise UsageError(f"--image_folder {folder}: no such directory")
    records = load_records(data.data_path)
    if loaded.image_processor is None and any(record.has_image for record in records):
        raise UsageError(f"{data.data_path}: has images; give --vision_tower and --image_folder")
    template = get_template(loaded.template_name)
    roots = [Path(root) for root in data.image_roots]
    return ConversationDataset(
        records, folder, template, loaded.tokenizer, loaded.image_processor, roots
    )


def make_collator(loaded: Loaded) -> Collator:
    """The collator that fits the model."""
    processor = loaded.image_processor
    return Collator(
        pad_id=loaded.tokenizer.pad_id,
        image_token_id=loaded.image_token_id,
        n_image_tokens=loaded.n_image_tokens,
        model_max_length=loaded.model_max_length,
        image_size=None if processor is None else processor.size,
    )


def train(arguments: Arguments) -> None:
    """Run one stage of training and write its model to `--output_dir`.

    A run that was interrupted goes on from its newest checkpoint, if it wrote any.
    """
    flags = arguments.training
    set_seed(flags.seed)
    loaded = load_model(arguments)
    dataset = make_dataset(arguments, loaded)
    model = prepare(arguments, loaded)
    exporter = Exporter(arguments, loaded, model)
    trainer = LlavaTrainer(
        model=model,
        args=flags,
        train_dataset=dataset,
        data_collator=make_collator(loaded),
        export=exporter.checkpoint,
        restore=exporter.restore,
    )
    if trainer.is_world_process_zero():
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{len(dataset)} samples, {n_trained:,} trainable parameters, "
            f"{flags.device.type}, {flags.compute_dtype}",
            file=sys.stderr,
        )
    trainer.train(resume_from_checkpoint=last_checkpoint(flags.output_dir))
    if trainer.is_world_process_zero():
        trainer.save_state()
        exporter.final()
        print(f"wrote {flags.output_dir}", file=sys.stderr)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    train(parse(sys.argv[1:]))


if __name__ == "__main__":
    run_main(main)
