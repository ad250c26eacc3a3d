"""Files are whole or not there; JSON from outside is an object or one line that says why not."""

import errno

import pytest

from csd3d.errors import InputError
from csd3d.files import read_json, write_text, write_whole


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_in_one_step_and_its_folder_made(tmp_path, sync):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "old", sync)
    seen = []

    def write(partial):
        partial.write_text("new ü", encoding="utf-8")
        seen.append((path.read_text(), partial.suffix))

    write_whole(path, write, sync)
    assert seen == [("old", ".txt")]
    assert path.read_text(encoding="utf-8") == "new ü"
    assert [file.name for file in path.parent.iterdir()] == ["b.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "b.txt"
    write_text(path, "old")

    def write(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["b.txt"]


def test_a_full_disk_names_the_file(tmp_path):
    def write(partial):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / "b.txt", write)
    assert caught.value.filename == str(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing; expected a recipe"),
        (b"[1]", "holds a list; expected a recipe"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"a": ', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "a recipe is at most 500000"),
    ],
)
def test_json_that_is_no_object_is_told_in_one_line(tmp_path, content, said):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_json(path, "a recipe", 500_000)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "r.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "r.json", "a recipe") == {"a": 1}
