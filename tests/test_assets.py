"""The asset mirror and its downloader, against a real HTTP server that misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from dreamer_isaac.assets import download
from dreamer_isaac.assets.download import Downloader, DownloadError, pack, unpack
from dreamer_isaac.assets.mirror import Asset, Mirror, UnsafePath, clean, flat, parse, relative
from dreamer_isaac.assets.references import references
from dreamer_isaac.assets.resolver import Resolver
from dreamer_isaac.assets.tasks import assets_of, with_run_time

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("pxr", reason="usd-core is not installed")
R = "5.1"
TREE = f"Assets/Isaac/{R}/"


class Server(ThreadingHTTPServer):
    """A bucket: `files` by key. `faults`: key -> faults, one taken per request of that key."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults = files, dict[str, list[str]]()
        self.listing, self.page = True, 3
        self.tag_suffix = ""  # a file uploaded in parts has a tag that is no checksum
        self.extra_keys: list[str] = []
        self.asked: list[tuple[str, str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path).lstrip("/")
        self.server.asked.append((self.command, key, self.headers.get("Range", "")))
        if not key:
            return self.list(parse_qs(parts.query))
        fault = ""
        if body and self.server.faults.get(key):
            fault = self.server.faults[key].pop(0)
        if key not in self.server.files or fault == "404":
            return self.send(404, b"")
        if fault == "changed":  # since the server was asked about it
            self.server.files[key] = bytes(reversed(self.server.files[key]))
        data = self.server.files[key]
        tag = f'"{hashlib.md5(data).hexdigest()}{self.server.tag_suffix}"'
        if fault == "503":
            return self.send(503, b"", {"Retry-After": "0"})
        if fault == "redirect":
            return self.send(302, b"", {"Location": f"{self.server.url}/moved/{key}"})
        if fault == "slow":
            time.sleep(3)
        start = 0
        wanted = self.headers.get("Range", "")
        if wanted and self.headers.get("If-Range", tag) == tag and fault != "no range":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        content = data[start:]
        headers = {"ETag": tag, "Content-Length": str(len(content))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if fault == "corrupt":
            content = bytes(len(content))
        if fault == "longer":
            content += b"more"
            headers["Content-Length"] = str(len(content))
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if fault == "drop":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def list(self, query: dict[str, list[str]]) -> None:
        if not self.server.listing:
            return self.send(403, b"")
        prefix = query.get("prefix", [""])[0]
        keys = sorted([*self.server.files, *self.server.extra_keys])
        keys = [k for k in keys if k.startswith(prefix)]
        start = int(query.get("continuation-token", ["0"])[0])
        some, after = keys[start : start + self.server.page], start + self.server.page
        entries = "".join(
            f"<Contents><Key>{escape(k)}</Key><Size>{len(self.server.files.get(k, b''))}</Size>"
            f"<ETag>&quot;{hashlib.md5(self.server.files.get(k, b'')).hexdigest()}&quot;</ETag>"
            "</Contents>" for k in some
        )  # fmt: skip
        more = f"<NextContinuationToken>{after}</NextContinuationToken>" if keys[after:] else ""
        text = ('<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/'
                f'2006-03-01/">{entries}{more}</ListBucketResult>')  # fmt: skip
        self.send(200, text.encode())


def layer(*references: str, textures: tuple[str, ...] = (), variant: str = "") -> bytes:
    """A USD layer as text."""
    lines = ["#usda 1.0", "(", 'defaultPrim = "A"', ")", 'def Xform "A" (']
    if references:
        lines.append("prepend references = [" + ", ".join(f"@{r}@</A>" for r in references) + "]")
    if variant:
        lines += ['prepend variantSets = "v"', 'variants = { string v = "x" }']
    lines += [")", "{"]
    lines += [f"asset inputs:t{i} = @{t}@" for i, t in enumerate(textures)]
    if variant:
        lines += ['variantSet "v" = {', '"x" {', f'def "C" (prepend references = @{variant}@)',
                  "{", "}", "}", "}"]  # fmt: skip
    return "\n".join([*lines, "}", ""]).encode()


BIG = bytes(range(256)) * 4000
ROBOT = "Isaac/IsaacLab/Robots/Unitree/Go2/go2.usd"
FILES = {
    # A robot whose material lies in another category, by a relative path; with a variant.
    ROBOT: layer("./parts/leg.usd", "../../../Materials/Base/base.usda",
                 textures=("tex/skin.<UDIM>.png",), variant="./parts/extra.usda"),
    "Isaac/IsaacLab/Robots/Unitree/Go2/parts/leg.usd": layer(textures=("../tex/leg.png",)),
    "Isaac/IsaacLab/Robots/Unitree/Go2/parts/extra.usda": layer(),
    "Isaac/IsaacLab/Robots/Unitree/Go2/tex/leg.png": BIG,
    "Isaac/IsaacLab/Robots/Unitree/Go2/tex/skin.1001.png": b"tile 1",
    "Isaac/IsaacLab/Robots/Unitree/Go2/tex/skin.1002.png": b"tile 2",
    "Isaac/IsaacLab/Materials/Base/base.usda": layer(textures=("wood.mdl", "OmniPBR.mdl")),
    "Isaac/IsaacLab/Materials/Base/wood.mdl": b'mdl 1.4; import .::Grain::*; texture_2d("./w.png")',
    "Isaac/IsaacLab/Materials/Base/Grain.mdl": b"mdl 1.4;",
    "Isaac/IsaacLab/Materials/Base/w.png": b"wood",
    "Isaac/Robots/Other/arm.usda": layer(),
    "Isaac/IsaacLab/ActuatorNets/net.pt": b"net",
}  # fmt: skip
CLOSURE = {p for p in FILES if p.startswith(("Isaac/IsaacLab/Robots", "Isaac/IsaacLab/Materials"))}


@pytest.fixture
def server() -> Iterator[Server]:
    s = Server({TREE + k: v for k, v in FILES.items()})
    thread = threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield s
    s.shutdown()
    s.server_close()


def make(server: Server, root: Path, **options: Any) -> Downloader:
    return Downloader(Mirror(root), R, server.url, pause=0.01, timeout=1.0, **options)


def in_tree(root: Path) -> set[str]:
    base = root / "Assets" / "Isaac" / R
    return {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()} - {
        "manifest.json"
    }


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("https://h/Assets/Isaac/5.1/Isaac/Robots/a%20b.usd", Asset("5.1", "Isaac/Robots/a b.usd")),
        ("omniverse://h/Assets/Isaac/4.5/NVIDIA/x.hdr?y=1", Asset("4.5", "NVIDIA/x.hdr")),
        ("/local/Assets/Isaac/6.0/Isaac/./x/../y.usd", Asset("6.0", "Isaac/y.usd")),
        ("https://h/other/file.usd", None), ("socket.usd", None), ("/Assets/Isaac/Isaac/x", None),
    ],
)  # fmt: skip
def test_urls_of_any_release(reference: str, expected: Asset | None) -> None:
    assert parse(reference) == expected


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/x", "..", "", ".", "a\\b", "c:/x", "a\nb", "a\0b"]
)
def test_names_that_leave_the_mirror(path: str) -> None:
    with pytest.raises(UnsafePath):
        clean(path)
    if path not in ("", ".", "a\nb"):  # a URL's line breaks are dropped, as browsers do it
        with pytest.raises(UnsafePath):
            parse(f"https://h/Assets/Isaac/5.1/{path}" if path != "/x" else "/Assets/Isaac/5.1//x")


def test_relative_references() -> None:
    asset = Asset(R, "Isaac/Robots/A/a.usd")
    assert relative(asset, "../B/b.usd") == Asset(R, "Isaac/Robots/B/b.usd")
    assert relative(asset, "https://h/Assets/Isaac/4.5/Isaac/x") == Asset("4.5", "Isaac/x")
    assert relative(asset, "/etc/passwd") is None and relative(asset, "file:///etc/x") is None
    with pytest.raises(UnsafePath):
        relative(asset, "../../../../x.usd")


def test_the_flat_layout() -> None:
    assert flat("Isaac/IsaacLab/Robots/U/g.usd") == "Robots/U/g.usd" == flat("Isaac/Robots/U/g.usd")
    assert flat("NVIDIA/Assets/Skies/s.hdr") is None and flat("Isaac/People/p.usd") is None


def test_files_dropped_by_hand_are_found_and_links_to_other_releases_are_not(
    tmp_path: Path,
) -> None:
    mirror = Mirror(tmp_path)
    asset, older = Asset(R, ROBOT), Asset("4.5", ROBOT)
    assert mirror.locate(asset) is None
    mirror.writable(older).write_bytes(b"old")
    mirror.show(older)
    link = tmp_path / "Robots/Unitree/Go2/go2.usd"
    assert link.is_symlink() and link.read_bytes() == b"old" and mirror.locate(asset) is None
    link.unlink()
    link.write_bytes(b"by hand")
    assert mirror.locate(asset) == link
    mirror.writable(asset).write_bytes(b"new")
    mirror.show(asset)  # what is there already stays
    assert mirror.locate(asset) == mirror.place(asset) and link.read_bytes() == b"by hand"
    # Two places of the tree share one in the flat layout; a link to one is not the other.
    namesake = Asset(R, "Isaac/Robots/Unitree/B2/b2.usd")
    mirror.writable(namesake).write_bytes(b"Isaac Sim's")
    mirror.show(namesake)
    assert (tmp_path / "Robots/Unitree/B2/b2.usd").is_symlink()
    assert mirror.locate(Asset(R, "Isaac/IsaacLab/Robots/Unitree/B2/b2.usd")) is None


# -- fetching --------------------------------------------------------------------------------------


@pytest.mark.parametrize("listing", [True, False])
def test_a_file_and_everything_it_needs(server: Server, tmp_path: Path, listing: bool) -> None:
    server.listing = listing
    downloader = make(server, tmp_path)
    if listing:
        planned = downloader.plan(["Isaac/IsaacLab/Robots/"])
        assert planned is not None and len(planned) == 6  # two pages
        report = downloader.run(planned)
    else:
        assert downloader.plan(["Isaac/"]) is None
        report = downloader.run([Asset(R, ROBOT)])
    assert not report.missing and not report.failed and not report.outside
    assert in_tree(tmp_path) == CLOSURE
    for name in CLOSURE:
        assert (tmp_path / TREE / name).read_bytes() == FILES[name]
        assert (tmp_path / str(flat(name))).read_bytes() == FILES[name]
    # A check that does not use the downloader's list: USD finds everything itself.
    from pxr import UsdUtils

    layers, assets, unresolved = UsdUtils.ComputeAllDependencies(str(tmp_path / TREE / ROBOT))
    assert len(layers) == 4 and {Path(a).name for a in assets} >= {"leg.png", "skin.1002.png"}
    assert [Path(u).name for u in unresolved] in ([], ["OmniPBR.mdl"])
    before = len(server.asked)
    again = make(server, tmp_path).run([Asset(R, ROBOT)])
    assert not again.fetched and len(again.kept) == len(CLOSURE)
    assert all(command == "HEAD" for command, _, _ in server.asked[before:])


@pytest.mark.parametrize("fault", ["drop", "503", "slow", "corrupt", "longer", "no range"])
def test_faults_are_survived(server: Server, tmp_path: Path, fault: str) -> None:
    name = "Isaac/IsaacLab/Robots/Unitree/Go2/tex/leg.png"
    server.faults[TREE + name] = [fault, "drop", fault] if fault != "slow" else [fault]
    report = make(server, tmp_path, retries=6).run([Asset(R, name)])
    assert report.fetched == [Asset(R, name)] and not report.failed
    assert (tmp_path / TREE / name).read_bytes() == BIG
    assert not list(tmp_path.rglob("*.part"))
    if fault == "drop":  # what had arrived is not asked for again
        assert any(r and 0 < int(r[6:-1]) < len(BIG) for _, _, r in server.asked)


def test_a_redirect_is_followed_into_the_same_place(server: Server, tmp_path: Path) -> None:
    name = "Isaac/IsaacLab/ActuatorNets/net.pt"
    server.files[f"moved/{TREE}{name}"] = FILES[name]
    server.faults[TREE + name] = ["redirect"]
    assert make(server, tmp_path).run([Asset(R, name)]).fetched
    assert in_tree(tmp_path) == {name}


def test_what_cannot_be_had_is_said_and_the_rest_is_there(server: Server, tmp_path: Path) -> None:
    del server.files[TREE + "Isaac/IsaacLab/Materials/Base/w.png"]
    leg = "Isaac/IsaacLab/Robots/Unitree/Go2/tex/leg.png"
    server.faults[TREE + leg] = ["corrupt"] * 50
    report = make(server, tmp_path, retries=2).run([Asset(R, ROBOT)])
    assert list(report.missing) == [Asset(R, "Isaac/IsaacLab/Materials/Base/w.png")]
    assert report.missing[Asset(R, "Isaac/IsaacLab/Materials/Base/w.png")].endswith("wood.mdl")
    assert list(report.failed) == [Asset(R, leg)] and "checksum" in report.failed[Asset(R, leg)]
    assert in_tree(tmp_path) == CLOSURE - {leg, "Isaac/IsaacLab/Materials/Base/w.png"}
    server.faults.clear()
    report = make(server, tmp_path).run([Asset(R, ROBOT)])
    assert report.fetched == [Asset(R, leg)]


def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path) -> None:
    name = "Isaac/IsaacLab/Robots/Unitree/Go2/tex/leg.png"
    tag = hashlib.sha256(f'"{hashlib.md5(BIG).hexdigest()}"'.encode()).hexdigest()[:8]
    part = Mirror(tmp_path).writable(Asset(R, name)).with_name(f"leg.png.{tag}.part")
    part.write_bytes(BIG[:1000])
    assert make(server, tmp_path).run([Asset(R, name)]).fetched
    assert ("GET", TREE + name, "bytes=1000-") in server.asked
    # What was there before of another file does not get mixed in.
    other = tmp_path / "other"
    part = Mirror(other).writable(Asset(R, name)).with_name("leg.png.0a1b2c3d.part")
    part.write_bytes(b"x" * 1000)
    before = len(server.asked)
    assert make(server, other, retries=2).run([Asset(R, name)]).fetched
    assert (other / TREE / name).read_bytes() == BIG and not part.exists()
    assert all(not r for _, _, r in server.asked[before:])


def test_two_versions_of_a_file_are_not_joined(server: Server, tmp_path: Path) -> None:
    name = "Isaac/IsaacLab/Robots/Unitree/Go2/tex/leg.png"
    server.tag_suffix = "-2"
    tag = hashlib.sha256(f'"{hashlib.md5(BIG).hexdigest()}-2"'.encode()).hexdigest()[:8]
    part = Mirror(tmp_path).writable(Asset(R, name)).with_name(f"leg.png.{tag}.part")
    part.write_bytes(BIG[:1000])
    server.faults[TREE + name] = ["changed"]
    assert make(server, tmp_path).run([Asset(R, name)]).fetched
    assert (tmp_path / TREE / name).read_bytes() == bytes(reversed(BIG))


def test_a_changed_file_is_fetched_again_and_a_damaged_one_is_noticed(
    server: Server, tmp_path: Path
) -> None:
    name = "Isaac/IsaacLab/ActuatorNets/net.pt"
    make(server, tmp_path).run([Asset(R, name)])
    server.files[TREE + name] = b"NET"
    assert make(server, tmp_path).run([Asset(R, name)]).fetched
    assert (tmp_path / TREE / name).read_bytes() == b"NET"
    assert make(server, tmp_path).verify() == {}
    (tmp_path / TREE / name).write_bytes(b"TEN")
    assert "other contents" in make(server, tmp_path).verify()[name]
    manifest = json.loads((tmp_path / TREE / "manifest.json").read_text())
    assert manifest["release"] == R and manifest["files"][name]["size"] == 3


# -- nothing is written outside ------------------------------------------------------------------


def test_malicious_names_and_references(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "root"
    server.extra_keys = [TREE + "Isaac/Robots/../../../../../evil.usd", TREE + "/abs.usd"]
    server.files[TREE + "Isaac/Robots/Bad/bad.usda"] = layer(
        "../../../../../../evil.usd", "/etc/passwd", "file:///etc/passwd", "https://h/x.usd"
    )
    downloader = make(server, root)
    planned = downloader.plan(["Isaac/Robots/"])
    assert planned is not None and all(".." not in r.asset.path for r in planned)
    report = downloader.run(planned)
    assert len(report.outside) == 4 and not report.failed
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(root)]
    assert outside == []


def test_links_that_lead_out_of_the_mirror(server: Server, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    root = tmp_path / "root"
    (root / TREE).mkdir(parents=True)
    (root / TREE / "Isaac").symlink_to(away)
    report = make(server, root).run([Asset(R, ROBOT)])
    assert "leads out of the mirror" in report.failed[Asset(R, ROBOT)]
    assert list(away.iterdir()) == []
    other = tmp_path / "other"
    target = Mirror(other).writable(Asset(R, ROBOT))
    target.symlink_to(away / "x")
    report = make(server, other).run([Asset(R, ROBOT)])
    assert "is a link" in report.failed[Asset(R, ROBOT)] and list(away.iterdir()) == []


def test_a_link_in_the_flat_layout_that_leads_out(server: Server, tmp_path: Path) -> None:
    away, root = tmp_path / "away", tmp_path / "root"
    away.mkdir()
    root.mkdir()
    (root / "Robots").symlink_to(away)
    assert not make(server, root).run([Asset(R, ROBOT)]).failed
    assert list(away.iterdir()) == [] and in_tree(root) == CLOSURE


def test_a_file_in_the_way_of_a_folder_fails_alone(server: Server, tmp_path: Path) -> None:
    server.files[TREE + "Isaac/k"] = b"file"
    server.files[TREE + "Isaac/k/z.bin"] = b"below it"
    report = make(server, tmp_path, workers=1).run(
        [Asset(R, "Isaac/k"), Asset(R, "Isaac/k/z.bin"), Asset(R, ROBOT)]
    )
    assert list(report.failed) == [Asset(R, "Isaac/k/z.bin")]
    assert CLOSURE | {"Isaac/k"} == in_tree(tmp_path)


def test_a_disk_that_is_too_small(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    downloader = make(server, tmp_path)
    planned = downloader.plan(["Isaac/"])
    assert planned is not None
    with pytest.raises(DownloadError, match="are needed and"):
        downloader.run(planned)
    assert not any(command == "GET" and key for command, key, _ in server.asked)


# -- carrying -----------------------------------------------------------------------------------


def test_packed_and_unpacked_elsewhere(server: Server, tmp_path: Path) -> None:
    make(server, tmp_path / "a").run([Asset(R, ROBOT)])
    archive = tmp_path / "a.tar"
    assert pack(tmp_path / "a", archive) == len(CLOSURE) + 1
    assert unpack(archive, tmp_path / "b") == len(CLOSURE) + 1
    assert in_tree(tmp_path / "b") == CLOSURE
    assert (tmp_path / "b/Robots/Unitree/Go2/go2.usd").read_bytes() == FILES[ROBOT]
    assert Downloader(Mirror(tmp_path / "b"), R).verify() == {}
    # Another one on top: the manifest knows both.
    make(server, tmp_path / "c").run([Asset(R, "Isaac/Robots/Other/arm.usda")])
    pack(tmp_path / "c", archive)
    unpack(archive, tmp_path / "b")
    both = Downloader(Mirror(tmp_path / "b"), R)
    assert len(both.manifest) == len(CLOSURE) + 1 and both.verify() == {}
    with pytest.raises(DownloadError, match="cannot be read"):
        unpack(tmp_path / "none.tar", tmp_path / "b")


@pytest.mark.parametrize("name", ["../x", "/x", "Assets/Isaac/5.1/../../../x", "other/x"])
def test_archives_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UnsafePath):
        unpack(archive, tmp_path / "b")
    link = tarfile.TarInfo("Assets/Isaac/5.1/Isaac/l")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(link)
    with pytest.raises(UnsafePath):
        unpack(archive, tmp_path / "b")
    archive.write_bytes(b"no tar at all")
    with pytest.raises(DownloadError, match="cannot be read"):
        unpack(archive, tmp_path / "b")


# -- the command and tasks -------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "download_assets.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


def test_the_command(server: Server, tmp_path: Path) -> None:
    where = ["--root", str(tmp_path / "m"), "--server", server.url]
    done = command("--categories", "Robots", "--subset", "Unitree", "--dry-run", *where)
    assert done.returncode == 0 and "go2.usd" in done.stdout and "6 files" in done.stdout
    assert in_tree(tmp_path / "m") == set()
    done = command("--categories", "Robots", "--subset", "Unitree", *where)
    assert done.returncode == 0, done.stderr
    assert in_tree(tmp_path / "m") == CLOSURE and f"{len(CLOSURE)} files fetched" in done.stdout
    assert command("--verify", *where).returncode == 0
    done = command("--categories", "Robot", *where)
    assert done.returncode == 2 and "ActuatorNets" in done.stderr
    done = command("--files", "Isaac/none.usd", *where)
    assert done.returncode == 1 and "not on the server" in done.stdout
    done = command("--categories", "all", "--root", str(tmp_path / "n"), "--server",
                   "http://127.0.0.1:9")  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") < 5 and "Traceback" not in done.stderr


def test_assets_that_a_configuration_names() -> None:
    class Spawn:
        def __init__(self) -> None:
            self.usd_path = f"https://h/{TREE}{ROBOT}"
            self.scale = (1.0, 1.0)

    class Task:
        def __init__(self) -> None:
            self.robot = Spawn()
            self.events = {"x": {"params": {"textures": [f"https://h/{TREE}Isaac/a.png"]}}}
            self.me = self

    found = assets_of(Task())
    assert found[Asset(R, ROBOT)] == "cfg.robot.usd_path"
    assert found[Asset(R, "Isaac/a.png")] == "cfg.events['x']['params']['textures'][0]"
    assert len(with_run_time(found, R)) == 3


def test_a_file_that_is_no_usd(tmp_path: Path) -> None:
    bad = tmp_path / "x.usd"
    bad.write_bytes(b"not usd")
    with pytest.raises(ValueError, match="cannot be opened"):
        references(bad)


# -- the resolver --------------------------------------------------------------------------------

FAKE = """
import io, os
NUCLEUS_ASSET_ROOT_DIR = "https://h/Assets/Isaac/5.1"
NVIDIA_NUCLEUS_DIR = f"{NUCLEUS_ASSET_ROOT_DIR}/NVIDIA"
ISAAC_NUCLEUS_DIR = f"{NUCLEUS_ASSET_ROOT_DIR}/Isaac"
ISAACLAB_NUCLEUS_DIR = f"{ISAAC_NUCLEUS_DIR}/IsaacLab"
def check_file_path(path): return 2
def retrieve_file_path(path, download_dir=None, force_download=True): return "from the server"
def read_file(path): return io.BytesIO(b"from the server")
"""
USER = """
from isaaclab.utils.assets import *
import isaaclab.sim.utils.prims as prims
URL = f"{ISAACLAB_NUCLEUS_DIR}/Robots/Unitree/Go2/go2.usd"
OLD = "https://h/Assets/Isaac/4.5/Isaac/IsaacLab/Robots/Unitree/Go2/go2.usd"
NONE = f"{ISAACLAB_NUCLEUS_DIR}/Robots/none.usd"
print("local", check_file_path(URL), retrieve_file_path(URL), read_file(URL).read()[:9])
print("old", prims.add_usd_reference("/a", OLD))
print("none", check_file_path(NONE), prims.add_usd_reference("/a", usd_path=NONE))
print("other", check_file_path("https://h/x.usd"), prims.add_usd_reference("/a", "/x.usd"))
try:
    read_file(NONE)
except FileNotFoundError as e:
    print("error", e)
"""


def isaaclab_like(folder: Path) -> Path:
    """A package with Isaac Lab's names, and a script that uses them as Isaac Lab's code does."""
    for package in ("isaaclab", "isaaclab/utils", "isaaclab/sim", "isaaclab/sim/utils"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
    (folder / "isaaclab/utils/assets.py").write_text(FAKE)
    (folder / "isaaclab/sim/utils/prims.py").write_text(
        "def add_usd_reference(prim_path, usd_path, stage=None):\n    return usd_path\n"
    )
    script = folder / "script.py"
    script.write_text(USER)
    return script


def test_a_script_runs_unchanged_on_the_mirror(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "m"
    make(server, root).run([Asset(R, ROBOT)])
    script = isaaclab_like(tmp_path / "lib")
    done = subprocess.run(
        [sys.executable, "-m", "dreamer_isaac.assets", "run", "--root", str(root), "--strict",
         str(script)], capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    place = root / TREE / ROBOT
    assert out["local"] == f"1 {place} b'#usda 1.0'"
    old = root / "Assets/Isaac/4.5" / ROBOT
    assert out["old"] == str(old)
    assert out["none"] == f"0 {root / TREE / 'Isaac/IsaacLab/Robots/none.usd'}"
    assert out["other"] == "2 /x.usd"
    assert "--files Isaac/IsaacLab/Robots/none.usd" in out["error"]
    assert "assets: 1 from" in done.stderr and "2 missing" in done.stderr


def test_what_is_missing_comes_from_the_server_and_with_all_it_needs(
    server: Server, tmp_path: Path
) -> None:
    said: list[str] = []
    resolver = Resolver(Mirror(tmp_path), server=server.url, say=said.append)
    url = f"https://h/{TREE}{ROBOT}"
    assert resolver.resolve(url) == str(tmp_path / TREE / ROBOT)
    assert in_tree(tmp_path) == CLOSURE and "fetched" in said[0]
    asked = len(server.asked)
    assert resolver.resolve(url) == resolver.resolve(str(tmp_path / TREE / ROBOT))
    assert len(server.asked) == asked
    assert resolver.resolve("https://h/other.usd") == "https://h/other.usd"
    assert resolver.resolve("/somewhere/Assets/Isaac/5.1/x.usd").startswith("/somewhere")
    resolver.resolve(f"https://h/{TREE}Isaac/none.usd")
    assert "missing" in said[-1]
    assert resolver.report().endswith("0 from " + str(tmp_path) + ", 1 fetched, 1 missing")


def test_a_file_dropped_by_hand_is_used_from_its_place_in_the_tree(tmp_path: Path) -> None:
    by_hand = tmp_path / "Robots/Unitree/Go2/go2.usd"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(layer())
    resolver = Resolver(Mirror(tmp_path), strict=True)
    path = Path(resolver.resolve(f"omniverse://h/{TREE}{ROBOT}"))
    assert path == tmp_path / TREE / ROBOT and path.read_bytes() == layer()
    assert not path.is_symlink()  # so that a download can replace it


def test_preflight_finds_what_is_missing_below_what_is_there(
    server: Server, tmp_path: Path
) -> None:
    make(server, tmp_path).run([Asset(R, ROBOT)])
    resolver = Resolver(Mirror(tmp_path), strict=True)
    whole = resolver.preflight({Asset(R, ROBOT): "cfg.robot.usd_path"})
    assert not whole.missing and "all " in whole.describe(tmp_path)
    gone = "Isaac/IsaacLab/Materials/Base/w.png"
    (tmp_path / TREE / gone).unlink()
    partly = resolver.preflight({Asset(R, ROBOT): "cfg", Asset(R, "Isaac/x.usd"): "cfg.x"})
    assert set(partly.missing) == {Asset(R, gone), Asset(R, "Isaac/x.usd")}
    text = partly.describe(tmp_path)
    assert "wood.mdl" in text and "cfg.x" in text and f"--files {gone} Isaac/x.usd" in text
    assert not any(command == "GET" and key.endswith("x.usd") for command, key, _ in server.asked)
    assert partly.below == [Asset(R, gone)]  # x.usd will be asked for when it is needed


def test_what_a_file_that_is_there_refers_to_is_fetched(server: Server, tmp_path: Path) -> None:
    make(server, tmp_path).run([Asset(R, ROBOT)])
    gone = Asset(R, "Isaac/IsaacLab/Materials/Base/w.png")
    (tmp_path / TREE / gone.path).unlink()
    said: list[str] = []
    away = Resolver(Mirror(tmp_path), server="http://127.0.0.1:9", say=said.append)
    away.fetch([gone])
    assert not (tmp_path / TREE / gone.path).exists() and "assets missing" in said[-1]
    resolver = Resolver(Mirror(tmp_path), server=server.url, say=said.append)
    resolver.fetch([gone, Asset(R, "Isaac/none.usd")])
    assert (tmp_path / TREE / gone.path).exists()
    assert "asset missing: Isaac/none.usd" in said[-1] and "1 missing" in resolver.report()
