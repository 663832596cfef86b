"""Where a node keeps what it keeps."""

import os
import stat
import tempfile

import pytest
from fieldlab_common.errors import ConfigurationError
from fieldlab_executor.cache import cache_folder


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A user whose home cannot be written to, with a folder for temporary files of its own."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_where_the_variables_say(tmp_path):
    assert cache_folder({"FIELDLAB_CACHE": str(tmp_path / "a"), "XDG_CACHE_HOME": "/"}) == tmp_path / "a"
    assert cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "fieldlab"


def test_without_a_home_it_is_among_the_temporary_files_and_private(homeless):
    folder = cache_folder({})
    assert folder == homeless / f"fieldlab-cache-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache_folder({}) == folder


def test_what_others_may_write_to_is_no_cache(homeless):
    cache_folder({}).chmod(0o777)
    with pytest.raises(ConfigurationError, match="not this user's alone"):
        cache_folder({})


def test_a_link_that_somebody_laid_is_no_cache(homeless, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (homeless / f"fieldlab-cache-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="not this user's alone"):
        cache_folder({})
