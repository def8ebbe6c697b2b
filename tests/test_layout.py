"""The package's layout: imports go one way, public names are explained, and nothing prints."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "vlm_peft"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
LEVELS = [
    {"attention", "configuration_vision_qwen", "pictures", "tasks"},
    {"head", "projector", "shared_prefix"},
    {"modeling_vision_qwen", "processing_vision_qwen"},
    {"joining"},
    {"adapters", "collator", "feature_cache", "generation"},
    {"data", "trainer"},
]
"""Lowest first; a module imports from the levels below its own. Modules that are not here stand above all of them."""

# Called at run time only: `VisionQwen` is the public door to both.
LATE = {("modeling_vision_qwen", "adapters"), ("modeling_vision_qwen", "joining")}
THIRD_PARTIES = {"trl": {"trainer"}, "peft": {"adapters", "generation", "trainer"}, "bitsandbytes": {"adapters"}}


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of ours and top-level packages of others that a module names anywhere."""
    ours, theirs = set(), set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            theirs |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            ours |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
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


@pytest.mark.parametrize("module", [name for name in MODULES if level(name) < len(LEVELS) and name != "trainer"])
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
