"""The browser: pages as text, virtual time, walls, and what becomes of pages that hang, crash or shout."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from treegym.tools import EpisodeLost, ToolError
from treegym.tools.browser import BrowserPage, BrowserUnavailable, FolderSite, Reply, Request, close_browser, open_page
from treegym.tools.browser.chromium import browser, chromium_path

try:
    chromium_path()
except BrowserUnavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)
pytest.importorskip("playwright", reason="pip install 'treegym[browser]'")


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_browser()


@dataclass
class Pages:
    """A site of pages by path, or of other replies."""

    pages: Mapping[str, str | Reply]
    origin: str = "http://site.test"
    asked: list[Request] = field(default_factory=list)

    def answer(self, request: Request) -> Reply:
        self.asked.append(request)
        page = self.pages.get(request.path.split("?")[0])
        if isinstance(page, Reply):
            return page
        return Reply(b"", status=404) if page is None else Reply(page.encode())


@contextlib.contextmanager
def opened(page: str, *, seconds: float = 15.0, seed: int = 0, **more: str | Reply) -> Iterator[BrowserPage]:
    site = Pages({"/": page} | {f"/{name}": text for name, text in more.items()})
    with contextlib.closing(open_page(site, f"{site.origin}/", seed=seed, seconds=seconds)) as live:
        yield live


def items(page: BrowserPage) -> list[str]:
    """Lines as texts, controls as `role name` with what else they have."""

    def shown(item: str | dict[str, Any]) -> str:
        if isinstance(item, str):
            return item
        more = [f"={item['value']}"] if "value" in item else []
        more += [f"{'*' * (option in item['chosen'])}{option}" for option in item.get("options", ())]
        name = "~" * item.get("vague", False) + item["name"]
        return " ".join(filter(None, [f"<{item['role']}", name, *more, *item["states"]])) + ">"

    return [shown(item) for item in page.read()["items"]]


def key(page: BrowserPage, name: str) -> str:
    return str(next(item["key"] for item in page.read()["items"] if isinstance(item, dict) and item["name"] == name))


READ = {
    "blocks end lines, inline text joins": ("<p>a <b>b</b>c</p>d<div>e</div>f<br>g", ["a bc", "d", "e", "f", "g"]),
    "cells": ("<table><tr><td>a<td>b<td><tr><th>1<td><td><i>2</i>", ["a | b", "1 | | 2"]),
    "label": (
        "<label>Name <input></label><label for=x>Year</label><input id=x type=number>",
        ["<textbox Name =>", "<spinbutton Year =>"],
    ),
    "select": ("<select aria-label=s><option>a<option selected>b</select>", ["<combobox s a *b>"]),
    "states": (
        "<input type=checkbox checked aria-label=c><button disabled>x</button><details><summary>more</summary>y",
        ["<checkbox c checked>", "<button x disabled>", "<button more>"],
    ),
    "tabs": ("<div role=tablist><div role=tab aria-selected=true>t</div></div>", ["<tab t selected>"]),
    "icon": ("<button class='icon-trash fa'></button>", ["<button ~icon trash fa>"]),
    "listener": (
        "<div id=d>press</div><p>not me<script>d.addEventListener('click', () => 0)</script>",
        ["<clickable press>", "not me"],
    ),
    "card": ("<div onclick=0>Ann<br>hello<button>star</button></div>", ["<clickable Ann hello>", "<button star>"]),
    "figures": (
        "<svg><circle r=10 cx=9 cy=9 fill=red /><rect width=8 height=4 fill='#88f'></svg>",
        ["(circle red 20x20)", "(rectangle light blue 8x4)"],
    ),
    "pictures": (
        "<img alt='a cat' src=/c.png><img alt='' src=/d.png><canvas width=30 height=20></canvas>",
        ["(image a cat)", "(canvas 30x20)"],
    ),
    "password": ("<input type=password value=abc aria-label=p>", ["<textbox p =•••>"]),
    "frame": ("a<iframe srcdoc='<button>in</button>'></iframe>", ["a", "<button in>"]),
    "lines that are kept": ("<pre>a\n b</pre>", ["a", "b"]),
    "hidden box of a label": (
        "<input id=x type=checkbox checked style='display:none'><label for=x>on</label>",
        ["<checkbox on checked>"],
    ),
}
HIDDEN = [
    "display:none",
    "visibility:hidden",
    "opacity:0",
    "position:absolute;left:-9999px",
    "height:0;overflow:hidden",
    "position:absolute;clip:rect(0,0,0,0)",
    "clip-path:inset(50%)",
]


@pytest.mark.parametrize("case", READ)
def test_a_page_reads(case: str) -> None:
    source, expected = READ[case]
    with opened(source) as page:
        assert items(page) == expected


def test_what_is_hidden_is_left_out() -> None:
    spans = "".join(f"<div style='{style}'>no<button>no</button></div>" for style in HIDDEN)
    with opened(f"{spans}<div hidden>no</div><template>no</template><p>yes") as page:
        assert items(page) == ["yes"]


def test_actions_reach_the_page() -> None:
    source = """<input aria-label=t value=old oninput="log('input')" onkeydown="log('key')" onchange="log('change')">
        <select aria-label=s onchange="log(this.value)"><option>a<option>b</select>
        <button onclick="log('click')">B</button>
        <i onmouseover="log('over')" tabindex=0>H</i><input type=date aria-label=d onchange="log(this.value)">
        <script>const said = []; function log(text) { if (said.at(-1) !== text) said.push(text) }</script>"""
    with opened(source) as page:
        page.type(key(page, "t"), "né")
        page.select(key(page, "s"), "b")
        page.click(key(page, "B"))
        page.hover(key(page, "H"))
        page.type(key(page, "d"), "2026-02-03")
        page.press("Tab")
        said = ["key", "input", "change", "b", "click", "over", "2026-02-03"]
        assert [text for text in page.evaluate("said") if text != "input"] == [text for text in said if text != "input"]
        assert items(page)[0] == "<textbox t =né>"
        with pytest.raises(ToolError, match="takes no"):
            page.type(key(page, "d"), "yesterday")


def test_a_control_that_has_gone_or_is_covered_is_named_as_such() -> None:
    with opened("<button onclick='this.remove()'>a</button><button>b</button>") as page:
        gone, b = key(page, "a"), key(page, "b")
        page.click(gone)
        with pytest.raises(ToolError, match="has gone"):
            page.click(gone)
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<dialog id=m>Cookies!</dialog>'), m.showModal()")
        with pytest.raises(ToolError, match=r"covered by .*Cookies"):
            page.click(b)


def test_keys_of_another_document_are_never_those_of_this_one() -> None:
    with opened("<a href=/next>go</a>", next="<a href=/>go</a>") as page:
        before = key(page, "go")
        page.click(before)
        assert page.read()["address"] == "http://site.test/next"
        with pytest.raises(ToolError, match="has gone"):
            page.click(before)
        assert page.back() and page.read()["address"] == "http://site.test/"
        assert not page.back()


# time and chance


def test_time_passes_with_actions_and_waits_alone() -> None:
    source = """<button onclick="setTimeout(() => log('299'), 299), setTimeout(() => log('301'), 301)">b</button>
        <p id=p>
        <script>const born = Date.now(); function log(text) { p.append(text, ' ', Date.now() - born, ' ') }</script>"""
    with opened(source) as page:
        time.sleep(0.4)
        page.click(key(page, "b"))
        assert items(page)[1] == "299 599"
        page.wait(1)
        assert items(page)[1] == "299 599 301 601"
        began = time.monotonic()
        page.wait(30)
        assert page.evaluate("Date.now() - born") == 300 + 300 + 31_000
        assert time.monotonic() - began < 10


CLOCKS = """[new Date().toString(), performance.now(), Math.random(), crypto.getRandomValues(new Uint8Array(4)).join(),
    Intl.DateTimeFormat().resolvedOptions().timeZone, navigator.language, new Event('x').timeStamp]"""


def test_every_document_starts_at_one_instant_with_the_chance_of_its_seed() -> None:
    seen = []
    for seed in (1, 1, 2):
        with opened("<p>x", seed=seed) as page:
            seen.append(page.evaluate(CLOCKS))
            time.sleep(0.05)
    assert seen[0] == seen[1] != seen[2]
    assert seen[0][0].startswith("Thu Jan 01 2026") and seen[0][4:6] == ["UTC", "en-US"]


def test_promises_frames_and_intervals_run_in_order_of_time() -> None:
    source = """<p id=p><script>const log = text => p.append(text, ' ');
        setInterval(() => log('i'), 100); requestAnimationFrame(() => log('frame'));
        setTimeout(() => Promise.resolve().then(() => 0).then(() => log('promise')), 50);
        setTimeout(() => log('t'), 50);
        fetch('/data').then(reply => reply.text()).then(log)</script>"""
    with opened(source, data="data") as page:
        assert items(page) == ["data frame promise t i i i"]


def test_transitions_take_no_time() -> None:
    style = "<style>div { opacity: 0; transition: opacity 5s } .on { opacity: 1 }</style>"
    with opened(f"{style}<div id=d>there</div><button onclick=\"d.className = 'on'\">b</button>") as page:
        page.click(key(page, "b"))
        assert items(page) == ["there", "<button b>"]


def test_a_picture_that_hovering_shows_is_there_before_the_click() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 90, 9, 1, 0, 0, 0, 0)  # a bit a pixel
    data = zlib.compress(bytes(9 * 13))
    picture = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    class Slow(Pages):
        def answer(self, request: Request) -> Reply:
            time.sleep(0.3 * (request.path == "/wide.png"))
            return super().answer(request)

    source = """<style>#s { display: inline-block; min-width: 36px; height: 9px } #s:hover { content: url(/wide.png) }
        </style><span id=s onclick="p.append(s.offsetWidth)">here</span><p id=p>"""
    site = Slow({"/": source, "/wide.png": Reply(picture, "image/png", headers={"Cache-Control": "max-age=60"})})
    with contextlib.closing(open_page(site, "http://site.test/")) as page:
        page.click(key(page, "here"))
        assert "90" in items(page)


# episodes are separate


def test_nothing_is_left_for_the_next_episode() -> None:
    source = """<p id=p><script>p.append(document.cookie, localStorage.x ?? '', sessionStorage.x ?? '', window.name);
        document.cookie = 'a=1'; localStorage.x = sessionStorage.x = window.name = 'left'</script>"""
    for _ in range(2):
        with opened(source) as page:
            assert items(page) == [] and not page.back()


def test_pages_side_by_side_are_separate() -> None:
    def play(number: int) -> list[str]:
        with opened(f"<input aria-label=t><button onclick='this.textContent = t.value' id=b>{number}</button>") as page:
            page.evaluate("window.t = document.querySelector('input')")
            page.type(key(page, "t"), f"number {number}")
            page.click(key(page, str(number)))
            return items(page)

    with ThreadPoolExecutor(4) as pool:
        for number, seen in enumerate(pool.map(play, range(6))):
            assert seen == [f"<textbox t =number {number}>", f"<button number {number}>"]


# walls


class Listener:
    """A server of this machine that no page may reach; it counts who tries."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.callers = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.socket.accept()[0].close()
                self.callers += 1


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    with contextlib.closing(made.socket):
        yield made


REACH = """<p id=p>
<img src=http://HOST/a><iframe src=http://HOST/b></iframe><script src=http://HOST/c></script>
<link rel=stylesheet href=http://HOST/d><link rel=prefetch href=http://HOST/e><link rel=preconnect href=http://HOST/>
<script>
for (const origin of ['http://HOST', 'https://HOST', 'http://localhost:PORT', 'http://[::1]:PORT', 'http://example.com'])
    fetch(origin + '/f', {mode: 'no-cors'}).catch(() => 0);
for (const scheme of ['ws', 'wss']) new WebSocket(scheme + '://HOST/g');
new EventSource('http://HOST/h'); navigator.sendBeacon('http://HOST/i', 'x');
new RTCPeerConnection({iceServers: [{urls: 'stun:HOST'}]}).createDataChannel('x');
try { new Worker('http://HOST/w') } catch {}
</script>"""
LEAVE = [
    "<a href=http://HOST/>go</a>",
    "<button onclick=\"location = 'http://HOST/'\">go</button>",
    "<form action=http://HOST/><button>go</button></form>",
    "<form action=http://HOST/ method=post target=_blank><button>go</button></form>",
    "<a href=http://HOST/ target=_blank>go</a>",
    "<button onclick=\"window.open('http://HOST/')\">go</button>",
    "<a href=/ download=x>go</a>",
    "<a href=https://example.com/>go</a>",
    "<button onclick=\"alert('hello')\">go</button>",
]


def test_no_page_reaches_another_server(listener: Listener) -> None:
    source = REACH.replace("HOST", f"127.0.0.1:{listener.port}").replace("PORT", str(listener.port))
    with opened(source) as page:
        page.wait(1)
        time.sleep(0.5)
        assert page.read()["address"] == "http://site.test/"
    assert listener.callers == 0


@pytest.mark.parametrize("source", LEAVE)
def test_ways_out_are_closed_and_told(source: str, listener: Listener) -> None:
    with opened(source.replace("HOST", f"127.0.0.1:{listener.port}")) as page:
        page.click(key(page, "go"))
        assert len(page.told()) == 1
        assert page.read()["address"].startswith("http://site.test/") and len(items(page)) == 1
    assert listener.callers == 0


def test_a_page_of_the_site_that_sends_elsewhere_leads_nowhere(listener: Listener) -> None:
    with opened(
        "<a href=/away>go</a>", away=f"<meta http-equiv=refresh content='0;http://127.0.0.1:{listener.port}/'>"
    ) as page:
        page.click(key(page, "go"))
        page.wait(1)
        assert "127.0.0.1" not in page.read()["address"]
    assert listener.callers == 0


def test_a_download_that_the_site_begins_is_refused_and_told() -> None:
    file = Reply(b"x" * 10_000, "application/octet-stream", headers={"Content-Disposition": "attachment"})
    with opened("<a href=/file>go</a>", file=file) as page:
        page.click(key(page, "go"))
        assert page.told() == ["a download was refused"]
        assert page.read()["address"] == "http://site.test/" and items(page) == ["<link go>"]


def test_a_folder_gives_nothing_from_outside_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in" / "index.html").write_text("<p>page")
    site = FolderSite(tmp_path / "in")
    assert site.answer(Request("GET", "/")).body == b"<p>page"
    for path in ("/../secret", "/%2e%2e/secret", "/none", f"/{tmp_path}/secret"):
        assert site.answer(Request("GET", path)).status == 404


# faults


HANGS = {
    "handler": "<button onclick='for (;;);'>go</button>",
    "timer": "<button onclick='setTimeout(() => { for (;;); }, 100)'>go</button>",
    "promise": "<button onclick='(function f() { Promise.resolve().then(f) })()'>go</button>",
    "alerts": "<button onclick='for (;;) alert(1)'>go</button>",
}


@pytest.mark.parametrize("where", HANGS)
def test_a_page_that_hangs_is_lost_and_others_go_on(where: str) -> None:
    with opened("<p>alive") as other, opened(HANGS[where], seconds=2) as page:
        with pytest.raises(EpisodeLost) as lost:
            page.click(key(page, "go"))
        assert lost.value.cause == "page hung"
        with pytest.raises(EpisodeLost):
            page.read()
        assert items(other) == ["alive"]


def test_a_page_that_hangs_while_it_loads_is_lost() -> None:
    with pytest.raises(EpisodeLost) as lost, opened("<script>for (;;);</script>", seconds=2):
        pass
    assert lost.value.cause == "page hung"


def test_a_page_that_crashes_is_lost_and_others_go_on() -> None:
    with opened("<p>alive") as other, opened("<p>x") as page:
        page._chromium.loop.start(page._tab.session.send("Page.crash"))
        with pytest.raises(EpisodeLost) as lost:
            page.wait(1)
        assert lost.value.cause == "page crashed"
        assert items(other) == ["alive"]


def test_a_browser_that_is_killed_loses_its_pages_and_another_starts() -> None:
    with opened("<p>x") as page:
        killed = browser().process
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(EpisodeLost) as lost:
            page.wait(1)
        assert lost.value.cause == "browser died"
    with opened("<p>alive") as page:
        assert items(page) == ["alive"] and browser().process != killed


def test_a_storm_of_dialogs_is_survived_and_told_in_part() -> None:
    with opened("<button onclick='for (let i = 0; i < 1e5; i++) confirm(i) || prompt(i)'>go</button>") as page:
        page.click(key(page, "go"))
        assert 0 < len(page.told()) < 10 and items(page) == ["<button go>"]


def test_a_page_of_ten_megabytes_is_read_in_part() -> None:
    with opened("<p>first" + ("<p>" + "word " * 20) * 100_000, seconds=60) as page:
        seen = items(page)
        assert seen[0] == "first" and sum(map(len, seen)) < 200_000 and "left out" in seen[-1]


FORM = "<p>{0}</p><form method=post><input aria-label=A><button>Send</button></form><a href=/b>On</a>"


def test_back_leads_to_the_last_page_with_another_address_and_sends_no_form_again() -> None:
    site = Pages({"/": FORM.format("first"), "/b": FORM.format("second")})
    with contextlib.closing(open_page(site, f"{site.origin}/")) as page:
        page.click(key(page, "Send"))
        page.click(key(page, "On"))
        page.click(key(page, "Send"))
        assert items(page)[0] == "second" and page.back() and items(page)[0] == "first"
        assert not page.back() and items(page)[0] == "first"
        assert [request.method for request in site.asked if request.path != "/favicon.ico"].count("POST") == 2


def test_a_text_of_several_lines_becomes_one_as_where_it_is_pasted() -> None:
    with opened("<input aria-label=A><textarea aria-label=B></textarea>") as page:
        for name in "AB":
            page.type(key(page, name), "a\r\nb\nc\n")
        assert [item["value"] for item in page.read()["items"]] == ["a b c", "a\nb\nc\n"]


def test_closing_ends_the_browser_while_the_process_goes_on() -> None:
    with opened("<p>x"):
        process = browser().process
    close_browser()
    assert ends(lambda: not Path(f"/proc/{process}").exists())


ENDINGS = {
    "at the end": "",
    "in an exception": "raise SystemExit(3)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "forked": """
import os
child = os.fork()
if not child:
    try:
        assert open_page(FolderSite(Path('.')), 'http://site.test/').read()
    finally:
        print(browser().process, flush=True)
        import sys; sys.exit()
os.waitpid(child, 0)
assert page.read()
""",
}
PROGRAM = """
from pathlib import Path
from treegym.tools.browser import FolderSite, open_page
from treegym.tools.browser.chromium import browser
page = open_page(FolderSite(Path('.')), 'http://site.test/')
print(browser().process, flush=True)
"""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("ending", ENDINGS)
def test_no_browser_outlives_its_process(ending: str) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM + ENDINGS[ending]], capture_output=True, text=True, timeout=100)
    processes = [int(line) for line in run.stdout.split()]
    assert len(processes) == 1 + (ending == "forked"), run.stderr
    assert all(ends(lambda process=process: not Path(f"/proc/{process}").exists()) for process in processes)  # type: ignore[misc]


def ends(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within some seconds."""
    limit = time.monotonic() + 20
    while not condition() and time.monotonic() < limit:
        time.sleep(0.05)
    return condition()


def test_a_browser_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEGYM_CHROMIUM", "/no/such/chromium")
    with pytest.raises(BrowserUnavailable, match="apt-get install chromium, or set TREEGYM_CHROMIUM"):
        chromium_path()
