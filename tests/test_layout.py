"""The package's layout: imports go one way, public names are explained, and nothing prints."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "vlm_peft"
MODULES = sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
LEVELS = [
    {"attention", "configuration_vision_qwen", "hub_access", "pictures", "tasks"},
    {"arguments", "head", "licences", "projector", "shared_prefix"},
    {"hub", "hub_datasets", "modeling_vision_qwen", "processing_vision_qwen"},
    {"greedy", "joining"},
    {"adapters", "collator", "data", "feature_cache", "generation"},
    {"loading", "splits", "trainer"},
    {"captioning", "chat", "export", "leakage", "mixture"},
    {"streaming", "web_demo"},
    {"training_setup"},
    {"doctor"},
]
"""Lowest first; a module imports from the levels below its own. Modules that are not here stand above all of them."""

LATE = {("modeling_vision_qwen", "adapters"), ("modeling_vision_qwen", "joining")}
THIRD_PARTIES = {
    "trl": {"arguments", "doctor", "trainer", "training_setup"},
    "bitsandbytes": {"adapters"},
    "gradio": {"web_demo"},
}
"""Packages that only these modules may name."""

SPEAKING = {"captioning", "chat", "doctor", "splits", "trainer", "training_setup", "web_demo"}
"""Modules that talk to whoever runs a command or a training."""


def parse(module: str) -> ast.Module:
    path = PACKAGE / module
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of ours and top-level packages of others that a module, or any file of a package, names anywhere."""
    folder = PACKAGE / module
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    outward = 2 if folder.is_dir() else 1
    ours, theirs = set(), set()
    for node in [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]:
        if isinstance(node, ast.Import):
            theirs |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == outward:
            ours |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            theirs.add(node.module.partition(".")[0])
    return ours & set(MODULES), theirs


def level(module: str) -> int:
    return next((number for number, names in enumerate(LEVELS) if module in names), len(LEVELS))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    ours, theirs = imports(module)
    if module != "__init__" and level(module) < len(LEVELS):
        assert not {name for name in ours if level(name) >= level(module) and (module, name) not in LATE}
    for package, users in THIRD_PARTIES.items():
        assert package not in theirs or module in users or level(module) == len(LEVELS)


def test_every_level_names_modules_that_exist():
    assert set().union(*LEVELS) <= set(MODULES)


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


@pytest.mark.parametrize("module", [name for name in MODULES if level(name) < len(LEVELS) and name not in SPEAKING])
def test_library_modules_do_not_print(module):
    calls = [node for node in ast.walk(parse(module)) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


def test_no_module_is_a_drawer_for_leftovers():
    assert not {"utils", "helpers", "common", "misc", "registry"} & set(MODULES)


def test_no_file_names_a_machine():
    for path in [*PACKAGE.glob("*"), *Path(ROOT / "recipes").rglob("*.y*ml")]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not [root for root in ("/home/", "/work/", "/root/", "/Users/") if root in text], path
