"""Records in, batches out: validation, expansion, padding, grouping, and the view of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from llava.conversation import get_template
from llava.data import (
    Collator,
    ConversationDataset,
    InputFormat,
    ModalityLengthSampler,
    ModelInput,
    expand_image,
    modality_lengths,
)
from llava.errors import DataError, UsageError
from llava.images import BadImage, ImageProcessor
from llava.records import decode_record
from llava.show import parser, show
from llava.tokens import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Encoded,
    encode_conversation,
    load_tokenizer,
)

ROOT = Path(__file__).parents[2]
QUESTION, ANSWER = {"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "no"}
TEXT = {"from": "human", "value": "red?"}


# Dataset and collator


@pytest.fixture(scope="module")
def dataset(tiny_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> ConversationDataset:
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (6, 4), "red").save(folder / "red.png")
    (folder / "empty.png").touch()
    records = [
        {"id": 0, "image": "red.png", "conversations": [QUESTION, ANSWER]},
        {"id": 1, "conversations": [TEXT, ANSWER, {"from": "human", "value": "a  b"}, ANSWER]},
        {"id": 2, "image": "missing.png", "conversations": [TEXT, ANSWER]},  # never says <image>
        {"id": 3, "image": "empty.png", "conversations": [QUESTION, ANSWER]},
        {"id": 4, "image": "../x.png", "conversations": [QUESTION, ANSWER]},
        {"id": 5, "image": "red.png", "conversations": [QUESTION, ANSWER, QUESTION, ANSWER]},
    ]
    return ConversationDataset(
        [decode_record(json.dumps(r).encode(), "test") for r in records],
        folder,
        InputFormat(
            template=get_template("v1"),
            tokenizer=load_tokenizer(tiny_vocabulary),
            image_processor=ImageProcessor(14),
            image_token_id=500,
            n_image_tokens=4,
            model_max_length=2048,
        ),
    )


def test_items(dataset: ConversationDataset) -> None:
    assert len(dataset) == 6
    for row in (0, 1, 2):
        assert positions(dataset[row]) == slow_expand(encoded(dataset, row), 4, 500)
    assert dataset[0]["pixel_values"].shape == (3, 14, 14)
    assert dataset[1]["pixel_values"] is None
    assert dataset[2]["pixel_values"] is None


def test_bad_items_name_their_row_and_are_not_replaced(dataset: ConversationDataset) -> None:
    with pytest.raises(BadImage, match=r"row 3 \(id '3'\): image 'empty.png': the file is empty"):
        dataset[3]
    with pytest.raises(BadImage, match="row 4.*leaves the image folder") as caught:
        dataset[4]
    assert caught.value.exit_code == 77
    with pytest.raises(DataError, match="row 5.*2 turns hold <image>"):
        dataset[5]
    with pytest.raises(DataError, match="row 3.*the image ends at position 68, beyond the"):
        with_format(dataset, model_max_length=8)[3]  # before the picture is opened
    blind = with_format(dataset, image_processor=None, image_token_id=None, n_image_tokens=0)
    for row in (1, 2):  # row 2 has an image that it never shows
        assert positions(blind[row]) == positions(dataset[row])
        assert blind[row]["pixel_values"] is None
    with pytest.raises(DataError, match="row 0.*no vision tower"):
        blind[0]


def test_errors_leave_a_worker_readable(dataset: ConversationDataset) -> None:
    loader = DataLoader(dataset, sampler=[3], batch_size=None, num_workers=1)
    with pytest.raises(BadImage, match="row 3.*the file is empty"):
        next(iter(loader))


def test_modality_lengths_count_words(dataset: ConversationDataset) -> None:
    assert modality_lengths(dataset.records)[:3] == [3, -5, 2]


def encoded(dataset: ConversationDataset, row: int) -> Encoded:
    record, form = dataset.records[row], dataset.input_format
    return encode_conversation(record.turns, record.has_image, form.template, form.tokenizer)


def with_format(dataset: ConversationDataset, **changes: object) -> ConversationDataset:
    input_format = dataclasses.replace(dataset.input_format, **changes)
    return ConversationDataset(dataset.records, dataset.image_folder, input_format)


def positions(sample: ModelInput) -> list[tuple[int, int]]:
    """Its ids and labels, pair by pair."""
    return list(zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True))


def slow_expand(encoded: Encoded, n: int, image_id: int) -> list[tuple[int, int]]:
    out = []
    for id_, label in zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True):
        out += [(image_id, IGNORE_INDEX)] * n if id_ == IMAGE_TOKEN_INDEX else [(id_, label)]
    return out


@settings(deadline=None, max_examples=60)  # a busy machine is not a failure
@given(
    st.lists(st.integers(0, 99), max_size=12), st.integers(0, 12), st.booleans(), st.integers(1, 5)
)
def test_expand_image_against_a_loop(ids: list[int], at: int, image: bool, n: int) -> None:
    if image:
        ids.insert(at := min(at, len(ids)), IMAGE_TOKEN_INDEX)
    labels = [IGNORE_INDEX if id_ % 2 else id_ for id_ in ids]
    labels = [
        IGNORE_INDEX if i == IMAGE_TOKEN_INDEX else x for i, x in zip(ids, labels, strict=True)
    ]
    encoded = Encoded(torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))
    expected = slow_expand(encoded, n, 500)
    for limit in range(1, 20):
        if image and at + n > limit:
            with pytest.raises(DataError, match="the image ends at position"):
                expand_image(encoded, n, 500, limit)
        else:
            got = expand_image(encoded, n, 500, limit)
            pairs = list(zip(got.input_ids.tolist(), got.labels.tolist(), strict=True))
            assert pairs == expected[:limit]


def test_collator_pads_right_what_was_cut_after_expansion(dataset: ConversationDataset) -> None:
    whole = [len(dataset[row]["input_ids"]) for row in (0, 1)]
    assert whole[0] == len(encoded(dataset, 0).input_ids) + 3
    limit = max(whole) - 2
    short = with_format(dataset, model_max_length=limit)
    for row in (0, 1):  # what a plan counts as truncated
        record = dataset.records[row]
        encoding = short.input_format.encode(record.turns, record.has_image)
        assert encoding.n_whole == whole[row] and encoding.shows_image == (row == 0)
    batch = Collator(9, 14)([short[0], short[1]])
    lengths = [min(limit, length) for length in whole]
    assert batch["input_ids"].shape == (2, max(lengths)) and lengths[0] != lengths[1]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row in (0, 1):
        expected = slow_expand(encoded(dataset, row), 4, 500)[:limit]
        kept = slice(None, lengths[row])
        pairs = zip(
            batch["input_ids"][row][kept].tolist(), batch["labels"][row][kept].tolist(), strict=True
        )
        assert list(pairs) == expected
        assert (batch["attention_mask"][row][kept] == 1).all()
        assert (batch["input_ids"][row][lengths[row] :] == 9).all()
        assert (batch["labels"][row][lengths[row] :] == IGNORE_INDEX).all()
    assert torch.equal(batch["pixel_values"], dataset[0]["pixel_values"][None])
    assert "dummy_image" not in batch
    assert (batch["input_ids"] == 500).sum() == 4


def test_text_only_batch_carries_a_zero_image(dataset: ConversationDataset) -> None:
    batch = Collator(0, 14)([dataset[1], dataset[2]])
    assert batch["dummy_image"] is True
    assert batch["pixel_values"].shape == (1, 3, 14, 14) and not batch["pixel_values"].any()
    assert (batch["input_ids"] != 500).all()
    assert "pixel_values" not in Collator(0, None)([dataset[1]])


# Sampler


def slow_modality_order(
    lengths: list[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """LLaVA's own rule, section by section, without any cleverness."""

    def cut(rows: list[int]) -> list[list[int]]:
        out, step = [], []
        for row in rows:
            step.append(row)
            if len(step) == batch_size * world_size:
                out.append(step)
                step = []
        return out + ([step] if step else [])

    def group(values: list[int]) -> list[int]:
        out = []
        for step in cut(torch.randperm(len(values), generator=generator).tolist()):
            step = sorted(step, key=lambda i: values[i], reverse=True)
            if len(step) % world_size:
                shares = [step[k::world_size] for k in range(world_size)]
            else:
                shares = [[] for _ in range(world_size)]
                for item in step:
                    room = [s for s in shares if len(s) < len(step) // world_size]
                    min(room, key=lambda s: sum(values[i] for i in s)).append(item)
            out += [i for share in shares for i in share]
        return out

    image = [i for i, n in enumerate(lengths) if n > 0]
    text = [i for i, n in enumerate(lengths) if n < 0]
    if not image or not text:
        return group(lengths)
    image_steps = cut([image[i] for i in group([lengths[i] for i in image])])
    text_steps = cut([text[i] for i in group([-lengths[i] for i in text])])
    steps = image_steps[:-1] + text_steps[:-1]
    order = torch.randperm(len(steps), generator=generator).tolist()
    return [i for k in order for i in steps[k]] + sorted(image_steps[-1] + text_steps[-1])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=60)  # a busy machine is not a failure
@given(
    st.lists(st.integers(-30, 30).filter(bool), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_sampler_equals_the_slow_rule(lengths: list[int], batch_size: int, world: int) -> None:
    sampler = ModalityLengthSampler(lengths, batch_size, world, seeded(3))
    generator = seeded(3)
    for _ in range(2):  # the generator goes on into the next epoch
        order = list(sampler)
        assert order == slow_modality_order(lengths, batch_size, world, generator)
        assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)


@settings(deadline=None, max_examples=60)  # a busy machine is not a failure
@given(
    st.lists(st.integers(-30, 30).filter(bool), min_size=1, max_size=80),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2, 3),
)
def test_accumulated_batches_are_llavas_steps_with_less_padding(
    lengths: list[int], batch_size: int, world: int, accumulation: int
) -> None:
    """LLaVA deals to micro-batches as to devices; the loss of a step does not depend on that."""
    order = list(ModalityLengthSampler(lengths, batch_size, world, seeded(3), accumulation))
    theirs = slow_modality_order(lengths, batch_size, world * accumulation, seeded(3))

    def cut(rows: list[int], size: int) -> list[list[int]]:
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def longest(rows: list[int]) -> int:
        """What devices wait for: the longest row of each batch that they run at a time."""
        together = cut(rows, batch_size * world)
        return sum(max(abs(lengths[row]) for row in batch) for batch in together)

    for step, their_step in zip(
        *(cut(rows, batch_size * world * accumulation) for rows in (order, theirs)), strict=True
    ):
        assert sorted(step) == sorted(their_step)
        assert longest(step) <= longest(their_step)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_modality_is_grouped_by_length(sign: int) -> None:
    lengths = [sign * n for n in range(1, 41)]
    order = list(ModalityLengthSampler(lengths, 4, 2, seeded(0)))
    assert order == slow_modality_order(lengths, 4, 2, seeded(0)) != list(range(40))


def test_every_full_step_has_one_modality_and_balanced_devices() -> None:
    lengths = [(-1) ** (n % 3 == 0) * (n % 37 + 1) for n in range(1, 400)]
    order = list(ModalityLengthSampler(lengths, 4, 2, seeded(0)))
    steps = [order[start : start + 8] for start in range(0, len(order), 8)]
    assert order != sorted(order)
    for step in steps[:-2]:
        assert len({lengths[row] > 0 for row in step}) == 1
        shares = [sum(abs(lengths[row]) for row in step[k : k + 4]) for k in (0, 4)]
        assert abs(shares[0] - shares[1]) <= max(abs(lengths[row]) for row in step)


@pytest.mark.parametrize(("n_ranks", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_a_global_step_has_one_modality_on_all_ranks(n_ranks: int, accumulation: int) -> None:
    """Dealt to ranks by the class that the Trainer deals with; each rank has its own sampler."""
    lengths = [n % 37 + 1 if n % 3 else -(n % 23 + 1) for n in range(1, 331)]
    batch_size, size = 4, 4 * n_ranks * accumulation
    shards = []
    for rank in range(n_ranks):
        sampler = ModalityLengthSampler(lengths, batch_size, n_ranks, seeded(7), accumulation)
        batches = BatchSampler(sampler, batch_size, drop_last=False)
        shards.append(list(BatchSamplerShard(batches, n_ranks, rank)))
    assert len({len(shard) for shard in shards}) == 1  # ranks run the same number of batches
    steps = [
        [row for shard in shards for batch in shard[k : k + accumulation] for row in batch]
        for k in range(0, len(shards[0]), accumulation)
    ]
    order = list(ModalityLengthSampler(lengths, batch_size, n_ranks * accumulation, seeded(7)))
    for k, step in enumerate(steps[:-1]):
        assert sorted(step) == sorted(order[k * size : (k + 1) * size])
    assert {row for step in steps for row in step} == set(range(len(lengths)))
    mixed = [k for k, step in enumerate(steps) if len({lengths[row] > 0 for row in step}) > 1]
    n_left = sum(
        n % size or size for n in (sum(x > 0 for x in lengths), sum(x < 0 for x in lengths))
    )
    assert set(mixed) <= set(range((len(lengths) - n_left) // size, len(steps)))


def test_rows_without_words_are_refused() -> None:
    with pytest.raises(DataError, match="row 1 has no words"):
        ModalityLengthSampler([3, 0], 1, 1, seeded(0))


# The command


def run_show(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llava.data", "show", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_show_prints_ids_and_positions(
    dataset: ConversationDataset, tiny_vocabulary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = dataset.image_folder / "pool.json"
    rows = [
        {"id": "é", "image": "red.png", "conversations": [QUESTION, ANSWER]},
        {"id": 1, "conversations": [{"from": "system", "value": "x"}]},
        {"id": 2, "image": "none.png", "conversations": [QUESTION, ANSWER, QUESTION, ANSWER]},
        {"id": 3, "image": "none.png", "conversations": [QUESTION, ANSWER]},
        {"conversations": [{"from": "human", "value": "\x1b[31mred"}, ANSWER]},
    ]
    path.write_text(json.dumps(rows))
    settings = ["show", "--data", str(path), "--tokenizer", str(tiny_vocabulary)]
    images = ["--images", str(dataset.image_folder)]
    assert show(parser().parse_args([*settings, *images, "--json"])) == 65
    sys.stdout.flush()
    printed = capfd.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [(line["row"], line["id"]) for line in lines] == [(0, "é"), (3, 3), (4, None)]
    first = encoded(dataset, 0)
    assert lines[0]["input_ids"] == first.input_ids.tolist()
    assert lines[0]["supervised"] == (first.labels != IGNORE_INDEX).nonzero().flatten().tolist()
    assert lines[0]["text"].endswith("USER: <image>\nred? ASSISTANT: no</s>")
    errors = printed.err.splitlines()
    assert [e.split(": ")[2] for e in errors] == ["row 1", "row 2", "row 3"], errors
    assert "no such file" in errors[2]

    assert show(parser().parse_args(settings)) == 65  # rows 1 and 2; images were not asked for
    view = capfd.readouterr().out
    assert "ASSISTANT:⟦ no</s>⟧" in view and "\\x1b[31mred" in view
    assert "\x1b" not in view  # not a terminal: no colours, and none from the data
    assert show(parser().parse_args([*settings, "--limit", "1", "--json"])) == 0
    sys.stdout.flush()
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_show_refuses_with_the_documented_codes(tiny_vocabulary: Path, tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    escape = {"image": "../secret.png", "conversations": [QUESTION, ANSWER]}
    path.write_text(json.dumps([escape, {**escape, "image": "none.png"}]))
    settings = ["--data", str(path), "--tokenizer", str(tiny_vocabulary)]
    assert show(parser().parse_args(["show", *settings, "--images", str(tmp_path)])) == 77
    unknown = run_show(*settings, "--template", "v9")
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: unknown template 'v9'")
    for wrong in (["--limit", "0"], ["--images", str(tmp_path / "none")]):
        with pytest.raises(UsageError):
            show(parser().parse_args(["show", *settings, *wrong]))


def test_show_golden_conversations(shared_data: Path, tmp_path: Path) -> None:
    golden = json.loads((shared_data / "golden_conversations.json").read_text())
    golden = [record for record in golden if "v1" in record["expected"]]

    rows = [
        {"conversations": r["conversations"]} | ({"image": "x.jpg"} if r["image"] else {})
        for r in golden
    ]
    (tmp_path / "golden.jsonl").write_text("\n".join(map(json.dumps, rows)))
    vocabulary = shared_data / "llama_tokenizer"
    done = run_show(
        "--data", tmp_path / "golden.jsonl", "--template", "v1", "--tokenizer", vocabulary, "--json"
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(golden) > 30
    for line, record in zip(lines, golden, strict=True):
        assert line["input_ids"] == record["expected"]["v1"]["input_ids"]
        assert line["supervised"] == record["expected"]["v1"]["supervised"]
