"""What a line of text asks to be measured, how it is called, and where results go."""

import os

import pytest

from ddp.metrics.subjects import Subject, distinct_names, find_subjects, free_place, parse_subject


def names_of(*texts):
    return distinct_names([parse_subject(text) for text in texts])


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("a.pth", Subject("a.pth")),
        ("ours=a.pth", Subject("a.pth", "ours")),
        ("the old one=run/a.pth", Subject("run/a.pth", "the old one")),
        ("a.pth,steps=50", Subject("a.pth", None, {"steps": 50})),
        (
            "x=a,b.pth,sampler=ddim,eta=0.5,weights=raw",
            Subject("a,b.pth", "x", {"sampler": "ddim", "eta": 0.5, "weights": "raw"}),
        ),
        ("dir/a=b.pth", Subject("dir/a=b.pth")),
    ],
)
def test_subjects_are_parsed(text, subject):
    assert parse_subject(text) == subject


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b,steps=5.npy").write_text("x")
    assert parse_subject("a=b,steps=5.npy") == Subject("a=b,steps=5.npy")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.pth,size=5", "size=5: expected some of sampler, steps"),
        ("a.pth,steps=many", "steps=many: expected a number"),
        ("a.pth,weights=old", "weights=old: expected"),
        ("a.pth,guidance_interval=1", "expected some of"),
    ],
)
def test_subjects_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_subject(text)


def test_names_are_distinct_and_right(tmp_path):
    assert names_of("a/x.pth", "b/y.npz") == ["x", "y"]
    assert names_of("a/x.pth", "b/x.pth", "c/y.npz") == ["a/x", "b/x", "y"]
    assert names_of("a/x.pth", "a/x.npz") == ["a/x.pth", "a/x.npz"]
    assert names_of("a/x.pth", "x=b/y.pth") == ["a/x", "x"]
    two = names_of("a.pth,sampler=ddpm,steps=50", "a.pth,sampler=ddim", "a.pth")
    assert two == ["a sampler=ddpm steps=50", "a sampler=ddim", "a"]
    for same in (("a.pth", "a.pth"), ("x=a.pth", "x=b.pth"), ("a.pth", "b.pth", "b.pth")):
        with pytest.raises(ValueError, match="give NAME=PATH"):
            names_of(*same)


def test_the_folder_of_a_run_is_its_model(tmp_path):
    assert parse_subject(str(tmp_path)).checkpoint is None  # a folder of images
    (tmp_path / "last.pth").write_text("x")
    assert parse_subject(f"ours={tmp_path}").checkpoint == tmp_path / "last.pth"
    (tmp_path / "model.pth").write_text("x")
    assert parse_subject(str(tmp_path)).checkpoint == tmp_path / "model.pth"
    (subject,) = find_subjects(None, str(tmp_path), None)  # who says samples means samples
    assert subject.checkpoint is None
    (subject,) = find_subjects("no suffix", None, None)
    assert str(subject.checkpoint) == "no suffix"


# ---- results never go inside data ----


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The path of a dataset with a folder of one class; the current folder is beside it."""
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


@pytest.mark.parametrize("here", [".", "photos", "photos/cat"])
def test_results_lie_outside_the_dataset(photos, monkeypatch, here):
    monkeypatch.chdir(here)
    cat = os.path.relpath(photos / "cat")
    place = free_place([Subject(cat)], os.path.relpath(photos))
    assert place == photos.parent / "cat-evaluation"
    monkeypatch.chdir(photos.parent)
    place = free_place([Subject("photos/cat")], "digits")  # of another dataset: photos is data, too
    assert place == photos.parent / "cat-evaluation"
    place = free_place([Subject("photos/x.npz")], "photos")
    assert place == photos.parent / "x-evaluation"


def test_results_of_a_file_lie_beside_it(tmp_path):
    place = free_place([Subject(str(tmp_path / "x.npz"))], "digits")
    assert place == tmp_path / "x-evaluation"
    (tmp_path / "x-evaluation").mkdir()
    place = free_place([Subject(str(tmp_path / "x.npz"))], "digits")
    assert place == tmp_path / "x-evaluation-2"


def test_results_of_a_comparison_lie_in_no_subject(photos, monkeypatch):
    monkeypatch.chdir(photos / "cat")
    subjects = [Subject(str(photos / "cat")), Subject(str(photos))]
    assert free_place(subjects, "digits") == photos.parent / "cat-evaluation"


def test_a_place_inside_data_is_refused(photos):
    for out in ("photos/e", "photos/cat/e"):
        with pytest.raises(ValueError, match="is inside the data"):
            free_place([Subject("photos/cat")], "photos", out)
    assert str(free_place([Subject("photos/cat")], "photos", "e")) == "e"
