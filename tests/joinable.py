"""What can be joined: README's tables, measured on tiny models of each architecture.

    python tests/joinable.py                     # joins, trains, generates and exports each; prints the table
    python tests/joinable.py --readme README.md  # and writes it between the file's two marks

The models and the measurements are those of the tests (`tests/tiny_decoders.py`, `tests/joined.py`,
`tests/tiny_encoders.py`): random weights, a few layers, on a CPU. It takes two minutes.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vlm_peft.console import quiet_imports, quiet_progress, run_script

BEGIN, END = "<!-- joinable.py writes from here -->", "<!-- to here -->"


@dataclass(frozen=True)
class Found:
    """One line of the table.

    Args:
        name (`str`): Of the architecture.
        layout (`str`): How rows are laid out.
        difference (`float`): Largest of the loss and of all gradients, against separate samples.
        generates (`bool`): Whether cached greedy answers equal uncached ones, and beams of a batch those of one prompt.
        merged, llava (`bool`): Whether it exports, which compares what was written with its source.
    """

    name: str
    layout: str
    difference: float
    generates: bool
    merged: bool
    llava: bool


def measure_decoder(name: str, vision: Path, folder: Path) -> Found:
    """Takes one decoder from joining to export.

    Args:
        name (`str`): Of `tiny_decoders.DECODERS`.
        vision (`Path`): Of the encoder.
        folder (`Path`): Where all is written.
    """
    import joined
    from tiny_decoders import save_decoder

    from vlm_peft import VisionQwen, VisionQwenProcessor
    from vlm_peft.adapters.export import check_llava, export_llava, export_merged
    from vlm_peft.data.probe import probe
    from vlm_peft.training.callbacks import PrintedLines

    text = save_decoder(name, folder / "decoder")
    model = VisionQwen.from_vision_text_pretrained(vision, text)
    model.model.vision_tower.requires_grad_(False)
    processor = VisionQwenProcessor.from_vision_text_pretrained(vision, text, model.config)
    features = joined.make_features(model)
    sharing = probe(model).sharing
    difference = joined.largest_difference(model, processor, features, sharing=sharing)
    trainer = joined.make_trainer(model, processor, features, folder / "adapter")
    trainer.pop_callback(PrintedLines)
    trainer.train()
    trainer.save_model(folder / "adapter")
    trained = trainer.model.eval()
    beams = joined.answers(trained, processor, features, num_beams=3)
    generates = joined.answers(trained, processor, features) == joined.uncached_answers(
        trained, processor, features
    ) and beams == joined.answers(trained, processor, features, num_beams=3, batch_size=1)
    export_merged(folder / "adapter", folder / "merged")
    try:
        check_llava(model.config)
    except ValueError:
        llava = False
    else:
        export_llava(folder / "adapter", folder / "llava")
        llava = True
    layout = "shared prefixes, packed" if sharing else "one text a sequence"
    return Found(name, layout, difference, generates, True, llava)


def refusal(name: str, vision: Path, folder: Path) -> str:
    """What is said when a decoder is joined that cannot be.

    Raises:
        RuntimeError: When it can.
    """
    from tiny_decoders import save_decoder

    from vlm_peft import VisionQwen
    from vlm_peft.data.probe import probe

    try:
        probe(VisionQwen.from_vision_text_pretrained(vision, save_decoder(name, folder / "decoder")))
    except ValueError as error:
        return str(error)
    raise RuntimeError(f"{name} is expected to be refused, and can be joined.")


def decoder_table(found: list[Found], refused: dict[str, str]) -> str:
    """The Markdown of all decoders."""
    lines = ["| decoder | rows | difference | generation | `--to merged` | `--to llava` |", "|---|---|---|---|---|---|"]
    for each in found:
        ticks = " | ".join("yes" if value else "no" for value in (each.generates, each.merged, each.llava))
        lines.append(f"| {each.name} | {each.layout} | {each.difference:.0e} | {ticks} |")
    lines += ["", "Refused in one line:", ""]
    lines += [f"- {name}: {message}" for name, message in refused.items()]
    return "\n".join(lines)


def encoder_table(decoder: Path, folder: Path) -> str:
    """Joins each encoder with one decoder, trains it on cached features, saves, loads and generates; the Markdown.

    Args:
        decoder (`Path`): Of the decoder.
        folder (`Path`): Where all is written.
    """
    from tiny_encoders import ENCODERS, examine, save_encoder

    lines = [
        "| encoder | tokens before and of the patches | cached against encoded | generation | `--to llava` |",
        "|---|---|---|---|---|",
    ]
    for name, make in ENCODERS.items():
        kind, own = make(), folder / name
        with contextlib.redirect_stdout(io.StringIO()):  # the trainer's lines
            found = examine(save_encoder(kind, own / "encoder"), decoder, own, image_size=kind.image_size)
        patches = found.features.shape[1]
        cells = [
            f"{kind.prefix} + {patches}",
            f"{max(found.cached, found.reloaded):.0e}",
            "yes" if found.generated == 3 else "no",
            "no" if found.export else "yes",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(f"{name}: {kind.prefix} + {patches}", file=sys.stderr)
    return "\n".join(lines)


def write_between_marks(readme: Path, text: str) -> None:
    """Replaces what stands between the two marks of a file.

    Raises:
        SystemExit: When a mark is missing.
    """
    content = readme.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise SystemExit(f"joinable.py: {readme}: expected the lines {BEGIN} and {END}, once each.")
    before, _, rest = content.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Measures all, prints the table, and writes it when asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readme", type=Path, help="File with the two marks.")
    arguments = parser.parse_args()
    quiet_imports()
    quiet_progress(is_main=False)

    from conftest import save_bases
    from tiny_decoders import DECODERS, REFUSED

    found, refused = [], {}
    with tempfile.TemporaryDirectory() as folder:
        vision, decoder = save_bases(Path(folder))
        encoders = encoder_table(decoder, Path(folder) / "encoders")
        for name in DECODERS:
            found.append(measure_decoder(name, vision, Path(folder) / name))
            print(f"{name}: {found[-1].layout}, {found[-1].difference:.0e}", file=sys.stderr)
        for name in REFUSED:
            refused[name] = refusal(name, vision, Path(folder) / name)
    text = f"{encoders}\n\n{decoder_table(found, refused)}"
    print(text)
    if arguments.readme is not None:
        write_between_marks(arguments.readme, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main, "joinable.py"))
