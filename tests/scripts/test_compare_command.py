"""python -m ddp.compare."""

from helpers import execute, run


def test_runs_side_by_side(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    flags = ["--max_steps", 2, "--channels_base", 8, "--out_dir", "."]
    run("train.py", *flags, "--seed", 1, cwd=tmp_path)
    run("train.py", *flags, "--seed", 2, "--name", "again", cwd=tmp_path)
    run("train.py", *flags, "--seed", 1, "--lr", 0.002, "--name", "fast", cwd=tmp_path)
    out = run("ddp.compare.py", "digits", "again", "fast", cwd=tmp_path)
    assert "wrote comparison: comparison.html; tables.md, .tex and .csv for a paper" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["digits", "and", "1", "more", "fast"] in lines
    assert ["trainings", "2", "1"] in lines
    assert ["lr", "0.001", "0.002"] in lines
    assert "warning: no figures of samples; evaluate.py measures them" in out
    assert (tmp_path / "comparison" / "tables.tex").exists()
    run("ddp.compare.py", "digits", "fast", cwd=tmp_path)
    assert (tmp_path / "comparison-2" / "comparison.html").exists()
    out = run("ddp.compare.py", "digits", "comparison", "fast", cwd=tmp_path)
    assert out.startswith("passed over, since they are no runs: comparison\n")
    result = execute("ddp.compare.py", "digits", "--out", "comparison", cwd=tmp_path)
    assert result.code == 2
    assert result.err.startswith("ddp.compare: error: out=comparison exists")


def test_errors_are_one_line(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"bad")
    for name in ("nothing", "bad.pth", "x*"):
        result = execute("ddp.compare.py", name, cwd=tmp_path)
        assert result.code == 1
        assert len(result.err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]
