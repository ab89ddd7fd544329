"""Drives the system's Chromium over its debugging pipe: NUL-separated JSON on two file descriptors, standard library only."""
import base64, json, os, select, shutil, signal, subprocess, tempfile, time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe")


def find_chromium()->str|None: # path of a Chromium, or None
    return next((p for p in map(shutil.which, NAMES) if p), None)


class Chromium:
    "One browser with one page; everything the page requests is kept in `requests`, what it complains about in `complaints`."
    def __init__(self, width:int=1400, height:int=1000, dark:bool=False, timeout_s:float=60):
        self.timeout_s, self.requests, self.complaints, self.events, self.n, self.buffer = timeout_s, [], [], [], 0, b""
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.to_write = os.pipe()
        self.from_read, from_write = os.pipe()
        self.process = self.start(to_read, from_write)
        for end in (to_read, from_write): os.close(end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"): self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def start(self, to_read, from_write):
        "Chromium reads commands from descriptor 3 and answers on 4."
        command = [find_chromium(), *FLAGS, f"--user-data-dir={self.home.name}"]
        shell = f"exec 3<&{to_read} 4>&{from_write}; exec \"$@\"" # sh moves the descriptors, so no fork hook is needed
        return subprocess.Popen(["bash", "-c", shell, "bash", *command], pass_fds=(to_read, from_write), start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def call(self, method:str, **params):
        "One command and its result; events that arrive meanwhile are kept."
        self.n += 1
        message = {"id": self.n, "method": method, "params": params}
        if getattr(self, "session", None): message["sessionId"] = self.session
        os.write(self.to_write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") != self.n: continue
            if "error" in answer: raise RuntimeError(f"{method}: {answer['error']['message']}")
            return answer["result"]

    def receive(self)->dict:
        "The next message from the browser."
        deadline = time.monotonic() + self.timeout_s
        while b"\0" not in self.buffer:
            ready = select.select([self.from_read], [], [], max(0, deadline - time.monotonic()))[0]
            data = os.read(self.from_read, 1 << 20) if ready else b""
            if not data: raise TimeoutError(f"Chromium sent nothing for {self.timeout_s} s")
            self.buffer += data
        raw, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(raw)
        self.note(message)
        return message

    def note(self, message):
        kind, p = message.get("method"), message.get("params", {})
        if kind == "Network.requestWillBeSent": self.requests.append(p["request"]["url"])
        elif kind == "Network.loadingFailed": self.complaints.append(f"loading failed: {p.get('errorText')}")
        elif kind == "Runtime.exceptionThrown": self.complaints.append(p["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif kind == "Log.entryAdded" and p["entry"]["level"] == "error": self.complaints.append(p["entry"]["text"])
        if kind: self.events.append(kind)

    def open(self, url:str):
        "Load a page and wait until it has loaded."
        self.events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self.events: self.receive()

    def run(self, javascript:str):
        "The value of an expression in the page; promises are awaited."
        result = self.call("Runtime.evaluate", expression=javascript, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result: raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def wait_for(self, javascript:str, seconds:float=20):
        "Until the expression is true."
        deadline = time.monotonic() + seconds
        while not self.run(f"!!({javascript})"):
            if time.monotonic() > deadline: raise TimeoutError(f"never true: {javascript}")
            time.sleep(.1)

    def screenshot(self, path:Path, whole_page:bool=False):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole_page)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        "Ends the browser this object started, and nothing else."
        for end in (self.to_write, self.from_read): os.close(end)
        try: self.process.wait(5)
        except subprocess.TimeoutExpired: os.killpg(self.process.pid, signal.SIGKILL); self.process.wait()
        self.home.cleanup()

    def __enter__(self): return self
    def __exit__(self, *exc): self.close()
