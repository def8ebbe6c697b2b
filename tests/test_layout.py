"""The package's layout: folders import one way, public names are explained, and nothing prints."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "vlm_peft"
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
ROOMS = (
    "drafts",
    "json_files",
    "console",
    "hub",
    "metrics",
    "model",
    "tasks",
    "data",
    "adapters",
    "evaluation",
    "report",
    "training",
    "contrastive",
    "studies",
    "teacher",
    "commands",
    "__main__",
)
"""Folders and single modules, lowest first; each imports from itself and from those before it."""

LATE = {("model.modeling_vision_qwen", "adapters.folder"), ("model.joining", "contrastive.folder")}
"""Imports upwards, made when a function is called: `from_adapter` is the public door to a room further up, and an
encoder may be a fine-tuned CLIP's adapter folder."""

THIRD_PARTIES = {
    "trl": {
        "commands.doctor",
        "studies.tune",
        "training.arguments",
        "training.grpo",
        "training.grpo_trainer",
        "training.setup",
        "training.trainer",
    },
    "bitsandbytes": {"adapters.lora"},
    "gradio": {"commands.web_demo"},
    "optuna": {"studies.tune"},
}
"""Packages that only these modules may name."""

SPEAKING = {
    "console",
    "commands",
    "data.splits",
    "hub.unpickle",
    "studies",
    "teacher.synthesize",
    "training",
    "__main__",
}
"""Rooms and modules that talk to whoever runs a command or a training."""


def room(module: str) -> str:
    return module.partition(".")[0]


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


def test_the_list_of_rooms_is_whole():
    assert {room(module) for module in MODULES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    ours, theirs = imports(module)
    assert "vlm_peft" not in theirs, "Imports inside the package are relative."
    if module != "__init__":
        allowed = {*ROOMS[: ROOMS.index(room(module)) + 1], "__version__"}
        assert not {name for name in ours if room(name) not in allowed and (module, name) not in LATE}
    for package, users in THIRD_PARTIES.items():
        assert package not in theirs or module in users


def test_nothing_is_found_by_changing_the_path_of_imports():
    for folder in ("vlm_peft", "recipes", "eval", "tests"):
        for path in set(ROOT.glob(f"{folder}/**/*.py")) - {Path(__file__)}:
            assert "sys.path" not in path.read_text(encoding="utf-8"), path


def test_tests_import_no_tests():
    for path in (ROOT / "tests").glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.startswith("test_")], path


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


@pytest.mark.parametrize("module", [name for name in MODULES if not {name, room(name)} & SPEAKING])
def test_library_modules_do_not_print(module):
    calls = [node for node in ast.walk(parse(module)) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


def test_no_module_is_a_drawer_for_leftovers():
    names = {part for module in MODULES for part in module.split(".")}
    assert not {"utils", "helpers", "common", "misc", "registry"} & names


def test_no_file_names_a_machine():
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.jinja"), *Path(ROOT / "recipes").rglob("*.y*ml")]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not [root for root in ("/home/", "/work/", "/root/", "/Users/") if root in text], path
