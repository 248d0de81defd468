import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llava.conversation import get_template
from llava.errors import DataError, UsageError
from llava.records import Record, Turn
from llava.tokens import IGNORE_INDEX, encode_conversation
from llava.vlm import LlavaVlm, ProcessorVlm, load_vlm, padded_length
from llava.vlm.base import MIN_ROWS, StableRows
from llava.vlm.processor import render
from tests.tiny_models import BUILDERS, WORDS, save_llava, save_qwen2_5_vl, save_smolvlm

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8))
ASK = "What colour is the square?"


def record(*texts: str, image: str | None = "x.png") -> Record:
    roles = ("human", "gpt") * len(texts)
    return Record([Turn(role, text) for role, text in zip(roles, texts, strict=False)], 0, image)


@pytest.fixture(scope="module", params=BUILDERS)
def proxy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load_vlm(BUILDERS[request.param](folder / "model"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return load_vlm(save_llava(tmp_path_factory.mktemp("llava") / "model"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return load_vlm(save_qwen2_5_vl(tmp_path_factory.mktemp("qwen") / "model"))


def test_padded_length_is_enough_and_never_much():
    lengths = np.arange(1, 40_000)
    padded = np.array([padded_length(int(length)) for length in lengths])
    assert (padded >= lengths).all() and (padded % 8 == 0).all() and padded.min() == MIN_ROWS
    assert (np.diff(padded) >= 0).all()
    long = lengths >= 128
    waste = (padded - lengths) / padded
    assert waste[long].max() < 1 / 16
    assert waste[long].mean() < 0.03


@pytest.mark.bits
def test_stable_rows_ignore_how_many_there_are():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 48, generator=generator) for n in (40, 64))
    whole = F.linear(x, weight)
    with StableRows():
        for n in range(1, 40):
            assert torch.equal(F.linear(x[:n], weight), whole[:n])
        assert torch.equal(F.linear(x[:6].view(2, 3, 48), weight), whole[:6].view(2, 3, 64))


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stable_rows_ignore_whether_an_input_is_in_one_piece(dtype):
    """The states of one image without its first token are, those of several are not."""
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 17, 48), (64, 48), (64,)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    pieces = x[:, 1:]
    with StableRows():
        apart, whole = (F.linear(y, weight, bias) for y in (pieces, pieces.contiguous()))
    assert torch.equal(apart, whole)


def supervised_text(proxy, item) -> str:
    """The supervised tokens as text, special tokens included, each run after a `¦`."""
    text, runs = "", item.labels != IGNORE_INDEX
    for i, label in enumerate(item.labels.tolist()):
        if runs[i]:
            text += ("¦" if i and not runs[i - 1] else "") + decode(proxy, label)
    return text


def decode(proxy, token: int) -> str:
    if isinstance(proxy, LlavaVlm):
        tokenizer = proxy.loaded.tokenizer
        return "</s>" if token == tokenizer.eos_id else tokenizer._model.id_to_piece(token)
    return proxy.processor.tokenizer.decode([token])


EXPECTED = {
    "LlavaForConditionalGeneration": "¦▁red</s>¦▁yes</s>",
    "LlavaNextForConditionalGeneration": "¦ red</s>¦ yes</s>",
    "Qwen2_5_VLForConditionalGeneration": "¦red<|im_end|>¦yes<|im_end|>",
    "SmolVLMForConditionalGeneration": "¦ red<end_of_utterance>¦ yes<end_of_utterance>",
}


@pytest.mark.parametrize("image", [IMAGE, None])
def test_answers_and_their_end_of_turn_are_supervised(proxy, image):
    mark = "<image>\n" if image else ""
    item = proxy.prepare(record(f"{mark}{ASK}", "red", "Is it small?", "yes"), image)
    assert supervised_text(proxy, item) == EXPECTED[type(proxy.model).__name__]
    kept = item.labels != IGNORE_INDEX
    assert torch.equal(item.labels[kept], item.input_ids[kept])
    assert item.input_ids.dtype == item.labels.dtype == torch.int64


def test_empty_and_missing_answers_are_not_supervised(proxy):
    item = proxy.prepare(record(ASK, "red", "Is it small?", image=None), None)
    assert supervised_text(proxy, item).count("¦") == 1
    item = proxy.prepare(record(ASK, "red", "Is it small?", "", image=None), None)
    assert supervised_text(proxy, item).count("¦") == 1


def test_image_in_a_later_turn(proxy):
    item = proxy.prepare(record(ASK, "red", "<image>\nIs it small?", "yes"), IMAGE)
    assert supervised_text(proxy, item) == EXPECTED[type(proxy.model).__name__]
    assert item.extras


def test_image_tokens_match_the_images_features(proxy):
    item = proxy.prepare(record(f"<image>\n{ASK}", "red"), IMAGE)
    with torch.inference_mode():
        proxy.forward(proxy.collate([item, item]))  # raises if their numbers differ
    image_id = proxy.model.config.image_token_id
    assert (item.labels[item.input_ids == image_id] == IGNORE_INDEX).all()
    assert (item.input_ids == image_id).sum() >= 4


def test_placeholders_in_text_ask_for_no_image(proxy):
    item = proxy.prepare(record(f"Say <image> and <|image_pad|>. {ASK}", "red", image=None), None)
    assert not item.extras
    shown = proxy.prepare(record(ASK, "red"), IMAGE)  # an image that no turn refers to
    assert not shown.extras


def test_two_images_in_two_turns_are_refused(proxy):
    with pytest.raises(DataError, match="2 turns hold"):
        proxy.prepare(record(f"<image>\n{ASK}", "red", "<image>\nAnd this?", "yes"), IMAGE)


def test_bad_turns_are_refused(proxy):
    with pytest.raises(DataError, match="turn 1"):
        turns = [Turn("human", ASK), Turn("human", ASK)]
        proxy.prepare(Record(turns), None)


def test_long_text_is_cut_but_an_image_is_not(proxy):
    words = "red " * proxy.max_length
    item = proxy.prepare(record(f"<image>\n{ASK}", words), IMAGE)
    assert len(item.input_ids) == len(item.labels) == proxy.max_length
    assert all(len(x) == proxy.max_length for x in item.token_inputs.values())
    with pytest.raises(DataError, match="image ends"):
        proxy.prepare(record(words, "red", f"<image>\n{ASK}", "red"), IMAGE)


def test_text_only_batches_skip_the_vision_tower(proxy):
    calls = []
    base = proxy.model.base_model
    names = ("vision_tower", "visual", "vision_model")
    tower = next(getattr(base, name) for name in names if hasattr(base, name))
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        proxy.forward(proxy.collate([proxy.prepare(record(ASK, "red", image=None), None)]))
        assert not calls
        proxy.forward(proxy.collate([proxy.prepare(record(f"<image>\n{ASK}", "red"), IMAGE)]))
    hook.remove()
    assert calls


def test_padding_changes_no_real_state(proxy):
    """Causality makes a mask unnecessary: what follows the last token cannot reach it."""
    item = proxy.prepare(record(f"<image>\n{ASK}", "red"), IMAGE)
    with torch.inference_mode():
        short = proxy.forward(proxy.collate([item]))
        long = proxy.forward(proxy.collate([item], pad_to=item.n_tokens + 48))
    length = len(item.input_ids)
    torch.testing.assert_close(
        long.hidden[:, :length], short.hidden[:, :length], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        long.attention[:, :length], short.attention[:, :length], atol=1e-6, rtol=1e-5
    )


def assert_same(a, b):
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.labels, b.labels)
    for one, other in ((a.extras, b.extras), (a.token_inputs, b.token_inputs)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_rewrite_is_prepare_with_the_same_image(proxy, monkeypatch):
    """Against the model's own processor, which looks at the image each time."""
    other = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 31, 3), np.uint8))
    texts = ("Is there a triangle?", "no"), (f"{WORDS}?", "A"), (ASK, "red", "Is it?", "yes")
    records = [record(f"<image>\n{first}", *rest) for first, *rest in texts]
    pairs = [(image, sample) for image in (IMAGE, other, IMAGE) for sample in records]
    clean = {
        id(image): proxy.prepare(record(f"<image>\n{ASK}", "red"), image) for image, _ in pairs
    }
    again = [proxy.rewrite(clean[id(image)], sample, image) for image, sample in pairs]
    if isinstance(proxy, ProcessorVlm):
        remembering = proxy.processor.image_processor
        monkeypatch.setattr(proxy.processor, "image_processor", remembering._processor)
    for (image, sample), item in zip(pairs, again, strict=True):
        assert_same(item, proxy.prepare(sample, image))


def test_an_image_is_processed_once_for_all_wordings(proxy, monkeypatch):
    if isinstance(proxy, LlavaVlm):
        holder, name = proxy.loaded, "image_processor"
    else:
        holder, name = proxy.processor.image_processor, "_processor"
    processor, calls = getattr(holder, name), []

    class Counting:
        def __getattr__(self, attribute):
            return getattr(processor, attribute)

        def __call__(self, *args, **kwargs):
            calls.append(1)
            return processor(*args, **kwargs)

    monkeypatch.setattr(holder, name, Counting())
    image = IMAGE.copy()
    clean = proxy.prepare(record(f"<image>\n{ASK}", "red"), image)
    for answer in ("green", "blue", "yellow"):
        proxy.rewrite(clean, record(f"<image>\n{ASK}", answer), image)
    assert len(calls) == 1
    proxy.prepare(record(f"<image>\n{ASK}", "red"), image.copy())
    assert len(calls) == 2


def test_what_loader_processes_are_sent_still_works(qwen):
    sample = record(f"<image>\n{ASK}", "red")
    qwen.prepare(sample, IMAGE)
    there = pickle.loads(pickle.dumps(qwen.processor.image_processor))
    (made,) = there([[IMAGE]], return_tensors="pt")["pixel_values"][None]
    assert torch.equal(made, qwen.prepare(sample, IMAGE).extras["pixel_values"])


def test_llava_has_the_exact_training_ids(llava):
    sample = record(f"<image>\n{ASK}", "red", "Is it small?", "yes")
    encoded = encode_conversation(sample.turns, True, get_template("v1"), llava.loaded.tokenizer)
    item = llava.prepare(sample, IMAGE)
    at = encoded.input_ids.tolist().index(-200)
    expected = encoded.input_ids.tolist()
    expected[at : at + 1] = [llava.loaded.image_token_id] * 16
    assert item.input_ids.tolist() == expected
    assert torch.equal(item.extras["pixel_values"][0], llava.loaded.image_processor(IMAGE))


def test_begin_of_text_is_written_once(tmp_path):
    proxy = load_vlm(BUILDERS["llava_next"](tmp_path / "model"))
    ids = proxy.prepare(record(ASK, "red", image=None), None).input_ids.tolist()
    bos = proxy.processor.tokenizer.bos_token_id
    assert ids[0] == bos and ids.count(bos) == 1


def test_template_that_rewrites_earlier_turns_is_refused(qwen):
    template = qwen.processor.chat_template
    qwen.processor.chat_template = "{{ messages | length }}" + template
    try:
        with pytest.raises(DataError, match="rewrites earlier turns"):
            qwen.prepare(record(ASK, "red", "More?", "yes", image=None), None)
    finally:
        qwen.processor.chat_template = template


def test_render_finds_the_answers_in_the_text(qwen):
    def message(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}

    messages = [message("user", "red"), message("assistant", "red"), message("user", "red")]
    text, spans = render(qwen.processor, messages)
    assert [text[begin:end] for begin, end in spans] == ["red<|im_end|>"]
    assert text[: spans[0][0]].endswith("assistant\n")


def edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_identity_follows_contents_not_places(tmp_path):
    folder = save_llava(tmp_path / "a")
    identity = load_vlm(folder).identity()
    json.dumps(identity)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert load_vlm(moved).identity() == identity
    changed = [load_vlm(folder, dtype="bfloat16").identity()]
    for old, new in [("v1", "llava_v1"), ('"pad"', '"square"'), ("256", "255")]:
        copy = shutil.copytree(folder, tmp_path / new.strip('"'))
        edit(copy / "llava.json", old, new)
        changed.append(load_vlm(copy).identity())
    assert all(other != identity for other in changed)


@pytest.mark.parametrize("file", ["chat_template.jinja", "preprocessor_config.json"])
def test_processor_identity_covers_template_and_images(tmp_path, file):
    folder = save_smolvlm(tmp_path / "a")
    identity = load_vlm(folder).identity()
    json.dumps(identity)
    if file.endswith("jinja"):
        edit(folder / file, "Assistant:", "Helper:")
    else:
        edit(folder / file, "84", "56")
    assert load_vlm(folder).identity() != identity


def test_kinds(tmp_path, llava, qwen):
    assert isinstance(llava, LlavaVlm) and llava.identity()["kind"] == "llava"
    assert isinstance(qwen, ProcessorVlm) and qwen.identity()["kind"] == "processor"
    idefics = load_vlm(save_smolvlm(tmp_path / "model", "Idefics3"))
    item = idefics.prepare(record(f"<image>\n{ASK}", "red"), IMAGE)
    with torch.inference_mode():
        assert idefics.forward(idefics.collate([item])).hidden.shape[-1] == idefics.hidden_size


def test_a_hub_name_of_another_family(tmp_path, qwen, monkeypatch):
    """It is looked for once, and model, processor and fingerprint are read where it was found."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--qwen"
    save_qwen2_5_vl(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert load_vlm("some/qwen").identity() == qwen.identity()


def test_unreadable_folders_get_one_line(tmp_path):
    def message(path, **options) -> str:
        with pytest.raises(UsageError) as caught:
            load_vlm(path, **options)
        text = str(caught.value)
        assert "\n" not in text
        return text

    (tmp_path / "empty").mkdir()
    assert "empty" in message(tmp_path / "empty")
    assert "nowhere" in message(tmp_path / "nowhere")
    folder = save_qwen2_5_vl(tmp_path / "qwen")
    assert "--dtype int3" in message(folder, dtype="int3")
    assert "--device cuda" in message(folder, device="cuda") or torch.cuda.is_available()
    assert "--device moon" in message(folder, device="moon")
    (folder / "chat_template.jinja").unlink()
    assert "chat template" in message(folder)
    for name in ("processor_config.json", "tokenizer.json", "model.safetensors"):
        broken = shutil.copytree(save_qwen2_5_vl(tmp_path / f"q-{name}"), tmp_path / f"b-{name}")
        (broken / name).unlink()
        message(broken)


def test_language_model_takes_text_only(tmp_path, llava):
    folder, text = tmp_path / "lm", llava.loaded
    config = text.model.config.text_config
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(text.tokenizer_files["tokenizer.model"])
    proxy = load_vlm(folder)
    item = proxy.prepare(record(ASK, "red", image=None), None)
    with torch.inference_mode():
        assert torch.isfinite(proxy.forward(proxy.collate([item])).hidden).all()
    with pytest.raises(DataError, match="without vision"):
        proxy.prepare(record(f"<image>\n{ASK}", "red"), IMAGE)
