"""One annotation file: odd encodings, odd objects, odd values; each is read, or named with its reason."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from refinedet.data.problems import NO_BOX, ODD_VALUE, SECOND_BOX, FaultyFileError
from refinedet.data.voc_xml import VocAnnotation, is_annotation, parse_annotation

BOX = "<bndbox><xmin>21</xmin><ymin>22</ymin><xmax>61</xmax><ymax>62</ymax></bndbox>"
OTHER_BOX = "<bndbox><xmin>81</xmin><ymin>22</ymin><xmax>120</xmax><ymax>62</ymax></bndbox>"
SIZE = "<size><width>160</width><height>120</height></size>"


def parse(folder: Path, content: str | bytes) -> VocAnnotation:
    file = folder / "a.xml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_annotation(file)


def parse_objects(folder: Path, *objects: str) -> VocAnnotation:
    return parse(folder, f"<annotation><filename>a.jpg</filename>{SIZE}{''.join(objects)}</annotation>")


def named(name: str) -> str:
    return f"<annotation>{SIZE}<object><name>{name}</name>{BOX}</object></annotation>"


@pytest.mark.parametrize(
    ("declared", "codec"),
    [
        ("UTF-8", "utf-8"), ("utf8", "utf-8"), ("utf-16", "utf-16"), ("gb2312", "gb2312"), ("GBK", "gbk"),
        ("gb2312", "gb18030"), ("Big5", "big5"), ("Shift_JIS", "shift_jis"), ("cp950", "cp950"),
    ],
)  # fmt: skip
def test_encodings_that_are_declared(tmp_path: Path, declared: str, codec: str) -> None:
    text = f'<?xml version="1.0" encoding="{declared}"?>\n{named("白")}'
    assert parse(tmp_path, text.encode(codec)).names == {1: "白"}
    assert parse(tmp_path, text.replace('"', "'").encode(codec)).names == {1: "白"}


def test_encodings_of_western_letters_and_byte_order_marks(tmp_path: Path) -> None:
    for declared in ("iso-8859-1", "latin1", "windows-1252"):
        text = f'<?xml version="1.0" encoding="{declared}"?>{named("café")}'
        assert parse(tmp_path, text.encode("latin-1")).names == {1: "café"}
    for codec in ("utf-16", "utf-8-sig"):
        assert parse(tmp_path, named("café").encode(codec)).names == {1: "café"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (named("café").encode("latin-1"), "it is not UTF-8 and declares no encoding"),
        (f'<?xml version="1.0" encoding="klingon"?>{named("a")}'.encode(), "encoding 'klingon', which is unknown"),
        (f'<?xml version="1.0" encoding="hex"?>{named("a")}'.encode(), "encoding 'hex', which is unknown"),
        (f'<?xml version="1.0" encoding="punycode"?>{named("a")}'.encode(), "'punycode', which is unknown"),
        (f'<?xml version="1.0" encoding="big5"?>{named("é")}'.encode("latin-1"), "not text in the encoding 'big5'"),
        (named("a").encode()[:-9], "not well-formed XML .*restore it"),
        (b"", "not well-formed XML"),
        (b"<annotation>&#xD800;</annotation>", "not well-formed XML"),
        (b"<annotation>\0</annotation>", "not well-formed XML"),
    ],
)
def test_text_that_cannot_be_read(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(FaultyFileError, match=reason) as caught:
        parse(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'a.xml'}: ")
    assert "\n" not in str(caught.value)


def test_entities_are_refused_in_every_encoding(tmp_path: Path) -> None:
    bomb = '<!DOCTYPE b [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>'
    for text in (bomb, f'<?xml version="1.0" encoding="gb2312"?>{bomb}'):
        with pytest.raises(FaultyFileError, match="declares entities, which are refused"):
            parse(tmp_path, text)


def test_a_file_of_another_kind_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(FaultyFileError, match="not a VOC annotation") as caught:
        parse(tmp_path, "<secret><password>x</password></secret>")
    assert "secret" not in str(caught.value).removeprefix(str(tmp_path))


def test_every_box_of_an_object_is_read(tmp_path: Path) -> None:
    read = parse_objects(tmp_path, f"<object><name>cat</name>{BOX}{OTHER_BOX}</object>")
    assert [item.box for item in read.objects] == [(20, 21, 61, 62), (80, 21, 120, 62)]
    assert [item.index for item in read.objects] == [1, 1]
    assert [kind for _, kind in read.notes] == [SECOND_BOX]
    for order in (f"{BOX}<bndbox/>", f"<bndbox/>{BOX}"):
        read = parse_objects(tmp_path, f"<object><name>cat</name>{order}</object>")
        assert [item.box for item in read.objects] == [(20, 21, 61, 62)]
        assert [kind for _, kind in read.notes] == [SECOND_BOX]


def test_an_outline_becomes_the_box_around_it(tmp_path: Path) -> None:
    numbered = "<polygon><x1>20</x1><y1>25</y1><x2>60</x2><y2>20</y2><x3>55</x3><y3>60.5</y3></polygon>"
    points = "<polygon><pt><x>20</x><y>25</y></pt><pt><x>60</x><y>20</y></pt><pt><x>55</x><y>60.5</y></pt></polygon>"
    for polygon in (numbered, points):
        read = parse_objects(tmp_path, f"<object><name>cat</name>{polygon}</object>")
        assert [item.corners for item in read.objects] == [(20, 20, 60, 60.5)]
        assert read.notes == []
    # A box that is given counts more than the polygon beside it.
    read = parse_objects(tmp_path, f"<object><name>cat</name>{numbered}{BOX}</object>")
    assert [item.corners for item in read.objects] == [(21, 22, 61, 62)]


@pytest.mark.parametrize(("angle", "half"), [(0, (15, 10)), (math.pi / 2, (10, 15)), (math.pi / 4, (17.678, 17.678))])
def test_a_turned_box_becomes_the_box_around_it(tmp_path: Path, angle: float, half: tuple[float, float]) -> None:
    turned = f"<robndbox><cx>40</cx><cy>50</cy><w>30</w><h>20</h><angle>{angle}</angle></robndbox>"
    (item,) = parse_objects(tmp_path, f"<object><name>cat</name>{turned}</object>").objects
    assert item.corners == pytest.approx((40 - half[0], 50 - half[1], 40 + half[0], 50 + half[1]), abs=1e-3)


def test_an_object_without_any_box_is_dropped_with_a_word(tmp_path: Path) -> None:
    for nothing in ("", "<polygon/>", "<polygon><x1>3</x1></polygon>", "<bndbox/><bndbox/>"):
        read = parse_objects(tmp_path, f"<object><name>emu</name>{nothing}</object>")
        assert read.objects == []
        assert read.names == {1: "emu"}
        assert read.notes == [("object 1 (emu) has no <bndbox>; dropped", NO_BOX)]


@pytest.mark.parametrize(
    ("text", "difficult"),
    [
        ("1", True),
        ("1.0", True),
        ("true", True),
        ("Yes", True),
        ("0", False),
        ("0.0", False),
        ("", False),
        (" 0 ", False),
    ],
)
def test_difficult_in_other_spellings(tmp_path: Path, text: str, difficult: bool) -> None:
    read = parse_objects(tmp_path, f"<object><name>cat</name><difficult>{text}</difficult>{BOX}</object>")
    assert [item.difficult for item in read.objects] == [difficult]
    assert read.notes == []


def test_difficult_that_is_not_understood(tmp_path: Path) -> None:
    read = parse_objects(tmp_path, f"<object><name>cat</name><difficult>maybe</difficult>{BOX}</object>")
    assert [item.difficult for item in read.objects] == [False]
    assert [kind for _, kind in read.notes] == [ODD_VALUE]


def test_a_class_name_is_one_line(tmp_path: Path) -> None:
    read = parse_objects(tmp_path, f"<object><name>traffic\n\t light&#x9b;31m</name>{BOX}</object>")
    assert read.names == {1: "traffic light 31m"}


def test_a_class_name_of_many_letters(tmp_path: Path) -> None:
    with pytest.raises(FaultyFileError, match="object 1: its name has 5000 letters") as caught:
        parse_objects(tmp_path, f"<object><name>{'x' * 5000}</name>{BOX}</object>")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("size", ["1e200", "1e400", "nan", "-5", "0", "x", "2000000"])
def test_a_size_that_cannot_be_true(tmp_path: Path, size: str) -> None:
    text = f"<annotation><size><width>{size}</width><height>9</height></size></annotation>"
    assert parse(tmp_path, text).size is None


def test_a_number_of_many_letters_is_cut_in_the_message(tmp_path: Path) -> None:
    box = BOX.replace("21", "9" * 5000 + "x")
    with pytest.raises(FaultyFileError, match=r"<xmin> is '9+\.\.\.', not a number") as caught:
        parse_objects(tmp_path, f"<object><name>cat</name>{box}</object>")
    assert len(str(caught.value)) < 400


def test_a_pipe_is_no_annotation(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.xml")
    assert not is_annotation(tmp_path / "a.xml")
    assert not is_annotation(tmp_path / "b.xml")
    (tmp_path / "c.xml").write_text(named("a"), encoding="utf-16")
    assert is_annotation(tmp_path / "c.xml")
