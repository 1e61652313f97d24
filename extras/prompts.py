"""Words to the text encoder: weights in prompts, and words that it will not see."""
import contextlib
import re

import torch

from extras.cli import InputError

NUMBER = re.compile(r":\s*(\d+\.?\d*|\.\d+)\s*\)")      # the end of "(rain:1.5)"


def parse_weights(prompt, where="--prompt"):
    r"""Split "a (loud dog:1.5) barks" into "a loud dog barks" and the weight of each character.

    Brackets nest and multiply. A bracket, colon or backslash after a backslash is itself.
    Raises InputError that points at what is broken.
    """
    def broken(i, why):
        raise InputError(f"{where}: {why} at character {i + 1}, {prompt[i:i + 20]!r}: weights "
                         r"look like (rain:1.5), and plain brackets like \( and \)")

    plain, weights, opened, i = [], [], [], 0
    while i < len(prompt):
        c, after = prompt[i], i + 1
        if c == "(":
            opened.append((len(plain), i))
        elif opened and c in ":)":
            found = NUMBER.match(prompt, i)
            if not found:
                broken(i, "a bracket without its number")
            start, _ = opened.pop()
            weights[start:] = [w * float(found[1]) for w in weights[start:]]
            if max(weights, default=0) > 100:           # fp16 ends at 65504
                broken(i, "a weight above 100")
            after = found.end()
        elif c == ")":
            broken(i, "a bracket that nothing opens")
        else:
            if c == "\\" and prompt[i + 1:i + 2] in ("(", ")", ":", "\\"):
                c, after = prompt[i + 1], i + 2
            plain.append(c)
            weights.append(1.0)
        i = after
    if opened:
        broken(opened[-1][1], "a bracket that nothing closes")
    return "".join(plain), weights


def token_weights(pipe, prompts, weights):
    """Weights of each prompt's characters -> of its tokens (B, tokens), by their first letters."""
    spans = pipe.tokenize(prompts, return_offsets_mapping=True)["offset_mapping"]
    rows = [[w[a] if b > a else 1.0 for a, b in row] for row, w in zip(spans, weights)]
    return torch.tensor(rows, device=pipe.device)


def scale_values(layer, _, value):
    """Forward hook of a cross-attention's to_v: see reweighted()."""
    w = layer.token_weights
    if w is None:
        return value
    if len(value) > len(w):             # a guided batch of 2 B: the unconditional half is as it is
        w = torch.cat([w, torch.ones_like(w)])
    return value * w[..., None].to(value.dtype)


@contextlib.contextmanager
def reweighted(unet, weights):
    """Multiply each token's part in every cross-attention by weights (B, tokens); None: by 1.

    Prompt-to-prompt (arXiv 2208.01626) scales attention probabilities; scaling the token's value
    is the same and keeps fused kernels. torch.compile watches the layers' attribute, if this was
    entered before it compiled.
    """
    layers = [m.to_v for name, m in unet.named_modules() if name.endswith("attn2")]
    for layer in layers:
        if not hasattr(layer, "token_weights"):
            layer.register_forward_hook(scale_values)
        layer.token_weights = weights
    try:
        yield
    finally:
        for layer in layers:
            layer.token_weights = None


def unseen_words(pipe, prompts):
    """Lines of warning: words past the text encoder's length, or not in its vocabulary."""
    tokenizer, lines = pipe.tokenizer, []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(ids) > pipe.tokens:
            cut = tokenizer.decode(ids[pipe.tokens - 1:-1])
            lines.append(f"warning: {len(ids)} tokens, {pipe.tokens} fit; cut: {cut!r}")
        if tokenizer.unk_token_id == tokenizer.eos_token_id:
            continue                    # CLIP's own vocabulary has every word, in pieces
        unknown = [repr(word) for word in prompt.split() if tokenizer.unk_token_id
                   in tokenizer(word, add_special_tokens=False).input_ids]
        if unknown:
            lines.append(f"warning: {prompt!r}: the teacher has never seen {', '.join(unknown)}")
    return lines
