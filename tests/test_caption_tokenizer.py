"""Captions keep their place, and the tokenizer without Java does what its text says."""

from pathlib import Path

import pytest
from fake_java import needs_java, put_fake_java

from vlm_peft.metrics.caption_tokenizer import normalise, tokenize
from vlm_peft.metrics.java_process import package_folder

SAMPLE = Path(__file__).parent / "data" / "tokenizer_sample.txt"


@needs_java
@pytest.mark.parametrize(("part", "same", "total"), [("plain", 200, 200), ("hard", 236, 261)])
def test_agreement_of_the_two_tokenizers_is_what_the_docstring_states(part, same, total):
    sections = SAMPLE.read_text(encoding="utf-8").split("## ")
    captions = next(s for s in sections if s.startswith(f"{part}\n")).split("\n")[1:-1]
    java, python = tokenize(captions, "ptb-java")[0], tokenize(captions, "treebank-python")[0]
    assert len(captions) == total
    assert sum(a == b for a, b in zip(java, python, strict=True)) == same


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        *[(f"a{character}dog", "a dog") for character in "\r\n\v\f\t\0\x1c\x85\u2028\u2029\xa0\u200b\ud800"],
        ("  a   dog ", "a dog"),
        ("\ufeffa d\xadog", "a dog"),
        ("a ||| dog |||| runs", "a dog runs"),
        ("a || dog", "a || dog"),
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),
        ("", ""),
    ],
)
def test_normalise_gives_one_line_without_separators(caption, expected):
    assert normalise(caption) == expected


@pytest.mark.parametrize("tokenizer", [pytest.param("ptb-java", marks=needs_java), "treebank-python"])
def test_no_caption_moves_to_another_picture(tokenizer):
    captions = [
        "",
        "a\u2028b",
        "a\vb",
        "a\fb",
        "a\rb",
        "a\nb",
        "\U0001f600",
        "...",
        "<|im_end|>",
        "The DOG\u2019s toy!",
        "",
    ]
    tokenized, name = tokenize(captions, tokenizer)
    assert tokenized[:8] == ["", "a b", "a b", "a b", "a b", "a b", "", ""]
    assert tokenized[9:] == ["the dog 's toy", ""]
    assert name == tokenizer


@needs_java
def test_java_tokens_do_not_depend_on_the_locale(monkeypatch):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Dfile.encoding=US-ASCII")
    assert tokenize(["A CAFÉ IN İZMİR"], "ptb-java")[0] == ["a café in i̇zmi̇r"]


@needs_java
def test_tokenizing_writes_nothing_into_site_packages():
    folder = package_folder() / "tokenizer"
    before = folder.stat().st_mtime_ns
    tokenize(["a dog"], "ptb-java")
    assert folder.stat().st_mtime_ns == before


def test_without_java_auto_takes_python_and_ptb_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert tokenize(["A dog."]) == (["a dog"], "treebank-python")
    with pytest.raises(ValueError, match="install a Java runtime"):
        tokenize(["A dog."], "ptb-java")


def test_java_that_does_not_work_is_named(tmp_path, monkeypatch):
    put_fake_java(tmp_path, monkeypatch, "cat > /dev/null; echo no runtime installed >&2; exit 1")
    with pytest.warns(RuntimeWarning, match="no runtime installed"):
        assert tokenize(["A dog."]) == (["a dog"], "treebank-python")
    with pytest.raises(RuntimeError, match="no runtime installed"):
        tokenize(["A dog."], "ptb-java")


def test_lost_lines_are_an_error(tmp_path, monkeypatch):
    put_fake_java(tmp_path, monkeypatch, "cat > /dev/null; echo a dog")
    with pytest.raises(RuntimeError, match="expected 2 tokenised captions, got 1"):
        tokenize(["a dog", "a cat"], "ptb-java")


def test_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="unknown tokenizer 'moses'"):
        tokenize(["a dog"], "moses")
