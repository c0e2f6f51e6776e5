"""Whatever standard output and error are, printing ends no command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PRINTS = """
import os, sys
from storage.base.console import progress_bar, run_command
def main(argv):
    with progress_bar(3, unit="img") as bar:
        bar.set_postfix_str("σ × →")
        bar.update(3)
    print("8×8 · z → x … −1 ε \\udcff", flush=True)
    print("also ·", file=sys.stderr)
    with open(argv[0], "w") as file:
        assert file.fileno() > 2
    return 0
run_command(main, "prog", sys.argv[1:])
"""
ASCII = {
    "PYTHONIOENCODING=ascii": {"PYTHONIOENCODING": "ascii"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def prints(out: Path, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    script = out.with_name("script.py")
    script.write_text(PRINTS, encoding="utf-8")
    line = [sys.executable, str(script), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", *line]
    return subprocess.run(command, capture_output=True, env=environment, timeout=60)


def test_what_utf_8_takes_is_as_it_is_and_what_is_no_character_is_escaped(tmp_path: Path) -> None:
    done = prints(tmp_path / "file", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout.decode()) == (0, "8×8 · z → x … −1 ε \\udcff\n")


@pytest.mark.parametrize("name", ASCII)
def test_an_output_of_ascii_gets_other_letters(tmp_path: Path, name: str) -> None:
    done = prints(tmp_path / "file", **ASCII[name])
    assert (done.returncode, done.stdout) == (0, b"8x8 # z -> x ... -1 \\u03b5 \\udcff\n"), done.stderr
    assert done.stderr.endswith(b"also #\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_output_is_none(tmp_path: Path, closed: str) -> None:
    done = prints(tmp_path / "file", closed, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "file").read_bytes()  # what was printed did not go into it


def test_a_current_directory_that_is_gone_is_one_line(tmp_path: Path) -> None:
    code = "import os, sys; os.mkdir('d'); os.chdir('d'); os.rmdir('../d'); "
    code += "from storage.base.console import run_command; "
    code += "run_command(lambda argv: 0, 'prog', [])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "prog: error: the current directory is gone; cd into one that is there\n"
