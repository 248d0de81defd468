"""The loss, the optimiser and the order of samples; what stops a run (P18)."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainerState

from llava.errors import DataError, NonFiniteError, UsageError, UserError
from llava.model.assemble import assemble
from llava.model.checkpoint import Kind, wrap
from llava.model.export import save
from llava.train import __main__ as entry
from llava.train import trainer as trainer_module
from llava.train.arguments import parse
from llava.train.rows import NumberedCollator
from llava.train.stages import load_model, prepare
from llava.train.trainer import EpochOrder, EpochSampler, LlavaTrainer, token_losses

TEXT_ONLY = {"vision_tower": None, "image_folder": None}


def history(folder: Path, key: str = "loss") -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[key] for line in lines if key in line]


# ---- loss and optimiser --------------------------------------------------------------------------


@pytest.fixture
def make(run):
    """A trainer ready to step, and the exporter's model."""

    def make(**changes):
        arguments = parse(run.flags("made", **changes))
        loaded = load_model(arguments)
        dataset = entry.make_dataset(arguments, loaded)
        model = prepare(arguments, loaded)
        held_out = arguments.data.eval_data_path
        trainer = LlavaTrainer(
            model=model,
            args=arguments.training,
            train_dataset=dataset,
            eval_dataset=entry.make_dataset(arguments, loaded, held_out) if held_out else None,
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
    loss = token_losses(model, batch)[0].sum() / count
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
    (token_losses(model, plain)[0].sum() / count).backward()
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
    resumed = EpochSampler(lengths, 4, 2, 1)  # in the middle of the fourth epoch
    EpochOrder(resumed).on_epoch_begin(None, TrainerState(epoch=3.4), None)
    assert list(resumed) == order(1, 3)


# ---- what stops a run (P18, bad input) -----------------------------------------------------------


def test_non_finite_weights_stop_the_run(run, parts, tmp_path):
    model = assemble(parts / "lm", parts / "clip")
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] = float("nan")
    loaded = wrap(model, Kind.HF_LLAVA, [parts / "lm"], [parts / "clip"])
    broken = tmp_path / "broken"
    save(loaded, broken)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan.*[Rr]ows .*: \d+"):
        run("out", model_name_or_path=broken, vision_tower=None)


def test_non_finite_gradient_stops_before_weights_change(run, monkeypatch):
    stepped = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: stepped.append(a))
    real = trainer_module.token_losses

    def poisoned(model, inputs):
        losses, *rest = real(model, inputs)
        losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses, *rest

    monkeypatch.setattr(trainer_module, "token_losses", poisoned)
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


def test_linked_image_folders_must_be_named(run, squares, tmp_path):
    (tmp_path / "linked").symlink_to(squares / "img")
    records = json.loads((squares / "images.json").read_text())
    for record in records:
        record["image"] = f"linked/{record['image']}"
    path = tmp_path / "linked.json"
    path.write_text(json.dumps(records))
    common = {"data_path": path, "image_folder": tmp_path, "max_steps": 1}
    with pytest.raises(UserError, match="leaves the image folder"):
        run("out", **common)
    assert (run("out", image_roots=squares, **common) / "model.safetensors").exists()


# ---- held-out loss -------------------------------------------------------------------------------


def test_held_out_loss_is_the_mean_over_tokens_whatever_the_batches(make, squares):
    held_out = squares / "mixed.json"
    losses = set()
    for batch_size, workers in ((1, 0), (5, 0), (24, 2)):
        trainer, model, dataset, collate = make(
            eval_data_path=held_out,
            per_device_eval_batch_size=batch_size,
            dataloader_num_workers=workers,
        )
        before = torch.get_rng_state()
        metrics = trainer.evaluate()
        assert torch.equal(torch.get_rng_state(), before)
        losses.add(metrics["eval_loss"])
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(len(dataset)):  # one at a time, every position
            batch = collate([dataset[row]])
            labels = batch.pop("labels")[0, 1:]
            batch.pop("dummy_image", None)
            if not (batch["input_ids"] == model.config.image_token_id).any():
                del batch["pixel_values"]
            logits = model.eval()(**batch).logits[0, :-1]
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    assert metrics["eval_tokens"] == count
    for loss in losses:  # float32 sums in another order
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_held_out_loss_is_measured_at_the_end_and_where_asked(run, squares, capsys):
    held_out = {"eval_data_path": squares / "text.json"}
    plain = run("plain")
    at_end = run("end", **held_out)
    steps = run("steps", **held_out, eval_strategy="steps", eval_steps=4)
    assert "held-out loss" in capsys.readouterr().err
    logs = [
        json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (at_end, steps)
    ]
    measured = [[line["step"] for line in log if "eval_loss" in line] for log in logs]
    assert measured == [[6], [4, 6]]
    for folder in (at_end, steps):  # looking changes nothing
        assert (folder / "model.safetensors").read_bytes() == (
            plain / "model.safetensors"
        ).read_bytes()


# ---- what is said --------------------------------------------------------------------------------


def test_summaries_and_progress(run, capsys):
    run("out", gradient_accumulation_steps=2, logging_steps=3, bf16=True)
    text = capsys.readouterr().err
    assert "24 samples, 6 steps of 8 = 4 samples x 2 accumulated x 1 processes" in text
    assert re.search(r"[\d,]+ of [\d,]+ parameters are trained, bfloat16 on cpu", text)
    line = r"step 3/6  loss \d+\.\d{4}  lr \S+  grad \S+  [\d,]+ tokens/s  [\d.]+ samples/s  0:\d\d"
    assert re.search(line, text)
    assert re.search(r"6 steps in 0:\d\d:\d\d: [\d,]+ tokens/s, [\d.]+ samples/s", text)
    assert text.rstrip().endswith("/out")


def test_tokens_are_counted_without_padding(make):
    trainer, _, dataset, collate = make()
    rows = [0, 1, 4]
    batch = NumberedCollator(collate)([(row, dataset[row]) for row in rows])
    lengths = [len(collate([dataset[row]])["input_ids"][0]) for row in rows]
    assert (batch["n_samples"], batch["n_tokens"]) == (3, sum(lengths))
    assert batch["n_supervised"] == int((batch["labels"][:, 1:] != -100).sum())


def test_tracker_that_is_not_installed_is_one_line(run):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(UsageError, match="--report_to wandb: not installed; pip install wandb"):
        run("out", report_to="wandb")
