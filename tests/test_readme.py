"""README and docs/ tell the truth: their Python runs, their commands parse, their links and tables lead somewhere.

Every ``python`` block of a page is executed, in order and in one namespace, unless its fence says ``no-run: <reason>``.
Every command of the ``bash`` blocks is checked against the program it calls; those of ``python -m tokenizers`` run.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

import tokenizers
from configs import quickstart
from tokenizers import __main__ as command_line
from tokenizers import media
from tokenizers.data import benchmark, settings
from tokenizers.train import build, loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs of other people, and the shell's own words.
FOREIGN = ("source", "export", "cd", "pip", "git", "gcloud", "tensorboard")
FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    """(first line, code) of the blocks of a page that are meant to run."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == language and "no-run:" not in match[2]:
            yield text[: match.start()].count("\n") + 2, match[3]


def is_file(code):
    """A block that starts with the path of a file is that file: a page builds something with it."""
    return re.match(r"# \w+/.*\.py\n", code) is not None


def commands(page):
    """Every command, as words; environment settings in front of it are dropped."""
    for _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder like the repository's root, with a trained run and some clips in it."""
    place = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "tokenizers", "benchmarks", "tests", "train.py", "eval.py", "run"):
        (place / name).symlink_to(ROOT / name)
    config = quickstart.get_config("smoke")
    config.steps, config.compilation_cache, config.log.tensorboard = 1, "", False
    config.discriminator.name = None  # quicker to compile
    del config.data.streams["image"]
    config.evaluation.max_items = 4
    assert loop.run(config, place / "runs/quickstart")
    rng = np.random.default_rng(0)
    for number in range(4):
        coarse = rng.integers(0, 256, (20, 6, 8, 3)).astype(np.uint8)
        media.write(place / f"clips/{number}.mp4", coarse.repeat(12, axis=1).repeat(12, axis=2), fps=8)
    shutil.copy(place / "clips/0.mp4", place / "clip.mp4")
    return place


@pytest.fixture
def there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)
    return workplace


@each_page
def test_python_blocks_run(page, there):
    namespace = {"__name__": "__page__"}
    for line, code in blocks(page, "python"):
        if not is_file(code):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@each_page
def test_commands_exist(page, there):
    for words in commands(page):
        check(words)


def check(words):
    """Raises when a command would not start."""
    program, *arguments = words
    if program in FOREIGN:
        if "&&" in arguments[-1]:  # handed to another shell
            check(shlex.split(arguments[-1].split("&&")[-1].removeprefix("--command=")))
    elif program == "kubectl":
        assert (ROOT / arguments[-1]).is_file(), words
    elif program == "sbatch" or program.startswith("launch/"):
        script, *arguments = arguments if program == "sbatch" else words
        assert (ROOT / script).is_file(), words
        check_flags(["train.py", *arguments])
    elif program == "./run":
        assert arguments[0] in re.findall(r"^ {4}(\w+)\)", (ROOT / "run").read_text(), re.MULTILINE), words
    elif program == "python" and arguments[:2] == ["-m", "tokenizers"]:
        if not any(name in argument for argument in arguments for name in ("<", "patches")):
            assert command_line.main(arguments[2:]) == 0, words
    elif program == "python" and arguments[:2] == ["-m", "tokenizers.data.benchmark"]:
        benchmark.main([*arguments[2:], "--workers", "0", "--batches", "1"])
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).is_file() or "patches" in path for path in arguments[2:]), words
    elif program == "python" and arguments[0] in ("train.py", "eval.py"):
        check_flags(arguments)
    elif program == "python":
        text = (ROOT / arguments[0]).read_text()
        assert all(flag.split("=")[0] in text for flag in arguments[1:] if flag.startswith("--")), words
    else:
        raise AssertionError(f"who knows the command {shlex.join(words)}?")


def check_flags(arguments):
    """The flags of train.py or eval.py are accepted, and the config that they make can be built."""
    given = flags.FlagValues()
    if arguments[0] == "eval.py" and not any(word.startswith("--config=") for word in arguments):
        arguments = [arguments[0], "--config=configs/eval_default.py", *arguments[1:]]
    config_flags.DEFINE_config_file("config", flag_values=given)
    for name in ("workdir", "mesh") if arguments[0] == "train.py" else ("checkpoint", "out"):
        flags.DEFINE_string(name, None, name, flag_values=given)
    flags.DEFINE_bool("dry_run", False, "of train.py", flag_values=given)
    if any("configs/patches.py" in argument for argument in arguments):
        return  # the page that says so writes that file
    # The parser of config flags looks for them in sys.argv.
    with warnings.catch_warnings(), mock.patch.object(sys, "argv", arguments):
        warnings.simplefilter("ignore", DeprecationWarning)  # how ml_collections loads a file
        assert given(arguments) == arguments[:1], arguments
    config = given.config.to_dict()
    settings.resolve(config["data"])
    if arguments[0] == "train.py":
        build.recipe(config)
    else:
        assert pathlib.Path(given.checkpoint).exists(), arguments


@each_page
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text()), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name}: {target}; there are {slugs}"


def test_the_table_of_families_is_true():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| images[^|]* \| [^|]+ \| (`[^|]+) \| \[[\d.]+\]\(", text, re.MULTILINE)
    named = [name for examples in rows for name in re.findall(r"`([\w.-]+)`", examples)]
    assert len(named) == len(set(named)) >= len(rows) > 5
    assert set(named) <= set(tokenizers.available())


def test_the_architecture_names_every_module():
    """Every file of the package is in its row; models and conversion tables are listed by being there."""
    text = (ROOT / "docs/architecture.md").read_text()
    rows = dict(re.findall(r"^\| ((?:`[\w/]+`(?:, )?)+) \| (.*) \|$", text, re.MULTILINE))
    rows = {name: content for names, content in rows.items() for name in re.findall(r"`(\w+)/?`", names)}
    for path in sorted((ROOT / "tokenizers").rglob("*.py")):
        part, *rest = path.relative_to(ROOT / "tokenizers").with_suffix("").parts
        if part == "__init__":
            continue
        assert part in rows, path
        if rest and rest != ["__init__"] and part not in ("models", "convert"):
            assert re.search(rf"\b{rest[0]}\b", rows[part]), path


def test_every_guide_is_listed_on_the_first_page():
    listed = set(LINK.findall((ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= listed


def test_the_example_tokenizer_works(tmp_path):
    """docs/add_a_tokenizer.md, carried out in a copy of the repository: its files and its test."""
    for name in ("tokenizers", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/test_imports.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    written = []
    for _, code in blocks(ROOT / "docs/add_a_tokenizer.md", "python"):
        if is_file(code):
            name = code.split("\n", 1)[0].removeprefix("# ")
            assert not (tmp_path / name).exists(), name
            (tmp_path / name).write_text(code.split("\n", 1)[1])
            written.append(name)
    for check in (["format", "--check", "--diff"], ["check"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, *written], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "pytest", "tests/test_patches.py", "tests/test_imports.py", "-k", "patches"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_continuous_integration_calls_the_test_command():
    command = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert re.search(r'/run" tests "\$@"$', command)
    assert "./run tests" in (ROOT / "README.md").read_text()
    assert os.access(ROOT / "run", os.X_OK)
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_setup_reads_only_the_listed_requirements():
    names = re.findall(r"requirements[\w-]*\.txt", (ROOT / "run").read_text())
    assert all((ROOT / name).is_file() for name in names)
    notebooks = (ROOT / "notebooks").glob("*.ipynb")
    text = "".join(json.dumps(json.loads(page.read_text())) for page in notebooks)
    assert "requirements.txt" in text
