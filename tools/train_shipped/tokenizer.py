"""A CLIP tokenizer with a small byte-level BPE vocabulary learnt from the world's own sentences."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(sentences: Iterable[str], vocabulary: int = 1536, max_length: int = 32) -> CLIPTokenizer:
    """Learn BPE merges (Sennrich et al. 2016); laid out as CLIP's: bytes, word-final bytes, merges, 2 marks.

    All 512 byte tokens are kept, so that no text ever meets an unknown token.
    """
    merges = _learn_merges(sentences, vocabulary - 514)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _learn_merges(sentences: Iterable[str], count: int) -> list[tuple[str, str]]:
    template = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512 + count, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:count]
