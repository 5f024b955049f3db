"""docs/write-a-verifier.md does what it says: its code, its commands, and the output that it shows."""

import json
import re
import shlex
from pathlib import Path

import pytest

from deltarl.rewards import VerifierSpec, load_verifier
from deltarl.rl.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-verifier.md").read_text()
MEASURED = re.compile(r", \d+ a second$|^latency .*")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's verifier and rows in it."""
    monkeypatch.chdir(tmp_path)
    Path("my_verifier.py").write_text(blocks("python")[0])
    Path("rows.jsonl").write_text(blocks("json")[0])
    return tmp_path


def test_the_first_verifier_has_ten_lines():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 10


@pytest.mark.parametrize("which", [0, 1])
def test_commands_print_what_the_page_shows(folder, capsys, which):
    Path("my_verifier.py").write_text(blocks("python")[which])
    command, *shown = blocks("console")[which].splitlines()
    assert command.startswith("$ deltarl verify --data")
    assert main(shlex.split(command)[2:]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [MEASURED.sub("", line) for line in printed] == [MEASURED.sub("", line) for line in shown]


def test_job_section_is_valid(folder, capsys):
    Path("job.yaml").write_text(blocks("yaml")[0])
    assert main(["train", "job.yaml", "--dry-run"]) == 0
    assert "verifier: ./my_verifier.py:LastWord" in capsys.readouterr().out


def test_second_verifier_checks_golds(folder):
    Path("my_verifier.py").write_text(blocks("python")[1])
    verifier = load_verifier(VerifierSpec("./my_verifier.py:LastWord", {"ignore_case": True}))
    assert verifier.check_gold(["a", "b"]) is None
    assert "not one word" in verifier.check_gold("a b")
    assert verifier.verify("It is B.", ["a", "b"], meta={}).status == "correct"
    assert verifier.verify("It is B.", ["a", "b"], meta={"truncated": True}).status == "no_answer"


def test_trl_block(folder):
    Path("my_verifier.py").write_text(blocks("python")[1])
    names = {}
    exec(compile(blocks("python")[2], "page", "exec"), names)
    with names["host"]:
        assert names["last_word"](prompts=["p"] * 2, completions=["It is 4", "5"], answer=["4", "4"]) == [1.0, 0.0]
    assert names["Brief"].verify("short", "", meta={}).status == "correct"


def test_package_block_is_the_example():
    assert blocks("toml")[0].strip() in (ROOT / "examples" / "verifier_plugin" / "pyproject.toml").read_text()


def test_served_answer_has_the_keys_that_the_page_shows():
    (line,) = re.findall(r'^\{"rewards".*\}$', PAGE, re.MULTILINE)
    assert set(json.loads(line)) == {"rewards", "scores", "extra_logs"}
