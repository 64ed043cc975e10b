"""The command as a process: its entry points, statuses and how soon it answers."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import layer_files
import pytest

from moe_jax.command_line import main
from moe_jax.command_line.progress import Progress

ROOT = Path(__file__).parents[2]
MODULE = [sys.executable, "-W", "error", "-m", "moe_jax"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*MODULE, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help():
    done = run("--help")
    assert done.returncode == 0 and "convert" in done.stdout and not done.stderr


def test_a_process_converts_and_fails(tmp_path):
    source = layer_files.write_file(tmp_path, "mixtral")
    arguments = ["convert", str(source), str(tmp_path / "a.onnx"), "--to", "onnx-dense"]
    done = run(*arguments, "--experts-per-token", "2", "--tolerance", "0")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "tolerance" in done.stderr
    assert not (tmp_path / "a.onnx").exists()


def test_the_script_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = importlib.metadata.EntryPoint("", project["scripts"]["moe-jax"], "console_scripts")
    assert entry.load() is main


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["transmogrify"],
        ["inspect"],
        ["inspect", "a", "--experts-per-token", "0"],
        ["convert", "a", "b.onnx", "--tolerance", "-1"],
        ["convert", "a", "b.onnx", "--tolerance", "nan"],
        ["export-onnx", "a", "b.onnx"],
        ["export-onnx", "a", "b.onnx", "--mode", "sparse"],
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out
    assert err.startswith("moe-jax") and err.count("\n") == 1


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, capsys, monkeypatch):
    path = layer_files.write_file(tmp_path, "custom")
    for name in [n for n in sys.modules if n.startswith("moe_jax.formats.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("moe_jax.formats.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["inspect", str(path)]) == 2
    err = capsys.readouterr().err
    assert "pip install moe-jax[onnx]" in err and err.count("\n") == 1


def test_errors_that_are_ours_are_not_hidden(tmp_path, monkeypatch):
    def fault(*arguments):
        raise AttributeError("a fault")

    # who takes the function by its name must not take this one, and keep it
    importlib.import_module("moe_jax.command_line.convert")
    monkeypatch.setattr("moe_jax.command_line.sources.open_source", fault)
    with pytest.raises(AttributeError):
        main(["inspect", str(tmp_path)])


def test_the_bar_is_drawn_over_and_cleared(capsys):
    bar = Progress(3, shown=True)
    assert list(bar.over("ab", "reading")) == ["a", "b"]
    bar.step("writing")
    bar.close()
    err = capsys.readouterr().err
    assert "[........................] 0/3 reading a" in err
    assert "[################........] 2/3 writing" in err
    assert err.endswith("\r\x1b[K")


def test_there_is_no_bar_where_nobody_sees_it(capsys):
    bar = Progress(1)
    bar.step("writing")
    bar.close()
    assert capsys.readouterr().err == ""
