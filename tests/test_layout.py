"""The package's layout: imports go one way, public names are explained, and nothing prints."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "vlm_peft"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or path.parent == PACKAGE
)
LEVELS = [
    {
        "attention",
        "cpu_choices",
        "drafts",
        "data.pictures",
        "data.tables",
        "hub.access",
        "options",
        "projector",
        "skinny",
        "tasks",
        "vision_tower",
    },
    {"arguments", "configuration_vision_qwen", "data.groups", "fused_lora", "hub.licences"},
    {"head", "shared_prefix", "turns"},
    {
        "collator",
        "hub.datasets",
        "hub.models",
        "hub.weights",
        "modeling_vision_qwen",
        "processing_vision_qwen",
    },
    {"adapters", "greedy", "joining"},
    {"captured", "cuda", "data.rows", "feature_cache", "probe"},
    {"beams"},
    {"data.splits", "generation", "loading", "trainer"},
    {"checkpoints", "data.leakage", "data.mixture"},
    {"data.streaming"},
    {"training_setup"},
    {"commands"},
]
"""Lowest first; a module imports from the levels below its own. Modules that are not here stand above all of them."""

LATE = {
    ("modeling_vision_qwen", "adapters"),
    ("modeling_vision_qwen", "joining"),
    ("projector", "configuration_vision_qwen"),
}
"""Imports upwards: two when a function is called, one for the type checker alone."""

THIRD_PARTIES = {
    "trl": {"arguments", "commands.doctor", "trainer", "training_setup"},
    "bitsandbytes": {"adapters"},
    "gradio": {"commands.web_demo"},
}
"""Packages that only these modules may name."""

PACKAGES = {"tasks", "commands"}
"""Packages whose modules share a level and may import each other."""

SPEAKING = {"commands", "data.splits", "trainer", "training_setup"}
"""Modules that talk to whoever runs a command or a training."""


def room(module: str, rooms: set[str]) -> bool:
    """Whether a module, or the package that it is in, is among these."""
    return module in rooms or module.partition(".")[0] in rooms


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of ours and top-level packages of others that a module names anywhere."""
    folders = module.split(".")[:-1]
    ours, theirs = set(), set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            theirs |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = folders[: len(folders) + 1 - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                full = ".".join([*above, *name.split(".")])
                # `from ..data import splits` names a module, `from ..tasks import Task` something in a package.
                members = {f"{full}.{alias.name}" for alias in node.names} & set(MODULES)
                ours |= members or {full}
        elif isinstance(node, ast.ImportFrom):
            theirs.add(node.module.partition(".")[0])
    return ours, theirs


def level(module: str) -> int:
    return next((number for number, names in enumerate(LEVELS) if room(module, names)), len(LEVELS))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    ours, theirs = imports(module)
    if module != "__init__" and level(module) < len(LEVELS):
        inside = {name for name in ours if name.partition(".")[0] in PACKAGES & {module.partition(".")[0]}}
        assert not {name for name in ours - inside if level(name) >= level(module) and (module, name) not in LATE}
    for package, users in THIRD_PARTIES.items():
        assert package not in theirs or module in users or level(module) == len(LEVELS)


def test_every_level_names_modules_that_exist():
    assert set().union(*LEVELS) <= set(MODULES) | {name.partition(".")[0] for name in MODULES}


def public_definitions(tree: ast.Module):
    """Public functions, classes and methods, and public constants with the node that follows each."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", ast.get_docstring(member)


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_explained(module):
    tree = parse(module)
    assert ast.get_docstring(tree)
    assert not [name for name, text in public_definitions(tree) if not text]


@pytest.mark.parametrize("module", [name for name in MODULES if level(name) < len(LEVELS) and not room(name, SPEAKING)])
def test_library_modules_do_not_print(module):
    calls = [node for node in ast.walk(parse(module)) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


def test_no_module_is_a_drawer_for_leftovers():
    names = {part for module in MODULES for part in module.split(".")}
    assert not {"utils", "helpers", "common", "misc", "registry"} & names


def test_no_file_names_a_machine():
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.glob("*.jinja"), *Path(ROOT / "recipes").rglob("*.y*ml")]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not [root for root in ("/home/", "/work/", "/root/", "/Users/") if root in text], path
