"""Show what the model will really see: rows laid out for training, token by token, with their labels.

    python eval/inspect_data.py --config recipes/configs/demo.yaml                       # eight rows, in the terminal
    python eval/inspect_data.py --config recipes/configs/demo.yaml --html page.html      # and as a page
    python eval/inspect_data.py --config ... --rows 3 --split test --ids --max_length 512

Tokens that are learnt are green in a terminal and in [brackets] elsewhere. They are marked where the labels are, not
where they should be. A label that is not the next token is shown as {what the label says}. Options of the recipe count,
too. Neither the encoder nor the decoder is loaded.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..console import quiet_imports

NO_LABEL = -100
PERCENTILES = (0, 5, 50, 95, 99, 100)
_BARS = 12
_NOTHING = -1  # in the place of a token where there is none
_STREAMED_ROWS = 1000
_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[41;97m", "\x1b[0m"


@dataclass(frozen=True)
class Piece:
    """What is shown as one: a token, the tokens of one character, or all tokens of a picture."""

    text: str
    ids: list[int]
    learnt: bool = False
    """Whether a label says this token."""
    label: str | None = None
    """What the label says where it says another token."""
    is_picture: bool = False

    @property
    def kind(self) -> str:
        """What the page shows it as."""
        return "picture" if self.is_picture else "wrong" if self.label is not None else "learnt" if self.learnt else ""


@dataclass(frozen=True)
class Laid:
    """A laid-out sequence: what all branches share, and the branches."""

    prefix: list[Piece]
    branches: list[list[Piece]]
    tokens: int
    """Of the sequence as it is trained on."""
    labels: int
    wrong: int
    """Labels that are not the next token of their branch."""

    @property
    def described(self) -> str:
        """Its counts."""
        said = f"{self.tokens:,} tokens, {self.labels:,} labels, {len(self.branches)} branches"
        return said + (f", {self.wrong} LABELS ARE NOT THE NEXT TOKEN" if self.wrong else "")


@dataclass
class ShownRow:
    """A row, its pictures, and its sequences or why it has none."""

    name: str
    pictures: list = field(default_factory=list)
    """PIL images, or the reason why one cannot be read."""
    sequences: list[Laid] = field(default_factory=list)
    problem: str | None = None


@dataclass
class Inspected:
    """One split of one data set."""

    title: str
    facts: dict[str, str]
    lengths: list[int]
    """Tokens of each row before it is spread over several sequences."""
    max_length: int | None
    left_out: dict[str, list[str]]
    """Reason -> names of rows."""
    rows: list[ShownRow]

    @property
    def bins(self) -> list[tuple[int, int, int]]:
        """Of the lengths, see [`histogram`]."""
        return histogram(self.lengths)

    @property
    def percentiles(self) -> dict[int, int]:
        """Percent -> length."""
        return {percent: percentile(self.lengths, percent) for percent in PERCENTILES}

    @property
    def over(self) -> int:
        """Rows that are longer than a sequence."""
        return sum(self.max_length is not None and length > self.max_length for length in self.lengths)

    @property
    def share_over(self) -> str:
        """The same as a sentence."""
        if self.max_length is None:
            return "no max_length: every row is one sequence"
        total, percent = len(self.lengths), 100 * self.over / len(self.lengths)
        said = f"{self.over:,} of {total:,} rows ({percent:.1f} %) exceed max_length {self.max_length:,}"
        return said + ("; their texts are spread over several sequences" if self.over else "")

    @property
    def left_out_lines(self) -> list[str]:
        """One for each reason."""
        return [
            f"{len(names):,} row{'s' if len(names) > 1 else ''} left out ({', '.join(names[:5])}): {reason}"
            for reason, names in self.left_out.items()
        ] or ["no row is left out for its texts; pictures are opened by `vlm-peft doctor` and by the run"]

    @staticmethod
    def range(first: int, last: int) -> str:
        """A bin's name."""
        return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def read_layout(layout: dict, processor, picture_names: Sequence[str]) -> Laid:
    """Read a layout back, as the collator will get it.

    Args:
        layout: `input_ids`, `branch_ids` and `shift_labels` of `lay_out_row`.
        processor: Of the layout.
        picture_names: Of the row's pictures in order, for example 640x480.
    """
    parts: dict[int, list[tuple[int, int | None]]] = {0: []}
    # The label of the last position read in each branch: what its next token must be.
    awaited: dict[int, int] = {}
    for token, branch, label in zip(layout["input_ids"], layout["branch_ids"], layout["shift_labels"], strict=True):
        said = awaited.get(branch, NO_LABEL)
        parts.setdefault(branch, []).append((token, None if said == NO_LABEL else said))
        awaited[branch] = label
    for branch, said in awaited.items():
        if said != NO_LABEL:
            # The last token of a branch is only predicted, and no input; after the prefix there is no one next token.
            parts[branch].append((said if branch else _NOTHING, said))
    names = iter(picture_names)
    pieces = {branch: list(_pieces(tokens, processor, names)) for branch, tokens in parts.items()}
    labels = [label for label in layout["shift_labels"] if label != NO_LABEL]
    wrong = sum(label is not None and label != token for tokens in parts.values() for token, label in tokens)
    prefix = pieces.pop(0)
    return Laid(prefix, list(pieces.values()), len(layout["input_ids"]), len(labels), wrong)


def _pieces(tokens: list[tuple[int, int | None]], processor, names: Iterator[str]) -> Iterator[Piece]:
    """Pieces of (token, label) pairs."""
    decode, image, each = processor.tokenizer.decode, processor.image_token_id, processor.num_image_tokens
    place = 0
    while place < len(tokens):
        token, label = tokens[place]
        if token == image and label is None:
            count = 1
            while count < each and tokens[place + count : place + count + 1] == [(image, None)]:
                count += 1
            said = f"<{count} image tokens: picture {next(names, '?')}>"
            if count != each:
                said = f"<{count} image tokens, expected {each}>"
            yield Piece(said, [token] * count, is_picture=True)
            place += count
            continue
        if label is not None and label != token:
            given = [] if token == _NOTHING else [token]
            yield Piece(decode(given), given, label=decode([label]))
            place += 1
            continue
        # Up to four tokens may be the bytes of one character.
        count = 1
        while (
            count < 4
            and decode([token for token, _ in tokens[place : place + count]]).endswith("\ufffd")
            and place + count < len(tokens)
            and (tokens[place + count][1] is None) == (label is None)
            and tokens[place + count][1] in (None, tokens[place + count][0])
        ):
            count += 1
        ids = [token for token, _ in tokens[place : place + count]]
        if "\ufffd" in decode(ids):
            ids = ids[:1]
        yield Piece(decode(ids), ids, learnt=label is not None)
        place += len(ids)


def inspect(vision, training, processor, source, split_name: str, count: int) -> Inspected:
    """Lay out all rows of a split, and read some of them back.

    Args:
        vision, training: The run's options.
        processor: Of its bases.
        source: The data set's own options.
        split_name: Of the split.
        count: Rows to show, evenly spread.

    Raises:
        ValueError: if the split or a column is not there, or no row can be used.
        OSError: if the data set is not there.
    """
    from ..data.pictures import UnreadablePictureError
    from ..data.rows import lay_out_row
    from ..data.splits import row_name
    from ..training.data import Part, encode_split, row_lengths

    part = Part(source, split_name, is_held_out=split_name != source.train_split)
    split = part.load_first(processor, _STREAMED_ROWS) if vision.streaming else part.load(processor)
    encoded = encode_split(split, processor, training, whole=True)
    lengths = row_lengths(encoded.dataset)
    if training.max_length is not None and max(lengths) > training.max_length:
        encoded = encode_split(split, processor, training)

    rows = []
    total = len(split.texts)
    for index in sorted({place * total // min(count, total) for place in range(min(count, total))}):
        row = split.texts[index]
        shown = ShownRow(row_name(row))
        images = list(split.pictures.of_row(index))
        for image in images:
            try:
                shown.pictures.append(split.pictures.open(image))
            except UnreadablePictureError as error:
                shown.pictures.append(str(error))
        names = [each if isinstance(each, str) else "{}x{}".format(*each.size) for each in shown.pictures]
        try:
            layouts = lay_out_row(split.task.example(row), processor, images, training.max_length)
            shown.sequences = [read_layout(layout, processor, names) for layout in layouts]
        except ValueError as error:
            shown.problem = str(error)
        rows.append(shown)
    facts = {
        "data set": str(source.dataset_name),
        "split": split_name,
        "rows": f"{total:,}, with {len(split.pictures):,} pictures",
        "columns": ", ".join(sorted({*split.texts.column_names, *split.task.image_columns})),
        "a picture": f"{processor.num_image_tokens} image tokens, {_pixels(processor)} pixels",
        "max_length": "none" if training.max_length is None else f"{training.max_length:,} tokens",
    }
    return Inspected(split.task.name, facts, lengths, training.max_length, encoded.dropped, rows)


def _pixels(processor) -> str:
    given = processor.image_processor
    size = given.crop_size if getattr(given, "do_center_crop", False) else given.size
    # Some name one edge of a square.
    edge = size.get("shortest_edge")
    return f"{size.get('width') or edge}x{size.get('height') or edge}"


def percentile(lengths: Sequence[int], percent: float) -> int:
    """Return the smallest length that so many percent of the rows do not exceed."""
    ordered = sorted(lengths)
    return ordered[max(0, -int(-percent * len(ordered) // 100) - 1)]


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first length, last length, rows) of bins of equal width."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(low + place * width, low + (place + 1) * width - 1, count) for place, count in enumerate(counts)]


def as_text(inspected: Inspected, *, colours: bool = False, ids: bool = False) -> str:
    """Return everything as lines for a terminal.

    Args:
        inspected: What to show.
        colours: Marks with colours instead of brackets.
        ids: Adds the token ids.
    """
    lines = [inspected.title, *(f"  {name:<10}  {printable(value)}" for name, value in inspected.facts.items()), ""]
    most = max(count for *_, count in inspected.bins)
    bars = [
        [inspected.range(first, last), f"{count:,}", "#" * -(-30 * count // most)]
        for first, last, count in inspected.bins
    ]
    width = max(len(first) for first, *_ in bars)
    lines += ["tokens a row", *(f"  {name:>{width}}  {count:>8}  {bar}" for name, count, bar in bars)]
    lines.append("  " + "  ".join(f"{percent} %: {length:,}" for percent, length in inspected.percentiles.items()))
    lines += [inspected.share_over, *inspected.left_out_lines]
    for row in inspected.rows:
        lines += ["", f"row {printable(row.name)}"]
        lines += [f"  cannot be read: {printable(each)}" for each in row.pictures if isinstance(each, str)]
        if row.problem is not None:
            lines.append(f"  left out: {printable(row.problem)}")
        for number, sequence in enumerate(row.sequences, 1):
            several = f"sequence {number} of {len(row.sequences)}: " if len(row.sequences) > 1 else ""
            lines.append(f"  {several}{sequence.described}")
            lines += _tree(sequence, colours, ids)
    return "\n".join(lines)


def _tree(sequence: Laid, colours: bool, ids: bool) -> list[str]:
    parts = [("", "prefix", sequence.prefix)]
    parts += [("├─ ", f"branch {number}", branch) for number, branch in enumerate(sequence.branches, 1)]
    parts[-1] = ("└─ ", *parts[-1][1:])
    lines = []
    for edge, name, pieces in parts:
        head = f"  {edge}{name}"
        bar = "  │  " if edge != "└─ " else "     "
        lines.append(head)
        lines += [f"{bar} {line}" for line in _marked(pieces, colours).split("\n")]
        if ids:
            lines.append(f"{bar} ids {' '.join(_ids(piece) for piece in pieces)}")
    return lines


def _marked(pieces: list[Piece], colours: bool) -> str:
    """Text of pieces with runs of labelled ones marked."""
    said, is_open = "", False
    start, end = (_GREEN, _PLAIN) if colours else ("[", "]")
    for number, piece in enumerate(pieces):
        if piece.learnt != is_open:
            said += start if piece.learnt else end
            is_open = piece.learnt
        text = printable(piece.text)
        if piece.label is not None:
            label = printable(piece.label)
            text += f"{_RED}{label}{_PLAIN}" if colours else f"{{{label}}}"
        # Lines of the text stay lines; a branch that begins with the end of one needs no line for that.
        said += text.replace("⏎", f"⏎{end}\n{start}" if is_open else "⏎\n") if number else text
    return (said + (end if is_open else "")).removesuffix("\n")


def _ids(piece: Piece) -> str:
    if piece.is_picture:
        return f"{len(piece.ids)}x{piece.ids[0]}"
    said = " ".join(map(str, piece.ids))
    return f"[{said}]" if piece.learnt else said


def printable(text: str) -> str:
    """Return text without anything that would move a terminal's cursor; ends of lines are shown as ⏎."""
    shown = (each if each.isprintable() else "⏎" if each == "\n" else f"\\u{ord(each):04x}" for each in text)
    return "".join(shown)


def as_page(all_inspected: Sequence[Inspected], title: str, *, ids: bool = False) -> str:
    """Return one HTML page that loads nothing; all that comes from the data is escaped.

    Args:
        all_inspected: What to show.
        title: Of the page.
        ids: Shows the token ids beside the tokens; they are in the tokens' titles anyway.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from ..report.gallery import thumbnail
    from ..report.pages import description, page

    folder = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["printable"] = printable
    body = templates.get_template("inspect.html.jinja").render(
        inspected=all_inspected,
        title=title,
        ids=ids,
        description=lambda facts: Markup(description(facts)),
        address=lambda picture: thumbnail(picture).address,
    )
    style = (folder / "inspect.css").read_text(encoding="utf-8")
    return page(title, body).replace("</style>", f"{style}</style>", 1)


def parse_arguments(arguments: list[str], program: str) -> tuple[argparse.Namespace, list[str]]:
    """Return our own options, and the recipe's."""
    parser = argparse.ArgumentParser(
        program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=8, help="rows to show of each data set, evenly spread (default: 8)")
    parser.add_argument("--split", help="which split (default: the one that is trained on)")
    parser.add_argument("--html", type=Path, metavar="PAGE.html", help="also write a page")
    parser.add_argument("--ids", action="store_true", help="show token ids")
    options, rest = parser.parse_known_args(arguments)
    if options.rows < 1:
        parser.error(f"--rows: expected at least 1, got {options.rows}")
    return options, rest


def main(arguments: list[str] | None = None, program: str = "inspect_data.py") -> int:
    """Show rows; return the exit status."""
    options, rest = parse_arguments(sys.argv[1:] if arguments is None else arguments, program)
    quiet_imports()
    from ..training.arguments import parse_arguments as parse_recipe
    from ..training.setup import load_processor, sources

    # Rows are the same on every device, and a configuration for a GPU is refused without one.
    vision, training, model = parse_recipe([*rest, "--use_cpu", "true"], program=program)
    processor, _ = load_processor(vision, model)
    chosen = [source for source in sources(vision) if options.split or source.train_split]
    if not chosen:
        raise ValueError("train_split is null everywhere: name a split with --split.")
    found = []
    for source in chosen:
        name = str(options.split or source.train_split)
        found.append(inspect(vision, training, processor, source, name, options.rows))
        print("\n" + as_text(found[-1], colours=sys.stdout.isatty(), ids=options.ids), flush=True)
    if options.html:
        from ..evaluation.records import write_text

        title = f"What {Path(str(training.output_dir)).name} sees"
        write_text(options.html, as_page(found, title, ids=options.ids))
        print(f"\nPage: {options.html}")
    return 1 if any(sequence.wrong for each in found for row in each.rows for sequence in row.sequences) else 0
