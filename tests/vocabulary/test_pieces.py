import io
import json
import sys
import unicodedata

import pytest

from pyembed.cli import main
from pyembed.vocabulary import cost_of_languages, pieces, traps
from pyembed.vocabulary.languages import ENGLISH, TRANSLATIONS, script_of

pytest.importorskip("tiktoken")

GPT2, CL100K, O200K = "gpt2", "cl100k_base", "o200k_base"
ALL = [GPT2, CL100K, O200K]


def named(text, encoding=GPT2, **options):
    return {trap.name: trap for trap in traps(text, encoding, **options)}


@pytest.mark.parametrize("encoding", ALL)
@pytest.mark.parametrize("text", ["", "Hello, world", "naïve 🌸 café", "नमस्ते <|endoftext|>", "a\ud800b", "\x00\t\n"], ids=ascii)
def test_pieces_are_the_text(text, encoding):
    found = pieces(text, encoding)
    data = b"".join(piece.data for piece in found)
    assert data.decode() == text.replace("\ud800", "\ufffd")
    for piece in found:
        assert data[piece.start : piece.start + len(piece.data)] == piece.data
        assert piece.text is None or piece.text.encode() == piece.data


def test_a_plain_text_has_no_trap():
    for encoding in ALL:
        assert traps("The quick brown fox, of 12 and 123 and 123,456 years.", encoding, 200_100) == []
        assert traps("", encoding, 1) == []


@pytest.mark.parametrize(
    ("text", "ids"),
    [("Hello ", [[220], [220], [220]]), ("Hello  ", [[220, 220], [256], [256]]), ("Hello\n", [[198], [198], [198]])],
)
def test_trailing_white_space(text, ids):
    assert [named(text, encoding)["trailing white space"].values["ids"] for encoding in ALL] == ids


@pytest.mark.parametrize("space", ["\u00a0", "\u2003", "\u3000", "\t", "\r\n"], ids=ascii)
def test_white_space_of_any_kind(space):
    trap = named(f"né{space}")["trailing white space"]
    assert trap.values["space"] == space and repr(space) in trap.message
    assert "trailing white space" not in named(f"né{space}é")


def test_digits_are_cut_from_the_left():
    cuts = [named("It is 1234567.", encoding)["digits"].values["numbers"] for encoding in ALL]
    assert cuts == [["123|45|67"], ["123|456|7"], ["123|456|7"]]
    for text in ("1,234,567", "12", "a1b2"):
        assert "digits" not in named(text, CL100K)
    assert "digits" not in named("123456 and 123", CL100K)  # cut between thousands


def test_special_tokens_in_text():
    trap = named("a <|endoftext|> b")["special token"]
    assert trap.values["id"] == 50256 and len(trap.values["ids"]) == 7 and "<|endoftext|>, id 50256" in trap.message
    assert "special token" not in named("<|fim_prefix|>") and "special token" in named("<|fim_prefix|>", CL100K)


def test_pieces_that_are_no_utf8():
    assert named("🌸 a")["fragments"].message.startswith("3 of 4 tokens are no UTF-8 alone")
    assert "fragments" not in named("café", CL100K)


def test_ids_beyond_the_table():
    trap = named("Hello 🌸", O200K, model_size=50_257)["beyond the table"]
    assert trap.values["ids"] and min(trap.values["ids"]) >= 50_257
    assert "50,257 rows, o200k_base has 200,019 ids" in trap.message
    assert "beyond the table" not in named("Hello", O200K, model_size=50_257)
    last = pieces("Hello", O200K)[0].id
    assert "beyond the table" in named("Hello", O200K, model_size=last)
    assert "beyond the table" not in named("Hello", O200K, model_size=last + 1)
    assert "beyond the table" not in named("Hello 🌸", O200K)


@pytest.mark.parametrize("encoding", ALL)
def test_another_unicode_form(encoding):
    decomposed = unicodedata.normalize("NFD", " café")
    trap = named(decomposed, encoding)["Unicode form"]
    assert trap.values == {"tokens": len(pieces(decomposed, encoding)), "composed": len(pieces(" café", encoding))}
    assert trap.values["tokens"] >= 1.5 * trap.values["composed"]
    korean = "한국어"
    values = named(unicodedata.normalize("NFD", korean), encoding)["Unicode form"].values
    assert values["tokens"] / values["composed"] == {GPT2: 3, CL100K: 6, O200K: 12}[encoding]
    assert "Unicode form" not in named(korean, encoding) and "Unicode form" not in named("ﬁ Ａ", encoding)


def test_what_a_language_costs():
    hindi = TRANSLATIONS["DEVANAGARI"][1]
    times = [named(hindi, encoding)["language"].values["times"] for encoding in ALL]
    assert times == [pytest.approx(expected, abs=0.05) for expected in (8.91, 5.45, 1.64)]
    assert cost_of_languages(GPT2)["Hindi"] == times[0] and len(cost_of_languages(O200K)) == 24
    assert named("Hello, मैं जाता हूँ")["language"].values["language"] == "Hindi"
    assert "language" not in named(ENGLISH) and "language" not in named("12345 ...")


@pytest.mark.parametrize("script", TRANSLATIONS)
def test_scripts_are_told(script):
    language, text = TRANSLATIONS[script]
    assert script_of(text) == script and unicodedata.is_normalized("NFC", text) and language.isalpha()


def test_bad_arguments():
    with pytest.raises(TypeError, match="text: expected a str, got bytes"):
        pieces(b"a")
    with pytest.raises(TypeError, match="encoding: expected a name or a tiktoken"):
        pieces("a", 3)
    for size in (0, True, 1.5):
        with pytest.raises(ValueError, match="model_size: expected a positive number"):
            traps("a", model_size=size)


# pyembed tokens


def test_command_prints_tokens_and_traps(capsys):
    assert main(["tokens", "é\t1234567 [red] "]) == 0
    out = capsys.readouterr().out
    assert "2634  'é'" in out and "197  '\\t'" in out and "685  ' ['" in out and "\x1b" not in out
    assert "digits: 1 number is cut" in out and "trailing white space: " in out
    assert main(["tokens", "Hello"]) == 0
    assert capsys.readouterr().out.splitlines() == ["   15496  'Hello'", "1 token of gpt2, 5 characters, 5 bytes", "no traps"]


def test_command_colours_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["tokens", "Hello world 🌸"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[30;44mHello\x1b[0m" in out and "·world" in out and "\x1b[1;37;41m\\x8c" in out
    assert "\x1b[1;33mfragments: \x1b[0m3 of 5 tokens" in out


def test_command_prints_json(capsys):
    assert main(["tokens", "Hi ", "--encoding", O200K, "--model-size", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in found["tokens"]] == [piece.id for piece in pieces("Hi ", O200K)]
    assert [row["name"] for row in found["traps"]] == ["trailing white space", "beyond the table"]
    assert bytes.fromhex(found["tokens"][0]["bytes"]) == b"Hi"


def test_command_reads_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("क\n".encode()), encoding="ascii"))
    assert main(["tokens", "-", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["traps"]] == [
        "trailing white space",
        "fragments",
        "language",
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert main(["tokens", "-"]) == 2
    assert capsys.readouterr().err == "error: TEXT: expected UTF-8, got unexpected end of data at byte 3\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--encoding", "no"], "--encoding: encoding name: expected one of"),
        (["a", "--model-size", "0"], "'--model-size'"),
        ([], "Missing argument 'TEXT'"),
        (["caf\udce9"], "TEXT: expected UTF-8, got unexpected end of data at byte 3"),
    ],
    ids=["encoding", "size", "no text", "no UTF-8"],
)
def test_command_refuses_in_one_line(capsys, arguments, message):
    assert main(["tokens", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
