"""CoIDO's scorers: a four-layer MLP, two Transformer blocks, or attention alone (figure 3).

All read the rows of `features.Assembly` and give one number a sample; none looks at other samples,
so a score does not depend on the batch. A scorer is a file that can be applied to another pool.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from llava.errors import UsageError
from llava.files import atomic_write
from selection.methods.coido.features import Assembly
from selection.methods.coido.settings import Architecture

SCHEMA = 1
WIDTH = 256
HEADS = 4


class Mlp(nn.Module):
    """Hidden layers of 1536 numbers for CLIP features and 3 for scores, then both together."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.widths = [width for width in widths if width]
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.Linear(width, WIDTH), nn.LayerNorm(WIDTH)
            )
            for width in self.widths
        )
        self.head = nn.Sequential(
            nn.GELU(), nn.Linear(len(self.widths) * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """(B, F) -> (B,)"""
        parts = zip(self.branches, rows.split(self.widths, dim=1), strict=True)
        return self.head(torch.cat([branch(part) for branch, part in parts], dim=1))[:, 0]


class Tokens(nn.Module):
    """Image half, text half and scores as tokens of one width."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        clip, scores = widths
        self.widths = [width for width in (clip // 2, clip // 2, scores) if width]
        self.project = nn.ModuleList(nn.Linear(width, WIDTH) for width in self.widths)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, F) -> (B, T, WIDTH)"""
        parts = zip(self.project, rows.split(self.widths, dim=1), strict=True)
        return torch.stack([project(part) for project, part in parts], dim=1)


class Transformer(nn.Module):
    """Two standard blocks over the tokens, their mean, one output."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.tokens = Tokens(widths)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, F) -> (B,)"""
        tokens = self.tokens(rows)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))[:, 0]


class Attention(nn.Module):
    """Self-attention over the tokens, then one learnt question put to them by cross-attention."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.tokens = Tokens(widths)
        self.own = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.question = nn.Parameter(torch.randn(1, 1, WIDTH) / WIDTH**0.5)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, F) -> (B,)"""
        tokens = self.tokens(rows)
        tokens = tokens + self.own(tokens, tokens, tokens, need_weights=False)[0]
        question = self.question.expand(len(rows), -1, -1)
        return self.head(self.cross(question, tokens, tokens, need_weights=False)[0][:, 0])[:, 0]


ARCHITECTURES = {"mlp": Mlp, "transformer": Transformer, "attention": Attention}


@dataclass
class Scorer:
    """A scoring network and what it reads."""

    architecture: Architecture
    assembly: Assembly
    network: nn.Module

    @classmethod
    def new(cls, architecture: Architecture, assembly: Assembly, seed: int) -> Scorer:
        """Untrained, the same for the same `seed`; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(architecture, assembly, ARCHITECTURES[architecture](assembly.widths))

    @torch.inference_mode()
    def score(self, rows: Tensor) -> Tensor:
        """Logits (n,) float32 of assembled `rows` (n, F): lowest = most wanted."""
        return self.network.eval()(rows)

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """Write one safetensors file; `about` is kept in it for readers."""
        atomic_write(path, self.packed(about))

    def packed(self, about: dict[str, Any] | None = None) -> bytes:
        """The bytes of that file."""
        values = {"architecture": self.architecture, **asdict(self.assembly), "schema": SCHEMA}
        # One entry: safetensors writes several in no fixed order.
        metadata = {"coido": json.dumps({**values, "about": about or {}})}
        return save(self.network.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scorer:
        """Read what `save` wrote; UsageError when it cannot be."""
        try:
            with safe_open(path, "pt") as file:
                values = json.loads((file.metadata() or {})["coido"])
                state = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UsageError(f"--scorer {path}: is no scorer of CoIDO ({error})") from None
        values.pop("about")
        if values.pop("schema") != SCHEMA:
            raise UsageError(f"--scorer {path}: written by another version; train it again")
        architecture = values.pop("architecture")
        assembly = Assembly.of(values)
        network = ARCHITECTURES[architecture](assembly.widths)
        network.load_state_dict(state)
        return cls(architecture, assembly, network)
