"""Models of which every evaluation number is known beforehand, on the Hugging Face interfaces.

An oracle has one layer, whose keys are the token ids themselves: what it knows of a prompt it has
read back out of the cache that it was handed, so a prefix that is lost, doubled or mixed up between
rows changes its answers. It decodes that history, finds the question's options in it and writes
what its rule says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Cache,
    CLIPImageProcessorPil,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llava.conversation import get_template
from llava.images import ImageProcessor
from llava.model.checkpoint import Kind, Loaded
from llava.tokens import IGNORE_INDEX, Tokenizer, encode_conversation, load_tokenizer
from llava.vlm import LlavaVlm

N_IMAGE = 16
_OPTION = re.compile(r"^(\S)\. (.*)$", re.MULTILINE)

Options = dict[str, str]  # text by symbol, in the order shown
Rule = Callable[[str, Options], str]
"""What is answered to a question (all of its text) with these options."""


def first_position(question: str, options: Options) -> str:
    return next(iter(options))


def knows(right: Callable[[str], str], letters: str | None = None) -> Rule:
    """Answers with the symbol of the option text `right(question)`; given `letters`, knows no
    other symbols and writes the text itself."""

    def rule(question: str, options: Options) -> str:
        text = right(question)
        symbol = next(symbol for symbol, option in options.items() if option == text)
        return symbol if letters is None or symbol in letters else text

    return rule


def uniform(question: str, options: Options) -> str:
    """Any symbol, drawn from a hash of everything that it has read."""
    draw = int.from_bytes(hashlib.sha256(question.encode()).digest())
    return list(options)[draw % len(options)]


class OracleConfig(PreTrainedConfig):
    model_type = "oracle"


class Memory(nn.Module):
    """Attention that attends to nothing: its keys are the ids, (B, 1, S, 1)."""

    def forward(self, ids: Tensor, cache: Cache | None) -> Tensor:
        keys = ids[:, None, :, None].float()
        return ids if cache is None else cache.update(keys, keys, 0)[0][:, 0, :, 0].long()


class OracleDecoder(PreTrainedModel):
    """The state of a position is the one-hot token that follows what it may see."""

    config_class = OracleConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: OracleConfig, write: Callable[[list[int]], int]) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].self_attn = Memory()
        self.write = write

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **_,
    ) -> BaseModelOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        history = self.layers[0].self_attn(input_ids, past_key_values)
        n = input_ids.shape[1]
        if attention_mask is None or attention_mask.dim() < 4:
            seen = torch.ones(n, history.shape[1]).tril(history.shape[1] - n).bool()[None]
        else:
            seen = attention_mask[:, 0]
        chosen = [
            [self.write(ids[row].tolist()) for row in rows]
            for ids, rows in zip(history, seen.expand(len(history), -1, -1), strict=True)
        ]
        states = F.one_hot(torch.tensor(chosen), self.config.vocab_size).float()
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values)


class Oracle(PreTrainedModel, GenerationMixin):
    config_class = OracleConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: OracleConfig, write: Callable[[list[int]], int]) -> None:
        super().__init__(config)
        self.model = OracleDecoder(config, write)
        self.lm_head = nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def get_decoder(self) -> OracleDecoder:
        return self.model

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, **inputs) -> CausalLMOutputWithPast:
        out = self.model(input_ids, **inputs)
        return CausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values
        )


class Writer:
    """From the history of ids to the next id: reads the question, goes on with the answer."""

    def __init__(self, rule: Rule, tokenizer: Tokenizer) -> None:
        self.rule, self.tokenizer = rule, tokenizer

    def __call__(self, history: list[int]) -> int:
        text = self.tokenizer.decode(history)
        if "ASSISTANT:" not in text:
            return self.tokenizer.eos_id  # a prefix: nobody asks what comes after it
        at = len(history)
        while not text.endswith("ASSISTANT:"):
            at -= 1
            text = self.tokenizer.decode(history[:at])
        question = text.partition("USER:")[2].removesuffix("ASSISTANT:").strip()
        answer = self.rule(question, dict(_OPTION.findall(question)))
        return self.answer_ids(answer)[len(history) - at]

    def answer_ids(self, answer: str) -> list[int]:
        turns = [("human", "?"), ("gpt", answer)]
        labels = encode_conversation(turns, False, get_template("v1"), self.tokenizer).labels
        return labels[labels != IGNORE_INDEX].tolist()


def oracle(rule: Rule, folder: Path) -> LlavaVlm:
    """A LLaVA that answers by `rule`; `folder` keeps the vocabulary and the image processor."""
    if not folder.exists():
        _save_parts(folder)
    tokenizer = load_tokenizer(folder)
    n = tokenizer.vocab_size + 1
    config = OracleConfig(vocab_size=n, hidden_size=n, num_hidden_layers=1, image_token_id=n - 1)
    loaded = Loaded(
        model=Oracle(config, Writer(rule, tokenizer)),
        tokenizer=tokenizer,
        image_processor=ImageProcessor.from_pretrained(folder, "pad"),
        template_name="v1",
        image_token_id=n - 1,
        n_image_tokens=N_IMAGE,
        model_max_length=2048,
        kind=Kind.HF_LLAVA,
    )
    return LlavaVlm(loaded, f"oracle {rule.__name__}", folder)


def _save_parts(folder: Path) -> None:
    """A vocabulary that keeps every line break and has each symbol as one token."""
    folder.mkdir()
    words = [
        *get_template("v1").system.split(),
        "USER:",
        "ASSISTANT:",
        *"ABCDEFGHIJ",
        *"QWERTYUIOP",
    ]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([" ".join(words)] * 50),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder)
