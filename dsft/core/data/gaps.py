"""Samples for filling in the middle, drawn from whole source texts; `fim` has the tokens, `prompts` the order."""

from collections import Counter

import numpy as np

from dsft.core.data.examples import FimTriple, hash_text
from dsft.core.data.fim import CUT_SLACK, MAX_DRAWS, cut_into_windows, draw_triple
from dsft.core.data.prompts import FimTemplate
from dsft.core.data.segments import EncodedSample


class GapDrawer:
    """Makes one sample of each window of a source text, always the same for the same text and seed.

    Args:
        template: The tokenizer's fill-in-the-middle template.
        max_length: Most tokens of a sample.
        seed: Seed of the gaps.
    """

    def __init__(self, template: FimTemplate, max_length: int, seed: int) -> None:
        self._template = template
        self._max_length = max_length
        self._seed = seed
        room = max_length - len(template.encoder.encode_prompt(template.render(FimTriple("", "", ""))))
        self._window_tokens = max(1, room - min(CUT_SLACK, room // 4))

    def draw_samples(self, text: str) -> tuple[list[EncodedSample], Counter[str]]:
        """Draw a gap into each window of a text.

        A gap is drawn anew where its middle is blank or the sample too long, a few times at most.

        Returns:
            The samples in the order of their windows, and windows counted: "used", "left out".
        """
        encoder = self._template.encoder
        windows = list(cut_into_windows(text, self._window_tokens, encoder.count_tokens))
        generator = np.random.default_rng([self._seed, hash_text(text)])
        samples: dict[int, EncodedSample] = {}
        for _ in range(MAX_DRAWS):
            drawn = {i: draw_triple(window, generator) for i, window in enumerate(windows) if i not in samples}
            triples = {i: triple for i, triple in drawn.items() if triple is not None}
            encoded = encoder.encode_samples([self._template.render(triple) for triple in triples.values()]).split()
            fitting = zip(triples, encoded, strict=True)
            samples |= {i: sample for i, sample in fitting if len(sample.token_ids) <= self._max_length}
            if len(samples) == len(windows):
                break
        counts = Counter({"used": len(samples), "left out": len(windows) - len(samples)})
        return [samples[i] for i in sorted(samples)], counts
