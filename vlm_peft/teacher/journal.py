"""Answers as they come: one append-only file for each way of asking, so that a killed run loses and repeats nothing.

Stage: teacher -> answers on disk -> data set. A file is named by the hash of all that an answer depends on beside its
picture (prompt, schema, teacher and its revision, sampling, size of the picture), and a line by the hash of its picture
and the number of the sample: a changed prompt begins another file, and nothing is mixed.
"""

import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from ..json_files import parse_json

logger = logging.getLogger(__name__)

Key = tuple[str, int]
"""Hash of a picture, and the number of the sample."""

Record = dict[str, Any]
"""A line: `picture`, `sample`, `text`, `finish`, `prompt_tokens`, `tokens`, `seconds`, `time`."""

_SYNC_SECONDS = 1.0


def setting_hash(setting: dict[str, Any]) -> str:
    """Names a way of asking: 32 hexadecimal digits (xxh3, 128 bits)."""
    return xxhash.xxh3_128_hexdigest(json.dumps(setting, sort_keys=True).encode())


class Journal:
    """The answers of one way of asking, on disk and in memory; for one process at a time.

    A line is written at once, so that killing the process loses no line that was written; a power cut loses the last
    second. What a killed process left of a line is cut off.

    Args:
        folder (`Path`): Holds the files of all ways of asking; is made.
        setting (`dict`): What answers depend on beside their pictures; the file's first line.

    Raises:
        ValueError: When another process writes it.
    """

    def __init__(self, folder: Path, setting: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.setting = setting
        self.name = setting_hash(setting)
        self.path = folder / f"{self.name}.jsonl"
        self._lock = FileLock(folder / f".{self.name}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process is asking the same: it writes {self.path}. Wait for it, or end it."
            ) from None
        self._synced = time.monotonic()
        self.records: dict[Key, Record] = {}
        """Answers that are there."""
        self._read()
        self._file = self.path.open("ab", buffering=0)
        if self._file.tell() == 0:
            self._write({"setting": setting})

    def _read(self) -> None:
        """Takes in what is there, and cuts off a last line that was not finished."""
        if not self.path.is_file():
            return
        whole, broken = 0, 0
        with self.path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    logger.info("%s: a line that was not finished is cut off.", self.path)
                    break
                whole += len(line)
                try:
                    record = parse_json(line)
                except ValueError:
                    record = None
                if isinstance(record, dict) and {"picture", "sample", "text"} <= record.keys():
                    self.records.setdefault((record["picture"], record["sample"]), record)
                else:
                    broken += not (isinstance(record, dict) and "setting" in record)
            file.truncate(whole)
        if broken:
            logger.warning("%s: %d lines are damaged; what they answered is asked again.", self.path, broken)

    def __contains__(self, key: Key) -> bool:
        return key in self.records

    def add(self, record: Record) -> None:
        """Keeps an answer; of two with one key the first stays.

        Raises:
            OSError: When it cannot be written.
        """
        key = record["picture"], record["sample"]
        if key not in self.records:
            self._write(record)
            self.records[key] = record

    def _write(self, record: Record) -> None:
        # ASCII only: a lone surrogate has no UTF-8 form.
        rest = memoryview(json.dumps(record).encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) or 0 :]
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Makes sure of all lines, and lets others write."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
        self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
