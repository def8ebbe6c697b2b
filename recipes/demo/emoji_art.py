"""Emoji art for the demo: the concepts, where the vendors' SVG packs come from, and how they become sprites.

The packs are npm's ``@iconify-json/*`` (SVG) and ``emojibase-data`` (CLDR names and keywords). A folder that has them
is used as it is; what is missing is fetched into it with ``npm pack``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

DEFAULT_ART = Path.home() / ".cache" / "vlm_peft" / "emoji-art"
PACK_VERSIONS = {
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/streamline-emojis": "1.2.4",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/icon-park": "1.2.4",
    "@iconify-json/streamline-color": "1.2.2",
    "@iconify-json/streamline-cyber-color": "1.2.2",
    "@iconify-json/streamline-freehand-color": "1.2.2",
    "@iconify-json/streamline-kameleon-color": "1.2.2",
    "@iconify-json/streamline-plump-color": "1.2.2",
    "@iconify-json/streamline-ultimate-color": "1.2.2",
    "emojibase-data": "17.0.0",
}


@dataclass(frozen=True)
class Concept:
    """An everyday object of the demo: Unicode ``code`` point, the short ``noun``, the ``phrase`` with its article."""

    code: str
    noun: str
    phrase: str

    @property
    def bare(self) -> str:
        """The phrase without its article: "bunch of grapes"."""
        return self.phrase.split(" ", 1)[1]


_CONCEPTS = """1F436 dog|1F431 cat|1F430 rabbit|1F435 monkey|1F437 pig|1F438 frog|1F418 elephant=an elephant
1F427 penguin|1F422 turtle|1F420 fish|1F419 octopus=an octopus|1F98B butterfly|1F41D bee|1F40C snail|1F980 crab
1F981 lion|1F355 pizza=a slice of pizza|1F354 hamburger|1F34E apple=an apple|1F34C banana|1F347 grapes=a bunch of grapes
1F353 strawberry|1F349 watermelon=a slice of watermelon|1F34D pineapple|1F34B lemon|1F955 carrot|1F344 mushroom
1F35E bread=a loaf of bread|1F9C0 cheese=a piece of cheese|1F382 cake=a birthday cake|1F369 doughnut
1F366 ice cream=an ice cream cone|2615 coffee=a cup of coffee|1F333 tree|1F335 cactus|1F33B sunflower|2B50 star
1F319 moon=a crescent moon|1F308 rainbow|1F697 car|1F68C bus|1F6B2 bicycle|2708 airplane=an airplane|1F680 rocket
26F5 sailboat|1F681 helicopter|1F3C0 basketball|26BD soccer ball|1F3B8 guitar|1F3BA trumpet|2602 umbrella=an umbrella
1F511 key|23F0 clock=an alarm clock|1F4F7 camera|1F4A1 light bulb|2702 scissors=a pair of scissors|1F528 hammer
1F388 balloon|1F381 gift|1F451 crown|1F392 backpack|1F3E0 house|1F3C6 trophy|1F514 bell"""


def _parse_concept(text: str) -> Concept:
    code, rest = text.strip().split(" ", 1)
    noun, _, phrase = rest.partition("=")
    return Concept(code, noun, phrase or f"a {noun}")


CONCEPTS: tuple[Concept, ...] = tuple(_parse_concept(t) for line in _CONCEPTS.splitlines() for t in line.split("|"))

# Ten colours whose names nobody disputes; each picture jitters its own.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (208, 48, 48),
    "orange": (243, 146, 41),
    "yellow": (249, 222, 80),
    "green": (70, 160, 80),
    "blue": (52, 110, 215),
    "purple": (132, 70, 180),
    "pink": (247, 160, 192),
    "brown": (122, 80, 52),
    "gray": (150, 150, 150),
    "white": (249, 249, 249),
}
BACKGROUND_JITTER = 12

# Icons of the demo's concepts whose names in these packs match no CLDR name or shortcode.
_EXTRA_NAMES = {
    "1F430": ("bunnyface",),
    "1F355": ("sliceofpizza",),
    "1F3E0": ("housebuilding",),
    "1F381": ("present",),
    "1F41D": ("honeybee",),
    "1F981": ("lionface",),
    "1F392": ("schoolsatchel", "schoolbackpack"),
}


def jittered_background(name: str, rng: np.random.Generator) -> np.ndarray:
    """An RGB colour (uint8, shape (3,)) which everybody would call ``name``."""
    # Equal steps in all channels keep gray and white neutral.
    step = rng.integers(-BACKGROUND_JITTER, BACKGROUND_JITTER + 1) + rng.integers(-3, 4, 3)
    return np.clip(np.array(BACKGROUNDS[name]) + step, 0, 255).astype(np.uint8)


def fetch_pack(art: Path, package: str) -> Path:
    """The unpacked folder of an npm ``package`` under ``art``; fetched with ``npm pack`` when it is not there."""
    flat = package.lstrip("@").replace("/", "-")
    version = PACK_VERSIONS.get(package)
    for folder in sorted(art.glob(f"{flat}-{version or '[0-9]*'}")):
        if (folder / "package").is_dir():
            return folder / "package"
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"{package} is not under {art}, and npm, which would fetch it, is not installed")
    art.mkdir(parents=True, exist_ok=True)
    wanted = f"{package}@{version}" if version else package
    done = subprocess.run([npm, "pack", "--silent", wanted], cwd=art, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"npm could not fetch {wanted}: {done.stderr.strip()}")
    archive = art / done.stdout.strip().splitlines()[-1]
    folder = art / archive.name.removesuffix(".tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def fetch_wordnet(art: Path) -> Path:
    """The folder with WordNet's ``data.noun`` etc. under ``art``; from Debian's ``wordnet-base`` if it is not there."""
    folder = art / "wordnet"
    if not (folder / "usr/share/wordnet/data.noun").exists():
        for client in ("apt-get", "dpkg"):
            if shutil.which(client) is None:
                raise SystemExit(f"WordNet is not under {folder}, and {client}, which would fetch it, is not installed")
        art.mkdir(parents=True, exist_ok=True)
        if not list(art.glob("wordnet-base_*.deb")):
            subprocess.run(["apt-get", "download", "wordnet-base"], cwd=art, check=True)
        subprocess.run(["dpkg", "-x", str(next(art.glob("wordnet-base_*.deb"))), str(folder)], check=True)
    return folder / "usr/share/wordnet"


@lru_cache
def cldr_entries(art: Path) -> dict[str, dict]:
    """CLDR data by code point(s), without variation selectors: label, tags, group, and all known ``shortcodes``."""
    english = fetch_pack(art, "emojibase-data") / "en"
    shortcodes: dict[str, list[str]] = {}
    for source in ("cldr", "emojibase", "github", "iamcal", "joypixels"):
        for code, names in json.loads((english / f"shortcodes/{source}.json").read_text()).items():
            shortcodes.setdefault(code, []).extend([names] if isinstance(names, str) else names)
    entries = {}
    for entry in json.loads((english / "data.json").read_text()):
        label = entry["label"].replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "")
        entry |= {"label": label, "shortcodes": shortcodes.get(entry["hexcode"], [])}
        entries[entry["hexcode"].replace("-FE0F", "")] = entry
    return entries


def _squash(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


class Vendor:
    """One vendor's SVG pack: which of its icons draw a code point, and the rendered pictures."""

    def __init__(self, art: Path, name: str, codes: list[str]) -> None:
        package = fetch_pack(art, f"@iconify-json/{name}")
        pack = json.loads((package / "icons.json").read_text())
        self.name, self._icons, self._aliases = name, pack["icons"], pack.get("aliases", {})
        self._size = (pack.get("width", 16), pack.get("height", 16))
        by_code = json.loads((package / "chars.json").read_text())
        self.icons: dict[str, list[str]] = {}
        if by_code:
            for code in codes:
                icon = by_code.get(code.lower()) or by_code.get(f"{code.lower()}-fe0f")
                if icon:
                    self.icons[code] = [icon]
        else:
            self._join_by_name(cldr_entries(art), codes)

    def _join_by_name(self, entries: dict[str, dict], codes: list[str]) -> None:
        names: dict[str, list[str]] = {}
        every = set(self._icons) | set(self._aliases)
        for icon in sorted(every):
            plain = re.sub(r"(-flat)?(-\d+)?$", "", icon) if self.name.startswith("streamline") else icon
            # FxEmoji calls the face "dog" and the whole animal "dogside".
            if self.name == "fxemoji":
                plain = (
                    plain.removesuffix("side") if plain.endswith("side") else plain + "face" * (f"{icon}side" in every)
                )
            names.setdefault(_squash(plain), []).append(icon)
        wishes = {
            code: [*_EXTRA_NAMES.get(code, ()), entries[code]["label"], *entries[code]["shortcodes"]] for code in codes
        }
        taken: set[str] = set()
        # One wish of everybody after the other: a good name of one emoji is a weak synonym of another.
        for turn in range(max(map(len, wishes.values()))):
            for code, wish in wishes.items():
                icons = names.get(_squash(wish[turn]), []) if turn < len(wish) and code not in self.icons else []
                if icons and not taken.intersection(icons):
                    self.icons[code] = icons
                    taken.update(icons)

    def _svg(self, icon: str) -> tuple[str, bool]:
        flip = False
        while icon not in self._icons:
            alias = self._aliases[icon]
            icon, flip = alias["parent"], flip ^ alias.get("hFlip", False)
        found = self._icons[icon]
        width, height = found.get("width", self._size[0]), found.get("height", self._size[1])
        box = f"{found.get('left', 0)} {found.get('top', 0)} {width} {height}"
        space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {space} viewBox="{box}">{found["body"]}</svg>', flip

    def sprites(self, code: str, size: int) -> list[Image.Image]:
        """RGBA pictures of a code point, rendered at ``size`` pixels and cropped to what is drawn."""
        import resvg_py

        out = []
        for icon in self.icons.get(code, []):
            svg, flip = self._svg(icon)
            picture = Image.open(BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))).convert(
                "RGBA"
            )
            box = picture.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
            if box and min(box[2] - box[0], box[3] - box[1]) >= 4:
                picture = picture.crop(box)
                out.append(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture)
        return out


def fit(sprite: Image.Image, size: int) -> Image.Image:
    """Resize so that the longer side is ``size`` pixels."""
    scale = size / max(sprite.size)
    return sprite.resize(
        (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale))), Image.Resampling.BOX
    )


def load_held_out_pairs(path: Path) -> set[frozenset[str]]:
    """The pairs of nouns that no training picture and no training sentence may hold together."""
    return {frozenset(pair) for pair in json.loads(path.read_text())["pairs"]}


class HeldOutFilter:
    """Whether a text names both objects of a held-out pair."""

    def __init__(self, pairs: set[frozenset[str]]) -> None:
        self._pairs = pairs
        self._noun = {form: c.noun for c in CONCEPTS for form in (c.noun, c.bare)}
        words = "|".join(sorted(map(re.escape, self._noun), key=len, reverse=True))
        self._pattern = re.compile(rf"\b({words})(?:e?s)?\b", re.IGNORECASE)

    def nouns(self, text: str) -> set[str]:
        """The demo's nouns in a text, in singular or plural."""
        return {self._noun[m.lower()] for m in self._pattern.findall(text)}

    def __call__(self, text: str) -> bool:
        """Whether a held-out pair's two nouns are both in ``text``."""
        found = sorted(self.nouns(text))
        return any(frozenset((a, b)) in self._pairs for i, a in enumerate(found) for b in found[i + 1 :])
