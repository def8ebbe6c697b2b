"""Caption metrics of coco-caption: tokenizer, scorers, and the local `evaluate` module `coco_caption`.

The code lies in this folder, and its modules import each other relatively, because `evaluate.load` copies a metric's
script and the files it imports relatively to a cache and runs the copy: nothing outside this folder is found from
there.
"""
