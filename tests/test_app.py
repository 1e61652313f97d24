"""The page makes what its commands make, whoever asks besides, and shows nothing else."""
import html
import os
import re
import shlex
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import ROOT, refused
from diffusers import AutoencoderTiny

import sample
from extras import app, control

ASKED = dict(prompt="a dog", seed=0, n=1, seconds=0.64, decoder="vae", recording=None, words="",
             strength=0.2)


def test_without_gradio_it_says_what_to_install(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused("extras.app", "--student", plain, cwd=tmp_path, says=['pip install "gradio>=6"'])


@pytest.fixture(scope="module")
def served(plain, tmp_path_factory):
    """The page of a student with a small decoder, in a thread: its address, names looked up."""
    gr = pytest.importorskip("gradio", minversion="6")
    student = Path(shutil.copytree(plain, tmp_path_factory.mktemp("student") / "student"))
    small = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)
    small.save_pretrained(student / "decoder")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    names, look_up = set(), socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")                          # to be put back afterwards
        patch.setattr(socket, "getaddrinfo", lambda host, *a, **k: (
            names.add(host), look_up(host, *a, **k))[1])
        argv = ["--student", student, "--device", "cpu", "--precision", "fp32", "--port", port]
        thread = threading.Thread(target=app.main, args=([str(a) for a in argv],), daemon=True)
        thread.start()
        until = time.time() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert thread.is_alive() and time.time() < until
            time.sleep(0.1)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", student=student, names=names)
        gr.close_all(verbose=False)


@pytest.fixture
def client(served):
    from gradio_client import Client
    client = Client(served.url, verbose=False)
    yield client
    client.close()


def ask(client, **asked):
    """Ask for clips: the line, the commands shown, and the addresses of their WAVs."""
    return read(client.predict(*(ASKED | asked).values(), api_name="/answer"))


def read(answer):
    line, shown = answer[:2]
    shown = shown if isinstance(shown, str) else ""         # nothing new: no value
    commands = re.findall("<code>(.*?)</code>", shown)
    return (html.unescape(line), [html.unescape(command) for command in commands],
            re.findall(r'<audio [^>]*src="(.*?)"', shown))


def fetch(served, address):
    import httpx
    return httpx.get(f"{served.url}/{address}")


def run(command, out):
    """Run a command that the page shows, in this process: {file: its bytes}."""
    python, *words = shlex.split(command)
    main = sample.main if words[0] == "sample.py" else control.main
    assert python == "python" and (words[0] == "sample.py" or words[:2] == ["-m", "extras.control"])
    main([*words[1 if words[0] == "sample.py" else 2:], "--out", str(out)])
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".json"}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "bell.wav"
    t = np.arange(16000) / 16000
    soundfile.write(path, np.sin(6000 * t) * np.exp(-5 * t), 16000)
    return path


@pytest.mark.parametrize("asked, script", [
    ({}, "sample.py"),
    (dict(prompt="  a dog's  <b>bark</b>", seed=7, n=3), "sample.py"),
    (dict(seconds=0.32), "sample.py"),
    (dict(decoder="fast"), "sample.py"),
    (dict(prompt="a (dog:2) o", n=2), "-m extras.control"),
    (dict(recording=True, words="a bell", strength=0.5, seed=1, n=2), "-m extras.control")])
def test_the_command_makes_the_same_bytes(served, client, recording, tmp_path, monkeypatch, asked,
                                          script):
    from gradio_client import handle_file
    monkeypatch.chdir(recording.parent)
    if "recording" in asked:
        asked = {**asked, "recording": handle_file(str(recording))}
    line, (command,), addresses = ask(client, **asked)
    assert line == "" and f"python {script} " in command
    expected = run(command, tmp_path / "out")
    addresses += [address.replace(".wav", ".png") for address in addresses]
    found = {address.rpartition("/")[2]: fetch(served, address).content for address in addresses}
    assert found == expected and len(found) == 2 * asked.get("n", 1)


def test_twenty_at_once_get_their_own(served, tmp_path, monkeypatch):
    """Four people, each five requests of their own prompt, weight, seed and length."""
    from gradio_client import Client
    clients = [Client(served.url, verbose=False) for _ in range(4)]
    asked = [ASKED | dict(prompt=f"a dog (n{i}:{1 + i % 3})" if i % 2 else f"dog {i}", seed=i,
                          seconds=0.32 * (1 + i % 3)) for i in range(20)]
    jobs = [clients[i % 4].submit(*a.values(), api_name="/answer") for i, a in enumerate(asked)]
    systems = sample.open_system(SimpleNamespace(
        student=served.student, teacher=None, teacher_steps=None, guidance=None, decoder="vae",
        precision="fp32", device="cpu"))

    def opened(args, seconds=None, prompts=()):
        systems.seconds, systems.shape = seconds, app.latent_shape(systems.folder, seconds)
        return systems

    answers = [read(job.result()) for job in jobs]
    monkeypatch.setattr(sample, "open_system", opened)      # loading 20 times would take a minute
    wavs = set()
    for i, (line, commands, addresses) in enumerate(answers):
        assert line == "" and asked[i]["prompt"] in commands[0] and f"--seed={i}" in commands[0]
        wav = fetch(served, addresses[0]).content
        assert wav in run(commands[0], tmp_path / str(i)).values()
        wavs.add(wav)
    assert len(wavs) == 20


def test_the_last_twenty_stay(served, client):
    first = ask(client, prompt="the first", seconds=0.32)[2][0]
    answers = [ask(client, prompt=f"dog {i}", seconds=0.32) for i in range(20)]
    commands, addresses = answers[-1][1:]
    assert [c.split("--prompt=")[1].split("'")[0] for c in commands] == [
        f"dog {i}" for i in reversed(range(20))]
    assert fetch(served, addresses[-1]).status_code == 200
    assert fetch(served, first).status_code == 403          # gone, and its file


@pytest.mark.parametrize("asked, line", [
    (dict(prompt=" "), "an empty prompt"),
    (dict(prompt="(:2)"), "an empty prompt"),
    (dict(prompt="a (dog"), "--prompt: 'a (dog': weights look like (rain:1.5)"),
    (dict(seed=-1), "--seed: -1 must be between 0 and "),
    (dict(seconds=0.3), "--seconds 0.3: not a multiple of 0.08 s"),
    (dict(seconds=1e9), "--seconds: 1000000000.0 must be between 0.16 and 30")])
def test_errors_are_one_line_in_the_page(client, asked, line):
    found, commands, _ = ask(client, **asked)
    assert found.startswith(line) and "\n" not in found and not commands


def test_what_is_not_read_is_said_and_nothing_becomes_markup(client):
    line, _, _ = ask(client, prompt="dog " * 80)
    assert "tokens, 77 fit" in line
    answer = client.predict(*(ASKED | {"prompt": "(<i>${1+1}"}).values(), api_name="/answer")
    assert "&lt;i&gt;" in answer[0] and "<i>" not in answer[0]
    answer = client.predict(*(ASKED | {"prompt": "<i>dog"}).values(), api_name="/answer")
    assert "<i>" not in answer[1]


def write(path, seconds=1, rate=16000, **kw):
    soundfile.write(path, np.zeros((int(seconds * rate), 1)), rate, **kw)
    return path


@pytest.mark.parametrize("name, make, line", [
    ("long.flac", lambda path: write(path, 61, 8000), "long.flac: is longer than a minute"),
    ("wide.wav", lambda path: write(path, 59, 300000, subtype="PCM_U8"), "wide.wav: is longer"),
    ("high.wav", lambda path: write(path, 0.1, 499979), "high.wav: is longer"),
    ("notes.wav", lambda path: path.write_text("dear diary"), "Error opening"),
    ("a.raw", lambda path: path.write_bytes(bytes(999)), "a.raw: does not say what it is"),
    ("empty.wav", lambda path: write(path, 0), "empty.wav: holds no sound")])
def test_only_short_recordings_are_read(client, tmp_path, name, make, line):
    from gradio_client import handle_file
    make(tmp_path / name)
    found, commands, _ = ask(client, recording=handle_file(str(tmp_path / name)))
    assert line in found and "\n" not in found and not commands
    assert os.environ["GRADIO_TEMP_DIR"] not in found


def test_an_upload_is_bounded(served):
    import httpx
    for size, code in ((20, 413), (1, 200)):
        files = {"files": ("a.wav", bytes(size * 2 ** 20 + 1))}
        assert httpx.post(f"{served.url}/gradio_api/upload", files=files).status_code == code


def test_no_path_can_be_read(served, client):
    import httpx
    paths = ["/etc/passwd", served.student / "config.json", served.student / "unet/config.json",
             ROOT / "README.md", "README.md", "../README.md", f"file://{ROOT}/README.md",
             f"{os.environ['GRADIO_TEMP_DIR']}/../../{ROOT}/README.md"]
    for path in paths:
        assert fetch(served, f"gradio_api/file={path}").status_code in (403, 404), path
    config = httpx.get(f"{served.url}/config").json()
    number, = (d["id"] for d in config["dependencies"] if d["api_name"] == "answer")
    for path in ("/etc/passwd", str(ROOT / "docs/assets/app.png")):     # as if it were uploaded
        asked = ASKED | {"recording": {"path": path, "meta": {"_type": "gradio.FileData"}}}
        body = {"data": [*asked.values(), None], "fn_index": number, "session_hash": "s"}
        assert httpx.post(f"{served.url}/gradio_api/queue/join", json=body).status_code == 200
        said = httpx.get(f"{served.url}/gradio_api/queue/data?session_hash=s", timeout=60).text
        assert '"success":false' in said and "Format not" not in said
        assert httpx.post(f"{served.url}/gradio_api/run/answer", json=body).status_code == 404


def test_a_teacher_needs_no_student(monkeypatch):
    """It has no small decoder, and extras.control edits nothing with it."""
    gr, found = pytest.importorskip("gradio"), {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **kw: found.update(page=self))
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    app.main(["--teacher", "tiny", "--teacher_steps", "2", "--student", "none", "--device", "cpu"])
    blocks = found["page"].blocks.values()
    assert [b.choices for b in blocks if isinstance(b, gr.Radio)] == [[("vae", "vae")]]
    assert [b.visible for b in blocks if isinstance(b, gr.Accordion)] == [False]


def test_it_stays_on_this_machine(served, monkeypatch):
    """No name is looked up but its own, and without flags no other machine gets in."""
    gr, found = pytest.importorskip("gradio"), {}
    page = fetch(served, "").text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//(?!127\.0\.0\.1|localhost)', page)
    assert {str(name) for name in served.names} <= {"127.0.0.1", "localhost"}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **kw: found.update(kw))
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    app.main(["--student", str(served.student), "--device", "cpu"])
    assert (found["server_name"], found["server_port"]) == ("127.0.0.1", 7860)
    assert found["share"] is False
