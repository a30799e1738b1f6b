"""``import vistok`` works beside another package called tokenizers."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

SCRIPT = """
import sys
sys.path.append({root!r})
import tokenizers
assert tokenizers.__version__ == "another"
import vistok
assert vistok.available() and "load" in dir(vistok)
assert vistok.create.__module__ == "vistok.loading"
from vistok.data import pipeline
assert vistok.describe(vistok.available()[0])["parameters"] > 0
assert tokenizers.__version__ == "another"
assert [name for name in sys.modules if name.startswith("tokenizers")] == ["tokenizers"]
"""


def test_beside_another_package_of_the_name(tmp_path):
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers/__init__.py").write_text("__version__ = 'another'\n")
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    subprocess.run([sys.executable, "-W", "error", tmp_path / "script.py"], check=True, cwd=tmp_path)


def test_its_command_line_is_the_same():
    command = [sys.executable, "-m", "vistok", "describe", "cosal"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown variant 'cosal'")
