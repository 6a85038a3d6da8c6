"""A download is whole or not there: it goes on where it broke off, or starts anew when the file is another one."""

import hashlib

import pytest

from tapojax.datasets import fetching
from tests.datasets.servers import Files, serving

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def files():
    return Files({"/set/train.parquet": CONTENT})


@pytest.fixture
def url(files, monkeypatch):
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)
    with serving(files) as address:
        yield f"{address}/set/train.parquet"


def names(folder):
    return sorted(path.name.partition("-")[2] for path in folder.iterdir()) if folder.exists() else []


def test_a_file_is_fetched_once(files, url, tmp_path):
    path = fetching.local(url, tmp_path, sha256=SHA256)
    assert path.read_bytes() == CONTENT and path.name.endswith("-train.parquet")
    assert fetching.local(url, tmp_path, sha256=SHA256) == path
    assert len(files.requests) == 1 and names(tmp_path) == ["train.parquet"]
    assert fetching.local(str(path), tmp_path / "none", sha256=SHA256) == path, "a path is used as it is"


def test_a_broken_download_goes_on_behind_what_came(files, url, tmp_path):
    files.plan = ["break", "break", ""]
    assert fetching.local(url, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [asked for _, asked in files.requests] == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]
    assert names(tmp_path) == ["train.parquet"]


def test_whoever_has_no_network_is_told_how_to_go_on(url, tmp_path):
    with pytest.raises(
        ValueError, match="gone cannot be fetched: .*404.*; without a network, give files .*--source=SPLIT"
    ):
        fetching.local(f"{url}/gone", tmp_path)


def test_what_came_stays_for_the_next_run_but_not_under_its_name(files, url, tmp_path):
    files.plan = ["break"] * 2
    with pytest.raises(
        ValueError, match=r"train.parquet cannot be fetched: the connection ended after \d+ of \d+ bytes; "
    ):
        fetching.local(url, tmp_path, tries=2)
    assert names(tmp_path) == ["train.parquet.part", "train.parquet.part.tag"]
    assert fetching.local(url, tmp_path).read_bytes() == CONTENT
    assert files.requests[-1][1] == f"bytes={len(CONTENT) * 3 // 4}-" and names(tmp_path) == ["train.parquet"]


@pytest.mark.parametrize("change", ["another file", "no ranges", "no tag"])
def test_a_download_starts_anew_when_it_cannot_go_on(files, url, tmp_path, change):
    files.plan = ["break"]
    files.tag = "" if change == "no tag" else files.tag
    with pytest.raises(ValueError):
        fetching.local(url, tmp_path, tries=1)
    if change == "another file":
        files["/set/train.parquet"], files.tag = CONTENT[::-1], '"v2"'
    files.ranges = change == "another file"
    assert fetching.local(url, tmp_path).read_bytes() == files["/set/train.parquet"]


@pytest.mark.parametrize("what", ["all there", "another range"])
def test_an_answer_that_does_not_fit_starts_anew(files, url, tmp_path, what):
    files.plan = ["break"]
    with pytest.raises(ValueError):
        fetching.local(url, tmp_path, tries=1)
    if what == "all there":
        (part,) = tmp_path.glob("*.part")
        part.write_bytes(CONTENT)
    else:
        files.plan = ["from the start"]
    assert fetching.local(url, tmp_path).read_bytes() == CONTENT and len(files.requests) == 3


def test_a_server_that_fails_is_asked_again_but_not_for_what_it_has_not(files, url, tmp_path):
    files.plan = ["500", "503", "429"]
    assert fetching.local(url, tmp_path).read_bytes() == CONTENT
    files.requests.clear()
    with pytest.raises(ValueError, match="other.parquet cannot be fetched: HTTP Error 404"):
        fetching.local(url.replace("train", "other"), tmp_path)
    assert len(files.requests) == 1 and names(tmp_path) == ["train.parquet"]
    files.plan = ["500"] * 9
    with pytest.raises(ValueError, match="other.parquet cannot be fetched: HTTP Error 500"):
        fetching.local(url.replace("train", "other"), tmp_path, tries=3)


def test_nobody_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="http://127.0.0.1:1/train.parquet cannot be fetched: .*refused"):
        fetching.local("http://127.0.0.1:1/train.parquet", tmp_path, tries=1)


def test_another_file_than_published_is_refused(url, tmp_path):
    with pytest.raises(ValueError, match=f"its sha256 is {SHA256}, expected 00; it was removed, fetch it again"):
        fetching.local(url, tmp_path, sha256="00")
    assert names(tmp_path) == []
    path = fetching.local(url, tmp_path)
    with pytest.raises(ValueError, match=f"train.parquet is another file than was published: its sha256 is {SHA256}"):
        fetching.local(url, tmp_path, sha256="00")
    with pytest.raises(ValueError, match="is another file than was published"):
        fetching.local(str(path), tmp_path, sha256="00")
    with pytest.raises(ValueError, match="no data file at none.parquet: check --source"):
        fetching.local("none.parquet", tmp_path, sha256="00")
