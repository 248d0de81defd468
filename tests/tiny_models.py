"""Tiny random vision-language models, saved to folders as their publishers lay them out.

Vocabularies are trained here, image processors are the PIL ones, weights are random with a large
spread (so that different inputs give clearly different outputs). `save_*` take an empty folder.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: What colour "
    "is the square? Answer with the option's letter from the given choices directly. Answer the "
    "question using a single word or phrase. red green blue yellow A. B. C. D. yes no circle "
    "Describe it. There is a large triangle beside two small ones. \n"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,  # of 32s: AVX-512 rounds the rest of an activation otherwise
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def save_llava(folder: Path) -> Path:
    """LLaVA-1.5's architecture: sentencepiece vocabulary, 28 pixels in 16 image tokens."""
    n_words = _save_sentencepiece(folder)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=n_words + 2, pad_token_id=0),
        image_token_id=n_words,
        pad_token_id=n_words + 1,
        image_seq_length=16,
    )
    _save_model(hf.LlavaForConditionalGeneration, config, folder)
    _save_clip_processor(folder, 28)
    settings = {"template": "v1", "image_aspect_ratio": "pad", "model_max_length": 256}
    (folder / "llava.json").write_text(json.dumps(settings))
    return folder


def save_llava_next(folder: Path) -> Path:
    """LLaVA-NeXT on Mistral: one to five tiles of 28 pixels."""
    tokenizer = _byte_tokenizer(["<image>"], bos="<s>", eos="</s>")
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        text_config=hf.MistralConfig(**TEXT, vocab_size=len(tokenizer), sliding_window=None),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_model(hf.LlavaNextForConditionalGeneration, config, folder)
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% for c in "
        "m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}"
        "{% endfor %} [/INST]{% else %} {{ m.content[0].text }}</s>{% endif %}{% endfor %}"
    )
    extra = {
        "patch_size": 7,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    _save_processor(folder, "LlavaNextProcessor", tokenizer, images, template, extra)
    return folder


def save_qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: any size of image, windowed vision attention, multimodal rotary positions."""
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _byte_tokenizer(marks, bos=None, eos="<|im_end|>")
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks[1:])
    config = hf.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 10000.0,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "window_size": 28,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    _save_model(hf.Qwen2_5_VLForConditionalGeneration, config, folder)
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, min_pixels=14 * 14, max_pixels=70 * 70
    )
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
        "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    _save_processor(folder, "Qwen2_5_VLProcessor", tokenizer, images, template)
    return folder


def save_smolvlm(folder: Path, architecture: str = "SmolVLM") -> Path:
    """SmolVLM (or "Idefics3"): an image is split into tiles of 28 pixels, 4 tokens each."""
    grid = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", *grid]
    tokenizer = _byte_tokenizer(marks, bos=None, eos="<end_of_utterance>")
    config = getattr(hf, f"{architecture}Config")(
        text_config={
            "model_type": "llama",
            **TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_model(getattr(hf, f"{architecture}ForConditionalGeneration"), config, folder)
    images = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 84}, max_image_size={"longest_edge": 28}, do_image_splitting=True
    )
    template = (
        "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    extra = {"image_seq_len": 4}
    _save_processor(folder, "Idefics3Processor", tokenizer, images, template, extra)
    return folder


BUILDERS = {
    "llava": save_llava,
    "llava_next": save_llava_next,
    "qwen2_5_vl": save_qwen2_5_vl,
    "smolvlm": save_smolvlm,
}


def save_clip(folder: Path) -> Path:
    """CLIP with a text tower of 77 positions: 28 pixels, features of 24 numbers."""
    tokenizer = _byte_tokenizer(["<|startoftext|>"], bos=None, eos="<|endoftext|>")
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    tower = {**TEXT, "max_position_embeddings": 77}
    del tower["num_key_value_heads"]
    config = hf.CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        projection_dim=24,
    )
    _save_model(hf.CLIPModel, config, folder)
    _save_clip_processor(folder, 28)
    tokenizer.save_pretrained(folder)
    return folder


def save_pool(folder: Path, n: int, seed: int = 0) -> tuple[Path, Path]:
    """`n` records of mixed length, every fourth text-only, with images of mixed shape.

    Returns the pool file and the image folder.
    """
    rng = np.random.default_rng(seed)
    words = WORDS.split()
    images = folder / "images"
    images.mkdir(parents=True)

    def text(n_words: int) -> str:
        return " ".join(rng.choice(words, n_words))

    records = []
    for row in range(n):
        turns = []
        for turn in range(rng.integers(1, 4)):
            image = "<image>\n" if turn == 0 and row % 4 else ""
            turns.append({"from": "human", "value": image + text(rng.integers(2, 9))})
            turns.append({"from": "gpt", "value": text(rng.integers(1, 12))})
        record = {"id": row, "conversations": turns}
        if row % 4:
            record["image"] = f"{row}.png"
            shape = (*rng.integers(14, 80, 2), 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(images / record["image"])
        records.append(record)
    path = folder / "pool.json"
    path.write_text(json.dumps(records))
    return path, images


def _save_model(cls: type, config: hf.PreTrainedConfig, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls(config).save_pretrained(folder)


def _save_sentencepiece(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.split(" ") * 3),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()


def _save_clip_processor(folder: Path, size: int) -> None:
    hf.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(folder)


def _byte_tokenizer(marks: list[str], bos: str | None, eos: str) -> hf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", *([bos] if bos else []), eos, *marks]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    if bos:  # added even where the chat template has written it: the usual trap
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=ids
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=marks,
    )


def _save_processor(
    folder: Path,
    cls: str,
    tokenizer: hf.PreTrainedTokenizerFast,
    images: hf.BaseImageProcessor,
    template: str,
    extra: dict | None = None,
) -> None:
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": cls, **(extra or {})})
    )
