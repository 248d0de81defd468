"""Where pictures are looked for, and which of them are opened."""

from __future__ import annotations

import pytest

from llava.errors import UsageError
from llava.eval.pictures import Pictures, picture_folder
from llava.eval.tasks.base import Item, Task
from llava.images import BadImage
from tests.llava.eval.small import picture


class Toy(Task):
    name = "toy"
    image_folders = ("images/test", "images")


def test_the_first_folder_that_exists(tmp_path):
    assert picture_folder(Toy(), tmp_path, None) == tmp_path / "images/test"
    (tmp_path / "images").mkdir()
    assert picture_folder(Toy(), tmp_path, None) == tmp_path / "images"
    (tmp_path / "images" / "test").mkdir()
    assert picture_folder(Toy(), tmp_path, None) == tmp_path / "images/test"
    (tmp_path / "questions.json").write_text("[]")
    assert picture_folder(Toy(), tmp_path / "questions.json", None) == tmp_path / "images/test"
    assert picture_folder(Toy(), tmp_path, str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="--images .*no such folder"):
        picture_folder(Toy(), tmp_path, str(tmp_path / "none"))


def test_files_and_bytes_of_one_item(tmp_path):
    (tmp_path / "a").write_bytes(picture(0))  # SEED's have no extension
    item = Item(0, "?", images=("a", picture(1)))
    first, second = Pictures(tmp_path).open(item)
    assert first.mode == second.mode == "RGB" and first.tobytes() != second.tobytes()
    (only,) = Pictures(tmp_path, first_only=True).open(item)
    assert only.tobytes() == first.tobytes()


def test_a_picture_that_is_not_shown_need_not_be_there(tmp_path):
    item = Item("x", "?", images=(picture(0), "b.png"))
    Pictures(tmp_path, first_only=True).check([item])
    with pytest.raises(BadImage, match="^item 'x': image 'b.png': no such file under"):
        Pictures(tmp_path).check([item])


def test_links_out_of_the_folder(tmp_path):
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "a.png").write_bytes(picture(0))
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    item = Item(0, "?", images=("link/a.png",))
    with pytest.raises(BadImage, match="leaves the image folder") as error:
        Pictures(tmp_path / "inside").check([item])
    assert error.value.exit_code == 77
    Pictures(tmp_path / "inside", (tmp_path / "outside",)).check([item])


def test_a_question_without_pictures(tmp_path):
    assert Pictures(tmp_path).open(Item(0, "?")) == []
