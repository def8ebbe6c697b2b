"""A search for options: named errors before anything runs, no trial lost or counted twice, a test split scored once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from conftest import ROOT
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from vlm_peft.studies import cells, tune
from vlm_peft.training.callbacks import StopOnSignal

TRIALS = 4
FAKE_RUN = """
import fcntl, json, pathlib, sys, time, yaml
if sys.argv[2] == "features":
    sys.exit(0)
folder = pathlib.Path(sys.argv[2 if sys.argv[1].endswith("tune") else 3])
with open(folder / ".lock", "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if (folder / "cell.json").is_file():
        sys.exit(0)
    options = yaml.safe_load((folder / "options.yaml").read_text())
    with open(folder / "runs", "a") as runs:
        runs.write("x")
    while folder.name == "0002" and not (folder.parent / "go").exists():
        time.sleep(0.02)
    if folder.name == "0001":
        sys.exit("diverged")
    (split,) = options["eval_splits"]
    split = split.replace("[25%]", "-25")
    (folder / "eval" / split).mkdir(parents=True)
    score = {"n": 2, "primary": "CIDEr", "condition": "after", "metrics": {"CIDEr": options["learning_rate"]}}
    (folder / "eval" / split / "scores.json").write_text(json.dumps(score))
    lines = [{"id": n, "prediction": "a", "references": ["a"], "cider": options["learning_rate"] + n} for n in (0, 1)]
    (folder / "eval" / split / "predictions.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
    (folder / "cell.json").write_text('{"seconds": 1, "peak_bytes": 1}')
"""


@pytest.fixture
def search_file(tmp_path, bases, flickr):
    """A search over the rate of a run on tiny bases, from a bad start."""
    vision, text = bases
    base = yaml.safe_load((ROOT / "recipes/configs/flickr30k.yaml").read_text())
    base |= {"dataset_name": str(flickr), "vision_model": str(vision), "model_name_or_path": str(text)}
    base |= {"use_cpu": True, "bf16": False, "max_length": 512, "max_new_tokens": 4, "max_steps": 2}
    base |= {"report_to": "none", "save_strategy": "no", "eval_strategy": "no", "meteor": False}
    base |= {"feature_cache_dir": str(tmp_path / "features")}
    for name in ("output_dir", "eval_steps", "load_best_model_at_end", "metric_for_best_model"):
        base.pop(name, None)

    def write(**changes) -> Path:
        search = {
            "base": base,
            "output_dir": str(tmp_path / "tune"),
            "search": {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}, "lora_r": [2, 4]},
            "start": {"learning_rate": 1e-5, "lora_r": 2},
            "trials": TRIALS,
            "validation": 0.25,
        }
        path = tmp_path / "tune.yaml"
        path.write_text(yaml.safe_dump(search | changes))
        return path

    write.base = base
    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"learning_rat": [1, 2]}}, r"unknown option 'learning_rat' \(did you mean 'learning_rate'"),
        ({"search": {"learning_rate": {"low": 1.0, "high": 0.1}}}, "learning_rate: expected low below high"),
        ({"search": {"learning_rate": {"low": 0.0, "high": 0.1, "log": True}}}, "log: true needs low above 0"),
        ({"search": {"learning_rate": {"low": "1e-4", "high": 0.1}}}, "a power of ten is written 1.0e-4"),
        ({"search": {"learning_rate": {"low": 0.1}}}, "expected a list, or low and high"),
        ({"search": {"lora_r": [4]}}, "two or more different choices"),
        ({"search": {"lora_r": [0, 4]}, "start": {}}, "search: lora_r: 0: lora_r is 0, expected at least 1"),
        ({"search": {"eval_splits": ["a", "b"]}}, "cannot be searched"),
        ({"start": {"learning_rate": 1.0}}, "start: learning_rate is 1.0, which is outside"),
        ({"start": {"seed": 1}}, "start: seed is not searched"),
        ({"sampler": "cmaes"}, "sampler is 'cmaes', expected one of tpe, random"),
        ({"validation": "test"}, "validation: test is what the last run is scored on"),
        ({"options": {"eval_splits": ["train[20%]"]}}, "drawn from the training split: make it a split of its own"),
        ({"validation": 1.5}, "validation: expected a share above 0 and below 1"),
        ({"trials": 0}, "trials: expected a whole number of at least 1"),
        ({"options": {"mixture": [{"task": "vqa"}]}}, "a search over a mixture is not possible"),
        ({"space": {}}, "unknown key 'space'"),
        ({"search": {1: [1, 2]}}, "search: expected names with values"),
        (
            {"search": {"learning_rate": {"low": 1e-5, "high": 0.1, "log": "no"}}},
            "log: expected true or false, got 'no'",
        ),
        ({"search": {"lora_r": {"low": 1.0, "high": 8.0}}, "start": {}}, "lora_r: expected a whole number, got 0.5"),
        ({"search": {"lora_r": {"low": 1, "high": 8, "step": 3}}, "start": {}}, "a step that leads from low to high"),
        (
            {"search": {"lora_r": {"low": 2, "high": 8, "step": 2}}, "start": {"lora_r": 3}},
            "lora_r is 3, which is outside",
        ),
        ({"search": {"lora_r": {"low": 2, "high": 8}}, "start": {"lora_r": 2.0}}, "lora_r is 2.0, which is outside"),
        ({"search": {"lora_r": [2, "2"]}, "start": {}}, "two or more different choices"),
        ({"search": {"dataset_name": ["a", "b"]}, "start": {}}, "dataset_name decides what trials are compared on"),
        (
            {"search": {"push_to_hub": [True, False]}, "start": {}},
            "push_to_hub decides|push_to_hub .*cannot be searched",
        ),
        ({"trial_options": {"lora_r": 4}}, "lora_r is searched: take it out of trial_options"),
        ({"options": {"eval_splits": {}}}, "eval_splits: expected text, got {}"),
        ({"metric": "vqa_accuracy"}, "metric: vqa_accuracy is none of the task caption"),
        ({"pruner": "median"}, "pruner: median reads the scores during training"),
        ({"validation": " "}, "validation: expected a share above 0"),
        ({"output_dir": "a\0b"}, "output_dir: expected text"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(search_file, monkeypatch, changes, message):
    monkeypatch.setattr(tune, "start", lambda *given: pytest.fail("Something ran."))
    monkeypatch.setattr(cells, "start", lambda *given: pytest.fail("Something ran."))
    with pytest.raises((ValueError, OSError, SystemExit), match=message):
        tune.main(["--config", str(search_file(**changes))])


def journal(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return optuna.load_study(study_name=tune.STUDY, storage=storage).get_trials()


def test_killed_search_goes_on_without_losing_or_repeating_a_trial(tmp_path, search_file, monkeypatch, capsys):
    """SIGKILL while trial 2 runs: it keeps its number and its values, and a failed trial counts as one."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE_RUN)
    config, folder = search_file(), tmp_path / "tune"
    program = (
        f"import sys; from vlm_peft.studies import cells, tune; cells.PROGRAM = [sys.executable, {str(script)!r}]; "
        f"tune.main(['--config', {str(config)!r}])"
    )
    search = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    for _ in range(6000):
        if (folder / "trials/0002/runs").exists() or search.poll() is not None:
            break
        time.sleep(0.02)
    os.kill(search.pid, signal.SIGKILL)
    assert search.wait() == -signal.SIGKILL
    left = journal(folder)
    assert [trial.state.name for trial in left] == ["COMPLETE", "FAIL", "RUNNING"]
    (folder / "trials/go").touch()

    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, str(script)])
    assert tune.main(["--config", str(config), "--jobs", "2"]) == 0
    trials = journal(folder)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [trial.params for trial in trials[:3]] == [trial.params for trial in left]
    assert [(folder / f"trials/{number:04d}/runs").read_text() for number in range(TRIALS)] == ["x"] * TRIALS
    assert trials[0].params == {"learning_rate": 1e-5, "lora_r": 2}
    for trial in (trials[0], *trials[2:]):
        assert trial.value == trial.params["learning_rate"]
    best = max((trials[0], *trials[2:]), key=lambda trial: trial.value)
    found = json.loads((folder / "tune.json").read_text())
    assert found["best"]["number"] == best.number
    assert found["gain"][0] == pytest.approx(best.value - 1e-5)
    options = yaml.safe_load((folder / "best.yaml").read_text())
    assert options["learning_rate"] == best.params["learning_rate"]
    assert options["eval_splits"] == ["test"]
    said = capsys.readouterr().out
    assert f"Trial {best.number} of {TRIALS} is the best on rows held back from training" in said
    page = (folder / "tune.html").read_text()
    assert page.count("<svg") == 2
    assert "learning_rate:" in page

    # Again: nothing is run, and another search does not go on from this one's trials.
    assert tune.main(["--config", str(config)]) == 0
    assert (folder / "best/runs").read_text() == "x"
    assert len(journal(folder)) == TRIALS
    with pytest.raises(ValueError, match="holds a search that differs in validation"):
        tune.main(["--config", str(search_file(validation=0.5))])


def test_trials_are_real_runs_that_never_read_the_test_split(tmp_path, search_file, monkeypatch):
    monkeypatch.setattr(StopOnSignal, "on_train_begin", lambda self, *args, **kwargs: None)

    def run(arguments, log, place=None, module=cells.__name__):
        folder, *others = arguments
        if module == tune.__name__:
            return None if tune.run_trial(Path(folder), others[0], int(others[1]), others[2]) == 0 else "failed"
        return None if cells.main(arguments) == 0 else "failed"

    monkeypatch.setattr(tune, "start", run)
    monkeypatch.setattr(cells, "start", run)
    watched = {"eval_strategy": "steps", "eval_steps": 1, "eval_samples": 2, "metric_for_best_model": "CIDEr"}
    config = search_file(trials=2, pruner="median", trial_options=watched)
    assert tune.main(["--config", str(config)]) == 0
    folder = tmp_path / "tune"
    for trial in journal(folder):
        assert list(trial.intermediate_values) == [1, 2]
        run_folder = folder / f"trials/{trial.number:04d}"
        assert [path.name for path in (run_folder / "eval").iterdir()] == ["train-25"]
        data = json.loads((run_folder / "run_summary.json").read_text())["data"]
        assert set(data) == {"train", "train-25"}
    scores = sorted(path.parent.name for path in (folder / "best/eval").glob("*/scores.json"))
    assert scores == ["test", "test-blind"]
    whole = json.loads((folder / "best/run_summary.json").read_text())["data"]
    assert whole["train"]["rows"] == data["train"]["rows"] + data["train-25"]["rows"]


def test_pruner_ends_a_trial_that_is_worse(tmp_path):
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    study = optuna.create_study(
        storage=storage, direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1)
    )
    first = study.ask()
    first.report(0.9, 1)
    study.tell(first, 0.9)
    number = study.ask().number
    reports = tune.ReportScores(study, number)

    class Arguments:
        metric_for_best_model = "CIDEr"

    class State:
        global_step = 1

    with pytest.raises(tune._Pruned):
        reports.on_evaluate(Arguments, State, None, {"eval_CIDEr": 0.1})
    assert study.get_trials()[number].intermediate_values == {1: 0.1}


def test_values_that_do_not_go_together_are_a_failed_trial(tmp_path, search_file, monkeypatch, capsys):
    script = tmp_path / "fake.py"
    script.write_text(FAKE_RUN)
    monkeypatch.setattr(cells, "PROGRAM", [sys.executable, str(script)])
    # Without LoRA there is no LoRA+.
    together = {"learning_rate": [0.1, 0.2], "loraplus_lr_ratio": [4, 16], "strategy": ["lora", "projector"]}
    start = {"learning_rate": 0.1, "loraplus_lr_ratio": 4, "strategy": "lora"}
    # The seed is too large for NumPy.
    config = search_file(search=together, start=start, trials=8, seed=2**40, sampler="random")
    (tmp_path / "tune/trials").mkdir(parents=True)
    (tmp_path / "tune/trials/go").touch()
    assert tune.main(["--config", str(config), "--jobs", "1000000"]) == 0
    trials = journal(tmp_path / "tune")
    assert len(trials) == 8
    refused = [trial for trial in trials if trial.params["strategy"] == "projector"]
    assert refused
    assert {trial.state.name for trial in refused} == {"FAIL"}
    assert f"trial {refused[0].number}: failed: tune.py: {refused[0].number:04d}: " in capsys.readouterr().out


def test_the_demos_search_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = tune.read_search("recipes/configs/tune_demo.yaml", str(tmp_path))
    tune.check_bounds(options, tune.distributions(options), "tune.py")
    assert options.trials == 12
    cells.prepare([tune.best_cell(options, options.start)], "tune.py")


def test_a_trial_that_ended_since_the_journal_was_read_is_not_run_again(tmp_path, search_file, monkeypatch):
    config = search_file(search={"learning_rate": [0.1, 0.2]}, start={"learning_rate": 0.1}, trials=2)
    options = tune.read_search(str(config), str(tmp_path))
    space = tune.distributions(options)
    study = optuna.create_study(direction="maximize")
    (tmp_path / "tune/trials").mkdir(parents=True)
    first = study.ask()
    read = study.get_trials(deepcopy=True)
    study.tell(first, 0.1)
    now, stale = study.get_trials, [read]
    monkeypatch.setattr(study, "get_trials", lambda **options: stale.pop() if stale else now(**options))
    with tune.claim(study, options, space) as claimed:
        assert claimed is not None
        assert claimed[0] == 1
