"""Standardise and hash as California's DROP does, and read its lists whole or not at all."""

from __future__ import annotations

import json
import random
import unicodedata
import zipfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.config.sources import SourceLimits
from sisa.core.errors import InvalidInput
from sisa.data.drop_lists import Listed, is_suffix, read_download, responses, upload_name
from sisa.data.identifiers import (
    LISTS,
    MAX_VALUES,
    hash_of,
    hashes,
    identifier_problems,
    on_no_list,
    standardised,
)
from sisa.data.reader import read_records

HASH = "KA18MT/ph6IHYjzT9zwETySDQyvSh87YuoSBpOQtkhE="
# The examples of "Working with the data", version 1.2.0: identifier, value, standardised, hash.
PUBLISHED = [
    ("first_name", "Juan Pablo", "juanpablo", "91hIbrbzNeqHs3o81O5yNrXUj7wDd2shvZ6THKi9qz8="),
    ("last_name", "Martinez", "martinez", "2wRPGbwBNxhShjRczx8GfS2c4cjvs4NJskeWloUNtp8="),
    ("date_of_birth", "July 4, 1776", "17760704", "skXYXxBER6HQTZ3rXSZH1wVGLQ054mS5rbR/bwvzy4I="),
    ("zip", "91790-3771", "91790", "2FPZucR4x7U8KlM+SFAX4LPGhwNz/PIZUCSUdDh0o/s="),
    ("zip", "M1B 1A1", "m1b1a", "n8L9q8mVeT6Xt9/EeUNiTukGDrkbPJ3DvOEx14uElxk="),
    ("zip", "00712345", "71234", "aeNUYKh7Xw5sqpxSbSP9eOHsj6iXewbUyavv89DIuhQ="),
    ("email", "Anna.Smith@Domain.com", "anna.smith@domain.com", HASH),
    ("phone", "+1(415)555-9317", "4155559317", "vGM7y5n+hBXRSEAklhHDPCbysyNgYTmXdMcagGUOY8E="),
    ("vin", "1HGCM82633A004352", "1hgcm82633a004352", "iNswy1m+0VSt8jAfFrvaiQ1R/0HAbgSwNGkwqo6QBss="),
    (
        "maid",
        "a3f1c2d4-5678-90ab-cdef-1234567890ab",
        "a3f1c2d4567890abcdef1234567890ab",
        "250KY6lOgzYUB3EHrkbDCE2kMEZQE69SF38muhoDudI=",
    ),
    ("ctv_id", "SmartTV_9F8E7D6C", "smarttv9f8e7d6c", "d9fxuTIrKksBXYDlaWsvQbcyUUfCbUx7v78gd+KP+tc="),
]  # fmt: skip
DANIELLE = {
    "first_name": "Danielle",
    "last_name": "Johnson",
    "date_of_birth": "July 4, 1985",
    "zip": "91790",
}
EVE = {"first_name": "Eve", "last_name": "Genesis", "vin": "1HGCM82633A004352"}
IDENTIFIERS = sorted({name for parts in LISTS.values() for name in parts})


@pytest.mark.parametrize(("identifier", "value", "expected", "hashed"), PUBLISHED)
def test_the_published_examples(identifier: str, value: str, expected: str, hashed: str) -> None:
    assert standardised(identifier, value) == expected
    assert hash_of(expected) == hashed
    assert all(each == hashed for kind, each in hashes({identifier: value}))


def test_the_published_composite_hashes() -> None:
    assert hashes(DANIELLE) == [("NDZ", "PQOfn1RffEKmqMmNAzDKKaoZCwxWbQZkQzPWmQo9REA=")]
    assert hashes(EVE) == [("NameVIN", "rtnDuXIe63jXYQQXW5r07GJ7lSsrib8+46QuKFwkOmk=")]


@given(identifier=st.sampled_from(IDENTIFIERS), value=st.text(max_size=40))
def test_standardising_again_changes_nothing(identifier: str, value: str) -> None:
    try:
        once = standardised(identifier, value)
    except ValueError:
        return
    assert standardised(identifier, once) == once


@given(st.text("aZ9Éßжθйё김ガçÅ -'.", min_size=1, max_size=20))
def test_spellings_of_a_name_that_the_rules_call_equal(name: str) -> None:
    expected = standardised("last_name", name)
    for form in ("NFC", "NFD", "NFKC"):
        assert standardised("last_name", unicodedata.normalize(form, name)) == expected
    assert standardised("last_name", f" {name.upper().lower()} - ") == standardised(
        "last_name", name.upper()
    )
    assert expected == standardised("first_name", name)
    assert not any(each in " -'." for each in expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("José", "jose"),
        ("Müller-Łukasz", "mullerlukasz"),
        ("O'Brien", "obrien"),
        ("Straße", "strasse"),
        ("Ĳsselmeer Æther", "ijsselmeeraether"),
        ("Щербакова", "shcherbakova"),
        ("Ёлкина", "yolkina"),
        ("Є Ї Ґ Ў", "eigu"),
        ("Θεοδώρου", "theodoroy"),
        ("Ὀδυσσεύς", "odysseys"),
        ("\uff21\uff2e\uff2e\uff21", "anna"),
        ("田中", "田中"),
        ("محمد", "محمد"),
        ("김", "김"),
        (" - ", ""),
    ],
)
def test_names_become_ascii_where_possible(name: str, expected: str) -> None:
    assert standardised("first_name", name) == expected


@given(st.from_regex(r"[0-9]{10}", fullmatch=True), st.sampled_from(["+1", "1-", "001 ", ""]))
def test_a_phone_number_is_its_last_ten_digits(digits: str, prefix: str) -> None:
    written = f"{prefix}({digits[:3]}) {digits[3:6]}-{digits[6:]}"
    assert standardised("phone", written) == standardised("phone", digits) == digits


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("02139", "2139"),
        ("02139-1234", "2139"),
        ("021391234", "2139"),
        ("K1A-0B1", "k1a0b"),
        ("000", ""),
    ],
)
def test_zip_codes(written: str, expected: str) -> None:
    assert standardised("zip", written) == expected


@given(st.dates())
def test_a_date_of_birth_is_read_in_every_spelling_that_has_one_meaning(day: date) -> None:
    expected = f"{day.year:04}{day.month:02}{day.day:02}"
    month = day.strftime("%B")
    for written in (day.isoformat(), expected, f"{month} {day.day}, {day.year:04}"):
        assert standardised("date_of_birth", written) == expected
    same = {**DANIELLE, "date_of_birth": day}
    assert hashes(same) == hashes(same | {"date_of_birth": expected})


@pytest.mark.parametrize(
    ("identifier", "value", "expected"),
    [
        ("date_of_birth", "04/07/1985", "expected a date"),
        ("date_of_birth", "1985", "expected a date"),
        ("date_of_birth", "2023-02-30", "expected a date"),
        ("maid", "a3f1c2d4", "32 hexadecimal digits"),
        ("vin", "1HGCM82633A00435", "17 letters and digits"),
        ("ctv_id", "short", "8 to 32"),
        ("email", True, "got a boolean"),
        ("email", 1.5, "got a number"),
        ("phone", ["1"] * (MAX_VALUES + 1), f"at most {MAX_VALUES} values"),
    ],
)
def test_what_can_be_on_no_list_is_a_problem(identifier: str, value: Any, expected: str) -> None:
    (problem,) = identifier_problems(identifier, "column", value)
    assert expected in problem


def test_blank_and_missing_identifiers_give_no_hash() -> None:
    assert hashes({"email": "  ", "phone": None, **EVE, "last_name": "-"}) == []
    assert hashes({"email": ["a@b.c", " A@B.C", "d@e.f"], "phone": 4155559317}) == [
        *hashes({"email": "a@b.c"}),
        *hashes({"email": "d@e.f"}),
        *hashes({"phone": "415-555-9317"}),
    ]
    assert on_no_list(["zip", "email"]) == ["zip"]
    assert on_no_list([*EVE, "email"]) == []


def test_a_column_that_no_record_has_is_a_problem_unless_it_is_null(tmp_path: Path) -> None:
    named = (("email", "mail"), ("phone", "tel"))
    row = {"id": "r1", "text": "x", "mail": "a@b.c"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(InvalidInput) as refused:
        read_records([file], None, subjects="column", identifiers=named)
    (problem,) = refused.value.problems
    assert (problem.where, "'tel'; give it null" in problem.what) == ("identifiers.phone", True)
    file.write_text(json.dumps({**row, "tel": None}))
    (record,) = read_records([file], None, subjects="column", identifiers=named)
    assert list(record.identifiers) == hashes({"email": "a@b.c"})


# --- downloads


def zipped(path: Path, contents: Mapping[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    return path


EMAIL, NDZ = "20260812_4821_Email", "20260812_4821_NDZ"
WHOLE = {
    f"{EMAIL}.csv": f"ID,Hash\nA7kP2xQ9Lm4R,{HASH}\nB7kP2xQ9Lm4R,{HASH}\n",
    f"{NDZ}.csv": "ID,Hash\r\n",
    "20260812_4821_Removed.csv": f"ID,Hash,ListType\nC7kP2xQ9Lm4R,{HASH},Phone\n",
}


def problems_of(path: Path, limits: SourceLimits | None = None) -> list[str]:
    with pytest.raises(InvalidInput) as refused:
        read_download(path, limits or SourceLimits())
    assert "download the lists again" in refused.value.next_step
    return [f"{each.where}: {each.what}" for each in refused.value.problems]


def test_a_download_is_read_whole(tmp_path: Path) -> None:
    found = read_download(zipped(tmp_path / "d.zip", WHOLE))
    assert (found.day, found.broker, found.removed_file) == (
        date(2026, 8, 12),
        "4821",
        "20260812_4821_Removed",
    )
    assert found.lists == {
        EMAIL: [Listed("A7kP2xQ9Lm4R", "Email", HASH), Listed("B7kP2xQ9Lm4R", "Email", HASH)],
        NDZ: [],
    }
    assert found.removed == [Listed("C7kP2xQ9Lm4R", "Phone", HASH)]
    assert HASH not in repr(found)


def test_every_problem_is_listed_without_an_id_or_a_hash(tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "d.zip",
        {
            f"{EMAIL}.csv": "\n".join(
                [
                    "ID,Hash",
                    f"A7kP2xQ9Lm4R,{HASH}",
                    f"A7kP2xQ9Lm4R,{HASH}",
                    f"short,{HASH}",
                    f"B7kP2xQ9Lm4R,{HASH[:-1]}",
                    f"C7kP2xQ9Lm4R,{HASH[:-2]}F=",
                    f"D7kP2xQ9Lm4R,{HASH},Email",
                    '"',
                    "Zoë",
                ]
            ),
            f"{NDZ}.csv": "Id,Hash\n",
            "20260812_4821_Phone.csv": "",
            "20260812_4821_Removed.csv": f"ID,Hash,ListType\nE7kP2xQ9Lm4R,{HASH},Passport\n",
            "20260812_4821_Passport.csv": "ID,Hash\n",
            "20261332_4821_MAID.csv": "ID,Hash\n",
            "20260812_4822_MAID.csv": "ID,Hash\n",
        },
    )
    found = problems_of(path)
    assert found == [
        f"{EMAIL}.csv, line 3: the ID of {EMAIL}.csv, line 2 again",
        f"{EMAIL}.csv, line 4: ID: expected 12 letters and digits",
        f"{EMAIL}.csv, line 5: Hash: expected 44 characters of base64, a SHA-256; got 43 characters",
        f"{EMAIL}.csv, line 6: Hash: expected 44 characters of base64, a SHA-256; got 44 characters",
        f"{EMAIL}.csv, line 7: expected 2 columns, got 3",
        f"{EMAIL}.csv, line 8: not a line of CSV",
        f"{EMAIL}.csv, line 9: not a line of CSV",
        f"{NDZ}.csv, line 1: expected the header ID,Hash",
        "20260812_4821_Phone.csv, line 1: expected the header ID,Hash",
        "20260812_4821_Removed.csv, line 2: ListType: expected one of Email, Phone, MAID, CTVID, NDZ, "
        "NameVIN",
        *(
            f"file {number} of 7: expected YYYYMMDD_BROKER_LIST.csv with a list of Email, Phone, MAID, "
            "CTVID, NDZ, NameVIN, Removed"
            for number in (5, 6)
        ),
        "the ZIP: holds files of several days or brokers",
    ]
    assert not any("7kP2" in each or HASH[:20] in each for each in found)


def test_a_zip_bomb_is_read_up_to_the_limit(tmp_path: Path) -> None:
    rows = "".join(f"{number:012d},{HASH}\n" for number in range(20_000))
    path = zipped(tmp_path / "d.zip", {f"{EMAIL}.csv": "ID,Hash\n" + rows})
    assert path.stat().st_size < len(rows) // 10
    (found,) = problems_of(path, SourceLimits(max_bytes=10_000))
    assert "more than limits.max_bytes 10000 at" in found
    many = "".join(f"{number:012d},{HASH}\n" for number in range(50))
    path = zipped(tmp_path / "many.zip", {f"{EMAIL}.csv": "ID,Hash\n" + many})
    assert "more than limits.max_records 49" in problems_of(path, SourceLimits(max_records=49))[0]
    path = zipped(tmp_path / "long.zip", {f"{EMAIL}.csv": "ID,Hash\n" + "x" * 10_000_000})
    assert "longer than 256 bytes" in problems_of(path)[0]
    path = zipped(tmp_path / "files.zip", {f"{number}.csv": "" for number in range(65)})
    assert problems_of(path) == ["files.zip: 65 files, more than 64"]


def test_no_bytes_are_more_than_bad_input(tmp_path: Path) -> None:
    """Each file is read whole, or refused; no other error leaves the reader."""
    path = zipped(tmp_path / "d.zip", WHOLE)
    whole, source = path.read_bytes(), random.Random(7)
    expected = read_download(path)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(source.choice([1, 3])):
            data[source.randrange(len(data))] = source.randrange(256)
        path.write_bytes(bytes(data[: source.choice([len(data), source.randrange(len(data))])]))
        try:
            found = read_download(path)
        except InvalidInput:
            refused += 1
        else:
            assert found == expected or len(found.lists) <= 3
    assert refused > 200
    assert problems_of(tmp_path / "none.zip") == ["none.zip: can't be read: No such file or directory"]


def test_responses_have_the_names_and_columns_of_uploads() -> None:
    assert responses({"A7kP2xQ9Lm4R": 2, "B7kP2xQ9Lm4R": 5}).splitlines() == [
        b"Id,Status",
        b"A7kP2xQ9Lm4R,2",
        b"B7kP2xQ9Lm4R,5",
    ]
    assert upload_name(EMAIL) == "20260812_4821_Email.csv"
    assert upload_name(EMAIL, "part01") == "20260812_4821_Email_part01.csv"
    assert [is_suffix(each) for each in ("part01", "a" * 11, "", "a_b")] == [True, False, False, False]
