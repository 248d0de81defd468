"""`--plan` against what real runs do: steps, tokens, batches, bytes and FLOPs; whether it fits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.errors import DataError, UsageError
from llava.model.weights import read_tensors
from llava.train import __main__ as entry
from llava.train.arguments import parse
from llava.train.plan import footprint
from llava.train.plan.flops import ATTENTION_BACKWARD, count
from llava.train.plan.lengths import Batch
from llava.train.plan.page import print_plan
from llava.train.plan.plan import Plan, count_checkpoints, make_plan, steps_per_epoch, take
from llava.train.trainer import LlavaTrainer

ROOT = Path(__file__).parents[4]
ALONE = {"vision_tower": None, "image_folder": None}
STAGES = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0},
    "projector": {"tune_mm_mlp_adapter": True, "version": "plain", "data_path": "images.json"},
    "text": {"data_path": "text.json", **ALONE},
}


def planned(words: list[str], *own: str) -> Plan:
    argv, flags = take([*words, "--plan", *own])
    return make_plan(parse(argv), flags)


@pytest.fixture
def flags(run, squares) -> Callable[..., list[str]]:
    """Flags of one of STAGES with changes."""

    def flags(stage: str = "full", **changes) -> list[str]:
        changes = {**STAGES[stage], **changes}
        if "data_path" in changes:
            changes["data_path"] = squares / changes["data_path"]
        return run.flags("out", **changes)

    return flags


def real_batch(trainer: LlavaTrainer) -> tuple[dict, Batch]:
    """The trainer's first batch, and the same measured for the formulas."""
    batch = next(iter(trainer.get_train_dataloader()))
    supervised = batch["labels"][:, 1:] != -100
    no_image = batch.get("dummy_image") or "pixel_values" not in batch
    return batch, Batch(
        *batch["input_ids"].shape,
        n_samples=len(batch["rows"]),
        n_tokens=int(batch["attention_mask"].sum()),
        n_supervised=int(supervised.sum()),
        n_logits=int(supervised.any(dim=0).sum()),
        n_images=0 if no_image else len(batch["pixel_values"]),
    )


def n_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- steps, tokens and disk of a whole run -------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("full", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5}),
        ("lora", {"bf16": True, "num_train_epochs": 1.5, "save_strategy": "epoch"}),
        ("projector", {"bf16": True, "save_steps": 2, "save_strategy": "steps"}),
    ],
)
def test_a_real_run_is_what_was_planned(flags, stage, changes):
    """24 rows (16 for the projector) as one process trains them; all are tokenised."""
    whole = {"max_steps": -1, "num_train_epochs": 1, "group_by_modality_length": True}
    words = flags(stage, **{**whole, **changes, "include_num_input_tokens_seen": True})
    plan = planned(words)
    arguments = parse(words)
    trainer, exporter = entry.make_trainer(arguments, {})
    counted = [*trainer.get_train_dataloader()]
    trainer.train()
    entry.finish(trainer, exporter, {})
    out = Path(arguments.training.output_dir)

    assert plan.steps.total == trainer.state.global_step
    assert plan.steps.per_epoch == steps_per_epoch(len(trainer.train_dataset), *_shape(arguments))
    assert plan.model.n_trained == sum(
        p.numel() for p in trainer.model.parameters() if p.requires_grad
    )
    assert plan.model.n_parameters == sum(p.numel() for p in trainer.model.parameters())
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in counted)
    n_positions = sum(batch["input_ids"].numel() for batch in counted)
    n_supervised = sum(int((batch["labels"] != -100).sum()) for batch in counted)
    assert plan.lengths.n_sampled == plan.steps.n_samples == len(trainer.train_dataset)
    assert plan.lengths.standard_error == 0
    assert plan.tokens == pytest.approx(n_tokens * plan.steps.epochs, rel=1e-12)
    assert plan.lengths.padding_share == pytest.approx(1 - n_tokens / n_positions, rel=1e-12)
    assert plan.lengths.supervised_share == pytest.approx(n_supervised / n_tokens, rel=1e-12)
    if plan.steps.epochs == 1:
        assert trainer.state.num_input_tokens_seen == n_positions
    _compare_disk(plan, out)


def _shape(arguments) -> tuple[int, int, int]:
    training = arguments.training
    return training.per_device_train_batch_size, training.gradient_accumulation_steps, 1


def _compare_disk(plan: Plan, out: Path) -> None:
    """Bytes of tensors in the files; those of headers and settings are not planned."""
    assert _stored(out) == plan.disk.final
    kept = list(out.glob("checkpoint-*"))
    assert len(kept) == plan.disk.n_checkpoints
    for folder in kept:
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        moments = n_bytes(t for state in optimizer.values() for t in state.values() if t.dim())
        assert _stored(folder) + moments == plan.disk.checkpoint
    assert plan.disk.total >= plan.disk.n_checkpoints * plan.disk.checkpoint + plan.disk.final


def _stored(folder: Path) -> int:
    """Of weights, in every file of a model."""
    names = ("*.safetensors", "mm_projector.bin", "non_lora_trainables.bin")
    files = [path for name in names for path in folder.glob(name)]
    return n_bytes(tensor for path in files for tensor in read_tensors(path).values())


# ---- memory and FLOPs of one step ----------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_bytes_and_flops_of_a_real_step(flags, stage, checkpointing):
    """Weights, gradients, moments and FLOPs to the last one; what the backward keeps to 5 %."""
    bf16 = stage != "text"
    words = flags(
        stage,
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        attn_implementation="eager",  # the counter does not know the CPU's fused attention
        max_steps=1,
    )
    plan = planned(words)
    trainer, _ = entry.make_trainer(parse(words), {})
    trainer.train()
    model = trainer.model
    batch, shape = real_batch(trainer)
    with FlopCounterMode(display=False) as counter:
        with kept_bytes(model) as kept, trainer.compute_loss_context_manager():
            loss = trainer._loss(model, dict(batch), shape.n_supervised)
        loss.backward()
    states = trainer.optimizer.state.values()
    assert plan.memory.weights == n_bytes(model.parameters())
    assert plan.memory.gradients == n_bytes(p.grad for p in model.parameters() if p.requires_grad)
    assert plan.memory.optimizer == n_bytes(t for s in states for t in s.values() if t.dim())

    expected = count(plan.model, shape, checkpointing)
    twice = expected.attention * (1 - 3 / (1 + ATTENTION_BACKWARD))  # eager has no scores to redo
    # An adapter's second factor is not recomputed either: below 1 % of rank 4, nothing of more.
    tolerance = 1e-2 if stage == "lora" and checkpointing else 1e-12
    assert counter.get_total_flops() == pytest.approx(expected.total - twice, rel=tolerance)

    log_softmax = 4 * shape.n_supervised * plan.model.vocabulary
    casts = footprint.working_copies(plan.model, plan.setup) * (not checkpointing)
    activations = footprint.activations(plan.model, plan.setup, shape)
    # Rotary angles, masks and pictures are not in the formula: they weigh in tiny layers only.
    relative = 0.12 if checkpointing else 0.06
    assert kept["bytes"] == pytest.approx(activations + log_softmax + casts, rel=relative)


class kept_bytes:
    """Inside, counts what autograd keeps beside the parameters: each piece of memory once."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.pieces: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []  # so that no address is used twice
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.pieces[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)
        return tensor

    def __enter__(self) -> dict[str, int]:
        self.found: dict[str, int] = {}
        self.hooks.__enter__()
        return self.found

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)
        self.found["bytes"] = sum(self.pieces.values())


@pytest.mark.parametrize("stage", ["full", "lora"])
def test_padded_attention_of_pytorch_keeps_its_mask(flags, stage):
    words = flags(stage, bf16=True, max_steps=1)
    plan = planned(words)
    trainer, _ = entry.make_trainer(parse(words), {})
    trainer.train()  # makes autocast part of the model's forward
    batch, shape = real_batch(trainer)
    assert shape.n_tokens < shape.n_positions
    with kept_bytes(trainer.model) as kept, trainer.compute_loss_context_manager():
        trainer._loss(trainer.model, dict(batch), shape.n_supervised)
    log_softmax = 4 * shape.n_supervised * plan.model.vocabulary
    expected = footprint.activations(plan.model, plan.setup, shape) + log_softmax
    casts = footprint.working_copies(plan.model, plan.setup)
    assert kept["bytes"] == pytest.approx(expected + casts, rel=0.03)


@pytest.mark.slow
def test_bytes_of_real_deepspeed_states(flags, tmp_path):
    """ZeRO-2 and 3 on two processes: what each of them holds, to the last byte.

    Adam counts its steps in one number a group of weights, which is not planned.
    """
    runs = [
        flags(stage, deepspeed=f"scripts/zero{number}.json", bf16=True, max_steps=1)
        for number in (2, 3)
        for stage in ("full", "lora")
    ]
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(runs))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    script = Path(__file__).with_name("measured.py")
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.with_suffix(".measured").read_text())
    for words, measured in zip(runs, found, strict=True):
        plan = planned(words, "--world_size", "2")
        for name, value in measured.items():
            steps_of_adam = 64 if name == "optimizer" else 0
            assert 0 <= value - getattr(plan.memory, name) <= steps_of_adam, (words, name)


# ---- flags and program ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ((665_298, 16, 1, 8), 5198),  # LLaVA-1.5's fine-tuning
        ((558_128, 32, 1, 8), 2181),  # and its pre-training
        ((24, 5, 2, 1), 3),
        ((1, 16, 4, 8), 1),
    ],
)
def test_steps_of_an_epoch(shape, steps):
    assert steps_per_epoch(*shape) == steps


def test_checkpoints_that_are_kept(flags):
    steps = planned(flags(max_steps=10)).steps

    def kept(**changes) -> int:
        return count_checkpoints(steps, parse(flags(max_steps=10, **changes)).training)

    assert kept(save_strategy="no") == 0
    assert kept(save_strategy="steps", save_steps=4) == 3  # after 4, 8 and the last
    assert kept(save_strategy="steps", save_steps=0.5) == 2
    assert kept(save_strategy="steps", save_steps=1, save_total_limit=1) == 2  # two at least


def test_takes_its_own_flags_and_leaves_the_launcher(monkeypatch):
    assert take(["--bf16", "True"]) == (["--bf16", "True"], None)
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    own_flags = ["--gpu", "a100-40g", "--gpu", "h20", "--deepspeed=x.json", "--json"]
    rest, own = take(["--bf16", "True", "--plan", *own_flags])
    assert rest == ["--bf16", "True", "--use_cpu", "True"]
    assert (own.world_size, own.deepspeed, own.as_json) == (8, "x.json", True)
    assert [device.name for device in own.devices] == ["A100-40G", "H20"]
    assert not launcher.keys() & os.environ.keys()
    assert take(["--plan", "--world_size", "4"])[1].world_size == 4
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:  # one of the launcher's processes plans for all
        take(["--plan"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "abacus"], "--gpu abacus: not in the table of GPUs; known: A100-40G, "),
        (["--world_size", "0"], "--world_size 0: must be at least 1"),
        (["--world_size", "many"], "--world_size: invalid int value"),
        (["--utilisation", "40"], "--utilisation 40.0: is a share"),
        (["--plan_samples", "1"], "--plan_samples 1: must be at least 2"),
        (["--deepspeed", "absent.json"], "--deepspeed absent.json: cannot be read"),
        (["--model_name_or_path", "absent"], "absent: neither a directory nor"),
        (["--data_path", "absent.json"], "absent.json: No such file"),
        (["--vision_tower", ""], "has images; give --vision_tower"),
    ],
)
def test_what_training_would_refuse(flags, words, message):
    with pytest.raises(UsageError, match=message):
        planned([*flags(), *words])


def test_a_sample_that_would_stop_the_training(flags):
    with pytest.raises(DataError, match=r"row \d+: the image ends at position \d+, beyond"):
        planned(flags(model_max_length=16))


def test_part_of_the_data_speaks_for_all(flags, squares, tmp_path):
    """Copies of 24 rows: any sample has nearly their mean, and says how nearly."""
    path = tmp_path / "many.json"
    path.write_text(json.dumps(json.loads((squares / "mixed.json").read_text()) * 50))
    whole = planned(flags(data_path=path), "--plan_samples", "1200")
    packed = flags(data_path=path, packing=True, attn_implementation="flash_attention_2")
    part = planned(packed, "--plan_samples", "200")
    assert part.steps == whole.steps and whole.lengths.standard_error == 0
    assert part.lengths.n_sampled == 200 and 0 < part.lengths.standard_error < 0.05
    assert abs(part.lengths.mean / whole.lengths.mean - 1) < 4 * part.lengths.standard_error
    assert part.lengths.padding_share == 0 < whole.lengths.padding_share  # one row a batch
    unpacked = part.lengths.padding_share_random
    assert unpacked == pytest.approx(whole.lengths.padding_share_random, abs=0.05)


def test_every_section_names_its_assumption(flags, capsys):
    words = flags(bf16=True, save_strategy="steps", save_steps=2, lora_enable=True)
    own_flags = ["--plan", "--world_size", "8", "--deepspeed", str(ROOT / "scripts/zero3.json")]
    argv, own = take([*words, *own_flags])
    arguments = parse(argv)
    print_plan(arguments, own)
    page = capsys.readouterr().out
    for note in make_plan(arguments, own).notes.values():
        assert note[:40] in page
    for title in ("Run", "Samples", "Memory of each GPU", "8 GPUs", "Computation", "Disk"):
        assert f"\n{title}" in f"\n{page}"
    assert max(map(len, page.splitlines())) <= 120


def test_program_needs_neither_weights_nor_images_nor_a_gpu(flags, parts, tmp_path):
    for name, files in (("lm", ("config.json", "tokenizer.model")), ("clip", ("config.json",))):
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy(parts / name / file, tmp_path / name)
    words = flags(
        model_name_or_path=tmp_path / "lm",
        vision_tower=tmp_path / "clip",
        image_folder="nowhere",
        deepspeed=ROOT / "scripts" / "zero3_offload.json",
        fp16=True,
        tf32=True,
    )
    environment = {**os.environ, "WORLD_SIZE": "8", "RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llava.train", "--plan", "--json", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["setup"]["world_size"] == 8 and plan["steps"]["global_batch"] == 32
    assert plan["setup"]["offload_optimizer"] and plan["memory"]["host"] > 0
    assert plan["memory"]["peak"] > 0 and all(entry["fits"] for entry in plan["fits"])
    assert not (tmp_path / "out").exists()
