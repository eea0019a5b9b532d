import pytest

from lossprune.deployment import plans


@pytest.fixture(autouse=True)
def _plans_of_its_own(tmp_path, monkeypatch):
    """Let each test measure anew: a plan kept by one, of a busy moment, would decide another."""
    monkeypatch.setattr(plans, "cache_folder", lambda: tmp_path / "cache")
