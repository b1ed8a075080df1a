"""Words that several sections of the report share: titles of behaviours and sites, signs."""

import re

# Title, and what the model is to name.
BEHAVIOURS = {
    "agreement": ("Subject-verb agreement", "the verb that agrees with the subject, with another noun in between"),
    "capital": ("Capital of a country", "the capital of a country or a part of one"),
    "greater_than": ("Greater-than on years", "an end year that lies after the start year"),
    "addition": ("Two-digit addition", "the sum of two numbers of two digits, after worked examples"),
    "two_hop": ("Capital of a city's state or country", "the capital of the state or country that a city lies in"),
    "antonym": ("Opposites", "the opposite of an English word"),
    "antonym_french": ("Opposites in French", "the opposite of a French word"),
    "antonym_spanish": ("Opposites in Spanish", "the opposite of a Spanish word"),
    "rhyme": ("Rhyme at the end of a line", "a word that rhymes with the last word of the line before"),
    "acronym": ("Acronyms", "the last initial of a name of three words"),
    "sport": ("Sport of an athlete", "the sport that an athlete plays"),
    "ioi": ("Indirect object", "the one of two names that is not repeated"),
}


WEAK = "Weak: the model itself is unsure of the behaviour, so that the answers of its rows prove little."

_SITES = {
    "resid_pre": "the residual stream before layer {}",
    "resid_mid": "the residual stream between attention and MLP of layer {}",
    "resid_post": "the residual stream after layer {}",
    "attn_out": "the output of attention in layer {}",
    "mlp_in": "the input of the MLP in layer {}",
    "mlp_act": "the hidden activations of the MLP in layer {}",
    "mlp_out": "the output of the MLP in layer {}",
}


def behaviour(name: str) -> str:
    """Return a behaviour's title; an unknown one's name in words."""
    return BEHAVIOURS[name][0] if name in BEHAVIOURS else name.replace("_", " ").capitalize()


def mark_weak(title: str, weak: object) -> str:
    """Return the title of a row, marked where its behaviour is weak."""
    return f"{title} (weak)" if weak else title


def warn_weak(why: str) -> str:
    """Return the line that says why a behaviour is weak."""
    return f"Weak, so that the answers prove little: {signed(why)}."


def place(site: str) -> str:
    """Return a site, or the parts of several, in words: "the residual stream after layer 15 (resid_post.15)"."""
    words = []
    for part in re.split(r", |\+", site):  # SAEs that are tested together, and what a crosscoder reads
        kind, _, layer = part.partition(".")
        words.append(f"{_SITES[kind].format(layer)} ({part})" if kind in _SITES else part)
    return " and ".join(words)


def signed(text: str) -> str:
    """Return the text with true minus signs before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def sentence(text: str) -> str:
    """Return the text with a capital at the start, a full stop at the end, and true minus signs."""
    text = signed(text.strip())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
