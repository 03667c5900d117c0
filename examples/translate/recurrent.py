"""The recurrent encoder-decoder that the Transformer replaced, on torch's own nn.GRU.

Without attention (Cho et al. 2014; Sutskever et al. 2014) the decoder knows the source by one
vector, which it gets at every step. With additive attention (Bahdanau et al. 2015) it looks at all
positions; the decoder's state asks after its step and not before, so that torch's nn.GRU runs over
a whole sentence in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn


class AdditiveAttention(nn.Module):
    """weights = softmax(vᵀ tanh(W query + U key)) (Bahdanau et al. 2015, section A.1.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, query: Tensor, keys: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """query (N, L, E), keys (N, S, E), padding (N, S) -> (N, L, E) and weights (N, L, S)."""
        hidden = torch.tanh(self.query(query)[:, :, None] + self.key(keys)[:, None])
        scores = self.score(hidden)[..., 0].float().masked_fill(padding[:, None], -torch.inf)
        weights = scores.softmax(-1).to(keys.dtype)
        return weights @ keys, weights


class RecurrentSeq2Seq(nn.Module):
    """GRU encoder (both directions) and decoder; tied embeddings; the interface of our Transformer.

    Args:
        vocab: tokens of both sides. width: features. layers: of encoder and decoder.
        attention: additive attention; else the source is one vector.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        layers: int,
        dropout: float,
        attention: bool,
        padding_idx: int,
        max_len: int,
    ) -> None:
        super().__init__()
        self.padding_idx, self.max_len = padding_idx, max_len
        self.embedding = nn.Embedding(vocab, width, padding_idx)
        between = dropout if layers > 1 else 0.0
        half = width // 2
        self.encoder = nn.GRU(width, half, layers, True, True, between, bidirectional=True)
        self.bridge = nn.Linear(width, width)
        # Without attention the source's vector stands beside each token.
        self.decoder = nn.GRU(width if attention else 2 * width, width, layers, True, True, between)
        self.attention = AdditiveAttention(width) if attention else None
        self.join = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.generator = nn.Linear(width, vocab)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.generator.weight = self.embedding.weight

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S) -> outputs (N, S, E) and the decoder's first state (layers, N, E)."""
        lengths = (src != self.padding_idx).sum(1).cpu()
        x = self.dropout(self.embedding(src))
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, state = self.encoder(packed)
        outputs, _ = rnn.pad_packed_sequence(outputs, batch_first=True, total_length=src.shape[1])
        both = torch.cat([state[0::2], state[1::2]], dim=-1)
        return outputs, torch.tanh(self.bridge(both))

    def decode(
        self, tgt: Tensor, outputs: Tensor, first: Tensor, state: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, L) -> logits (N, L, V) and the state after them.

        Args:
            first: the decoder's first state, of which the last layer's is the source's vector.
        """
        x = self.dropout(self.embedding(tgt))
        if self.attention is None:
            source = first[-1][:, None].expand(-1, tgt.shape[1], -1)
            x = torch.cat([x, source], dim=-1)
        h, state = self.decoder(x, state.contiguous())
        if self.attention is None:
            context = first[-1][:, None].expand_as(h)
        else:
            context, _ = self.attention(h, outputs, padding)
        joined = torch.tanh(self.join(torch.cat([h, context], dim=-1)))
        return self.generator(self.dropout(joined)), state

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits (N, L, V) of the token after each token of `tgt`."""
        outputs, first = self.encode(src)
        return self.decode(tgt, outputs, first, first, src == self.padding_idx)[0]

    def start(
        self, src: Tensor, max_len: int, beams: int = 1, use_cache: bool | None = None
    ) -> RecurrentDecoding:
        """As `Seq2SeqTransformer.start`; the state is the cache."""
        if not 1 <= max_len <= self.max_len:
            raise ValueError(f"`max_len` must be in [1, {self.max_len}], got {max_len}")
        if use_cache is False:
            raise ValueError("`use_cache` must not be False: a recurrent decoder keeps its state")
        return RecurrentDecoding(self, src, beams)


class RecurrentDecoding:
    """Sentences that are being decoded; as `fused_attn.modules.decoding.Decoding`."""

    def __init__(self, model: RecurrentSeq2Seq, src: Tensor, beams: int) -> None:
        self._model = model
        outputs, first = model.encode(src)
        self._outputs = outputs.repeat_interleave(beams, dim=0)
        self._padding = (src == model.padding_idx).repeat_interleave(beams, dim=0)
        self._first = first.repeat_interleave(beams, dim=1)
        self._state = self._first

    def step(self, tokens: Tensor) -> Tensor:
        """(N,) latest tokens -> logits (N, V)."""
        arguments = (self._outputs, self._first, self._state, self._padding)
        logits, self._state = self._model.decode(tokens[:, None], *arguments)
        return logits[:, 0]

    def reorder(self, rows: Tensor) -> None:
        """Sentence `rows[i]` goes on as sentence i."""
        self._state = self._state.index_select(1, rows)
