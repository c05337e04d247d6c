"""Every example runs, on a tiny base where it trains."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_line(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    told = _run("bash", str(EXAMPLES / "command_line.sh"), str(tiny_folders["bert"]), cwd=tmp_path)
    results = Path(told.rsplit("results in ", 1)[1].strip())
    assert (results / "folders" / "sts" / "model.safetensors").is_file()
    assert '"retention_adapter"' in (results / "scores.json").read_text()


def test_compose(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    told = _run(sys.executable, str(EXAMPLES / "compose.py"), str(tiny_folders["bert"]), cwd=tmp_path)
    assert [line.split(":")[0] for line in told.splitlines()] == ["fedavg", "orthoada", "ensemble"]


def test_own_task(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    told = _run(sys.executable, str(EXAMPLES / "own_task.py"), str(tiny_folders["bert"]), cwd=tmp_path)
    assert "accuracy" in told
    assert any(f"-> {name}" in told for name in ("question", "statement"))


def test_serve(tmp_path: Path) -> None:
    told = _run(sys.executable, str(EXAMPLES / "serve.py"), cwd=tmp_path)
    assert len(told.splitlines()) == 5


def test_every_example_is_run() -> None:
    tested = {"command_line.sh", "compose.py", "own_task.py", "own_task.yml", "serve.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested
