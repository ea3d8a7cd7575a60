"""Files and folders that appear whole or not at all, and never over others."""

import os
import stat

import pytest

from ddp.io.files import (
    atomic_dir,
    atomic_write,
    find_checkpoint,
    move_to_free,
    next_free_path,
    require_absent,
)


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


def test_atomic_write_needs_a_file_to_be_left(tmp_path):
    with pytest.raises(OSError, match=r"a"):
        atomic_write(tmp_path / "a.txt", lambda path: path.unlink())
    assert not list(tmp_path.iterdir())


def test_atomic_write_keeps_the_suffix_while_writing(tmp_path):
    """Pillow and NumPy choose a format by it; no one takes the file for the finished one."""
    seen = []

    def write(path):
        seen.append(path)
        path.write_text("x")

    for _ in range(2):
        atomic_write(tmp_path / "a.png", write)
    for path in seen:
        assert path.suffix == ".png"
        assert path.name.startswith(".a.")
        assert path.parent == tmp_path
    assert seen[0] != seen[1]  # nobody can foresee the name, and plant a link there


def test_atomic_write_follows_no_link(tmp_path, monkeypatch):
    """Neither one at its temporary name, if somebody guesses that, nor one at its path."""
    (tmp_path / "other").write_text("theirs")
    monkeypatch.setattr("ddp.io.files.secrets.token_hex", lambda count: "guessed")
    (tmp_path / ".a.guessed.partial.txt").symlink_to(tmp_path / "other")
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a.txt", lambda path: path.write_text("ours"))
    monkeypatch.undo()
    (tmp_path / "b.txt").symlink_to(tmp_path / "other")
    atomic_write(tmp_path / "b.txt", lambda path: path.write_text("ours"))
    assert (tmp_path / "other").read_text() == "theirs"
    assert (tmp_path / "b.txt").read_text() == "ours"


@pytest.mark.parametrize("make", [atomic_write, atomic_dir])
def test_what_is_written_may_be_read_by_those_whom_the_umask_lets(tmp_path, make):
    umask = os.umask(0o027)
    try:
        if make is atomic_write:
            atomic_write(tmp_path / "a", lambda path: path.write_text("x"))
        else:
            with atomic_dir(tmp_path / "a"):
                pass
        expected = 0o640 if make is atomic_write else 0o750
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == expected
    finally:
        os.umask(umask)


@pytest.mark.parametrize("name", ["x" * 250, "\u00e9" * 120])
def test_a_name_as_long_as_a_name_may_be_is_written(tmp_path, name):
    atomic_write(tmp_path / name, lambda path: path.write_text("x"))
    (tmp_path / name).unlink()
    with atomic_dir(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("existing", [False, True])
def test_atomic_dir_becomes_the_path(tmp_path, existing):
    path = tmp_path / "new" / "out"
    if existing:
        path.mkdir(parents=True)  # empty
    with atomic_dir(path) as out:
        (out.folder / "a.txt").write_text("a")
        (out.folder / "deep").mkdir()
        (out.folder / "deep" / "b.txt").write_text("b")
        assert not path.exists() or not list(path.iterdir())
    assert contents(tmp_path) == {"new/out/a.txt": "a", "new/out/deep/b.txt": "b"}
    assert [p.name for p in path.parent.iterdir()] == ["out"]
    assert out.path == path


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_dir_leaves_nothing_on_failure(tmp_path, error):
    def crash():
        with atomic_dir(tmp_path / "out") as out:
            (out.folder / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        crash()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("of_file", [False, True])
def test_finished_work_takes_the_next_free_name(tmp_path, of_file):
    """Of two at once the slower one loses nothing, and overwrites nothing."""
    path = tmp_path / ("out.txt" if of_file else "out")
    with atomic_dir(path, of_file) as slow:
        with atomic_dir(path, of_file) as fast:
            (fast.folder / "any").write_text("fast")
        (slow.folder / "any").write_text("slow")
    assert fast.path == path
    if of_file:
        assert slow.path == tmp_path / "out-2.txt"
        assert contents(tmp_path) == {"out.txt": "fast", "out-2.txt": "slow"}
    else:
        assert slow.path == tmp_path / "out-2"
        assert contents(tmp_path) == {"out/any": "fast", "out-2/any": "slow"}


@pytest.mark.parametrize("is_dir", [False, True])
def test_move_to_free_passes_over_whatever_is_there(tmp_path, is_dir):
    """A file, a full folder, an empty file, a link that leads nowhere."""
    (tmp_path / "a.b").write_text("mine")
    (tmp_path / "a.b-2").mkdir()
    (tmp_path / "a.b-2" / "deep").write_text("mine")
    (tmp_path / "a-2.b").touch()
    (tmp_path / "a-3.b").symlink_to(tmp_path / "nowhere")
    made = tmp_path / "made"
    if is_dir:
        made.mkdir()
        made /= "new"
    made.parent.mkdir(exist_ok=True)
    made.write_text("new")
    made = tmp_path / "made"
    path = move_to_free(made, tmp_path / "a.b")
    assert path.name == ("a.b-3" if is_dir else "a-4.b")  # a folder's name has no suffix
    assert (path / "new" if is_dir else path).read_text() == "new"
    assert not made.exists()
    assert (tmp_path / "a.b").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_move_to_free_fails_once_where_nothing_can_be_written(tmp_path):
    (tmp_path / "made").touch()
    with pytest.raises(OSError, match="none"):
        move_to_free(tmp_path / "made", tmp_path / "none" / "a")
    assert (tmp_path / "made").exists()


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path, monkeypatch):
    """In a container every process may have the same number."""
    monkeypatch.setattr("os.getpid", lambda: 1)

    def kill():
        with atomic_dir(tmp_path / "out"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **options: None)
        with pytest.raises(KeyboardInterrupt):
            kill()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_dir(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_dir()


def test_atomic_dir_refuses_a_place_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"out=.*file"), atomic_dir(tmp_path / "file" / "out"):
        pass


def test_next_free_path_counts_from_two(tmp_path):
    for name in ("a.png", "a-2.png", "a-3.png"):
        assert next_free_path(tmp_path / "a", ".png") == tmp_path / name
        (tmp_path / name).touch()
    assert next_free_path(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    assert next_free_path(tmp_path / "b") == tmp_path / "b-2"
    (tmp_path / "v1.5").mkdir()  # a dot is no suffix
    assert next_free_path(tmp_path / "v1.5") == tmp_path / "v1.5-2"


def test_find_checkpoint_looks_into_a_run(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path  # which whoever reads it refuses
    assert find_checkpoint(str(tmp_path / "a.pth")) == tmp_path / "a.pth"
    names = ("model.safetensors", "last.pth", "model.pth")  # later ones come first
    for name in names:
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path) == tmp_path / name


def test_require_absent_takes_what_is_absent_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        assert require_absent(tmp_path / name) == tmp_path / name
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for path in (tmp_path / "full", tmp_path / "full" / "a"):
        with pytest.raises(ValueError, match="out="):
            require_absent(path)
