"""Texts as token ids of CLIP (https://arxiv.org/abs/2103.00020): byte pair encoding with 49408 ids."""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from typing import Any

import numpy as np

START, END = 49406, 49407


def token_ids(texts: Sequence[str], length: int = 77) -> np.ndarray:
    """Strings -> int32 ``(B, length)``: start, the text as far as there is room, end, zeros."""
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in zip(ids, texts, strict=True):
        found = [START, *_encoder().encode(cleaned(text))[: length - 2], END]
        row[: len(found)] = found
    return ids


def cleaned(text: str) -> str:
    """Broken encodings and HTML entities repaired, white space as single spaces, lower case; as CLIP was trained."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.cache
def _encoder() -> Any:
    try:
        import instant_clip_tokenizer
    except ImportError as error:
        raise ImportError(
            "texts as strings need the package instant-clip-tokenizer, which has ready-made files for Python 3.11 and "
            "3.12 and is built with Rust by pip on others; integer token ids (B, L) need nothing."
        ) from error

    return instant_clip_tokenizer.Tokenizer()
