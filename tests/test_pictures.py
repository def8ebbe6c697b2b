"""Pictures: every kind of source, hostile files, and the flat numbering that rows, cache and collator share."""

import base64
import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from vlm_peft.data import pictures as pictures_module
from vlm_peft.data.pictures import MAX_PIXELS, Pictures, UnreadablePictureError, open_picture, picture_size


def encode(picture: PILImage.Image, kind: str = "PNG", **arguments) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **arguments)
    return file.getvalue()


def noise(width: int = 6, height: int = 4) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds one row of nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    picture = noise()
    encoded = encode(picture)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded)
    text = base64.b64encode(encoded).decode()
    in_lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    sources = [picture, encoded, path, str(path), text, in_lines, f"data:image/png;base64,{text}"]
    sources += [{"bytes": encoded, "path": None}, {"bytes": None, "path": str(path)}]
    for source in sources:
        opened = open_picture(source)
        assert opened.mode == "RGB"
        assert opened.tobytes() == picture.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_white(mode):
    picture = PILImage.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    opened = open_picture(encode(picture.convert(mode)))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_exif_orientation_is_followed():
    exif = PILImage.Exif()
    exif[0x0112] = 6
    picture = PILImage.new("RGB", (16, 8), "red")
    picture.paste("blue", (0, 0, 8, 8))
    opened = open_picture(encode(picture, "JPEG", exif=exif, quality=95))
    assert opened.size == (8, 16)
    top, bottom = opened.getpixel((4, 2)), opened.getpixel((4, 13))
    assert top[2] > 200 > 100 > top[0]
    assert bottom[0] > 200 > 100 > bottom[2]


@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_files_orientation_is_followed_once(compression, mode, orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    picture = PILImage.fromarray((np.arange(50).reshape(10, 5) * 5).astype(np.uint8)).convert(mode)
    encoded = encode(picture, "TIFF", exif=exif, compression=compression)
    opened, as_png = open_picture(encoded), open_picture(encode(picture, "PNG", exif=exif))
    assert np.array_equal(np.asarray(opened), np.asarray(as_png))
    assert opened.size == ((5, 10) if orientation < 5 else (10, 5))
    assert picture_size(encoded) == list(opened.size)


def test_sixteen_bit_greys_keep_their_shades():
    levels = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    opened = open_picture(encode(PILImage.fromarray(levels)))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 0x40, 0x80, 0xFF]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (encode(noise(64, 64), "JPEG")[:-400], "truncated"),
        (b"no picture at all", "cannot identify"),
        (b"", "cannot identify"),
        ("data:image/png;base64,@@@@", "no valid base64"),
        ("nowhere/picture.png", "No such file"),
        ("http://somewhere.invalid/picture.png", "is an address, and pictures are not downloaded"),
        ({"url": "http://somewhere.invalid/picture.png"}, r"\['url'\] without a value"),
        ("a\0b.png", "null byte"),
        ({"bytes": None, "path": None}, r"\['bytes', 'path'\] without a value"),
        ({}, "'bytes' or 'path'"),
        (3, "got int"),
    ],
)
def test_unreadable_pictures_are_named(source, message):
    with pytest.raises(UnreadablePictureError, match=message):
        open_picture(source)


@pytest.mark.parametrize("damage", range(8))
def test_damaged_files_raise_nothing_else(damage):
    """Bits flipped all over a file: Pillow may read it or not, but only one kind of error comes out."""
    rng = np.random.default_rng(damage)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        encoded = np.frombuffer(encode(noise(32, 32), kind), dtype=np.uint8).copy()
        encoded[rng.integers(0, len(encoded), 12)] = rng.integers(0, 255, 12)
        try:
            open_picture(encoded.tobytes())
        except UnreadablePictureError:
            pass


@pytest.mark.parametrize("side", [20_000, 10_000, 8_193])
def test_huge_pictures_are_refused_before_they_are_decoded(side, monkeypatch):
    def decode(*args, **kwargs):
        raise AssertionError("The picture was decoded.")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(UnreadablePictureError, match=f"{MAX_PIXELS}.* allowed"):
        open_picture(png_header(side, side))


SHAPES = {"one": Image(), "many": List(Image())}


@pytest.fixture
def dataset():
    """Two columns, empty cells of every kind; each picture's width tells which one it is."""
    cells = [{"bytes": encode(PILImage.new("RGB", (width, 1))), "path": None} for width in range(1, 8)]
    columns = {
        "one": [cells[0], None, cells[3], cells[4]],
        "many": [[cells[1], cells[2]], [], None, [None, cells[5], cells[6]]],
    }
    return Dataset.from_dict(columns, features=Features(SHAPES))


def widths(pictures: Pictures) -> list[list[int]]:
    return [[pictures.open(index).width for index in pictures.of_row(row)] for row in range(len(pictures._ends))]


@pytest.mark.parametrize(
    ("columns", "rows", "expected"),
    [
        (["one", "many"], None, [[1, 2, 3], [], [4], [5, 6, 7]]),
        (["many", "one"], None, [[2, 3, 1], [], [4], [6, 7, 5]]),
        (["many"], [3, 0], [[6, 7], [2, 3]]),
        (["one", "many"], [3, 1, 0], [[5, 6, 7], [], [1, 2, 3]]),
        (["one"], range(1, 3), [[], [4]]),
        (["one"], [], []),
    ],
)
def test_flat_numbering_over_columns_empty_cells_and_selected_rows(dataset, columns, rows, expected):
    pictures = Pictures(dataset if rows is None else dataset.select(rows), columns)
    assert widths(pictures) == expected
    assert len(pictures) == sum(map(len, expected))
    assert [index for row in range(len(expected)) for index in pictures.of_row(row)] == list(range(len(pictures)))


def test_numbering_over_several_arrow_chunks(dataset):
    from datasets import concatenate_datasets

    assert widths(Pictures(concatenate_datasets([dataset, dataset]), ["many"])) == 2 * [[2, 3], [], [], [6, 7]]


def test_columns_of_paths_are_pictures(tmp_path):
    noise().save(tmp_path / "a.png")
    pictures = Pictures(Dataset.from_dict({"file": [str(tmp_path / "a.png"), None]}), ["file"])
    assert len(pictures) == 1
    assert pictures.encoded(0) == (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadablePictureError, match="No such file"):
        pictures.encoded(0)


def test_counting_reads_no_bytes(tmp_path):
    """16 MB of memory-mapped pictures are counted within 1 MB of Arrow memory, from a selection of rows."""
    cell = {"bytes": b"\0" * 500_000, "path": None}
    features = Features({"one": Image(), "many": List(Image()), "text": Value("string")})
    rows = Dataset.from_dict({"one": [cell] * 16, "many": [[cell, None]] * 16, "text": ["a"] * 16}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    del rows
    stored = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    before = pa.total_allocated_bytes()
    pictures = Pictures(stored.select([0, 2, 5, 7]), ["one", "many"])
    assert len(pictures) == 8
    assert pa.total_allocated_bytes() - before < 1_000_000


def large_png(side: int) -> bytes:
    """A picture of one colour with transparency, small as a file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = zlib.compressobj(1)
    line = b"\0" + b"\x40\x80\xc0\x80" * side
    rows = b"".join(packed.compress(line) for _ in range(side)) + packed.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PEAKS = """
import resource, sys
from pathlib import Path
from vlm_peft.data.pictures import open_picture

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
for path in sys.argv[1:]:
    picture = open_picture(Path(path))
    print(picture.size[0], *picture.getpixel((5, 5)), peak() - before)
    del picture
"""


def test_the_largest_pictures_take_a_third_of_a_gigabyte(tmp_path):
    """The rest of a gigabyte is for the libraries, 0.66 on the page, and for what a processor makes of a halved one."""
    png, jpeg = tmp_path / "large.png", tmp_path / "large.jpg"
    png.write_bytes(large_png(8192))
    # Coefficients of all its channels wait until the file has been read.
    PILImage.new("CMYK", (5792, 5792), (0, 0, 0, 255)).save(jpeg, progressive=True, subsampling=0)
    done = subprocess.run([sys.executable, "-c", PEAKS, png, jpeg], capture_output=True, text=True, check=True)
    (side, *pixel, taken), (jpeg_side, *_, also_taken) = [map(int, line.split()) for line in done.stdout.splitlines()]
    assert (side, pixel, jpeg_side) == (4096, [159, 191, 223], 2896)
    assert max(taken, also_taken) < 340e6


def test_a_large_picture_is_decoded_alone_in_strips_and_its_memory_goes_back(monkeypatch):
    """Two at a time would not fit into a gigabyte; small blocks of pixels and whole copies stay with the process."""
    usual, flat, on_white = PILImage.core.get_block_size(), pictures_module._flat, pictures_module._on_white
    seen, strips = [], []

    def is_free() -> bool:
        free = pictures_module.ALONE.acquire(blocking=False)
        if free:
            pictures_module.ALONE.release()
        return free

    def look(picture):
        # Asked by another thread: this one may hold it as often as it likes.
        with ThreadPoolExecutor(1) as threads:
            free = threads.submit(is_free).result()
        seen.append((free, PILImage.core.get_block_size()))
        return flat(picture)

    monkeypatch.setattr(pictures_module, "_flat", look)
    monkeypatch.setattr(pictures_module, "_on_white", lambda part: strips.append(part.height) or on_white(part))
    encoded = encode(noise(60, 70).convert("RGBA"))
    expected = open_picture(encoded)
    monkeypatch.setattr(pictures_module, "MAX_PIXELS", 60 * 70)
    assert open_picture(encoded) == expected
    assert seen == [(True, usual), (False, 4 * usual)]
    assert PILImage.core.get_block_size() == usual
    assert strips == [32, 32, 6] * 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "I;16", "F", "I"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_halved_pictures_are_those_that_are_converted_whole_and_halved(monkeypatch, mode, orientation):
    """Strips leave no seam, and an odd row its own."""
    greys = np.random.default_rng(0).integers(0, 256, (51, 37, 4), dtype=np.uint8)
    picture = PILImage.fromarray(greys).convert("RGB" if mode in ("I;16", "F", "I") else "RGBA")
    if mode in ("I;16", "F", "I"):
        wide = (greys[:, :, 0].astype(np.uint16) << 8) + greys[:, :, 1]
        picture = PILImage.fromarray(wide if mode == "I;16" else wide.astype({"F": np.float32, "I": np.int32}[mode]))
    else:
        picture = picture.convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    picture.getexif()[274] = orientation
    whole = open_picture(picture)
    monkeypatch.setattr(pictures_module, "SCALED_PIXELS", 30 * 37)
    monkeypatch.setattr(pictures_module, "_STRIP", 8)
    halved = open_picture(picture)
    # Turned before or after, an odd row is the last or the first.
    turned = whole if orientation == 1 else whole.transpose(PILImage.Transpose.ROTATE_90)
    expected = turned.reduce(2) if orientation == 1 else turned.reduce(2).transpose(PILImage.Transpose.ROTATE_270)
    assert halved.size == ((19, 26) if orientation == 1 else (26, 19))
    assert np.abs(np.asarray(halved).astype(int) - np.asarray(expected)).max() == 0


@pytest.mark.parametrize(
    ("kind", "options", "allowed", "said"),
    [
        ("JPEG", {}, 6000, ""),
        ("JPEG", {"progressive": True}, 3000, " of a JPEG of several scans"),
        ("WEBP", {}, 1500, " of a WEBP"),
        ("TIFF", {}, 3000, " of a TIFF"),
        ("JPEG2000", {}, 1200, " of a JPEG2000"),
    ],
)
def test_formats_whose_decoders_need_more_have_fewer_pixels(monkeypatch, kind, options, allowed, said):
    monkeypatch.setattr(pictures_module, "MAX_PIXELS", 6000)
    for pixels in (allowed, allowed + 50):
        file = io.BytesIO()
        PILImage.new("RGB", (pixels // 50, 50)).save(file, kind, **options)
        if pixels == allowed:
            assert open_picture(file.getvalue()).size == (pixels // 50, 50)
        else:
            with pytest.raises(UnreadablePictureError, match=f"more than the {allowed} allowed{said}: scale it down"):
                open_picture(file.getvalue())


def jpeg_of_scans(width: int, height: int, channels: int, each: int) -> bytes:
    """A grey baseline JPEG whose colours come in scans of `each` channels."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content

    found = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
    frame = b"".join(bytes([channel, 0x11, 0]) for channel in range(channels))
    found += segment(0xC0, struct.pack(">BHHB", 8, height, width, channels) + frame)
    # One code in each table, "0": no difference, and the block's end.
    found += segment(0xC4, b"\x00\x01" + bytes(16)) + segment(0xC4, b"\x10\x01" + bytes(16))
    for first in range(0, channels, each):
        names = b"".join(bytes([channel, 0]) for channel in range(first, first + each))
        blocks = each * -(-width // 8) * -(-height // 8)
        found += segment(0xDA, bytes([each]) + names + bytes([0, 63, 0])) + bytes(blocks // 4 + 1)
    return found + b"\xff\xd9"


@pytest.mark.parametrize(("channels", "each"), [(3, 3), (3, 1), (4, 4), (4, 1)])
def test_a_jpeg_with_a_scan_for_each_colour_waits_as_coefficients_too(monkeypatch, channels, each):
    encoded = jpeg_of_scans(80, 40, channels, each)
    decoded = PILImage.open(io.BytesIO(encoded))
    decoded.load()
    assert open_picture(encoded).size == (80, 40)
    monkeypatch.setattr(pictures_module, "MAX_PIXELS", 80 * 40)
    if each == channels:
        assert open_picture(encoded).size == (80, 40)
    else:
        with pytest.raises(UnreadablePictureError, match="more than the 1600 allowed of a JPEG of several scans"):
            open_picture(encoded)
    # It waits no longer.
    assert open_picture(decoded).size == (80, 40)


@pytest.mark.parametrize(
    ("options", "orientation", "is_read"),
    [
        ({"compression": "tiff_lzw", "strip_size": 2**20}, 1, False),
        ({"compression": "tiff_lzw", "strip_size": 2000}, 1, True),
        ({"compression": "tiff_lzw", "strip_size": 2000}, 6, False),
        ({"compression": None}, 1, True),
    ],
)
def test_parts_of_a_tiff_file_that_are_decoded_as_a_whole_are_counted(monkeypatch, options, orientation, is_read):
    monkeypatch.setattr(pictures_module, "MAX_PIXELS", 100 * 60 * 2)
    monkeypatch.setattr("PIL.TiffImagePlugin.STRIP_SIZE", options.pop("strip_size", 65536))
    exif = PILImage.Exif()
    exif[274] = orientation
    encoded = encode(noise(100, 60).convert("CMYK"), "TIFF", exif=exif, **options)
    if is_read:
        assert open_picture(encoded).size == (100, 60)
    else:
        with pytest.raises(UnreadablePictureError, match=r"100 x 60 pixels in strips or tiles of .* save it in"):
            open_picture(encoded)


def test_long_notes_are_left_out_of_a_large_png_and_refused_in_others(monkeypatch):
    """Texts, profiles and parts of programs' own stay in memory as long as the pixels."""
    monkeypatch.setattr(pictures_module, "SCALED_PIXELS", 100)
    picture = noise(20, 20)
    plain, jpeg = encode(picture), encode(picture, "JPEG")
    own = b"prVt" + bytes(6000)
    noted = plain[:33] + struct.pack(">I", 6000) + own + struct.pack(">I", zlib.crc32(own)) + plain[33:]
    monkeypatch.setattr(pictures_module, "_NOTES", 16 * 5000)
    behind = plain[:-12] + noted[33 : 33 + 6012] + plain[-12:]
    for each in (noted, behind):
        assert open_picture(each) == open_picture(plain)
        assert pictures_module._without_notes(each) == plain
    monkeypatch.setattr(pictures_module, "_NOTES", 5000)
    for place in (0xE5, 0xE9):
        many = jpeg[:2] + (bytes([255, place]) + struct.pack(">H", 3000) + bytes(2998)) * 2 + jpeg[2:]
        with pytest.raises(UnreadablePictureError, match=r"profiles take \d+ bytes, expected 5000 at most: take"):
            open_picture(many)
    with pytest.raises(UnreadablePictureError, match="profiles take 6000 bytes, expected 5000 at most"):
        open_picture(encode(picture, "WEBP", icc_profile=bytes(6000)))
    # Small pictures take little in any case.
    monkeypatch.setattr(pictures_module, "SCALED_PIXELS", 4 * 400)
    assert open_picture(many).size == (20, 20)


def test_sizes_are_those_of_the_whole_picture(monkeypatch, tmp_path):
    """Boxes count its pixels, whatever is decoded."""
    monkeypatch.setattr(pictures_module, "SCALED_PIXELS", 2000)
    PILImage.new("RGB", (101, 60)).save(tmp_path / "a.jpg")
    assert picture_size(str(tmp_path / "a.jpg")) == [101, 60]
    assert open_picture(tmp_path / "a.jpg").size == (51, 30)
