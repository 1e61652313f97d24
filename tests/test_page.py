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
const [texts, words] = JSON.parse(require("fs").readFileSync(0)), draw = normal(7);
console.log(JSON.stringify([texts.map(text => tokenize(text, words, 24).ids), [...draw(1e4)]]));"""
SHOW = """
const [folder, modules, python, executablePath] = process.argv.slice(1), hosts = new Set();
const server = require("child_process").spawn(python, ["-m", "http.server", "8769", "-d", folder]);
require(modules + "/playwright-core").chromium.launch({ executablePath }).then(async browser => {
  const page = await browser.newPage();
  page.on("request", request => hosts.add(new URL(request.url()).host));
  while (!await page.goto("http://localhost:8769").catch(() => false));
  const wav = await page.evaluate(`ready.then(() => fetch("given.json")).then(got => got.json())
    .then(x => make("a dog", 0, ...x.map(y => Float32Array.from(y)))).then(clip => [...clip.wav])`);
  server.kill();
  await require("events").once(server, "exit");
  await page.reload();
  const again = await page.evaluate("ready.then(() => make('a zebra')).then(clip => clip.unseen)");
  console.log(JSON.stringify([wav, again, [...hosts]]));
  await browser.close();
});"""


def test_what_can_have_no_page(plain, tmp_path):
    for model, says in ((plain, "not one of whole words"), ("tiny", "Griffin-Lim is no network"),
                        (HOME, f"lacks version {export.WEB}; run npm install onnxruntime-web@1")):
        with pytest.raises(InputError, match=says):
            export.page(load_student(model, precision="fp32", device="cpu"), tmp_path)


@pytest.mark.skipif(not NODE, reason="needs node")
def test_words_and_noise():
    texts, encode = read_captions(HOME / "captions.csv")[0], TextEncoder(HOME)
    texts += ["", "A DOG's bark!", "rain_falls ... über €5 ½ 3", "dog " * 30, "constructor"]
    given = json.dumps([texts, encode.tokenizer.get_vocab()])
    ids, noise = json.loads(subprocess.check_output([NODE, "-e", DRAW], input=given, text=True))
    assert ids == encode.tokenize(texts)["input_ids"]
    moments = [(np.array(noise) ** n).mean() for n in (1, 2, 4)]
    assert np.abs(np.subtract(moments, [0, 1, 3])).max() < 0.3 and abs(moments[0]) < 0.04


@pytest.mark.skipif(not (NODE and os.path.isdir(f"{MODULES}/playwright-core")), reason="needs "
                    "node, Chromium and, in $NODE_MODULES, playwright-core and onnxruntime-web")
def test_a_clip_in_a_browser_is_onnx_runtimes_and_one_comes_without_a_network(tmp_path):
    onnxruntime, out = pytest.importorskip("onnxruntime"), tmp_path / "page"
    export.main(["--student", str(HOME), "--out", str(out), "--page", MODULES])
    noise = [np.random.default_rng(0).standard_normal(n, np.float32) for n in (1024, 256 * 642)]
    (out / "given.json").write_text(json.dumps([x.tolist() for x in noise]))
    wav, unseen, hosts = json.loads(subprocess.check_output(
        [NODE, "-e", SHOW, out, MODULES, sys.executable, shutil.which("chromium")]))
    assert unseen == ["zebra"] and hosts == ["localhost:8769"]
    x = TextEncoder(HOME).tokenize(["a dog"], return_tensors="np")["input_ids"]
    more = {"step": {"z_T": noise[0].reshape(1, 4, 8, 32)},
            "vocoder": {"noise": noise[1].reshape(1, 256, 642)}}
    for part, key in (("text", "ids"), ("step", "text"), ("decoder", "x0"), ("vocoder", "mel")):
        graph = gzip.decompress((out / f"{part}.onnx.gz").read_bytes())
        x, = onnxruntime.InferenceSession(graph).run(None, {key: x, **more.get(part, {})})
    assert np.abs(x - wav).max() < 1e-3 < np.abs(x).max()
