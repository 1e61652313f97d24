"""Listening pages: what is in the file, and how it works in a browser where there is one."""
import base64
import csv
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from conftest import refused
from PIL import Image

from data import InputError
from extras import listen
from extras.listen import page_data
from sample import read_manifest

DOG = "a dog </script> \"barks\" & <b>howls</b> 犬"


def write_folder(folder, clips):
    """Write what sample.py writes: clips of noise, pictures and the manifest."""
    folder.mkdir(parents=True)
    rows = []
    for i, (prompt, seed, k) in enumerate(clips):
        wav = np.random.default_rng(i).uniform(-0.5, 0.5, 10240)
        soundfile.write(folder / f"{i}.wav", wav, 16000, "PCM_16")
        Image.new("RGB", (8, 4), (i, 0, 0)).save(folder / f"{i}.png")
        rows.append({"file": f"{i}.wav", "prompt": prompt, "seed": seed, "k": k})
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def folders(tmp_path):
    ours = write_folder(tmp_path / "ours", [(DOG, 0, 0), (DOG, 0, 1), ("rain", 0, 0)])
    return [ours, write_folder(tmp_path / "theirs", [("rain", 0, 0), ("snow", 1, 0)])]


def write_page(path, folders, *flags):
    listen.main([*map(str, folders), "--out", str(path), *flags])


def read_page(path):
    """The data in a page; a browser ends the script at the first </script>."""
    script = re.search(r"<script>(.*?)</script>", path.read_text("utf-8"), re.DOTALL)[1]
    return json.JSONDecoder().raw_decode(script.split("const data = ")[1])[0]


def decoded(url, kind):
    head, content = url.split(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(content)


def test_a_page_holds_all_clips_of_all_folders(folders, tmp_path):
    write_page(tmp_path / "listen.html", folders)
    data, (ours, theirs) = read_page(tmp_path / "listen.html"), folders
    assert data["blind"] is False and data["systems"] == ["ours", "theirs"]
    rows = {(row["prompt"], row["seed"], row["k"]): row["clips"] for row in data["rows"]}
    assert list(rows) == [(DOG, 0, 0), (DOG, 0, 1), ("rain", 0, 0), ("snow", 1, 0)]
    assert [sorted(clips) for clips in rows.values()] == [["0"], ["0"], ["0", "1"], ["1"]]

    for key, system, file in (((DOG, 0, 0), "0", ours / "0"), ((DOG, 0, 1), "0", ours / "1"),
                              (("rain", 0, 0), "0", ours / "2"),
                              (("rain", 0, 0), "1", theirs / "0"),
                              (("snow", 1, 0), "1", theirs / "1")):
        clip = rows[key][system]
        assert decoded(clip["wav"], "audio/wav") == file.with_suffix(".wav").read_bytes()
        assert decoded(clip["png"], "image/png") == file.with_suffix(".png").read_bytes()
        assert clip["seconds"] == 0.64


def test_a_page_loads_nothing_from_elsewhere(folders, tmp_path):
    write_page(tmp_path / "listen.html", folders)
    page = tmp_path.joinpath("listen.html").read_text("utf-8")
    assert "http" not in page and page.count("</script>") == 1 and "/*DATA*/" not in page


def test_the_command_line(folders, tmp_path, monkeypatch, capsys):
    """Into the first folder, or where --out says; folders as they are called from where one is."""
    monkeypatch.chdir(tmp_path)
    for flags, path in (([], "ours/listen.html"), (["--blind"], "ours/listen.html"),
                        (["--out", "x.html"], "x.html")):
        listen.main(["ours", "./theirs/", *flags])
        assert capsys.readouterr().out == f"{path}\n"
        data = read_page(tmp_path / path)
        assert data["blind"] is ("--blind" in flags) and data["systems"] == ["ours", "theirs"]
        assert [(row["prompt"], sorted(row["clips"])) for row in data["rows"]] == [
            (DOG, ["0"]), (DOG, ["0"]), ("rain", ["0", "1"]), ("snow", ["1"])]
        clips = [clip for row in data["rows"] for clip in row["clips"].values()]
        assert all(clip["wav"] and (clip["png"] is None) == data["blind"] for clip in clips)


def test_pages_that_cannot_be_made_are_one_line_and_nothing_is_written(folders, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for flags, says in (([], "required: FOLDER"),
                        (["ours", "nowhere"], "nowhere: holds no manifest"),
                        (["nowhere", "ours"], "nowhere: holds no manifest"),
                        (["ours", "ours"], "same name"), (["ours", "--blind", "--loud"], "--loud"),
                        (["ours", "--out", "no/x.html"], "no/x.html: not saved")):
        refused("extras.listen", *flags, cwd=tmp_path, says=[says])
    assert sorted(tmp_path.rglob("*")) == before


def test_one_folder_and_its_files_are_not_touched(folders, tmp_path):
    before = {p: p.read_bytes() for p in folders[0].iterdir()}
    write_page(folders[0] / "listen.html", folders[:1])
    assert {p: p.read_bytes() for p in folders[0].iterdir() if p.name != "listen.html"} == before
    assert page_data(folders[:1], False)["systems"] == ["ours"]


def test_folders_that_cannot_be_shown_are_named(folders, tmp_path):
    ours, theirs = folders
    twin = shutil.copytree(theirs, tmp_path / "more/ours")
    for shown, says in (([ours, tmp_path / "nowhere"], "nowhere: holds no manifest.json"),
                        ([ours, twin], "same name"), ([ours, ours], "same name"),
                        ([ours, theirs, theirs], "same name")):
        with pytest.raises(InputError, match=says):
            page_data(shown, False)

    for name in ("0.wav", "1.png"):
        content = (theirs / name).read_bytes()
        (theirs / name).unlink()
        with pytest.raises(InputError, match=f"{name}: is missing"):
            write_page(tmp_path / "listen.html", folders)
        (theirs / name).write_bytes(content)
    (theirs / "0.wav").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="0.wav: "):
        write_page(tmp_path / "listen.html", folders)
    assert not (tmp_path / "listen.html").exists()


def test_manifests_of_others_are_refused(tmp_path):
    assert read_manifest(tmp_path) == []
    for content, says in (("{", "is not JSON"), ('{"a": 1}', "is not sample.py's"),
                          ("[{}]", "is not sample.py's")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=f"manifest.json: {says}"):
            read_manifest(tmp_path)


# ---- in a browser -----------------------------------------------------------------------------

CHROME = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))),
              None)


def in_browser(page, script, tmp_path):
    """The page as a headless browser shows it from the disk, after a script ran at its end."""
    copied = tmp_path / "page.html"
    copied.write_text(page.read_text("utf-8") + f"<script>{script}</script>", "utf-8")
    done = subprocess.run(
        [CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         copied.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(not CHROME, reason="needs Chromium")
def test_the_page_in_a_browser(folders, tmp_path):
    write_page(tmp_path / "listen.html", folders)
    dom = in_browser(tmp_path / "listen.html", """
        const all = (tag, test) => [...document.querySelectorAll(tag)].every(test);
        document.title = all('img', i => i.naturalWidth > 0) + ' '
            + all('audio', a => a.src.startsWith('data:audio/wav'));""", tmp_path)
    seen = dom.split("<script>")[0]
    assert "<title>true true</title>" in dom
    assert seen.count("<audio") == 5 and seen.count("<img") == 5
    assert "<th>ours</th><th>theirs</th>" in seen and "0.64 s" in seen
    assert html.escape(DOG, quote=False) in seen and "seed 0, clip 1" in seen


@pytest.mark.skipif(not CHROME, reason="needs Chromium")
def test_the_blind_test_in_a_browser(folders, tmp_path):
    write_page(tmp_path / "listen.html", folders, "--blind")
    dom = in_browser(tmp_path / "listen.html", """
        const button = document.getElementById('save'), before = button.disabled;
        const audio = document.querySelector('audio');
        audio.onplay();
        setTimeout(() => {
            audio.onpause();
            [...document.querySelectorAll('input[value="4"]')].forEach(i => i.click());
            URL.createObjectURL = blob => {
                blob.text().then(text => {
                    const pre = document.createElement('pre');
                    pre.id = 'csv';
                    pre.textContent = text;
                    document.body.append(pre);
                });
                return '#';
            };
            document.title = before + ' ' + button.disabled;
            button.click();
        }, 500);""", tmp_path)
    assert "<title>true false</title>" in dom               # nothing to save before all are rated
    seen = dom.split("<script>")[0]
    assert "ours" not in seen and "theirs" not in seen      # which system it is stays hidden

    answers = html.unescape(dom.split('<pre id="csv">')[1].split("</pre>")[0])
    rows = list(csv.DictReader(answers.splitlines()))
    assert sorted((row["prompt"], row["clip"], row["system"]) for row in rows) == [
        (DOG, "0", "ours"), (DOG, "1", "ours"), ("rain", "0", "ours"), ("rain", "0", "theirs"),
        ("snow", "0", "theirs")]
    assert all(row["OVL"] == row["REL"] == "4" for row in rows)
    assert sum(float(row["listened"]) > 0.3 for row in rows) == 1
