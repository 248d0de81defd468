"""CLIP checkpoints behind the same few methods, whichever library wrote them.

    config.json                                  transformers    ClipModel
    open_clip_config.json and no config.json     open_clip       OpenClipModel

Texts are cut at the model's length, features are unit vectors, and no number depends on batch size
or order (`llava.vlm.base`). Reading a directory downloads nothing and runs no code that is in it.
"""

from __future__ import annotations

import pickle
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
import xxhash
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from llava.errors import RefusedError, UsageError
from llava.files import add_files
from llava.model.checkpoint import Checkpoint
from llava.model.sources import find_directory, quiet_transformers, read_json
from llava.vlm import pick_device, pick_dtype
from llava.vlm.base import MIN_ROWS, StableRows

OPEN_CLIP = "open_clip_config.json"
_FILES = ("*.json", "*.safetensors", "*.bin", "*.pth", "*.model", "*.txt")
_QUANTUM = 8  # texts are padded to a multiple of so many tokens
_UNREADABLE = (OSError, ValueError, KeyError, ImportError)
_BROKEN = (*_UNREADABLE, RuntimeError, TypeError, pickle.UnpicklingError, SafetensorError)


def files_content(folder: Path) -> str:
    """xxh3-128 over all configurations, weights and words in `folder`; reads every byte."""
    digest = xxhash.xxh3_128()
    add_files(digest, sorted(file for pattern in _FILES for file in folder.glob(pattern)))
    return digest.hexdigest()


class ClipModel:
    """A CLIP of transformers: model, tokenizer and image processor."""

    content = staticmethod(lambda folder: Checkpoint(folder).fingerprint())

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        safely = {"local_files_only": True, "trust_remote_code": False}
        try:
            with quiet_transformers():
                self.model = transformers.CLIPModel.from_pretrained(
                    path, dtype=dtype, use_safetensors=True, **safely
                )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safely)
            # Never the torchvision-backed one, which gives other pixels.
            self.processor = transformers.CLIPImageProcessorPil.from_pretrained(path, **safely)
        except _UNREADABLE as error:
            raise _cannot_be_read(path, error) from error
        self.model.to(device).eval()
        self.width: int = self.model.config.projection_dim
        self.max_length: int = self.model.config.text_config.max_position_embeddings
        self.stored_dtype = _stored(dtype)

    def identity(self) -> dict[str, Any]:
        """What decides numbers besides the checkpoint, JSON-serialisable."""
        return _identity("clip", self.model.dtype, torch, transformers)

    def pixels(self, image: Any) -> Tensor:
        """(3, H, W) float32 of a PIL image."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def tokens(self, text: str) -> Tensor:
        """(L,) int64, cut at the model's length, its end token kept."""
        ids = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return torch.tensor(ids)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit features (B, D) float32 of `pixels` (B, 3, H, W)."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        with StableRows():
            return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def encode_texts(self, ids: list[Tensor]) -> Tensor:
        """Unit features (B, D) float32 of tokenised texts.

        The text model is causal and read at the end token: what is padded behind it does not count.
        """
        length, end = max(map(padded, ids)), self.tokenizer.eos_token_id
        rows = [F.pad(row, (0, min(length, self.max_length) - len(row)), value=end) for row in ids]
        with StableRows():
            output = self.model.get_text_features(torch.stack(rows).to(self.model.device))
        return _unit(output.pooler_output)


class OpenClipModel:
    """A CLIP of open_clip, SigLIP and others with a tower of timm among them.

    Texts have the model's full length: some of these models read the padding, too.
    """

    content = staticmethod(files_content)

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        config, library = _self_contained(path), _open_clip(path)
        try:
            self.model, self.transform = library.create_model_from_pretrained(f"local-dir:{path}")
            self.tokenizer = library.get_tokenizer(f"local-dir:{path}")
            self.width: int = config["embed_dim"]
        except _BROKEN as error:
            raise _cannot_be_read(path, error) from error
        # Of some checkpoints it cuts a text at random, as in their training.
        self.tokenizer.reduction_fn = None
        self.model.to(device, dtype).eval()
        self.dtype, self.device = dtype, device
        self.max_length: int = self.tokenizer.context_length
        self.stored_dtype = _stored(dtype)

    def identity(self) -> dict[str, Any]:
        """What decides numbers besides the checkpoint, JSON-serialisable."""
        libraries = (import_module(name) for name in ("torch", "torchvision", "open_clip"))
        return _identity("open_clip", self.dtype, *libraries)

    def pixels(self, image: Any) -> Tensor:
        """(3, H, W) float32 of a PIL image."""
        return self.transform(image)

    def tokens(self, text: str) -> Tensor:
        """(L,) int64, cut or padded to the model's length."""
        return self.tokenizer(text)[0]

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit features (B, D) float32 of `pixels` (B, 3, H, W)."""
        features = self.model.encode_image(_many(pixels).to(self.device, self.dtype))
        return _unit(features[: len(pixels)])

    def encode_texts(self, ids: list[Tensor]) -> Tensor:
        """Unit features (B, D) float32 of tokenised texts."""
        features = self.model.encode_text(_many(torch.stack(ids)).to(self.device))
        return _unit(features[: len(ids)])


AnyClip = ClipModel | OpenClipModel


@lru_cache(maxsize=1)
def load_clip(name: str, dtype: str, device: str) -> AnyClip:
    """The checkpoint `name`, read once per process; UsageError when it cannot be read."""
    on, folder = pick_device(device), find_directory(name)
    return _class_of(folder)(folder, pick_dtype(dtype, on), on)


@lru_cache
def checkpoint_content(name: str) -> str:
    """Fingerprint of the files of checkpoint `name`; UsageError when there is none."""
    folder = find_directory(name)
    return _class_of(folder).content(folder)


def padded(ids: Tensor) -> int:
    """Length that a text (L,) is padded to."""
    return max(MIN_ROWS, -(-len(ids) // _QUANTUM) * _QUANTUM)


def _class_of(folder: Path) -> type[AnyClip]:
    of_open_clip = (folder / OPEN_CLIP).is_file() and not (folder / "config.json").is_file()
    return OpenClipModel if of_open_clip else ClipModel


def _open_clip(path: Path) -> ModuleType:
    try:
        return import_module("open_clip")
    except (ImportError, RuntimeError) as error:  # of a torchvision made for another torch
        raise UsageError(
            f"{path}: a checkpoint of open_clip, which cannot be imported ({_reason(error)}); "
            "`pip install open_clip_torch`, beside a torchvision that works with this torch"
        ) from error


def _self_contained(path: Path) -> dict[str, Any]:
    """The model's configuration; refused when open_clip would fetch a part or run code for it."""
    config = read_json(path / OPEN_CLIP).get("model_cfg", {})
    text, vision = config.get("text_cfg", {}), config.get("vision_cfg", {})
    if "hf_model_name" in text or ":" in vision.get("timm_model_name", ""):
        raise UsageError(
            f"{path / OPEN_CLIP}: names a tower that is not in the checkpoint and would be "
            "downloaded; take one that has both its towers"
        )
    if "trust_remote_code" in text.get("tokenizer_kwargs", {}):
        raise RefusedError(f"{path / OPEN_CLIP}: its tokenizer is code (trust_remote_code)")
    return config


def _cannot_be_read(path: Path, error: Exception) -> UsageError:
    reason = _reason(error)
    return UsageError(f"{path}: no CLIP with tokenizer and image processor can be read ({reason})")


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _stored(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "float16"


def _identity(kind: str, dtype: torch.dtype, *libraries: ModuleType) -> dict[str, Any]:
    versions = {m.__name__: ".".join(m.__version__.split(".")[:2]) for m in libraries}
    return {"kind": kind, "dtype": str(dtype).removeprefix("torch."), **versions}


def _many(rows: Tensor) -> Tensor:
    """`rows` (B, ...), and the last again up to `MIN_ROWS`: fewer are rounded in another way.

    `StableRows` sees linear layers only; these models have other products, too.
    """
    missing = max(0, MIN_ROWS - len(rows))
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)
