"""The shared prefix changes the price of a score and nothing else; a tree holds every text once."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

from llava.tokens import IGNORE_INDEX
from llava.vlm import versions as versions_module
from llava.vlm.prefix import can_share, common_prefix
from llava.vlm.versions import (
    attention_mask,
    can_grow,
    grow,
    run_together,
    score,
    window_of,
)
from tests.tiny_models import TEXT, VISION

IMAGE, N_IMAGE, VOCABULARY = 120, 16, 121
# Two ways of summing the same float32 products: 1e-5 is some fifty roundings of a loss near 10.
CLOSE = {"rtol": 0, "atol": 1e-5}


@dataclass
class Version:
    input_ids: torch.Tensor
    labels: torch.Tensor
    token_inputs: dict = field(default_factory=dict)


@pytest.fixture(scope="module", params=["llama", "mistral with a window"])
def model(request):
    """A tiny LLaVA; the window of 20 positions is shorter than the common prefix."""
    text = {"vocab_size": VOCABULARY, "pad_token_id": 0, **TEXT}
    if request.param == "llama":
        text_config = hf.LlamaConfig(**text)
    else:
        text_config = hf.MistralConfig(**text, sliding_window=20)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        text_config=text_config,
        image_token_id=IMAGE,
        image_seq_length=N_IMAGE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def pixels():
    return {"pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def version(*parts: list[int] | tuple[list[int], bool]) -> Version:
    """Parts are ids, or (ids, True) where they are supervised."""
    pieces = [part if isinstance(part, tuple) else (part, False) for part in parts]
    ids = [i for part, _ in pieces for i in part]
    labels = [i if answer else IGNORE_INDEX for part, answer in pieces for i in part]
    return Version(torch.tensor(ids), torch.tensor(labels))


def words(n: int, seed: int) -> list[int]:
    return torch.randint(3, 110, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


SYSTEM, PICTURE, STEM, END = words(7, 0), [IMAGE] * N_IMAGE, words(5, 1), words(6, 2)
OPTIONS = [words(n, 10 + n) for n in (2, 4, 3, 4)]


def question(*options: list[int]) -> list[int]:
    return [token for i, option in enumerate(options) for token in (110 + i, *option)]


ORDERS = [
    version(SYSTEM + PICTURE + STEM, question(*(OPTIONS[i] for i in order)), END, ([111, 2], True))
    for order in ((0, 1, 2, 3), (1, 0, 3, 2), (3, 2, 1, 0), (2, 3))
]
TWO_TURNS = [
    version(SYSTEM + PICTURE, STEM, ([7, 8, 2], True), END, question(*options), ([110, 2], True))
    for options in (OPTIONS[:2], OPTIONS[2:], OPTIONS[1:4])
]
ANSWERS = [version(SYSTEM + PICTURE + STEM, (words(n, 30 + n) + [2], True)) for n in (1, 3, 6)]
BEGINNINGS = [version(SYSTEM + PICTURE + STEM, (words(9, 5)[:n], True)) for n in (4, 9)]
LATE_IMAGE = [version(SYSTEM, STEM, [90 + i], PICTURE, ([50, 2], True)) for i in range(3)]
ALONE = ORDERS[:1]
CASES = {
    "orders": ORDERS,
    "two turns": TWO_TURNS,
    "answers": ANSWERS,
    "one begins another": BEGINNINGS,
    "image after the difference": LATE_IMAGE,
    "a single version": ALONE,
}


def one_by_one(model, version, inputs):
    """Slow reference: a full forward of one version and a loop over its labels."""
    out = model(input_ids=version.input_ids[None], output_hidden_states=True, **inputs)
    total, answers, previous = 0.0, [], IGNORE_INDEX
    for t, label in enumerate(version.labels.tolist()):
        if label != IGNORE_INDEX:
            logits = out.logits[0, t - 1].double()
            total -= logits.log_softmax(0)[label].item()
            if previous == IGNORE_INDEX:
                answers.append(False)
            answers[-1] |= logits.argmax().item() != label
        previous = label
    return total, answers, out.hidden_states[-1][0]


@pytest.mark.parametrize("case", CASES)
def test_equals_full_forwards(model, pixels, case):
    versions = CASES[case]
    run = run_together(model, versions, pixels)
    scores = score(run, model.get_output_embeddings())
    for b, v in enumerate(versions):
        total, answers, hidden = one_by_one(model, v, pixels)
        torch.testing.assert_close(scores.nll_sum[b].item(), total, **CLOSE)
        assert scores.wrong[b].tolist() == answers
        assert scores.n_tokens[b] == int((v.labels != IGNORE_INDEX).sum())
        mean = total / scores.n_tokens[b].item()
        torch.testing.assert_close(scores.nll_mean[b].item(), mean, **CLOSE)
        torch.testing.assert_close(run.states(b)[0][0], hidden, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_sharing_or_not_is_the_same(model, pixels, case):
    head = model.get_output_embeddings()
    shared = score(run_together(model, CASES[case], pixels), head)
    apart = score(run_together(model, CASES[case], pixels, share=False), head)
    torch.testing.assert_close(shared.nll_sum, apart.nll_sum, **CLOSE)
    assert torch.equal(shared.wrong, apart.wrong)


def test_text_only(model):
    versions = [version(SYSTEM, question(*OPTIONS[:k]), ([110, 2], True)) for k in (2, 3, 4)]
    scores = score(run_together(model, versions, {}), model.get_output_embeddings())
    for b, v in enumerate(versions):
        torch.testing.assert_close(scores.nll_sum[b].item(), one_by_one(model, v, {})[0], **CLOSE)


def test_the_greedy_answer_is_what_generate_writes(model, pixels):
    head = model.get_output_embeddings()
    prompts = [v.input_ids[:-2] for v in ORDERS]
    written = [
        model.generate(input_ids=p[None], **pixels, max_new_tokens=2, min_new_tokens=2)[0, -2:]
        for p in prompts
    ]
    right = [version(p.tolist(), (a.tolist(), True)) for p, a in zip(prompts, written, strict=True)]
    assert not score(run_together(model, right, pixels), head).wrong.any()
    second = [
        version(p.tolist(), ([int(a[0]), int(a[1]) + 1], True))
        for p, a in zip(prompts, written, strict=True)
    ]
    assert score(run_together(model, second, pixels), head).wrong.all()


@contextmanager
def calls_of(model):
    """Records (part, rows, columns) of every pass through the image encoder and the decoder."""
    seen = []

    def note(name, kwargs, *args):
        inputs = [*args, *(kwargs.get(k) for k in ("pixel_values", "inputs_embeds", "input_ids"))]
        seen.append((name, *next(x for x in inputs if x is not None).shape[:2]))

    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, kwargs, *args), with_kwargs=True
        )
        for name, module in [("image", model.model.vision_tower), ("text", model.get_decoder())]
    ]
    yield seen
    for hook in hooks:
        hook.remove()


N_SHARED = len(SYSTEM + PICTURE + STEM)  # the first symbol is common too, but left to all
N_REST = max(len(v.input_ids) for v in ORDERS) - N_SHARED


def test_the_image_and_the_prefix_are_computed_once(model, pixels):
    with calls_of(model) as seen:
        run_together(model, ORDERS, pixels)
    assert seen == [("image", 1, 3), ("text", 1, N_SHARED), ("text", 4, N_REST)]


def test_batches_are_bounded(model, pixels, monkeypatch):
    head = model.get_output_embeddings()
    whole = score(run_together(model, ORDERS, pixels), head)
    monkeypatch.setattr(versions_module, "MAX_TOKENS", 3 * (N_SHARED + N_REST) + 1)
    with calls_of(model) as seen:
        run = run_together(model, ORDERS, pixels)
    assert seen[2:] == [("text", 3, N_REST), ("text", 1, N_REST)]
    torch.testing.assert_close(score(run, head).nll_sum, whole.nll_sum, **CLOSE)


def test_equal_versions_are_run_once_and_tie_exactly(model, pixels):
    run = run_together(model, [*ORDERS, *ORDERS], pixels)
    assert run.ends.shape[0] == len(ORDERS)
    sums = score(run, model.get_output_embeddings()).nll_sum
    assert torch.equal(sums[:4], sums[4:])


def test_common_prefix_stops_at_the_first_difference_of_ids_or_labels():
    def common(*versions, image=IMAGE):
        return common_prefix(versions, hf.LlavaConfig(image_token_id=image))

    a = version([5, 6, 7], ([8, 9], True))
    assert common(a, version([5, 6, 7], ([8, 4], True))) == 3
    assert common(a, version([5, 6, 7, 8], ([9], True))) == 2
    assert common(a, a) == 4
    assert common(a, version([5, 6])) == 1
    assert common(a, version([4, 6])) == 0
    assert common(a, version([5, 6, 7], ([8, 4], True)), image=8) == 0
    assert common(a, version([5, 6, 7], ([8, 4], True)), image=7) == 3


def test_what_cannot_be_shared(model):
    assert can_share(model)
    text = {**TEXT, "vocab_size": VOCABULARY, "rope_parameters": {"mrope_section": [1, 1, 2]}}
    text["rope_parameters"] |= {"rope_type": "default", "rope_theta": 1e4}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1, "hidden_size": 32})
    with torch.device("meta"):
        assert not can_share(hf.Qwen2_5_VLForConditionalGeneration(config))


def test_versions_with_token_inputs_are_run_apart(model, pixels):
    """Nothing says that a prefix sees the same with token types after it as without."""
    marked = [
        Version(v.input_ids, v.labels, {"attention_mask": v.input_ids * 0 + 1}) for v in ORDERS
    ]
    run = run_together(model, marked, pixels)
    assert len(run.prefix) == 0
    plain = score(run_together(model, ORDERS, pixels), model.get_output_embeddings())
    apart = score(run, model.get_output_embeddings())
    torch.testing.assert_close(apart.nll_sum, plain.nll_sum, **CLOSE)


# ---- trees

TREES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


@given(TREES)
def test_every_text_is_the_way_to_its_end(texts):
    tree = grow(texts)
    assert [tree.ids[tree.sees[end]].tolist() for end in tree.ends] == texts
    assert [int(tree.depths[end]) for end in tree.ends] == [len(text) - 1 for text in texts]
    assert not tree.sees.triu(1).any()  # nodes come after their parents
    beginnings = {tuple(text[: k + 1]) for text in texts for k in range(len(text))}
    assert len(tree.ids) == len(beginnings)


@given(TREES, st.integers(0, 4), st.none() | st.integers(1, 7))
def test_mask_is_what_each_text_would_see_alone(texts, n, window):
    tree = grow(texts)
    positions = n + tree.depths
    mask = attention_mask(tree.sees, torch.cat([torch.arange(n), positions]), window)[0, 0]
    keys = [*range(n), *positions.tolist()]
    for query, row in enumerate(mask.tolist()):
        for key, seen in enumerate(row):
            on_its_way = key < n or bool(tree.sees[query, key - n])
            near = window is None or n + int(tree.depths[query]) - keys[key] < window
            assert seen == (on_its_way and near)


@pytest.mark.parametrize(
    ("text", "one", "window"),
    [
        ({}, True, None),
        ({"sliding_window": 9}, True, 9),
        ({"sliding_window": 9, "layer_types": ["full_attention"] * 2}, True, None),
        ({"sliding_window": 9, "layer_types": ["sliding_attention"] * 2}, True, 9),
        ({"layer_types": ["sliding_attention", "full_attention"]}, False, None),
        ({"layer_types": ["chunked_attention"] * 2}, False, None),
    ],
)
def test_windows(text, one, window):
    config = SimpleNamespace(**text)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert can_grow(model) == one
    if one:
        assert window_of(model) == window
