"""Promises P3, P23, P24 for one image, and LLaVA-1.5's pixels bit for bit."""

from __future__ import annotations

import os
import pickle
import random
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from llava.errors import UsageError
from llava.images import (
    BadImage,
    ImageProcessor,
    check_image,
    open_image,
    pad_to_square,
    resolve_image,
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder with one good image, beside a secret one it must not lead to."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    noise(12, 8).save(folder / "sub" / "good.png")
    noise(12, 8).save(tmp_path / "secret.png")
    return folder


def png_header(width: int, height: int) -> bytes:
    """A valid PNG of some bytes that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refusal(root: Path, ref: str, **settings: object) -> BadImage:
    with pytest.raises(BadImage) as caught:
        open_image(root, ref, **settings)
    assert caught.value.reason and "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("../secret.png", "leaves the image folder"),
        ("sub/../../secret.png", "leaves the image folder"),
        ("../../../../../../../etc/passwd", "leaves the image folder"),
        ("/etc/passwd", "absolute path"),
        ("file:///etc/passwd", "URL"),
        ("http://169.254.169.254/latest", "URL"),
        ("data:image/png;base64,AAAA", "URL"),
        ("C:\\images\\x.jpg", "drive"),
        ("C:/images/x.jpg", "drive"),
        ("\\\\server\\x.jpg", "absolute path"),
        ("a\0b.jpg", "NUL"),
        ("a" * 5000, "5000 characters"),
        ("\ud83d.jpg", "not a path"),
    ],
)
def test_references_outside_are_refused(root: Path, ref: str, reason: str) -> None:
    error = refusal(root, ref)
    assert reason in error.reason and error.exit_code == 77


def test_an_absolute_path_is_refused_even_inside(root: Path) -> None:
    assert refusal(root, str(root / "sub" / "good.png")).exit_code == 77


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("", "empty"),
        ("none.jpg", "no such file under"),
        ("new\nline.jpg", "no such file under"),
        ("．．/secret.png", "no such file under"),
        ("sub", "a folder"),
        (".", "a folder"),
        ("b" * 300, "File name too long"),
        ("sub/good.png/x", "Not a directory"),
    ],
)
def test_references_to_nothing(root: Path, ref: str, reason: str) -> None:
    error = refusal(root, ref)
    assert reason in error.reason and error.exit_code == 65


def test_links_may_lead_inside_or_to_an_allowed_root(root: Path, tmp_path: Path) -> None:
    (root / "inside.png").symlink_to("sub/good.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    assert open_image(root, "inside.png").size == (12, 8)
    assert refusal(root, "outside.png").exit_code == 77
    assert refusal(root, "folder/secret.png").exit_code == 77
    assert refusal(root, "loop.png")
    assert open_image(root, "outside.png", extra_roots=[tmp_path]).size == (12, 8)
    sibling = tmp_path / "images-of-another"  # shares the name's beginning, not the folder
    sibling.mkdir()
    with pytest.raises(BadImage, match="leaves"):
        resolve_image(root, "../images-of-another/x.png")
    linked = tmp_path / "linked-root"
    linked.symlink_to(root)
    assert open_image(linked, "sub/good.png").size == (12, 8)


def test_pipes_do_not_block(root: Path) -> None:
    os.mkfifo(root / "pipe.jpg")
    assert "not a file" in refusal(root, "pipe.jpg").reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(root: Path) -> None:
    (root / "sub" / "good.png").chmod(0)
    assert "Permission denied" in refusal(root, "sub/good.png").reason


def test_damaged_files(root: Path) -> None:
    noise(64, 64).save(root / "whole.jpg")
    whole = (root / "whole.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").touch()
    (root / "page.jpg").write_bytes(b"<!DOCTYPE html><html></html>")
    (root / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "truncated" in refusal(root, "cut.jpg").reason
    check_image(root, "cut.jpg")  # the header is whole, and it reads no further
    for ref in ("empty.jpg", "page.jpg", "../secret.png"):
        with pytest.raises(BadImage, match=re.escape(refusal(root, ref).reason)):
            check_image(root, ref)
    assert "file is empty" in refusal(root, "empty.jpg").reason
    assert "<!DOCTYPE html>" in refusal(root, "page.jpg").reason
    assert "not an image" in refusal(root, "script.jpg").reason  # EPS would start Ghostscript


def test_no_damage_escapes_as_another_error(root: Path) -> None:
    rng = random.Random(0)
    for kind in ("png", "jpg", "gif", "webp", "bmp", "tiff"):
        noise(20, 20).save(root / f"whole.{kind}")
        whole = (root / f"whole.{kind}").read_bytes()
        for _ in range(40):
            damaged = bytearray(whole[: rng.randint(1, len(whole))])
            for _ in range(rng.randint(0, 3)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            (root / f"x.{kind}").write_bytes(damaged)
            try:
                open_image(root, f"x.{kind}")
            except BadImage as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (60000, 60000), (1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(root: Path, width: int, height: int) -> None:
    (root / "bomb.png").write_bytes(png_header(width, height))
    assert "limit" in refusal(root, "bomb.png").reason


def test_pixel_limit_is_inclusive(root: Path) -> None:
    assert open_image(root, "sub/good.png", max_pixels=96).size == (12, 8)
    assert "12 x 8 pixels, the limit is 95" in refusal(root, "sub/good.png", max_pixels=95).reason


def test_content_decides_not_the_name(root: Path) -> None:
    noise(9, 7).save(root / "x.gif")
    (root / "x.gif").rename(root / "ocr.jpg")
    assert open_image(root, "ocr.jpg").size == (9, 7)


def test_modes_become_rgb(root: Path) -> None:
    picture = noise(10, 6)
    picture.convert("CMYK").save(root / "cmyk.jpg")
    picture.convert("L").save(root / "grey.png")
    picture.convert("1").save(root / "bits.png")
    transparent = picture.convert("RGBA")
    transparent.putalpha(0)
    transparent.save(root / "alpha.png")
    transparent.quantize().save(root / "palette.png")
    for name in ("cmyk.jpg", "grey.png", "bits.png", "alpha.png", "palette.png"):
        image = open_image(root, name)
        assert (image.mode, image.size) == ("RGB", (10, 6)), name
    # Alpha is dropped, as in LLaVA: the colours under full transparency are still there.
    assert np.array_equal(np.asarray(open_image(root, "alpha.png")), np.asarray(picture))


def test_sixteen_bits_keep_their_high_byte(root: Path) -> None:
    values = np.linspace(0, 65535, 96, dtype=np.uint16).reshape(8, 12)
    Image.fromarray(values).save(root / "deep.png")
    assert np.array_equal(np.asarray(open_image(root, "deep.png"))[..., 0], values >> 8)
    Image.fromarray(values.astype(np.float32)).save(root / "float.tiff")
    assert "no fixed brightness range" in refusal(root, "float.tiff").reason


def test_exif_rotation_is_not_applied(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    noise(12, 8).save(root / "rotated.jpg", exif=exif)
    assert open_image(root, "rotated.jpg").size == (12, 8)


def test_error_crosses_processes_with_its_exit_code() -> None:
    error = pickle.loads(pickle.dumps(BadImage("why", "ref", refused=True)))
    assert (error.reason, error.exit_code) == ("why", 77) and "'ref': why" in str(error)


SIZES = [(70, 40), (41, 70), (33, 33), (1, 9), (640, 479), (100, 3)]


@pytest.mark.parametrize("size", SIZES)
def test_padded_pixels_equal_llava(size: tuple[int, int]) -> None:
    reference = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    image = noise(*size)
    pixels = ImageProcessor(56)(image)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 56, 56)
    assert torch.equal(pixels, reference(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
def test_square_crops_the_centre(size: tuple[int, int]) -> None:
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    image = noise(*size)
    pixels = ImageProcessor(56, aspect_ratio="square")(image)
    assert torch.equal(pixels, reference(image, return_tensors="pt")["pixel_values"][0])


def test_padding_colour_and_place() -> None:
    padded = np.asarray(pad_to_square(Image.new("RGB", (5, 2), "white"), (122, 116, 104)))
    assert padded.shape == (5, 5, 3)
    assert (padded[1:3] == 255).all()  # three rows to share: one above, two below
    assert (padded[[0, 3, 4]] == (122, 116, 104)).all()
    far = ImageProcessor(56)(Image.new("RGB", (56, 4), "white"))[:, 0, 0]
    grey = torch.tensor([122, 116, 104]) / 255 - torch.tensor(ImageProcessor(56).mean)
    assert torch.allclose(far, grey / torch.tensor(ImageProcessor(56).std), atol=1e-6)


@pytest.mark.parametrize(("ratio", "size"), [("pad", (17000, 1)), ("square", (500_000, 1))])
def test_shapes_too_long_to_pad_or_resize_are_refused(ratio: str, size: tuple[int, int]) -> None:
    with pytest.raises(BadImage, match="too long a shape"):
        ImageProcessor(336, aspect_ratio=ratio)(Image.new("RGB", size))


def test_from_pretrained_and_fingerprint(tmp_path: Path) -> None:
    CLIPImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    ).save_pretrained(tmp_path)
    loaded = ImageProcessor.from_pretrained(tmp_path, "square")
    assert loaded == ImageProcessor(28, (0.5,) * 3, (0.25,) * 3, "square")
    assert (
        loaded.fingerprint() == ImageProcessor(28, (0.5,) * 3, (0.25,) * 3, "square").fingerprint()
    )
    others = [ImageProcessor(28), ImageProcessor(29), ImageProcessor(28, aspect_ratio="square")]
    assert len({p.fingerprint() for p in [loaded, *others]}) == 4


def test_unusable_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="anyres.*known: pad, square"):
        ImageProcessor(28, aspect_ratio="anyres")
    with pytest.raises(UsageError, match="no readable image processor"):
        ImageProcessor.from_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 30}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="but crops to"):
        ImageProcessor.from_pretrained(tmp_path)
