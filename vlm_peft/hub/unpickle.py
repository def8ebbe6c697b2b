"""Unpickle: pickled weights of one folder -> safetensors in another; a program, run by `convert.py` and nobody else.

Stage: a process of its own, which reads tensors with `torch.load(weights_only=True)` and ends. Its exit status is
`REFUSED` with one line on standard error when a file holds anything else.
"""

import json
import pickle
import re
import sys
from pathlib import Path

REFUSED = 3
"""Exit status for a file that is no checkpoint of tensors."""

_INDEX = "pytorch_model.bin.index.json"


class NotTensorsError(ValueError):
    """A file that is not converted; one line that says why."""


def convert_weights(source: Path, target: Path) -> None:
    """Writes `model.safetensors`, or its shards and their index, and reads it back.

    Args:
        source (`Path`): Folder with `pytorch_model.bin`, or its shards and their index.
        target (`Path`): Folder that is there.

    Raises:
        NotTensorsError: When a file is damaged, or holds something else than named tensors.
    """
    if not (source / _INDEX).is_file():
        _convert_file(source / "pytorch_model.bin", target / "model.safetensors")
        return
    index = _read_index(source / _INDEX)
    shards = sorted(set(index["weight_map"].values()))
    renamed = {name: f"model-{number:05}-of-{len(shards):05}.safetensors" for number, name in enumerate(shards, 1)}
    places: dict[str, str] = {}
    for shard in shards:
        names = _convert_file(source / shard, target / renamed[shard])
        places |= dict.fromkeys(names, renamed[shard])
    missing = sorted(index["weight_map"].keys() - places.keys())
    if missing:
        raise NotTensorsError(f"its shards lack {len(missing)} tensors that the index names, for example {missing[0]}.")
    text = json.dumps({"metadata": index.get("metadata", {}), "weight_map": places}, indent=2, sort_keys=True)
    (target / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _read_index(file: Path) -> dict:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise NotTensorsError(f"{file.name} is damaged, expected an object with a weight_map ({error}).") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not (file.parent / shard).is_file():
            raise NotTensorsError(f"{file.name} names the shard {shard!r}, which is not beside it.")
    return index


def _convert_file(source: Path, target: Path) -> list[str]:
    """Names of the tensors in a file that was written and compared."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL\s+(\S+)", str(error))
        what = f"the name {found[1]}, which a program could run by" if found else "something else than tensors"
        raise NotTensorsError(f"{source.name} is a pickle with {what}: ask its owner for safetensors.") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotTensorsError(f"{source.name} is damaged or no file of PyTorch ({reason}).") from error
    if not isinstance(loaded, dict) or not loaded:
        raise NotTensorsError(f"{source.name} holds no named tensors, got {type(loaded).__name__}.")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise NotTensorsError(f"{source.name} holds {name!r}, expected tensors, got {type(tensor).__name__}.")
        if tensor.layout is not torch.strided:
            raise NotTensorsError(f"{source.name} holds {name} as {tensor.layout}, expected a dense tensor.")
    save_file(dict(_separate(loaded)), target, metadata={"format": "pt"})
    with safe_open(target, framework="pt") as written:
        for name, tensor in loaded.items():
            again = written.get_tensor(name)
            # As bytes, NaN equals itself.
            if again.dtype != tensor.dtype or not torch.equal(_as_bytes(again), _as_bytes(tensor)):
                raise NotTensorsError(f"{name} of {source.name} reads back otherwise than it was written.")
    return list(loaded)


def _separate(tensors: dict):
    """Tensors of their own memory: safetensors take none that share it, as tied ones do."""
    storages = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        yield name, tensor


def _as_bytes(tensor):
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    try:
        convert_weights(Path(sys.argv[1]), Path(sys.argv[2]))
    except NotTensorsError as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(REFUSED)
