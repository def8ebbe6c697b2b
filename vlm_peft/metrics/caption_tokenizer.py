"""Clean and tokenise captions the way coco-caption does, with Java or without it.

coco-caption's scorers split on spaces, so every number depends on the tokenizer. Its own, the Penn Treebank tokenizer
of Stanford CoreNLP 3.4.1, needs Java (`ptb-java`). Without Java, NLTK's Treebank tokenizer with a few rules of our own
stands in (`treebank-python`). On the committed sample `tests/data/tokenizer_sample.txt` the two give the same tokens
for 200 of 200 ordinary captions and for 236 of 261 hard ones; the rules were written looking at that sample, so expect
less on hard text of another kind. What still differs: emoticons, contractions such as y'all, backticks, 5'10",
asterisks and underscores.

pycocoevalcap's own `PTBTokenizer` runs the same jar but writes temporary files into site-packages, and on a caption
that holds U+2028, a vertical tab, a form feed or a carriage return it gives the rest of the captions to the wrong
pictures; hence the call here.
"""

import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Literal

from .java_process import find_java, package_folder, run_java

Tokenizer = Literal["auto", "ptb-java", "treebank-python"]
"""`auto` is `ptb-java` where Java works and `treebank-python` elsewhere."""

# Dropped after tokenising: the list of pycocoevalcap/tokenizer/ptbtokenizer.py. Lowercasing comes before the look-up
# there too, so brackets (-lrb-) stay; published numbers have that in them.
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_JAVA_TIME_LIMIT_S = 300.0  # 25,000 captions take 0.5 s


def normalise(caption: str) -> str:
    """Return a caption as one line of visible characters with single spaces.

    Control characters, lone surrogates, line and paragraph separators and `|||` (METEOR's field separator) become
    spaces; invisible format characters such as a byte order mark or a soft hyphen go, except the joiners some scripts
    spell with.
    """
    characters = []
    for character in caption:
        category = unicodedata.category(character)
        if category in ("Cc", "Cs") or character == "\u200b":
            characters.append(" ")
        elif category != "Cf" or character in "\u200c\u200d":
            characters.append(character)
    return " ".join(re.sub(r"\|{3,}", " ", "".join(characters)).split())


def tokenize(captions: Sequence[str], tokenizer: Tokenizer = "auto") -> tuple[list[str], str]:
    """Tokenise captions: lower case, no punctuation, tokens separated by single spaces.

    Args:
        captions: Any text; each is passed through `normalise` first.
        tokenizer: Which one to use, see `Tokenizer`.

    Returns:
        As many strings as there are captions, in the same order, and the name of the tokenizer that made them:
        `ptb-java` or `treebank-python`.

    Raises:
        ValueError: for an unknown tokenizer, or when `ptb-java` is asked for and there is no Java.
        RuntimeError: when `ptb-java` is asked for and fails.
    """
    if tokenizer not in ("auto", "ptb-java", "treebank-python"):
        raise ValueError(f"unknown tokenizer {tokenizer!r}: expected auto, ptb-java or treebank-python")
    lines = [normalise(caption) for caption in captions]
    java = None if tokenizer == "treebank-python" else find_java()
    if tokenizer == "ptb-java" and java is None:
        raise ValueError(
            "the tokenizer ptb-java needs the program `java` and PATH has none: install a Java runtime "
            "(on Debian: default-jre-headless) or take the tokenizer treebank-python"
        )
    if java is not None:
        try:
            return _tokenize_with_java(java, lines), "ptb-java"
        except (OSError, RuntimeError) as error:
            if tokenizer == "ptb-java":
                raise RuntimeError(f"the tokenizer ptb-java failed ({error}); take treebank-python") from error
            # For instance macOS's stub of `java`, which only says that there is none.
            warnings.warn(f"Java's tokenizer failed ({error}): using treebank-python", RuntimeWarning, stacklevel=2)
    return _tokenize_with_python(lines), "treebank-python"


def _without_punctuation(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in _PUNCTUATION)


def _tokenize_with_java(java: str, lines: Sequence[str]) -> list[str]:
    jar = package_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(f"{line}\n" for line in lines).encode()
    tokenized = run_java(command, stdin=text, time_limit=_JAVA_TIME_LIMIT_S).decode().split("\n")[:-1]
    if len(tokenized) != len(lines):
        raise RuntimeError(f"expected {len(lines)} tokenised captions, got {len(tokenized)}: they no longer match")
    return [_without_punctuation(line.split()) for line in tokenized]


# Punctuation that CoreNLP keeps inside a token and NLTK would split: hidden from NLTK behind private-use characters.
_KEPT = re.compile(
    r"https?://\S+|</?\w+>|[!?]{2,}|(?<!\S)(?:[^\W\d]\.)+(?!\S)|(?<=\w)[&?!@](?=\w)|[#@](?=[^\W\d])|(?<=\w)#"
)
_HIDE = {code: 0xE000 + code for code in range(0x21, 0x7F) if not chr(code).isalnum()}
_SHOW = {hidden: code for code, hidden in _HIDE.items()}
# What CoreNLP rewrites, plus curly quotes as plain ones. Pound and euro become # and $: its PTB3 mapping.
_REWRITTEN = str.maketrans(  # by name where a letter looks like another one
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "“": '"',
        "”": '"',
        "«": '"',
        "»": '"',
    }
    | {"\N{SINGLE LOW-9 QUOTATION MARK}": "'", "\N{EN DASH}": " -- ", "—": " -- ", "…": " ... "}
    | {"£": "#", "€": "$", "½": "1/2", "¼": "1/4", "¾": "3/4", "°": " ° ", "\ufe0f": None, "\u200d": None}
)
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr st vs jr sr no co ltd inc ave blvd rd etc gen sgt capt gov lt prof fig pp ft "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_OPENING_QUOTE = re.compile(r"(?<!\S)['`]+(?=[^\W\d])(?!(?:em|cause|n|s|re|ve|ll|d|m|tis|twas|til)\b)")
_FULL_STOP = re.compile(r"(?<!\S)(\w{2,})\.(?!\S)")
_SPLIT = re.compile(r"[|^\\]|(?<!\S)-(?=[^\W\d])|(?<=\w)-(?!\S)|(?<=\bw)/(?!\S)")


def _full_stop(match: re.Match[str]) -> str:
    return match[0].translate(_HIDE) if match[1] in _ABBREVIATIONS else f"{match[1]} ."


def _tokenize_with_python(lines: Sequence[str]) -> list[str]:
    # NLTK takes a second to import, and the data folder it may look for is not needed: this class is regexes only.
    from nltk.tokenize.treebank import TreebankWordTokenizer

    treebank = TreebankWordTokenizer()
    tokenized = []
    for line in lines:
        text = "".join(character for character in line.lower().translate(_REWRITTEN) if character <= "\uffff")
        text = _KEPT.sub(lambda match: match[0].translate(_HIDE).join("  " if len(match[0]) > 1 else ("", "")), text)
        text = _FULL_STOP.sub(_full_stop, _OPENING_QUOTE.sub("", text))
        text = _SPLIT.sub(r" \g<0> ", text)
        tokens = [token.lower().translate(_SHOW) for token in treebank.tokenize(text, convert_parentheses=True)]
        tokenized.append(_without_punctuation(tokens))
    return tokenized
