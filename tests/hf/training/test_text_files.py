"""An interrupted write leaves the old file unchanged. Errors name the file."""

from pathlib import Path

import pytest

from lens_kernels.hf.training.text_files import read_text, write_text


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    write_text(file, "grün")
    assert file.read_bytes().decode("utf-8") == read_text(file) == "grün"
    write = Path.write_text

    def interrupted(self, text, **options):
        write(self, text[:2], **options)
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(OSError, match="No space left on device: .*run.yaml"):
            write_text(file, "blau")
    assert read_text(file) == "grün"
    write_text(file, "rot")
    assert read_text(file) == "rot" and list(tmp_path.iterdir()) == [file]


def test_other_bytes_than_utf_8_are_named(tmp_path):
    (tmp_path / "data.json").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match="data.json is not UTF-8 at byte 3"):
        read_text(tmp_path / "data.json")
