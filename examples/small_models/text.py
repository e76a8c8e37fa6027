"""Tokenizers that know the captions' words, one token each, and spell all other words.

CLIP's is byte pair encoding, which reaches a whole word by merging two pieces at a time. T5's is a
unigram model, which takes the most probable way to cut a text into pieces that it knows.
"""

import string
from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer, T5Tokenizer

from examples.small_models.pictures import words

PROMPT_TOKENS = 24  # the longest caption has 20 words; CLIP adds two tokens, T5 one
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer for the captions."""
    letters = string.ascii_lowercase
    merges = _merges(words())
    known = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    known += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(known))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)  # type: ignore[arg-type]


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer for the captions."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    whole = [(SPACE + word, -1.0) for word in words()]
    letters = [(letter, -10.0) for letter in (SPACE, *string.ascii_lowercase)]
    known = dict([*special, *letters, *whole])  # "a" is a word and a letter, but not with its space
    return T5Tokenizer(vocab=list(known.items()), extra_ids=0, model_max_length=PROMPT_TOKENS)


def _merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """The merges, in order, that build each word.

    Always the most frequent pair, as in training a tokenizer: a merge then happens in every word at
    once, so that no word can stand in another's way.
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in vocabulary]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
