"""Vectors of words and a projector that reads a drawing in them, over the frozen vision tower.

The wired head that compares an option with the picture has N_PICTURE dimensions to do so, fewer
than the tower was trained with. So words and projector are learnt anew in just these, by the same
contrast, from the features of a few views of each drawing: seconds, since the tower does not run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.make_base.lessons import Thing
from mini.make_base.vision import Vocabulary
from mini.make_base.wiring import (
    CONST,
    CONST_VALUE,
    FIRST_WORD,
    FLAG,
    IMAGE,
    IMAGE_FLAG,
    IMAGE_VALUE,
    N_PICTURE,
    WORD_LENGTH,
)

Meanings = dict[str, Tensor]
"""Word -> unit vector (N_PICTURE,)"""
_BATCH, _RATE = 128, 3e-3


def learn_names(
    bank: Tensor, things: list[Thing], hidden_size: int, n_steps: int, seed: int
) -> tuple[Meanings, nn.Sequential]:
    """Word vectors, and LLaVA's two-layer projector into a stream of `hidden_size`.

    `bank` (views, drawings, patches, D) float16; `things` name each drawing's thing; clip art and
    figures are passed over, their names being free text and answers.
    """
    chosen = [i for i, thing in enumerate(things) if thing.drawn in ("emoji", "flag")]
    named = list(dict.fromkeys(things[i] for i in chosen))
    right = torch.tensor([named.index(things[i]) for i in chosen])
    vocabulary = Vocabulary()
    texts = vocabulary.bag(named)
    features = bank[:, chosen].float()
    std, mean = torch.std_mean(features[0], dim=(0, 1))
    features = (features - mean) / std
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = nn.Sequential(nn.Linear(bank.shape[-1], hidden_size), nn.GELU())
        reader.append(nn.Linear(hidden_size, N_PICTURE))
        words = nn.Parameter(0.3 * torch.randn(len(vocabulary), N_PICTURE))
    scale = nn.Parameter(torch.tensor(2.5))  # logarithm, as CLIP's
    groups = [{"params": reader.parameters()}, {"params": [words, scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 50, 2 * (1 - step / n_steps))
        drawing = torch.randint(len(chosen), (_BATCH,), generator=generator)
        view = torch.randint(len(bank), (_BATCH,), generator=generator)
        seen = F.normalize(reader(features[view, drawing]).mean(1), dim=-1)
        vectors = F.normalize(words, dim=-1)
        bags = F.embedding_bag(
            texts.ids, vectors, texts.offsets, mode="sum", per_sample_weights=texts.weights
        )
        logits = scale.exp().clamp(max=50) * seen @ F.normalize(bags, dim=-1).T
        loss = F.cross_entropy(logits, right[drawing])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vectors = F.normalize(words.detach(), dim=-1)
    meanings = {word: vectors[i] for word, i in vocabulary.items() if ":" not in word}
    return meanings, _projector(reader, features[0], mean, std, hidden_size)


@torch.no_grad()
def _projector(
    reader: nn.Sequential, features: Tensor, mean: Tensor, std: Tensor, hidden_size: int
) -> nn.Sequential:
    """The reader with the features' scale folded in, writing to the word dimensions.

    Projected drawings are on average as long as words.
    """
    length = WORD_LENGTH / reader(features).mean(1).norm(dim=1).mean()
    first, second = nn.Linear(len(mean), hidden_size), nn.Linear(hidden_size, hidden_size)
    first.weight.copy_(reader[0].weight / std)
    first.bias.copy_(reader[0].bias - first.weight @ mean)
    second.weight.zero_()
    second.bias.zero_()
    seen = slice(FIRST_WORD, FIRST_WORD + N_PICTURE)
    second.weight[seen], second.bias[seen] = length * reader[2].weight, length * reader[2].bias
    second.bias[CONST], second.bias[IMAGE] = CONST_VALUE, IMAGE_VALUE
    second.bias[FLAG] = IMAGE_FLAG
    return nn.Sequential(first, nn.GELU(), second)
