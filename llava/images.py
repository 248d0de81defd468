"""Images: opened without trusting reference or bytes, preprocessed bit for bit as LLaVA-1.5.

Pixels come from Pillow and are those of transformers' PIL-backed CLIP processor, a quarter faster:
normalising is a table of 256 levels a channel. The torchvision-backed processor, which transformers
picks by itself where torchvision is installed, differs by up to one step in 255.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image, UnidentifiedImageError

from llava.errors import DataError, RefusedError, UsageError, UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ASPECT_RATIOS = ("pad", "square")
MAX_PIXELS = 64_000_000
MAX_REFERENCE = 4096  # characters; the longest path Linux can open
MAX_CANVAS = 256_000_000  # pixels of the padded or resized picture: 0.8 GB
# Decoders that only decode. Pillow also knows formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")

_NOT_A_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(?:file|data|javascript):|[A-Za-z]:")


class BadImage(UserError):
    """An image that cannot be used; `reason` says why in one line.

    Exit code 65, or 77 when the reference was refused for leaving the image folder.
    """

    exit_code = DataError.exit_code

    def __init__(self, reason: str, ref: str | None = None, refused: bool = False) -> None:
        super().__init__(reason if ref is None else f"image {shortened(ref)}: {reason}")
        self.reason = reason
        self.refused = refused
        if refused:
            self.exit_code = RefusedError.exit_code


def shortened(text: str, width: int = 100) -> str:
    """`text` quoted on one line, cut in the middle when longer than `width` characters."""
    half = width // 2
    return repr(text if len(text) <= width else f"{text[:half]}...{text[-half:]}")


def resolve_image(root: Path, ref: str, extra_roots: Sequence[Path] = ()) -> Path:
    """The real path of `ref` under `root`.

    Links are followed; where one leads must be under `root` or one of `extra_roots` (datasets are
    often linked into the image folder). Absolute paths and URLs are refused even if they would
    point inside. Raises BadImage with exit code 77; whether the file exists is not looked at.
    """
    if not ref:
        raise BadImage("the reference is empty; leave the key out of a text-only record", ref)
    if len(ref) > MAX_REFERENCE:
        raise BadImage(f"the reference has {len(ref)} characters", ref, refused=True)
    if "\0" in ref:
        raise BadImage("the reference holds a NUL character", ref, refused=True)
    if _NOT_A_PATH.match(ref):
        raise BadImage("a URL or drive; only files in the image folder are read", ref, refused=True)
    if os.path.isabs(ref) or PureWindowsPath(ref).anchor:
        raise BadImage("an absolute path; make it relative to the image folder", ref, refused=True)
    try:
        real = os.path.realpath(os.path.join(root, ref))
    except (OSError, ValueError) as error:  # a lone surrogate, a loop of links
        raise BadImage(f"not a path ({error})", ref, refused=True) from error
    roots = [os.path.realpath(folder) for folder in (root, *extra_roots)]
    if not any(os.path.commonpath([real, folder]) == folder for folder in roots):
        raise BadImage(
            f"leaves the image folder (to {shortened(real)}); move it inside, or allow that "
            "folder as an extra image root",
            ref,
            refused=True,
        )
    return Path(real)


def open_image(
    root: str | Path, ref: str, max_pixels: float = MAX_PIXELS, extra_roots: Sequence[Path] = ()
) -> Image.Image:
    """Read one image as RGB, fully decoded.

    The format is told by content, not by name. As in LLaVA, an alpha channel is dropped, an
    animation gives its first frame and an EXIF rotation is not applied. Of 16-bit grey the high
    byte is kept (Pillow's own conversion clips nearly all of it to white).

    Raises BadImage: reference refused (see `resolve_image`), file missing, empty, unreadable, not
    a file or not an image, more than `max_pixels` by its header, truncated or corrupt.
    """
    return _read(root, ref, max_pixels, extra_roots, decode=True)


def check_image(
    root: str | Path, ref: str, max_pixels: float = MAX_PIXELS, extra_roots: Sequence[Path] = ()
) -> None:
    """Raise BadImage as `open_image` does, but read the header alone: damage behind it stays."""
    _read(root, ref, max_pixels, extra_roots, decode=False)


def decode_image(data: bytes, name: str, max_pixels: float = MAX_PIXELS) -> Image.Image:
    """Encoded bytes, of a table or an archive, as `open_image` reads a file; `name` is for errors.

    Raises BadImage as `open_image` does for what is in a file.
    """
    return _decode(io.BytesIO(data), name, max_pixels, decode=True)


def _read(
    root: str | Path, ref: str, max_pixels: float, extra_roots: Sequence[Path], decode: bool
) -> Image.Image:
    path = resolve_image(Path(root), ref, extra_roots)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("a folder or device, not a file", ref)
        if status.st_size == 0:
            raise BadImage("the file is empty", ref)
        with path.open("rb") as file:
            return _decode(file, ref, max_pixels, decode)
    except FileNotFoundError as error:
        raise BadImage(f"no such file under {root}", ref) from error
    except OSError as error:
        raise BadImage(error.strerror or str(error), ref) from error


def _decode(file: Any, ref: str, max_pixels: float, decode: bool) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd palettes and metadata; size is our own check
        try:
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            if not 0 < width * height <= max_pixels:
                raise BadImage(f"{width} x {height} pixels, the limit is {max_pixels:.0f}", ref)
            if not decode:
                return image
            image.load()
            return _to_rgb(image, ref)
        except (BadImage, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise BadImage(f"more pixels than the limit of {max_pixels:.0f}", ref) from error
        except UnidentifiedImageError as error:
            file.seek(0)
            start = file.read(16)
            raise BadImage(f"not an image, or damaged: it begins with {start!r}", ref) from error
        except Exception as error:  # decoders raise anything on damaged bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadImage(f"truncated or corrupt ({reason})", ref) from error


def _to_rgb(image: Image.Image, ref: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImage(f"mode {image.mode} has no fixed brightness range; save it in 8 bits", ref)
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageProcessor:
    """Pillow image to the vision tower's input: pad or crop, bicubic resize, normalise."""

    size: int
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    aspect_ratio: str = "pad"
    """`pad` shows the whole image on a square of the mean colour; `square` crops the centre."""

    def __post_init__(self) -> None:
        if self.aspect_ratio not in ASPECT_RATIOS:
            known = ", ".join(ASPECT_RATIOS)
            raise UsageError(f"image aspect ratio {self.aspect_ratio!r}; known: {known}")

    @classmethod
    def from_pretrained(cls, path: str | Path, aspect_ratio: str = "pad") -> ImageProcessor:
        """Read size, mean and deviation from a folder's preprocessor_config.json."""
        from transformers import CLIPImageProcessorPil

        try:
            clip = CLIPImageProcessorPil.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: no readable image processor configuration") from error
        size = clip.crop_size["height"]
        if clip.size["shortest_edge"] != size or clip.crop_size["width"] != size:
            raise UsageError(f"{path}: resizes to {clip.size} but crops to {clip.crop_size}")
        return cls(size, tuple(clip.image_mean), tuple(clip.image_std), aspect_ratio)

    def fingerprint(self) -> str:
        """Hash of every setting that changes a pixel."""
        settings = {"backend": "clip-pil", **asdict(self)}
        return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())

    @cached_property
    def _levels(self) -> np.ndarray:
        """(3, 256) float32: what each brightness becomes, rounded where transformers rounds."""
        level = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
        return ((level - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)).T.copy()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """(3, size, size) float32. BadImage if the shape is so long that it would fill memory."""
        short, long = sorted(image.size)
        canvas = long**2 if self.aspect_ratio == "pad" else self.size**2 * long / short
        if canvas > MAX_CANVAS:
            raise BadImage(f"{image.width} x {image.height} pixels is too long a shape to process")
        if self.aspect_ratio == "pad":
            image = pad_to_square(image, tuple(int(x * 255) for x in self.mean))
        picture = np.asarray(self._fitted(image))  # (size, size, 3)
        pixels = np.empty((3, self.size, self.size), np.float32)
        for channel, levels in enumerate(self._levels):
            # No brightness is out of range, but the default mode would copy to be able to tell.
            np.take(levels, picture[..., channel], out=pixels[channel], mode="clip")
        return torch.from_numpy(pixels)

    def _fitted(self, image: Image.Image) -> Image.Image:
        """RGB, the shorter side resized to `size`, the centre of the longer one."""
        short, long = sorted(image.size)
        scaled = int(self.size * long / short)
        size = (self.size, scaled) if image.width == short else (scaled, self.size)
        image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in size)
        return image.crop((left, top, left + self.size, top + self.size))


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Centre the image on a square of its longer side; an odd pixel goes right or below."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
