"""The page makes what its commands make, whoever asks besides, and says what is wrong."""
import html
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, refused
from diffusers import AutoencoderTiny

import sample
from extras import app, control

OWN = ["--student=student", "--precision=fp32", "--device=cpu"]
TINY = ["--student=none", "--teacher=tiny", "--teacher_steps=2", "--device=cpu"]
ASKED = dict(prompt="dog", seed=0, n=1, seconds=0.32, decoder="vae", path="", words="", strength=1)
RECORDINGS = dict(bell=(0.5, 16000), long=(61, 8000), wide=(59, 300000), high=(0.1, 499979))
clips = lambda folder: {path.name: path.read_bytes() for path in Path(folder).glob("*.[wp]*")}


@pytest.fixture(scope="module", autouse=True)
def home(plain, tmp_path_factory):
    """Work in a folder with a student, its small decoder and recordings, behind a dead proxy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("home"))
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("no_proxy", "")                        # main() sets these two
        patch.setenv("GRADIO_TEMP_DIR", os.getcwd())
        shutil.copytree(plain, "student")
        AutoencoderTiny().save_pretrained("student/decoder")
        for name, (seconds, rate) in RECORDINGS.items():
            soundfile.write(f"{name}.wav", np.resize([0.5, 0.1, -0.6], int(seconds * rate)), rate)
        yield


def ask(results=(), own=OWN, **asked):
    """Ask for clips: the line, the commands shown, the results."""
    path = asked.get("path") and os.path.abspath(asked["path"])
    line, shown, results = app.answer(own, "", *(ASKED | asked | {"path": path}).values(), results)
    assert "<i>" not in line + shown and "\n" not in line and os.getcwd() not in line
    return html.unescape(line), re.findall("<code>(.*?)</code>", html.unescape(shown)), results


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused("extras.app", *OWN, cwd=".", says=['pip install "gradio>=6"'])


@pytest.mark.parametrize("asked, module, script", [
    (dict(prompt="  a dog's  <i>bark</i>", seed=7, n=3), sample, "sample.py "),
    (dict(seconds=0.64, decoder="fast"), sample, "sample.py "),
    (dict(prompt="a (dog:2) o", n=2), control, "-m extras.control "),
    (dict(path="bell.wav", words="a bell", strength=0.5, seed=1), control, "-m extras.control ")])
def test_the_command_makes_the_same_bytes(tmp_path, asked, module, script):
    line, (command,), [(_, folder)] = ask(**asked)
    module.main([*shlex.split(command.removeprefix(f"python {script}")), f"--out={tmp_path}"])
    assert line == "" and clips(folder.name) == clips(tmp_path)


@pytest.mark.parametrize("asked, line", [
    (dict(prompt="a (<i>"), "--prompt: 'a (<i>': weights look like (rain:1.5)"),
    (dict(prompt="(:2)"), "an empty prompt"), (dict(prompt="\ud800"), "half a character"),
    (dict(seed=-1), "--seed: -1 must be"), (dict(seconds=0.3), "--seconds 0.3: not a multiple"),
    (dict(path="a.raw"), "a.raw: does"), (dict(path="student/unet/config.json"), "Format not"),
    *((dict(path=f"{name}.wav"), f"{name}.wav: over a") for name in ("long", "wide", "high")),
    (dict(own=TINY, prompt="a <i> elephant", seconds=2.56), "never seen '<i>', 'elephant'"),
    (dict(path="bell.wav", words="oboe " * 40), "tokens, 77 fit")])
def test_what_is_wrong_or_not_read_is_said(asked, line):
    said, shown, results = ask([("before", None)], **asked)
    assert line in said and results[-1] == ("before", None) and len(results) == 1 + len(shown)


def test_the_last_twenty_stay_and_older_files_go():
    results = ask(prompt="first")[2]
    first = Path(results[0][1].name)
    for i in range(20):
        _, shown, results = ask(results, prompt=f"dog {i}")
    assert len(shown) == 20 and "dog 19" in shown[0] and not first.exists()


@pytest.fixture
def pages(monkeypatch):
    """What main() launches for a student and for the tiny teacher: [(page, flags)]."""
    gr, found = pytest.importorskip("gradio", minversion="6"), []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **flags: found.append((page, flags)))
    app.main(OWN)
    app.main(TINY)
    monkeypatch.undo()
    return found


def test_two_people_get_what_they_ask_for_and_nothing_else(pages):
    import httpx
    from gradio_client import Client, handle_file
    page, flags = pages[0]
    assert flags["server_name"] == "127.0.0.1" and not flags["share"] and not page.analytics_enabled
    os.mkdir(os.environ["GRADIO_TEMP_DIR"])                 # it went with main()
    _, url, _ = page.launch(**flags | {"server_port": None}, prevent_thread_lock=True)
    people = [Client(url, verbose=False) for _ in range(2)]
    asked = [ASKED | dict(prompt=f"a (dog:2) {i}", seed=3, n=1 + i % 2, decoder=decoder, words="oh",
                          seconds=0.32 * (1 + i % 3), path=handle_file("bell.wav"), strength=0.5)
             for i, decoder in enumerate(["vae", "fast"] * 3)]
    jobs = [people[a["n"] % 2].submit(*a.values(), api_name="/answer") for a in asked]
    shown = [job.result()[1] for job in jobs]
    assert sorted(text.count("<code>") for text in shown) == [1, 1, 2, 2, 3, 3]
    for a, text in zip(asked, shown):
        wav, command = re.search(r'autoplay src="(.*?)".*?\d s: <code>(.*?)</code>', text).groups()
        _, expected, [(_, folder)] = ask(**a | {"path": "bell.wav"})
        assert [html.unescape(command)] == expected
        assert httpx.get(url + wav).content == clips(folder.name)[Path(wav).name]
    for path in ("/etc/passwd", ROOT / "README.md", Path("student/unet/config.json").absolute()):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
    assert httpx.post(f"{url}gradio_api/upload", files={"files": bytes(2 ** 25)}).status_code == 413
    assert httpx.post(f"{url}gradio_api/run/answer", json={"data": []}).status_code == 404
    page.close()


def test_the_page_says_what_its_teacher_knows(pages):
    clip, tiny = ({type(b).__name__: b for b in page.blocks.values()} for page, _ in pages)
    assert "One-step text to audio. It reads any English word, through" in clip["Markdown"].value
    assert "2-step text to audio. It knows 60 words: a, alarm, an, " in tiny["Markdown"].value
    assert [prompt for prompt, in clip["Dataset"].samples] == app.GENERAL
    assert tiny["Dataset"].samples[0] == ["a bird chirping and a cat meowing twice"]
    assert len(clip["Radio"].choices) == 2 and len(tiny["Radio"].choices) == 1
    assert clip["Accordion"].visible and not tiny["Accordion"].visible
