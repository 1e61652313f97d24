"""A page to type in and listen: sample.py and extras.control in a browser, also for several people.

    pip install "gradio>=6" && python -m extras.app         # then open http://127.0.0.1:7860
"""
import functools
import html
import importlib.util
import os
import shlex
import tempfile
import time

import soundfile

import sample
from data import InputError, Parser, cli, number, read_captions, require
from extras.control import invert_recording, make_weighted, parse_weights
from extras.teacher import add_teacher, open_system
from model import RATE, latent_shape, open_student, read_settings, small_parts

GENERAL = ["a dog barks twice", "rain falls softly", "a siren wails", "a bird chirps slowly"]
CLIP = '<audio controls src="gradio_api/file={0}.wav"></audio><img src="gradio_api/file={0}.png">'
LATER = "() => { clearTimeout(window.later); window.later = setTimeout(() => make.click(), 300) }"
commands = Parser("the commands that the page shows")
sample.add_clips(commands.add_argument)
add_teacher(commands.add_argument)
system_of = functools.cache(lambda *flags: open_system(commands.parse_args(flags)))


def answer(own, unchanged, prompt, seed, n, seconds, decoder, path, words, strength, results):
    """Do what a command does: a warning or an error, HTML of the last results, the results."""
    started, prompt = time.time(), " ".join(prompt.split())
    flags = [*own, f"--prompt={prompt}", f"--seed={seed}", f"--n={n}", f"--seconds={seconds}",
             f"--decoder={decoder}"]
    try:
        parsed = commands.parse_args(flags)                 # checks them
        plain, _ = parse_weights(prompt)
        require(plain.strip(), "an empty prompt; say what it sounds like")
        system = system_of(*own, f"--decoder={decoder}")
        system.seconds, system.shape = seconds, latent_shape(system.folder, seconds)
        unread = system.encode_text.unread([plain, words] if path else [plain])
        z_T = system.noise(range(n), seed)
        if path:
            flags += [f"--init={os.path.basename(path)}", f"--init_prompt={words}",
                      f"--strength={strength}"]
            start = invert(path, words, system, seconds, seed)
            z_T = (1 - strength ** 2) ** 0.5 * start + strength * z_T
        mels, wavs = make_weighted(system, [prompt] * n, z_T)
        folder, clips = tempfile.TemporaryDirectory(dir=os.environ["GRADIO_TEMP_DIR"]), ""
        for name, mel, wav in zip(sample.file_names([prompt], n, seed).values(), mels, wavs):
            clip = f"{folder.name}/{name.removesuffix('.wav')}"     # written as by sample.py
            soundfile.write(f"{clip}.wav", wav, RATE, "PCM_16")
            sample.picture(mel).save(f"{clip}.png")
            clips += CLIP.format(clip)
    except (InputError, OSError, RuntimeError) as e:        # soundfile's, and the GPU's
        line = " ".join(str(e).replace(os.environ["GRADIO_TEMP_DIR"], "").split())
        return html.escape(line), unchanged, results
    control = path or plain != prompt or parsed.teacher_steps
    script = "-m extras.control" if control else "sample.py"
    command = html.escape(f"python {script} {shlex.join(flags)}")
    clips += f"<p>{time.time() - started:.2f} s: <code>{command}</code></p>"
    results = [(clips, folder), *results][:20]              # a folder goes with its last reference
    shown = "".join(one for one, _ in results).replace("controls", "controls autoplay", 1)
    return html.escape(" ".join(unread.values())), shown, results


@functools.lru_cache(20)
def invert(path, words, system, seconds, seed):
    """Find the noise of a recording, once for each length of the system, `seconds`."""
    name = os.path.basename(path)
    require(name[-4:].lower() != ".raw", f"{name}: does not say what it is; send a WAV")
    about = soundfile.info(path)
    require(about.duration <= 60 and about.frames * about.channels <= 2 ** 24
            and about.samplerate <= 4e5, f"{name}: over a minute, or too many samples; convert it")
    return invert_recording(path, words, system, seed)[0]


def build(args, own):
    """Lay out the page, gradio's Blocks."""
    import gradio as gr
    system = system_of(*own, f"--decoder={args.decoder}")
    fast = not args.teacher_steps and bool(small_parts(open_student(args.student)[0]))
    tokenizer, known = system.encode_text.tokenizer, "It reads any English word, through CLIP."
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id):    # else it has every word
        words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        known = f"It knows {len(words)} words: {', '.join(words)}."
    captions = system.folder / read_settings(system.folder).get("train", {}).get("captions", "")
    examples = read_captions(captions, limit=4)[0] if captions.is_file() else GENERAL
    with gr.Blocks(title="SwiftAudio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# SwiftAudio\n{args.teacher_steps or 'One'}-step text to audio. {known}")
        asked = [gr.Textbox(label="type a sound", placeholder="a dog barks while (rain:2) falls")]
        gr.Examples(examples, asked)
        with gr.Row():
            asked += [seed := gr.Number(args.seed, label="seed", precision=0),
                      gr.Slider(1, args.batch_size, 1, step=1, label="clips"),
                      gr.Number(system.seconds, label="seconds"),
                      gr.Radio(["vae", "fast"][:1 + fast], value=args.decoder, label="decoder")]
            make, another = gr.Button("make", elem_id="make"), gr.Button("another")
        with gr.Accordion("edit a recording", open=False, visible=not args.teacher_steps):
            asked += [gr.Audio(type="filepath", label="recording, a minute at most", buttons=[]),
                      gr.Textbox(label="what the recording sounds like"),
                      gr.Slider(0, 1, 0.2, label="strength of the edit")]
        shown = [gr.HTML(elem_id="line"), gr.HTML(elem_id="results"), gr.State([])]
        another.click(None, seed, seed, js="seed => seed + 1")
        gr.on([x.change for x in asked], None, js=LATER)    # all is still for 0.3 s
        make.click(functools.partial(answer, own, gr.skip()), [*asked, shown[2]], shown,
                   api_name="answer", trigger_mode="always_last")
    return page.queue(api_open=False, max_size=64, default_concurrency_limit=1)  # a shared System


def main(argv=None):
    p = Parser(__doc__)
    sample.add_system(p.add_argument)
    add_teacher(p.add_argument)
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    p.add_argument("--port", type=number(int, 1, 65535), default=7860, help="of the page")
    p.add_argument("--share", action="store_true", help="a public link, through gradio's servers")
    args, files = p.parse_args(argv), tempfile.TemporaryDirectory()
    require(importlib.util.find_spec("gradio"), 'the page needs gradio: pip install "gradio>=6"')
    own = [f"--{k}={v}" for k, v in vars(args).items() if v != p.get_default(k)
           and k not in ("seed", "decoder", "host", "port", "share")]
    direct = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))     # for gradio, of itself
    os.environ |= {"GRADIO_TEMP_DIR": files.name, "no_proxy": f"{direct},localhost,{args.host}"}
    build(args, own).launch(server_name=args.host, server_port=args.port, share=args.share,
                            max_file_size="20mb", css="#results img { height: 128px }")


if __name__ == "__main__":
    cli(main)
