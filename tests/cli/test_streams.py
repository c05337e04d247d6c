"""Standard streams that are closed, full, cut off or narrow, in real processes; texts that would steer a terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.file import read_adapter, write_adapter
from tests.adapters.helpers import random_adapter
from tests.cli.command import mbert
from tests.corpus import read_tsv, write_corpus

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
PROGRAM = "from mergekit_bert.cli import main; main()"
HOSTILE = "red \x1b[31m bell \x07 del \x7f c1 \x9b2J bidi \u202e line \u2028 [bold]tag[/bold] :smile:"
SHOWN = r"red \x1b[31m bell \x07 del \x7f c1 \x9b2J bidi \u202e line \u2028 [bold]tag[/bold] :smile:"
CONTROLS = [*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\u2028", "\u2029", *"\u202a\u202b\u202c\u202d\u202e"]
STEERING = {*CONTROLS, *"\u2066\u2067\u2068\u2069"} - {"\n"}


@pytest.fixture(scope="module")
def home(bert: mb.Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with its base, and rows."""
    folder = tmp_path_factory.mktemp("streams")
    write_adapter(folder / "sst.safetensors", random_adapter(bert, "sst", targets="qv"))
    write_corpus(folder / "data", ("sst",), train=12, dev=12)
    return folder


def shell(line: str, here: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """``line`` in a shell in which ``mbert`` is the program."""
    function = f"mbert() {{ '{sys.executable}' -c '{PROGRAM}' \"$@\"; }}; {line}"
    env = {**ENV, **variables}
    return subprocess.run(["bash", "-c", function], cwd=here, env=env, capture_output=True, text=True, check=False)


NARROW = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_what_cannot_be_encoded_is_escaped(home: Path) -> None:
    done = shell("mbert methods ties; mbert tasks sté", home, **NARROW)
    assert done.returncode == 1
    assert done.stdout.startswith("## `ties`\n")
    assert r"\u03bb" in done.stdout
    assert done.stderr.startswith("error: task: 'st")
    assert done.stderr.isascii()
    assert done.stderr.count("\n") == 1


CLOSED = {
    "output": (">&-", 1, "error: standard output: it is closed, so what was printed is lost; expected "),
    "output and input": ("<&- >&-", 1, "error: standard output: it is closed"),
    "errors": ("2>&-", 0, ""),
    "all": ("<&- >&- 2>&-", 1, ""),
    "full output": (">/dev/full", 1, "error: standard output: no space left on device, so what was printed is lost; "),
    "full errors": ("2>/dev/full", 0, ""),
}


@pytest.mark.parametrize("case", CLOSED)
def test_a_stream_that_cannot_be_used_is_one_line_at_most(home: Path, case: str) -> None:
    how, code, message = CLOSED[case]
    done = shell(f"mbert tasks sst {how}", home)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1 if message else 0), done.stderr
    assert done.stderr.startswith(message)
    assert bool(done.stdout) == (code == 0)


def test_an_error_that_nobody_can_read_is_still_one(home: Path) -> None:
    assert shell("mbert tasks none 2>&-", home).returncode == 1
    assert shell("mbert tasks --none 2>&-", home).returncode == 2


def test_what_a_command_writes_is_there_without_any_stream(home: Path) -> None:
    done = shell("mbert merge sst.safetensors --method fedavg --out closed.safetensors <&- >&- 2>&-", home)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert mb.load(home / "closed.safetensors").tasks[0].name == "sst"


_NUMBERS = """
import os
os.close(0); os.close(1); os.close(2)
import sys
sys.stdin = sys.stdout = sys.stderr = None
from mergekit_bert.cli.streams import standard_streams
with standard_streams() as out:
    file = open("opened.txt", "wb")
    number = file.fileno()
    os.write(1, b"from a library")
    os.write(2, b"from a library")
    sys.stderr.write("lost")
    print(sys.stdin.read(), end="")
    lost = [out.lost]
    print("lost")
    lost.append(out.lost)
file.write(f"{number} {lost}".encode())
"""


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _NUMBERS], cwd=tmp_path, env=ENV, check=True)
    number, lost = (tmp_path / "opened.txt").read_text().split(" ", 1)
    assert int(number) > 2
    assert lost == "[None, OSError('it is closed')]"


def test_a_reader_that_has_gone_ends_a_command_quietly(home: Path) -> None:
    done = shell("{ sleep 1; mbert methods --markdown; echo code $? >&2; } | true", home)
    assert (done.stdout, done.stderr) == ("", "code 141\n")
    done = shell("mbert methods --markdown | head -1", home)
    assert (done.stdout, done.stderr, done.returncode) == ("## `adamerging`\n", "", 0)


def test_nothing_on_standard_input_is_one_line(home: Path) -> None:
    done = shell("mbert predict sst.safetensors <&-", home)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: standard input: it is empty")
    assert done.stderr.count("\n") == 1


def assert_calm(text: str) -> None:
    assert not STEERING & set(text), sorted(map(ascii, STEERING & set(text)))
    text.encode()  # no halves of pairs


def test_predictions_are_escaped_on_standard_output_and_kept_in_files(home: Path, tmp_path: Path) -> None:
    row = {"sentence": f"good {HOSTILE}"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    printed = mbert("predict", "sst.safetensors", "--input", tmp_path / "rows.jsonl", here=home)
    assert printed.code == 0, printed.err
    assert_calm(printed.out.replace("\t", ""))
    assert f"good {SHOWN}" in printed.out
    done = mbert(
        "predict", "sst.safetensors", "--input", tmp_path / "rows.jsonl", "--out", tmp_path / "p.tsv", here=home
    )
    assert done.code == 0, done.err
    assert read_tsv(tmp_path / "p.tsv")[0]["sentence"] == row["sentence"]


def test_a_task_of_a_stranger_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    told = {
        "name": "odd",
        "description": "[bold]all \x7f of it[/bold]",
        "kind": "classify",
        "text": ["remark"],
        "label": "kind",
        "labels": ["no", "yes"],
        "metric": ["accuracy"],
    }
    for labels in (["no", "yes"], [f"no {HOSTILE}", "yes"]):
        (tmp_path / "odd.yml").write_text(json.dumps({**told, "labels": labels}))  # JSON is YAML
        done = mbert("tasks", tmp_path / "odd.yml")
        assert_calm(done.out + done.err)
        assert done.code == 0 or done.err.count("\n") == 1


def test_errors_notes_and_usage_are_escaped(tmp_path: Path) -> None:
    name = "x\x1b]0;title\x07\x9b\u202e\r\ny"
    for words in (
        ("inspect", name),
        ("tasks", name),
        ("methods", name),
        (name,),
        ("tasks", f"--{name}"),
        ("tasks", "a", name),
    ):
        done = mbert(*words, here=tmp_path)
        assert done.code in (1, 2)
        assert_calm(done.out + done.err)
        assert r"x\x1b" in done.err, words


def test_tables_hold_texts_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    from mergekit_bert.evaluation.tables import as_text
    from mergekit_bert.terminal import say, say_json, say_lines, show

    monkeypatch.setenv("COLUMNS", "200")
    table = Table("name", f"head {HOSTILE}", title=f"title {HOSTILE}")
    table.add_row("one", f"cell {HOSTILE}")
    show(table)
    for text in (capsys.readouterr().out, as_text(table)):
        assert_calm(text)
        for place in ("head", "title", "cell"):
            assert f"{place} {SHOWN}" in text
    say(f"a {HOSTILE}\r\nb")
    say_lines(f"a {HOSTILE}\nb\n")
    say_json({"b": HOSTILE, "a": 1})
    line, one, two, *rest = capsys.readouterr().out.splitlines()
    assert line == rf"a {SHOWN}\r\nb"
    assert (one, two) == (f"a {SHOWN}", "b")
    assert_calm("".join(rest))
    assert json.loads("".join(rest)) == {"b": HOSTILE, "a": 1}


def test_a_model_file_of_a_stranger_is_shown_and_not_obeyed(bert: mb.Encoder, tmp_path: Path) -> None:
    import dataclasses

    one = random_adapter(bert, "sst", targets="qv")
    odd = dataclasses.replace(one, training={**one.training, "precision": "[red]x[/red] :cat:"})
    write_adapter(tmp_path / "odd.safetensors", odd)
    assert read_adapter(tmp_path / "odd.safetensors").training["precision"] == "[red]x[/red] :cat:"
    done = mbert("inspect", tmp_path / "odd.safetensors")
    assert done.code == 0, done.err
    assert_calm(done.out + done.err)
    assert "[red]x[/red] :ca" in done.out, "neither markup nor emoji, cut at 16 characters"


def test_progress_is_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_bert.progress import progress_bar

    monkeypatch.setenv("COLUMNS", "400")
    with progress_bar(f"title {HOSTILE}", 2, show=True) as bar:
        bar(2, f"note {HOSTILE}")
    shown = capsys.readouterr().err
    assert_calm(shown)
    assert f"title {SHOWN}"[:60] in shown
    assert f"note {SHOWN}"[:60] in shown
