"""Tables of text: CSV, TSV, JSON and JSON Lines read letter by letter, and image folders by their metadata.

Stage: files on disk -> rows. Nothing is inferred: a cell is what its file says, so that 0417 keeps its zero, "null" and
a date stay words, and a number of JSON is its literal. Tasks make numbers of text where they need them.
"""

import csv
import inspect
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Json,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
)

from ..json_files import parse_json

logger = logging.getLogger(__name__)

TABLES = (".csv", ".tsv", ".json", ".jsonl")
"""Endings of the files that are read here."""

METADATA = tuple(f"metadata.{kind}" for kind in ("jsonl", "csv", "parquet"))
"""Names of the tables that make a folder an image folder."""

# Folders of an image folder that are splits of their own.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\.\w+$")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# Columns of an image folder that hold its pictures.
_PICTURES = ("image", "images")
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
# ['a', 'b'] is how Python writes a list, and no JSON.
_PYTHON_LIST = re.compile(r"\[\s*['\"].*['\"]\s*,?\s*\]", re.DOTALL)


def metadata_files(folder: Path) -> list[Path]:
    """The metadata of an image folder and of the folders in it; none when it is no image folder."""
    return sorted(path for path in folder.rglob("metadata.*") if path.name in METADATA)


def split_files(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Splits of a folder's tables as `datasets` names them: by `data/NAME-00000-of-00001`, folders, or files' names.

    Args:
        files (`list[Path]`): The tables.
        folder (`Path`): That they are in; its own name says nothing.
    """
    inside = {file: file.relative_to(folder) for file in files}
    found: dict[str, list[Path]] = {}
    for file, place in inside.items():
        if place.parent == Path("data") and (named := _SHARD.match(place.name)):
            found.setdefault(named[1], []).append(file)
    for words in (lambda place: place.parts[:-1], lambda place: (place.stem,)):
        for file, place in inside.items() if not found else ():
            known = [_split_of(part) for part in words(place)]
            if any(known):
                found.setdefault(next(filter(None, known)), []).append(file)
    return found or {"train": files}


def _split_of(name: str) -> str | None:
    """The split that a word of a name stands for."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((split for split, known in _SPLITS.items() if set(words) & set(known)), None)


def open_tables(
    files: dict[str, list[Path]], split: str, *, folder: Path | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Rows of a split of tables.

    Args:
        files (`dict[str, list[Path]]`): Split -> its tables. Those of an image folder are all under one name.
        split (`str`): `"train"`, `"train+test"`, `"train[:90%]"`, ...
        folder (`Path`, *optional*): The image folder whose metadata the files are: `file_name` becomes the picture
            `image`, and folders named after a split are that split.
        streaming (`bool`, *optional*, defaults to `False`): Rows are read whenever they are asked for.

    Returns:
        `Dataset` or `IterableDataset`: All scalars are text, an empty cell of CSV and TSV is none; a CSV cell with a
            JSON list is that list.

    Raises:
        ValueError: Naming file, row, what is wrong and what to do; or when the split is not there.
    """
    kind: dict[str, Any] = {}
    counts: dict[str, int] = {}
    digest = xxhash.xxh3_128(inspect.getsource(sys.modules[__name__]).encode())
    named: set[str] = set()
    for name, paths in files.items():
        for path in paths:
            digest.update(f"{path}\n".encode())
            digest.update(path.read_bytes())
        counts[name] = 0
        for part, row in _rows(name, paths, folder):
            kind = _merge(kind, {column: _kind(value) for column, value in row.items()})
            counts[part] = counts.get(part, 0) + 1
            named.update(each for column in _PICTURES for each in _flat(row.get(column)) if folder is not None and each)
    if folder is not None:
        _tell_unnamed(folder, named)
    counts = {name: count for name, count in counts.items() if count or len(files) > 1 or folder is None}
    missing = [part for part in split.split("+") if part.partition("[")[0] not in counts]
    if missing:
        raise ValueError(
            f"The data set {folder or _shown(files)} has no split {missing[0]!r}; it has {', '.join(counts)}."
        )
    if not kind:
        raise ValueError(f"{folder or _shown(files)} has no {'columns' if any(counts.values()) else 'rows'}.")
    features = Features({column: _feature(value) for column, value in kind.items()})
    if folder is not None and not streaming:
        features |= {
            name: Image() if feature == Value("string") else List(Image())
            for name, feature in features.items()
            if name in _PICTURES
        }
    parts = []
    for each in ReadInstruction.from_spec(split).to_absolute(counts):
        # A list among the arguments would be taken for shards.
        arguments = {
            "files": tuple((name, tuple(map(str, paths))) for name, paths in files.items()),
            "folder": folder and str(folder),
            "split": each.splitname,
            "kind": kind,
            "stamp": digest.hexdigest(),
        }
        if not counts[each.splitname]:
            raise ValueError(f"The split {split!r} of {folder or _shown(files)} has no rows.")
        if streaming:
            parts.append(IterableDataset.from_generator(_generate, features=Features(features), gen_kwargs=arguments))
            if each.from_ or each.to not in (None, counts[each.splitname]):
                parts[-1] = parts[-1].skip(each.from_ or 0).take(each.to - (each.from_ or 0))
        else:
            rows = Dataset.from_generator(_generate, features=Features(features), gen_kwargs=arguments)
            parts.append(rows.select(range(each.from_ or 0, len(rows) if each.to is None else each.to)))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def check_parquet(path: Path) -> None:
    """Looks at a parquet file's end, where its columns are.

    Raises:
        ValueError: When it is empty, cut off, something else, has no rows, two columns of one name, or a column that
            `datasets` has no type for.
    """
    try:
        with pq.ParquetFile(path) as file:
            count, schema = file.metadata.num_rows, file.schema_arrow
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no whole parquet file; write or download it again: {_line(error)}") from error
    if not count:
        raise ValueError(f"{path} has no rows.")
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{path} has two columns {_twice(schema.names)!r}: rename one.")
    for column in schema:
        try:
            Features.from_arrow_schema(pa.schema([column]))
        except ValueError as error:
            raise ValueError(
                f"{path}, column {column.name!r}: a column of the type {column.type} cannot be read; store it as text, "
                "or leave it out."
            ) from error


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _generate(files: tuple, folder: str | None, split: str, kind: dict, stamp: str) -> Iterator[dict]:
    """Rows of one split, all of one shape; `stamp` names their content for the cache of `datasets`."""
    for name, paths in files:
        if folder is None and name != split:
            continue
        for part, row in _rows(name, [Path(path) for path in paths], Path(folder) if folder else None):
            if part == split:
                yield {column: _conform(row.get(column), each) for column, each in kind.items()}


def _rows(name: str, paths: list[Path], folder: Path | None) -> Iterator[tuple[str, dict]]:
    """The split of each row, and the row."""
    for path in paths:
        if folder is None:
            yield from ((name, row) for _, row in read_table(path))
            continue
        others = [other for other in paths if other.parent == path.parent and other != path]
        if others:
            raise ValueError(
                f"{path.parent} has {path.name} and {others[0].name}: expected one of them, remove the other."
            )
        for place, row in read_table(path):
            yield _of_folder(row, path, place, folder)


def _of_folder(row: dict, path: Path, place: str, folder: Path) -> tuple[str, dict]:
    """A line of an image folder's metadata: its split, and the row with paths of its pictures from the root."""
    found: dict[str, Any] = {}
    names = [name for name in row if name.endswith(("file_name", "file_names"))]
    if not names and isinstance(row.get("image"), str):
        names = ["image"]
    if not names:
        raise ValueError(
            f"{path}, {place}: expected file_name, the picture's path in {path.parent}, found the columns "
            f"{', '.join(sorted(row))}."
        )
    for name in names:
        column = name.removesuffix("file_names").removesuffix("file_name").rstrip("_")
        column = column or ("images" if name == "file_names" else "image")
        cell = row[name]
        cells = cell if isinstance(cell, list) else [cell]
        whole = [str(path.parent / each) if each else None for each in cells]
        found[column] = whole if isinstance(cell, list) else whole[0]
    first = next((each for name in names for each in _flat(row[name]) if each), "")
    inside = (path.parent.relative_to(folder) / first).parts[:-1]
    split = next((split for part in inside for split, known in _SPLITS.items() if part.lower() in known), "train")
    return split, found | {name: cell for name, cell in row.items() if name not in (*names, *found)}


def _tell_unnamed(folder: Path, named: set[str]) -> None:
    """Warns of pictures that no line of the metadata names."""
    kinds = {Path(each).suffix.lower() for each in named}
    others = [path for path in folder.rglob("*") if path.suffix.lower() in kinds and str(path) not in named]
    if others:
        logger.warning(
            "%d pictures in %s have no line in its metadata and are left out (for example %s).",
            len(others),
            folder,
            min(others).relative_to(folder),
        )


def _flat(cell) -> list:
    return cell if isinstance(cell, list) else [cell]


def read_table(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of one file, and where each stands ("line 3").

    Args:
        path (`Path`): With one of the endings [`TABLES`], or `.parquet`.

    Raises:
        ValueError: Naming file, row, what is wrong and what to do.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        check_parquet(path)
        table = pq.read_table(path)
        features = Features.from_arrow_schema(table.schema)
        for number, row in enumerate(table.to_pylist(), 1):
            for name, cell in row.items():
                try:
                    row[name] = _decoded(class_names(cell, features[name]))
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}, row {number}, column {name!r}: expected text, found bytes that are no UTF-8 "
                        f"(0x{error.object[error.start]:02x}): save it as text, or leave the column out."
                    ) from error
            yield f"row {number}", row
        return
    encoded = path.read_bytes()
    if encoded.startswith(_BYTE_ORDER_MARKS):
        raise ValueError(f"{path} is text in UTF-16: save it as UTF-8.")
    try:
        text = encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: the byte 0x{encoded[error.start]:02x} is no UTF-8 text: save the file as UTF-8 "
            "(it may be in Windows-1252)."
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a table.")
    for place, row in _read_separated(path, text) if kind in _SEPARATORS else _read_json(path, text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            column = next(name for name, cell in row.items() if not _is_unicode(name) or not _is_unicode(cell))
            raise ValueError(
                f"{path}, {place}, column {column!r}: half of a character (a lone surrogate) is no text: write it "
                "again."
            ) from error
        yield place, row


def _decoded(cell):
    """A cell with text for bytes, in lists and dicts, too: their `str` would be Python's way of writing them."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8")
    if isinstance(cell, list):
        return [_decoded(each) for each in cell]
    return {name: _decoded(each) for name, each in cell.items()} if isinstance(cell, dict) else cell


def class_names(cell, feature):
    """A cell with the names of classes for their numbers, in lists and dicts, too; no class (-1) is none.

    Args:
        cell: Of a row.
        feature: Of its column.
    """
    if cell is None:
        return None
    if isinstance(feature, dict):
        return {name: class_names(each, feature[name]) for name, each in cell.items()}
    if isinstance(feature, List):
        return [class_names(each, feature.feature) for each in cell]
    if isinstance(feature, ClassLabel):
        return feature.names[cell] if 0 <= cell < len(feature.names) else None
    return cell


def _is_unicode(cell) -> bool:
    try:
        json.dumps(cell, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_separated(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """Rows of CSV and TSV. A column is one of lists where all its cells are JSON lists."""
    separator = _SEPARATORS[path.suffix.lower()]
    # Pictures in base64 are longer than the module's limit for a cell.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        lines = []
        try:
            for cells in reader:
                if cells:
                    lines.append((reader.line_num, cells))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}: repair the quotes of this row.") from error
    finally:
        csv.field_size_limit(limit)
    columns = [name or f"Unnamed: {place}" for place, name in enumerate(lines[0][1])]
    if len(columns) == 1 and (other := next((mark for mark in ";\t," if mark in columns[0]), None)):
        raise ValueError(
            f"{path} separates its cells by {other!r}: expected {separator!r}; save it so, or tabs in a file .tsv."
        )
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path} has two columns {_twice(columns)!r}: rename one.")
    table: list[tuple[str, dict[str, Any]]] = []
    for line, cells in lines[1:]:
        if len(cells) != len(columns):
            raise ValueError(
                f"{path}, line {line}: expected {len(columns)} cells ({', '.join(columns)}), found {len(cells)}: put "
                "quotes around text that holds the separator."
            )
        table.append((f"line {line}", {name: cell or None for name, cell in zip(columns, cells, strict=True)}))
    for name in columns:
        found = [(row, place, _list_of(row[name])) for place, row in table if row[name] is not None]
        if found and all(isinstance(cell, list) for _, _, cell in found):
            for row, _, cell in found:
                row[name] = cell
            continue
        for row, place, cell in found:
            if isinstance(cell, list) or _PYTHON_LIST.fullmatch(row[name]):
                raise ValueError(
                    f"{path}, {place}, column {name!r}: expected text, or JSON lists in all cells of the column, found "
                    f"{row[name][:60]}: write lists as JSON, with double quotes."
                )
    yield from table


def _list_of(cell: str) -> list | None:
    """The JSON list that a cell holds."""
    if not (cell.lstrip().startswith("[") and cell.rstrip().endswith("]")):
        return None
    try:
        return _parse(cell)
    except ValueError:
        return None


def _read_json(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """Rows of a JSON list of objects, or of objects one a line."""
    if text.lstrip().startswith("["):
        try:
            rows = [(f"row {number}", row) for number, row in enumerate(_parse(text), 1)]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {error.lineno}, column {error.colno}: no whole JSON ({error.msg}): repair it, or write "
                "the file again."
            ) from error
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append((f"line {number}", _parse(line)))
            except json.JSONDecodeError as error:
                whole = _whole_object(text) if not rows else None
                if whole is not None:
                    rows = [("row 1", whole)]
                    break
                raise ValueError(
                    f"{path}, line {number}: no whole JSON object ({error.msg}, column {error.colno}): repair the "
                    "line, or take it out."
                ) from error
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place}: expected an object with columns, found {json.dumps(row)[:60]}.")
        yield place, row


def _whole_object(text: str) -> dict | None:
    """One object over several lines."""
    try:
        found = _parse(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _parse(text: str) -> Any:
    """JSON with its numbers, true and false as they are written; NaN is how programs write what is missing."""
    return _words(
        parse_json(text, parse_int=str, parse_float=str, parse_constant=lambda word: None if word == "NaN" else word)
    )


def _words(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return [_words(each) for each in value]
    return {name: _words(each) for name, each in value.items()} if isinstance(value, dict) else value


def _kind(value) -> Any:
    """The shape of a value: `None` (not known), `str`, `[shape]`, `{key: shape}`."""
    if isinstance(value, list):
        return [reduce(_merge, map(_kind, value), None)]
    if isinstance(value, dict):
        return {name: _kind(each) for name, each in value.items()}
    return value if value is None else "text"


def _merge(one, other) -> Any:
    """The shape of both; text among lists is a list of one; `"json"` where nothing else holds both."""
    if one is None or one == other:
        return other
    if other is None:
        return one
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {name: _merge(one.get(name), each) for name, each in other.items()}
    if isinstance(one, list) and isinstance(other, list):
        return [_merge(one[0], other[0])]
    for lists, text in ((one, other), (other, one)):
        if isinstance(lists, list) and lists[0] in (None, "text") and text == "text":
            return ["text"]
    return "json"


def _feature(kind):
    if kind in (None, "text"):
        return Value("string")
    if isinstance(kind, list):
        return List(_feature(kind[0]))
    return {name: _feature(each) for name, each in kind.items()} if isinstance(kind, dict) and kind else Json()


def _conform(value, kind):
    """A value in the shape of its column."""
    if kind == "json":
        # Of a text that is JSON itself `datasets` would store what it says.
        return json.dumps(value) if isinstance(value, str) else value
    if value is None:
        return value
    if isinstance(kind, list):
        return [_conform(each, kind[0]) for each in _flat(value)]
    if isinstance(kind, dict) and kind:
        return {name: _conform(value.get(name), each) for name, each in kind.items()}
    return value


def _shown(files: dict[str, list[Path]]) -> str:
    return str(next(iter(files.values()))[0])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
