"""DeepSpeed on two CPU processes: equal to a plain loop, never waiting, exported, resumed; its
settings files (P18, P19)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llava.errors import UsageError
from llava.model.checkpoint import Kind, load
from llava.train import __main__ as entry
from llava.train import zero
from llava.train.arguments import parse
from llava.train.stages import load_model, prepare

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "scripts"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SECONDS = 300  # then a run is taken for hanging
LEARNING_RATE, PROJECTOR_RATE, DECAY = 1e-2, 1e-3, 1.0
EPSILON = 1e-3  # Adam's usual 1e-8 makes a whole step out of the rounding of a gradient near zero


def launch(words: list[str]) -> str:
    """Standard error of two processes that a launcher starts; they find no compiler."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": str(Path(sys.executable).parent),
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, text = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hangs: {process.communicate()[1][-3000:]}")
    assert process.returncode == 0, text[-6000:]
    return text


def in_turn(tmp_path: Path, runs: list[list]) -> str:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([[str(word) for word in run] for run in runs]))
    return launch([*TORCHRUN, str(Path(__file__).with_name("in_turn.py")), str(path)])


def history(folder: Path, key: str = "loss") -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[key] for line in lines if key in line]


@pytest.fixture
def uneven(squares: Path, tmp_path: Path) -> Path:
    """Six steps of two processes with two rows each: in the first process only text meets images in
    the second, then the other way; images alone, both in one batch, text alone."""
    records = json.loads((squares / "mixed.json").read_text())
    text = [r for r in records if "image" not in r]
    images = [r for r in records if "image" in r]
    rows = [*text[:2], *images[:2], *images[2:4], *text[2:4], *images[4:8]]
    rows += [text[4], images[8], images[9], text[5], *text[4:8], *text[:2], *images[10:12]]
    path = tmp_path / "uneven.json"
    path.write_text(json.dumps(rows))
    return path


# ---- equal to a plain loop -----------------------------------------------------------------------


def plain_loop(flags: list[str], n_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights, written as plainly as can be: batches of four, AdamW, clipping."""
    arguments = parse(flags)
    loaded = load_model(arguments)
    model = prepare(arguments, loaded).train()
    dataset, collate = entry.make_dataset(arguments, loaded), entry.make_collator(loaded)
    groups = [
        {
            "params": [p],
            "lr": PROJECTOR_RATE if "projector" in name else LEARNING_RATE,
            "weight_decay": 0.0 if "bias" in name or "norm" in name else DECAY,
        }
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    optimizer = torch.optim.AdamW(groups, eps=EPSILON)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    losses = []
    for step in range(n_steps):
        batch = collate([dataset[row] for row in range(4 * step, 4 * step + 4)])
        labels = batch.pop("labels")
        if batch.pop("dummy_image", False):
            del batch["pixel_values"]
        logits = model(**batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        for group in groups:  # a batch without images: the projector's gradient is 0, not absent
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.slow
def test_every_way_of_sharding_trains_as_a_plain_loop(run, parts, uneven, tmp_path):
    """Losses and weights of DDP, ZeRO-2, ZeRO-3 and offload; with them the rates and decays of the
    parameter groups, clipping, the tokens that a loss is divided by, and the export (P19)."""
    common = {
        "data_path": uneven,
        "per_device_train_batch_size": 2,
        "learning_rate": LEARNING_RATE,
        "mm_projector_lr": PROJECTOR_RATE,
        "weight_decay": DECAY,
        "adam_epsilon": EPSILON,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
    }
    ways = {"ddp": None, "zero2": "zero2", "zero3": "zero3", "offload": "zero3_offload"}
    runs = [
        run.flags(way, deepspeed=file and SCRIPTS / f"{file}.json", **common)
        for way, file in ways.items()
    ]
    in_turn(tmp_path, [*runs, ["held", tmp_path / "held.json", *runs[2]]])
    # ZeRO-3 shards while it loads: half each, and a little for sizes that do not divide.
    assert all(0.49 < part < 0.52 for part in json.loads((tmp_path / "held.json").read_text()))
    losses, weights = plain_loop(run.flags("plain", **common), n_steps=6)
    start = load_model(parse(run.flags("start", **common))).model.state_dict()
    for way in ways:
        # float32 sums in another order; found: 3e-7 of a loss, 2.4e-7 of weights up to 1.
        assert history(tmp_path / way) == pytest.approx(losses, rel=2e-6), way
        for name, tensor in load(tmp_path / way).model.state_dict().items():
            assert torch.allclose(tensor, weights[name], atol=2e-6), (way, name)
            moved = (tensor - start[name]).abs().max()
            if "projector" in name:
                assert 1e-3 < moved < 6e-3, (way, name)  # six steps, each about its rate
            elif "vision_tower" not in name:
                assert moved > 1e-2, (way, name)


# ---- what a run writes ---------------------------------------------------------------------------


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return {**load_file(folder / "adapter_model.safetensors"), **others}


@pytest.mark.slow
def test_lora_in_bf16_with_everything_on(run, parts, uneven, squares, tmp_path):
    """LLaVA's recipe: ZeRO-3, recomputed activations, accumulation. Each checkpoint is a model, and
    resuming from one, DeepSpeed's state in it, gives the same bits as going on."""
    flags = {
        "deepspeed": SCRIPTS / "zero3.json",
        "lora_enable": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "mm_projector_lr": 1e-3,
        "bf16": True,
        "tf32": True,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "data_path": uneven,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    resumed.mkdir()
    again = [run.flags(folder.name, **flags) for folder in (whole, resumed)]
    moved = ["moved", whole / "checkpoint-2", resumed / "checkpoint-2"]
    text = in_turn(tmp_path, [again[0], moved, again[1]])
    assert text.count("step 1/4") == 1 and text.count("step 4/4") == 2
    final = adapter(whole)
    for folder in (whole / "checkpoint-4", resumed):
        written = adapter(folder)
        assert written.keys() == final.keys()
        assert all(torch.equal(final[name], written[name]) for name in final), folder
    assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16}
    assert {tensor.numel() > 0 for tensor in final.values()} == {True}

    def loss(model: torch.nn.Module) -> float:
        batch = dict(batched)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            return F.cross_entropy(model(**batch).logits[:, :-1].transpose(1, 2), labels).item()

    arguments = parse(run.flags("start", **{**flags, "deepspeed": None}))
    start = load_model(arguments)
    dataset = entry.make_dataset(arguments, start)
    batched = entry.make_collator(start)([dataset[row] for row in range(len(dataset))])
    before = loss(start.model.float())
    for folder in (whole, whole / "checkpoint-4", resumed / "checkpoint-2"):
        trained = load(folder, parts / "lm")
        assert trained.kind is Kind.LLAVA_LORA
        assert loss(trained.model) < before - 0.3, folder


# ---- settings files ------------------------------------------------------------------------------

ADAM = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}}


def settings(tmp_path: Path, changes: dict) -> Path:
    """zero3.json with `changes`; the key with a dot lies inside another, None takes it out."""
    values = json.loads((SCRIPTS / "zero3.json").read_text())
    for dotted, value in changes.items():
        outer, _, key = dotted.rpartition(".")
        part = values[outer] if outer else values
        if value is None:
            del part[key]
        else:
            part[key] = value
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": ADAM, "scheduler": WARMUP}, '"optimizer" .*mm_projector_lr.*remove the bl'),
        ({"scheduler": WARMUP}, '"scheduler" replaces --lr_scheduler_type .*; remove the block'),
        ({"zero_optimization.stage": 0}, '"zero_optimization.stage" is 0; write 1, 2 or 3'),
        ({"zero_optimization": None}, '"zero_optimization.stage" is None; write 1, 2 or 3'),
        (
            {"train_micro_batch_size_per_gpu": 16},
            '"train_micro_batch_size_per_gpu" is 16 but --per_device_train_batch_size is 4; write ',
        ),
        ({"gradient_accumulation_steps": 2}, "pass --gradient_accumulation_steps 2"),
        ({"gradient_clipping": 0.5}, '"gradient_clipping" is 0.5 but --max_grad_norm is 1.0'),
        ({"bf16.enabled": True}, '"bf16.enabled" is True but --bf16 is False'),
        ({"train_batch_size": 8}, "4 samples.*pass --gradient_accumulation_steps 2"),
        ({"train_batch_size": 6}, '"train_batch_size" is 6, but 1 processes x 4 .*other batch f'),
        ({"bf16.check_grad_overflow": False}, "NaN gradients"),
    ],
)
def test_settings_that_would_replace_a_flag_are_refused(run, tmp_path, changes, message):
    path = settings(tmp_path, changes)
    with pytest.raises(UsageError, match=f"{path}: .*{message}"):
        parse(run.flags("out", deepspeed=path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--deepspeed .*own.json: cannot be read .*; scripts/zero3.json is one"),
        ("{'stage': 3}", "own.json: not JSON .*line 1"),
        ("[]", "own.json: holds no object"),
    ],
)
def test_settings_that_cannot_be_read(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "own.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        parse(run.flags("out", deepspeed=tmp_path / "own.json"))


def test_what_a_file_leaves_out_the_flags_decide(run, tmp_path):
    """LLaVA's own files have no clipping, minimal ones nothing but the stage."""
    flags = parse(run.flags("out", bf16=True)).training
    (tmp_path / "own.json").write_text(
        '{"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": "auto"}}'
    )
    found = zero.check(tmp_path / "own.json", flags)
    assert found.pop("zero_optimization") == {"stage": 2}
    assert found.pop("zero_force_ds_cpu_optimizer") is False
    assert found.pop("bf16") == found.pop("fp16") == {"enabled": "auto"}
    assert len(found) == 4 and set(found.values()) == {"auto"}


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_shipped_settings_leave_everything_to_the_flags(run, name):
    flags = parse(run.flags("out", bf16=True, gradient_accumulation_steps=4)).training
    assert zero.check(SCRIPTS / f"{name}.json", flags)["zero_optimization"]["stage"] in (2, 3)


def test_without_deepspeed(run):
    flags = parse(run.flags("out")).training
    assert not zero.enabled(flags) and zero.stage(flags) == 0
    zero.start(flags)
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    with zero.gathered([parameter]):
        assert not zero.is_shard(parameter) and zero.whole_shape(parameter) == (2, 3)
    kept = zero.collect([("weight", parameter)], torch.bfloat16, keep=True)
    assert kept["weight"].dtype == torch.bfloat16 and kept["weight"].shape == (2, 3)
    assert zero.collect([("weight", parameter)], None, keep=False) == {}
