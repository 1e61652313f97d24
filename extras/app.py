"""A page to type in and listen: sample.py and extras.control in a browser, also for several people.

    pip install "gradio>=6" && python -m extras.app         # then open http://127.0.0.1:7860
"""
import functools
import html
import importlib.util
import math
import os
import shlex
import tempfile
import time

import soundfile

import sample
from data import InputError, Parser, cli, number, require
from extras.control import invert_recording, make_weighted, parse_weights
from model import RATE, latent_shape, open_student

CLIP = '<audio controls src="gradio_api/file={0}.wav"></audio><img src="gradio_api/file={0}.png">'


def main(argv=None):
    p, clip_flags = Parser(__doc__), Parser("the commands that the page shows")
    sample.add_clips(clip_flags.add_argument)
    sample.add_system(p.add_argument)
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    p.add_argument("--port", type=number(int, 1, 65535), default=7860, help="of the page")
    p.add_argument("--share", action="store_true", help="a public link, through gradio's servers")
    args, files = p.parse_args(argv), tempfile.TemporaryDirectory()
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": files.name}
    require(importlib.util.find_spec("gradio"), 'the page needs gradio: pip install "gradio>=6"')
    import gradio as gr
    own = [f"--{k}={v}" for k, v in vars(args).items() if v != p.get_default(k)
           and k not in ("seed", "decoder", "host", "port", "share")]
    system_of = functools.cache(lambda decoder: sample.open_system(clip_flags.parse_args(
        [*own, f"--decoder={decoder}"])))
    invert = functools.lru_cache(20)(lambda seconds, *a: invert_recording(*a)[0])

    def answer(prompt, seed, n, seconds, decoder, recording, words, strength, results):
        """Do what a command does: an error or warnings, HTML of the last results, the results."""
        started, prompt = time.time(), " ".join(prompt.split())
        flags = [*own, f"--prompt={prompt}", f"--seed={seed}", f"--n={n}", f"--seconds={seconds}",
                 f"--decoder={decoder}"]
        name = os.path.basename(recording or "")
        edit = [f"--init={name}", f"--init_prompt={words}", f"--strength={strength}"] * bool(name)
        try:
            clip_flags.parse_args(flags)                        # checks them
            plain, _ = parse_weights(prompt)
            require(plain.strip(), "an empty prompt; say what it sounds like")
            system = system_of(decoder)
            system.seconds, system.shape = seconds, latent_shape(system.folder, seconds)
            z_T = system.noise(range(n), seed)
            if name:
                require(name[-4:].lower() != ".raw", f"{name}: does not say what it is; send a WAV")
                about = soundfile.info(recording)
                require(about.duration <= 60 and about.frames * about.channels <= 2 ** 24
                        and about.samplerate <= 4e5, f"{name}: is longer than a minute, "
                        "or has too many samples or channels; convert it")
                start = invert(seconds, recording, words, system, seed)
                z_T = math.sqrt(1 - strength ** 2) * start + strength * z_T
            mels, wavs = make_weighted(system, [prompt] * n, z_T)
        except (InputError, OSError, RuntimeError) as e:        # soundfile's, and the GPU's
            return html.escape(" ".join(str(e).replace(files.name, "").split())), gr.skip(), results
        out = tempfile.TemporaryDirectory(dir=files.name)   # goes when nothing refers to it
        paths = [f"{out.name}/{wav[:-4]}" for wav in sample.file_names([prompt], n, seed).values()]
        for path, mel, wav in zip(paths, mels, wavs):
            soundfile.write(f"{path}.wav", wav, RATE, "PCM_16")
            sample.picture(mel).save(f"{path}.png")
        script = "sample.py" if plain == prompt and not edit else "-m extras.control"
        command = html.escape(f"python {script} {shlex.join([*flags, *edit])}")
        clips = "".join(map(CLIP.format, paths))
        clips += f"<p>{time.time() - started:.2f} s: <code>{command}</code></p>"
        results = [(clips, out), *results][:20]
        shown = "".join(clips for clips, _ in results).replace("controls", "controls autoplay", 1)
        return html.escape(" ".join(system.encode_text.unread([plain]).values())), shown, results
    with gr.Blocks(title="SwiftAudio", delete_cache=(3600, 3600)) as page:
        prompt = gr.Textbox(label="a sound", placeholder="a dog barks while (rain:2) falls")
        with gr.Row():
            fast = not args.teacher_steps and (open_student(args.student)[0] / "decoder").exists()
            asked = [prompt, seed := gr.Number(args.seed, label="seed", precision=0),
                     gr.Slider(1, args.batch_size, 1, step=1, label="clips"),
                     gr.Number(system_of(args.decoder).seconds, label="seconds"),
                     gr.Radio(["vae", "fast"][:1 + fast], value=args.decoder, label="decoder")]
            make, another = gr.Button("make", elem_id="make"), gr.Button("another")
        with gr.Accordion("edit a recording", open=False, visible=not args.teacher_steps):
            asked += [gr.Audio(type="filepath", label="recording, a minute at most", buttons=[]),
                      gr.Textbox(label="what the recording sounds like"),
                      gr.Slider(0, 1, 0.2, label="strength of the edit")]
        shown = [gr.HTML(elem_id="line"), gr.HTML(elem_id="results"), gr.State([])]
        another.click(None, seed, seed, js="seed => seed + 1")
        gr.on([x.change for x in asked], None, js="() => { clearTimeout(window.later); "
              "window.later = setTimeout(() => make.click(), 300) }")   # all is still for 0.3 s
        make.click(answer, [*asked, shown[2]], shown, trigger_mode="always_last")
    page.queue(api_open=False, max_size=64, default_concurrency_limit=1).launch(
        server_name=args.host, server_port=args.port, share=args.share, max_file_size="20mb")


if __name__ == "__main__":
    cli(main)
