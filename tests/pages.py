"""Pages for tests: what is in them, and diagnoses with documents token by token, some of them hostile."""

import json
from html.parser import HTMLParser

import numpy as np
from synthetic import make

from loopdiag.diagnosis import Diagnosis
from loopdiag.measures.definitions import DEFINITIONS, DIMENSIONS

HOSTILE = (
    "</pre></script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>\"'&amp;{{ 7 * 7 }}$\\frac$漢"
)
FEW = ("prediction", "motion", "diversity", "offset", "tokens")  # groups that are quickly drawn
SAYS = ("units", "state", "long_name")
CHANGES = (0.0, -5.0, -0.5, 0.5, 2.0, 0.05)  # of the NLL at loop 2, by token: not told, kinds H, h, b, B and none


def with_tokens(diagnosis, texts=(("def ", "area", "(self", "):\n", "    ", "return"),), names=("a.py",), top="self"):
    """The same with documents token by token: `CHANGES` at loop 2, their opposite at loop 3, then nothing."""
    loops = diagnosis.data["loop"].values
    longest = max(map(len, texts))
    text = np.full((len(texts), longest), "", object)
    nll = np.full((len(texts), len(loops), longest), np.nan)
    for place, tokens in enumerate(texts):
        text[place, : len(tokens)] = tokens
        steps = np.resize(CHANGES, len(tokens))
        nll[place, :, : len(tokens)] = 6.0 + 3.0 * (loops == 0)[:, None] + np.outer(loops == 2, steps)
        nll[place, :, 0] = np.nan
    tops = np.where(np.isfinite(nll), top, "").astype(object)
    values = {"token_text": text, "token_nll": nll, "token_top": tops}
    data = diagnosis.data.assign(
        {
            name: (DIMENSIONS[name], array, dict(zip(SAYS, DEFINITIONS[name], strict=True)))
            for name, array in values.items()
        }
    )
    return Diagnosis(data.assign_coords(shown=list(names)))


def hostile(**form):
    """A diagnosis whose model, corpus, configuration and documents hold markup."""
    made = with_tokens(
        make(4, model=HOSTILE, **{"groups": FEW, **form}),
        [[HOSTILE, "\n", HOSTILE, "é", "", "end"]],
        [HOSTILE],
        HOSTILE,
    )
    about = made.provenance
    about |= {"corpus": HOSTILE, "config": {"d_model": 128, HOSTILE: HOSTILE}}
    about["absent"] |= {"exit_probability": HOSTILE}
    made.data.attrs["provenance"] = json.dumps(about)
    return made


class Page(HTMLParser):
    """Elements of a page in their order, each with its attributes, and the text in those of a name."""

    VOID = ("meta", "input", "img", "br")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in self.VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag):
        name, _ = self.open.pop()
        assert name == tag, f"{tag} closes {name}"

    def handle_data(self, data):
        for _, place in self.open:
            self.texts[place] += data

    def all(self, tag=None, **attributes):
        """Places of elements with this tag and all of these attributes; `class_` is one of the classes."""
        wanted = attributes.pop("class_", None)
        return [
            place
            for place, (name, given) in enumerate(self.elements)
            if tag in (None, name)
            and (wanted is None or wanted in (given.get("class") or "").split())
            and all(given.get(key) == value for key, value in attributes.items())
        ]

    def text(self, tag=None, **attributes):
        """The texts of these elements."""
        return [self.texts[place] for place in self.all(tag, **attributes)]
