"""A small embedding that needs no network and no weights: what a text shares with another are pieces of words.

It finds the passage that speaks of the same thing in nearly the same words; it knows no synonyms.
"""

import re
import zlib
from itertools import pairwise

import numpy as np
from langchain_core.embeddings import Embeddings

SIZE = 1024
COMMON = "a an and are at be by can do does for how i in is it my of on or the to what when where who"


class NGramEmbeddings(Embeddings):
    """Counts of words, word pairs and four-letter pieces, hashed into 1,024 numbers, of length 1."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(SIZE)
        for piece in _pieces(text):
            vector[zlib.crc32(piece.encode()) % SIZE] += 1  # crc32: the same in every process, unlike hash()
        vector = np.sqrt(vector)  # a piece said four times counts twice
        return (vector / (np.linalg.norm(vector) or 1)).tolist()


def _pieces(text: str) -> list[str]:
    common = COMMON.split()
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in common]
    letters = [word[i : i + 4] for word in words for i in range(len(word) - 3)]
    return [*words, *letters, *(" ".join(pair) for pair in pairwise(words))]
