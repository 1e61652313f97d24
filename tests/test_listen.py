"""Listening pages: what is in the file, and how it works in a browser where there is one."""
import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import tiny.listen
from data import InputError
from extras import listen
from tiny import score, world

DOG = "a dog </script> \"barks\" & <b>howls</b> 犬"
CLIPS = {"ours": [(DOG, 0, 0), (DOG, 0, 1), ("rain", 0, 0)],
         "theirs": [("rain", 0, 0), ("snow", 1, 0)]}            # (prompt, seed, k)
CHROME = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What sample.py writes: clips of noise, pictures and the manifest, in ours/ and theirs/."""
    monkeypatch.chdir(tmp_path)
    for name, clips in CLIPS.items():
        Path(name).mkdir()
        for i in range(len(clips)):
            wav = np.random.default_rng(len(clips) + i).uniform(-0.5, 0.5, 10240)
            soundfile.write(f"{name}/{i}.wav", wav, 16000, "PCM_16")
            Image.new("RGB", (8, 4), (len(clips), i, 0)).save(f"{name}/{i}.png")
        Path(name, "manifest.json").write_text(json.dumps(
            [dict(file=f"{i}.wav", prompt=p, seed=s, k=k) for i, (p, s, k) in enumerate(clips)]))
    return tmp_path


def test_a_page_holds_all_clips_of_all_folders_and_nothing_from_elsewhere(folders, monkeypatch):
    monkeypatch.chdir("ours")
    listen.main([".", "../theirs/"])
    page = Path("listen.html").read_text("utf-8")
    assert "http" not in page and page.count("</script>") == 1 and "/*DATA*/" not in page
    data = json.JSONDecoder().raw_decode(page.split("const data = ")[1])[0]
    assert not data["blind"] and data["systems"] == list(CLIPS)
    rows = {(row["prompt"], row["seed"], row["k"]): row["clips"] for row in data["rows"]}
    for column, (name, clips) in enumerate(CLIPS.items()):
        for i, key in enumerate(clips):
            clip, wav = rows[key].pop(str(column)), folders / name / f"{i}.wav"
            flac, png = (base64.b64decode(clip[part].removeprefix(f"data:{kind};base64,"))
                         for part, kind in (("sound", "audio/flac"), ("png", "image/png")))
            sound, expected = soundfile.read(io.BytesIO(flac))[0], soundfile.read(wav)[0]
            assert flac[:4] == b"fLaC" and abs(sound - expected).max() < 1e-4
            assert png == wav.with_suffix(".png").read_bytes() and clip["seconds"] == 0.64
    assert len(rows) == 4 and not any(rows.values())            # and no other clip


def test_folders_that_cannot_be_shown_are_named_and_nothing_is_written(folders):
    Path("theirs/1.png").unlink()
    for shown, says in (("nowhere", "nowhere: holds no manifest.json"), ("./ours", "same name"),
                        ("theirs", "No such file.*theirs/1.png")):
        with pytest.raises(FileNotFoundError if "png" in says else InputError, match=says):
            listen.main(["ours", shown])
    assert not list(folders.rglob("*.html"))
    listen.main(["ours", "theirs", "--blind"])              # it shows no pictures
    Path("theirs/0.wav").unlink()
    with pytest.raises(InputError, match="theirs/0.wav: cannot be read"):
        listen.main(["ours", "theirs", "--blind"])


def in_browser(flags, script):
    """The page as a headless browser shows it, after a script ran at its end."""
    listen.main(["ours", "theirs", "--intro", "so <they> sound", "--out", "x.html", *flags])
    page = Path("x.html").resolve()
    page.write_text(page.read_text("utf-8") + f"<script>{script}</script>", "utf-8")
    return subprocess.run(
        [CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--virtual-time-budget=4000", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom",
         page.as_uri()], capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(not CHROME, reason="needs Chromium")
def test_the_page_in_a_browser(folders):
    dom = in_browser([], """setTimeout(() => {
        const all = (tag, test) => [...document.querySelectorAll(tag)].every(test);
        document.title = all('img', i => i.naturalWidth > 0) + ' '
            + all('audio', a => Math.abs(a.duration - 0.64) < 0.01); }, 500)""")
    seen = dom.split("<script>")[0]
    assert "<title>true true</title>" in dom                # every picture and sound is decoded
    assert seen.count("<audio") == 5 and seen.count("<img") == 5 and "0.64 s" in seen
    assert "<th>ours</th><th>theirs</th>" in seen and "so &lt;they&gt; sound" in seen
    assert html.escape(DOG, quote=False) in seen and "seed 0, clip 1" in seen


@pytest.mark.skipif(not CHROME, reason="needs Chromium")
def test_the_blind_test_in_a_browser(folders):
    dom = in_browser(["--blind"], """
        const save = document.getElementById('save'), audio = document.querySelector('audio');
        const rate = name => document.querySelectorAll(`input[name$=${name}][value="4"]`)
            .forEach(i => i.click());
        URL.createObjectURL = blob => { blob.text().then(text => document.body.append(
            Object.assign(document.createElement('pre'), {id: 'csv', textContent: text })));
            return '#' };
        audio.onplay();
        setTimeout(() => {
            audio.onpause();
            rate('OVL');
            document.title = save.disabled;
            rate('REL');
            save.click();
        }, 500);""")
    seen = dom.split("<script>")[0]
    assert "<title>true</title>" in dom                     # not to be saved before all are rated
    assert not re.search("ours|theirs|<img", seen)          # which system it is stays hidden
    answers = html.unescape(dom.split('<pre id="csv">')[1].split("</pre>")[0])
    rows = list(csv.DictReader(answers.splitlines()))
    assert sorted((row["prompt"], int(row["clip"]), row["system"]) for row in rows) == sorted(
        (prompt, k, name) for name, clips in CLIPS.items() for prompt, _, k in clips)
    assert all(row["OVL"] == row["REL"] == "4" for row in rows)
    assert sum(float(row["listened"]) > 0.3 for row in rows) == 1


def test_real_audio_is_the_worlds_of_that_caption(folders):
    _, (first, events, join), *_, (last, *_) = world.held_out("third")
    Path("p.txt").write_text(f"{last}\n{first}\n")
    tiny.listen.main(["--prompts", "p.txt", "--out", "real"])
    (name, _), (_, found) = ((row["prompt"], soundfile.read(f"real/{row['file']}")[0])
                             for row in json.loads(Path("real/manifest.json").read_text()))
    rng = np.random.default_rng((score.FLOOR, 2 * 512 + 1))
    assert {Image.open(path).size for path in Path("real").glob("*.png")} == {(1024, 256)}
    assert name == last and abs(found - world.render(rng, events, join)[0]).max() < 1e-4
    Path("p.txt").write_text("a dog barks in a dream\n")
    with pytest.raises(InputError, match="p.txt: 'a dog barks in a dream' is no held-out"):
        tiny.listen.main(["--prompts", "p.txt", "--out", "dream"])
