"""eval/throughput.py as a user runs it, in its smallest form, and its refusals when the two sides differ."""

import subprocess
import sys

import pytest
from conftest import ROOT

from eval.throughput.data import IMAGE_TOKEN_ID, PRESETS, VOCABULARY, make_captions, make_tokenizer
from eval.throughput.measure import LOSS_TOLERANCE, compare_texts, parse_arguments
from eval.throughput.report import compare_losses, table, write_report

LOSSES = {"peer": [12.25, 11.5, 11.0], "ours": [12.2500001, 11.5000002, 10.9999999]}


def test_the_smallest_run_prints_all_tables_and_agrees():
    command = "--preset cpu --pictures 2 --pictures_per_step 1 --turns 1 --generated_pictures 2 --switches".split()
    done = subprocess.run(
        [sys.executable, ROOT / "eval" / "throughput.py", *command, "packing"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "captions/s from the second epoch",
        "captions/s in the first epoch",
        "peak memory, MB",
        "| language model ",
        "| head ",
        "| packing ",
        "greedy: ours, features cached",
        "3 beams: peer one by one",
        "All texts are equal",
        "The losses of all sides agree over 2 steps",
    ):
        assert line in done.stdout
    assert "/tmp" not in done.stdout


def test_equal_losses_pass():
    assert compare_losses(LOSSES, LOSS_TOLERANCE) < 1e-7


@pytest.mark.parametrize("wrong", [10.99, 11.005, float("nan"), float("inf")])
def test_a_loss_that_differs_is_refused_and_named(wrong):
    with pytest.raises(ValueError, match=r"losses disagree: at step 3 ours has .* and the peer 11\.0"):
        compare_losses({**LOSSES, "ours": [12.25, 11.5, wrong]}, LOSS_TOLERANCE)


@pytest.mark.parametrize("wrong", ["a cat", ""])
def test_a_text_that_differs_is_refused(wrong):
    compare_texts({"batched": ["a dog", "two"], "cached": ["a dog", "two"], "one by one": ["a dog"]})
    with pytest.raises(ValueError, match="picture 0 'one by one'"):
        compare_texts({"batched": ["a dog", "two"], "cached": ["a dog", "two"], "one by one": [wrong]})


@pytest.mark.parametrize(
    "arguments", [["--switches", "magic"], ["--pictures", "5", "--pictures_per_step", "2"], ["--steps", "0"]]
)
def test_options_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert "error: " in capsys.readouterr().err


def test_tokenizer_has_the_size_and_control_tokens_of_qwen3():
    tokenizer = make_tokenizer()
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == IMAGE_TOKEN_ID
    captions = [caption for picture in range(20) for caption in make_captions(picture)]
    assert all(10 <= len(caption.split()) <= 12 for caption in captions)
    # A word is a token, as it is for Qwen3; the full stop is one more.
    assert all(len(tokenizer.encode(caption)) == len(caption.split()) + 1 for caption in captions)
    assert tokenizer.decode(tokenizer.encode(captions[0])) == captions[0]


def test_report_keeps_the_sections_of_other_presets(tmp_path):
    path = tmp_path / "THROUGHPUT.md"
    write_report("cpu", "\n".join(table(["a", "b"], [["1", "22"]])), path)
    write_report("b32", "figures", path)
    text = path.read_text()
    assert "| 1 | 22 |" in text
    assert text.count("Not measured.") == len(PRESETS) - 2
    assert text.index("`cpu`") < text.index("`b32`") < text.index("figures") < text.index("`l14-336`")
