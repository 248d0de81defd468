"""The base language model: wired heads, words with their vectors, and a trained last layer.

The frozen vision tower runs only once, over a few views of each drawing, so a step costs what a
step of the language model costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava.conversation import TEMPLATES
from llava.tokens import IGNORE_INDEX, SentencePieceTokenizer
from mini.make_base.lessons import Thing
from mini.make_base.names import Meanings
from mini.make_base.rows import Batch
from mini.make_base.tokenizer import SYMBOL_CHARACTERS, phrases
from mini.make_base.wiring import (
    FIRST_WORD,
    FLAG,
    IMAGE,
    IMAGE_FLAG,
    IMAGE_VALUE,
    N_PICTURE,
    WIRED_HEADS,
    WORD_LENGTH,
    wire,
)
from mini.recipes.emoji import CHOICE, CHOICE_ZH, YES_NO

HIDDEN, LAYERS, HEADS, INTERMEDIATE = 192, 4, 3, 512
_LETTER_WEIGHT, _END_WEIGHT = 4.0, 0.1  # of the loss at option symbols and at </s>; others 1
_BYTES = range(3, 259)  # ids of the byte pieces


def make_language_model(
    tokenizer: SentencePieceTokenizer, meanings: Meanings, known: Sequence[Thing], seed: int
) -> LlamaForCausalLM:
    """A Llama with wired heads whose other heads and MLPs begin by adding nothing.

    A word that the vision tower was trained with begins with its vector there (`meanings`), a
    Chinese name of one token with that of the English one: a projector of two layers can carry
    pictures to such words, but not to two thousand random directions.
    """
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_theta=1e6,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    bare = [one_token(tokenizer, c, False) for c in SYMBOL_CHARACTERS]
    wire(model, bare, tokenizer.bos_id, structure(tokenizer), generator)
    with torch.no_grad():
        give_meanings(model, tokenizer, meanings, known)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
        for layer, head, mask in head_columns(model):
            if (layer, head) not in WIRED_HEADS:
                model.model.layers[layer].self_attn.o_proj.weight[:, mask] = 0
        words = model.get_input_embeddings().weight[:, FIRST_WORD:]
        for token, symbol in zip(bare, SYMBOL_CHARACTERS, strict=True):
            answer = one_token(tokenizer, symbol, True)
            words[answer] = 0.8 * words[token] + 0.6 * words[answer]  # "▁A" is said where "A" is
    return model


def give_meanings(
    model: LlamaForCausalLM,
    tokenizer: SentencePieceTokenizer,
    meanings: Meanings,
    known: Sequence[Thing],
) -> None:
    """Put the words' vectors into the word dimensions that pictures share."""
    words = model.get_input_embeddings().weight[:, FIRST_WORD : FIRST_WORD + N_PICTURE]

    def place(text: str, vector: Tensor) -> None:
        ids, _ = tokenizer.encode(text)
        if len(ids) == 1:
            words[ids[0]] = WORD_LENGTH * F.normalize(vector, dim=0)

    for thing in known:
        parts = [meanings[w] for w in re.findall(r"[^\W_]+", thing.name.lower()) if w in meanings]
        if thing.zh and parts:
            place(thing.zh, torch.stack(parts).mean(0))
    for word, vector in meanings.items():
        place(word, vector)
        place(word.capitalize(), vector)


def head_columns(model: LlamaForCausalLM) -> Iterator[tuple[int, int, slice]]:
    """Every (layer, head) with its rows in q, k, v, which are its columns in the output matrix."""
    size = model.config.head_dim
    for layer in range(model.config.num_hidden_layers):
        for head in range(model.config.num_attention_heads):
            yield layer, head, slice(head * size, (head + 1) * size)


def one_token(tokenizer: SentencePieceTokenizer, text: str, spaced: bool) -> int:
    """Id of a text that is one piece, after a space or not; ValueError if it is none."""
    ids, _ = tokenizer.encode(text if spaced else f"\n{text}")
    found = ids if spaced else ids[2:]  # the dummy prefix and the newline
    if len(found) != 1:
        raise ValueError(f"{text!r} is {len(found)} pieces")
    return found[0]


def structure(tokenizer: SentencePieceTokenizer) -> list[int]:
    """Tokens of the questions' frame, which name nothing."""
    frame = [*CHOICE, CHOICE_ZH, *(text.replace("{}", "") for text in YES_NO), "USER: ASSISTANT:"]
    texts = [*frame, "USER", *phrases(), *SYMBOL_CHARACTERS, TEMPLATES["v1"].system + " USER:"]
    texts += [f"\n{text}" for text in (*phrases(), *SYMBOL_CHARACTERS, ".", ":", ",")]
    found = {token for text in texts for token in tokenizer.encode(text)[0]}
    return sorted(found | set(_BYTES))


def fit(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    n_steps: int,
    learning_rate: float,
    symbols: Sequence[int],
    generator: torch.Generator,
    projector: nn.Module | None = None,
    features: Tensor | None = None,
    report: Callable[[int, float, float], None] = lambda step, loss, accuracy: None,
) -> None:
    """Train the last layer: below it lies the wired circuit, which training would take apart.

    The rate warms up over 100 steps and falls linearly over the last half. `report` gets step, loss
    and the accuracy at option symbols every 100 steps.
    """
    model.requires_grad_(False)
    trained = [*model.model.layers[-1].parameters(), *model.model.norm.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    answers = torch.tensor(symbols)
    right = asked = 0
    for step, batch in enumerate(islice(batches, n_steps), start=1):
        _set_rate(optimizer, min(1.0, step / 100, 2 * (1 - (step - 1) / n_steps)), learning_rate)
        logits, labels = forward(model, batch, generator, projector, features)
        is_symbol = torch.isin(labels, answers)
        weights = torch.where(labels == model.config.eos_token_id, _END_WEIGHT, 1.0)
        weights = torch.where(is_symbol, _LETTER_WEIGHT, weights)
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        right += int((logits.argmax(-1) == labels)[is_symbol].sum())
        asked += int(is_symbol.sum())
        if step % 100 == 0:
            report(step, float(loss.detach()), right / max(asked, 1))
            right = asked = 0


def forward(
    model: LlamaForCausalLM,
    batch: Batch,
    generator: torch.Generator,
    projector: nn.Module | None,
    features: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Logits (n, V) where a token is supervised, and those labels (n,)."""
    embeddings = model.get_input_embeddings()
    hidden = embeddings(batch.input_ids)
    described = [row for row in batch.rows if row.words is not None]
    if described:
        parts = [torch.tensor(r.weights).float() @ embeddings.weight[r.words] for r in described]
        mixed = torch.cat(parts)
        mixed = mixed + 0.02 * torch.randn(mixed.shape, generator=generator)
        marks = {IMAGE: IMAGE_VALUE, FLAG: IMAGE_FLAG}
        mixed[:, list(marks)] = torch.tensor(list(marks.values()))
        hidden = hidden.index_put(batch.positions(pictured=False), mixed)
    pictures = [row.picture for row in batch.rows if row.picture is not None]
    if pictures:
        views = torch.randint(len(features), (len(pictures),), generator=generator)
        projected = projector(features[views, pictures].float()).flatten(0, 1)
        hidden = hidden.index_put(batch.positions(pictured=True), projected)
    states = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state[:, :-1]
    supervised = batch.labels[:, 1:] != IGNORE_INDEX
    return states[supervised] @ embeddings.weight.T, batch.labels[:, 1:][supervised]


def symbol_answers(tokenizer: SentencePieceTokenizer) -> list[int]:
    """Ids of the option symbols as answers, after a space."""
    return [one_token(tokenizer, symbol, True) for symbol in SYMBOL_CHARACTERS]


def _set_rate(optimizer: torch.optim.Optimizer, share: float, peak: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = peak * share
