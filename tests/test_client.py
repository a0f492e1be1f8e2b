"""A silo's function, found by file or module name."""

from pathlib import Path

import pytest

from fl_helpers import client


def test_the_hospitals_function_is_loaded_by_file_or_by_module(tmp_path):
    code = "from fl_helpers.client import Client\n"
    code += "def make(data, settings): return Client((data, settings), None)\n"
    code += "def other(data, settings): return 3\n"
    (tmp_path / "mine.py").write_text(code)
    entry = f"{tmp_path}/mine.py:make"
    assert client.load_client(entry, "/data", {"lr": 1}).silo == (
        Path("/data"), {"lr": 1}
    )  # fmt: skip
    with pytest.raises(TypeError, match="must return a Client, got int"):
        client.load_client(f"{tmp_path}/mine.py:other", "/data", {})
    with pytest.raises(ModuleNotFoundError):
        client.load_client("no_such_module:make", "/data", {})
    with pytest.raises(ValueError, match="got 'mine.py'"):
        client.load_client("mine.py", "/data", {})
