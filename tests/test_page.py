"""The page of extras/export.py: what it refuses, its words and noise, and clips in a browser."""
import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from data import InputError, read_captions
from extras import export
from model import TextEncoder, load_student

HOME, MODULES, NODE = ROOT / "tiny/recorded", os.getenv("NODE_MODULES", ""), shutil.which("node")
PAGE = (ROOT / "extras/page/index.html").read_text("utf-8")
DRAW = PAGE[PAGE.index("const PIECES"):PAGE.index("// ---- a clip")] + """
const { texts, words } = JSON.parse(require("fs").readFileSync(0));
console.log(JSON.stringify({ noise: [normal(0), normal(1)].map(draw => [...draw(1e4)]),
                             ids: texts.map(text => tokenize(text, words, 24).ids) }));"""
SHOW = """
const [folder, modules, python, executablePath] = process.argv.slice(1), hosts = new Set();
const server = require("child_process").spawn(python, ["-m", "http.server", "8769", "-d", folder]);
require(modules + "/playwright-core").chromium.launch({ executablePath }).then(async browser => {
  const page = await browser.newPage();
  page.on("request", request => hosts.add(new URL(request.url()).host));
  while (!await page.goto("http://localhost:8769").catch(() => false));
  await page.evaluate("ready");
  const wav = await page.evaluate(`fetch("noise.json").then(got => got.json()).then(async given =>
    [...(await make(given.words, 0, ...given.noise.map(x => Float32Array.from(x)))).wav])`);
  server.kill();
  await require("events").once(server, "exit");
  await page.reload();
  const ready = await page.evaluate("ready"), { unseen } = await page.evaluate("make('a zebra')");
  console.log(JSON.stringify({ wav, ready, unseen, hosts: [...hosts] }));
  await browser.close();
});"""


def test_what_can_have_no_page(plain, tmp_path):
    for model, says in ((plain, "not one of whole words"), ("tiny", "Griffin-Lim is no network"),
                        (HOME, f"lacks version {export.WEB}; run npm install onnxruntime-web@1")):
        with pytest.raises(InputError, match=says):
            export.page(load_student(model, precision="fp32", device="cpu"), tmp_path)


@pytest.mark.skipif(not NODE, reason="needs node")
def test_words_and_noise():
    tokenizer = TextEncoder(HOME).tokenizer
    texts = read_captions(HOME / "captions.csv")[0] + [
        "", "A DOG's bark, loudly!", "rain_falls ... über €5 ½ 3", "dog " * 30, "constructor"]
    given = json.dumps({"texts": texts, "words": tokenizer.get_vocab()})
    made = json.loads(subprocess.check_output([NODE, "-e", DRAW], input=given, text=True))
    fit = dict(padding="max_length", max_length=24, truncation=True)
    assert made["ids"] == tokenizer(texts, **fit)["input_ids"]
    a, b = np.array(made["noise"])
    assert abs(a.mean()) < 0.04 and abs(a.std() - 1) < 0.03 and abs((a ** 4).mean() - 3) < 0.3
    assert abs((a * b).mean()) < 0.04 and abs((a[1:] * a[:-1]).mean()) < 0.04


@pytest.mark.skipif(not (NODE and os.path.isdir(f"{MODULES}/playwright-core")), reason="needs "
                    "node, Chromium and, in $NODE_MODULES, playwright-core and onnxruntime-web")
def test_a_clip_in_a_browser_is_onnx_runtimes_and_needs_no_network_later(tmp_path):
    onnxruntime, words = pytest.importorskip("onnxruntime"), "a dog barks while rain falls"
    export.main(["--student", str(HOME), "--out", str(tmp_path / "page"), "--page", MODULES])
    noise = [np.random.default_rng(0).standard_normal(n, np.float32) for n in (1024, 256 * 642)]
    (tmp_path / "page/noise.json").write_text(json.dumps(
        {"words": words, "noise": [x.tolist() for x in noise]}))
    made = json.loads(subprocess.check_output([NODE, "-e", SHOW, tmp_path / "page", MODULES,
                                               sys.executable, shutil.which("chromium")]))
    assert (made["hosts"], made["ready"], made["unseen"]) == (["localhost:8769"], True, ["zebra"])

    def run(part, **given):
        graph = gzip.decompress((tmp_path / f"page/{part}.onnx.gz").read_bytes())
        return onnxruntime.InferenceSession(graph).run(None, given)[0]

    text = run("text", ids=TextEncoder(HOME).tokenize([words], return_tensors="np")["input_ids"])
    mel = run("decoder", x0=run("step", z_T=noise[0].reshape(1, 4, 8, 32), text=text))
    wav, = run("vocoder", mel=mel, noise=noise[1].reshape(1, 256, 642))
    assert np.abs(wav - made["wav"]).max() < 1e-3 < np.abs(wav).max()
