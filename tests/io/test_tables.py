"""Tables in a terminal, as HTML, Markdown, LaTeX and CSV."""

import csv
import io

import pytest

from ddp.io.tables import (
    Best,
    Table,
    csv_text,
    digits_of,
    html_table,
    latex,
    make_table,
    markdown,
    table_lines,
    wrapped,
    write_tables,
)

TABLE = Table("a | b_c", "100% & <more>", ["", "x", "y"], [["fd ↓", Best("1.0 ± 0.1"), "2"]])


def test_a_wide_table_stands_in_parts_with_the_names_of_its_rows():
    head = ["", *(f"column {k}" for k in range(9))]
    rows = [["first", *("1" * k for k in range(9))], ["second", *"abcdefghi"]]
    lines = table_lines([Table("title", "", head, rows)], width=60)
    assert max(map(len, lines)) <= 60
    assert sum(line.startswith("   first") for line in lines) == 2
    text = "\n".join(lines)
    assert all(text.count(name) == 1 for name in head[1:])  # each column once, and none is lost
    assert table_lines([Table("title", "", head, rows)], width=120)[2].endswith("column 8")


def test_a_column_wider_than_the_terminal_stands_alone():
    rows = [["a" * 50, "b" * 90, "c"]]
    lines = table_lines([Table("t", "", ["", "x", "y"], rows)], width=80)
    assert sum("b" * 90 in line for line in lines) == 1
    assert sum(line.startswith("   aaa") for line in lines) == 2


def test_a_note_is_wrapped():
    lines = table_lines([Table("title", "word " * 40, ["", "x"], [["a", "1"]])], width=70)
    assert max(map(len, lines)) <= 70
    assert wrapped("a b", 60) == ["a b"]


@pytest.mark.parametrize(
    ("error", "digits"), [(12.3, 0), (1.2, 1), (0.123, 2), (0.0012, 4), (1e-7, 5), (0.0, 3)]
)
def test_digits_follow_the_error(error, digits):
    assert digits_of(error) == digits


def test_the_best_is_bold_in_every_form_but_csv():
    assert "<b>1.0 ± 0.1</b>" in html_table(TABLE)
    assert "**1.0 ± 0.1**" in markdown([TABLE])
    assert r"\textbf{1.0 $\pm$ 0.1}" in latex([TABLE])
    assert list(csv.reader(io.StringIO(csv_text([TABLE]), newline=""))) == [
        ["table", "row", "column", "value", "spread"],
        ["a | b_c", "fd ↓", "x", "1.0", "0.1"],
        ["a | b_c", "fd ↓", "y", "2", ""],
    ]


def test_what_has_a_meaning_in_a_language_is_escaped():
    assert r"a \| b\_c" in markdown([TABLE])
    assert r"100\% \& $<$more$>$" in latex([TABLE])
    assert r"fd $\downarrow$ &" in latex([TABLE])
    negative = TABLE._replace(rows=[["d", "-0.5 ± 0.1", "x-1 [-1.0, 2]"]])
    assert r"d & $-$0.5 $\pm$ 0.1 & x-1 [$-$1.0, 2]" in latex([negative])
    assert r"\textbackslash{}input" in latex([TABLE._replace(title="\\input")])
    assert "&lt;more&gt;" in html_table(TABLE)


def test_every_row_has_as_many_cells_as_the_head():
    for line in markdown([TABLE]).splitlines():
        if line.startswith("|"):
            assert line.replace(r"\|", "").count("|") == 4
    assert [line.count(" & ") for line in latex([TABLE]).splitlines() if line.endswith(r"\\")] == [
        2,
        2,
    ]


def test_rows_lack_what_they_do_not_have():
    table = make_table("t", "", {"a": {"x": 1}, "b": {"y": 2.0}}, str)
    assert table.head == ["", "x", "y"]
    assert table.rows == [["a", "1", "None"], ["b", "None", "2.0"]]


def test_tables_are_written_in_every_form(tmp_path):
    paths = write_tables(tmp_path, "tables", [TABLE])
    assert sorted(path.name for path in paths) == ["tables.csv", "tables.md", "tables.tex"]
    assert paths[0].read_text(encoding="utf-8") == markdown([TABLE])


def test_long_words_of_a_page_may_wrap_and_numbers_may_not():
    page = html_table(Table("t", "", ["", "a"], [["network", "unet " * 8], ["fd", "1.0 ± 0.1"]]))
    assert '<td class="words">unet' in page
    assert "<td>1.0 ± 0.1</td>" in page


def test_a_path_stays_whole_where_lines_are_wrapped():
    path = "runs/" + "x" * 90
    assert path in " ".join(wrapped(f"17 s, wrote {path} and more", 80)).split()
