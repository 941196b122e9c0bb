"""A headless Chromium, driven by its DevTools protocol over a pair of pipes; nothing but Python's own library is needed."""

import base64
import json
import os
import threading
import time

import harness

PROGRAM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# Without these the browser asks its maker's servers for updates and lists.
QUIET = (
    "--headless=new --remote-debugging-pipe --no-first-run --no-default-browser-check --disable-background-networking "
    "--disable-component-update --disable-default-apps --disable-domain-reliability --disable-sync --disable-extensions --metrics-recording-only "
    "--disable-gpu --disable-dev-shm-usage --hide-scrollbars --force-color-profile=srgb --font-render-hinting=none --mute-audio"
).split()
# What a key press needs besides its name: code, virtual key, text.
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Backspace": ("Backspace", 8, ""),
    "Tab": ("Tab", 9, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "PageDown": ("PageDown", 34, ""),
    "PageUp": ("PageUp", 33, ""),
    "Home": ("Home", 36, ""),
    "End": ("End", 35, ""),
}


class Browser:
    """One browser with one page. Every call ends within `seconds`."""

    def __init__(self, where, seconds=60):
        self.seconds, self.number, self.answers, self.events = seconds, 0, {}, []
        self.changed = threading.Condition()
        to_read, self.requests = os.pipe()
        self.replies, to_write = os.pipe()

        def pipes():
            # The browser reads from 3 and writes to 4. Both may be taken by the other.
            low, high = os.dup(to_read), os.dup(to_write)
            os.dup2(low, 3, inheritable=True)
            os.dup2(high, 4, inheritable=True)

        # Root needs --no-sandbox.
        arguments = [PROGRAM, *QUIET, "--no-sandbox", f"--user-data-dir={where / 'profile'}", "about:blank"]
        self.process = harness.start(arguments, where / "browser.log", preexec_fn=pipes, close_fds=False)
        os.close(to_read)
        os.close(to_write)
        threading.Thread(target=self.receive, daemon=True).start()
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def receive(self):
        rest = b""
        while data := os.read(self.replies, 1 << 20):
            *messages, rest = (rest + data).split(b"\0")
            with self.changed:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self.answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self.changed.notify_all()
        with self.changed:
            self.answers = None
            self.changed.notify_all()

    def call(self, method, **params):
        self.number += 1
        number, message = self.number, {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.requests, data) :]
        with self.changed:
            if not self.changed.wait_for(lambda: self.answers is None or number in self.answers, self.seconds):
                raise RuntimeError(f"the browser does not answer {method}: {harness.log_of(self.process)}")
            if self.answers is None:
                raise RuntimeError(f"the browser has ended: {harness.log_of(self.process)}")
            answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def happened(self, method):
        """The parameters of all events of this name so far."""
        with self.changed:
            return [event["params"] for event in self.events if event["method"] == method]

    def value(self, expression):
        """The value of an expression in the page, which may be a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails'].get('exception', {}).get('description', 'it throws')}")
        return result["result"].get("value")

    def until(self, what, expression, seconds=60):
        """Waits until the expression is true in the page."""
        deadline = time.monotonic() + seconds
        while not (value := self.value(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: still not so after {seconds} s: {expression}")
            time.sleep(0.05)
        return value

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("the page is loaded", "document.readyState === 'complete'")

    def press(self, *keys):
        for key in keys:
            code, virtual, text = KEYS.get(key, (key, ord(key.upper()) if len(key) == 1 else 0, key))
            event = {"key": key, "code": code, "windowsVirtualKeyCode": virtual}
            # A key with a text is a key press; others only go down.
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def click(self, selector):
        box = self.value(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def media(self, **features):
        """Emulates preferences of the reader, such as prefers_color_scheme="dark"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)

    def size(self, width, height, scale=1):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)

    def picture(self, path):
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", optimizeForSpeed=False)["data"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return len(data)

    def problems(self):
        """Errors that the page has had: exceptions, messages of the console, violations of its policy, failed requests."""
        exceptions = [event["exceptionDetails"].get("exception", {}).get("description", "") for event in self.happened("Runtime.exceptionThrown")]
        console = [str(event["args"]) for event in self.happened("Runtime.consoleAPICalled") if event["type"] in ("error", "warning", "assert")]
        entries = [event["entry"]["text"] for event in self.happened("Log.entryAdded") if event["entry"]["level"] == "error"]
        return exceptions + console + entries

    def requests_made(self):
        """The URLs that the page has requested."""
        return [event["request"]["url"] for event in self.happened("Network.requestWillBeSent")]

    def forget(self):
        with self.changed:
            self.events.clear()

    def end(self):
        harness.end(self.process)
