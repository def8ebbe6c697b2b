"""METEOR and SPICE: pycocoevalcap's wrappers of two Java programs, run in a process that may be killed.

pycocoevalcap's `Meteor` waits for ever after a line that Java answers with something other than a number (its `__del__`
takes a lock that the failed call still holds), and its `Spice` downloads 384 MB and writes into site-packages. So each
runs in a child process with a time limit, on text that has been normalised, and SPICE only where its models already
lie.

This file is also the child's script: `java_scorers.py METEOR|SPICE INPUT.json OUTPUT.json`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

JavaScorer = Literal["METEOR", "SPICE"]

_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class ScorerUnavailableError(RuntimeError):
    """A Java scorer cannot run here or failed; the message says why in one line."""


def score_with_java(
    scorer: JavaScorer, predictions: Sequence[str], references: Sequence[Sequence[str]], time_limit: float | None = None
) -> float:
    """Return METEOR or SPICE, both in 0..1, of tokenised captions.

    Args:
        scorer: Which one.
        predictions: One tokenised caption for each picture.
        references: At least one tokenised caption for each picture.
        time_limit: Seconds for everything, Java's start included; by default 120 and 0.1 for each picture (METEOR takes
            6 and 0.004 on one core).

    Raises:
        ScorerUnavailableError: if there is no Java, no model, an error, or no result in time.
    """
    # Not at the top: the child runs this file as a script, outside of any package.
    from .java_process import find_java, package_folder, run_java

    if find_java() is None:
        raise ScorerUnavailableError("needs Java, and PATH has no program `java`")
    missing = [name for name in _SPICE_MODELS if not (package_folder() / "spice" / "lib" / name).is_file()]
    if scorer == "SPICE" and missing:
        raise ScorerUnavailableError(f"needs {' and '.join(missing)} in {Path('pycocoevalcap', 'spice', 'lib')}")
    if time_limit is None:
        time_limit = 120 + 0.1 * len(predictions)
    with tempfile.TemporaryDirectory(prefix="coco-caption-") as folder:
        source, target = Path(folder, "captions.json"), Path(folder, "score.json")
        source.write_text(json.dumps([list(predictions), [list(r) for r in references]]), encoding="utf-8")
        command = [sys.executable, "-P", str(Path(__file__).resolve()), scorer, str(source), str(target)]
        try:
            run_java(command, time_limit=time_limit, folder=Path(folder))
            return float(json.loads(target.read_text(encoding="utf-8")))
        except (OSError, RuntimeError, ValueError) as error:  # a TimeoutError is an OSError
            raise ScorerUnavailableError(str(error)) from error


def _run_scorer(scorer: str, source: Path, target: Path) -> None:
    predictions, references = json.loads(source.read_text(encoding="utf-8"))
    hypotheses = {index: [caption] for index, caption in enumerate(predictions)}
    truth = dict(enumerate(references))
    if scorer == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor

        score, _ = Meteor().compute_score(truth, hypotheses)
    else:
        from pycocoevalcap.spice import spice

        # Joined to the package's folder there: an absolute path takes its place, so nothing is written into
        # site-packages.
        spice.TEMP_DIR, spice.CACHE_DIR = str(target.parent / "temporary"), str(target.parent / "cache")
        score, _ = spice.Spice().compute_score(truth, hypotheses)
    target.write_text(json.dumps(float(score)), encoding="utf-8")


if __name__ == "__main__":
    try:
        _run_scorer(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        # Here and at once: when `error` goes, so does the failed Meteor, whose __del__ waits for ever.
        os._exit(1)
