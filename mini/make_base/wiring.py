"""Initial weights with the six attention heads that multiple choice needs; they stay as laid down.

From random weights a language model of this size was still at chance on multiple choice after 900
steps, since nothing rewards half of the circuit that finds the option seen before and names its
symbol. Here the circuit is laid down at the start (hidden size 192, heads of 64):

  layer 0  the previous token's word; the nearest option symbol before; the mean of the picture
  layer 1  whether this word has appeared earlier (BOS takes the rest of the attention), and whether
           it is what the picture shows
  layer 2  the symbol of the option whose word has appeared earlier or is shown
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

CONST, SYMBOL, SINK, FLAG, IMAGE, FIRST_WORD = range(6)
"""Dimensions of the residual stream: always on, an option symbol, BOS, word seen, image position"""
N_WORD, N_COPY, N_PICTURE = 64, 38, 38  # dimensions of a word, of its copies as previous and seen
WORD_STD = 0.1  # of an embedding's word dimensions
CONST_VALUE = 0.4
WORD_LENGTH = 0.7  # of the first N_PICTURE word dimensions, which pictures share
STRUCTURE_FLAG, IMAGE_FLAG = -0.4, -0.4  # neither frame nor picture is an option
IMAGE_VALUE = 0.6  # of the IMAGE dimension at image positions
WORD_SINK = 2.5
IMAGE_SHUN = 6.0
PICTURE_FLAG = 1.5
PICTURE_GAIN, PICTURE_SHARPNESS, PICTURE_SINK = 0.3, 1.5, 1.5
WIRED_HEADS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))  # (layer, head)


@torch.no_grad()
def wire(
    model: LlamaForCausalLM,
    symbols: Sequence[int],
    bos_id: int,
    structure: Sequence[int],
    generator: torch.Generator,
    std: float = WORD_STD,
) -> None:
    """Initialise embeddings and four heads in place; `structure` are tokens that name nothing.

    The residual stream is divided into the dimensions above, N_WORD for the word itself, N_COPY for
    a copy of the previous word and the rest for a copy of the nearest symbol.
    """
    size = model.config.hidden_size
    word = slice(FIRST_WORD, FIRST_WORD + N_WORD)
    previous = slice(word.stop, word.stop + N_COPY)
    picture = slice(previous.stop, previous.stop + N_PICTURE)
    nearest = slice(picture.stop, size)
    n_nearest = size - picture.stop
    embeddings = model.get_input_embeddings().weight
    embeddings.zero_()
    embeddings[:, word].normal_(0, std, generator=generator)
    embeddings[:, CONST] = CONST_VALUE
    embeddings[list(symbols), SYMBOL] = 5 * std
    embeddings[list(structure), FLAG] = STRUCTURE_FLAG
    embeddings[bos_id] = 0
    embeddings[bos_id, SINK] = 10 * std
    to_copy = torch.eye(N_COPY, N_WORD)  # the first word dimensions tell the most
    to_symbol = _orthonormal(n_nearest, N_WORD, generator)
    frequency = _frequencies(model)
    half = len(frequency)

    query, key, value, out = _head(model, 0, 0)  # a rotation of one step makes the offset -1 best
    fast = torch.arange(half)[frequency > 0.15]
    query[fast, CONST] = 3.0
    key[fast, CONST] = 3.0 * torch.cos(frequency[fast])
    key[fast + half, CONST] = 3.0 * torch.sin(frequency[fast])
    query[fast, SINK] = 1.0
    value[:N_COPY, word] = to_copy
    out[previous, :N_COPY] = 0.2 * torch.eye(N_COPY)

    query, key, value, out = _head(model, 0, 1)  # symbols only, the near ones more
    middle = torch.arange(half)[(frequency < 0.3) & (frequency > 0.01)]
    query[middle, CONST] = 3.0
    key[middle, SYMBOL] = 3.0
    value[:n_nearest, word] = to_symbol
    out[nearest, :n_nearest] = 0.2 * torch.eye(n_nearest)

    slow = torch.arange(half)[frequency < 0.01][: N_PICTURE // 2]
    slow = torch.cat([slow, slow + half])
    still = half - 1  # hardly turns within any context: thresholds do not depend on position

    query, key, value, out = _head(model, 0, 2)  # the mean of all image positions
    query[still, CONST] = 6.0
    key[still, IMAGE] = 6.0
    key[still, SINK] = 1.0
    value[:N_PICTURE, word] = torch.eye(N_PICTURE, N_WORD)
    out[picture, :N_PICTURE] = PICTURE_GAIN * torch.eye(N_PICTURE)

    query, key, value, out = _head(model, 1, 1)  # my word against the picture
    query[slow, word] = PICTURE_SHARPNESS * torch.eye(N_PICTURE, N_WORD)
    key[slow, picture] = PICTURE_SHARPNESS * torch.eye(N_PICTURE)
    query[still, CONST] += PICTURE_SINK
    key[still, SINK] += PICTURE_SINK
    value[0, CONST] = 1.0
    out[FLAG, 0] = PICTURE_FLAG

    query, key, value, out = _head(model, 1, 0)  # my word against everyone's previous word
    query[slow, word] = 2.2 * to_copy
    key[slow, previous] = 2.2 * torch.eye(N_COPY)
    query[still, CONST] += WORD_SINK
    key[still, SINK] += WORD_SINK
    value[0, CONST] = 1.0
    out[FLAG, 0] = 0.4

    query, key, value, out = _head(model, 2, 0)  # flagged positions, whatever their word
    wide = torch.arange(half)[frequency < 0.12]
    query[wide, CONST] = 1.5
    key[wide, FLAG] = 1.5
    key[wide, IMAGE] = -IMAGE_SHUN
    value[:n_nearest, nearest] = torch.eye(n_nearest)
    out[word, :n_nearest] = 0.3 * to_symbol.T


def _head(model: LlamaForCausalLM, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of one head's query, key, value (64, D) and output (D, 64) weights, zeroed."""
    attention = model.model.layers[layer].self_attn
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    names = ("q_proj", "k_proj", "v_proj")
    views = [getattr(attention, name).weight[rows] for name in names]
    views.append(attention.o_proj.weight[:, rows])
    for view in views:
        view.zero_()
    return tuple(views)


def _frequencies(model: LlamaForCausalLM) -> Tensor:
    """Radians a step of each rotary pair, fast ones first."""
    half = model.config.head_dim // 2
    theta = model.config.rope_parameters["rope_theta"]
    return torch.exp(-math.log(theta) * torch.arange(half) / half)


def _orthonormal(n_rows: int, n_columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n_columns, n_rows, generator=generator))[0].T
