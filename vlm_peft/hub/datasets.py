"""Data sets on the Hub: rows -> parquet files with every picture inside, and a card; one commit.

Stage: beside training; what is pushed here is loaded again by its name.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import xxhash
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    SplitDict,
    SplitInfo,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from datasets.utils import are_progress_bars_disabled
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from yaml import YAMLError

from .access import (
    Contents,
    check_repo_id,
    commit,
    find_token,
    look_up,
    one_line_errors,
    refuse_secret,
    refuse_secrets,
    without_local_paths,
)
from .licences import licence_of
from .markup import code

_SHARD_BYTES = 500_000_000
_SECTION = "## Stored data"


def push_dataset(
    data: str | Path | Dataset | DatasetDict,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Pushes a data set as parquet files with every picture inside, and a card, in one commit.

    Args:
        data (`str`, `Path`, `Dataset` or `DatasetDict`): Rows, or where they lie: a parquet file, a folder of parquet
            files, an image folder with `metadata.jsonl`, or a folder of `save_to_disk`. Its `README.md` is kept and
            completed.
        repo_id, private, revision, token: See [`push_adapter`].

    Returns:
        `str`: Address of the repository.

    Raises:
        FileNotFoundError: When the data or one of its pictures is not there.
        ValueError: When there are no rows, or a text column names the home folder or the token.
        HubError: As [`push_adapter`].
    """
    check_repo_id(repo_id)
    splits = _load_splits(data)
    token = find_token(token, repo_id, private)
    for name, rows in splits.items():
        _refuse_secrets_in_columns(name, rows, token)
    api = HfApi(token=token, library_name="vlm_peft")
    with one_line_errors(repo_id, token, revision):
        repo_id, head = look_up(api, repo_id, "dataset", private, revision)
    with tempfile.TemporaryDirectory() as staging:
        contents: Contents = {}
        hashes, sizes = {}, {}
        for name, rows in splits.items():
            hashes[name], sizes[name] = stored_hash(rows)
            contents |= _write_shards(rows, name, sizes[name], Path(staging))
        readme = Path(data) / "README.md" if isinstance(data, str | Path) else None
        contents["README.md"] = _data_card(splits, hashes, sizes, contents, repo_id, readme).encode()
        refuse_secrets({"README.md": contents["README.md"]}, token)
        with one_line_errors(repo_id, token, revision):
            return commit(api, repo_id, "dataset", contents, ["data/*.parquet"], private, revision, head)


def _load_splits(data: str | Path | Dataset | DatasetDict) -> DatasetDict:
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"The data set {path} is not there: expected a parquet file or a folder.")
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data = load_from_disk(path)
        elif path.is_file():
            data = load_dataset("parquet", data_files=str(path))
        elif any(path.rglob("metadata.jsonl")):
            data = load_dataset("imagefolder", data_dir=str(path))
        else:
            data = load_dataset(str(path))
    splits = data if isinstance(data, DatasetDict) else DatasetDict({str(data.split or "train"): data})
    empty = [name for name, rows in splits.items() if not len(rows)]
    if empty or not splits:
        raise ValueError(f"The data set has no rows{' in ' + ', '.join(empty) if empty else ''}.")
    return splits


def _refuse_secrets_in_columns(split: str, rows: Dataset, token: str) -> None:
    texts = [
        name for name, feature in rows.features.items() if "string" in str(feature) and "Image" not in str(feature)
    ]
    for name in texts:
        for batch in rows.select_columns(name).with_format("arrow").iter(1000):
            values = json.dumps(batch[name].to_pylist(), default=str, ensure_ascii=False)
            refuse_secret(f"Column {name} of split {split}", values, token)


def stored_hash(rows: Dataset) -> tuple[str, int]:
    """Hash of a data set's columns and rows as they are stored, in order, by content; and their size in bytes.

    Pictures count by their encoded bytes, wherever they lie; how rows are cut into files does not matter. What a run
    makes of them, [`~vlm_peft.data.splits.content_hash`], is another value.

    Args:
        rows (`Dataset`): One split.

    Returns:
        `tuple[str, int]`: 32 hexadecimal digits (xxh3, 128 bits), and bytes.

    Raises:
        FileNotFoundError: When a picture's file is not there.
    """
    digest, size = xxhash.xxh3_128(), 0
    digest.update(json.dumps({name: str(feature) for name, feature in sorted(rows.features.items())}).encode())

    def plain(value: Any) -> Any:
        nonlocal size
        if isinstance(value, dict):
            # A picture is its bytes; the name of the file that it came from may change.
            kept = {"bytes"} if set(value) == {"bytes", "path"} else set(value)
            return {name: plain(value[name]) for name in sorted(kept)}
        if isinstance(value, list):
            return [plain(each) for each in value]
        size += len(value) if isinstance(value, str | bytes) else 8
        return xxhash.xxh3_128_hexdigest(value) if isinstance(value, bytes) else value

    for batch in rows.with_format("arrow").iter(64):
        for row in embed_table_storage(batch).to_pylist():
            digest.update(json.dumps(plain(row), default=str).encode())
    return digest.hexdigest(), size


def _write_shards(rows: Dataset, split: str, size: int, staging: Path) -> Contents:
    """Parquet files with the pictures' bytes inside, of at most about half a gigabyte each."""
    count = min(len(rows), math.ceil(max(size, 1) / _SHARD_BYTES))
    written: Contents = {}
    were_shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        for index in range(count):
            name = f"data/{split}-{index:05d}-of-{count:05d}.parquet"
            path = staging / name
            path.parent.mkdir(exist_ok=True)
            # `to_parquet` alone would store the paths of pictures that lie in files.
            shard = rows.shard(count, index, contiguous=True).with_format("arrow")
            shard.map(embed_table_storage, batched=True, batch_size=64, keep_in_memory=True).to_parquet(path)
            written[name] = path
    finally:
        if were_shown:
            enable_progress_bars()
    return written


def _data_card(
    splits: DatasetDict,
    hashes: dict[str, str],
    sizes: dict[str, int],
    contents: Contents,
    repo_id: str,
    readme: Path | None,
) -> str:
    """The source's own card, if it has one, completed with what is stored: columns, splits, counts, hashes."""
    if readme is not None and readme.is_file():
        try:
            card = DatasetCard(readme.read_text(encoding="utf-8"))
        except (ValueError, YAMLError) as error:
            raise ValueError(f"{readme} has damaged metadata ({error}).") from error
        body = card.text.partition(f"\n{_SECTION}\n")[0].strip()
        data = card.data
    else:
        body, data = f"# {repo_id.rpartition('/')[2]}", DatasetCardData()
    first = next(iter(splits.values()))
    info = DatasetInfo(
        features=first.features,
        splits=SplitDict({name: SplitInfo(name, sizes[name], len(rows)) for name, rows in splits.items()}),
        download_size=sum(path.stat().st_size for path in contents.values() if isinstance(path, Path)),
        dataset_size=sum(sizes.values()),
    )
    data.pop("dataset_info")
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    data["configs"] = [{"config_name": "default", "data_files": files}]
    licence = licence_of(data)
    section = [
        _SECTION,
        "",
        f"Licence: {licence or 'not stated by the source of this data set'}.",
        "",
        "| column | type |",
        "|---|---|",
        *(
            "| {} | {} |".format(*(code(each).replace("|", r"\|") for each in column))
            for column in first.features.items()
        ),
        "",
        "| split | rows | bytes | hash of the stored rows (xxh3, 128 bits) |",
        "|---|---|---|---|",
        *(f"| {name} | {len(rows):,} | {sizes[name]:,} | `{hashes[name]}` |" for name, rows in splits.items()),
        "",
        "```python",
        "from datasets import load_dataset",
        f'rows = load_dataset("{repo_id}", split="{next(iter(splits))}")',
        "```",
    ]
    return without_local_paths(f"---\n{data.to_yaml()}\n---\n\n{body}\n\n" + "\n".join(section) + "\n")
