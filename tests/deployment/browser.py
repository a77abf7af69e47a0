"""Debian's headless Chromium, driven through a pipe by the DevTools protocol."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fusion_jax import paths

SHELL = "chromium-headless-shell"


def find() -> tuple[Path, dict[str, str]]:
    """The program and its environment: an installed one, else Debian's packages in the cache.

    Raises OSError or CalledProcessError where it cannot be had.
    """
    for name in (SHELL, "chromium", "chromium-browser", "google-chrome"):
        if place := shutil.which(name):
            return Path(place), dict(os.environ)
    root = paths.cache_dir() / "sources" / SHELL
    if not root.is_dir():
        with paths.write_folder(root) as draft:
            _unpack(draft)
    libraries = [root / "usr/lib/x86_64-linux-gnu", root / "usr/lib/x86_64-linux-gnu/pulseaudio"]
    found = os.pathsep.join(map(str, libraries))
    return root / "usr/lib/chromium" / SHELL, dict(os.environ, LD_LIBRARY_PATH=found)


def _unpack(folder: Path) -> None:
    """What apt would install, and is not here, without installing it: no root needed."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout

    private: list[str] = []
    plan = ("install", "-s", "--no-install-recommends", "-oDebug::NoLocking=1", SHELL)
    try:
        planned = run("apt-get", *plan)
    except subprocess.CalledProcessError:  # no package lists: fresh ones, in a folder of our own
        (folder / "lists" / "partial").mkdir(parents=True)
        private = [f"-oDir::State::Lists={folder}/lists", f"-oDir::Cache={folder}"]
        run("apt-get", "update", *private)
        planned = run("apt-get", *private, *plan)
    names = [line.split()[1] for line in planned.splitlines() if line.startswith("Inst ")]
    run("apt-get", "download", *private, *names)
    for package in folder.glob("*.deb"):
        run("dpkg", "-x", package.name, ".")
        package.unlink()


# The protocol's pipe is file descriptors 3 and 4. Not by preexec_fn, which would fork this process
# with all its threads.
ENTER = """
import os, sys
into, out, *command = sys.argv[1:]
os.dup2(int(into), 98), os.dup2(int(out), 99)
os.dup2(98, 3), os.dup2(99, 4)
os.execv(command[0], command)
"""


class Browser:
    """A page in Chromium; `with Browser() as browser: browser.open(url)`."""

    def __init__(self, *flags: str):
        program, environment = find()
        into, out = os.pipe(), os.pipe()

        command = [str(program), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--remote-debugging-pipe", "--disable-dev-shm-usage", *flags, "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENTER, str(into[0]), str(out[1]), *command],
            env=environment,
            pass_fds=(into[0], out[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(into[0]), os.close(out[1])
        self._write, self._read = into[1], out[0]
        self._numbers, self._buffer, self._session = itertools.count(1), b"", None
        self.problems: list[str] = []
        self.requests: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.close(self._write)
            os.close(self._read)
        self._process.kill()
        self._process.wait()

    def call(self, method: str, **parameters: object) -> dict:
        """A command of the protocol, and what it returns; events on the way are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                part = os.read(self._read, 1 << 20)
                if not part:
                    raise OSError("the browser went away")
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\0")
            told = json.loads(line)
            if told.get("id") == number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self._note(told)

    def _note(self, event: dict) -> None:
        about = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(about["exceptionDetails"]["exception"].get("description", ""))
        elif event.get("method") == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.problems.append(about["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def see(self, expression: str) -> object:
        """The value of JavaScript."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> object:
        """Until it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.see(expression):
                return value
            time.sleep(0.02)
        raise AssertionError(f"{expression} is not true after {seconds} s; {self.problems}")

    def choose(self, selector: str, *files: Path) -> None:
        """Files into an <input type=file>."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        code = {"Enter": 13, "Tab": 9}.get(key, 0)
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        down = about | ({"text": "\r"} if key == "Enter" else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def resize(self, width: int, height: int) -> None:
        how = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.call("Emulation.setDeviceMetricsOverride", **how)
