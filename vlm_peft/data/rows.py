"""Data: load rows by name, and encode them as shared-prefix rows.

Stage: data set on the Hub or on disk -> rows -> laid-out token ids with picture numbers.
"""

import glob
import inspect
import json
import logging
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Json,
    List,
    Value,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.inspect import SplitsNotFoundError
from huggingface_hub import HfFileSystem, constants, hf_hub_download, snapshot_download

from ..hub.access import looks_local
from ..model import processing_vision_qwen, shared_prefix
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..tasks import Example, Task
from ..tasks import example as example_module
from ..tasks.example import PICTURE_PLACES
from .groups import group_rows
from .pictures import Pictures, UnreadablePictureError, is_path, picture_places
from .tables import TABLES, check_parquet, class_names, metadata_files, open_tables, split_files

logger = logging.getLogger(__name__)

# Builders of `datasets` for folders of tables.
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}

LAYOUT_COLUMNS = ("input_ids", "position_ids", "branch_ids", "shift_labels", "image_ids", "row", "num_branches")


def locate(name: str, split: str, revision: str | None = None, *, streaming: bool = False) -> dict:
    """What `datasets.load_dataset` must be told to find a data set.

    Args:
        name (`str`): See [`load_rows`].
        split (`str`): As stored; checked.
        revision (`str`, *optional*): Of a Hub repository.
        streaming (`bool`, *optional*, defaults to `False`): Tables of text on the Hub are not fetched but left to
            `datasets`, which infers types.

    Raises:
        FileNotFoundError: When a local path does not exist.
        ValueError: When a file is no table, or the split is not there; lists those that are.
    """
    path = Path(name).expanduser()
    if path.is_file():
        kind = path.suffix.lower()
        if kind not in (*TABLES, ".parquet"):
            raise ValueError(
                f"Expected a table ({', '.join((*TABLES, '.parquet'))}), or a folder of tables or pictures, got the "
                f"file {name}."
            )
        if "+" in split:
            raise ValueError(f"One file holds one split, got {split!r}; --split_column names where it says more.")
        part = split.partition("[")[0]
        if kind in TABLES:
            return {"path": "tables", "data_files": {part: [path.absolute()]}}
        _check_literal([path])
        check_parquet(path)
        return {"path": "parquet", "data_files": {part: glob.escape(str(path))}}
    if not path.exists() and looks_local(name):
        raise FileNotFoundError(f"The data set {name} is not there: expected a table's file or a folder.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected a table's file or a folder, got {name}, which is neither.")
    where: dict
    if path.is_dir() and (metadata := metadata_files(path.absolute())):
        _tell_folder(name, f"pictures with their {metadata[0].name}")
        return {"path": "imagefolder", "folder": path.absolute(), "data_files": {"train": metadata}}
    if path.is_dir():
        kind, files = _folder_files(path)
        names = [Path(file).name for paths in files.values() for file in paths]
        shown = f"{', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}"
        _tell_folder(
            name,
            "pictures without texts, whose folders are labels" if kind == "imagefolder" else f"{kind} files ({shown})",
        )
        if _are_tables(kind, files):
            return {"path": "tables", "data_files": {part: list(map(Path, paths)) for part, paths in files.items()}}
        if kind in ("csv", "json"):
            # `datasets` would infer types.
            other = next(
                Path(file) for paths in files.values() for file in paths if Path(file).suffix.lower() not in TABLES
            )
            raise ValueError(f"{other} is no table ending in {', '.join(TABLES)}: unpack or rename it.")
        _check_literal([Path(file) for paths in files.values() for file in paths])
        where = {
            "path": kind,
            "data_files": {part: [glob.escape(str(file)) for file in paths] for part, paths in files.items()},
        }
    else:
        where = {"path": name}
        tables = None if streaming else _tables_of_hub(name, revision)
        if tables is not None:
            return {"path": "tables", "data_files": tables}
    try:
        splits = get_dataset_split_names(**where, revision=revision)
    except SplitsNotFoundError as error:
        # Of tars in which each sample has other endings, for example .jpg and .png: they would be other columns.
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name} cannot be read; give all of its samples the same kinds of files: {cause}") from error
    missing = [part for part in split.split("+") if part.partition("[")[0] not in splits]
    if missing:
        raise ValueError(f"The data set {name} has no split {missing[0]!r}; it has {', '.join(splits)}.")
    return {**where, "revision": revision}


def _check_literal(files: list[Path]) -> None:
    """Refuses paths in which `datasets` would put a variable's value for its name: it would read another file."""
    for file in files:
        if (other := os.path.expandvars(file.absolute())) != str(file.absolute()):
            raise ValueError(
                f"{file} cannot be read: `datasets` takes a $ and a name in a path for a variable, and would read "
                f"{other}; rename the file or its folder."
            )


@lru_cache
def _tell_folder(name: str, what: str) -> None:
    """Says once how a folder was read."""
    logger.info("%s is read as %s.", name, what)


def _are_tables(kind: str, files: dict[str, list]) -> bool:
    """Whether a builder's files are tables of text as they are, not compressed ones."""
    return kind in ("csv", "json") and all(
        Path(file).suffix.lower() in TABLES for paths in files.values() for file in paths
    )


def _tables_of_hub(name: str, revision: str | None) -> dict[str, list[Path]] | None:
    """The tables of text of a data set on the Hub, fetched; `None` when it is made of something else."""
    if constants.HF_HUB_OFFLINE:
        try:
            folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        except FileNotFoundError:
            return None
        if not any(path.suffix.lower() in TABLES for path in Path(folder).rglob("*")):
            return None
        kind, files = _folder_files(Path(folder))
        found = {str(part): list(map(Path, paths)) for part, paths in files.items()}
        return found if _are_tables(kind, files) else None
    builder = load_dataset_builder(name, revision=revision)
    files = {str(part): list(paths) for part, paths in (builder.config.data_files or {}).items()}
    if not files or not _are_tables(type(builder).__module__.rpartition(".")[2], files):
        return None
    return {part: list(map(_fetch, paths)) for part, paths in files.items()}


def _fetch(address: str) -> Path:
    """A file of the Hub on this disk, under its own name."""
    place: Any = HfFileSystem().resolve_path(address)
    return Path(hf_hub_download(place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision))


def _folder_files(path: Path) -> tuple[str, dict[str, list]]:
    """The builder of a folder, and the files of its splits: its tables, whatever lies beside them.

    A folder whose card lists its files, or without tables, is taken apart by `datasets`.
    """
    tables: dict[str, list[Path]] = {}
    for file in sorted(path.absolute().rglob("*")):
        inside = file.relative_to(path.absolute())
        hidden = any(part.startswith((".", "__")) for part in inside.parts)
        if file.suffix.lower() in _BUILDERS and file.name not in FILES_TO_IGNORE and not hidden and file.is_file():
            tables.setdefault(_BUILDERS[file.suffix.lower()], []).append(file)
    card = path / "README.md"
    if not tables or (card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace")):
        # By its files: `datasets` knows a folder whose README lists them by its name and README alone, and would give
        # the rows that a folder of that name had before.
        builder = load_dataset_builder(str(path))
        kind = type(builder).__module__.rpartition(".")[2]
        if kind == "imagefolder":
            _refuse_linked_folders(path.absolute())
        return kind, {str(part): list(paths) for part, paths in (builder.config.data_files or {}).items()}
    kind = max(tables, key=lambda kind: len(tables[kind]))
    if len(tables) > 1:
        others = [str(file.relative_to(path.absolute())) for each in tables if each != kind for file in tables[each]]
        logger.warning("Of the tables in %s, those of the kind %s are read; not %s.", path, kind, ", ".join(others[:5]))
    for file in tables[kind] if kind == "parquet" else ():
        check_parquet(file)
    return kind, split_files(tables[kind], path.absolute())


def _refuse_linked_folders(path: Path) -> None:
    """A class or a split that is a link: versions of fsspec leave it out, or follow it and read a folder twice."""
    for link in sorted(each for each in path.rglob("*") if each.is_symlink() and each.is_dir()):
        if not link.name.startswith((".", "__")):
            raise ValueError(
                f"{link} is a link to the folder {link.resolve()}, and a folder that names a class or a split is no "
                "link: put the folder itself there, or take the link out."
            )


def open_rows(name: str, split: str, revision: str | None = None, *, streaming: bool = False):
    """Opens a split: tables of text letter by letter, everything else as `datasets` reads it.

    Args:
        name, split, revision: See [`locate`].
        streaming (`bool`, *optional*, defaults to `False`): An `IterableDataset` instead of a `Dataset`.
    """
    where = locate(name, split, revision, streaming=streaming)
    if where["path"] == "tables" or "folder" in where:
        return open_tables(where["data_files"], split, folder=where.get("folder"), streaming=streaming)
    try:
        rows = load_dataset(**where, split=split, streaming=streaming)
    except DatasetGenerationError as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name} cannot be read; repair it, or download it again: {cause}") from error
    # Before rows of a stream are chosen: afterwards pictures would come decoded all the same.
    return rows.decode(False) if streaming else rows


def load_rows(
    name: str,
    split: str,
    *,
    revision: str | None = None,
    stored_split: str | None = None,
    split_column: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Loads one split.

    Args:
        name (`str`): Hub id, table (parquet, CSV, TSV, JSON or JSON Lines), folder of tables, or image folder with
            `metadata.jsonl`, `.csv` or `.parquet`.
        split (`str`): Which part: `"train"`, `"test"`, ...; `"train+restval"` are two parts, here and in
            `split_column`; `"train[:90%]"` are the first rows of a part.
        revision (`str`, *optional*): Of the Hub repository (`refs/convert/parquet` for those with a loading script).
        stored_split (`str`, *optional*): The split as stored when the true one is in `split_column`.
        split_column (`str`, *optional*): Column that names each row's true split (Flickr30k stores all rows as `test`).
        limit (`int`, *optional*): First so many rows only.

    Returns:
        `Dataset`: With a column `id` (the row number in the stored split when the data has none, or an ambiguous one),
            pictures undecoded until read.

    Raises:
        FileNotFoundError: When a local path does not exist.
        ValueError: When a file is no table, or the split is not there (lists those that are) or is empty.
    """
    names = split.split("+")
    stored = stored_split or (split if split_column is None else names[0])
    rows = name_classes(open_rows(name, stored, revision))
    if "id" in rows.column_names and len(set(map(str, rows["id"][:]))) < len(rows):
        # LLaVA's instructions have one id a picture: predictions could not be told apart.
        rows = rows.remove_columns("id")
    if "id" not in rows.column_names:
        # Before rows are selected: adding a column to a selection copies all its pictures to a new file.
        rows = rows.add_column("id", [str(index) for index in range(len(rows))])
    if split_column is not None:
        if split_column not in rows.column_names:
            raise ValueError(
                f"The data set {name} has no column {split_column!r}; it has {', '.join(sorted(rows.column_names))}."
            )
        labels = rows[split_column][:]
        missing = [part for part in names if part not in labels]
        if missing:
            raise ValueError(
                f"No row of {name} has {split_column} = {missing[0]!r}; found "
                f"{', '.join(sorted(set(map(str, labels))))}."
            )
        rows = rows.select([index for index, value in enumerate(labels) if value in names])
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"The split {split!r} of {name} has no rows.")
    return rows


def name_classes(rows):
    """Puts the names of classes for their numbers, in lists and dicts, too; no class (-1) is none.

    Args:
        rows (`Dataset` or `IterableDataset`): Any; without classes they are given back as they are.
    """
    found = {name: feature for name, feature in (rows.features or {}).items() if _has(feature, ClassLabel)}
    if not found:
        return rows
    features = Features(rows.features | {name: _named_feature(feature) for name, feature in found.items()})
    if isinstance(rows, Dataset):
        # As columns of their own: `map` would copy all pictures.
        for name, feature in found.items():
            cells = [class_names(cell, feature) for cell in rows[name][:]]
            rows = rows.remove_columns(name).add_column(name, cells, feature=features[name])
        return rows

    def name_cells(row: dict) -> dict:
        return {name: class_names(row[name], feature) for name, feature in found.items()}

    return rows.map(name_cells, features=features)


def _as_json(cell, feature):
    """A cell for a column of mixed types: of a text that is JSON itself `datasets` would store what it says."""
    if isinstance(feature, List) and isinstance(cell, list):
        return [_as_json(each, feature.feature) for each in cell] if _has(feature, Json) else cell
    if isinstance(feature, dict) and isinstance(cell, dict):
        return {name: _as_json(each, feature[name]) for name, each in cell.items()}
    return json.dumps(cell) if isinstance(feature, Json) and isinstance(cell, str) else cell


def _has(feature, kind: type) -> bool:
    if isinstance(feature, dict):
        return any(_has(each, kind) for each in feature.values())
    return _has(feature.feature, kind) if isinstance(feature, List) else isinstance(feature, kind)


def _is_decoded(feature) -> bool:
    """Whether reading a cell would open a picture, a sound, a film, ..."""
    if isinstance(feature, dict):
        return any(map(_is_decoded, feature.values()))
    if isinstance(feature, List):
        return _is_decoded(feature.feature)
    return hasattr(feature, "decode_example") and not isinstance(feature, Json)


def _named_feature(feature):
    if isinstance(feature, dict):
        return {name: _named_feature(each) for name, each in feature.items()}
    if isinstance(feature, List):
        return List(_named_feature(feature.feature))
    return Value("string") if isinstance(feature, ClassLabel) else feature


@dataclass(frozen=True)
class EncodedRows:
    """Rows ready for the collator.

    Args:
        dataset (`Dataset`): Columns of a laid-out row, `image_ids`, and `row`, its number in the source.
        dropped (`dict[str, list[str]]`): Reason -> ids of rows that were left out.
    """

    dataset: Dataset
    dropped: dict[str, list[str]]


def picture_folder(name: str, image_folder: str | None = None) -> Path | None:
    """Where the relative paths in a data set's picture columns begin.

    Args:
        name (`str`): See [`load_rows`].
        image_folder (`str`, *optional*): What the user says; else a table's own folder, and none on the Hub.

    Raises:
        FileNotFoundError: When `image_folder` is not there.
    """
    if image_folder is not None:
        folder = Path(image_folder).expanduser().resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"--image_folder {image_folder} is not there: expected the folder of the pictures.")
        return folder
    path = Path(name).expanduser().resolve()
    return path.parent if path.is_file() else path if path.is_dir() else None


def resolve_paths(rows, columns: list[str], folder: Path | None):
    """Puts a folder before the relative paths in columns of paths; other columns are left alone.

    Args:
        rows (`Dataset` or `IterableDataset`): Of which only columns of text, or of lists of text, can hold paths.
        columns (`list[str]`): With pictures.
        folder (`Path`, *optional*): Of [`picture_folder`].
    """
    features = rows.features or {}
    columns = [name for name in columns if _holds_text(features.get(name))]
    if folder is None or not columns:
        return rows

    def resolve(*cells: list) -> dict:
        return {name: [_join(folder, cell) for cell in column] for name, column in zip(columns, cells, strict=True)}

    return rows.map(resolve, batched=True, input_columns=columns, features=Features(features))


def _join(folder: Path, cell):
    if isinstance(cell, list):
        return [_join(folder, each) for each in cell]
    if cell == "":
        return None
    return os.path.join(folder, cell) if is_path(cell) else cell


def _holds_text(feature) -> bool:
    kind = feature.feature if isinstance(feature, List) else feature
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def bind_rows(rows: Dataset, task: Task, folder: Path | None = None) -> tuple[Dataset, Pictures]:
    """Takes rows apart into texts and pictures, after joining those that are about the same pictures.

    Args:
        rows (`Dataset`): Of [`load_rows`].
        task ([`~vlm_peft.tasks.Task`]): Rows about the same pictures become one row whose cells are lists (see
            [`~vlm_peft.data.groups.group_rows`]); with `id_column`, that column becomes `id` unless it names rows of
            several groups alike; with `pages`, texts get the column
            [`~vlm_peft.tasks.example.PICTURE_PLACES`]; with `complete`, those that it gives.
        folder (`Path`, *optional*): Of [`picture_folder`].

    Returns:
        `tuple[Dataset, Pictures]`: As many text rows as picture rows, in the order in which the groups begin.
    """
    # Of columns that no task reads, nothing is decoded: a broken mask ends no run, and audio needs no library.
    texts = rows.remove_columns(
        [name for name, feature in rows.features.items() if name in task.image_columns or _is_decoded(feature)]
    )
    if task.image_columns:
        rows = resolve_paths(rows.select_columns(task.image_columns), task.image_columns, folder)
    members = [[index] for index in range(len(texts))]
    if task.image_columns:
        members = group_rows(texts, rows, task)
    if task.id_column is not None:
        ids = texts[task.id_column][:]
        # Named alike, predictions could not be told apart: then the row's own id stays.
        if len({(str(ids[index]), number) for number, group in enumerate(members) for index in group}) == len(
            set(map(str, ids))
        ):
            texts = texts.remove_columns("id").add_column("id", ids)
    if task.group_key is not None or len(members) < len(texts):
        rows = rows.select([group[0] for group in members])

        def gather(_, places: list[int]) -> dict:
            flat = [index for place in places for index in members[place]]
            cells = texts[flat]
            ends = np.cumsum([len(members[place]) for place in places])[:-1]
            bounds = [0, *ends.tolist(), len(flat)]
            cells = {name: _as_json(column, List(features[name])) for name, column in cells.items()}
            return {name: [column[start:stop] for start, stop in pairwise(bounds)] for name, column in cells.items()}

        features = texts.features
        texts = texts.select([group[0] for group in members]).map(
            gather,
            batched=True,
            with_indices=True,
            remove_columns=texts.column_names,
            features=Features({name: List(feature) for name, feature in features.items()}),
            new_fingerprint=Hasher.hash((texts._fingerprint, members)),
            desc="Grouping rows by their pictures",
        )
    chosen = None
    if task.pages is not None:
        texts = texts.add_column(PICTURE_PLACES, picture_places(rows, task.image_columns))
        chosen = [task.pages(row) for row in texts]
    pictures = Pictures(rows, task.image_columns, chosen)
    if task.complete is not None:
        sizes = [[_size(pictures, image) for image in pictures.of_row(row)] for row in range(len(texts))]
        for name, cells in task.complete(texts, sizes).items():
            texts = texts.add_column(name, cells)
    return texts, pictures


def _size(pictures: Pictures, index: int) -> list[int]:
    """Width and height; [0, 0] of what cannot be read, which is refused together with the other unreadable pictures."""
    try:
        return pictures.size(index)
    except UnreadablePictureError:
        return [0, 0]


def encode_rows(
    rows: Dataset,
    task: Task,
    processor: VisionQwenProcessor,
    pictures: Pictures,
    *,
    max_length: int | None,
    unreadable: dict[int, str] | None = None,
    on_bad_row: str = "stop",
    num_proc: int | None = None,
    first_image: int = 0,
) -> EncodedRows:
    """Lays every row out, in sequences of `max_length` tokens at most.

    A row with too many completions for one sequence is spread over several, each with the pictures again; a row whose
    pictures and one completion do not fit is never cut.

    Args:
        rows (`Dataset`): Texts of [`bind_rows`]; image columns are left out where there are any.
        task ([`~vlm_peft.tasks.Task`]): Row -> example.
        processor ([`VisionQwenProcessor`]): Tokenizes.
        pictures ([`~vlm_peft.data.pictures.Pictures`]): Of the same rows; numbers the pictures.
        max_length (`int`, *optional*): Tokens of a sequence.
        unreadable (`dict[int, str]`, *optional*): Picture number -> why it cannot be read.
        on_bad_row (`str`, *optional*, defaults to `"stop"`): `"stop"` raises at rows that cannot be used, `"skip"`
            leaves them out and counts them.
        num_proc (`int`, *optional*): Processes.
        first_image (`int`, *optional*, defaults to 0): Number of the first picture, in a mixture of data sets.

    Returns:
        [`EncodedRows`].

    Raises:
        ValueError: With `on_bad_row="stop"`, naming the rows and the reasons; or when no row is left.
    """
    text = rows.remove_columns([name for name in task.image_columns if name in rows.column_names])
    columns = set(text.column_names)
    # The code that lays rows out counts, too: an upgrade never reads what an older version made.
    code = [inspect.getsource(module) for module in (processing_vision_qwen, shared_prefix, example_module)]
    code.append(inspect.getsource(sys.modules[task.example.__module__]))
    vocabulary = json.dumps(processor.tokenizer.get_vocab(), sort_keys=True)
    fingerprint = Hasher.hash(
        {
            "code": code,
            "rows": text._fingerprint,
            "task": task.example,
            "processor": processor.to_json_string(),
            "chat_template": processor.chat_template,
            "vocabulary": vocabulary,
            "max_length": max_length,
            "pictures": len(pictures),
            "first_image": first_image,
        }
    )

    def encode(batch: dict, indices: list[int]) -> dict:
        encoded: dict[str, list] = {name: [] for name in (*LAYOUT_COLUMNS, "problem")}
        for position, index in enumerate(indices):
            row = {name: batch[name][position] for name in columns}
            image_ids = [first_image + image for image in pictures.of_row(index)]
            try:
                layouts = lay_out_row(task.example(row), processor, image_ids, max_length)
            except ValueError as error:
                layouts = [{name: [] for name in LAYOUT_COLUMNS} | {"num_branches": 0, "problem": str(error)}]
            for layout in layouts:
                for name, value in {"problem": "", **layout, "row": index}.items():
                    encoded[name].append(value)
        return encoded

    dataset = text.map(
        encode,
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=text.column_names,
        new_fingerprint=fingerprint,
        num_proc=num_proc,
        desc="Tokenizing",
    )
    problems = {row: reason for row, reason in zip(dataset["row"][:], dataset["problem"][:], strict=True) if reason}
    unreadable = unreadable or {}
    for row in range(len(rows)) if unreadable else ():
        reasons = [unreadable[image] for image in pictures.of_row(row) if image in unreadable]
        if reasons:
            problems[row] = reasons[0]
    dropped: dict[str, list[str]] = {}
    for row, reason in sorted(problems.items()):
        row_id = text[row]["id"]
        dropped.setdefault(reason, []).append(str(row_id[0] if isinstance(row_id, list) else row_id))
    if dropped and on_bad_row == "stop":
        shown = "\n".join(
            f"  {len(ids)} rows ({', '.join(ids[:5])}): {reason}" for reason, ids in list(dropped.items())[:10]
        )
        raise ValueError(
            f"{len(problems)} of {len(rows)} rows cannot be used; repair them, or leave them out with --on_bad_row "
            f"skip:\n{shown}"
        )
    keep = [index for index, row in enumerate(dataset["row"][:]) if row not in problems]
    if not keep:
        raise ValueError(f"None of {len(rows)} rows can be used, for example: {next(iter(dropped))}")
    for reason, ids in dropped.items():
        logger.warning("Left out %d of %d rows (%s): %s", len(ids), len(rows), ", ".join(ids[:5]), reason)
    dataset = dataset if len(keep) == len(dataset) else dataset.select(keep)
    return EncodedRows(dataset.remove_columns("problem"), dropped)


def check_places(example: Example, count: int) -> None:
    """Checks that a row's prompt has one place for each of its pictures.

    Raises:
        ValueError: With both numbers.
    """
    contents = [message["content"] for message in example.prompt if not isinstance(message["content"], str)]
    places = sum(part["type"] == "image" for content in contents for part in content)
    if places != count:
        raise ValueError(f"The row has {count} pictures, its prompt has places for {places}.")


def lay_out_row(
    example: Example, processor: VisionQwenProcessor, image_ids: list, max_length: int | None
) -> list[dict]:
    """One or, when the completions do not fit into one sequence, several layouts of a row.

    Args:
        example ([`~vlm_peft.tasks.Example`]): Of a task.
        processor ([`VisionQwenProcessor`]): Tokenizes.
        image_ids (`list`): What the collator fetches the row's pictures by.
        max_length (`int`, *optional*): Tokens of a sequence.

    Raises:
        ValueError: When the prompt has another number of pictures, or the pictures and one completion do not fit.
    """
    check_places(example, len(image_ids))
    whole = processor.encode_row(example.prompt, example.completions)
    if max_length is None or len(whole) <= max_length:
        groups = [whole]
        sizes = [len(example.completions)]
    else:
        groups, sizes, waiting = [], [], list(example.completions)
        while waiting:
            size, layout = len(waiting), whole if not groups else processor.encode_row(example.prompt, waiting)
            while len(layout) > max_length and size > 1:
                size = max(1, min(size - 1, size * max_length // len(layout)))
                layout = processor.encode_row(example.prompt, waiting[:size])
            if len(layout) > max_length:
                count, each = len(image_ids), processor.num_image_tokens
                raise ValueError(
                    f"The pictures ({count} of {each} tokens) and one completion need {len(layout)} tokens, more than "
                    f"max_length={max_length}."
                )
            groups.append(layout)
            sizes.append(size)
            waiting = waiting[size:]
    return [
        {**vars(layout), "image_ids": image_ids, "num_branches": size}
        for layout, size in zip(groups, sizes, strict=True)
    ]


def find_unreadable(pictures: Pictures) -> dict[int, str]:
    """Decodes every picture once; picture number -> why it cannot be read."""
    unreadable = {}
    for index in range(len(pictures)):
        try:
            pictures.open(index)
        except UnreadablePictureError as error:
            unreadable[index] = str(error)
    return unreadable
