"""The stages of training on a tiny real model: what moves, what is written, what stops a run."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llava.errors import DataError, NonFiniteError, UsageError
from llava.model import checkpoint
from llava.model.assemble import assemble
from llava.model.checkpoint import Kind, load
from llava.train import __main__ as entry
from llava.train import trainer as trainer_module
from llava.train.arguments import parse
from llava.train.stages import Exporter, load_model, prepare
from llava.train.trainer import EpochSampler, LlavaTrainer, supervised_loss

TEXT_ONLY = {"vision_tower": None, "image_folder": None}


def history(folder: Path, key: str = "loss") -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[key] for line in lines if key in line]


def moved(before, after) -> set[str]:
    """Which of tower, projector and language model differ."""
    parts = {}
    for name, tensor in after.state_dict().items():
        part = next(p for p in ("vision_tower", "projector", "") if p in name) or "language_model"
        same = torch.equal(tensor.float(), before.state_dict()[name].float())
        parts[part] = parts.get(part, True) and same
    return {part for part, same in parts.items() if not same}


def test_alignment_trains_the_projector_alone(run, parts, squares):
    out = run(
        "pre",
        tune_mm_mlp_adapter=True,
        version="plain",
        data_path=squares / "images.json",
        max_steps=30,
        logging_steps=5,
    )
    assert {"mm_projector.bin", "config.json"} <= {p.name for p in out.iterdir()}
    loaded = load(out, parts / "lm")
    assert loaded.kind is Kind.PROJECTOR_ONLY
    assert loaded.template_name == "plain" and loaded.image_processor.aspect_ratio == "square"
    start = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(42))
    assert moved(start, loaded.model) == {"projector"}
    assert history(out)[-1] < history(out)[0] - 0.5


def test_full_finetuning(run, parts):
    out = run("full", image_aspect_ratio="pad", max_steps=25, logging_steps=5)
    loaded = load(out)
    assert loaded.kind is Kind.HF_LLAVA and loaded.image_processor.aspect_ratio == "pad"
    start = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(42))
    assert moved(start, loaded.model) == {"projector", "language_model"}
    assert history(out)[-1] < 0.5 * history(out)[0]
    assert not list(out.glob("checkpoint-*"))  # save_strategy is "no"


def test_finetuning_goes_on_from_a_llava_and_a_projector(run, parts, squares):
    pre = run("pre", tune_mm_mlp_adapter=True, version="plain", data_path=squares / "images.json")
    projector = pre / "mm_projector.bin"
    still = run("still", pretrain_mm_mlp_adapter=projector, learning_rate=0)
    expected = torch.load(projector, weights_only=True)["model.mm_projector.0.weight"]
    found = load(still).model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(found, expected)
    on = run("on", model_name_or_path=still, vision_tower=None)
    assert moved(load(still).model, load(on).model) == {"projector", "language_model"}


def test_lora(run, parts):
    out = run("lora", lora_enable=True, lora_r=4, lora_alpha=8, max_steps=12, logging_steps=3)
    loaded = load(out, parts / "lm")
    assert loaded.kind is Kind.LLAVA_LORA
    start = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(42))
    assert moved(start, loaded.model) == {"projector", "language_model"}
    changed = {
        name
        for name, tensor in loaded.model.state_dict().items()
        if not torch.equal(tensor, start.state_dict()[name])
    }
    assert not any("embed" in n or "norm" in n or "lm_head" in n for n in changed)
    assert history(out)[-1] < history(out)[0]


def test_merged_lora_is_the_model_that_was_trained(run, parts):
    """What the trainer had in memory and what a user loads compute the same loss."""
    arguments = parse(run.flags("lora", lora_enable=True, lora_r=4, lora_alpha=8))
    loaded = load_model(arguments)
    model = prepare(arguments, loaded)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    Exporter(arguments, loaded, model).final()
    batch = entry.make_collator(loaded)([entry.make_dataset(arguments, loaded)[1]])
    del batch["labels"]
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        again = load(Path(arguments.training.output_dir), parts / "lm").model(**batch).logits
    assert torch.allclose(trained, again, atol=1e-4)


def test_language_model_alone(run, squares):
    out = run("text", data_path=squares / "text.json", max_steps=20, logging_steps=5, **TEXT_ONLY)
    loaded = load(out)
    assert loaded.kind is Kind.LANGUAGE_MODEL and loaded.image_processor is None
    assert history(out)[-1] < 0.5 * history(out)[0]


def test_language_model_alone_with_lora(run, parts, squares):
    changes = {"data_path": squares / "text.json", "lora_enable": True, **TEXT_ONLY}
    out = run("text-lora", **changes)
    loaded = load(out, parts / "lm")
    assert loaded.kind is Kind.LLAVA_LORA and loaded.image_processor is None
    assert moved(load(parts / "lm").model, loaded.model) == {"language_model"}


@pytest.mark.parametrize("stage", [{}, {"lora_enable": True}])
def test_same_seed_same_bits(run, stage):
    def weights(output, **changes):
        out = run(output, group_by_modality_length=True, **stage, **changes)
        return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}

    first = weights("a", max_steps=20)
    assert first == weights("b", max_steps=20)
    if not stage:
        assert first != weights("c", max_steps=20, seed=7)


def test_workers_change_nothing(run):
    out = [run(f"w{n}", dataloader_num_workers=n, max_steps=4) for n in (0, 2)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in out}) == 1


@pytest.mark.parametrize(
    "stage",
    [
        {"group_by_modality_length": True},
        {"lora_enable": True, "bf16": True, "group_by_modality_length": True},
        {"tune_mm_mlp_adapter": True, "version": "plain"},
    ],
)
def test_resumed_run_ends_with_the_same_bits(run, parts, squares, stage, monkeypatch):
    """24 rows make 6 steps an epoch: stopped in the second, it goes on where it was."""
    if stage.get("version") == "plain":
        stage = {**stage, "data_path": squares / "images.json"}
    common = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 3}
    whole = run("whole", **common, **stage)
    restored = []
    original = Exporter.restore
    monkeypatch.setattr(Exporter, "restore", lambda *a: restored.append(a) or original(*a))
    resumed = whole.parent / "resumed"
    resumed.mkdir()
    last = sorted(whole.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[-2]
    last.rename(resumed / last.name)
    run("resumed", **common, **stage)
    assert restored
    for file in [*whole.glob("*.safetensors"), *whole.glob("*.bin")]:
        assert (resumed / file.name).read_bytes() == file.read_bytes(), file.name
    # A checkpoint of a run is a model like any other.
    base = None if (whole / "model.safetensors").exists() else parts / "lm"
    assert load(resumed / last.name, base).model is not None


def test_bf16_keeps_trained_weights_in_float32(run):
    arguments = parse(run.flags("x", bf16=True))
    loaded = load_model(arguments)
    model = prepare(arguments, loaded)
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    out = run("bf16", bf16=True, activation_checkpointing=True, logging_steps=1)
    assert load(out).model.dtype == torch.bfloat16 and math.isfinite(history(out)[-1])


# ---- loss and optimiser --------------------------------------------------------------------------


@pytest.fixture
def make(run):
    """A trainer ready to step, and the exporter's model."""

    def make(**changes):
        arguments = parse(run.flags("made", **changes))
        loaded = load_model(arguments)
        dataset = entry.make_dataset(arguments, loaded)
        model = prepare(arguments, loaded)
        trainer = LlavaTrainer(
            model=model,
            args=arguments.training,
            train_dataset=dataset,
            data_collator=entry.make_collator(loaded),
            export=lambda folder: None,
            restore=lambda folder: None,
        )
        return trainer, model, dataset, entry.make_collator(loaded)

    return make


def test_loss_is_the_mean_over_supervised_tokens(make):
    _, model, dataset, collate = make()
    batch = collate([dataset[row] for row in (1, 2, 4, 5)])
    expected, count = torch.zeros(()), 0
    for row in (1, 2, 4, 5):  # one at a time, every position
        one = collate([dataset[row]])
        labels = one.pop("labels")
        logits = model(**one).logits[0]
        for position in range(labels.shape[1] - 1):
            target = labels[0, position + 1]
            if target != -100:
                expected = expected + F.cross_entropy(logits[position], target)
                count += 1
    assert count == int((batch["labels"] != -100).sum())
    loss = supervised_loss(model, batch, count)
    assert loss.item() == pytest.approx(expected.item() / count, rel=1e-5)


def test_accumulating_gives_the_step_of_one_large_batch(run):
    common = {"max_steps": 2, "logging_steps": 1, "seed": 3}
    whole = run("whole", per_device_train_batch_size=8, **common)
    parted = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    out = run("parts", **parted, **common)
    for key in ("loss", "grad_norm"):
        assert history(out, key) == pytest.approx(history(whole, key), rel=1e-4), key


def test_text_only_batch_runs_tower_and_projector_and_changes_no_gradient(make):
    trainer, model, dataset, collate = make()
    items = [dataset[row] for row in (0, 3)]
    batch = {**collate(items), "rows": [0, 3]}
    assert batch["dummy_image"] and batch["pixel_values"].shape == (1, 3, 28, 28)
    count = int((batch["labels"] != -100).sum())
    trainer.compute_loss(model, dict(batch), num_items_in_batch=count).backward()
    for name, parameter in model.named_parameters():
        if "projector" in name:
            assert parameter.grad is not None and not parameter.grad.any(), name
    with_dummy = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = {k: batch[k] for k in ("input_ids", "labels", "attention_mask")}
    supervised_loss(model, plain, count).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, with_dummy[name]), name


def test_projector_learns_at_its_own_rate(make):
    trainer, model, *_ = make(mm_projector_lr=3e-4, weight_decay=0.1, lora_enable=True)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        (names[id(p)], group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _, _ in found} == trainable
    for name, rate, decay in found:
        assert rate == (3e-4 if "projector" in name else 1e-2), name
        assert decay == (0.0 if "bias" in name or "norm" in name else 0.1), name
    assert sum(len(group["params"]) for group in groups) == len(trainable)


def test_modality_grouping_depends_on_seed_and_epoch_only():
    lengths = [5 + n % 7 if n % 3 else -(3 + n % 5) for n in range(60)]

    def order(seed, epoch):
        sampler = EpochSampler(lengths, 4, 2, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 4) and order(1, 3) != order(2, 3)
    assert sorted(order(1, 3)) == list(range(60))


# ---- what stops a run (P18, bad input) -----------------------------------------------------------


def test_non_finite_weights_stop_the_run(run, parts, tmp_path):
    model = assemble(parts / "lm", parts / "clip")
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] = float("nan")
    loaded = checkpoint.wrap(model, Kind.HF_LLAVA, [parts / "lm"], [parts / "clip"])
    broken = tmp_path / "broken"
    checkpoint.save(loaded, broken)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan.*[Rr]ows .*: \d+"):
        run("out", model_name_or_path=broken, vision_tower=None)


def test_non_finite_gradient_stops_before_weights_change(run, monkeypatch):
    stepped = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: stepped.append(a))
    loss = trainer_module.supervised_loss

    def poisoned(model, inputs, n_tokens):
        value = loss(model, inputs, n_tokens)
        value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    monkeypatch.setattr(trainer_module, "supervised_loss", poisoned)
    with pytest.raises(NonFiniteError, match="step 1: the gradient's norm is (nan|inf)"):
        run("out")
    assert not stepped


def masked_data(squares: Path, tmp_path: Path, n_rows: int) -> Path:
    records = json.loads((squares / "text.json").read_text())
    silent = {"id": 0, "conversations": [{"from": "human", "value": "What colour?"}]}
    path = tmp_path / "masked.json"
    path.write_text(json.dumps(records + [silent] * n_rows))
    return path


def test_nothing_supervised_stops_the_run(run, squares, tmp_path):
    path = tmp_path / "silent.json"
    turns = [{"from": "human", "value": "What colour?"}]
    path.write_text(json.dumps([{"id": n, "conversations": turns} for n in range(8)]))
    with pytest.raises(DataError, match="10 steps in a row without a supervised token"):
        run("long", data_path=path, max_steps=30, **TEXT_ONLY)
    with pytest.raises(DataError, match="the whole run went by without a supervised token"):
        run("short", data_path=path, max_steps=3, **TEXT_ONLY)


def test_some_silent_batches_are_no_harm(run, squares, tmp_path):
    path = masked_data(squares, tmp_path, n_rows=8)
    out = run("some", data_path=path, per_device_train_batch_size=1, max_steps=16, **TEXT_ONLY)
    state = load_file(out / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_is_one_line_with_its_row(run, squares, tmp_path, workers):
    records = json.loads((squares / "images.json").read_text())[:4]
    records[2]["image"] = "absent.png"
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(records))
    with pytest.raises(Exception, match=r"^row 2 \(id '?4'?\): .*no such file") as caught:
        run("out", data_path=path, dataloader_num_workers=workers)
    assert caught.value.exit_code == 65 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_folder": None}, "--image_folder is required"),
        ({"image_folder": "absent"}, "no such directory"),
        ({"vision_tower": None}, "has images; give --vision_tower"),
        ({"vision_tower": None, "tune_mm_mlp_adapter": True}, "needs --vision_tower"),
        ({"model_name_or_path": "absent"}, "absent: no such model directory"),
    ],
)
def test_inputs_that_do_not_fit(run, changes, message):
    with pytest.raises(UsageError, match=message):
        run("out", **changes)


def test_a_lora_is_no_start(run):
    out = run("lora", lora_enable=True, max_steps=1)
    with pytest.raises(UsageError, match="is llava_lora; give a language model or a whole LLaVA"):
        run("out", model_name_or_path=out)


# ---- as a program --------------------------------------------------------------------------------


def launch(command: list[str], flags: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, *flags], env=environment, capture_output=True, text=True, timeout=200
    )


def test_program_prints_a_line_each_logging_steps(run):
    flags = run.flags("program", logging_steps=3, disable_tqdm=None)
    done = launch([sys.executable, "-m", "llava.train"], flags)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [re.match(r"step \d/6  loss \d+\.\d{4}  lr ", line) is not None for line in lines] == [
        True,
        True,
    ]
    assert "it/s" not in done.stderr and "Traceback" not in done.stderr


def test_two_processes_with_different_modalities(run, squares, tmp_path):
    """P19: one rank sees only text, the other only images; no rank waits for ever, and both
    together make the step that one process makes of all rows."""
    records = json.loads((squares / "mixed.json").read_text())
    text = [r for r in records if "image" not in r]
    images = [r for r in records if "image" in r]
    path = tmp_path / "alternating.json"
    pairs = [r for n in range(4) for r in (*text[2 * n : 2 * n + 2], *images[2 * n : 2 * n + 2])]
    path.write_text(json.dumps(pairs))
    common = {"data_path": path, "max_steps": 4, "train_sampling_strategy": "sequential"}
    one = run("one", per_device_train_batch_size=4, **common)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "-m", "llava.train"]
    done = launch(command, run.flags("two", per_device_train_batch_size=2, **common))
    assert done.returncode == 0, done.stderr
    ours, theirs = (load(tmp_path / name).model.state_dict() for name in ("one", "two"))
    assert one.name == "one"
    for name in ours:
        # Gradients are summed in another order; Adam's first steps of 1e-2 amplify rounding.
        assert torch.allclose(ours[name], theirs[name], atol=2e-3), name
