"""Studies: cells that outlive a kill, an encoder that runs once, and advice that the figures carry."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT

from vlm_peft.data import feature_cache
from vlm_peft.metrics.significance import runs_mean, student_t
from vlm_peft.studies import cells, compare
from vlm_peft.studies.advice import Group, advise
from vlm_peft.training.callbacks import StopOnSignal

ROWS = 60
FAKE_CELL = """
import fcntl, pathlib, sys, time
folder = pathlib.Path(sys.argv[3])
with open(folder / ".lock", "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if (folder / "cell.json").is_file():
        sys.exit(0)
    with open(folder / "runs", "a") as runs:
        runs.write("x")
    while not (folder / "go").exists():
        time.sleep(0.02)
    if (folder / "fail").exists():
        sys.exit("out of memory")
    (folder / "cell.json").write_text("{}")
"""


def planted(mean: float, seeds: int = 3, noise: float = 0.02, base: int = 0) -> list[dict[str, float]]:
    """Runs of one system on the same pictures, whose difficulty all systems share."""
    pictures = np.random.default_rng(99).normal(0, 0.3, ROWS)
    generator = np.random.default_rng(base)
    runs = []
    for _ in range(seeds):
        scores = mean + pictures + generator.normal(0, noise) + generator.normal(0, 0.1, ROWS)
        runs.append({str(row): float(score) for row, score in enumerate(scores)})
    return runs


def said(*groups: Group, margin: float | None = None) -> str:
    return "\n".join(advise(groups, "CIDEr", margin)[:-1])


def test_students_t_is_that_of_the_tables():
    for freedom, bound in ((1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (249, 1.9695)):
        assert student_t(0.95, freedom) == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize(("seeds", "between_seeds"), [(2, 0.2), (3, 0.2), (3, 0.0)])
def test_interval_over_runs_and_pictures_covers_what_it_says(seeds, between_seeds):
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        scores = generator.normal(0, between_seeds, (seeds, 1)) + generator.normal(0, 1, (1, ROWS))
        low, high = runs_mean(scores + generator.normal(0, 0.5, (seeds, ROWS))).interval
        covered += low <= 0 <= high
    # 95 % of 300 is 285, with a deviation of 4.
    assert covered >= 275


def test_interval_needs_two_runs_of_equal_pictures():
    for scores in ([[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[1.0], [2.0]]):
        with pytest.raises(ValueError, match="two or more runs"):
            runs_mean(scores)


def test_a_known_winner_is_named_with_its_interval():
    text = said(Group("lora", 400, planted(2.0, base=1)), Group("projector", 400, planted(1.0, base=2)))
    assert re.search(r"With 400 pictures, lora is better than projector: CIDEr \+(0.9|1.0)\d \[0.9", text)
    assert "[" in text
    assert "cannot" not in text


def test_a_tie_within_the_margin_is_one_and_names_the_cost():
    lora = Group("lora", 400, planted(2.0, noise=0.002, base=1), trained_weights=9000)
    projector = Group("projector", 400, planted(2.0, noise=0.002, base=2), trained_weights=1000)
    text = said(lora, projector, margin=0.3)
    assert "is as good as" in text
    assert "projector trains 1,000 weights, lora 9,000" in text
    assert "better" not in text
    # The same figures do not carry it for whom a hundredth matters.
    text = said(lora, projector, margin=0.01)
    assert "it cannot be told whether" in text
    assert "as good as" not in text


def test_one_seed_tells_nothing_however_large_the_difference():
    text = said(Group("lora", 400, planted(9.0, seeds=1)), Group("projector", 400, planted(1.0, seeds=1)))
    assert "it cannot be told whether lora or projector is better" in text
    assert "Give at least three seeds" in text
    assert "is better than" not in text


def test_seeds_that_disagree_tell_nothing():
    text = said(Group("lora", 400, planted(2.0, noise=1.0, base=1)), Group("projector", 400, planted(1.5, noise=1.0)))
    assert "it cannot be told whether" in text
    assert "is better than" not in text


def test_of_many_equal_systems_none_is_called_better():
    """Best of twenty drawn from one distribution: without the count of comparisons, some would win."""
    for start in range(0, 100, 20):
        groups = [Group(f"s{index}", 400, planted(2.0, base=start + index)) for index in range(20)]
        assert "is better than" not in said(*groups)


def test_amounts_of_data_with_one_verdict_are_one_sentence_and_the_last_step_is_judged():
    groups = [
        Group(name, pictures, planted(mean, base=seed))
        for seed, (name, pictures, mean) in enumerate(
            [("lora", 100, 1.0), ("lora", 400, 3.0), ("head", 100, 0.2), ("head", 400, 0.2)]
        )
    ]
    text = said(*groups)
    assert "With 100 and 400 pictures, lora is better than head" in text
    assert "lora still gained by 400 pictures instead of 100" in text
    assert "Whether head gained by 400 pictures instead of 100 cannot be told" in text


def test_an_untrained_model_is_a_rival_at_each_amount():
    text = said(Group("zero-shot", None, planted(2.0, base=5)), Group("lora", 50, planted(1.0, base=6)))
    assert "With 50 pictures, zero-shot is better than lora" in text


def test_losses_on_other_data_and_blind_models_are_told():
    watched = {
        "text": (planted(2.0, base=3), planted(1.0, base=4)),
        "old": (planted(1.0, base=3), planted(1.0, base=8)),
    }
    full = Group("full", 400, planted(2.0, base=1), blind=planted(2.0, base=2), watched=watched)
    text = said(full)
    assert re.search(r"With 400 pictures, full lost on text: -(0.9|1.0)\d \[-1", text)
    assert "on old" not in text
    assert "full cannot be told from its blind control" in text
    full.blind = planted(0.1, base=2)
    assert "blind" not in said(full)


def make_cells(folder: Path, count: int = 3) -> list[cells.Cell]:
    made = [cells.Cell(folder / f"cell{index}", {}) for index in range(count)]
    for cell in made:
        cell.folder.mkdir(parents=True, exist_ok=True)
    return made


@pytest.fixture
def fake_program(tmp_path, monkeypatch) -> Path:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_CELL)
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, str(script)])
    return script


def until(condition) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("It did not happen within a minute.")


def test_a_killed_study_goes_on_and_runs_each_cell_once(tmp_path, fake_program):
    """SIGKILL while the second cell runs: the first is kept, the second is waited for, the third is run."""
    made = make_cells(tmp_path / "cells")
    first, second, third = (cell.folder for cell in made)
    (first / "go").touch()
    program = (
        "import sys; from pathlib import Path; from vlm_peft.studies import cells; "
        f"cells.PROGRAM = [sys.executable, {str(fake_program)!r}]; "
        f"cells.run_cells([cells.Cell(Path(f), {{}}) for f in {[str(cell.folder) for cell in made]!r}], say=print)"
    )
    study = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    until((second / "runs").exists)
    os.kill(study.pid, signal.SIGKILL)
    assert study.wait() == -signal.SIGKILL
    assert (first / "cell.json").is_file()
    kept = (first / "cell.json").stat().st_mtime_ns
    (second / "go").touch()
    (third / "go").touch()
    heard: list[str] = []
    assert cells.run_cells(made, say=heard.append) == {}
    assert [(cell.folder / "runs").read_text() for cell in made] == ["x", "x", "x"]
    assert (first / "cell.json").stat().st_mtime_ns == kept
    assert heard[0].startswith(("1 of 3", "2 of 3"))
    # And nothing is left to do.
    assert cells.run_cells(made, say=heard.append) == {}
    assert heard[-1] == "3 of 3 runs are finished already."


def test_a_cell_that_fails_costs_one_cell_and_is_tried_again(tmp_path, fake_program):
    made = make_cells(tmp_path / "cells")
    for cell in made:
        (cell.folder / "go").touch()
    (made[1].folder / "fail").touch()
    failures = cells.run_cells(made, jobs=2, say=lambda text: None)
    assert list(failures) == ["cell1"]
    assert "ended with status 1: out of memory" in failures["cell1"]
    (made[1].folder / "fail").unlink()
    assert cells.run_cells(made, say=lambda text: None) == {}
    assert [(cell.folder / "runs").read_text() for cell in made] == ["x", "xx", "x"]


def test_cells_side_by_side_have_a_device_each_or_share_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in cells.places(3)] == ["2", "5", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert cells.places(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cells.places(2) == [{}, {}]


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells without an import of seconds each; signals belong to the main thread. Gives the kinds that were started."""
    kinds: list[str] = []
    monkeypatch.setattr(StopOnSignal, "on_train_begin", lambda self, *args, **kwargs: None)

    def start(arguments, log, place=None):
        kinds.append(arguments[0])
        try:
            return None if cells.main(arguments) == 0 else "failed"
        except ValueError as error:
            return str(error)

    monkeypatch.setattr(cells, "start", start)
    return kinds


@pytest.fixture
def study_file(tmp_path, bases, flickr):
    """A study of two strategies, two amounts of data and two seeds on tiny bases."""
    vision, text = bases
    base = yaml.safe_load((ROOT / "recipes/configs/flickr30k.yaml").read_text())
    base |= {"dataset_name": str(flickr), "vision_model": str(vision), "model_name_or_path": str(text)}
    base |= {"use_cpu": True, "bf16": False, "max_length": 512, "max_new_tokens": 4, "max_steps": 2}
    base |= {"learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "eval_strategy": "no"}
    base |= {"feature_cache_dir": str(tmp_path / "features"), "blind_splits": base["eval_splits"], "meteor": False}
    for name in ("output_dir", "eval_steps", "load_best_model_at_end", "metric_for_best_model"):
        base.pop(name, None)

    def write(**changes) -> Path:
        study = {
            "base": base,
            "output_dir": str(tmp_path / "study"),
            "untrained": {"zero-shot": None},
            "strategies": {"lora": None, "small": {"lora_r": 2}},
            "train_limits": [2, 4],
            "seeds": [0, 1],
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study | changes))
        return path

    return write


def test_few_shot_rows_ask_with_solved_examples(tmp_path, study_file, in_this_process):
    untrained = {"zero-shot": None, "few-shot": {"shots": 2}}
    path = study_file(seeds=[0], train_limits=[2], strategies={"small": {"lora_r": 2}}, untrained=untrained)
    assert compare.main(["--config", str(path)]) == 0
    rows = list(csv.DictReader((tmp_path / "study/study.csv").open()))
    assert [row["strategy"] for row in rows] == ["few-shot", "zero-shot", "small"]
    assert {row["state"] for row in rows} == {"finished"}
    few, zero = (Path(row["folder"]) for row in rows[:2])
    assert few.name == "few-shot-shots2-seed0"
    said = [
        [
            json.loads(line)["prediction"]
            for line in (folder / f"eval/{rows[0]['split']}{condition}/predictions.jsonl").open()
        ]
        for folder, condition in ((zero, "-before"), (few, "-before"), (few, "-blind"))
    ]
    # A random model answers other questions otherwise.
    assert said[0] != said[1] != said[2]


@pytest.mark.parametrize("shots", [-1, 1.5, True, "two"])
def test_shots_are_a_number(study_file, shots, capsys):
    with pytest.raises((SystemExit, ValueError), match="shots: expected a whole number from 0"):
        compare.main(["--config", str(study_file(untrained={"few-shot": {"shots": shots}}))])


def test_study_is_a_table_a_page_and_one_run_of_the_encoder(tmp_path, study_file, in_this_process, monkeypatch, capsys):
    encoded: list[tuple[str, str]] = []
    encode = feature_cache.encode_batch

    def watched(batch, **given):
        encoded.extend((each, in_this_process[-1]) for each in batch["hash"])
        return encode(batch, **given)

    monkeypatch.setattr(feature_cache, "encode_batch", watched)
    arguments = ["--config", str(study_file(seeds=[0], train_limits=[2, 4]))]
    assert compare.main(arguments) == 0
    study = tmp_path / "study"
    rows = list(csv.DictReader((study / "study.csv").open()))
    assert [(row["strategy"], row["train_limit"], row["state"]) for row in rows] == [
        ("zero-shot", "", "finished"),
        ("lora", "2", "finished"),
        ("small", "2", "finished"),
        ("lora", "4", "finished"),
        ("small", "4", "finished"),
    ]
    assert len({each for each, _ in encoded}) == len(encoded) > 0
    # Before the cells, which may run side by side.
    assert {kind for _, kind in encoded} == {"features"}
    whole = json.loads((study / "study.json").read_text())
    for row, again in zip(rows, whole["runs"], strict=True):
        condition = "-before" if row["strategy"] == "zero-shot" else ""
        scores = json.loads((Path(row["folder"]) / f"eval/{row['split']}{condition}/scores.json").read_text())
        assert float(row["score"]) == again["score"] == scores["metrics"][row["metric"]]
        assert [float(row["low"]), float(row["high"])] == scores["intervals"][row["metric"]]
        blind = json.loads((Path(row["folder"]) / f"eval/{row['split']}-blind/scores.json").read_text())
        assert float(row["blind"]) == blind["metrics"][row["metric"]]
        assert float(row["minutes"]) > 0
        assert float(row["peak_gb"]) > 0.05
    weights = {row["strategy"]: int(row["trained_weights"]) for row in rows}
    assert weights["zero-shot"] == 0 < weights["small"] < weights["lora"]
    assert [row["pictures"] for row in rows] == ["", "2", "2", "4", "4"]
    page = (study / "study.html").read_text()
    assert page.count("<svg") == 3
    assert "Give at least three seeds" in page
    assert "Give at least three seeds" in capsys.readouterr().out

    # Another seed: what is finished is kept, nothing is encoded again, and runs of one row are averaged.
    kept = {path: path.stat().st_mtime_ns for path in study.glob("cells/*/cell.json")}
    before = len(encoded)
    assert compare.main(["--config", str(study_file(train_limits=[2], strategies={"lora": None}))]) == 0
    assert len(encoded) == before
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    (lora,) = [row for row in json.loads((study / "study.json").read_text())["groups"] if row["strategy"] == "lora"]
    assert lora["runs"] == 2
    assert lora["score"] == pytest.approx(sum(lora["scores"]) / 2)

    # A study that was changed does not mix its runs with those of the old one.
    changed = study_file(strategies={"lora": {"lora_alpha": 7}})
    with pytest.raises(ValueError, match=r"is of other options \(lora_alpha: \S+ there, 7 here\)"):
        compare.main(["--config", str(changed)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": {"x": {"lora_rank": 4}}}, r"compare.py: x-2-seed0: unknown option: 'lora_rank'.*did you mean"),
        ({"strategies": {"x": {"lora_r": 0}}}, "x-2-seed0: lora_r is 0, expected at least 1"),
        ({"strategies": {"x": {"output_dir": "y"}}}, "output_dir is set by the study"),
        ({"strategies": {"a/b": None}}, "expected a name of letters"),
        ({"strategies": {"zero-shot": None}}, "is a name in strategies and in untrained"),
        ({"strategies": {}}, "strategies is missing or empty"),
        ({"strategy": {}}, "unknown key 'strategy'"),
        ({"output_dir": 7}, "output_dir: expected text, got 7"),
        ({"metric": ["CIDEr"]}, "metric: expected text, got .'CIDEr'."),
        ({"metric": "CIDer"}, "metric: 'CIDer' is no metric of any task; there are .*CIDEr"),
        ({"train_limits": [0]}, "train_limits: expected a list of whole numbers of at least 1"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"margin": -1}, "margin: expected a number above 0"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(study_file, monkeypatch, changes, message):
    monkeypatch.setattr(cells, "start", lambda *given: pytest.fail("Something ran."))
    with pytest.raises((ValueError, OSError, SystemExit), match=message):
        compare.main(["--config", str(study_file(**changes))])


def test_a_killed_cell_goes_on_from_its_checkpoint_and_is_locked_meanwhile(tmp_path):
    asked: list[list[str]] = []

    def work(arguments: list[str]) -> int:
        asked.append(arguments)
        with cells.locked(tmp_path / ".lock", wait=False) as mine:
            assert not mine
        return 0 if len(asked) > 1 else 143

    (tmp_path / "checkpoint-5").mkdir()
    assert cells.run_one(tmp_path, work) == 143
    # It was half written, and a new run does not start beside it.
    assert not (tmp_path / "checkpoint-5").exists()
    assert not (tmp_path / "cell.json").exists()
    assert cells.run_one(tmp_path, work) == 0
    assert cells.run_one(tmp_path, work) == 0
    assert len(asked) == 2
    assert asked[1] == ["--config", str(tmp_path / "options.yaml")]


def test_the_demos_study_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = compare.read_study("recipes/configs/study_demo.yaml", str(tmp_path))
    places = compare.lay_out(study)
    cells.prepare([place.cell for place in places], "compare.py")
    assert len(places) == len({place.cell.folder for place in places})
    assert {place.cell.kind for place in places} == {"train", "untrained"}


def test_a_split_that_no_run_scores_is_named_before_any_runs():
    study = compare.StudyOptions({"eval_splits": "test"}, {"a": {}}, "out", seeds=[0], split="tset")
    with pytest.raises(ValueError, match="split: 'tset' is not scored; eval_splits names test"):
        compare.lay_out(study)
    study.split = "test"
    assert len(compare.lay_out(study)) == 1
