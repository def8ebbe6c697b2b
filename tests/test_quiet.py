"""No command shows notices of libraries that nobody who runs it can act on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[1]
SCRIPTS = [*CLONE.glob("recipes/*.py"), *CLONE.glob("eval/*.py"), CLONE / "vlm_peft" / "__main__.py"]
SPEAKERS = {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_imports_this_package_before_a_library_speaks(script):
    """Importing this package filters what bitsandbytes says when peft or TRL import it."""
    imported = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            imported += [(node.lineno, each.name) for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append((node.lineno, node.module or "vlm_peft") if not node.level else (node.lineno, "vlm_peft"))
    first = next((name for _, name in sorted(imported) if name.split(".")[0] in SPEAKERS | {"vlm_peft"}), "vlm_peft")
    assert first.split(".")[0] == "vlm_peft"


def test_importing_peft_after_this_package_says_nothing():
    # What the logger would say on a processor with the instructions, and what an import says on this one.
    code = (
        "import logging, vlm_peft, peft, bitsandbytes\n"
        "speaker = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "speaker.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'no kernels')\n"
        "speaker.warning('something else')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CLONE, check=True)
    assert said.stdout == ""
    assert said.stderr.strip() == "something else"
