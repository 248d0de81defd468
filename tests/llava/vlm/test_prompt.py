"""A question as it is asked: the ids before the answer of the same conversation in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, LlamaForCausalLM

from llava.errors import DataError
from llava.records import Record, Turn
from llava.tokens import IGNORE_INDEX, load_tokenizer
from llava.vlm import LlavaVlm, load_vlm
from tests.tiny_models import BUILDERS, save_llava, save_smolvlm

TEXT = (
    "What colour is the square?\nA. red\nB. green\n"
    "Answer with the option's letter from the given choices directly."
)
RNG = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))
    for height, width in ((40, 52), (31, 60), (28, 28))
]


@pytest.fixture(scope="module", params=BUILDERS)
def vlm(request, tmp_path_factory):
    return load_vlm(BUILDERS[request.param](tmp_path_factory.mktemp(request.param) / "model"))


def conversation(text: str, answer: str, image: Image.Image | None) -> Record:
    question = f"<image>\n{text}" if image else text
    return Record([Turn("human", question), Turn("gpt", answer)], 0, "x.png" if image else None)


def same(a, b) -> bool:
    """Equal ids, and equal image inputs."""
    equal = a.extras.keys() == b.extras.keys() and torch.equal(a.input_ids, b.input_ids)
    return equal and all(torch.equal(a.extras[name], b.extras[name]) for name in a.extras)


@pytest.mark.parametrize("image", [PICTURES[0], None])
def test_a_prompt_ends_where_the_trained_answer_begins(vlm, image):
    prompt = vlm.prompt(TEXT, [image] if image else [])
    trained = vlm.prepare(conversation(TEXT, "A", image), image)
    first = int((trained.labels != IGNORE_INDEX).nonzero()[0])
    assert torch.equal(prompt.input_ids, trained.input_ids[:first])
    assert (prompt.labels == IGNORE_INDEX).all() and len(prompt.labels) == first
    assert same(prompt, type(prompt)(trained.input_ids[:first], prompt.labels, trained.extras))
    assert vlm.first_token("A") == trained.labels[first]
    assert trained.labels[trained.labels != IGNORE_INDEX][-1].item() in vlm.stop_ids


def test_reprompt_is_prompt_with_the_images_made_before(vlm, monkeypatch):
    texts = [TEXT, TEXT.replace("A.", "Q."), "Is it small?"]
    expected = [vlm.prompt(text, [PICTURES[0].copy()]) for text in texts]
    clean = vlm.prompt("Describe it.", PICTURES[:1])
    holder = vlm.loaded if isinstance(vlm, LlavaVlm) else vlm.processor.image_processor
    name = "image_processor" if isinstance(vlm, LlavaVlm) else "_processor"
    processor = type(getattr(holder, name))
    monkeypatch.setattr(processor, "__call__", None, raising=False)  # nobody looks at it again
    for text, item in zip(texts, expected, strict=True):
        assert same(vlm.reprompt(clean, text, PICTURES[:1]), item)


def test_several_pictures_stand_in_front_in_their_order(vlm):
    square = [image.resize((28, 28)) for image in PICTURES]  # some processors want equal sizes
    text = "Compare <image 1> with <image 2>. \nA. red\nB. green"
    one, three = vlm.prompt(text, square[:1]), vlm.prompt(text, square)
    image_id = vlm.model.config.image_token_id
    counts = [(prompt.input_ids == image_id).sum() for prompt in (one, three)]
    assert counts[1] == 3 * counts[0]
    assert (three.input_ids == image_id).nonzero()[-1] < len(three.input_ids) - len(text) // 8
    n = int((one.input_ids == image_id).nonzero()[-1])
    rest = one.input_ids[n + 1 :]
    assert torch.equal(three.input_ids[-len(rest) :], rest)
    other = vlm.prompt(text, [square[1], square[0], square[2]])
    assert torch.equal(three.input_ids, other.input_ids) and not same(three, other)
    with torch.inference_mode():
        assert torch.isfinite(vlm.forward(vlm.collate([three])).hidden).all()


def test_llava_puts_each_picture_on_a_line_of_its_own(tmp_path, tiny_vocabulary):
    vlm = load_vlm(save_llava(tmp_path / "model"))
    vlm.loaded.tokenizer = load_tokenizer(tiny_vocabulary)  # the model's own drops line breaks
    vlm.loaded.image_token_id = vlm.loaded.tokenizer.vocab_size
    prompt = vlm.prompt(TEXT, PICTURES)
    image = prompt.input_ids == vlm.loaded.image_token_id
    starts = (image & ~torch.cat([torch.tensor([False]), image[:-1]])).sum()
    assert image.sum() == 3 * vlm.loaded.n_image_tokens and starts == 3
    assert prompt.extras["pixel_values"].shape[0] == 3


def test_nothing_is_cut(vlm):
    long = "red " * (vlm.max_length + 10) + TEXT
    prompt = vlm.prompt(long, [])
    assert len(prompt.input_ids) > vlm.max_length
    short = vlm.prompt(TEXT, []).input_ids
    assert torch.equal(prompt.input_ids[-20:], short[-20:])


def test_placeholders_in_the_words_ask_for_no_picture(vlm):
    assert not vlm.prompt(f"Say <image> and <|image_pad|>. {TEXT}").extras
    one = vlm.prompt(f"Say <image>. {TEXT}", PICTURES[:1])
    with torch.inference_mode():
        vlm.forward(vlm.collate([one]))  # raises if placeholders and pictures differ


def test_decode_leaves_out_what_is_no_text(vlm):
    trained = vlm.prepare(conversation(TEXT, "red", None), None)
    ids = trained.labels[trained.labels != IGNORE_INDEX].tolist()
    assert vlm.decode(ids).strip() == "red"


def test_the_checkpoint_may_name_further_ends(tmp_path):
    folder = save_smolvlm(tmp_path / "model")
    closing = load_vlm(folder).processor.tokenizer.eos_token_id
    GenerationConfig(eos_token_id=[closing, 7]).save_pretrained(folder)
    assert load_vlm(folder).stop_ids == {closing, 7}


@pytest.mark.parametrize(("template", "ends"), [("v1", {2}), ("v0", {2}), ("llava_llama_2", {2})])
def test_what_ends_an_answer_of_each_template(tmp_path, template, ends):
    folder = save_llava(tmp_path / "model")
    settings = folder / "llava.json"
    settings.write_text(settings.read_text().replace('"v1"', f'"{template}"'))
    assert load_vlm(folder).stop_ids == ends


def test_a_language_model_refuses_pictures(tmp_path):
    folder = tmp_path / "lm"
    vlm = load_vlm(save_llava(tmp_path / "model"))
    LlamaForCausalLM(vlm.model.config.text_config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(vlm.loaded.tokenizer_files["tokenizer.model"])
    language = load_vlm(folder)
    assert torch.equal(language.prompt(TEXT).input_ids, vlm.prompt(TEXT).input_ids)
    with pytest.raises(DataError, match="without vision"):
        language.prompt(TEXT, PICTURES[:1])
