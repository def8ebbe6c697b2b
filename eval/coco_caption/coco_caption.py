"""Local `evaluate` metric: coco-caption's scores, offline.

`evaluate.load("eval/coco_caption").compute(predictions=[...], references=[[...], ...])` returns the dict that
`vlm_peft.metrics.captions.score_captions` calls `metrics`. `evaluate` copies this file to its cache and runs the copy,
which finds the installed package.
"""

import datasets
import evaluate

from vlm_peft.metrics.caption_tokenizer import Tokenizer
from vlm_peft.metrics.captions import score_captions

_DESCRIPTION = (
    "BLEU-1..4, ROUGE-L, CIDEr and, on request, METEOR and SPICE of image captions, by coco-caption's scorers."
)
_INPUTS = """
Args:
    predictions: list of captions, one for each picture.
    references: list of lists of captions, at least one for each picture.
    tokenizer: auto (default), ptb-java or treebank-python.
    meteor, spice: also these two, which need Java (default False).
Returns:
    dict of Bleu_1..Bleu_4, ROUGE_L (0..1), CIDEr (0..10) and, where asked for and available, METEOR and SPICE (0..1).
"""
_CITATION = "Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv:1504.00325, 2015."


class CocoCaption(evaluate.Metric):
    """coco-caption's scores as an `evaluate` metric; see the module's text."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        tokenizer: Tokenizer = "auto",
        meteor: bool = False,
        spice: bool = False,
    ) -> dict[str, float]:
        scores = score_captions(predictions, references, tokenizer=tokenizer, meteor=meteor, spice=spice)
        return scores.metrics
