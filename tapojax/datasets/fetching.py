"""Published files on this disk: downloaded once, resumed after a break, never half under their name."""

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

CHUNK = 1 << 20
NOTHING_BEHIND = 416
WITHOUT = "without a network, give files that you have with --source=SPLIT=PATH or --source=FOLDER"
AGAIN = (408, NOTHING_BEHIND, 425, 429)  # of the statuses of a request at fault, those that pass


def local(place: str, folder: Path, *, sha256: str = "", timeout_s: float = 60.0, tries: int = 4) -> Path:
    """The file at a path, as it is, or at a URL, from the folder, where it is downloaded to if it is not there.

    What has come of a broken download stays beside it as .part, and the next try or run goes on behind it if the server
    says that the file is still the same one.

    Raises:
      ValueError: no such file, no reply after `tries`, another checksum than `sha256`.
    """
    if not is_url(place):
        if sha256 and not Path(place).is_file():
            raise ValueError(f"no data file at {place}: check --source")
        return _checked(Path(place), sha256)
    path = folder / name_of(place)
    if path.exists():
        return _checked(path, sha256)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(1, tries + 1):
        try:
            _download(place, part, timeout_s)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == NOTHING_BEHIND:
                part.unlink(missing_ok=True)  # all of it was there, or more than there is: anew
            if attempt == tries or not _passes(error):
                kept = f"; {part.stat().st_size} bytes are kept, run it again to go on" if part.exists() else ""
                raise ValueError(f"{place} cannot be fetched: {error}{kept}; {WITHOUT}") from error
            time.sleep(min(2.0 ** (attempt - 2), 30.0))
    _tag(part).unlink(missing_ok=True)
    _checked(part, sha256, remove=True)
    part.rename(path)
    return path


def is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def name_of(url: str) -> str:
    """The last part of its path, behind a few letters that differ for different URLs."""
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urllib.parse.urlparse(url).path).name}"


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(path: Path, sha256: str, remove: bool = False) -> Path:
    if sha256 and (found := checksum(path)) != sha256:
        if remove:
            path.unlink()
        raise ValueError(
            f"{path} is another file than was published: its sha256 is {found}, expected {sha256}"
            + ("; it was removed, fetch it again" if remove else "; remove it, or give it with --source=SPLIT=PATH")
        )
    return path


def _download(url: str, part: Path, timeout_s: float):
    have = part.stat().st_size if part.exists() else 0
    validator = _tag(part).read_text() if have and _tag(part).exists() else ""
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if validator else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s) as response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError(f"asked for bytes from {have}, got {response.headers.get('Content-Range')!r}")
        if not resumed:
            part.unlink(missing_ok=True)  # before its tag changes
            _tag(part).write_text(_validator(response.headers))
        expected = response.headers.get("Content-Length")
        with part.open("ab" if resumed else "wb") as file:
            before = file.tell()
            shutil.copyfileobj(response, file, CHUNK)
            came = file.tell() - before
    if expected is not None and came < int(expected):
        raise OSError(f"the connection ended after {came} of {expected} bytes")


def _validator(headers) -> str:
    """What a server recognises the same file by."""
    tag = headers.get("ETag") or ""
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _passes(error: Exception) -> bool:
    return not isinstance(error, urllib.error.HTTPError) or error.code >= 500 or error.code in AGAIN
