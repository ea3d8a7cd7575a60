"""What a line of text asks to be measured, how it is called, and where results go."""

import os

import pytest

from ddp.metrics.candidate import Candidate
from ddp.metrics.subjects import (
    Subject,
    distinct_names,
    find_subjects,
    free_place,
    parse_subject,
    require_trainings,
)


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


# ---- groups of trainings ----


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The current folder, with the models of six runs: runs/a-1, a-2 and a-10, b/1 to b/3."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a-1", "runs/a-2", "runs/a-10", "b/1", "b/2", "b/3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.pth").write_text("x")


def groups_of(*texts):
    """Return the paths of each group, name -> list."""
    groups = {}
    for subject in find_subjects(None, None, texts):
        groups.setdefault(subject.group, []).append(subject.path)
    return groups


A = ["runs/a-1/model.pth", "runs/a-10/model.pth", "runs/a-2/model.pth"]  # as a shell sorts them
B = ["b/1/model.pth", "b/2/model.pth", "b/3/model.pth"]


@pytest.mark.parametrize(
    ("texts", "groups"),
    [
        ([*A, "--", *B], {"a": A, "b": B}),
        ([*A, "--", *B, "--", "x.npz"], {"a": A, "b": B, "x.npz": ["x.npz"]}),
        ([A[0], "--", B[0]], {"a-1": A[:1], "1": B[:1]}),
        (["runs/a-*", "b/*/model.pth"], {"a": ["runs/a-1", "runs/a-10", "runs/a-2"], "b": B}),
        (["old=runs/*/model.pth", "new=b/?/model.pth"], {"old": A, "new": B}),
        ([f"x={A[0]}", B[0], f"x={A[1]}"], {"x": A[:2], "1": B[:1]}),  # x=runs/a-{1,10}/model.pth
        ([f"x={A[0]}", f"x={A[1]}", "--", "x=b/*/model.pth"], {"x 1": A[:2], "x 2": B}),
        ([A[0], B[0], "--", B[1]], {"group": [A[0], B[0]], "2": [B[1]]}),
        (["b/*,steps=5", "b/*"], {"b steps=5": ["b/1", "b/2", "b/3"], "b": ["b/1", "b/2", "b/3"]}),
        (["b/1", "--", "b/2"], {"1": ["b/1"], "2": ["b/2"]}),
        (["b/[1]"], {"1": ["b/1"]}),
        (["b/1", "b/2"], {None: ["b/1", "b/2"]}),
        (["x=b/1", "y=b/2"], {None: ["b/1", "b/2"]}),
    ],
)
def test_groups_are_cut_by_breaks_or_made_of_patterns_and_names(runs, texts, groups):
    assert groups_of(*texts) == groups


def test_members_of_a_group_are_called_by_their_paths(runs):
    subjects = find_subjects(None, None, ["ddpm=b/*,sampler=ddpm", "fast=b/*,steps=5"])
    names = distinct_names(subjects)
    assert names[:2] == ["1 sampler=ddpm", "2 sampler=ddpm"]
    assert names[3:5] == ["1 steps=5", "2 steps=5"]
    assert subjects[4].options == {"steps": 5}
    names = distinct_names(find_subjects(None, None, ["one=b/1", "two=b/2", "--", "b/3"]))
    assert names == ["one", "two", "3"]


@pytest.mark.parametrize("texts", [["--", "b/1"], ["b/1", "--"], ["b/1", "--", "--", "b/2"]])
def test_an_empty_group_is_refused(runs, texts):
    with pytest.raises(ValueError, match=r"^compare: expected something before and after each --$"):
        groups_of(*texts)


def test_a_pattern_that_nothing_matches_is_told(runs):
    with pytest.raises(OSError, match=r"^compare: nothing matches c/\*/model.pth$"):
        groups_of("x=c/*/model.pth", "b/1")


def test_one_file_twice_in_a_group_is_no_second_training():
    twice = [Candidate(name, {"sha256": "5"}, group="a") for name in "xy"]
    require_trainings([twice[0], Candidate("y", {"sha256": "5"}, group="b"), Candidate("z", {})])
    with pytest.raises(ValueError, match=r"^compare: x and y of a are one training$"):
        require_trainings(twice)
    for candidate in twice:
        candidate.group = None
    require_trainings(twice)


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
    assert free_place(subjects, "digits") == photos.parent / "comparison"


def test_a_place_inside_data_is_refused(photos):
    for out in ("photos/e", "photos/cat/e"):
        with pytest.raises(ValueError, match="is inside the data"):
            free_place([Subject("photos/cat")], "photos", out)
    assert str(free_place([Subject("photos/cat")], "photos", "e")) == "e"
