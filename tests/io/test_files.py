"""Files and folders that appear whole or not at all, and never over others."""

import pytest

from ddp.io.files import atomic_dir, atomic_write, next_free_path, require_absent


def contents(folder):
    """name -> text of all files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "deep" / "a.txt"
    for text in ("first", "second"):
        assert atomic_write(path, lambda p, text=text: p.write_text(text)) == path
        assert contents(tmp_path) == {"new/deep/a.txt": text}


def test_atomic_write_takes_text_paths(tmp_path):
    assert atomic_write(str(tmp_path / "a.txt"), lambda p: p.write_text("x")).read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_atomic_write_leaves_all_as_it_was_on_failure(tmp_path, error, existing):
    if existing:
        (tmp_path / "a.txt").write_text("old")

    def crash(path):
        path.write_text("half")
        raise error

    with pytest.raises(error):
        atomic_write(tmp_path / "a.txt", crash)
    assert contents(tmp_path) == ({"a.txt": "old"} if existing else {})


def test_atomic_write_needs_a_file_to_be_written(tmp_path):
    with pytest.raises(OSError, match=r"a"):
        atomic_write(tmp_path / "a.txt", lambda path: None)
    assert not list(tmp_path.iterdir())


def test_atomic_write_keeps_the_suffix_while_writing(tmp_path):
    """Pillow and NumPy choose a format by it; no one takes the file for the finished one."""
    seen = []

    def write(path):
        seen.append(path)
        path.touch()

    atomic_write(tmp_path / "a.png", write)
    assert seen[0].suffix == ".png"
    assert seen[0].name.startswith(".")
    assert seen[0].parent == tmp_path


@pytest.mark.parametrize("existing", [False, True])
def test_atomic_dir_becomes_the_path(tmp_path, existing):
    path = tmp_path / "new" / "out"
    if existing:
        path.mkdir(parents=True)  # empty
    with atomic_dir(path) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "deep").mkdir()
        (folder / "deep" / "b.txt").write_text("b")
        assert not path.exists() or not list(path.iterdir())
    assert contents(tmp_path) == {"new/out/a.txt": "a", "new/out/deep/b.txt": "b"}
    assert [p.name for p in path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_dir_leaves_nothing_on_failure(tmp_path, error):
    def crash():
        with atomic_dir(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        crash()
    assert not list(tmp_path.iterdir())


def test_atomic_dir_does_not_overwrite(tmp_path):
    """Not even what came while it was written."""

    def write():
        with atomic_dir(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a.txt").write_text("old")

    with pytest.raises(OSError, match="out"):
        write()
    assert contents(tmp_path) == {"out/a.txt": "old"}


def test_atomic_dir_refuses_a_place_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"out=.*file"), atomic_dir(tmp_path / "file" / "out"):
        pass


def test_next_free_path_counts_from_two(tmp_path):
    for name in ("a.png", "a-2.png", "a-3.png"):
        assert next_free_path(tmp_path / "a", ".png") == tmp_path / name
        (tmp_path / name).touch()
    assert next_free_path(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "v1.5").mkdir()  # a dot is no suffix
    assert next_free_path(tmp_path / "v1.5") == tmp_path / "v1.5-2"


def test_require_absent_takes_what_is_absent_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        assert require_absent(tmp_path / name) == tmp_path / name
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for path in (tmp_path / "full", tmp_path / "full" / "a"):
        with pytest.raises(ValueError, match="out="):
            require_absent(path)
