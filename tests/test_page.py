"""The page of extras/export.py: what it refuses, its words and noise, and clips in a browser."""
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from data import InputError, read_captions
from extras import export
from model import load_student

NODE, MODULES = shutil.which("node"), Path(os.environ.get("NODE_MODULES", ROOT / "node_modules"))
PAGE = (ROOT / "extras/page/index.html").read_text("utf-8")
SHOW = """
import { spawn } from "node:child_process"; import { once } from "node:events";
const [modules, folder, port, python, executablePath] = process.argv.slice(1);
const { chromium } = await import(modules + "/playwright-core/index.mjs");
const server = spawn(python, ["-m", "http.server", port, "--directory", folder]), hosts = new Set();
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage();
page.on("request", ({ url }) => hosts.add(new URL(url()).host));
while (!await page.goto("http://localhost:" + port).catch(() => false));
const ready = await page.evaluate("ready"), wav = await page.evaluate(async () => {
  const { words, z_T, noise } = await (await fetch("noise.json")).json();
  return [...(await make(words, 0, Float32Array.from(z_T), Float32Array.from(noise))).wav];
});
server.kill();
await once(server, "exit");
await page.reload();
const offline = await page.evaluate("ready"), { unseen } = await page.evaluate("make('a zebra')");
console.log(JSON.stringify({ ready, wav, offline, unseen, hosts: [...hosts] }));
await browser.close();
"""


def test_what_can_have_no_page(plain, tmp_path):
    for model, says in ((plain, "not one of whole words"), ("tiny", "Griffin-Lim is no network"),
                        (ROOT / "tiny/recorded", "npm install onnxruntime-web@1.30.0")):
        with pytest.raises(InputError, match=says):
            export.page(load_student(model, precision="fp32", device="cpu"), tmp_path)
    assert "://" not in PAGE.replace("http://www.w3.org", "")       # nothing of another host
    assert f"onnxruntime-web@{export.WEB}" in export.__doc__


@pytest.mark.skipif(not NODE, reason="needs node")
def test_words_and_noise():
    tokenizer = load_student(ROOT / "tiny/recorded", device="cpu").encode_text.tokenizer
    texts = read_captions(ROOT / "tiny/recorded/captions.csv")[0] + [
        "", "A DOG's bark, loudly!", "rain_falls ... über €5 ½ 3", "dog " * 30, "constructor"]
    script = PAGE[PAGE.index("const PIECES"):PAGE.index("// ---- a clip")] + """
        const { texts, vocabulary } = JSON.parse(require("fs").readFileSync(0));
        console.log(JSON.stringify({ noise: [...normal(0)(1e4), ...normal(1)(1e4)],
          ids: texts.map(text => tokenize(text, vocabulary, 24).ids) }));"""
    given = json.dumps({"texts": texts, "vocabulary": tokenizer.get_vocab()})
    made = json.loads(subprocess.check_output([NODE, "-e", script], input=given, text=True))
    fit = dict(padding="max_length", max_length=24, truncation=True)
    assert made["ids"] == tokenizer(texts, **fit)["input_ids"]
    noise = np.array(made["noise"])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(noise[:10000], noise[10000:])[0, 1]) < 0.04
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.03


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """The clip is ONNX Runtime's of the same noise, and offline there is one too."""
    onnxruntime, chromium = pytest.importorskip("onnxruntime"), shutil.which("chromium")
    if not (chromium and NODE and (MODULES / "playwright-core").exists()):
        pytest.skip("needs Chromium, node, and npm's onnxruntime-web and playwright-core")
    folder, words = tmp_path / "page", "a dog barks loudly while rain falls"
    export.main(["--student", str(ROOT / "tiny/recorded"), "--out", str(folder), "--page",
                 str(MODULES)])
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    rng = np.random.default_rng(0)
    z_T, noise = (rng.standard_normal((1, *n), np.float32) for n in ((4, 8, 32), (256, 642)))
    given = {"words": words, "z_T": z_T.ravel().tolist(), "noise": noise.ravel().tolist()}
    (folder / "noise.json").write_text(json.dumps(given))
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    command = [NODE, "--input-type=module", "-e", SHOW, MODULES, folder, port, sys.executable]
    made = json.loads(subprocess.check_output([*command, chromium], timeout=300))
    assert made["ready"] and made["offline"] and made["hosts"] == [f"localhost:{port}"]
    assert made["unseen"] == ["zebra"]

    def run(part, **given):
        graph = gzip.decompress((folder / f"{part}.onnx.gz").read_bytes())
        return onnxruntime.InferenceSession(graph).run(None, given)[0]

    tokenizer = load_student(ROOT / "tiny/recorded", device="cpu").encode_text.tokenize([words])
    x0 = run("step", z_T=z_T, text=run("text", ids=np.array(tokenizer["input_ids"])))
    wav, = run("vocoder", mel=run("decoder", x0=x0), noise=noise)
    assert np.abs(wav - made["wav"]).max() < 1e-3 < np.abs(wav).max()
