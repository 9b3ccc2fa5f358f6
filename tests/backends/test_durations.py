"""How long builds took, and how little depends on it."""

from asapc.backends.tensorrt import durations
from asapc.backends.tensorrt.durations import keep_duration, keep_tail, last_duration


def test_the_last_duration_of_each_build_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(durations, "folder", lambda: tmp_path / "engines")
    assert last_duration("a") is None
    for seconds in (3.0, 4.04):
        keep_duration("a", seconds)
    keep_duration("b", 1)
    assert (last_duration("a"), last_duration("b"), last_duration("c")) == (4.0, 1.0, None)
    monkeypatch.setattr(durations, "MOST", 2)
    keep_duration("c", 1)
    assert (last_duration("a"), last_duration("b"), last_duration("c")) == (None, 1.0, 1.0)


def test_a_damaged_cache_is_as_good_as_none(monkeypatch, tmp_path):
    monkeypatch.setattr(durations, "folder", lambda: tmp_path)
    for content in ("", "[1]", '{"a": "long"}', '{"a": -1}'):
        (tmp_path / "durations.json").write_text(content)
        assert last_duration("a") is None
        keep_duration("b", 2)
        assert last_duration("b") == 2.0


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(durations, "folder", lambda: tmp_path / "file" / "engines")
    keep_duration("a", 2)
    (tmp_path / "log").write_text("end")
    assert keep_tail(tmp_path / "log") is None
