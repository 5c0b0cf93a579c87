"""Takes a picture of a page of TensorBoard, as a user would see it.

    python train/screenshot.py --logdir=runs --out=tensorboard.png
    python train/screenshot.py --logdir=runs --out=hparams.png --page=hparams

It starts TensorBoard on a free port and a Chromium or Chrome without a window,
waits until the page's charts are drawn and nothing moves any more, and stops
both.
"""

import base64
import contextlib
import fcntl
import importlib.util
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import NamedTuple

import commandline
import files
from absl import flags
from errors import UserError

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)


class Page(NamedTuple):
    """A page of TensorBoard: what is on it once it is drawn, its width."""

    drawn: str
    width: int = 1280


PAGES = {
    "custom_scalars": Page("vz-line-chart2"),
    "scalars": Page("vz-line-chart2"),
    "histograms": Page("vz-histogram-timeseries"),
    "images": Page("tf-image-loader"),
    "hparams": Page("vaadin-grid-cell-content", width=1920),
}
HEIGHT, TALLEST = 800, 6000  # pixels
PATIENCE = 120.0  # seconds until what is waited for must be there
QUIET = 2.0  # seconds in which nothing moves on a page that is drawn

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "logdir",
    None,
    "Folder with the runs, the --runs_dir of train/main.py.",
    flag_values=FLAGS,
)
flags.DEFINE_string("out", None, "PNG file to write.", flag_values=FLAGS)
flags.DEFINE_enum(
    "page",
    "custom_scalars",
    list(PAGES),
    "Page of TensorBoard.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "browser",
    None,
    f"Chromium's program; by default the first of {', '.join(BROWSERS)} that "
    "is found.",
    flag_values=FLAGS,
)

# Looks through shadow roots, too. Opens the lists that say which line is
# which, and tells how many parts are drawn and how high the page is.
LOOK = """
(() => {
  const all = (root) => [...root.querySelectorAll('*')].flatMap(
    (e) => e.shadowRoot ? [e, ...all(e.shadowRoot)] : [e]);
  const elements = all(document);
  for (const e of elements)
    if (e.matches('.toggle-matches-button') && !e.dataset.opened) {
      e.dataset.opened = 'yes';
      e.click();
    } else if (e.matches('#matches-list'))
      e.style.cssText = 'max-height: none; font-size: 12px';
  const scrolls = (e) => e.clientWidth > innerWidth / 2 &&
    /auto|scroll/.test(getComputedStyle(e).overflowY);
  const heights = elements.filter(scrolls).map(
    (e) => e.scrollHeight - e.clientHeight);
  return {
    drawn: elements.filter((e) => e.matches('SELECTOR')).length,
    more: Math.max(0, ...heights),
  };
})()
"""


class Browser:
    """A browser without a window, spoken to over a pair of pipes.

    The DevTools protocol, one JSON message after the other, each ended by a
    zero byte.

    Args:
        program: The browser's.
        profile: Folder for its settings.
    """

    def __init__(self, program: str, profile: Path) -> None:
        ends = [*os.pipe(), *os.pipe()]
        # It reads descriptor 3 and writes 4: others must not be in the way.
        its_input, self._output, self._input, its_output = (
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends
        )
        for end in ends:
            os.close(end)
        start = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.dup2(int(sys.argv[2]), 4); "
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        command = [program, "--headless=new", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}", "--hide-scrollbars"]
        command += ["--no-first-run", "--disable-background-networking"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # it refuses root otherwise
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, str(its_input), str(its_output)]
            + command,
            pass_fds=(its_input, its_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        self._received = b""
        self._session: dict[str, str] = {}
        self._calls = 0
        self.requests: set[str] = set()

    def open_page(self) -> None:
        """Opens an empty page, of which all further calls are."""
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session = {"sessionId": attached["sessionId"]}
        self.call("Network.enable")

    def resize(self, width: int, height: int) -> None:
        """Makes the page that many pixels large."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True
        )
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """The page as it is now, a PNG file."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._calls += 1
        message = {
            "id": self._calls,
            "method": method,
            "params": parameters,
            **self._session,
        }
        with contextlib.suppress(BrokenPipeError):  # seen below
            os.write(self._output, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise UserError(f"the browser: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            wait = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._input], [], [], wait)
            part = os.read(self._input, 1 << 20) if ready else b""
            if not part:
                raise UserError(
                    f"{self._process.args[5]}: it ended or does not answer. "
                    "Give another Chromium or Chrome with --browser."
                )
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keeps count of what the page has asked for and not yet got."""
        request = event.get("params", {}).get("requestId")
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.add(request)
        elif event.get("method") in (
            "Network.loadingFinished",
            "Network.loadingFailed",
        ):
            self.requests.discard(request)

    def close(self) -> None:
        """Ends the browser."""
        os.close(self._output)  # which it takes as the wish to leave
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._input)


def find_browser(program: str | None) -> str:
    """The path of a browser's program, of the given name if there is one."""
    names = BROWSERS if program is None else (program,)
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    if program is not None:
        raise UserError(
            f"--browser={program}: no such program. Give the name or path of "
            "Chromium or Chrome."
        )
    raise UserError(
        f"no browser: none of {', '.join(names)} is on the PATH. Install "
        "Chromium, or give its program with --browser."
    )


def folders_in(logdir: Path) -> int:
    """The number of folders with TensorBoard files."""
    return len({file.parent for file in logdir.rglob("*tfevents*")})


def until(ready: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Waits until something is so.

    Raises:
        UserError: After so many seconds, with the message `otherwise`.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise UserError(otherwise)
        time.sleep(0.25)


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """A TensorBoard that shows a folder; yields its address."""
    command = ["-m", "tensorboard.main", "--port=0", "--logdir", str(logdir)]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line.strip())
            address = re.search(r"http://\S+?:\d+", line)
            if address:
                break
        else:
            raise UserError(f"TensorBoard does not start: {said[-1:]}")
        yield address.group()
    finally:
        process.terminate()
        process.communicate()


def fetch(address: str) -> Any:
    """What TensorBoard answers to a request for data."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=PATIENCE) as answer:
        return json.load(answer)


def drawn_page(browser: Browser, address: str, page: str) -> bytes:
    """The picture of a page, in full, once it no longer changes."""
    look = LOOK.replace("SELECTOR", PAGES[page].drawn)
    width, height = PAGES[page].width, HEIGHT
    browser.open_page()
    browser.resize(width, height)
    # Curves as they were measured, and not smoothed.
    query = f"{address}/?darkMode=false&smoothing=0#{page}&_smoothingWeight=0"
    browser.call("Page.navigate", url=query)
    deadline = time.monotonic() + PATIENCE
    before, since = b"", time.monotonic()
    while time.monotonic() < deadline:
        seen = browser.evaluate(look) or {"drawn": 0, "more": 0}
        if seen["more"] and height < TALLEST:
            height = min(height + seen["more"], TALLEST)
            browser.resize(width, height)
        picture = browser.picture()
        if picture != before or browser.requests or not seen["drawn"]:
            before, since = picture, time.monotonic()
        elif time.monotonic() - since > QUIET:
            return picture
        time.sleep(0.25)
    raise UserError(
        f"--page={page}: it was not drawn within {PATIENCE:.0f} s. Try again "
        "on a machine that does less, or with fewer runs in --logdir."
    )


def screenshot() -> None:
    """The program."""
    if FLAGS.logdir is None or FLAGS.out is None:
        raise UserError("--logdir and --out are needed. --help tells more.")
    logdir, out = Path(FLAGS.logdir).expanduser(), Path(FLAGS.out).expanduser()
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed: pip install tensorboard")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UserError(
            f"--out={out}: give a file name that ends in .png, in a folder "
            "that exists."
        )
    runs = folders_in(logdir)
    if not runs:
        raise UserError(
            f"--logdir={logdir}: no TensorBoard files (*tfevents*) below it. "
            "Give the --runs_dir of runs that train/main.py has written."
        )
    program = find_browser(FLAGS.browser)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(tensorboard(logdir))
        until(
            lambda: len(fetch(f"{address}/data/runs")) >= runs,
            PATIENCE,
            f"--logdir={logdir}: TensorBoard did not read its {runs} runs "
            f"within {PATIENCE:.0f} s. Give a folder with fewer.",
        )
        until(
            lambda: fetch(f"{address}/data/plugins_listing")[FLAGS.page][
                "enabled"
            ],
            10.0,
            f"--page={FLAGS.page}: the runs in {logdir} have nothing for it. "
            "Give another page, or runs with --alignment_every.",
        )
        # Chromium may still write to it while it ends.
        profile = stack.enter_context(
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        )
        browser = Browser(program, Path(profile))
        stack.callback(browser.close)
        picture = drawn_page(browser, address, FLAGS.page)
    try:
        files.replace(out, lambda aside: aside.write_bytes(picture))
    except OSError as error:
        raise UserError(
            f"--out={out}: cannot be written ({error.strerror})."
        ) from error
    print(out)


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    return commandline.run(
        argv, FLAGS, screenshot, __doc__, "Nothing was written."
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
