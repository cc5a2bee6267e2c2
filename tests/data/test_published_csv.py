"""Published CSV files: values, and the errors for damaged files."""

import math

import pytest
import torch

from equipoise.data.sets.published_csv import read_table
from equipoise.errors import DataError

TEXT = 'when,a,b\n1 May,1.5,0\n2 May,,1\n"3, May",-2e3,1\n'


def write_table(folder, text=TEXT, encoding="utf-8"):
    path = folder / "t.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_values(tmp_path):
    table = read_table(write_table(tmp_path), ["when", "a", "b"], rows=3)
    assert table.texts("when") == ["1 May", "2 May", "3, May"]
    numbers = table.numbers(["b", "a"], missing=True)
    assert numbers.dtype == torch.float64
    assert numbers[[0, 2]].tolist() == [[0.0, 1.5], [1.0, -2000.0]]
    assert math.isnan(numbers[1, 1])
    assert table.labels("b", 2).tolist() == [0, 1, 1]


def test_row_names_bom_and_missing_header(tmp_path):
    named = write_table(tmp_path, '"x","y"\n"7",1,2\n"8",3,4\n', "utf-8-sig")
    assert read_table(named, ["x", "y"], rows=2, row_names=True).numbers(["y"]).tolist() == [[2.0], [4.0]]
    plain = write_table(tmp_path, "1,2\n3,4\n")
    assert read_table(plain, ["x", "y"], rows=2, header=False).numbers(["x"]).tolist() == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv': expected a header with the columns when, a, b, got an empty file"),
        ("when;a;b\n1;2;3\n", "expected a header with the columns when, a, b, got when;a;b"),
        (TEXT.replace("a", "c", 1), "expected a header with the columns when, a, b, got when, c, b"),
        (TEXT[:-3], "t.csv' line 4: expected 3 fields, got 2"),
        (TEXT[:-11], "t.csv': expected a CSV file in UTF-8, got unexpected end of data"),
        (TEXT.replace("2 May,,1\n", ""), "t.csv': expected the 3 rows of the published file, got 2. The file is trunc"),
    ],
)
def test_damaged_tables(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_table(write_table(tmp_path, text), ["when", "a", "b"], rows=3)


def test_binary_and_missing_files_raise(tmp_path):
    with pytest.raises(DataError, match=r"t.csv': expected a CSV file in UTF-8, got 'utf-8' codec"):
        read_table(write_table(tmp_path, TEXT + "é", "latin-1"), ["when", "a", "b"], rows=3)
    with pytest.raises(DataError, match=r"none.csv': expected a CSV file, got no such file"):
        read_table(tmp_path / "none.csv", ["a"], rows=3)


@pytest.mark.parametrize("value", ["nan", "inf", "1,5".replace(",", ";"), "x"])
def test_non_numeric_fields_raise(tmp_path, value):
    table = read_table(write_table(tmp_path, TEXT.replace("1.5", value)), ["when", "a", "b"], rows=3)
    with pytest.raises(DataError, match=rf"t.csv' line 2, column 'a': expected a finite number, got '{value}'"):
        table.numbers(["a"], missing=True)


def test_empty_fields_raise_unless_allowed(tmp_path):
    table = read_table(write_table(tmp_path), ["when", "a", "b"], rows=3)
    with pytest.raises(DataError, match=r"line 3, column 'a': expected a finite number, got ''"):
        table.numbers(["a"])


def test_labels_out_of_range_raise(tmp_path):
    table = read_table(write_table(tmp_path, TEXT.replace(",0\n", ",2\n")), ["when", "a", "b"], rows=3)
    with pytest.raises(DataError, match=r"line 2, column 'b': expected a class from 0 to 1, got '2'"):
        table.labels("b", 2)
