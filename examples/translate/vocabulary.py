"""One subword vocabulary for both languages: byte-pair encoding of bytes, by `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from errors import UserError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(len(SPECIAL))


class Vocabulary:
    """Text to token numbers and back. Bytes are its letters, so no text is unknown to it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, sentences: list[str]) -> list[list[int]]:
        """Numbers of each sentence, without BOS and EOS."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(sentences)]

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Text of each row; the special tokens are left out."""
        return [text.strip() for text in self._tokenizer.decode_batch(rows)]

    def pieces(self, row: list[int]) -> list[str]:
        """Each token as text, for pictures."""
        special = dict(enumerate(SPECIAL))
        return [special.get(i) or self._tokenizer.decode([i]) for i in row]

    def to_text(self) -> str:
        """All of it, as JSON; `from_text` is the reverse."""
        return self._tokenizer.to_str()

    @classmethod
    def from_text(cls, text: str, origin: Path) -> Vocabulary:
        """Raises UserError, naming `origin`, if this is no vocabulary of this program."""
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises no class of its own
            raise UserError(f"{origin} holds no vocabulary: {error}") from error
        if [tokenizer.id_to_token(i) for i in range(len(SPECIAL))] != list(SPECIAL):
            raise UserError(f"{origin} holds a vocabulary that does not begin with {SPECIAL}")
        return cls(tokenizer)

    @classmethod
    def train(cls, sentences: Iterable[str], size: int) -> Vocabulary:
        """The `size` most useful subwords of `sentences` (Sennrich et al. 2016), and all bytes.

        Raises:
            UserError: `size` does not even hold the bytes.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if size < len(alphabet) + len(SPECIAL):
            raise UserError(
                f"--vocab-size must be at least {len(alphabet) + len(SPECIAL)}, got {size}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sentences, trainer)
        return cls(tokenizer)
