"""The work folder of ``adaptkit run``."""

from adaptkit.pipeline.work import WorkFolder


def test_unfinished_files_that_a_killed_run_left_are_deleted_and_other_files_stay(tmp_path):
    folder = tmp_path / "0123456789ab"
    folder.mkdir()
    left = [
        folder / ".small.json.15899.140191006270272.partial",
        tmp_path / ".hashes.json.8647.139890511622976.partial",
    ]
    others = [folder / ".notes.json.mine.partial.txt", folder / "small.json", tmp_path / ".x.json.1.2.partial"]
    for path in (*left, *others):
        path.write_text("{}")
    with WorkFolder(tmp_path).locked():
        assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)
