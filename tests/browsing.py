"""A page taken apart by the rules of HTML, and a headless browser to open it in."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYPgPAAEHAQHj5NtvAAAAAElFTkSuQmCC")
HOSTILE = (
    "</script><script>window.hostile = 1</script><img src=x onerror='window.hostile = 2'>{{ 7 * 7 }}&amp;\u2028\"'"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1280,900",
]
PATIENCE = 60  # seconds


class Reader(HTMLParser):
    """Takes a page apart by the rules of HTML: tags, and the text of the first data block."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.json, self._in_data = [], "", False
        self.feed(path.read_text())
        self.data = json.loads(self.json, parse_constant=pytest.fail)
        self.charts = {chart["id"].removeprefix("chart-"): chart for chart in self.data["charts"]}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_data = tag == "script" and dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, data):
        if self._in_data:
            self.json += data


class ReloadedError(Exception):
    """The page went away before it could answer."""


class Browser:
    """A headless browser with one tab, driven through its pipe (the DevTools protocol)."""

    def __init__(self, folder):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # the browser reads from 3 and writes to 4
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", BROWSER, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._n, self._unread, self._session = 0, b"", None
        self.events = []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        self._n += 1
        message = {"id": self._n, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._n:
                if answer.get("error", {}).get("message") == "Inspected target navigated or closed":
                    raise ReloadedError(answer)
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._in], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            received = os.read(self._in, 1 << 20)
            assert received, "the browser has ended"
            self._unread += received
        message, self._unread = self._unread.split(b"\0", 1)
        message = json.loads(message)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, url, width=1280):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.go_to("about:blank")  # an address that differs after "#" only would not be loaded again
        self.events.clear()
        self.go_to(url)

    def go_to(self, url):
        self.send("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def run(self, script):
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if self.run(script):
                    return
            except ReloadedError:  # while it was asked, as pages of running runs do
                pass
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)

    def mouse(self, kind, x, y, clicks=1):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=clicks)

    def complaints(self):
        """Whatever a page wrote to the console, and exceptions."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self):
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def close(self):
        self.send("Browser.close")
        self._process.wait(PATIENCE)
        os.close(self._in)
        os.close(self._out)
