import pytest

from fusion_jax.errors import UserError
from fusion_jax.paths import replacing, write_file, write_folder


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


def test_a_folder_that_somebody_else_wrote_meanwhile_stays(tmp_path):
    def write(name, **how):
        with write_folder(tmp_path / name, **how) as draft:
            (draft / "mine").touch()
            (tmp_path / name).mkdir()
            (tmp_path / name / "theirs").touch()

    write("cache")
    with pytest.raises(UserError, match="somebody else meanwhile"):
        write("result", shared=False)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["cache", "cache/theirs", "result", "result/theirs"]
