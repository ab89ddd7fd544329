"""A JupyterLab of its own, with settings of its own, in which a test opens notebooks by Chromium and runs them."""
import json, os, re, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

from playwright.sync_api import Page

SETTINGS = {"@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "autoRenderMarkdownCells": True}, # every cell is in the page
            "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}}
NOTEBOOK = "window.jupyterapp.shell.currentWidget"
CELLS = f"{NOTEBOOK}.content.widgets.filter(c => c.model.type === 'code')"


class Lab:
    "A server over one folder; ended with all it started."
    def __init__(self, folder:Path, log:Path):
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        for name, values in SETTINGS.items():
            path = Path(self.home.name)/"settings"/f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": f"{self.home.name}/settings", "JUPYTERLAB_WORKSPACES_DIR": f"{self.home.name}/workspaces", "JUPYTER_RUNTIME_DIR": f"{self.home.name}/runtime",
               "JUPYTER_CONFIG_DIR": f"{self.home.name}/config", "IPYTHONDIR": f"{self.home.name}/ipython"}
        command = [sys.executable, "-m", "jupyterlab", str(folder), "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", "--expose-app-in-browser", "--IdentityProvider.token=", "--ServerApp.password="]
        self.log = log
        with open(log, "wb") as out: self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
        try: self.url = self.address()
        except BaseException: self.close(); raise

    def address(self, seconds:float=90)->str:
        "Where the server answers, as it says itself."
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            if m := re.search(r"http://127\.0\.0\.1:(?!0/)\d+", self.log.read_text(errors="replace")): return m[0]
            time.sleep(.2)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text(errors='replace')[-2000:]}")

    def close(self):
        "Ask twice, as a person would, then end the group that this object started."
        for sign, patience_s in ((signal.SIGINT, 1), (signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            if self.process.poll() is not None: break
            (os.killpg if sign == signal.SIGKILL else os.kill)(self.process.pid, sign)
            try: self.process.wait(patience_s)
            except subprocess.TimeoutExpired: continue
        self.home.cleanup()

    def __enter__(self): return self
    def __exit__(self, *exc): self.close()

    def open(self, page:Page, name:str, seconds:float=120):
        "Open a notebook and wait until its kernel is ready."
        page.goto(f"{self.url}/lab/tree/{name}?reset")
        page.wait_for_function(f"window.jupyterapp && {NOTEBOOK}?.content?.model?.cells?.length > 2 && {NOTEBOOK}.context.path === {name!r}", timeout=1000*seconds)
        page.wait_for_function(f"{NOTEBOOK}.sessionContext.session?.kernel?.status === 'idle'", timeout=1000*seconds)

    def run_all(self, page:Page, seconds:float=240)->list[str]: # the sentences of errors
        "Run every cell, and wait for the last."
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ranAll = true }), 1")
        page.wait_for_function(f"window.ranAll && {CELLS}.every(c => c.model.executionCount || !c.model.sharedModel.source.trim())", timeout=1000*seconds)
        return page.evaluate(f"{CELLS}.flatMap(c => c.model.outputs.toJSON()).filter(o => o.output_type === 'error').map(o => `${{o.ename}}: ${{o.evalue}}`)")
