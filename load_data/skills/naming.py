"""Names in the styles of programs: ``Write `parseHttpHeader` in snake_case.`` -> `parse_http_header`.

Plain fine-tuning does not train this skill; it is meant for adapters. The key is the words of the name, so a
scored name was in no training text, in any style.
"""

import random

from load_data.skills.common import Sample

FIRST = (
    "add build check clear close copy count create delete draw fetch find format get load make merge move "
    "open parse print read remove render save send set show sort split start stop store update write"
)
MIDDLE = (
    "active all base big cached current default empty extra fast file first free global html http "
    "input json last local main max min new next old open page raw safe small temp text user web"
)
LAST = (
    "bytes cache color count data date error event field file frame group header image index item key line "
    "list map mode name node order page path point queue range rate row size state table time token value"
)
STYLES = {
    "snake_case": "_".join,
    "kebab-case": "-".join,
    "CONSTANT_CASE": lambda words: "_".join(words).upper(),
    "camelCase": lambda words: words[0] + "".join(map(str.capitalize, words[1:])),
}
REQUESTS = (
    "Write `{}` in {}.", "Convert `{}` to {}.", "`{}` in {}?", "Rename `{}` to {}.", "What is `{}` in {}?",
)  # fmt: skip


def make(rng: random.Random) -> Sample:
    """Draw a name of two to four words, to be converted from one style to another."""
    middle = rng.sample(MIDDLE.split(), rng.choices((0, 1, 2), (2, 3, 1))[0])
    words = [rng.choice(FIRST.split()), *middle, rng.choice(LAST.split())]
    source, target = rng.sample(sorted(STYLES), 2)
    question = rng.choice(REQUESTS).format(STYLES[source](words), target)
    return Sample("naming: " + "-".join(words), question, STYLES[target](words))
