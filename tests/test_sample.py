import csv
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused, run, write_checkpoint
from PIL import Image

import sample
import train
from data import InputError
from eval import read_audio
from model import TINY, Teacher, denoiser, invert, load_unet, log_mel, one_step, peak_normalize, reweighted, sampling_dtype


@pytest.fixture(scope="module")
def student(plain, captions, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main([str(f) for f in ("--teacher", plain, "--captions", captions, "--out_dir", out, "--max_steps", 1, "--batch_size", 2,
                                 "--grad_accum", 1, "--lora_rank", 2, "--device", "cpu")])
    return out / "student"


def go(*flags):
    sample.main([str(f) for f in ("--device", "cpu", *flags)])


def test_the_command_line(student, tmp_path):
    code, output = run("sample.py", "--student", student, "--prompt", "A dog, barking!", "rain", "--n", 2, "--seed", 3, cwd=tmp_path)
    assert code == 0 and "real-time factor" in output, output
    names = ["a-dog-barking_seed3_0", "a-dog-barking_seed3_1", "rain_seed3_0", "rain_seed3_1"]
    for name in names:
        wav, rate = soundfile.read(tmp_path / f"samples/{name}.wav", dtype="int16")
        assert rate == 16000 and wav.shape == (10240,) and wav.any()
        assert f"samples/{name}.wav" in output and f"samples/{name}.png" in output
        assert Image.open(tmp_path / f"samples/{name}.png").size == (256, 256)
    rows = json.loads((tmp_path / "samples/manifest.json").read_text())
    assert [row["file"] for row in rows] == [f"{n}.wav" for n in names]
    assert rows[1] == {"file": "a-dog-barking_seed3_1.wav", "prompt": "A dog, barking!", "seed": 3, "k": 1, "student": str(student),
                       "folder": str(student), "steps": 1,
                       "dtype": str(sampling_dtype(torch.device("cpu")))}
    refused("sample.py", "--student", student, "--prompt", "rain", "--seed", 3, cwd=tmp_path, says=["rain_seed3_0.wav exists", "--overwrite"])


def test_a_clip_is_the_same_alone_and_in_a_batch(student, tmp_path):
    go("--student", student, "--prompt", "a dog", "rain", "wind blows", "--n", 2, "--batch_size", 5, "--out", tmp_path / "many", "--precision", "fp32")
    go("--student", student, "--prompt", "rain", "--n", 2, "--batch_size", 1, "--out", tmp_path / "one", "--precision", "fp32")
    for k in range(2):
        many, one = (soundfile.read(tmp_path / d / f"rain_seed0_{k}.wav", dtype="int16")[0].astype(int) for d in ("many", "one"))
        assert np.abs(many - one).max() <= 2
    other = soundfile.read(tmp_path / "one/rain_seed0_0.wav", dtype="int16")[0].astype(int)
    assert np.abs(one - other).max() > 2


def test_files_of_prompts_overwriting_and_the_manifest(student, tmp_path):
    (tmp_path / "p.txt").write_text("rain\nRain!\nrain\nwind\n")
    flags = ("--student", student, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o")
    go(*flags)
    names = ["rain_seed0_0.wav", "rain-2_seed0_0.wav", "wind_seed0_0.wav"]
    assert sorted(p.name for p in (tmp_path / "o").glob("*.wav")) == sorted(names)
    before = (tmp_path / "o/rain_seed0_0.wav").read_bytes()
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        go(*flags)
    go(*flags, "--overwrite")
    go("--student", student, "--prompt", "thunder", "--out", tmp_path / "o")
    assert (tmp_path / "o/rain_seed0_0.wav").read_bytes() == before
    assert [row["file"] for row in json.loads((tmp_path / "o/manifest.json").read_text())] == names + ["thunder_seed0_0.wav"]


def test_the_teacher_in_many_steps(student, plain, tmp_path):
    go("--student", student, "--prompt", "rain", "--teacher_steps", 3, "--guidance", 2, "--out", tmp_path)
    go("--teacher", plain, "--prompt", "wind", "--teacher_steps", 2, "--out", tmp_path)
    rows = json.loads((tmp_path / "manifest.json").read_text())
    assert [(row["steps"], row["guidance"]) for row in rows] == [(3, 2), (2, 7.5)]


@pytest.mark.parametrize("layout", ["plain", "adapter"])
def test_a_complete_one_step_model(request, layout, tmp_path):
    go("--student", request.getfixturevalue(layout), "--prompt", "rain", "--out", tmp_path)
    assert soundfile.info(tmp_path / "rain_seed0_0.wav").frames == 10240


def test_bad_input(student, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, says in ((("--prompt", " "), "empty prompt"), ((), "empty prompt"), (("--prompt", "a", "--n", 0), "--n"),
                        (("--prompt", "a", "--guidance", 3), "teacher_steps"), (("--prompt", "a"), "no student there yet"),
                        (("--prompt", "a", "--student", "./nowhere"), "nowhere"), (("--prompts", "no.txt"), "no.txt"),
                        (("--prompt", "a", "--student", plain / "vae"), "neither a student")):
        with pytest.raises(InputError, match=says):
            go(*flags)
    assert not list(tmp_path.iterdir())


def test_a_student_of_another_architecture(student, tmp_path):
    other = write_checkpoint(tmp_path / "other", dim=32)
    with pytest.raises(InputError, match="cross_attention_dim 24, the teacher has 32"):
        go("--student", student, "--teacher", other, "--prompt", "a", "--out", tmp_path / "o")
    cut = tmp_path / "cut"
    shutil.copytree(student, cut)
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        go("--student", cut, "--prompt", "a", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_long_prompts_are_cut_with_a_warning(student, tmp_path, capsys):
    go("--student", student, "--prompt", "dog " * 80, "--out", tmp_path)
    assert "77 fit; cut" in capsys.readouterr().out


def test_a_name_for_every_clip():
    names = sample.file_names(["a b", "A  b?", "犬が吠える", "!!", "x" * 300], 1, 0)
    assert list(names.values()) == ["a-b_seed0_0", "a-b-2_seed0_0", "犬が吠える_seed0_0", "clip_seed0_0", "x" * 60 + "_seed0_0"]


def test_the_picture_has_low_frequencies_at_the_bottom():
    mel = torch.full((64, 10), -12.0)
    mel[0] = 4
    rgb = np.asarray(sample.picture(mel))
    assert rgb.shape == (256, 40, 3) and rgb[-1].mean() > 200 and rgb[0].mean() < 5


# ---- weights in prompts ----

def test_weights_are_read():
    for prompt, plain, weights in [
            ("a dog", "a dog", [1] * 5), ("a (dog:2)", "a dog", [1, 1, 2, 2, 2]), ("((a:2) b:.5)", "a b", [1, 0.5, 0.5]),
            (r"a \(b\) 1:2", "a (b) 1:2", [1] * 9), (r"(a\:b: 3 )", "a:b", [3] * 3), ("(:2)x", "x", [1])]:
        assert sample.parse_weights(prompt) == (plain, weights)
    for prompt, where in [("(a:101)", 3), ("a (dog", 3), ("a dog)", 6), ("(dog:x)", 5), ("(dog)", 5), ("(a:2) (b:-1)", 9), ("(a:inf)", 3)]:
        with pytest.raises(InputError, match=f"at character {where},"):
            sample.parse_weights(prompt)


def test_weights_act_on_their_own_clip_only(student, tmp_path):
    def wav(*prompts, names):
        go("--student", student, "--prompt", *prompts, "--out", tmp_path / "w", "--overwrite", "--precision", "fp32")
        return [soundfile.read(tmp_path / f"w/{n}_seed0_0.wav", dtype="int16")[0].astype(int) for n in names]
    plain, = wav("a dog", names=["a-dog"])
    one, = wav("a (dog:1.0)", names=["a-dog-1-0"])
    assert np.array_equal(plain, one)
    a, b = wav("a dog", "a (dog:3)", names=["a-dog", "a-dog-3"])
    alone, = wav("a (dog:3)", names=["a-dog-3"])
    assert np.abs(a - plain).max() <= 2 and np.abs(b - alone).max() <= 2 and np.abs(b - a).max() > 2
    refused("sample.py", "--student", student, "--prompt", "a (dog:", cwd=tmp_path, says=["character 7", "(rain:1.5)"])


def test_the_weight_of_a_token_is_that_of_its_probability(plain):
    """Against attention written out, in one layer; a guided batch's unconditional half keeps its own; compiled, it is the same."""
    unet, teacher = load_unet(plain), Teacher(plain)
    layer = next(m for name, m in unet.named_modules() if name.endswith("attn2"))
    x, text, w = torch.randn(2, 6, layer.to_q.in_features), torch.randn(2, 77, 24), torch.rand(2, 77) * 3
    q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (layer.to_q(x), layer.to_k(text), layer.to_v(text)))
    p = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1) * w[:, None, None]
    expected = layer.to_out[0]((p @ v).transpose(1, 2).flatten(2))
    with reweighted(unet, w):
        assert torch.allclose(layer(x, text), expected, atol=1e-5)
    unweighted = layer(x, text)
    assert not torch.allclose(unweighted, expected, atol=1e-3)
    with reweighted(unet, w[:1]):
        both = layer(x[:1].expand(2, -1, -1), text[:1].expand(2, -1, -1))
    assert torch.allclose(both[0], expected[0], atol=1e-5) and torch.allclose(both[1], unweighted[0], atol=1e-5)
    assert teacher.token_weights(["a dog"], [[1, 1, 2, 2, 2]])[0, :5].tolist() == [1, 1, 2, 1, 1]      # start, a, dog, end
    args = torch.randn(1, *teacher.latent_shape), torch.tensor([999]), text[:1]
    run_it, results = torch.compile(unet, backend="eager"), []
    with torch.no_grad():
        for weights in (None, w[:1], w[1:], None):
            with reweighted(unet, weights):
                results.append((run_it(*args).sample, unet(*args).sample))
    assert all(torch.equal(a, b) for a, b in results) and not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][0], results[3][0]) and not torch.equal(results[1][0], results[2][0])


# ---- editing, length, pages ----

def test_edit_a_recording(tmp_path, capsys):
    """With the tiny teacher as a one-step model: the clip that starts from a recording's noise is nearer to it than another."""
    t = np.arange(3 * 48000) / 48000
    wav = np.sin(2 * np.pi * 700 * t) * (t % 0.5 < 0.2)
    soundfile.write(tmp_path / "in.wav", np.stack([wav, 0 * t], 1), 48000)      # stereo, another rate, longer than the teacher's clips
    flags = ("--student", TINY, "--prompt", "an alarm beeps", "--init", tmp_path / "in.wav", "--init_prompt", "an alarm beeps", "--precision", "fp32")
    go(*flags, "--strength", 0, "--out", tmp_path / "near")
    assert int(re.search(r"but for (\d+)%", capsys.readouterr().out)[1]) < 40
    go(*flags, "--strength", 1, "--out", tmp_path / "far")
    go(*flags[:4], "--precision", "fp32", "--out", tmp_path / "free")
    near, far, free = (soundfile.read(tmp_path / d / "an-alarm-beeps_seed0_0.wav", dtype="float32")[0] for d in ("near", "far", "free"))
    assert np.array_equal(far, free)                                # strength 1 is the seed's own noise
    original = log_mel(peak_normalize(read_audio(tmp_path / "in.wav", 2.56)[None]), 64)
    off = [(log_mel(torch.from_numpy(w)[None], 64) - original).abs().mean() for w in (near, free)]
    assert off[0] < off[1] / 1.5
    assert json.loads((tmp_path / "near/manifest.json").read_text())[0]["strength"] == 0
    for broken, says in (("none.wav", "cannot be read as audio"), (__file__, "cannot be read as audio")):
        refused("sample.py", "--student", TINY, "--prompt", "a dog", "--init", broken, cwd=tmp_path, says=[says])
    refused("sample.py", *flags, "--strength", 2, cwd=tmp_path, says=["--strength"])


def test_inversion_finds_noise(plain):
    """Of a clip that the student itself made, from another start."""
    teacher, unet = Teacher(plain), load_unet(plain).requires_grad_(False)
    text = teacher.encode_text(["a dog"])
    latents = lambda z: one_step(denoiser(unet), z, text, teacher)
    x0, start = latents(torch.randn(1, *teacher.latent_shape)), torch.randn(1, *teacher.latent_shape)
    _, before = invert(latents, x0, start, steps=1)
    z, after = invert(latents, x0, start)
    assert after < before / 2 and 0.5 < z.std() < 2


def test_length(student, tmp_path):
    for seconds, samples in ((0.16, 2560), (1.28, 20480)):
        go("--student", student, "--prompt", "a dog", "--seconds", seconds, "--out", tmp_path / str(seconds))
        assert soundfile.info(tmp_path / str(seconds) / "a-dog_seed0_0.wav").frames == samples
    refused("sample.py", "--student", student, "--prompt", "a dog", "--seconds", 1.3, cwd=tmp_path, says=["--seconds 1.3", "0.08"])
    refused("sample.py", "--student", student, "--prompt", "a dog", "--seconds", 31, cwd=tmp_path, says=["--seconds between"])


CHROME = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def in_browser(page, script, tmp_path):
    """The page as a headless browser shows it from the disk, after a script ran at its end."""
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text() + f"<script>{script}</script>")
    done = subprocess.run([CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=4000",
                           f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(not CHROME, reason="needs Chromium")
def test_the_listening_page_and_the_blind_test_in_a_browser(student, tmp_path):
    go("--student", student, "--prompt", "a dog </script>", "rain", "--out", tmp_path / "ours")
    go("--student", student, "--prompt", "a dog </script>", "--seed", 0, "--out", tmp_path / "theirs")
    go("--student", student, "--prompt", "a dog </script>", "rain", "--out", tmp_path / "ours", "--overwrite", "--html", "--beside", tmp_path / "theirs")
    for beside, says in ((tmp_path / "nowhere", "nowhere"), (tmp_path / "ours", "rename")):
        with pytest.raises(InputError, match=says):
            go("--student", student, "--prompt", "rain", "--out", tmp_path / "ours", "--overwrite", "--html", "--beside", beside)
    page = tmp_path / "ours/listen.html"
    assert "http" not in page.read_text().replace("http-equiv", "")     # nothing is loaded from elsewhere
    dom = in_browser(page, "document.title = [...document.querySelectorAll('img')].every(i => i.naturalWidth > 0)"
                     " + ' ' + [...document.querySelectorAll('audio')].every(a => a.src.startsWith('data:audio/wav'))", tmp_path)
    assert dom.count("<audio") == 3 and dom.count("<img") == 3 and "<th>ours</th><th>theirs</th>" in dom and "0.64 s" in dom
    assert "<title>true true</title>" in dom and "a dog &lt;/script&gt;" in dom and "seed 0, clip 0" in dom
    go("--student", student, "--prompt", "a dog </script>", "rain", "--out", tmp_path / "ours", "--overwrite", "--html", "blind", "--beside", tmp_path / "theirs")
    script = """
      const button = document.getElementById('save'), before = button.disabled, audio = document.querySelector('audio');
      audio.onplay(); setTimeout(() => { audio.onpause();
        [...document.querySelectorAll('input[value="4"]')].forEach(i => i.click());
        URL.createObjectURL = blob => { blob.text().then(t => { const pre = document.createElement('pre'); pre.id = 'csv'; pre.textContent = t; document.body.append(pre) }); return '#' };
        document.title = before + ' ' + button.disabled; button.click() }, 500);"""
    dom = in_browser(page, script, tmp_path)
    seen = dom.split("<script>")[0]
    assert "<title>true false</title>" in dom and "ours" not in seen and "theirs" not in seen       # names are hidden
    rows = list(csv.DictReader(html.unescape(dom.split('<pre id="csv">')[1].split("</pre>")[0]).splitlines()))
    assert sorted((row["prompt"], row["system"]) for row in rows) == [("a dog </script>", "ours"), ("a dog </script>", "theirs"), ("rain", "ours")]
    assert all(row["OVL"] == row["REL"] == "4" for row in rows) and sum(float(row["listened"]) > 0.3 for row in rows) == 1
