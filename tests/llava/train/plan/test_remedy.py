"""Whether LLaVA-1.5-7B fits known GPUs, and that what is advised makes it fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from llava.train.plan.devices import DEVICES, find_device
from llava.train.plan.flops import count, hours
from llava.train.plan.footprint import Setup, memory, shrunk, usable
from llava.train.plan.lengths import Batch
from llava.train.plan.outline import Matrices, Outline, Tower
from llava.train.plan.remedy import NOTHING, OFFLOAD, ZERO3, Fit, candidates, fit

LAYERS, ADAPTERS, PROJECTOR = 6_476_005_376, 319_815_680, 20_979_712
TYPICAL = Batch(16, 750, 16, 11_000, 2_400, 400, 16)
WORST = Batch(16, 2048, 16, 16 * 2048, 16 * 2047, 2047, 16)
EIGHT = Setup(
    world_size=8,
    batch_size=16,
    accumulation=1,
    compute_bytes=2,
    bf16=True,
    attention="sdpa",
    checkpointing=True,
    moments_bytes=8,
    lora_dropout=True,
    bits=16,
    zero_stage=3,
    offload_optimizer=False,
    offload_parameters=False,
    bucket=4096**2,
    max_live=10**9,
)


def llava_7b(lora: bool) -> Outline:
    """Its sizes, as `outline` measures them."""
    output = 32_000 * 4096
    trains = {"adapters": ADAPTERS} if lora else {"output layer": output, "language model": LAYERS}
    parts = dict.fromkeys(
        ("adapters", "vision tower", "projector", "output layer", "language model"), 0
    )
    parameters = {
        **parts,
        "adapters": ADAPTERS * lora,
        "vision tower": 303_507_456,
        "projector": PROJECTOR,
        "output layer": output,
        "language model": LAYERS + output + 266_240,
    }
    trained = {**parts, "projector": PROJECTOR, **trains}
    return Outline(
        hidden=4096,
        intermediate=11008,
        n_layers=32,
        n_heads=32,
        head_dim=128,
        vocabulary=32_000,
        tower=Tower(1024, 24, 577, 602_112),
        n_image_tokens=576,
        parameters=parameters,
        trained=trained,
        exported=PROJECTOR + ADAPTERS if lora else sum(parameters.values()),
        quantised=0,
        matrices={part: Matrices(n, trained[part]) for part, n in parameters.items()},
        adapted=(35_584, 896) if lora else (0, 0),
    )


def applied(setup: Setup, flags: str) -> Setup:
    """`setup` after what the advice says, read from its flags."""
    changes = {}
    for name, value in re.findall(r"--(\w+) (\S+)", flags):
        if name == "per_device_train_batch_size":
            changes["batch_size"] = int(value)
        elif name == "gradient_accumulation_steps":
            changes["accumulation"] = int(value)
        elif name == "gradient_checkpointing":
            changes["checkpointing"] = value == "True"
        else:
            changes["zero_stage"] = 3
            offloads = f"--{name} {value}" == OFFLOAD
            changes["offload_optimizer"] = changes["offload_parameters"] = offloads
    return replace(setup, **changes)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (0, 8), (2, 8), (3, 8), (3, 1)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_advice_makes_it_fit_and_keeps_the_global_batch(
    device, lora, stage, world_size, checkpointing
):
    model = llava_7b(lora)
    setup = replace(EIGHT, zero_stage=stage, world_size=world_size, checkpointing=checkpointing)
    found = fit(model, setup, TYPICAL, WORST, device)
    assert found.fits == (memory(model, setup, TYPICAL).peak <= usable(device))
    assert found.peak <= found.worst
    if found.worst <= found.usable:
        assert found.advice == ""
        return
    if found.advice == NOTHING:
        *_, (_, last, smallest) = candidates(setup, TYPICAL)
        assert last.batch_size == 1 and last.offload_parameters
        assert memory(model, last, smallest).peak > found.usable
        return
    after = applied(setup, found.advice)
    assert after.batch_size * after.accumulation == setup.batch_size * setup.accumulation
    needed = WORST if found.fits else TYPICAL
    smaller = shrunk(needed, after.batch_size, after.batch_size)
    assert memory(model, after, smaller).peak <= found.usable


def advised(lora: bool, device: str, **changes) -> Fit:
    return fit(llava_7b(lora), replace(EIGHT, **changes), TYPICAL, WORST, find_device(device))


def test_what_is_known_of_llava_1_5():
    """Its own recipes fit 8 A100 of 80 GB; a full fine-tuning cannot fit one without offloading."""
    assert advised(False, "A100-80G").advice == ""
    assert advised(True, "A100-80G").advice == ""
    alone = advised(False, "A100-80G", world_size=1, zero_stage=0)
    assert not alone.fits and alone.peak > 16 * 6.7e9 and OFFLOAD in alone.advice
    unsplit = advised(False, "RTX 4090", zero_stage=2)  # 2 bytes a weight are 13 GiB
    assert not unsplit.fits and ZERO3 in unsplit.advice
    assert not advised(False, "V100-32G").computes
    assert advised(False, "V100-32G", bf16=False).computes


def test_quantised_weights_are_never_split():
    advice = advised(True, "RTX 3090", bits=4, zero_stage=0, checkpointing=False).advice
    assert advice and "zero3" not in advice


def test_mildest_change_comes_first():
    only_batch = advised(True, "RTX 4090", zero_stage=2).advice
    assert re.fullmatch(
        r"--per_device_train_batch_size \d+ --gradient_accumulation_steps \d+", only_batch
    )


def test_more_sharing_never_needs_more():
    model = llava_7b(False)

    def peak(**changes) -> float:
        return memory(model, replace(EIGHT, **changes), TYPICAL).peak

    assert peak(zero_stage=1) > peak(zero_stage=2) > peak(zero_stage=3)
    assert peak(world_size=8) > peak(world_size=16) > peak(world_size=64)
    assert peak(checkpointing=False) > peak()
    offloaded = replace(EIGHT, offload_optimizer=True, offload_parameters=True)
    there, here = memory(model, offloaded, TYPICAL), memory(model, EIGHT, TYPICAL)
    assert there.peak < here.peak and there.weights == there.optimizer == 0
    assert there.host > here.weights + here.optimizer + here.gradients and here.host == 0


def test_four_bits_are_a_quarter_of_sixteen():
    model = replace(llava_7b(True), quantised=LAYERS)
    few = memory(model, replace(EIGHT, zero_stage=2, bits=4), TYPICAL).weights
    eight = memory(model, replace(EIGHT, zero_stage=2, bits=8), TYPICAL).weights
    whole = memory(llava_7b(True), replace(EIGHT, zero_stage=2), TYPICAL).weights
    assert whole - eight == LAYERS
    assert whole - few == pytest.approx((2 - 0.5) * LAYERS, rel=0.02)  # scales: below 2 %


def test_hours_of_llava_1_5_7b():
    """About 10 hours on 8 A100 are published for its fine-tuning; the rule of thumb for a batch is
    6 FLOPs a parameter and position, 8 when the forward is done twice."""
    model = llava_7b(False)
    flops = count(model, TYPICAL, checkpointing=True)
    rule = 8 * 6.48e9 * TYPICAL.n_positions
    assert flops.language_model + flops.recomputed == pytest.approx(rule, rel=0.06)
    whole = flops.total * 665_298 / TYPICAL.n_samples
    a100, h100 = find_device("A100-80G"), find_device("H100")
    assert 6 < hours(whole, a100, 8, 2, 0.4) < 12
    assert hours(whole, a100, 16, 2, 0.4) == pytest.approx(hours(whole, a100, 8, 2, 0.4) / 2)
    assert hours(whole, h100, 8, 2, 0.4) < hours(whole, a100, 8, 2, 0.4) / 3
    adapted = count(llava_7b(True), TYPICAL, checkpointing=True)
    assert 0.7 < adapted.total / flops.total < 0.9  # no gradients of the frozen weights
