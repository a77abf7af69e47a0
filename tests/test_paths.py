import pytest

from fusion_jax.paths import replacing, write_file


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "run.json"
    write_file(path, "first")
    with pytest.raises(KeyboardInterrupt), replacing(path) as draft:
        draft.write_text("hal")
        assert path.read_text() == "first"
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    write_file(path, "second")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]
