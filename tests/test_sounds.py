"""Fine-tuning on recordings: folders of them, what is learnt, and the teacher that is left."""
from pathlib import Path

import peft
import pytest
import soundfile
import torch
from runs import curves, same
from safetensors.torch import load_file

import model
from data import InputError, caption_at, draw_batch
from extras.audio import encode_audio, resample
from extras.teacher import load_teacher
from losses import lora_loss
from recipes.sounds import main, read_sounds


def tone(path, hertz=440, seconds=1.0, rate=16000, gains=(1,)):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.5 * (torch.arange(round(seconds * rate)) * 2 * torch.pi * hertz / rate).sin()
    soundfile.write(path, (wave[:, None] * torch.tensor(gains)).numpy(), rate)
    return torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0].mean(1))


@pytest.fixture
def go(plain, tmp_path):
    def go(out, flags="", steps=1):
        main(f"--teacher {plain} --sounds {tmp_path}/two --out_dir {tmp_path}/{out} --device cpu "
             f"--max_steps {steps} --batch_size 8 --lr 1e-2 --lora_rank 4 --log_every 1 --warmup 0 "
             f"--no-decay {flags}".split())
        return tmp_path / out
    tone(tmp_path / "two/low/x.wav", 300), tone(tmp_path / "two/high/x.wav", 3000)
    return go


def test_captions_are_by_the_first_layout_and_none_is_dropped(tmp_path, monkeypatch):
    def tell():
        try:
            return str([*read_sounds(tmp_path).values()])
        except InputError as e:
            return str(e).replace(f"{tmp_path}/", "")

    monkeypatch.chdir(tmp_path)
    names = "001 - Dog bark/x.flac", "02_rain/x.wav", "3d printer/x.wav"
    for i, name in enumerate(names):
        tone(Path(name))
        Path(name).with_suffix(".txt").write_text(f"a  {i}\nb, c\na {i}\n" * (i != 1))
    tone(mp3 := Path("02_rain/x.mp3"))
    assert "02_rain/x.txt: holds no caption (1 rows read)" in tell()
    Path("02_rain/x.txt").write_text("rain")            # beside both sounds, so of both
    assert tell() == "[['a 0', 'b, c'], ['rain'], ['rain'], ['a 2', 'b, c']]"
    mp3.rename("02_rain/x.M4A")
    assert "1 of 7 files are not read; convert or remove: 02_rain/x.M4A" in tell()
    [path.unlink() for path in (*tmp_path.glob("*/*.txt"), Path("02_rain/x.M4A"))]
    assert tell() == "[['dog bark'], ['rain'], ['3d printer']]"
    table = "File_Name,caption_1,caption_2\n%s,a dog,\n%s,rain,drops\n%s,print,\n" % names
    for text, says in (("".join(f'{{"wav": "{name}", "text": "{name[-2:]}"}}' for name in names),
                        "[['ac'], ['av'], ['av']]"), (table + "x,y,\n", "row 4: its file_name or "),
                       ("a,text\n1,2", "row 1: its file_name or "), (table + "x\n", "row 4: "),
                       (table + f"{tmp_path}/{names[1]},rain,more\n", "'drops', 'more', 'av']")):
        Path("metadata.jsonl" if text[0] == "{" else "metadata.csv").write_text(text)
        assert says in tell()
    Path("metadata.jsonl").unlink(), Path("metadata.csv").unlink()
    Path("02_rain/metadata.csv").write_text("file,text\nx.wav,drops\n")     # of one split
    assert f"2 of 4 files have no caption; write one, or remove: {names[0]}, {names[2]}" in tell()
    Path("02_rain/metadata.csv").unlink(), Path("link").symlink_to("02_rain")
    assert tell() == "[['dog bark'], ['rain'], ['3d printer'], ['link']]"
    tone(Path("0.wav"))
    assert "1 of 5 files have no caption; write one, or remove: 0.wav" in tell()


def test_a_sound_is_mono_at_16_khz_its_loudest_part_or_padded(go, plain, tmp_path, capsys):
    burst, zeros = tone(tmp_path / "two/high/x.wav", seconds=0.64), torch.zeros(20480)
    soundfile.write(tmp_path / "two/high/x.wav", torch.cat([zeros, burst]).numpy(), 16000)
    short = tone(tmp_path / "two/low/x.wav", seconds=0.1)
    stereo = tone(tmp_path / "two/mp3/x.mp3", seconds=0.64, rate=44100, gains=(0.2, 0.8))
    found = load_file(go("out") / "latents.safetensors")["clips"].float()
    assert "3 sounds: 1 were cut to their loudest 0.64 s, 1 padded" in capsys.readouterr().out
    wavs = [x[:len(burst)] for x in (burst, torch.cat([short, zeros]), resample(stereo, 441, 160))]
    system = load_teacher(plain, 1, precision="fp32", device="cpu")
    same(found, encode_audio(system, torch.stack(wavs)), rtol=0, atol=5e-3)


def test_the_latents_are_kept_for_the_same_sounds(go, tmp_path, monkeypatch):
    """Also where modes cannot be copied. tests/test_programs.py stops and resumes it."""
    monkeypatch.setattr("os.chmod", None), tone(tmp_path / "two/low/a.wav", 400)
    go("out")
    monkeypatch.setattr("recipes.sounds.encode_audio", None)
    go("out", steps=2)
    (tmp_path / "two/low/a.wav").rename(tmp_path / "two/high/y.wav")        # a "high" one now
    with pytest.raises(InputError, match="with sounds' captions "):
        go("out", steps=3)
    (tmp_path / "two/low").rename(tmp_path / "two/lower")
    with pytest.raises(InputError, match="captions.csv: is of other sounds; remove it, or"):
        go("out", steps=3)
    assert (tmp_path / "out/captions.csv").read_text() == '"caption"\n"high"\n"low"\n'


def test_it_learns_and_the_teacher_is_complete(go, plain, tmp_path):
    (tmp_path / "old.txt").write_text('a "b", c\nlow\nd\n')
    out = go("out", f"--old_captions {tmp_path}/old.txt --old 2", steps=40)
    assert (out / "captions.csv").read_text() == '"caption"\n"high"\n"low"\n"a ""b"", c"\n'
    _, eps, _, _, t, u = draw_batch(range(8), 0, (4, 8, 8), 0, 1, 999)
    clips = load_file(out / "latents.safetensors")["clips"].float()
    words = ["" if drop < 0.1 else caption_at(["high", "low"], 0, n) for n, drop in enumerate(u)]
    unet, schedule = model.load_unet(plain), model.noise_schedule(model.load_scheduler(plain))
    loss = lora_loss(torch.stack([caption_at(clips, 0, n) for n in range(8)]), t, eps,
        model.TextEncoder(plain)(words), model.denoiser(unet), *schedule, "v").mean().item()
    losses = [line["loss"] for line in curves(out)]
    assert "" in words and losses[0] == pytest.approx(loss, rel=1e-5), losses
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), losses
    x = torch.randn(2, 4, 8, 8), torch.tensor([9, 900]), torch.randn(2, 77, 24)
    adapted = peft.PeftModel.from_pretrained(unet, out / "lora")(*x).sample
    same(model.load_unet(out / "teacher")(*x).sample, adapted, rtol=1e-4, atol=1e-5)
    for path in [p for p in plain.rglob("*") if p.is_file() and p.parent.name != "unet"]:
        assert (out / "teacher" / path.relative_to(plain)).read_bytes() == path.read_bytes()
    full = model.load_unet(go("all", "--all_weights") / "teacher")
    assert not full.conv_in.bias.equal(unet.conv_in.bias)
