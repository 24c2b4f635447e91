"""A kernel with a mistake in it, in place of the sound one: what a comparison with the reference must notice."""

import importlib.util
from pathlib import Path


def plant(bug, module, file, tmp_path, monkeypatch):
    """Replace a kernel that a module launches.

    Args:
        bug: (kernel, text of its file, also of helpers that it calls, what replaces it there).
        module: whose attribute the kernel is.
        file: source file of the kernel.
        tmp_path: folder for the changed copy.
        monkeypatch: pytest's.
    """
    kernel, old, new = bug
    source = Path(file).read_text()
    assert old in source, f"the kernel changed: plant {bug!r} anew"
    path = tmp_path / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", path)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(module, kernel, getattr(planted, kernel))
