"""The pictures of a benchmark: where they are, whether they are all there, and opening them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from llava.errors import UsageError
from llava.eval.tasks.base import Item, Task
from llava.eval.tasks.files import folder_of
from llava.images import BadImage, check_image, decode_image, open_image


@dataclass(frozen=True)
class Pictures:
    """Opens the pictures of items; of several only the first, if so asked."""

    folder: Path
    extra_roots: tuple[Path, ...] = ()
    first_only: bool = False

    def refs(self, item: Item) -> tuple[str | bytes, ...]:
        """The pictures that go to the model, as the item has them."""
        return item.images[:1] if self.first_only else item.images

    def open(self, item: Item) -> list[Image]:
        """RGB pictures of an item. BadImage naming the item for one that cannot be used."""
        try:
            return [
                decode_image(ref, f"number {number}")
                if isinstance(ref, bytes)
                else open_image(self.folder, ref, extra_roots=self.extra_roots)
                for number, ref in enumerate(self.refs(item))
            ]
        except BadImage as error:
            raise _named(error, item) from error

    def check(self, items: Sequence[Item]) -> None:
        """BadImage unless the files of all pictures are there and begin as pictures do."""
        seen = set()
        for item in items:
            for ref in self.refs(item):
                if isinstance(ref, bytes) or ref in seen:
                    continue
                seen.add(ref)
                try:
                    check_image(self.folder, ref, extra_roots=self.extra_roots)
                except BadImage as error:
                    raise _named(error, item) from error


def picture_folder(task: Task, data: Path, images: str | None) -> Path:
    """`images`, or where the benchmark's pictures are in its folder.

    Raises UsageError for a folder that is not there.
    """
    if images is not None:
        if not Path(images).is_dir():
            raise UsageError(f"--images {images}: no such folder")
        return Path(images)
    places = [folder_of(data) / place for place in task.image_folders]
    return next((place for place in places if place.is_dir()), places[0])


def _named(error: BadImage, item: Item) -> BadImage:
    return BadImage(f"item {item.id!r}: {error}", refused=error.refused)
