"""The base's CLIP: a small vision tower trained to tell which words belong to a drawing.

Contrastive as CLIP, but every batch is compared with all names at once, and the text side is a bag
of words: names are short and few. The text side is not kept. Only training views of the concepts
are used, varied so strongly that a drawing in another style still finds its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mini.clipart import ClipArt
from mini.make_base.lessons import Thing
from mini.make_base.optimizer import Muon
from mini.render import SIZE, open_png
from mini.world import World

HIDDEN, LAYERS, PATCH, SHARED = 160, 4, 16, 128
_N_EMOJI, _N_FLAGS, _N_CLIPART = 40, 6, 10  # of a batch
_WHITE = 250  # a pixel with all channels above is taken for background


@dataclass
class Drawings:
    """`pixels` (n, 4, 96, 96) uint8: RGB and opacity; `things[i]` is what drawing i shows."""

    pixels: Tensor
    things: list[Thing]

    def of(self, kind: str) -> list[int]:
        """Numbers of the drawings of one kind: emoji, flag, figure or clipart."""
        return [i for i, thing in enumerate(self.things) if thing.drawn == kind]


def training_drawings(
    world: World, known: list[Thing], figures: Sequence[tuple[Thing, bytes]] = ()
) -> Drawings:
    """Every training view of the `known` things, and `figures` and clip art, each its own thing."""
    by_key = {thing.key: thing for thing in known}
    shown = [
        (world.emoji[emoji.hexcode, style], by_key[emoji.hexcode])
        for emoji in world.concepts.emoji
        if emoji.hexcode in by_key
        for style in emoji.training_styles
        if (emoji.hexcode, style) in world.emoji
    ]
    shown += [(png, by_key[code]) for code, png in world.flags.items() if code in by_key]
    shown += [(png, thing) for thing, png in figures]
    shown += [(png, art_thing(art)) for art, png in world.clipart.get("train", [])]
    pixels = torch.stack([with_opacity(png) for png, _ in shown])
    return Drawings(pixels, [thing for _, thing in shown])


def art_thing(art: ClipArt) -> Thing:
    """Clip art as a thing, named by its title or else its first keyword."""
    words = tuple(dict.fromkeys(w for w in (*art.keywords[:4], art.category) if w != art.title))
    name = art.title or words[0]
    return Thing(name, "", art.category, words, drawn="clipart", key=art.path)


def with_opacity(png: bytes) -> Tensor:
    """Pixels (4, 96, 96) uint8 of a drawing on white, the white taken for transparent."""
    pixels = torch.from_numpy(np.array(open_png(png).convert("RGB"))).permute(2, 0, 1)
    return torch.cat([pixels, 255 * (pixels < _WHITE).any(0, keepdim=True).to(torch.uint8)])


def normalised(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 as CLIP's processor hands it to the tower."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (rgb - mean) / std


def plain(pixels: Tensor) -> Tensor:
    """The drawing on white, without variation: uint8 (B, 4, H, W) -> float (B, 3, H, W)."""
    rgb, opacity = pixels[:, :3].float() / 255, pixels[:, 3:].float() / 255
    return normalised(rgb * opacity + 1 - opacity)


def varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Moved, turned, scaled, mirrored, recoloured, lit from a side, on a colour, blurred."""
    n = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    rgb, opacity = pixels[:, :3].float() / 255, pixels[:, 3:].float() / 255
    angle, scale, shear = uniform(-0.3, 0.3, n), uniform(0.75, 1.35, n), uniform(-0.15, 0.15, n)
    stretch, flip = uniform(-0.15, 0.15, n).exp(), torch.where(uniform(0, 1, n) < 0.3, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos * flip * stretch, shear - sin, uniform(-0.2, 0.2, n)]
    rows += [sin * flip, cos / stretch, uniform(-0.2, 0.2, n)]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(pixels.shape), False)
    moved = F.grid_sample(torch.cat([rgb * opacity, opacity], 1), grid, align_corners=False)
    rgb, opacity = moved[:, :3], moved[:, 3:]

    mean = rgb.sum((2, 3), keepdim=True) / opacity.sum((2, 3), keepdim=True).clamp(min=1) * opacity
    grey, saturation = rgb.mean(1, keepdim=True), uniform(0.4, 1.6, n, 1, 1, 1)
    rgb = grey * (1 - saturation) + rgb * saturation
    rgb = (rgb - mean) * uniform(0.6, 1.4, n, 1, 1, 1) + mean
    rgb = (rgb + uniform(-0.2, 0.2, n, 1, 1, 1) * opacity) * uniform(0.8, 1.2, n, 3, 1, 1)
    slope, line = uniform(-0.3, 0.3, n, 2, 1, 1), torch.linspace(-1, 1, SIZE)
    rgb = rgb * (1 + slope[:, :1] * line + slope[:, 1:] * line[:, None])

    white = uniform(0, 1, n, 1, 1, 1) < 0.7
    background = torch.where(white, 1.0, uniform(0, 1, n, 3, 1, 1))
    shown = (rgb + (1 - opacity) * background).clamp(0, 1)
    blurred = torch.nonzero(uniform(0, 1, n) < 0.4).flatten()
    if len(blurred):
        side = int(uniform(24, 72, 1))
        small = F.interpolate(shown[blurred], size=side, mode="bilinear", antialias=True)
        shown[blurred] = F.interpolate(small, size=SIZE, mode="bilinear")
    return normalised(shown)


class Contrast(nn.Module):
    """A vision tower with what only its training needs.

    Both the class token of the last layer and the mean patch of the one before are compared with
    the words: LLaVA reads the latter.
    """

    def __init__(self, n_words: int) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HIDDEN // 32,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=SHARED,
        )
        self.tower = CLIPVisionModel(config)
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, SHARED, bias=False) for _ in range(2))
        self.words = nn.EmbeddingBag(n_words, SHARED, mode="sum")
        self.scale = nn.Parameter(torch.full((2,), 2.7))  # logarithm of CLIP's logit scale
        nn.init.normal_(self.words.weight, std=0.1)

    def losses(self, pictures: Tensor, texts: Texts, right: Tensor) -> Tensor:
        """Mean cross-entropy over the two readings; `right` (B,) are rows of `texts`."""
        names = F.normalize(self.words(texts.ids, texts.offsets, texts.weights), dim=-1)
        out = self.tower(pictures, output_hidden_states=True)
        readings = (out.pooler_output, out.hidden_states[-2][:, 1:].mean(1))
        total = pictures.new_zeros(())
        for head, reading, scale in zip(self.heads, readings, self.scale, strict=True):
            logits = F.normalize(head(reading), dim=-1) @ names.T * scale.exp().clamp(max=60)
            total = total + F.cross_entropy(logits, right) / 2
        return total


@dataclass
class Texts:
    """Bags of words: row i has `ids[offsets[i] : offsets[i + 1]]` with `weights`."""

    ids: Tensor
    offsets: Tensor
    weights: Tensor


class Vocabulary(dict[str, int]):
    """Numbers the words of things' texts in the order of their first use."""

    def bag(self, things: list[Thing]) -> Texts:
        """One text a thing: its name counts most, then its kind and tags."""
        ids, offsets, weights = [], [], []
        for thing in things:
            offsets.append(len(ids))
            for word, weight in _weighted_words(thing):
                ids.append(self.setdefault(word, len(self)))
                weights.append(weight)
        return Texts(torch.tensor(ids), torch.tensor(offsets), torch.tensor(weights))


def _weighted_words(thing: Thing) -> list[tuple[str, float]]:
    words = [(word, 2.0) for word in re.findall(r"[^\W_]+", thing.name.lower())]
    words += [(word, 0.5) for word in thing.words]
    return [*words, (f"kind: {thing.kind}", 0.7), (f"group: {thing.group}", 0.5)]


def train_tower(
    drawings: Drawings,
    n_steps: int,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> CLIPVisionModel:
    """A tower trained on varied drawings for `n_steps`, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    named = list(dict.fromkeys(t for t in drawings.things if t.drawn in ("emoji", "flag")))
    row = {thing: i for i, thing in enumerate(named)}
    groups = [
        (torch.tensor(drawings.of(kind)), n)
        for kind, n in (("emoji", _N_EMOJI), ("flag", _N_FLAGS), ("clipart", _N_CLIPART))
    ]
    groups = [(numbers, n) for numbers, n in groups if len(numbers)]
    vocabulary = Vocabulary()
    vocabulary.bag(drawings.things)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Contrast(len(vocabulary))
    optimizers = _optimizers(model)
    for step in range(1, n_steps + 1):
        _set_rates(optimizers, min(1.0, step / 50, 2 * (1 - (step - 1) / n_steps)))
        drawn = [part[torch.randint(len(part), (n,), generator=generator)] for part, n in groups]
        chosen = torch.cat(drawn)
        shown = [drawings.things[i] for i in chosen.tolist()]
        arts = list(dict.fromkeys(thing for thing in shown if thing not in row))
        place = row | {thing: len(named) + i for i, thing in enumerate(arts)}
        right = torch.tensor([place[thing] for thing in shown])
        pictures = varied(drawings.pixels[chosen], generator)
        loss = model.losses(pictures, vocabulary.bag(named + arts), right)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 0:
            report(step, float(loss.detach()))
    return model.tower.eval()


def _optimizers(model: Contrast) -> list[torch.optim.Optimizer]:
    """Muon for the tower's matrices, AdamW for all else."""
    matrices = [
        parameter
        for name, parameter in model.tower.named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    ]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    optimizers = [Muon(matrices, lr=0.02, weight_decay=0.05), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _set_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


@torch.no_grad()
def features(tower: CLIPVisionModel, pictures: Tensor, batch_size: int = 128) -> Tensor:
    """What LLaVA's projector reads, (B, patches, D): the layer before the last, no class token."""
    parts = [
        tower(part, output_hidden_states=True).hidden_states[-2][:, 1:]
        for part in pictures.split(batch_size)
    ]
    return torch.cat(parts)


def feature_bank(
    tower: CLIPVisionModel, drawings: Drawings, n_views: int, generator: torch.Generator
) -> Tensor:
    """Features (views, drawings, patches, D) float16: the plain view, then varied ones."""
    views = []
    for view in range(n_views):
        parts = drawings.pixels.split(128)
        shown = (plain(part) if view == 0 else varied(part, generator) for part in parts)
        views.append(torch.cat([features(tower, part).half() for part in shown]))
    return torch.stack(views)
